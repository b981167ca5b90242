"Some matrices differently: whoever reads the folder, or the file made of it, reads the same mixture; what nobody can have meant is refused."
import json, shutil
import jax, jax.numpy as jnp, ml_dtypes, numpy as np, pytest
torch, transformers, gguf = [pytest.importorskip(n) for n in ('torch', 'transformers', 'gguf')]
import nativebit as nb, nativebit.hf
from nativebit.config import GEOMETRIES, QuantConfig, get_config, override
from nativebit.evaluation.perplexity import perplexity, token_nll
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import file_ledger, read_pack
from nativebit.formats.overrides import override_pairs
from nativebit.formats.size import matrix_shapes
from nativebit.interop.export import export_lut_b, export_nbpack, export_safetensors
from nativebit.models import transformer
from nativebit.models.checkpoint import load_network, save_checkpoint, start_codebooks
from nativebit.models.transformer import init_model
from nativebit.pipelines.decoders import jax_decoder, torch_decoder
from nativebit.pipelines.quantize import main, quantize, store_layer
from nativebit.ptq.pack import pack_checkpoint
from nativebit.quant.codebook import codebooks
from nativebit.train.init import init_state
from nativebit.train.loop import load_tokens, main as train_main, train
from nativebit.train.states import RunStates
from nativebit.train.step import eval_params, first_state, make_quant_ops, state_shapes
from nativebit.utils.cli import UserError, parse_args
from nativebit.utils.pytree import leaf_names, with_leaves
from nativebit.interop.convert import open_model
from test_convert import random_transformer, write_gguf

transformers.utils.logging.disable_progress_bar()
MIXED = {'layers.0.attn.*': 'float', 'layers.0.mlp.up': '4bit', '*.down': '2bit', 'layers.0.*': 'float'}   # within one layer, and within matrices that share an input
SAYS = {'layers.0.mlp.up': '4bit', 'layers.0.mlp.down': '2bit', 'layers.0.mlp.gate': 'float', 'layers.1.mlp.down': '2bit', 'layers.1.attn.q': ''}

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('overrides')
    random_transformer('Llama', home/'model', 'bfloat16', vocab_size=96, hidden_size=64, intermediate_size=128)
    read = open_model(write_gguf(home/'model.gguf', open_model(home/'model'), tokenizer=True))
    for p in read.files: shutil.copy(p, home/'model')   # a tokenizer, of a temporary folder of its own
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'plain', embed='bfloat16')
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'mixed', overrides=MIXED, embed='bfloat16')
    export_nbpack(open_folder(home/'mixed'), home/'one'/'mixed.nbpack.safetensors')
    return home

TOKENS = np.arange(3, 40)[None]

def test_the_first_pattern_that_matches_wins(home):
    m = nb.load(home/'mixed')
    assert {n: m.config.quant.override_of(n) for n in SAYS} == SAYS
    plain, float_ = nb.load(home/'plain'), nb.load(home/'model')
    for n,g in SAYS.items():
        w = m.read(f'{n}.weight')
        assert np.array_equal(w, float_.read(f'{n}.weight')) == (g == 'float') and np.array_equal(w, plain.read(f'{n}.weight')) == (g == '')
    values = {n: max(len(np.unique(row)) for row in m.read(f'{n}.weight')[:, :64]) for n in ('layers.0.mlp.up', 'layers.1.mlp.down')}
    assert 8 < values['layers.0.mlp.up'] <= 16 and values['layers.1.mlp.down'] <= 4

def test_everybody_reads_the_same(home, tmp_path):
    "transformers, both decoders packed and looked up, one file, plain weights."
    want = np.asarray(nb.load(home/'mixed').logits(TOKENS))
    live = transformers.AutoModelForCausalLM.from_pretrained(home/'mixed', dtype=torch.float32)
    with torch.no_grad(): np.testing.assert_allclose(live(torch.tensor(TOKENS)).logits.numpy(), want, atol=1e-4)
    export_safetensors(open_folder(home/'mixed'), tmp_path/'floats', 'float32')
    for where in (home/'one'/'mixed.nbpack.safetensors', tmp_path/'floats'): assert np.array_equal(nb.load(where).logits(TOKENS), want)
    pack, ids = nb.load(home/'mixed').pack, TOKENS[0].tolist()
    texts = [list(d(ids, 12)) for d in (jax_decoder(pack), jax_decoder(pack, packed=True), torch_decoder(pack, 'cpu'))]
    assert texts[0] == texts[1] == texts[2]

