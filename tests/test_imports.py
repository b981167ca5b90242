"Help and refusals of every command import nothing that takes seconds: no JAX, no PyTorch, no transformers."
import subprocess, sys
from pathlib import Path
import pytest
from nativebit.__main__ import COMMANDS, keys, outline

HEAVY = 'jax flax orbax optax torch transformers matplotlib datasets pyarrow triton'.split()
ASK = f'''import os, sys, time
from nativebit.__main__ import main
try: main(sys.argv[1:]); code = 0
except SystemExit as e: code = e.code
print(sum(os.times()[:2]), *sorted(set({HEAVY}) & set(sys.modules)))
sys.exit(code)'''

def ask(*words, cwd):
    r = subprocess.run([sys.executable, '-c', ASK, *words], capture_output=True, text=True, cwd=cwd)
    seconds, *heavy = r.stdout.splitlines()[-1].split()
    assert not heavy, heavy
    assert float(seconds) < 3   # half a second where nothing else runs
    return r

@pytest.mark.parametrize('name', COMMANDS)
def test_help(tmp_path, name):
    r = ask(name, '--help', cwd=tmp_path)
    assert r.returncode == 0 and f'usage: nativebit {name}' in r.stdout, r.stderr

@pytest.mark.parametrize('name', [n for n in COMMANDS if n != 'hf'])
def test_an_unknown_flag(tmp_path, name):
    words = ['x']*sum(p.default is p.empty for p in __import__('inspect').signature(outline(name)).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD)
    r = ask(name, *words, '--no-such-flag', '1', cwd=tmp_path)
    assert r.returncode == 2 and 'unrecognized arguments: --no-such-flag' in r.stderr, r.stderr

@pytest.mark.parametrize('words', [
    'quantise m', 'quantize missing --out x', 'quantize m --method kmean --out x', 'quantize m --geometry int3 --out x', 'quantize m --method gptq --data text:missing.txt --out x', 'generate missing', 'evaluate missing --data stdlib', 'evaluate m --data text:missing.txt',
    'evaluate m --data stdlib --against missing', 'compare m missing --texts a=stdlib', 'compare m m --texts stdlib', 'export missing --out x', 'convert missing --out x', 'hf missing_module', 'data wikipedia', 'data text:missing.txt', 'train --config missing',
    'train --dataset text:missing.txt', 'train --init-from missing', 'train --recipe fast', 'train --lr fast', 'aot --config missing', 'aot --geometry int3', 'speed --mode slow', 'speed --config missing', 'pack m --geometry int3 --out x', 'generate_torch missing', 'posthoc --ckpt missing',
    'posthoc --dataset text:missing.txt', 'sweep lr x.jsonl', 'sweep lr=1e-3 x.jsonl --init-from missing', 'results --config missing'])
def test_refusals(tmp_path, words):
    (tmp_path/'m').mkdir(); (tmp_path/'m'/'config.json').write_text('{}')
    r = ask(*words.split(), cwd=tmp_path)
    assert r.returncode and 'error: ' in r.stderr, r.stderr

def test_keys():
    from nativebit.pipelines.quantize import METHODS
    from nativebit.train.benchmark import MODES
    assert keys('pipelines.quantize.METHODS') == [*METHODS] and keys('train.benchmark.MODES') == [*MODES]
