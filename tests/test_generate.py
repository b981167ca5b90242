"Generation from the command line: text from a pack, a checkpoint folder, stdin; refusals; the TPU kernel compiled where there is a compiler for it."
import importlib.util, re, subprocess, sys
from pathlib import Path
import processes, pytest
from nativebit.models.checkpoint import save_checkpoint
from nativebit.config import get_config
from nativebit.models.transformer import init_model
from nativebit.ptq.pack import pack_checkpoint

HERE = Path(__file__).resolve().parent

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny random network, quantized, as a checkpoint and packed; its tokens are bytes."
    path = tmp_path_factory.mktemp('generate')
    cfg = get_config('tiny', n_layers=1, geometry='lut-b')
    pack_checkpoint(save_checkpoint(path/'ckpt', cfg, *init_model(cfg, seed=0)), path/'tiny.nbpack.safetensors', 'float32')
    return path

def run(folder, *args, **kw): return processes.run('-m', 'nativebit', 'generate', *args, cwd=folder, **kw)

def test_packed_or_not_the_same_text(folder):
    texts = [run(folder, *args, '--max-tokens', '40', '--temperature', '0', '--prompt', 'def f') for args in
             (['tiny.nbpack.safetensors', '--packed'], ['tiny.nbpack.safetensors'], ['ckpt'])]
    assert all(t.returncode == 0 and t.stdout.startswith('def f') for t in texts), texts[0].stderr
    assert texts[0].stdout == texts[1].stdout == texts[2].stdout

def test_prompt_from_stdin_seed_and_benchmark(folder):
    a, b = [run(folder, 'tiny.nbpack.safetensors', '--packed', '--max-tokens', '70', '--top-k', '20', '--top-p', '0.9', '--seed', s, '--benchmark', stdin='import os') for s in (1, 2)]
    assert a.returncode == 0 and a.stdout.startswith('import os') and a.stdout != b.stdout, a.stderr
    assert re.search(r'[\d.]+ tokens/s, [\d.]+ ms a token; [\d.]+ MB of packed weights a token, [\d.]+ GB/s', a.stdout)

@pytest.mark.parametrize('args, says', [
    (['nowhere'], 'there is no model nowhere'),
    (['ckpt/model.safetensors'], 'no packed network; give its folder, ckpt'),
    ([HERE.parent/'data'/'stdlib', '--packed'], 'is a float model, and --packed is for one with codebooks'),
    (['tiny.nbpack.safetensors', '--max-tokens', '0'], 'max_tokens=0 is not valid'),
    (['tiny.nbpack.safetensors', '--temperature', '-1'], 'temperature=-1.0 is not valid'),
    (['tiny.nbpack.safetensors', '--top-p', '0'], 'top_p=0.0 is not valid'),
    (['tiny.nbpack.safetensors', '--dtype', 'float16'], "dtype='float16' is not valid"),
])
def test_refusals(folder, args, says):
    r = run(folder, *args)
    assert r.returncode != 0 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr

@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason="the TPU compiler is not installed (pip install 'jax[tpu]')")
def test_the_kernel_compiles_for_a_tpu():
    r = subprocess.run([sys.executable, HERE/'aot_kernel.py'], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.endswith('compiled\n'), r.stderr
