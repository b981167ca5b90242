"Preparing data: bad input is one sentence, and nothing half-written is ever taken for whole."
import json, lzma, signal, time
import numpy as np, processes, pytest
from nativebit.data import loader as data, tokenizers as tokenizer
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
