"Nothing lost, nothing wrong: identity, checksums, kills, locks, and inputs that make no sense."
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
import ml_dtypes, numpy as np, processes, pytest
from safetensors.numpy import save_file
import nativebit.pipelines.quantize as quantizing
from nativebit.__main__ import program
from nativebit.config import get_config
from nativebit.data.loader import prepare
from nativebit.data.tokenizers import ByteTokenizer, train_tokenizer
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.size import param_shapes
from nativebit.evaluation.results_file import begin_rows
from nativebit.experiments.sweep import sweep
from nativebit.experiments.runner import make_setup, run_rows
from nativebit.interop.convert import convert
from nativebit.interop.export import export_safetensors, folder_model, pack_of
from nativebit.interop.families import hf_names, model_config
from nativebit.models.checkpoint import load_checkpoint, load_network, save_checkpoint
from nativebit.models.transformer import init_model
from nativebit.pipelines.compare import compare_texts
from nativebit.pipelines.quantize import quantize
from nativebit.ptq.posthoc import main as posthoc
from nativebit.ptq.pack import pack_checkpoint
from nativebit.train.loop import say_long_warmup, train
from nativebit.train.run import begin_log, begun, continued
from nativebit.utils.cli import UserError, one_sentence, parse_args
from nativebit.utils.files import JSONLogger, atomic_path, whole_folder
from nativebit.utils.pytree import leaf_names, with_leaves
from nativebit.utils.safetensors import CRC, file_header, full_sum, save_arrays, stored_sums, weights_digest

ROOT = Path(__file__).resolve().parent.parent

CONFIG = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=10000., hidden_act='silu', tie_word_embeddings=True)
TEXT = '\n\n'.join(f'{i} and {i} are {2*i}' for i in range(1500))

@pytest.fixture(scope='module')
def words(): return train_tokenizer([TEXT], 280)

def hub_model(folder, words, seed=0, change=lambda n, w: w, dtype=ml_dtypes.bfloat16):
    "A model of random weights, as the hub would hold it."
    folder.mkdir(exist_ok=True)
    (folder/'config.json').write_text(json.dumps(CONFIG))
    words.tok.save(str(folder/'tokenizer.json'))
    m, rng = model_config(CONFIG), np.random.default_rng(seed)
    weights = {hf_names(m)[n]: change(n, np.ones(s, np.float32) if len(s) == 1 else (.1*rng.standard_normal(s)).astype(np.float32)).astype(dtype) for n,s in param_shapes(m)}
    save_file(weights, folder/'model.safetensors')
    return folder

# ---- identity -----------------------------------------------------------------------------------------------

def stopped_behind(monkeypatch, name, calls=1):
    "Let a function of the pipeline end in Ctrl-C when it has done its work so many times."
    left, real = [calls], getattr(quantizing, name)
    def f(*args):
        real(*args); left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
    monkeypatch.setattr(quantizing, name, f)

def test_unfinished_work_is_of_these_weights(tmp_path, words, monkeypatch):
    hub_model(tmp_path/'m', words)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stopped_behind(m, 'store_layer'); quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    assert (tmp_path/'q.work'/'layer-0000.safetensors').exists()
    shutil.copytree(tmp_path/'m', tmp_path/'kept'); hub_model(tmp_path/'m', words, seed=1)
    with pytest.raises(UserError, match=r'q\.work holds work begun with other settings, weights or text \(weights\.model\.safetensors'): quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    shutil.rmtree(tmp_path/'m')
    quantize(tmp_path/'kept', tmp_path/'q', 'rtn')   # the same weights elsewhere
    quantize(tmp_path/'kept', tmp_path/'whole', 'rtn')
    a, b = open_folder(tmp_path/'q'), open_folder(tmp_path/'whole')
    assert all(np.array_equal(a.tensor(P).dequantize(), b.tensor(P).dequantize()) for P in b.linears)

def test_unfinished_work_is_of_this_text(tmp_path, words, monkeypatch):
    hub_model(tmp_path/'m', words); (tmp_path/'t.txt').write_text(TEXT); monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    again = lambda: quantize(tmp_path/'m', tmp_path/'q', 'gptq', data=f"text:{tmp_path/'t.txt'}", calibration_tokens=64, test_tokens=64)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): stopped_behind(m, 'begin_work'); again()
    (tmp_path/'t.txt').write_text(TEXT.replace('and', 'plus'))
    with pytest.raises(UserError, match=r'other settings, weights or text \(text\.source'): again()

