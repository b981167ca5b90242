"Preparing data: bad input is one sentence, and nothing half-written is ever taken for whole."
import json, lzma, signal, time
import numpy as np, processes, pytest
from nativebit.data import loader as data, tokenizers as tokenizer
from nativebit.utils.cli import UserError
from test_cli import cwd, refused, run

@pytest.mark.parametrize('args, says', [
    (['wikitext103'], "unknown dataset 'wikitext103': did you mean 'wikitext-103'?"),
    (['text:missing-*.txt'], 'cannot read the text missing-*.txt: no such file'),
    (['text:.'], 'it is a folder'),
    (['text:some.txt,test=missing.txt'], 'cannot read the text missing.txt'),
    (['text:cut.txt.xz'], 'cut.txt.xz is damaged'),
    (['text:latin.txt'], 'is not UTF-8'),
    (['text:bad.jsonl'], 'line 2 of'),
    (['wikitext-2'], 'use local files as text:PATH'),
    (['text:some.txt', '--config', 'tpu-small'], 'set NATIVEBIT_TOKENIZER to a folder'),
])
def test_refusals(cwd, monkeypatch, args, says):
    monkeypatch.setenv('HF_HOME', str(cwd/'hub'))
    monkeypatch.setenv('NATIVEBIT_TOKENIZER', str(cwd/'nowhere'))
    (cwd/'cut.txt.xz').write_bytes(lzma.compress(b'text ' * 10000)[:-20])
    (cwd/'latin.txt').write_bytes('déjà vu'.encode('latin-1'))
    (cwd/'bad.jsonl').write_text('{"text": "good"}\n{"txt": "misspelt"}\n')
    refused(cwd, 'nativebit', 'data', '--config', 'tiny', *args, says=says)   # the last --config counts
    assert not list(cwd.glob('cache/*/meta.json'))

def test_counts_and_help(cwd):
    r = run(cwd, 'nativebit', 'data', 'text:some.txt', '--config', 'tiny')
    assert r.returncode == 0 and json.loads(r.stdout)['valid']['documents'] == 20, r.stderr
    assert 'openwebtext' in run(cwd, 'nativebit', 'data', '--help').stdout

def test_full_disk(cwd):
    r = run(cwd, 'nativebit', 'data', 'text:some.txt', '--config', 'tiny', limit=20_000)
    assert r.returncode == 1 and 'choose another folder with NATIVEBIT_CACHE' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not [f for f in (cwd/'cache').rglob('*') if f.is_file() and f.suffix != '.lock']

SLOW = """
import os, time
from pathlib import Path
from nativebit.data import loader, tokenizers
from nativebit.utils.cli import one_sentence
class Slow(tokenizers.ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(.5 if 'WAIT' in os.environ and len(list(Path('cache').glob('*/train-*.npy'))) >= 3 else .01)   # time to be killed in
        return super().encode_batch(texts)
loader.in_batches = lambda docs: ([doc] for doc in docs)
with one_sentence(): loader.prepare('text:some.txt', Slow(), shard_tokens=500)
"""

def slow(cwd, **env): return processes.start('-c', SLOW, cwd=cwd, NATIVEBIT_CACHE=str(cwd/'cache'), **env)

@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed(cwd, monkeypatch, sign):
    p = slow(cwd, WAIT='1')
    while p.poll() is None and len(list(cwd.glob('cache/*/train-*.npy'))) < 3: time.sleep(.01)
    p.send_signal(sign)
    assert p.wait(60).returncode == (130 if sign == signal.SIGINT else -9) and 'Traceback' not in p.stderr, p.stderr
    assert not list(cwd.glob('cache/*/meta.json')) and (sign == signal.SIGKILL or not list(cwd.rglob('*.tmp')))
    kept = {f: f.stat().st_mtime_ns for f in cwd.glob('cache/*/train-*.npy')}
    monkeypatch.chdir(cwd)
    monkeypatch.setenv('NATIVEBIT_CACHE', str(cwd/'cache'))
    resumed, counts = data.prepare('text:some.txt', tokenizer.ByteTokenizer(), shard_tokens=500)
    monkeypatch.setenv('NATIVEBIT_CACHE', str(cwd/'other'))
    whole, expected = data.prepare('text:some.txt', tokenizer.ByteTokenizer())
    for s in data.SPLITS:
        np.testing.assert_array_equal(resumed[s][:], whole[s])
        assert dict(counts[s], shards=0) == dict(expected[s], shards=0)
    assert sum(f.stat().st_mtime_ns == t for f,t in kept.items()) >= len(kept) - 1   # all but the one that was just being recorded

def test_two_at_once(cwd):
    both = [slow(cwd) for _ in range(2)]
    for p in both: assert p.wait(60).stderr == '' and p.returncode == 0
    assert [f.name for f in cwd.glob('cache/*/*.json')] == ['meta.json'] and not list(cwd.rglob('*.tmp'))

# ---- a folder of shards that is not what was written --------------------------------------------------------

def shards(folder, older=False, **more):
    "A folder of three shards, as this nativebit writes it or as one without checksums did."
    about = dict(source=['x'], tokenizer=tokenizer.digest('bytes'), **more)
    data.write_shards([('train', 'ab'*20), ('train', 'cd'*20), ('valid', 'e'*9)], tokenizer.ByteTokenizer(), folder, about, 45)
    if older: (folder/'meta.json').write_text(json.dumps({k: x for k,x in json.loads((folder/'meta.json').read_text()).items() if k not in ('sum', 'sums')}))
    return folder

