"`--bits 3.2`: never above what was asked, never measured twice, the same mixture for every method, one sentence for what can't be."
import json
import numpy as np, pytest
import nativebit as nb
from hypothesis import given, settings, strategies as st
from nativebit.config import FAMILY, GEOMETRIES, ModelConfig, QuantConfig, geometry_name
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.size import matrix_shapes, matrix_stored
from nativebit.pipelines import mixed_bits
from nativebit.pipelines.mixed_bits import bit_range, cheapest, least_loss, mixture, units, weights_of
from nativebit.pipelines.quantize import main, quantize
from nativebit.utils.cli import UserError, one_sentence, parse_args
from test_quantize import home   # a model of two layers

def random_losses(model, seed):
    rng = np.random.default_rng(seed)
    return {n: sorted(rng.lognormal(0, 2, 3).tolist(), reverse=True) for n in matrix_shapes(model)}

SHAPES = [dict(d_model=64, d_ff=96, n_heads=4), dict(d_model=80, d_ff=136, n_heads=5, n_kv_heads=1), dict(d_model=32, d_ff=7, n_heads=1)]   # the last two fill no whole blocks

@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(0, 2**32-1))
def test_a_mixture_is_what_is_stored_and_never_more_than_asked(shape, share, seed):
    model = ModelConfig(vocab_size=64, n_layers=3, context_len=16, **shape)
    low, high = bit_range(model)
    bits = low + share*(high - low)
    mix = mixture(model, random_losses(model, seed), bits)
    quant = QuantConfig(**GEOMETRIES[mix.geometry], overrides=tuple(mix.overrides.items()))
    stored = 8*sum(x.nbytes for n, s in matrix_shapes(model).items() for x in matrix_stored(s, quant.of(n)).values())
    assert stored/weights_of(model) == mix.bits <= bits and mix.above >= -1e-9
    assert all(len({quant.of(n) for n in group}) == 1 for group in units(model))
    assert share < 1 or mix.bits == high
    assert mixture(model, random_losses(model, seed), bits, apart=True).kl <= mix.kl + 1e-9

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32-1), st.floats(0, 1))
def test_nothing_beats_the_choice(seed, share):
    rng = np.random.default_rng(seed)
    loss, cost = np.sort(rng.random((5, 3)))[:, ::-1], np.cumsum(rng.integers(1, 50, (5, 3)), 1)
    budget = int(cost[:, 0].sum() + share*(cost[:, -1] - cost[:, 0]).sum())
    total = lambda x, p: x[range(5), p].sum()
    best = min(total(loss, p) for p in map(list, np.ndindex(3, 3, 3, 3, 3)) if total(cost, p) <= budget)
    pick = cheapest(loss, cost, budget)
    assert total(cost, pick) <= budget and total(loss, pick) == pytest.approx(best) and least_loss(loss, cost, budget) <= best + 1e-9

def test_a_grid_that_is_too_coarse_stays_within_the_budget(monkeypatch):
    monkeypatch.setattr(mixed_bits, 'GRID', 10)
    rng = np.random.default_rng(0)
    loss, cost = np.sort(rng.random((40, 3)))[:, ::-1], np.cumsum(rng.integers(100, 5000, (40, 3)), 1)
    budget = int(cost.mean(1).sum())
    pick = cheapest(loss, cost, budget)
    assert cost[range(40), pick].sum() <= budget

