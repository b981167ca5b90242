"Some matrices differently: whoever reads the folder, or the file made of it, reads the same mixture; what nobody can have meant is refused."
import json, shutil
import numpy as np, pytest
torch, transformers, gguf = [pytest.importorskip(n) for n in ('torch', 'transformers', 'gguf')]
import nativebit as nb, nativebit.hf
from nativebit.config import GEOMETRIES, QuantConfig, get_config
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import file_ledger, read_pack
from nativebit.interop.export import export_lut_b, export_nbpack, export_safetensors
from nativebit.pipelines.decoders import jax_decoder, torch_decoder
from nativebit.pipelines.quantize import main, quantize, store_layer
from nativebit.utils.cli import UserError, parse_args
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
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'plain')
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'mixed', overrides=MIXED)
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
    nb.quantize(home/'model', 'lut-b', 'rtn', out=tmp_path/'some', overrides={'layers.0.*': 'float'})
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
    words = [str(home/'model'), '--out', str(tmp_path/'x'), '--method', 'rtn', '--geometry', 'lut-b']
    main(**parse_args(main, [*words, *(w for p,g in MIXED.items() for w in ('--override', f'{p}={g}'))]))
    assert '5 float' in capsys.readouterr().out and (tmp_path/'x'/'model.safetensors').read_bytes() == (home/'mixed'/'model.safetensors').read_bytes()
    with pytest.raises(UserError, match='give a pattern and what its matrices get'): main(**parse_args(main, [*words[:2], str(tmp_path/'y'), '--override', 'layers.0']))

def test_work_is_of_one_mixture(home, tmp_path, monkeypatch):
    def stopped(work, i, packed): store_layer(work, i, packed); raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('nativebit.pipelines.quantize.store_layer', stopped); quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides=MIXED)
    with pytest.raises(UserError, match='other settings.*overrides'): quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides={'*.down': '2bit'})
    with pytest.raises(UserError, match='other settings.*overrides'): quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b')
    quantize(home/'model', tmp_path/'x', 'rtn', 'lut-b', overrides=MIXED)
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

def test_training_has_one_geometry():
    from nativebit.models.transformer import init_model
    with pytest.raises(UserError, match='overrides'): init_model(get_config('tiny', overrides=(('*.down', '4bit'),)), seed=0)