def checkpoint(folder, seed=0, scale=1., quantized=False, **settings):
    cfg = get_config('tiny', nativebit=quantized, n_layers=1, **settings)
    params, state = init_model(cfg, seed=seed)
    return save_checkpoint(folder, cfg, with_leaves(params, {n: scale*x for n,x in leaf_names(params).items()}), state if quantized else None)

def test_a_table_is_of_these_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache')); (tmp_path/'t.txt').write_text(TEXT)
    table = lambda methods, ckpt='c', out='rows.jsonl': posthoc(ckpt, methods, dataset='text:t.txt', max_tokens=32, out=out)
    checkpoint('c'); table('rtn')
    checkpoint('c', seed=3, scale=4.)
    with pytest.raises(UserError, match=r"rows\.jsonl holds rows of another setup \(weights: '\w{16}' there"): table('rtn,nf')
    checkpoint('same'); table('rtn', 'same')   # the first ones, elsewhere
    header, *rows = Path('rows.jsonl').read_text().splitlines()
    old = json.loads(header); del old['setup']['weights']; Path('old.jsonl').write_text('\n'.join([json.dumps(old), *rows, '']))
    table('rtn', out='old.jsonl'); assert 'kept no digest of the weights' in capsys.readouterr().err
    for begin in (lambda: sweep('tiny', dict(max_steps=[1]), 's.jsonl', 'c'), lambda: run_rows('method=float', make_setup('tiny', {}, 'c'), 'r.jsonl')):
        monkeypatch.setattr('nativebit.evaluation.results_file.begin_rows', lambda out, header: stop(header)); monkeypatch.setattr('nativebit.experiments.runner.begin_rows', lambda out, header: stop(header))
        monkeypatch.setattr('nativebit.experiments.runner.load_tokens', lambda cfg: {})
        with pytest.raises(KeyboardInterrupt, match=weights_digest('c')): begin()

def stop(header): raise KeyboardInterrupt(header['setup']['weights'])

# ---- checksums ----------------------------------------------------------------------------------------------

def with_header(path, change, flip=None):
    "Change the header of a safetensors file, and perhaps a byte of its data."
    data = bytearray(path.read_bytes()); n = int.from_bytes(data[:8], 'little'); head = json.loads(data[8:8+n])
    change(head); text = json.dumps(head).encode(); body = data[8+n:]
    if flip is not None: body[flip] ^= 4
    path.write_bytes(len(text).to_bytes(8, 'little') + text + body)

Q = 'layers.0.attn.q.'
HEADERS = {'a name': lambda h: h.update({'layers.0.attn.r.weight': h.pop(Q+'weight')}), 'a type': lambda h: h[Q+'weight'].update(dtype='I32'), 'a shape': lambda h: h[Q+'codebook'].update(shape=h[Q+'codebook']['shape'][::-1]),
           'a checksum': lambda h: h['__metadata__'].update(sums=h['__metadata__']['sums'].replace('norm', 'narm', 1)), 'bytes': lambda h: None}

@pytest.mark.parametrize('what', HEADERS)
def test_a_damaged_checkpoint_is_refused(tmp_path, what):
    file = checkpoint(tmp_path/'c', quantized=True)/'model.safetensors'
    with_header(file, HEADERS[what], flip=-77 if what == 'bytes' else None)
    with pytest.raises(UserError, match='is damaged .the checksum of'): load_network(tmp_path/'c')

def without_sums(h): del h['__metadata__']['sums']

def test_an_older_checkpoint_loads_and_says_so(tmp_path, capsys):
    file = checkpoint(tmp_path/'c')/'model.safetensors'; with_header(file, without_sums)
    load_network(tmp_path/'c'); assert capsys.readouterr().err.count('has no checksums') == 1
    load_network(ROOT/'data'/'stdlib'); assert not capsys.readouterr().err   # its meta.json has them

def test_checksums_of_8_digits_are_checked(tmp_path):
    file = checkpoint(tmp_path/'c')/'model.safetensors'; held, crcs = file_header(file)[0], stored_sums(file, CRC)
    old = {n: full_sum(n, held[n]['dtype'], held[n]['shape'], x, CRC) for n,x in crcs.items()}
    assert {len(x) for x in old.values()} == {8} and {len(x) for x in json.loads(file_header(file)[1]['sums']).values()} == {16}
    with_header(file, lambda h: h['__metadata__'].update(sums=json.dumps(old))); load_network(tmp_path/'c')
    with_header(file, lambda h: None, flip=-5)
    with pytest.raises(UserError, match='is damaged .the checksum of'): load_network(tmp_path/'c')