def test_the_command(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    main(**parse_args(main, ['model', '--bits', '3.2', '--method', 'kmeans', '--out', 'mixed', '--force']))
    said = capsys.readouterr().out
    kept = json.loads((home/'mixed'/'quantize.json').read_text())
    assert 'mixture: ' in said and 3.1 < kept['rows'][1]['bits_per_weight'] <= 3.2 and kept['rows'][1]['bits_per_weight'] == pytest.approx(kept['mix']['bits'], rel=1e-12)
    folder, names = open_folder(home/'mixed'), matrix_shapes(nb.load(home/'mixed').pack.config.model)
    assert len(kept['losses']) == len(names) == 14 and 'bits of an index' in (home/'mixed'/'report.html').read_text()
    # the choice as overrides is the same folder
    quantize(home/'model', home/'given', 'kmeans', geometry_name(kept['geometry']), overrides=dict(kept['overrides']))
    given = open_folder(home/'given')
    assert all(np.array_equal(given.tensors[n], x) for n, x in folder.tensors.items()) and given.quant == folder.quant

def test_losses_are_not_found_twice(home, monkeypatch):
    found = []
    def counted(*args, real=mixed_bits.LOSSES['estimated']):
        for i, layer in real(*args): found.append(i); yield i, layer
    monkeypatch.setitem(mixed_bits.LOSSES, 'estimated', counted)
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('nativebit.pipelines.quantize.save_folder', stop)
        quantize(home/'model', home/'stopped', 'rtn', bits=2.8)
    path = home/'stopped.work'/'losses.json'
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({n: x for n, x in whole.items() if n.startswith('layers.1.')}))
    with pytest.raises(UserError, match='other settings.*bits'): quantize(home/'model', home/'stopped', 'rtn', bits=2.9)
    done = quantize(home/'model', home/'stopped', 'rtn', bits=2.8)
    kept = json.loads((home/'stopped'/'quantize.json').read_text())['losses']
    assert found == [1, 0, 0]   # the second layer was known
    for n in whole: assert kept[n] == pytest.approx(whole[n], rel=1e-4)
    assert done.mix.bits <= 2.8

def test_estimated_is_near_measured(home):
    def losses(way):
        quantize(home/'model', home/way, 'kmeans', bits=3.2, sensitivity=way)
        return np.ravel([*json.loads((home/way/'quantize.json').read_text())['losses'].values()])
    a, b = map(losses, ('estimated', 'measured'))
    assert mixed_bits.rank_correlation(a, b) > .8

@pytest.mark.parametrize('args, says', [
    (['--bits', '2.05'], 'a number between 2.0625 and 4.25'),
    (['--bits', '2.063'], 'codebooks counted'),
    (['--bits', '4.5'], 'a number between 2.0625 and 4.25'),
    (['--bits', 'nan'], 'a number between 2.0625 and 4.25'),
    (['--bits', 'inf'], 'a number between 2.0625 and 4.25'),
    (['--bits', '3.2', '--geometry', 'int8'], 'give one of them'),
    (['--bits', '3.2', '--override', '*.down=4bit'], 'leave --override out'),
    (['--bits', '3.2', '--sensitivity', 'measure'], "did you mean 'measured'"),
    (['--bits', '3', '--apart'], '--apart is for a mixture'),
    (['--sensitivity', 'measured'], '--sensitivity is for a mixture'),
    (['--bits', '3.2', '--method', 'qat'], 'qat reads text'),
    (['--bits', '3.2', '--method', 'qat', '--data', 'text:some.txt', '--dropout', '2'], 'dropout=2.0 is not valid')])
def test_refusals(home, args, says, monkeypatch):
    there = lambda: sorted(x for x in home.rglob('*') if 'cache' not in x.parts)
    before = there()
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as e, one_sentence(): main(**parse_args(main, ['model', '--out', 'x', *args]))
    assert says in str(e.value) and '\n' not in str(e.value) and there() == before

@pytest.mark.parametrize('bits, geometry', [(2, '2bit-128'), (3., '3bit-8x64'), (4., '4bit-8x64')])
def test_whole_numbers_mean_what_they_did(home, tmp_path, bits, geometry):
    made = quantize(home/'model', tmp_path/'x', 'rtn', bits=bits)
    assert made.mix is None and geometry_name(json.loads((tmp_path/'x'/'quantize.json').read_text())['geometry']) == geometry

@pytest.mark.slow
def test_trained_as_a_mixture(home):
    m = nb.quantize(home/'model', method='qat', bits=2.6, data=f"text:{home/'some.txt'}", max_steps=4, batch_size=2, val_batches=1, test_tokens=512)
    assert m.bits_per_weight <= 2.6 and m.bits_per_weight > 2.4 and len({m.pack.config.quant.of(n).n_entries for n in matrix_shapes(m.pack.config.model)}) > 1
