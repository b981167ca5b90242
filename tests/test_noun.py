"One noun: every command takes every kind of model, or says in one sentence which command comes first; and a model goes from one form to another and back with equal bits, and equal logits in transformers."
import json, re, shlex, shutil
from importlib.util import find_spec
from pathlib import Path
import jax.numpy as jnp, numpy as np, pytest
transformers, torch, gguf = map(pytest.importorskip, ('transformers', 'torch', 'gguf'))
import nativebit as nb
from nativebit.__main__ import main
from nativebit.config import get_config, override
from nativebit.data.tokenizers import load_tokenizer, small_files, train_tokenizer
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import LARGEST, SMALL, metadata_crc, read_header, read_pack
from nativebit.interop.convert import convert, open_model
from nativebit.models.checkpoint import load_network, save_checkpoint
from nativebit.models.transformer import forward_fn, init_model
from nativebit.utils.cli import UserError
from test_convert import CASES, SMALL as SMALL_NETWORK, TOKENS, random_transformer, theirs, write_gguf

ROOT = Path(__file__).resolve().parent.parent
transformers.utils.logging.disable_progress_bar()
FLOAT = {'book': 'run', 'logs/book': 'checkpoint', 'ckpt': 'checkpoint', 'model': 'hub folder', 'model.gguf': 'gguf', 'some/model': 'hub name'}
PACKED = {'trained': 'run', 'logs/trained': 'checkpoint', 'rtn': 'packed folder', 'one/rtn.nbpack.safetensors': 'packed file'}
MODELS = FLOAT | PACKED
OURS, THEIRS, FILES = ['book', 'logs/book', 'ckpt'], ['model', 'model.gguf', 'some/model'], ['rtn', 'one/rtn.nbpack.safetensors']

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('noun')
    random_transformer('Llama', home/'model', 'bfloat16', vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    packed = open_model(write_gguf(home/'model.gguf', open_model(home/'model'), tokenizer=True))
    for p in packed.files: shutil.copy(p, home/'model')
    for name in ('logs/book', 'ckpt'): convert(home/'model', home/name)
    nb.quantize(home/'model', 'lut-b', 'rtn', out=home/'rtn')
    cfg = get_config('tiny', n_layers=1, geometry='lut-b')
    save_checkpoint(home/'logs'/'trained', cfg, *init_model(cfg, seed=0))
    nb.load(home/'rtn').save(home/'one'/'rtn.nbpack.safetensors')
    rng = np.random.default_rng(0)
    (home/'t.txt').write_text('\n\n'.join(''.join(rng.choice(list('ABCDE'), 12)) for _ in range(400)))
    for run in ('book', 'trained'):
        folder = home/'logs'/run
        records = [dict(type='header', init_from=None, config=json.loads((folder/'meta.json').read_text())['config']), *(dict(step=i, loss=1.) for i in range(3))]
        (folder/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return home

@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home); monkeypatch.setenv('NATIVEBIT_CACHE', str(home/'cache'))
    for module in ('nativebit.interop.convert', 'nativebit.pipelines.opening'): monkeypatch.setattr(f'{module}.downloaded', lambda name: home/'model')

def test_the_kinds_are_what_they_are():
    from nativebit.formats.kinds import kind_of
    assert {w: kind_of(w) for w in MODELS} == MODELS

# ---- every command, every kind ------------------------------------------------------------------------------

def outs(word): return lambda m: f'out-{re.sub("[^a-z]", "-", m)}-{word}'
TEXT = ['--prompt', 'AB', '--max-tokens', '3']
READ = ['t=text:t.txt', '--max-tokens', '60']
ROWS = dict(   # command: (its words for a model, {models: a sentence, where it does not work})
    generate=(lambda m: [m, *TEXT], {}),
    generate_torch=(lambda m: [m, *TEXT, '--device', 'cpu'], {}),
    chat=(lambda m: [m, '--max-tokens', '3'], {}),
    evaluate=(lambda m: [m, '--data', 'text:t.txt', '--max-tokens', '60'], {}),
    compare=(lambda m: ['model' if m not in ('trained', 'logs/trained') else m, *(['rtn'] if m not in ('trained', 'logs/trained') else [m]), *([m] if m not in ('rtn', 'trained', 'logs/trained') else []), '--texts', *READ],
             {('trained', 'logs/trained'): '--to packed --out FOLDER'}),
    compare_original=(lambda m: [m, 'rtn', '--texts', *READ], {('trained', 'logs/trained'): '--to packed --out FOLDER', tuple(FILES): 'packed already'}),
    pack=(lambda m: [m, '--out', outs('pack.nbpack.safetensors')(m)], {tuple(OURS): '--posthoc gptq', tuple(THEIRS): 'nativebit quantize {m} --out FOLDER', tuple(FILES): 'nativebit export {m} --to nbpack --out FILE'}),
    pack_posthoc=(lambda m: [m, '--posthoc', 'kmeans', '--out', outs('posthoc.nbpack.safetensors')(m)],
                  {('trained', 'logs/trained'): 'has codebooks already', tuple(THEIRS): 'nativebit quantize {m} --out FOLDER', tuple(FILES): 'nativebit export {m} --to nbpack --out FILE'}),
    export=(lambda m: [m, '--to', 'safetensors', '--out', outs('plain')(m)], {('model', 'some/model'): 'is a plain folder already; nativebit quantize'}),
    export_packed=(lambda m: [m, '--to', 'packed', '--out', outs('packed')(m)], {(*OURS, *THEIRS): 'nativebit quantize', ('rtn',): 'is a packed folder already'}),
    export_nbpack=(lambda m: [m, '--to', 'nbpack', '--out', outs('file.safetensors')(m)], {(*OURS, *THEIRS): 'nativebit quantize', ('one/rtn.nbpack.safetensors',): 'is a packed file already'}),
    export_lutb=(lambda m: [m, '--to', 'lut-b', '--out', outs('lutb')(m)], {(*OURS, *THEIRS): 'nativebit quantize'}),
    convert=(lambda m: [m, '--out', outs('float')(m)], {(*OURS, 'trained', 'logs/trained'): 'nativebit train --config', tuple(FILES): 'nativebit export {m} --to safetensors'}),
    quantize=(lambda m: [m, '--method', 'rtn', '--geometry', 'lut-b', '--force', '--no-report', '--out', outs('rtn')(m)], {tuple(FILES): 'nativebit export {m} --to safetensors', ('trained', 'logs/trained'): '--to packed --out FOLDER'}),
    posthoc=(lambda m: ['--ckpt', m, '--methods', 'rtn', '--dataset', 'text:t.txt', '--max-tokens', '60'],
             {tuple(THEIRS): 'nativebit convert {m} --out', ('trained', 'logs/trained'): 'quantized already', tuple(FILES): 'the float model that it was made from'}),
    train=(lambda m: ['--config', 'ckpt' if 'trained' not in m else 'trained', '--init-from', m, '--dataset', 'text:t.txt', '--name', 'new'], {tuple(THEIRS): 'nativebit convert {m} --out', tuple(FILES): 'the float model that it was made from'}),
    sweep=(lambda m: ['lr=1e-4 dataset=text:t.txt', outs('sweep.jsonl')(m), '--init-from', m], {tuple(THEIRS): 'nativebit convert {m} --out', tuple(FILES): 'the float model that it was made from'}),
    plots=(lambda m: [m, '--out', outs('png')(m) + '.png'], {('ckpt', *THEIRS, *FILES): 'log.jsonl'}),
    kept=(lambda m: [m, '--out', outs('kept')(m)], {('book', 'logs/book', 'trained', 'logs/trained'): 'holds no state', ('ckpt', *FILES, *THEIRS[:2]): 'nativebit generate {m}', ('some/model',): 'has no log.jsonl'}))

def said(capsys, words):
    "Exit code, stdout and stderr of a program."
    code = 0
    try: main(words)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) or e.code is None else 1
        if isinstance(e.code, str): print(e.code, file=__import__('sys').stderr)
    got = capsys.readouterr()
    return code or 0, got.out, got.err

