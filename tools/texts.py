"""Write the texts that students are compared on, 600,000 characters each: python tools/texts.py OUT --wikitext DIR --books DIR --docs DIR [--chats SHARDS --model MODEL].

--wikitext: wiki.test.raw and wiki.test.detok.txt; --books: plain texts, an even share of each; --docs: unpacked source distributions, of which .rst and .txt below doc or docs are read, a file of each in turn; code is this Python's own library, from heapq on; --chats: a folder of `nativebit synthesize MODEL`, whose test split's chats are taken."""
import argparse, sys, sysconfig
from itertools import chain, zip_longest
from pathlib import Path

SIZE = 600_000   # characters

def read(p): return p.read_text(encoding='utf-8', errors='replace')

def books(folder):
    paths = sorted(folder.glob('*.txt'))
    return '\n\n'.join(read(p)[:SIZE//len(paths)] for p in paths)

def code():
    lib = Path(sysconfig.get_path('stdlib'))
    return '\n\n'.join(read(p) for p in sorted(lib.glob('*.py')) if p.stem >= 'heapq')

def documents(folder):
    pages = lambda d: [p for p in sorted(d.rglob('*')) if p.suffix in ('.rst', '.txt') and {'doc', 'docs'} & {*p.parts}]
    in_turn = zip_longest(*[pages(d) for d in sorted(folder.iterdir()) if d.is_dir()])
    return '\n\n'.join(read(p) for p in chain(*in_turn) if p)

def chats(shards, model):
    "The test split's chats: question and answer end with the tokenizer's end of text, as does the template's beginning."
    import numpy as np
    from nativebit.data.loader import prepare
    from nativebit.pipelines.self_data import own_of
    own = own_of(model)
    if not own.parts: sys.exit(f'error: {model} has no chat template, so it writes no chats; leave out --chats')
    begin, tokens = own.tok.encode(own.parts[0]), np.asarray(prepare(f'shards:{shards}', own.tok)[0]['test'][:])
    ends, n = np.flatnonzero(tokens == own.tok.eot), (begin == own.tok.eot).sum() + 2
    starts = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, len(begin)) == begin).all(1))
    stops = [ends[min(np.searchsorted(ends, s) + n, len(ends)) - 1] for s in starts]
    return '\n\n'.join(own.tok.decode(tokens[s:e]) for s,e in zip(starts, stops))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('out', type=Path)
    for n in ('wikitext', 'books', 'docs', 'chats', 'model'): p.add_argument(f'--{n}', type=Path)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    if a.wikitext: texts |= {'wiki.detok': read(a.wikitext/'wiki.test.detok.txt'), 'wiki.raw': read(a.wikitext/'wiki.test.raw')}
    if a.books: texts |= dict(books=books(a.books))
    if a.docs: texts |= dict(code=code(), technical=documents(a.docs))
    if a.chats: texts |= dict(chat=chats(a.chats, a.model))
    for name,text in texts.items():
        (a.out/f'{name}.txt').write_text(text[:SIZE], encoding='utf-8')
        print(f'{name}: {len(text[:SIZE]):,} of {len(text):,} characters')

if __name__ == '__main__': sys.exit(main())
