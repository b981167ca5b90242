"""Write a text of other people's Python source to train on, without what the student is compared on: python tools/source_text.py OUT.txt --held TEXTS [--articles FILES] [--packages NAMES].

--held: the folder of tools/texts.py; a file that shares 13 words in a row with its code, documentation, books or articles is left out. --articles: texts of `<|endoftext|>`-separated documents (.xz too), put between the files in turn, 1.6 characters to one of source. --packages: of this Python's site-packages, 5.5 million characters of each at most."""
import argparse, random, re, sys, sysconfig
from itertools import chain
from pathlib import Path
from nativebit.data.corpora import EOT, file_documents
from nativebit.utils.files import atomic_path

PACKAGES = ('torch transformers jax sympy scipy pandas matplotlib openai networkx numpy datasets orbax flax fontTools pygments IPython pydantic hypothesis prompt_toolkit '
            'huggingface_hub peft mpmath _pytest grain tokenizers safetensors fastapi starlette uvicorn jedi parso requests urllib3 rich tqdm jinja2 traitlets')
HELD, SIZE, EACH, SHARE = ('code', 'technical', 'books', 'wiki.detok'), 48_000_000, 5_500_000, 1.6   # names; characters in all and of a package; of articles, to one of source

def runs(text):
    "Each 13 words or signs in a row."
    words = re.findall(r'\w+|[^\w\s]', text)
    return {hash(tuple(words[i:i+13])) for i in range(len(words) - 12)}

def up_to(most, texts):
    "Texts until they have that many characters."
    n = 0
    for t in texts:
        yield t
        if (n := n + len(t)) > most: return

def fit(text, held): return 1500 < len(text) < 60_000 and EOT not in text and not runs(text) & held

def files_of(package, held, draws):
    paths = [p for p in sorted((Path(sysconfig.get_path('purelib'))/package).rglob('*.py')) if '_vendor' not in p.parts]
    texts = (p.read_text(encoding='utf-8', errors='replace') for p in draws.sample(paths, len(paths)))
    return up_to(EACH, (t for t in texts if fit(t, held)))

def in_turn(source, articles):
    "A file, and articles until they have SHARE times its characters."
    lead = 0
    for t in source:
        yield t
        lead -= SHARE*len(t)
        while lead < 0 and (a := next(articles, None)): yield a; lead += len(a)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('out', type=Path); p.add_argument('--held', type=Path, required=True)
    p.add_argument('--articles', type=Path, nargs='*', default=[]); p.add_argument('--packages', default=PACKAGES, help='names, with spaces between')
    a = p.parse_args()
    try: held = set().union(*(runs((a.held/f'{n}.txt').read_text(encoding='utf-8')) for n in HELD))
    except OSError as e: sys.exit(f"error: {e.filename} can't be read; python tools/texts.py {a.held} … writes such a folder")
    draws = random.Random(0)
    source = [t for name in a.packages.split() for t in files_of(name, held, draws)]
    draws.shuffle(source)
    texts = [*in_turn(up_to(SIZE, source), chain.from_iterable(map(file_documents, a.articles)))]
    if not source: sys.exit(f"error: none of these packages is installed here: {a.packages}")
    with atomic_path(a.out) as tmp: tmp.write_text(f'\n{EOT}\n'.join(t.strip('\n') for t in texts), encoding='utf-8')
    print(f'{len(texts):,} texts, {sum(map(len, texts)):,} characters')

if __name__ == '__main__': sys.exit(main())