@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('command', ROWS)
def test_every_command_takes_it_or_names_the_next(home, capsys, monkeypatch, command, model):
    words, refused = ROWS[command]
    began = []
    monkeypatch.setattr('nativebit.train.loop.train', lambda cfg, folder, init_from, *a, **kw: began.append(init_from) or dict(test_ppl=1., total_time_s=0.))
    monkeypatch.setattr('nativebit.experiments.sweep.run_point', lambda cfg, point, folder, init_from: began.append(init_from) or point)
    monkeypatch.setattr('sys.stdin', __import__('io').StringIO('AB\n'))
    before = {p for p in home.glob('out-*')}
    code, out, err = said(capsys, [command.partition('_')[0] if command != 'generate_torch' else command, *words(model)])
    says = next((s for models,s in refused.items() if model in models), None)
    if says is None:
        assert code == 0, err
        assert command not in ('train', 'sweep') or Path(began[0]).is_dir()
        return
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith('error: ') and says.format(m=model) in last, (code, err)
    assert {p for p in home.glob('out-*')} == before   # nothing is begun

# ---- README's exports ---------------------------------------------------------------------------------------

EXPORTS = [shlex.split(l, comments=True)[3:] for l in (ROOT/'README.md').read_text().splitlines() if l.startswith('nativebit export model-3bit ')]   # --to FORM …
PACKAGES = dict(gguf='gguf', openvino='openvino', onnx='onnxruntime', coreml='coremltools')