BOOKS = {'missing layers.0.attn.q.codebook': lambda t: t.pop(Q+'codebook'), 'the network has': lambda t: t.update({Q+'codebook': t[Q+'codebook'][:, :3]}), 'holds NaN or infinite': lambda t: t.update({Q+'codebook': t[Q+'codebook'] + np.inf}),
         'not in ascending order': lambda t: t.update({Q+'codebook': -t[Q+'codebook']}), r'7 differences': lambda t: [t.pop(n) for n in [*t] if n.endswith('codebook')], 'floating-point numbers': lambda t: t.update({Q+'weight': t[Q+'weight'].astype(np.int8)}),
         'unexpected layers.8.attn.q.codebook': lambda t: t.update({'layers.8.attn.q.codebook': t[Q+'codebook']})}

@pytest.mark.parametrize('says', BOOKS)
def test_codebooks_are_checked(tmp_path, says):
    folder = checkpoint(tmp_path/'c', quantized=True); t, meta = load_checkpoint(folder); t = dict(t); BOOKS[says](t)
    save_arrays(folder/'model.safetensors', t, sealed=True)
    with pytest.raises(UserError, match=says): load_network(folder)

N = 'model.layers.0.input_layernorm.weight'
FOLDERS = {'type': lambda h: h[N].update(dtype='F16'), 'name': lambda h: h.update({N.replace('input', 'inbut'): h.pop(N)}), 'no checksum of one': lambda h: h['__metadata__'].update(sums=json.dumps({k: v for k,v in json.loads(h['__metadata__']['sums']).items() if k != N})),
           'bytes of the embedding': lambda h: None}

@pytest.fixture(scope='module')
def packed(tmp_path_factory, words):
    d = tmp_path_factory.mktemp('packed'); quantize(hub_model(d/'m', words), d/'q', 'rtn')
    return d/'q'

@pytest.mark.parametrize('what', FOLDERS)
def test_a_damaged_folder_is_refused(tmp_path, packed, what):
    file = Path(shutil.copytree(packed, tmp_path/'q'))/'model.safetensors'
    places = file_header(file)[0]
    with_header(file, FOLDERS[what], flip=places['model.embed_tokens.weight']['data_offsets'][0] if 'bytes' in what else None)
    with pytest.raises(UserError, match='is damaged .the checksum of'): open_folder(tmp_path/'q')

def test_an_older_folder_loads_and_says_so(tmp_path, packed, capsys):
    file = Path(shutil.copytree(packed, tmp_path/'q'))/'model.safetensors'; crcs = {n: f'{x:08x}' for n,x in stored_sums(file, CRC).items()}
    def older(h): without_sums(h); h['__metadata__']['checksums'] = json.dumps(crcs)
    with_header(file, older); open_folder(tmp_path/'q')
    assert capsys.readouterr().err.count('has no checksums') == 1
    with_header(file, lambda h: None, flip=-1)
    with pytest.raises(UserError, match='is damaged'): open_folder(tmp_path/'q')

def test_a_folder_without_checksums_is_refused(tmp_path, packed):
    with_header(Path(shutil.copytree(packed, tmp_path/'q'))/'model.safetensors', without_sums)
    with pytest.raises(UserError, match='has lost its checksums'): open_folder(tmp_path/'q')

# ---- numbers and files that make no sense -------------------------------------------------------------------

@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', ['embed', 'layers.1.mlp_norm.weight', 'layers.0.mlp.gate.weight'])
def test_weights_that_are_no_numbers(tmp_path, words, bad, name):
    def change(n, w): return np.where(np.arange(w.size).reshape(w.shape) == 5, bad, w) if n == name else w
    with pytest.raises(UserError, match=name): quantize(hub_model(tmp_path/'m', words, change=change), tmp_path/'q', 'rtn')
    assert not (tmp_path/'q').exists()

