"""A newcomer's hour: README's commands in their order, from an empty folder, with the demo's network as somebody's model and a book that is made on the spot.

Minutes: `pytest -m slow tests/test_walk.py`. Long trainings are cut to a few steps (`SHORTER`), and what needs a network or a GPU is left out, by name (`LEFT_OUT`)."""
import json, os, re, shlex, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {'source': "a shell's matter", 'git clone': 'this is the clone', 'make': 'tests/test_demo.py', 'pip install': 'installed', 'nativebit data wikitext-103': 'needs a network',
            'nativebit hf lm_eval': 'another package', 'nativebit evaluate model-3bit --tasks': 'another package', 'nativebit serve': 'tests/test_serve.py', 'curl': 'tests/test_serve.py', 'nativebit quantize path/to/model --method qat --geometry': 'needs a GPU: --attention cudnn'}
LEFT_OUT |= {f'nativebit export model-3bit --to {to}': 'another package' for to,package in dict(openvino='openvino', onnx='onnxruntime', coreml='coremltools').items() if find_spec(package) is None}   # tests/test_noun.py
SHORTER = {'nativebit train --no-nativebit': '--config stdlib-5m --max-steps 12 --batch-size 2 --val-batches 1', 'nativebit train --init-from': '--max-steps 6 --save-every 3 --batch-size 2 --val-batches 1',
           'nativebit posthoc': '--methods rtn,kmeans --max-tokens 2048', 'nativebit evaluate': '--max-tokens 2048', 'nativebit compare': '--max-tokens 2048', 'nativebit chat': '--max-tokens 8',
           'nativebit quantize path/to/model --out': '--calibration-tokens 2048', 'nativebit quantize path/to/model --method qat --data self': '--max-steps 3 --batch-size 2 --val-batches 1 --calibration-tokens 1024 --test-tokens 1024 --force',
           'nativebit generate': '--max-tokens 16'}

def commands():
    "README's commands of its two walks, with lines that go on joined."
    text = re.search(r'## Your own run\n(.*?)\n## The notebooks', (ROOT/'README.md').read_text(), re.S)[1]
    lines = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.S)).replace('\\\n', ' ').splitlines()
    return [l for l in lines if l.strip()]

def words_of(line):
    found = shlex.split(line, comments=True)
    return [w.replace('lr=3e-5,1e-4 seed=0,1,2', 'lr=3e-5 seed=0,1 max_steps=2 batch_size=2 val_batches=1') for w in found]

def longest(table, line): return max((k for k in table if line.startswith(k)), key=len, default=None)

@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    "All commands, run: [(line, exit, stdout, stderr, seconds)] and the folder."
    home, said = tmp_path_factory.mktemp('walk'), []
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', PYTHONPATH=str(ROOT), NATIVEBIT_CACHE=str(home/'cache'), JAX_PLATFORMS='cpu')
    book = ''.join(p.read_text() for p in sorted(Path(json.__file__).parent.parent.glob('[a-h]*.py')))[:1_500_000]
    for name, text in dict(book=book, test=book[:60_000], wikipedia=book[60_000:400_000]).items(): (home/f'{name}.txt').write_text(text)
    def run(words, stdin=''):
        begun = time.time()
        if words[0] == 'nativebit': words = [sys.executable, '-m', *words]
        if words[0] == 'python': words = [sys.executable, *words[1:]]
        r = subprocess.run(words, cwd=home, env=env, input=stdin, capture_output=True, text=True)
        return r.returncode, r.stdout, r.stderr, time.time() - begun
    code, _, err, _ = run(['nativebit', 'export', str(ROOT/'data'/'stdlib'), '--to', 'safetensors', '--out', 'path/to/model'])
    assert code == 0, err
    for line in commands():
        if longest(LEFT_OUT, line): continue
        more = shlex.split(SHORTER.get(longest(SHORTER, line), ''))
        words = words_of(line)
        if '…' in words: continue
        said.append((line, *run([*words, *more], 'hello\n/exit\n' if 'chat' in words[:2] else '')))
    return home, said

def test_every_command_ends_well(walked):
    _, said = walked
    bad = [f"{line}\n  exit {code}: {err[-600:]}" for line, code, _, err, _ in said if code]
    for line, *_, seconds in said: print(f'{seconds:6.1f} s  {line[:90]}')
    assert not bad, '\n'.join(bad)
    assert len(said) > 18

def test_what_is_there_afterwards(walked):
    home, said = walked
    for name in ('logs/book/model.safetensors', 'logs/book/report.html', 'logs/book-3bit/best/model.safetensors', 'sweep.jsonl', 'book.nbpack.safetensors', 'model-4bit/report.html', 'model-3bit/quantize.json',
                 'model-plain/model.safetensors', 'model.nbpack.safetensors', 'model-float/model.safetensors'):
        assert (home/name).is_file(), name
    assert not [p.name for p in home.iterdir() if p.name.endswith('.work') or p.name.endswith('.tmp')]

def test_verdicts_are_words(walked):
    home, said = walked
    out = next(out for line, _, out, _, _ in said if line.startswith('nativebit quantize path/to/model --out'))
    assert re.search(r'verdict: (as good as the original|usable|damaged|broken)', out), out
    assert json.loads((home/'model-4bit'/'quantize.json').read_text())['verdict']['kl'] < .1   # 4 bits of this network are a good model

def test_refusals_are_quick(walked):
    home, _ = walked
    for words in (['quantize', 'nowhere', '--out', 'x'], ['train', '--help'], ['generate', 'book', '--temprature', '1']):
        r = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'nativebit', *words], cwd=home, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        assert not re.search(r'\| +(jax|torch|transformers)$', r.stderr, re.M), words