def test_readme_names_every_form():
    from nativebit.pipelines.exporting import FORMS
    assert {words[1] for words in EXPORTS} | {'packed'} == set(FORMS)

@pytest.mark.parametrize('words', EXPORTS, ids=lambda words: words[1])
def test_readmes_exports(home, capsys, tmp_path, words):
    "Each as it stands there, or what it needs is named; of an empty folder none is made, and nothing is left."
    to, out = words[1], tmp_path/words[-1]
    code, _, err = said(capsys, ['export', str(tmp_path), *words[:-1], str(out)])
    assert code == 1 and 'holds no model' in err and not [*tmp_path.iterdir()]
    code, printed, err = said(capsys, ['export', 'rtn', *words[:-1], str(out)])
    if to in PACKAGES and find_spec(PACKAGES[to]) is None:   # which is said, and how to get it
        assert code == 1 and re.search(rf'not installed: pip install .*{PACKAGES[to]}', err) and not [*tmp_path.iterdir()]
    else: assert code == 0 and str(out) in printed and [p.name for p in tmp_path.iterdir()] == [out.name], err

def test_what_is_named_next_works(home, capsys, monkeypatch):
    "The commands of the sentences, one after the other, with what they name filled in."
    monkeypatch.setattr('sys.stdin', __import__('io').StringIO('AB\n'))
    for words in (['quantize', 'book', '--method', 'rtn', '--out', 'next-3bit'], ['export', 'next-3bit', '--to', 'nbpack', '--out', 'next/one.nbpack.safetensors'],
                  ['export', 'next/one.nbpack.safetensors', '--to', 'safetensors', '--out', 'next-float'], ['convert', 'next-float', '--out', 'next-ckpt'], ['pack', 'book', '--posthoc', 'kmeans', '--out', 'next/two.nbpack.safetensors'],
                  ['evaluate', 'next/two.nbpack.safetensors', '--data', 'text:t.txt', '--max-tokens', '60', '--against', 'book']):
        code, out, err = said(capsys, words)
        assert code == 0, err
        if words[0] in ('export', 'pack', 'evaluate'):   # its last line is a command that can be pasted
            last = err.strip().splitlines()[-1]
            assert last.startswith('next: nativebit '), err
            code, out, err = said(capsys, [*shlex.split(last)[2:], '--max-tokens', '3'])
            assert code == 0 and out, err

@pytest.mark.parametrize('words', [['evaluate', 'rtn', '--data', 'text:t.txt', '--max-tokens', '60', '--against', 'book'], ['compare', 'book', 'rtn', '--texts', 't=text:t.txt', '--max-tokens', '60'],
                                   ['generate', 'rtn', '--prompt', 'AB', '--max-tokens', '64', '--benchmark'], ['generate', 'rtn', '--prompt', 'AB', '--max-tokens', '3'],
                                   ['generate_torch', 'rtn', '--prompt', 'AB', '--max-tokens', '16', '--context', '8', '--benchmark', '--device', 'cpu']])
def test_json_is_all_there_is_on_stdout(capsys, words):
    code, out, err = said(capsys, [*words, '--json'])
    assert code == 0, err
    x = json.loads(out)
    if words[0] == 'compare': assert [r['model'] for r in x] == ['rtn'] and x[0]['kl'] >= 0
    if words[0] == 'evaluate': assert x['kl'] >= 0 and x['model'] == 'rtn'
    if 'generate' in words[0]: assert x['text'].startswith('AB') and ('benchmark' in x) == ('--benchmark' in words)

def test_two_backends_write_the_same(capsys):
    texts = [said(capsys, ['generate', w, '--backend', b, '--prompt', 'AB', '--max-tokens', '12', '--temperature', '0'])[1] for w in ('book', 'model', 'rtn', 'one/rtn.nbpack.safetensors') for b in ('jax', 'torch')]
    assert len({*texts[:4]}) == 1 and len({*texts[4:]}) == 1 and len(texts[0]) > 8