METAS = {'holds no JSON object': '[1]', 'is not valid JSON': '{', 'not valid JSON': '['*30_000, 'n_layers=5000000 is not valid': dict(model=dict(n_layers=5_000_000)), 'n_layers=900 and holds': dict(model=dict(n_layers=900)), 'block_shape=.1, 70000.': dict(quant=dict(block_shape=[1, 70_000])),
         'wrong type of value for tokenizer': dict(train=dict(tokenizer=7)), 'wrong type of value for train': dict(train=[3])}

@pytest.mark.parametrize('says', METAS)
def test_a_meta_that_makes_no_sense(tmp_path, says):
    folder = checkpoint(tmp_path/'c'); meta, new = json.loads((folder/'meta.json').read_text()), METAS[says]
    for part,fields in (new.items() if isinstance(new, dict) else ()): meta['config'][part] = {**meta['config'][part], **fields} if isinstance(fields, dict) else fields
    (folder/'meta.json').write_text(new if isinstance(new, str) else json.dumps(meta))
    if 'n_layers=900' in says: with_header(folder/'model.safetensors', lambda h: h['__metadata__'].pop('network'))   # as of an older nativebit
    with pytest.raises(UserError, match=says): load_network(folder)
    if 'n_layers=900' not in says:
        with pytest.raises(UserError): get_config(str(folder))

def test_a_meta_of_another_network(tmp_path):
    folder = checkpoint(tmp_path/'c', quantized=True); meta = json.loads((folder/'meta.json').read_text())
    for part, field, value in (('quant', 'block_shape', [32, 1]), ('model', 'rope_theta', 500.), ('quant', 'codebook_dtype', 'int8')):
        (folder/'meta.json').write_text(json.dumps({**meta, 'config': {**meta['config'], part: {**meta['config'][part], field: value}}}))
        with pytest.raises(UserError, match=f'another network than model.safetensors .{part}.{field}'): load_network(folder)

def test_a_meta_of_another_network_than_was_converted(tmp_path, words):
    convert(hub_model(tmp_path/'m', words), tmp_path/'c'); load_network(tmp_path/'c')
    meta = json.loads((tmp_path/'c'/'meta.json').read_text()); meta['config']['model']['n_heads'] = 4   # all shapes fit
    (tmp_path/'c'/'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match='another network than model.safetensors .model.n_heads'): load_network(tmp_path/'c')

def test_a_config_of_another_geometry(tmp_path, monkeypatch):
    "All shapes fit where a block is turned, and what is read would be another network."
    monkeypatch.syspath_prepend(ROOT/'tests'/'fuzz')
    import readers
    monkeypatch.setattr(readers, 'QUANT', readers.QuantConfig(8, (1, 8), 'int8'))   # eights divide all sides
    readers.packed_folder(tmp_path); folder = tmp_path/'q'; config = json.loads((folder/'config.json').read_text())
    config['quantization_config']['block_shape'].reverse(); (folder/'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='config.json says .8, .8, 1., "int8"'): open_folder(folder)

def test_an_npz_may_not_unpack_to_much_more(tmp_path):
    np.savez_compressed(tmp_path/'x.npz', x=np.zeros(10**6, np.int8))
    with pytest.raises(UserError, match='more than 64 times its size'): load_checkpoint(tmp_path/'x.npz')

# ---- killed, and run again; two at once ---------------------------------------------------------------------

def killed(code, cwd, *args):
    "Run a program that ends in kill -9."
    r = processes.run('-c', 'import os, signal\ndef die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n' + code, *args, cwd=cwd)
    assert r.returncode == -signal.SIGKILL, r.stderr

def test_what_a_kill_leaves_is_cleaned(tmp_path):
    killed('from nativebit.utils.files import *\nwith atomic_path("f") as t: t.write_text("half"); die()', tmp_path)
    killed('from nativebit.utils.files import *\nwith whole_folder("d") as t: (t/"x").write_text("half"); die()', tmp_path)
    assert len([*tmp_path.glob('.*.tmp')]) == 2
    with atomic_path(tmp_path/'f') as t: t.write_text('whole')
    with whole_folder(tmp_path/'d') as t: (t/'x').write_text('whole')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['d', 'f']

def test_the_disk_has_it_before_its_name(tmp_path, monkeypatch):
    done, real = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, 'fsync', lambda fd: (done.append(os.readlink(f'/proc/self/fd/{fd}')), real[0](fd))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append('renamed'), real[1](a, b))[1])
    with atomic_path(tmp_path/'f') as t: t.write_text('x')
    assert done == [str(t), 'renamed', str(tmp_path)]

