"A model is a model, whatever it is kept in: the same network writes the same text, a module in memory packs to the same bytes, evaluations agree, and what is no model ends in one sentence."
import io, json, os, shutil, subprocess, sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
import ml_dtypes, numpy as np, processes, pytest
transformers, gguf = pytest.importorskip('transformers'), pytest.importorskip('gguf')
import nativebit as nb
from nativebit.__main__ import COMMANDS, flags, program
from nativebit.config import get_config
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import read_pack
from nativebit.interop.convert import convert, open_model
from nativebit.interop.export import export_nbpack
from nativebit.models.checkpoint import save_checkpoint
from nativebit.models.transformer import init_model
from nativebit.pipelines.decoders import jax_decoder, torch_decoder
from nativebit.ptq.pack import pack_checkpoint
from nativebit.utils.cli import UserError, hyphenate, one_sentence, parse_args
from nativebit.utils.files import read_jsonl
from test_convert import random_transformer, write_gguf

transformers.utils.logging.disable_progress_bar()
GREEDY = dict(max_tokens=20, temperature=0.)
FLOAT = {'model': 'hub folder', 'model.gguf': 'gguf', 'logs/book': 'checkpoint', 'book': 'run'}
PACKED = {'rtn': 'packed folder', 'rtn.nbpack.safetensors': 'packed file'}
TRAINED = {'logs/trained': 'checkpoint', 'trained': 'run', 'one/trained.nbpack.safetensors': 'packed file'}

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "One float network in four places, one that rounding made of it in two, and one with learned codebooks in three."
    home = tmp_path_factory.mktemp('api')
    random_transformer('Llama', home/'model', 'bfloat16', vocab_size=96, hidden_size=64, intermediate_size=128)
    source = open_model(home/'model')
    packed = open_model(write_gguf(home/'model.gguf', source, tokenizer=True))
    for p in packed.files: shutil.copy(p, home/'model')   # in a temporary folder of its own
    convert(home/'model', home/'logs'/'book')
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'rtn')
    export_nbpack(open_folder(home/'rtn'), home/'rtn.nbpack.safetensors')
    cfg = get_config('tiny', n_layers=1, geometry='lut-b')
    pack_checkpoint(save_checkpoint(home/'logs'/'trained', cfg, *init_model(cfg, seed=0)), home/'one'/'trained.nbpack.safetensors', 'float32')
    rng = np.random.default_rng(0)
    for name,n in dict(book=400, other=40).items(): (home/f'{name}.txt').write_text('\n\n'.join(''.join(rng.choice(list('ABCDE'), 12)) for _ in range(n)))
    return home

@pytest.fixture(autouse=True)
def inside(home, monkeypatch): monkeypatch.chdir(home); monkeypatch.setenv('NATIVEBIT_CACHE', str(home/'cache'))

@pytest.mark.parametrize('kinds', [FLOAT, PACKED, TRAINED], ids=['float', 'packed', 'trained'])
def test_the_same_network_is_the_same_whatever_it_is_kept_in(kinds, tmp_path, monkeypatch):
    models = {where: nb.load(where) for where in kinds}
    monkeypatch.chdir(tmp_path)   # arrays are read from where they were
    first = next(iter(models.values()))
    assert {w: m.kind for w,m in models.items()} == kinds
    texts = [m.generate('AB', **GREEDY) for m in models.values()]
    assert len(texts[0]) > 5 and set(texts) == {texts[0]} and ''.join(first.generate('AB', stream=True, **GREEDY)) == texts[0]
    ids = np.arange(3, 40)[None]
    for m in models.values():
        assert np.array_equal(m.read('layers.0.mlp.down.weight'), first.read('layers.0.mlp.down.weight')) and m.quantized == first.quantized
        assert np.array_equal(m.logits(ids), first.logits(ids))

def test_a_name_on_the_hub_is_a_folder_of_either_kind(home, monkeypatch):
    for folder in ('model', 'rtn'):
        monkeypatch.setattr('nativebit.pipelines.opening.downloaded', lambda name: home/folder)
        m = nb.load('some/model')
        assert (m.name, m.kind) == ('some/model', 'hub name') and m.generate('AB', **GREEDY) == nb.load(folder).generate('AB', **GREEDY)

@pytest.mark.parametrize('where', ['model', 'rtn', 'trained'])
def test_both_decoders_write_the_same(where):
    m = nb.load(where)
    m.decoder = jax_decoder(m.pack)   # the C library's activations are rounded, and near ties may end otherwise
    mine = m.generate('AB', **GREEDY)
    m.decoder = torch_decoder(m.pack, 'cpu')
    assert m.generate('AB', **GREEDY) == mine

