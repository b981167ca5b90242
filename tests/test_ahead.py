"Programs that are compiled while text is read are the ones that run."
import json, logging, re
import jax, numpy as np, pytest
from nativebit.config import get_config
from nativebit.models.checkpoint import checkpoint_tensors, save_checkpoint
from nativebit.models import transformer
from nativebit.models.transformer import init_model
from nativebit.pipelines import packing
from nativebit.pipelines.quantize import checkpoint_layers
from nativebit.train import loop

AHEAD = {'step', 'run', 'weighted_codebook', 'gptq_weights', 'refit_codebook', 'hard_weight', 'quantized_params', 'forward', '<lambda>', 'layer_diagnostics'}

@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    words = np.random.default_rng(0).choice(list('abcdefgh '), 60_000)
    (tmp_path/'text.txt').write_text('\n\n'.join(''.join(part) for part in words.reshape(60, 1000)))
    return f'text:{tmp_path}/text.txt'

def settings(text, **kw): return get_config('tiny', n_layers=2, d_ff=112, dataset=text, batch_size=8, val_batches=1, warmup_steps=1, val_every=100, test_tokens=512, **kw)

def test_what_was_compiled_ahead_is_not_compiled_again(text, tmp_path, caplog, monkeypatch):
    background = loop.in_background
    float_cfg = settings(text, nativebit=False)
    save_checkpoint(tmp_path/'float', float_cfg, init_model(float_cfg, seed=0)[0])
    cfg = settings(text, recipe='qat', geometry='lut-b', start='gptq', max_steps=2, calibration_tokens=512)
    begun = []
    monkeypatch.setattr(loop, 'in_background', lambda f: begun.append(background(f)) or begun[-1])
    loop._compiling(loop.structure(cfg), cfg.quant)   # as `compiling` does on a GPU
    for work in begun: work.result(300)   # those that they begin, too
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, 'jax'): loop.train(cfg, tmp_path/'qat', tmp_path/'float')
    again = re.findall(r'^Compiling jit\((.*?)\)', '\n'.join(r.getMessage() for r in caplog.records), re.M)
    assert again and not AHEAD & {*again}, sorted(AHEAD & {*again})
    assert json.loads((tmp_path/'qat'/'log.jsonl').read_text().splitlines()[-1])['type'] == 'eval'

def test_packing_is_compiled_ahead(caplog):
    cfg = get_config('tiny', geometry='lut-b', d_ff=160)   # a shape that nothing else here has
    for program in packing.lowered_packing(cfg.model, cfg.quant): program.compile()
    params, books = init_model(cfg, seed=0)
    tensors = checkpoint_tensors(params, books)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, 'jax'): assert len([*checkpoint_layers(tensors, cfg.model, cfg.quant)]) == cfg.model.n_layers
    assert 'Compiling jit(_packed_matrices)' not in caplog.text

def test_a_program_that_fails_to_compile_is_met_by_whoever_runs_it():
    assert isinstance(loop.in_background(lambda: 1/0).exception(), ZeroDivisionError)

def test_a_deep_network_in_a_loop_computes_the_same(monkeypatch):
    cfg = get_config('tiny', n_layers=3)
    (params, books), tokens = init_model(cfg, seed=0), jax.random.randint(jax.random.key(0), (2, 16), 0, cfg.model.vocab_size)
    monkeypatch.setattr(transformer, 'DEEP', 3)
    run = lambda loop, *state: jax.jit(lambda *x: transformer.forward_fn(cfg)(*x, loop=loop))(params, tokens, *state)
    for state in ((), (books,)): np.testing.assert_allclose(*[np.asarray(run(loop, *state)) for loop in (True, False)], rtol=1e-5, atol=1e-6)
    assert 'while' in jax.jit(lambda *x: transformer.forward_fn(cfg)(*x, loop=True)).lower(params, tokens).as_text()