KILLS = dict(first='w.atomic_path = die', layer='q.store_layer = die', table='q.judgement = die', cleaning='q.end_work = die', cleaned='w.remove = die', last='import shutil; q.end_work = lambda w: (shutil.rmtree(w), die())')

@pytest.mark.parametrize('at', KILLS)
def test_quantize_goes_on_after_a_kill(tmp_path, words, packed, at):
    hub_model(tmp_path/'m', words)
    killed(f'import nativebit.pipelines.quantize as q, nativebit.utils.work as w\n{KILLS[at]}\nq.quantize("m", "q", "rtn")', tmp_path)
    if at != 'last': quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'q'] and (tmp_path/'q'/'quantize.json').exists()
    a, b = open_folder(tmp_path/'q'), open_folder(packed)
    assert all(np.array_equal(a.tensor(P).dequantize(), b.tensor(P).dequantize()) for P in b.linears)

def test_two_at_once(tmp_path, words):
    hub_model(tmp_path/'m', words)
    code = 'import sys, time, nativebit.pipelines.quantize as q\nold = q.judgement\ndef judgement(*a): r = old(*a); print("here", flush=True); sys.stdin.read(); return r\nq.judgement = judgement\nq.quantize("m", "q", "rtn")'
    first = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert first.stdout.readline() == 'here\n'
    with pytest.raises(UserError, match=f'process {first.pid} on .* is writing .*q'): quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    first.communicate('')
    assert first.returncode == 0 and sorted(p.name for p in tmp_path.iterdir()) == ['m', 'q']

@pytest.mark.parametrize('write, path', [(lambda: posthoc('c', 'rtn', dataset='text:t.txt', max_tokens=32, out='o/rows.jsonl'), 'o/rows.jsonl'), (lambda: sweep('tiny', dict(max_steps=[1], dataset=['text:t.txt']), 'o/s.jsonl'), 'o/s.jsonl'),
                                         (lambda: compare_texts('m', ['m'], dict(a='text:t.txt'), 'o/cmp.jsonl', max_tokens=32), 'o/cmp.jsonl'), (lambda: train(get_config('tiny', max_steps=1, dataset='text:t.txt'), 'o/run'), 'o/run')], ids=['posthoc', 'sweep', 'compare', 'train'])