def test_layers_stay_packed_where_they_can(home):
    from nativebit.pytorch.model import from_pack
    layers = from_pack(nb.load(home/'mixed').pack, packed=True).layers
    kinds = [[type(x).__name__ for x in (l.attn.qkv, l.attn.o, l.mlp.gate_up, l.mlp.down)] for l in layers]
    assert kinds == [['DenseLinear', 'DenseLinear', 'DenseLinear', 'PackedLinear'], ['PackedLinear']*4]   # gate in float, up in 4 bits: no one matrix

def test_bits_are_those_that_are_stored(home):
    m, sizes = nb.load(home/'mixed'), {'': 3.125, 'float': 16., '2bit': 2.375, '4bit': 5.125}
    matrices = m.pack.matrices
    bytes_of = lambda n: sum(m.pack.tensors[x].nbytes for k in ('words', 'codebook', 'scale', 'weight') if (x := f'{n}.{k}') in m.pack.tensors)
    assert m.bits_per_weight == pytest.approx(8*sum(map(bytes_of, matrices))/sum(o*i for o,i in matrices.values()))
    for n,g in SAYS.items(): assert 8*bytes_of(n)/np.prod(matrices[n]) >= sizes[g] - 1e-9
    file = {r['part']: r for r in file_ledger(home/'one'/'mixed.nbpack.safetensors')}
    assert file['matrices']['bits_per_weight'] == pytest.approx(m.bits_per_weight) and file['matrices']['weights'] == sum(o*i for o,i in matrices.values())

@pytest.mark.parametrize('load', ['AutoModelForCausalLM', 'AutoModel'])
def test_transformers_writes_what_it_read(home, tmp_path, load):
    getattr(transformers, load).from_pretrained(home/'mixed').save_pretrained(tmp_path/'again')
    a, b = open_folder(home/'mixed'), open_folder(tmp_path/'again')
    assert b.linears and all(a.quant.of(P if P in a.linears else f'model.{P}') == b.quant.of(P) for P in b.linears)
    assert len(a.linears) == len(b.linears)

def test_exceptions_in_float_need_no_new_format(home, tmp_path):
    nb.quantize(home/'model', 'lut-b', 'rtn', out=tmp_path/'some', overrides={'layers.0.*': 'float'}, embed='bfloat16')
    found = json.loads((tmp_path/'some'/'config.json').read_text())['quantization_config']
    assert found['version'] == 1 and 'overrides' not in found and 'model.layers.0.mlp.up_proj' in found['modules_to_not_convert']
    export_lut_b(open_folder(tmp_path/'some'), tmp_path/'lut')
    ignored = json.loads((tmp_path/'lut'/'config.json').read_text())['quantization_config']['ignore']
    assert {'lm_head', 'model.layers.0.mlp.up_proj'} <= set(ignored) and 'model.layers.1.mlp.up_proj' not in ignored

@pytest.mark.parametrize('change, says', [
    (lambda q: q.pop('overrides'), 'version 2, and this nativebit reads 1'),
    (lambda q: q.update(version=1), 'version 1, and this nativebit reads 2'),
    (lambda q: (q.pop('overrides'), q.update(version=1)), 'does not fit its own config'),
    (lambda q: q.update(overrides=[['*down_proj', 'float']]), 'should be in float'),
    (lambda q: q.update(overrides=[['*', '4bit']]), 'does not fit its own config'),
    (lambda q: q.update(overrides=[['*', '5bit']]), 'unknown geometry'),
    (lambda q: q.update(overrides='*=4bit'), 'pairs of a pattern and a geometry'),
    (lambda q: q.update(overrides=7), 'makes no sense')])
def test_another_mixture_in_the_config_is_refused(home, tmp_path, change, says):
    shutil.copytree(home/'mixed', tmp_path/'x')
    config = json.loads((tmp_path/'x'/'config.json').read_text()); change(config['quantization_config'])
    (tmp_path/'x'/'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=says): open_folder(tmp_path/'x')

@pytest.mark.parametrize('overrides, says', [
    ({'layer.0.*': 'float'}, "no matrix has such a name; 'layers.0."), ({'*.donw': '4bit'}, "mlp.down' is near"), ({'layers.9.*': 'float'}, 'no matrix has such a name'),
    ({'*.down': '4bits'}, "did you mean '4bit'"), ({'*': 'float'}, 'all matrices would stay in float')])
def test_what_nobody_can_have_meant(home, tmp_path, overrides, says):
    with pytest.raises(UserError, match=says) as e: nb.quantize(home/'model', 'lut-b', 'rtn', out=tmp_path/'x', overrides=overrides)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_on_the_command_line(home, tmp_path, capsys):
    words = [str(home/'model'), '--out', str(tmp_path/'x'), '--method', 'rtn', '--geometry', 'lut-b', '--embed', 'bfloat16']
    main(**parse_args(main, [*words, *(w for p,g in MIXED.items() for w in ('--override', f'{p}={g}'))]))
    assert '5 float' in capsys.readouterr().out and (tmp_path/'x'/'model.safetensors').read_bytes() == (home/'mixed'/'model.safetensors').read_bytes()
    with pytest.raises(UserError, match='give a pattern and what its matrices get'): main(**parse_args(main, [*words[:2], str(tmp_path/'y'), '--override', 'layers.0']))

def test_work_is_of_one_mixture(home, tmp_path, monkeypatch):
    def stopped(work, i, packed): store_layer(work, i, packed); raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('nativebit.pipelines.quantize.store_layer', stopped); quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides=MIXED, embed='bfloat16')
    with pytest.raises(UserError, match='other settings.*overrides'): quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides={'*.down': '2bit'})
    with pytest.raises(UserError, match='other settings.*overrides'): quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b')
    quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides=MIXED, embed='bfloat16')
    assert (tmp_path/'x'/'model.safetensors').read_bytes() == (home/'mixed'/'model.safetensors').read_bytes()