# ---- there and back -----------------------------------------------------------------------------------------

def logits_here(where): return np.asarray(nb.load(where).logits(TOKENS))

@pytest.mark.parametrize('case', CASES)
def test_a_network_of_ours_is_transformers_own(tmp_path, capsys, case):
    "Converted, as if trained (its original's files are gone), exported: the same logits."
    kind, settings, dtype, _ = CASES[case]
    convert(random_transformer(kind, tmp_path/'theirs', dtype, **settings), tmp_path/'ours')
    cfg, params = load_network(tmp_path/'ours')
    folder = save_checkpoint(tmp_path/'trained', override(cfg, tokenizer=''), params)
    code, _, err = said(capsys, ['export', str(folder), '--out', str(tmp_path/'plain')])
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'plain', attn_implementation='eager').eval()
    assert model.dtype == torch.float32
    with torch.no_grad(): got = model(torch.tensor(TOKENS)).logits.numpy()
    assert abs(got - theirs(tmp_path/'theirs')).max() < 1e-4

def test_a_run_from_scratch_and_its_tokenizer(tmp_path, capsys):
    tok = train_tokenizer(['a small text of a few words, ' * 20], 300)
    (tmp_path/'tokenizer.json').write_text(tok.to_str())
    cfg = get_config('tiny', n_layers=1, vocab_size=300, nativebit=False, tokenizer=str(tmp_path/'tokenizer.json'))
    run = save_checkpoint(tmp_path/'run', cfg, init_model(cfg, seed=0)[0])
    for source, name, words in ((run, 'plain', []), (run, 'half', ['--dtype', 'bfloat16'])):
        assert said(capsys, ['export', str(source), '--out', str(tmp_path/name), *words])[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'plain')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'plain').eval()
    ids = theirs('a few small words', return_tensors='pt').input_ids
    assert ids[0].tolist() == tok.encode('a few small words').tolist() and model.generation_config.eos_token_id in (0, [0])
    with torch.no_grad(): got = model(ids).logits.numpy()
    want = np.asarray(forward_fn(cfg)(load_network(run)[1], jnp.asarray(ids.numpy())))
    assert abs(got - want).max() < 1e-4
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'half').dtype == torch.bfloat16

@pytest.mark.parametrize('method', ['rtn', 'kmeans', 'gptq'])
def test_a_run_is_quantized_into_a_folder_that_transformers_loads(tmp_path, capsys, method):
    import nativebit.hf
    code, _, err = said(capsys, ['quantize', 'book', '--method', method, '--out', str(tmp_path/'3bit'), *(['--data', 'text:t.txt', '--calibration-tokens', '512', '--test-tokens', '100'] if method == 'gptq' else [])])
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'3bit', dtype=torch.float32).eval()
    with torch.no_grad(): got = model(torch.tensor(TOKENS)).logits.numpy()
    assert abs(got - logits_here(tmp_path/'3bit')).max() < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(tmp_path/'3bit')('AB').input_ids

def same_tensors(a, b): return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)

def test_folder_and_file_both_ways(tmp_path, capsys):
    for words in (['rtn', '--to', 'nbpack', '--out', tmp_path/'a.safetensors'], [tmp_path/'a.safetensors', '--to', 'packed', '--out', tmp_path/'folder'], [tmp_path/'folder', '--to', 'nbpack', '--out', tmp_path/'b.safetensors'],
                  [tmp_path/'b.safetensors', '--to', 'packed', '--out', tmp_path/'again'], ['trained', '--to', 'packed', '--out', tmp_path/'trained'], [tmp_path/'trained', '--to', 'nbpack', '--out', tmp_path/'c.safetensors'],
                  ['trained', '--to', 'nbpack', '--out', tmp_path/'d.safetensors']):
        code, _, err = said(capsys, ['export', *map(str, words)])
        assert code == 0, err
    a, b, c, d = [read_pack(tmp_path/f'{n}.safetensors') for n in 'abcd']
    assert same_tensors(a.tensors, b.tensors) and same_tensors(c.tensors, d.tensors) and a.files == b.files
    first, *others = [open_folder(p) for p in ('rtn', tmp_path/'folder', tmp_path/'again')]
    for o in others:
        assert same_tensors(first.tensors, o.tensors)
        assert json.loads((o.path/'tokenizer.json').read_text()) == json.loads(Path('rtn/tokenizer.json').read_text())
        assert o.config == first.config

