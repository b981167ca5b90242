"The command as a user runs it: each method, stopped and taken up again, refused where it can't be done."
import json, re, signal, time
from pathlib import Path
from unittest.mock import Mock
import ml_dtypes, numpy as np, pytest, test_cli
from safetensors.numpy import save_file
from nativebit.interop.families import hf_names, model_config
from nativebit.models.checkpoint import fit_params
from nativebit.config import GEOMETRIES, QuantConfig
from nativebit.interop.convert import open_model
from nativebit.utils.cli import one_sentence, parse_args
from nativebit.data.tokenizers import train_tokenizer
from nativebit.formats.size import param_shapes
from nativebit.models.transformer import model_shapes, network
from nativebit.formats.hf_folder import open_folder
from nativebit.ptq.gptq import refit_codebook, weighted_codebook
from nativebit.pipelines.quantize import folder_reader, main, quantize, store_layer

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

def start(home, *args): return test_cli.start(home, 'nativebit', 'quantize', 'model', *args)
def run(home, *args): return start(home, *args).wait()

QAT = ['--method', 'qat', '--geometry', 'lut-b', '--data', 'text:some.txt', '--max-steps', '30', '--batch-size', '4', '--warmup-steps', '1', '--val-batches', '1', '--test-tokens', '1024', '--calibration-tokens', '1024', '--lr', '3e-3']

def table(folder): return json.loads((folder/'quantize.json').read_text())['rows']

def test_qat_teaches_and_goes_on(home, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.chdir(home); m.setattr('nativebit.pipelines.quantize.save_folder', Mock(side_effect=KeyboardInterrupt)); main(**parse_args(main, ['model', *QAT, '--out', 'qat']))
    assert not (home/'qat').exists()
    log = (home/'qat.work'/'qat'/'log.jsonl').read_text()
    p = run(home, *QAT, '--out', 'qat')
    assert p.returncode == 0 and '| qat |' in p.stdout, p.stderr
    assert (home/'qat'/'qat.jsonl').read_text() == log and not (home/'qat.work').exists()   # nothing was trained twice
    taught = [r['distill'] for r in map(json.loads, log.splitlines()) if 'distill' in r]
    assert taught[-1] < .9*taught[0]   # nearer to its teacher

@pytest.mark.slow
def test_qat_stopped_in_training_goes_on(home):
    p = start(home, *QAT, '--out', 'stopped')
    log = home/'stopped.work'/'qat'/'log.jsonl'
    while p.poll() is None and not (log.exists() and '"step": 5' in log.read_text()): time.sleep(.05)
    p.send_signal(signal.SIGTERM); p.wait()
    assert p.returncode == 143 and not (home/'stopped').exists()
    p = run(home, *QAT, '--out', 'stopped')
    assert p.returncode == 0 and '| qat |' in p.stdout, p.stderr
    assert '"type": "resume"' in (home/'stopped'/'qat.jsonl').read_text() and not (home/'stopped.work').exists()

@pytest.mark.parametrize('method', ['kmeans', 'gptq'])
def test_layers_that_are_finished_are_kept(home, tmp_path, monkeypatch, method):
    make = lambda out: quantize(home/'model', out, method, 'lut-b', f"text:{home/'some.txt'}", calibration_tokens=512, test_tokens=64)
    make(tmp_path/'whole')
    def stopped(work, i, packed): store_layer(work, i, packed); raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): m.setattr('nativebit.pipelines.quantize.store_layer', stopped); make(tmp_path/'out')
    stored = []
    with monkeypatch.context() as m: m.setattr('nativebit.pipelines.quantize.store_layer', lambda work, i, packed: (stored.append(i), store_layer(work, i, packed))); make(tmp_path/'out')
    assert stored == [1]
    a, b = [open_folder(tmp_path/d).tensors for d in ('out', 'whole')]
    assert set(a) == set(b) and all(a[n].tobytes() == b[n].tobytes() for n in a)

LOADED = {'Llama': dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), 'Qwen3': dict(head_dim=16), 'Qwen2': dict(tie_word_embeddings=False)}

@pytest.mark.parametrize('kind', LOADED)
def test_transformers_loads_what_is_written(tmp_path, kind):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    import nativebit.hf
    from test_convert import random_transformer
    source = random_transformer(kind, tmp_path/'float', 'bfloat16', **LOADED[kind])
    quantize(source, tmp_path/'packed', 'rtn', 'lut-b')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'packed', dtype=torch.float32)
    model, tokens = open_model(source).model, np.random.default_rng(0).integers(0, 80, (2, 24))
    read = folder_reader(open_folder(tmp_path/'packed'), model)
    params = fit_params({n: read(n) for n,_ in param_shapes(model)}, model_shapes(model))
    with torch.no_grad(): np.testing.assert_allclose(network(model, params)(tokens), theirs(torch.tensor(tokens)).logits.numpy(), atol=1e-4)

@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_on_a_cpu_no_thread_waits_for_others(geometry):
    "Of a batch of systems each thread solves a part and waits for the rest: with as many batches as threads, for ever."
    w, quant = np.ones((64, 128), np.float32), QuantConfig(**GEOMETRIES[geometry])
    cb = weighted_codebook(w, np.eye(128, dtype=np.float32), quant)
    program = refit_codebook.lower(w, np.eye(128, dtype=np.float32), w, cb, quant).as_text()
    assert set(re.findall(r'num_batch_dims = "(\d)"', program)) == {'0'}

def test_no_data_no_perplexity(home):
    p = run(home, '--method', 'rtn', '--geometry', 'int8', '--out', 'rtn', '--no-report')
    assert p.returncode == 0 and '| rtn | 3.6' in p.stdout and '| perplexity a token |' not in p.stdout and 'verdict: ' in p.stdout, p.stderr
    assert p.stderr.splitlines()[-1].startswith('next: nativebit generate rtn --prompt') and not (home/'rtn'/'report.html').exists()

@pytest.mark.parametrize('args, says', [
    ([], 'say where to write'),
    (['--out', 'x', '--method', 'qat'], 'qat reads text'),
    (['--out', 'x', '--bits', '3', '--geometry', 'int8'], 'give one of them'),
    (['--out', 'x', '--bits', '5'], '2, 3 or 4'),
    (['--out', 'x', '--embed', 'int9'], "did you mean 'int8'"),
    (['--out', 'x', '--method', 'gpqt'], "did you mean 'gptq'"),
    (['--out', 'x', '--geometry', 'lutb'], "did you mean 'lut-b'"),
    (['--out', 'model', '--method', 'rtn'], 'exists'),
    (['--out', 'x', '--data', 'text:nowhere.txt'], 'nowhere.txt'), (['--out', 'x', '--data', 'sefl'], "unknown dataset 'sefl': did you mean 'self'?")])
def test_refusals(home, args, says, monkeypatch):
    there = lambda: sorted(x for x in home.rglob('*') if 'cache' not in x.parts)
    before = there()
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as e, one_sentence(): main(**parse_args(main, ['model', *args]))
    assert says in str(e.value) and '\n' not in str(e.value)
    assert there() == before