def test_gptq_reads_on_behind_what_stays_in_float(home, tmp_path, monkeypatch):
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    rng = np.random.default_rng(0)
    (tmp_path/'book.txt').write_text('\n\n'.join(''.join(rng.choice(list('ABCDE'), 12)) for _ in range(400)))
    for n,kw in dict(all={}, some=dict(overrides={'layers.0.*': 'float', '*.down': '4bit'})).items():
        quantize(home/'model', tmp_path/n, 'gptq', 'lut-b', f"text:{tmp_path/'book.txt'}", calibration_tokens=512, test_tokens=300, **kw)
    kl = {n: json.loads((tmp_path/n/'quantize.json').read_text())['rows'][1]['kl'] for n in ('all', 'some')}
    assert 0 < kl['some'] < kl['all']
    assert not any('layers.0' in P for P in open_folder(tmp_path/'some').linears)

def test_a_file_without_exceptions_is_as_it_was(home, tmp_path):
    assert 'overrides' not in read_pack(export_nbpack(open_folder(home/'plain'), tmp_path/'x'/'p.nbpack.safetensors')).meta['config']
    assert QuantConfig(**GEOMETRIES['lut-b']).of('layers.0.attn.q') == QuantConfig(**GEOMETRIES['lut-b'])

TRAINED = {'layers.0.attn.*': 'float', 'layers.0.mlp.up': '4bit', '*.down': '2bit'}

@pytest.mark.parametrize('geometry, recipe, start', [('int8', 'published', 'quantile'), ('lut-b', 'qat', 'kmeans'), ('lut-b', 'published', 'gptq')])
def test_a_run_trains_evaluates_and_packs_one_mixture(tmp_path, geometry, recipe, start):
    "Q(w) of the state, the checkpoint and what is read of the packed file are the same numbers; a kept state is the run's."
    text = tmp_path/'some.txt'
    text.write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(300)))
    cfg = get_config('tiny', recipe=recipe, geometry=geometry, overrides=override_pairs(TRAINED), start=start, n_layers=2, dataset=f'text:{text}', max_steps=6, save_every=3,
                     requantize_every=2 if recipe == 'published' else 1, warmup_steps=1, lr=1e-2, batch_size=2, val_batches=1, test_tokens=64, calibration_tokens=128)
    save_checkpoint(tmp_path/'float', cfg, init_model(override(cfg, nativebit=False), seed=0)[0])
    result = train(cfg, tmp_path/'run', tmp_path/'float')
    state = RunStates(tmp_path/'run'/'state', keep=None).restore(state_shapes(cfg))
    entries = {n.removesuffix('.codebook'): x.shape[1] for n,x in codebooks(state.quant_state).items()}
    assert entries == {n: q.n_entries for n in matrix_shapes(cfg.model) if (q := cfg.quant.of(n))} and {*entries.values()} == {4, 8, 16} and len(entries) == 10
    moved = leaf_names(init_state(cfg, tmp_path/'float', load_tokens(cfg)['train'])[0].quant_state)
    assert all((x != moved[n]).any() for n,x in codebooks(state.quant_state).items())
    want = {n: np.asarray(x) for n,x in leaf_names(eval_params(state, cfg)).items()}
    assert all((leaf_names(state.params)[f'{n}.weight'] != want[f'{n}.weight']).any() for n in entries)
    _, loaded = load_network(tmp_path/'run')
    pack = read_pack(pack_checkpoint(tmp_path/'run', tmp_path/'one'/'m.nbpack.safetensors'))
    for n,x in want.items():
        assert np.array_equal(x, leaf_names(loaded)[n]), n
        held = x if n.removesuffix('.weight') in entries else x.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(pack.weight(n), held), n
    nll = token_nll(cfg, with_leaves(loaded, {n: jnp.asarray(pack.weight(n)) for n in want}), load_tokens(cfg)['test'], batch_size=2, max_tokens=64)
    assert perplexity(nll) == pytest.approx(result['test_ppl'], rel=1e-6)

