"The command as a user runs it: each method, stopped and taken up again, refused where it can't be done."
import json, os, subprocess, sys, time
from pathlib import Path
import ml_dtypes, numpy as np, pytest
from safetensors.numpy import save_file
from nativebit.families import hf_names, model_config
from nativebit.data import train_tokenizer
from nativebit.ledger import param_shapes
from nativebit.packed_folder import open_folder

CONFIG = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000., hidden_act='silu', tie_word_embeddings=True)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp('quantize'), np.random.default_rng(0)
    text = '\n\n'.join(f'line {i}: {i*i} is the square of {i}' for i in range(2000))
    (home/'some.txt').write_text(text)
    (home/'model').mkdir()
    (home/'model'/'config.json').write_text(json.dumps(CONFIG))
    train_tokenizer([text], 300).tok.save(str(home/'model'/'tokenizer.json'))
    model = model_config(CONFIG)
    weights = {hf_names(model)[n]: (np.ones(s) if len(s) == 1 else .1*rng.standard_normal(s)).astype(ml_dtypes.bfloat16) for n,s in param_shapes(model)}
    save_file(weights, home/'model'/'model.safetensors')
    return home

def start(home, *args):
    env = dict(os.environ, JAX_PLATFORMS='cpu', NATIVEBIT_CACHE=str(home/'cache'))
    return subprocess.Popen([sys.executable, '-m', 'nativebit.quantize', 'model', *args], cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def run(home, *args):
    p = start(home, *args)
    p.out, p.err = p.communicate()
    return p

QAT = ['--method', 'qat', '--geometry', 'lut-b', '--data', 'text:some.txt', '--max-steps', '30', '--batch-size', '4', '--warmup-steps', '1', '--val-batches', '1', '--test-tokens', '1024', '--lr', '3e-3']

def test_qat_teaches_and_goes_on(home):
    p = start(home, *QAT, '--out', 'qat')
    while p.poll() is None and not list((home/'qat.work').glob('qat/log.jsonl')): time.sleep(.05)
    p.kill(); p.communicate()
    assert not (home/'qat').exists() and (home/'qat.work'/'float').exists()
    p = run(home, *QAT, '--out', 'qat')
    assert p.returncode == 0 and '| qat |' in p.out, p.err
    rows = json.loads((home/'qat'/'quantize.json').read_text())['rows']
    kmeans = run(home, '--method', 'kmeans', '--geometry', 'lut-b', '--data', 'text:some.txt', '--test-tokens', '1024', '--out', 'kmeans')
    assert kmeans.returncode == 0, kmeans.err
    assert rows[1]['kl'] < json.loads((home/'kmeans'/'quantize.json').read_text())['rows'][1]['kl']   # what k-means starts from, and training improves
    assert not (home/'qat.work').exists() and open_folder(home/'qat').quant.block_shape == (8, 64)

def test_no_data_no_perplexity(home):
    p = run(home, '--method', 'rtn', '--out', 'rtn')
    assert p.returncode == 0 and '| rtn | 3.6' in p.out and 'ppl' not in p.out, p.err

@pytest.mark.parametrize('args, says', [
    ([], 'say where to write'),
    (['--out', 'x', '--method', 'gptq'], 'gptq reads text'),
    (['--out', 'x', '--method', 'gpqt'], "did you mean 'gptq'"),
    (['--out', 'x', '--geometry', 'lutb'], "did you mean 'lut-b'"),
    (['--out', 'model', '--method', 'rtn'], 'is no packed model'),
    (['--out', 'x', '--data', 'text:nowhere.txt'], 'nowhere.txt')])
def test_refusals(home, args, says):
    there = lambda: sorted(x for x in home.rglob('*') if 'cache' not in x.parts)
    before = there()
    p = run(home, *args)
    assert p.returncode == 1 and says in p.err and p.err.count('\n') == 1, p.err
    assert there() == before