def test_half_precision_stays_what_it_is(home, tmp_path):
    "Norms and embeddings of a float16 model are not rounded to bfloat16 on the way."
    nb.quantize(random_transformer('Llama', tmp_path/'half', 'float16', hidden_size=64), 'lut-b', 'rtn', out=tmp_path/'rtn')
    assert np.array_equal(nb.load(tmp_path/'rtn').read('embed'), nb.load(tmp_path/'half').read('embed'))

def packed_bytes(m): return (m.pack.path/'model.safetensors').read_bytes()

@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_a_module_in_memory_packs_to_the_same_bytes(home, dtype):
    live = nb.quantize(transformers.AutoModelForCausalLM.from_pretrained(home/'model', dtype=dtype), 'lut-b', 'rtn')
    assert packed_bytes(live) == (home/'rtn'/'model.safetensors').read_bytes()
    assert live.generate('AB', **GREEDY) == nb.load('rtn').generate('AB', **GREEDY)   # it brought its tokenizer
    assert [p.name for p in live.pack.path.parent.iterdir()] == [live.pack.path.name]   # the float copy is gone

@pytest.mark.parametrize('data', ['text:book.txt,test=other.txt', 'text:book.txt,valid=book.txt,test=other.txt'])
def test_an_evaluation_is_the_table_of_quantize(data):
    m = nb.quantize('model', 'lut-b', 'rtn', data, test_tokens=300, context_len=32)
    original, mine = m.rows
    got = m.evaluate(data, against='model', max_tokens=300)
    np.testing.assert_allclose([got[k] for k in ('ppl', 'kl', 'top1', 'original_ppl')], [mine['ppl'], mine['kl'], mine['top1'], original['ppl']], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([m.evaluate(data, max_tokens=300)['ppl'], m.bits_per_weight], [mine['ppl'], mine['bits_per_weight']], rtol=1e-4)
    assert got['increase'] == pytest.approx(got['ppl']/got['original_ppl'] - 1) and got['tokens'] == 300

def test_what_is_saved_is_the_same_model(tmp_path):
    m = nb.quantize('model', 'lut-b', 'rtn')
    there, text = m.pack.path, m.generate('AB', **GREEDY)
    m.save(tmp_path/'folder'); m.save(tmp_path/'file'/'x.safetensors')
    for where in ('trained', 'book'): nb.load(where).save(tmp_path/where)
    nb.load('trained').save(tmp_path/'y.safetensors')
    del m
    assert not there.exists()   # it was a temporary one
    assert {nb.load(tmp_path/p).generate('AB', **GREEDY) for p in ('folder', 'file/x.safetensors')} == {text}
    assert len({nb.load(p).generate('AB', **GREEDY) for p in ('trained', tmp_path/'trained', tmp_path/'y.safetensors')}) == 1
    assert packed_bytes(nb.load(tmp_path/'folder')) == (Path('rtn')/'model.safetensors').read_bytes()
    for where, out, says in [('book', 'z.safetensors', 'is a float model'), ('model.gguf', 'z', 'nativebit convert'), ('rtn.nbpack.safetensors', 'z', 'ends in .safetensors'),
                             ('rtn', 'folder', 'not empty'), ('rtn', 'y.safetensors', 'exists')]:
        with pytest.raises(UserError, match=says): nb.load(where).save(tmp_path/out)
    assert not list(tmp_path.glob('z*'))

def run(command, *args):
    "A command in this process: what it prints."
    main, said = program(command).main, io.StringIO()
    with redirect_stdout(said), one_sentence(): main(**parse_args(main, list(map(str, args))))
    return said.getvalue()

def test_the_commands(home):
    text = nb.load('rtn').generate('AB', **GREEDY) + '\n'
    for where in PACKED: assert run('generate', where, '--prompt', 'AB', '--max-tokens', 20, '--temperature', 0) == text
    by_jax = [run('generate', 'rtn', *how, '--prompt', 'AB', '--max-tokens', 20, '--temperature', 0) for how in (['--packed'], ['--backend', 'jax'])]
    assert by_jax[0] == by_jax[1]
    for where in ('rtn', 'book', 'model.gguf'): table = run('evaluate', where, '--data', 'text:other.txt', '--against', 'model', '--max-tokens', 100, '--out', 'rows.jsonl')
    assert '| same next token, % |' in table and 'model.gguf' in table
    rows = read_jsonl('rows.jsonl')[1:]
    assert [r['model'] for r in rows] == ['rtn', 'book', 'model.gguf'] and rows[0]['kl'] > 0 == rows[2]['kl'] and rows[1]['increase'] == 0

def test_as_a_user_types_it(home):
    say = lambda *words: processes.run('-m', 'nativebit', *words, cwd=home)
    p = say('evaluate', 'rtnn', '--data', 'text:other.txt')
    assert (p.returncode, p.stderr) == (1, "error: there is no model rtnn: did you mean 'rtn'?\n")
    p = say('--completion', 'fish')
    assert (p.returncode, p.stderr) == (1, "error: unknown shell 'fish': choose from bash, zsh\n")
    assert say('--completion', 'bash').stdout.startswith('_nativebit()')

@pytest.mark.parametrize('where, says', [
    ('nothing at all', "there is no model nothing at all; give a run's name, a folder"),
    ('boook', "did you mean 'book'?"),
    ('rtn.nbpack.safetensor', "did you mean 'rtn.nbpack.safetensors'?"),
    ('one/traned.nbpack.safetensors', "did you mean 'one/trained.nbpack.safetensors'?"),
    ('one/tained', "did you mean"),
    ('models/x.gguf', 'there is no model models/x.gguf'),
    ('one', 'holds no model'),
    ('model/model.safetensors', 'one file of a model'),
    ('book.txt', 'is no packed network'),
    ('weights.bin', 'pickles'),
    ('cut.gguf', 'not a whole GGUF file'),
    ('no-such/model-at-all', "can't be downloaded")])
def test_what_is_no_model_ends_in_one_sentence(home, where, says):
    (home/'weights.bin').write_bytes(b'1'); (home/'cut.gguf').write_bytes((home/'model.gguf').read_bytes()[:500])
    for command in (['generate', where, '--prompt', 'x'], ['evaluate', where, '--data', 'text:other.txt']):
        with pytest.raises(SystemExit) as e: run(*command)
        assert says in e.value.code and '\n' not in e.value.code, e.value.code

WITHOUT_JAX = """
import sys
class No:
    def find_spec(self, name, *_):
        if name.split('.')[0] in ('jax', 'flax', 'grain', 'filelock', 'datasets', 'pyarrow'): raise ModuleNotFoundError(f'no {name}', name=name)
sys.meta_path.insert(0, No())
import nativebit as nb, nativebit.pipelines.decoders as decoders
from nativebit.utils.cli import UserError
decoders.find_spec = lambda name: None if name == 'jax' else name
for where in sys.argv[1:]:
    try: print(nb.load(where).generate('AB', max_tokens=20, temperature=0.))
    except UserError as e: print(e)
"""

def test_pytorch_alone_is_enough_for_what_is_packed(home):
    r = subprocess.run([sys.executable, '-c', WITHOUT_JAX, *PACKED, 'book'], cwd=home, capture_output=True, text=True, env=os.environ | dict(NATIVEBIT_CACHE=''))   # the user's: there the CPU kernels are compiled
    text = nb.load('rtn').generate('AB', **GREEDY)
    assert r.stdout.splitlines() == [*f'{text}\n{text}'.splitlines(), "book is opened with jax, which is not installed: pip install -e '.[train]'"], r.stderr

def test_refusals(home):
    for do, says in [(lambda: nb.quantize('model', 'lutb'), "did you mean 'lut-b'?"), (lambda: nb.quantize('model', method='qat'), 'qat reads text'), (lambda: nb.quantize('rtn'), 'packed already'),
                     (lambda: nb.quantize('trained'), '--to packed --out FOLDER'), (lambda: nb.load('rtn').evaluate('other.txt'), 'unknown dataset'), (lambda: nb.load('rtn', context_len=9999), 'between 1 and 64'),
                     (lambda: nb.load('rtn.nbpack.safetensors', context_len=9999), 'between 1 and 64'), (lambda: nb.load('rtn').evaluate('text:other.txt', 'trained'), 'was not made from'),
                     (lambda: nb.load('rtn').generate('AB', temperature=-1), 'temperature')]:
        with pytest.raises(UserError, match=says) as e: do()
        assert '\n' not in str(e.value)
    shutil.copytree('model', 'mute', ignore=lambda d, names: [n for n in names if n.startswith('tokenizer')])
    with pytest.raises(UserError, match='has no tokenizer.json'): nb.load('mute').generate('AB')

def test_completion_knows_the_flags_of_every_command():
    from fastcore.script import anno_parser
    for name in COMMANDS:
        if name == 'hf': continue
        parser = hyphenate(anno_parser(program(name).main))
        assert set(flags(name)) == {f for a in parser._actions for f in a.option_strings if f.startswith('--')} - {'--pdb', '--xtra'}, name