def test_each_matrix_learns_as_in_a_network_of_its_geometry():
    "One step: what is not an exception moves as without exceptions, an exception as where all are like it."
    cfg = get_config('tiny', geometry='int8', n_layers=1, d_ff=32)   # all matrices of one shape: each operation is compiled once
    params = init_model(cfg, seed=0)[0]
    def moved(cfg):
        new = make_quant_ops(cfg.quant)['requantize'](first_state(cfg, params, start_codebooks(cfg, params)))
        return leaf_names(new.quant_state)
    with jax.disable_jit():   # programs of several matrices may sum in another order
        mixed, plain, four = [moved(c) for c in (override(cfg, overrides=override_pairs({'*.down': '4bit', '*.q': 'float'})), cfg, override(cfg, geometry='4bit'))]
    assert {n for n in plain if n not in mixed} == {n for n in plain if '.attn.q.' in n}
    for n,x in mixed.items(): assert np.array_equal(x, (four if '.down.' in n else plain)[n]), n

def test_layers_that_differ_are_no_loop(monkeypatch):
    monkeypatch.setattr(transformer, 'DEEP', 3)
    tokens = jnp.ones((1, 8), jnp.int32)
    def logits(loop, **overrides):
        cfg = get_config('tiny', n_layers=3, overrides=override_pairs(overrides))
        params, state = init_model(cfg, seed=0)
        f = jax.jit(lambda *x: transformer.forward_fn(cfg)(*x, loop=loop))
        return 'while' in f.lower(params, tokens, state).as_text(), np.asarray(f(params, tokens, state))
    assert logits(True)[0] and logits(True, **{'*.down': '4bit'})[0]   # all layers have the same exception
    differ, at_once = logits(True, **{'layers.1.*': 'float'}), logits(False, **{'layers.1.*': 'float'})
    assert not differ[0] and np.array_equal(differ[1], at_once[1])

def test_training_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'some.txt').write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(300)))
    words = ['--config', 'tiny', '--dataset', 'text:some.txt', '--max-steps', '4', '--batch-size', '2', '--val-batches', '1', '--test-tokens', '64', '--save-every', '2', '--name']
    run = lambda *more: train_main(**parse_args(train_main, [*words, *more]))
    run('mixed', '--override', 'layers.0.*=float', '--override', '*.down=4bit')
    meta = json.loads((tmp_path/'logs'/'mixed'/'meta.json').read_text())
    assert meta['config']['quant']['overrides'] == [['layers.0.*', 'float'], ['*.down', '4bit']]
    run('mixed', '--resume', '--max-steps', '6')   # the name is enough
    assert json.loads((tmp_path/'logs'/'mixed'/'meta.json').read_text())['step'] == 6
    with pytest.raises(UserError, match='another network or codebooks'): run('mixed', '--resume', '--override', '*.down=2bit')
    with pytest.raises(UserError, match="mlp.down' is near"): run('typo', '--override', '*.donw=4bit')
    with pytest.raises(UserError, match='all matrices would stay in float'): run('none', '--override', '*=float')
    assert not (tmp_path/'logs'/'typo').exists()

def test_qat_of_a_mixture(home, tmp_path):
    text = tmp_path/'some.txt'
    text.write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(300)))
    rows, *_ = quantize(home/'model', tmp_path/'qat', 'qat', 'lut-b', data=f'text:{text}', context_len=32, overrides=MIXED, max_steps=3, batch_size=2, calibration_tokens=256, warmup_steps=1, val_batches=1, test_tokens=64, lr=1e-2)
    assert '5 float' in rows[1]['matrices']
    got, start = nb.load(tmp_path/'qat'), nb.load(home/'mixed')
    assert {n: got.config.quant.override_of(n) for n in SAYS} == SAYS and got.bits_per_weight == pytest.approx(start.bits_per_weight)
    for n in SAYS: assert not np.array_equal(got.read(f'{n}.weight'), start.read(f'{n}.weight'))   # in float or not, all have learned
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'qat', dtype=torch.float32)
    with torch.no_grad(): np.testing.assert_allclose(live(torch.tensor(TOKENS)).logits.numpy(), np.asarray(got.logits(TOKENS)), atol=1e-4)