def opened(folder): return data.prepare(f'shards:{folder}', tokenizer.ByteTokenizer())

def in_file(name, f): return lambda d: (d/name).write_bytes(f((d/name).read_bytes()))
def in_meta(f): return lambda d: (d/'meta.json').write_text(json.dumps(f(json.loads((d/'meta.json').read_text()))))
def as_array(x): return lambda d: np.save(d/'train-00000.npy', x)

@pytest.mark.parametrize('older', [False, True])
@pytest.mark.parametrize('change', [
    in_file('train-00000.npy', lambda b: b[:-2]), in_file('train-00000.npy', lambda b: b''), in_file('train-00000.npy', lambda b: b.replace(b'{', b'{{{', 1)), in_file('train-00000.npy', lambda b: b.replace(b'(41,)', b'(9' + b'9'*20 + b',)')),
    as_array(np.zeros(41)), as_array(np.zeros((1, 41), np.uint16)), as_array(np.zeros(7, np.uint16)), lambda d: (d/'valid-00000.npy').unlink(), in_file('meta.json', lambda b: b'['*20_000),
    in_meta(lambda m: {k: x for k,x in m.items() if k != 'train'}), in_meta(lambda m: m | dict(train=5)), in_meta(lambda m: m | dict(train=m['train'] | dict(shards='x'))), in_meta(lambda m: m | dict(also=7)), in_meta(lambda m: m | dict(also=dict(dataset='stdlib')))])
def test_damaged_shards(tmp_path, change, older):
    change(folder := shards(tmp_path/'d', older))
    with pytest.raises(UserError, match='damaged|not valid JSON'): opened(folder)

@pytest.mark.parametrize('change', [in_file('train-00001.npy', lambda b: b.replace(b'd', b'f')), in_meta(lambda m: m | dict(source=['y'])), in_meta(lambda m: m | dict(sums=m['sums'] | {'train-00001.npy': '0'*16}))])
def test_what_only_checksums_tell(tmp_path, change):
    change(folder := shards(tmp_path/'d'))
    with pytest.raises(UserError, match='checksum'): opened(folder)

def test_older_shards_load_and_say_so(tmp_path, capsys):
    assert np.array_equal(opened(shards(tmp_path/'old', older=True))[0]['train'][:], opened(shards(tmp_path/'new'))[0]['train'][:])
    assert (said := capsys.readouterr().err).count('note: ') == 1 and 'old/meta.json has no checksums of its own and of its shards' in said

def test_a_folder_that_names_itself(tmp_path):
    folder = shards(tmp_path/'d', also=dict(dataset=f"shards:{tmp_path/'d'}", tokens=3))
    with pytest.raises(UserError, match='damaged'): opened(folder)

@pytest.mark.parametrize('text', [b'', b'{"sum": 5}', b'['*20_000, b'{"train": {"documents": 3}}'])
def test_progress_that_is_none_counts_as_none(tmp_path, text):
    whole = shards(tmp_path/'whole')
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'progress.json').write_bytes(text)
    shards(tmp_path/'d')
    assert {f.name: f.read_bytes() for f in (tmp_path/'d').iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}

# ---- a tokenizer that can't be used -------------------------------------------------------------------------

def bpe(path, **about):
    from tokenizers import Tokenizer, models
    path.write_text(Tokenizer(models.BPE({'</s>': 0, 'a': 1, 'b': 2}, [], **about)).to_str())
    return path

def test_a_tokenizer_without_its_unknown_token(tmp_path):
    tok = tokenizer.read_tokenizer(bpe(tmp_path/'tokenizer.json', unk_token='gone'), 3)
    assert tok.encode('ab').tolist() == [1, 2]
    with pytest.raises(UserError, match='is no tokenizer'): tok.encode('c')

def test_what_the_tokenizers_library_raises_is_a_sentence():
    class Panic(BaseException): "As Rust's panics come to Python."
    def raising(e):
        with tokenizer.sound('this'): raise e
    for e in (Panic('no entry'), ValueError('odd')):
        with pytest.raises(UserError, match='this is no tokenizer'): raising(e)
    with pytest.raises(KeyboardInterrupt): raising(KeyboardInterrupt())

@pytest.mark.parametrize('text', [b'['*20_000, b'5', b'{"eos_token_id": {}}', b'\xff'])
def test_files_beside_a_tokenizer_that_make_no_sense(tmp_path, text):
    for n in ('config.json', 'generation_config.json', 'tokenizer_config.json'): (tmp_path/n).write_bytes(text)
    files = tokenizer.small_files(path := bpe(tmp_path/'tokenizer.json'))
    assert files['config.json'] == text and list(tokenizer.read_tokenizer(path, 3).ends) == [0]

def test_numbers_that_go_far_beyond_the_tokens(tmp_path):
    text = bpe(tmp_path/'tokenizer.json').read_text()
    for n,ok in ((2**20, True), (2**22, False)):
        (tmp_path/'tokenizer.json').write_text(text.replace('"b":2', f'"b":{n}'))
        if ok: assert tokenizer.read_tokenizer(tmp_path/'tokenizer.json', 3).size == n + 1
        else:
            with pytest.raises(UserError, match='numbers its 3 tokens up to 4,194,304'): tokenizer.read_tokenizer(tmp_path/'tokenizer.json', 3)
