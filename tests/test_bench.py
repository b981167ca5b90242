"The GPU benchmark, rehearsed: its rows are measured, kept, and not measured twice."
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest
from nativebit.utils.files import read_jsonl

SCRIPT = Path(__file__).resolve().parent.parent/'tpu_scripts'/'bench_2b.py'
spec = importlib.util.spec_from_file_location('bench_2b', SCRIPT)
bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)

def test_rows_are_kept_and_failed_ones_tried_again(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path/'rows.jsonl'
    monkeypatch.setattr(bench, 'in_a_process', lambda row, timeout: asked.append(row) or (dict(error='out of memory') if row['mode'] == 'float' else dict(ms=1.)))
    measure = lambda **kw: bench.main(config='tiny', gpus='1,2', out=str(out), states=str(tmp_path), **kw)
    measure()
    assert len(asked) == 9 and [r['kind'] for r in asked[-3:]] == ['save', 'restore', 'restore'] and read_jsonl(out)[0]['type'] == 'header'
    measure(); assert len(asked) == 9
    measure(again=True); assert len(asked) == 11 and all(r['mode'] == 'float' for r in asked[-2:])
    assert 'states' not in read_jsonl(out)[-1]
    measure(minutes=.1, remat=True); assert len(asked) == 11           # no time, no row
    with pytest.raises(bench.UserError): bench.main(gpus='one', out=str(out))

@pytest.mark.slow
def test_a_row_on_two_devices(tmp_path):
    row = dict(bench.plan('tiny', [2], 2, False, 'published', 1, 1, str(tmp_path))[1])
    env = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0')
    p = subprocess.run([sys.executable, SCRIPT, '--row', json.dumps(row)], env=env, capture_output=True, text=True)
    result = json.loads(p.stdout.splitlines()[-1])
    assert p.returncode == 0 and result['ms'] > 0 and result['requantize_ms'] > 0 and len(result['peak_gib']) == 2, p.stderr

def test_models_rehearsed(tmp_path):
    "Whole networks: what is checked, what is timed, and that a wrong name is refused."
    pytest.importorskip('torch', reason='the kernels need the extra `torch`'), pytest.importorskip('triton', reason='no Triton for this system')
    script, out = SCRIPT.parent.parent/'kernels'/'bench_models.py', tmp_path/'models.jsonl'
    r = subprocess.run([sys.executable, script, '--rehearse', '--out', out, '--models', 'Llama-3.2-1B', '--older'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    header, *rows = read_jsonl(out)
    assert header['type'] == 'header' and all(r['ok'] and r['equal'] == r['replays'] > 0 for r in rows[:3]) and all(r['ok'] and r['error'] > 0 for r in rows[3:5]) and [r['end_to_end'] for r in rows[5:]] == ['Llama-3.2-1B int8 packed', 'Llama-3.2-1B int8 dense bfloat16']
    r = subprocess.run([sys.executable, script, '--rehearse', '--models', 'Llama-9'], capture_output=True, text=True)
    assert r.returncode and 'choose from' in r.stderr and 'Traceback' not in r.stderr

@pytest.mark.slow
def test_generate_rehearsed():
    "What it checks on a GPU holds on a CPU; no section ends in an error."
    pytest.importorskip('torch'), pytest.importorskip('transformers')
    r = subprocess.run([sys.executable, SCRIPT.parent.parent/'kernels'/'bench_generate.py', '--rehearse'], capture_output=True, text=True)
    rows = [json.loads(l) for l in r.stdout.splitlines() if l.startswith('{')]
    assert r.returncode == 0 and not any('failed' in x for x in rows) and all(x['ok'] for x in rows if 'check' in x and not any(w in x['check'] for w in ('of our own', 'within', 'twice the speed'))), r.stdout + r.stderr
    assert sum('check' in x for x in rows) >= 10

def test_steps_rehearsed(tmp_path):
    "Ways of each product are timed in a step, and the best so far is kept."
    pytest.importorskip('torch')
    r = subprocess.run([sys.executable, SCRIPT.parent.parent/'kernels'/'tune_step.py', '--rehearse', '--texts', '2', '--out', tmp_path/'s.jsonl'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    head, start, *rows = map(json.loads, (tmp_path/'s.jsonl').read_text().splitlines())
    assert head['shapes'].keys() == {r['product'] for r in rows} and len([r for r in rows if not r.get('kept')]) == 8
    kept = [start['step_ms'], *(r['step_ms'] for r in rows if r.get('kept'))]
    assert kept == sorted(kept, reverse=True) and min(r['step_ms'] for r in [start, *rows]) == kept[-1]

@pytest.mark.slow
def test_timeline_rehearsed(tmp_path):
    "Each block passes its stations in order, and the last launch begins after the first."
    pytest.importorskip('torch')
    r = subprocess.run([sys.executable, SCRIPT.parent.parent/'kernels'/'bench_timeline.py', '--rehearse', '--out', tmp_path/'t.jsonl'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    head, *rows = map(json.loads, (tmp_path/'t.jsonl').read_text().splitlines())
    assert head['command'].startswith('python kernels/bench_timeline.py') and len(rows) == 4 and not any('failed' in r for r in rows)
    for r in rows:
        assert len(r['blocks']) == 6 == len(r['processor']) and all(b == sorted(b) for b in r['blocks']) and r['first']['begun'] <= r['last']['begun'] < r['last']['ended']

@pytest.mark.slow
def test_sanitize_rehearsed():
    "Each kernel is right on a CPU, and a wrong one would be named."
    pytest.importorskip('torch')
    r = subprocess.run([sys.executable, SCRIPT.parent.parent/'kernels'/'sanitize.py', '--rehearse'], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.count(': ') >= 25, r.stdout + r.stderr