# ---- a pack carries its tokenizer ---------------------------------------------------------------------------

def test_the_file_alone_writes_text(tmp_path, capsys):
    "Two models with different tokenizers in one folder, and nothing beside them."
    shutil.copy('one/rtn.nbpack.safetensors', tmp_path/'a.safetensors')
    tok = train_tokenizer(['quite another text, of other words ' * 20], 300)
    (tmp_path/'tok.json').write_text(tok.to_str())
    cfg = get_config('tiny', n_layers=1, vocab_size=300, geometry='lut-b', tokenizer=str(tmp_path/'tok.json'))
    save_checkpoint(tmp_path/'ckpt', cfg, *init_model(cfg, seed=0))
    assert said(capsys, ['pack', str(tmp_path/'ckpt'), '--out', str(tmp_path/'b.safetensors')])[0] == 0
    for p in (tmp_path/'tok.json', *(tmp_path/'ckpt').iterdir()): p.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.safetensors', 'b.safetensors', 'ckpt']
    for name, prompt in (('a', 'AB'), ('b', 'other words')):
        for backend in ('jax', 'torch'):
            code, out, err = said(capsys, ['generate', str(tmp_path/f'{name}.safetensors'), '--backend', backend, '--prompt', prompt, '--max-tokens', '5'])
            assert code == 0 and out.startswith(prompt), err
    assert load_tokenizer(300, str(tmp_path/'b.safetensors')).encode('other words').tolist() == tok.encode('other words').tolist()
    assert nb.load(tmp_path/'a.safetensors').tokenizer.ends == nb.load('rtn').tokenizer.ends

def older(path, out):
    "A pack as earlier versions wrote it: its tokenizer beside it."
    data = Path(path).read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8+n]); meta = header['__metadata__']
    for name,x in small_files(path).items(): (out.parent/name).write_bytes(x)
    del meta['files']; meta['crc'] = metadata_crc(meta)
    text = json.dumps(header).encode(); text += b' '*(-len(text) % 8)
    out.write_bytes(len(text).to_bytes(8, 'little') + text + data[8+n:])
    return out

def test_older_files_still_load(tmp_path):
    (tmp_path/'old').mkdir()
    file = older('one/rtn.nbpack.safetensors', tmp_path/'old'/'x.safetensors')
    for p in (tmp_path/'old').glob('config.json'): p.unlink()   # they laid tokenizer.json and generation_config.json beside it
    m = nb.load(file)
    assert m.pack.files == {} and m.generate('AB', 8, 0.) == nb.load('rtn').generate('AB', 8, 0.)
    assert nb.load(m.save(tmp_path/'new'/'x.safetensors')).pack.files.keys() >= {'tokenizer.json', 'generation_config.json'}

HOSTILE = {'a bomb': {'tokenizer.json': [10, __import__('base64').b64encode(__import__('zlib').compress(bytes(2**26))).decode()]}, 'too large': {'tokenizer.json': [LARGEST+1, '']}, 'another name': {'../x': [0, '']},
           'no base64': {'tokenizer.json': [3, 'é']}, 'no zlib': {'tokenizer.json': [3, 'AAAA']}, 'a list': [], 'a number': 7, 'negative': {'tokenizer.json': [-1, '']}, 'cut off': {'tokenizer.json': [5, 'eJxL']}}

@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_small_files_are_one_sentence(tmp_path, what):
    data = Path('one/rtn.nbpack.safetensors').read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8+n]); meta = header['__metadata__']
    meta['files'] = json.dumps(HOSTILE[what]); meta['crc'] = metadata_crc(meta)
    text = json.dumps(header).encode()
    (tmp_path/'x.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + data[8+n:])
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(UserError) as e: nb.load(tmp_path/'x.safetensors').tokenizer
    assert '\n' not in str(e.value) and 'x.safetensors' in str(e.value) and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()

def test_a_chat_template_goes_along(tmp_path, capsys):
    shutil.copytree('rtn', tmp_path/'rtn')
    (tmp_path/'rtn'/'chat_template.jinja').write_text('{{ messages[0].content }}')
    said(capsys, ['export', str(tmp_path/'rtn'), '--to', 'nbpack', '--out', str(tmp_path/'x.safetensors')])
    assert said(capsys, ['export', str(tmp_path/'x.safetensors'), '--to', 'packed', '--out', str(tmp_path/'out')])[0] == 0
    assert (tmp_path/'out'/'chat_template.jinja').read_text() == '{{ messages[0].content }}'