def test_a_table_and_a_run_have_one_writer(tmp_path, words, monkeypatch, write, path):
    "Two that made the same rows wrote each of them twice; whoever comes second is told who is there, and nothing is begun."
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache')); Path('t.txt').write_text(TEXT); checkpoint('c'); hub_model(tmp_path/'m', words)
    lock = Path(path)/'.lock' if path.endswith('run') else Path('o', f'.{Path(path).name}.lock'); lock.parent.mkdir(parents=True)
    code = 'import sys, nativebit.utils.files as f; from pathlib import Path\nwith f.one_writer(*map(Path, sys.argv[1:])): print("here", flush=True); sys.stdin.read()'
    first = subprocess.Popen([sys.executable, '-c', code, path, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'here\n'
    with pytest.raises(UserError, match=f'process {first.pid} on .* is writing {path}; wait for it, or '): write()
    assert [p for p in Path('o').rglob('*') if p.is_file()] == [lock]
    first.communicate('')
    write(); assert not lock.exists()

def test_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(UserError, match='is a device or a pipe'): pack_checkpoint(checkpoint(tmp_path/'c', quantized=True), tmp_path/'pipe')
    assert not (tmp_path/'pipe').is_file()
    with pytest.raises(UserError, match='is a device or a pipe'): begin_rows(tmp_path/'pipe', {})   # which would be read, and waited for

# ---- links, settings, command lines -------------------------------------------------------------------------

def test_links_that_leave_a_model_are_refused(tmp_path, words, packed):
    (tmp_path/'private').write_text('mine'); hub_model(tmp_path/'m', words); q = Path(shutil.copytree(packed, tmp_path/'q'))
    for folder, name, f in ((tmp_path/'m', 'NOTICE', lambda: quantize(tmp_path/'m', tmp_path/'x', 'rtn')), (tmp_path/'m', 'NOTICE', lambda: convert(tmp_path/'m', tmp_path/'x')), (q, 'notes.txt', lambda: export_safetensors(open_folder(q), tmp_path/'x'))):
        if not (folder/name).is_symlink(): (folder/name).symlink_to(tmp_path/'private')
        with pytest.raises(UserError, match=f'{name} is a link to .*private'): f()
        assert not (tmp_path/'x').exists()

def refused(*args):
    "What a command says that ends in one sentence."
    module = program(args[0])
    with pytest.raises(SystemExit) as e, one_sentence(): module.main(**parse_args(module.main, list(args[1:])))
    assert str(e.value.code).startswith('error: '), e.value.code
    return str(e.value.code)

def test_command_lines_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache')); (tmp_path/'t.txt').write_text(TEXT); (tmp_path/'file').write_text('x'); (tmp_path/'x.jsonl').write_text('['*20_000 + '\n')
    for name, log, meta in (('text', 'nothing\n', None), ('number', '7\n', None), ('stepless', '{"type": "eval", "config": {}}\n', '{}')):
        (tmp_path/'logs'/name).mkdir(parents=True); (tmp_path/'logs'/name/'log.jsonl').write_text(log)
        if meta: (tmp_path/'logs'/name/'meta.json').write_text(meta)
    np.save('a.npy', np.ones(2)); os.rename('a.npy', 'a.npz')
    train, speed = ('train', '--config', 'tiny', '--dataset', 'text:t.txt', '--max-steps', '1', '--val-batches', '1'), ('speed', '--config', 'tiny', '--attention', 'reference', '--batch-size', '1', '--compute-dtype', 'float32')
    for args, says in (((*train, '--seed', '8'*25), 'seed='), ((*train, '--name', 'n'*280), 'File name too long'), ((*train, '--init-from', 'a.npz'), 'not a whole .npz'), ((*train, '--dataset', 'text:x.jsonl'), 'line 1 of'),
                       ((*train, '--name', 'text'), 'line 1 of'), (('kept', 'number'), 'line 1 of'), (('train', '--resume', '--name', 'number'), 'line 1 of'), (('train', '--resume', '--name', 'stepless'), 'does not fit'), ((*train, '--states', 'file'), 'Not a directory'),
                       ((*speed, '--steps', '0'), 'steps=0'), ((*speed, '--steps', '9'*30), 'a million at most'), ((*speed, '--windows', '-2'), 'windows=-2'), ((*speed, '--out', 'file/rows.jsonl'), 'cannot write the log'), (('plots', 'x.jsonl'), 'record 1 of'), (('quantize', 'm', '--out', 'q'*280), 'there is no m')):
        assert says in refused(*args), (args, says)

def test_what_a_program_would_find_out_hours_later_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'file').write_text('x'); (tmp_path/'t.txt').write_text(TEXT); checkpoint(tmp_path/'c')
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    train, table = ('train', '--config', 'tiny', '--dataset', 'text:t.txt', '--max-steps', '1'), ('results', '--run', '--experiment', 'method=rtn', '--config', 'tiny', '--init-from', 'c', '--settings', 'dataset=text:t.txt', '--out', 'r.jsonl')
    for args, says in ((('demo', '--out', 'file/x'), 'cannot write'), (('demo', '--max-steps', '9'*30), 'below 2^31'), (('demo', '--max-tokens', '0'), 'max_tokens=0'), ((*table, '--minutes', 'nan'), 'minutes=nan'), ((*table, '--keep', 'file/x'), 'cannot write'),
                       ((*table, '--by', 'lrr'), "did you mean 'lr'"), ((*train, '--states', 'file/x'), 'cannot write'), ((*train, '--name', 'a\nb'), 'is no name of a run'), ((*train, '--init-from', ''), '--init-from has no value'),
                       (('posthoc', '--ckpt', 'c', '--methods', 'rtn', '--calibration', 'text:t.txt'), 'changes nothing for rtn'), (('posthoc', '--ckpt', 'c', '--calibration-tokens', '0'), 'calibration_tokens=0')):
        assert says in refused(*args), (args, says)
    assert not {'logs', 'r.jsonl'} & {p.name for p in tmp_path.iterdir()}

def test_prepared_data_without_a_meta(tmp_path, monkeypatch):
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache')); (tmp_path/'t.txt').write_text(TEXT); prepare(f"text:{tmp_path/'t.txt'}", ByteTokenizer())
    [meta] = (tmp_path/'cache').glob('*/meta.json')
    for text in ('', '{}'):
        meta.write_text(text)
        with pytest.raises(UserError): prepare(f"text:{tmp_path/'t.txt'}", ByteTokenizer())

def test_a_run_goes_on_with_other_settings_and_says_so(tmp_path, capsys):
    with begin_log(get_config('tiny'), tmp_path, None, 0, dict): pass
    new = continued(tmp_path, dict(lr=.25, dataset='text:other.txt'))[0]
    assert new.train.lr == .25 and all(s in capsys.readouterr().err for s in ("train.lr: 0.003 there, 0.25 here",))
    continued(tmp_path, dict(lr=.003)); assert not capsys.readouterr().err

def test_a_sweep_without_its_text_begins_no_table(tmp_path):
    with pytest.raises(UserError, match='no such file'): sweep('tiny', dict(dataset=[f'text:{tmp_path}/none.txt']), tmp_path/'s.jsonl')
    assert not (tmp_path/'s.jsonl').exists()

def test_all_of_run_2b_is_for_one_machine():
    r = subprocess.run([ROOT/'tpu_scripts'/'run_2b', 'all', '1', '--hosts', 'auto'], capture_output=True, text=True, timeout=20)
    assert r.returncode and 'the float checkpoint is on the first machine alone' in r.stderr

FULL = 'import errno, jax.numpy as jnp, os\nfrom pathlib import Path\nfrom nativebit.train.states import RunStates\nfrom nativebit.utils.cli import one_sentence\nreal = os.mkdir\ndef mkdir(p, *a, **k):\n    if WHERE in Path(p).name: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(p))\n    real(p, *a, **k)\nos.mkdir = mkdir\nwith one_sentence():\n    s = RunStates("state"); s.save({"w": jnp.ones(3)}, 1); s.close()'

@pytest.mark.parametrize('where', ['1.orbax', 'default', 'array_metadatas'])
def test_no_room_for_a_states_folder_is_said_soon(tmp_path, where):
    r = processes.start('-c', FULL.replace('WHERE', repr(where)), cwd=tmp_path).wait(100)
    assert r.returncode == 1 and r.stderr == f"error: cannot keep the run's state in {tmp_path}/state (No space left on device); free some space or choose another folder\n"

def test_a_log_without_a_record_is_no_run(tmp_path):
    for text in (None, '', '{"type": "hea'):
        if text is not None: (tmp_path/'log.jsonl').write_text(text)
        assert not begun(tmp_path)
    with begin_log(get_config('tiny'), tmp_path, None, 0, dict): assert begun(tmp_path)

def test_a_full_disk_names_the_log(tmp_path):
    with pytest.raises(UserError, match='cannot write .*log.jsonl: No space left'), JSONLogger(tmp_path/'log.jsonl') as logger:
        logger.file.close(); logger.file = open('/dev/full', 'w'); logger.log(step=1)

def test_a_warmup_longer_than_its_run_is_said(capsys):
    say_long_warmup(get_config('tiny', max_steps=6, warmup_steps=5).train); say_long_warmup(get_config('tiny', max_steps=1).train)
    assert not capsys.readouterr().err
    say_long_warmup(get_config('tiny', max_steps=6, warmup_steps=10**30).train)
    assert 'in a run of 6: all of it is warm-up' in capsys.readouterr().err

# ---- a packed folder whose config.json tells of another model -----------------------------------------------

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A packed folder of version 3: its embedding is int8 rows."
    sys.path.append(str(ROOT/'tests'/'fuzz'))
    import readers
    readers.row_folder(d := tmp_path_factory.mktemp('rows'))
    return d/'q'

@pytest.mark.parametrize('field, value', [('vocab_size', 41), ('vocab_size', 20), ('hidden_size', 32), ('intermediate_size', 16), ('num_attention_heads', 4), ('num_key_value_heads', 2), ('num_hidden_layers', 2), ('num_hidden_layers', 2**20), ('tie_word_embeddings', False)])
def test_a_config_that_tells_of_another_model(rows, tmp_path, field, value):
    d = Path(shutil.copytree(rows, tmp_path/'d')); c = json.loads((d/'config.json').read_text())
    for read in (pack_of, folder_model): read(open_folder(d))
    (d/'config.json').write_text(json.dumps(c | {field: value}))
    for read in (pack_of, folder_model):
        with pytest.raises(UserError, match='does not fit its own config: .* (and should be|is missing)'): read(open_folder(d))
