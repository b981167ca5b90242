"The demo's command, rehearsed with two steps on little text."
import json, os, subprocess, sys
import pytest

@pytest.mark.slow
def test_demo(tmp_path):
    args = [sys.executable, '-m', 'nativebit', 'demo', '--out', tmp_path/'demo', '--max-steps', '2', '--max-tokens', '2048']
    r = subprocess.run(args, cwd=tmp_path, env=dict(os.environ, JAX_PLATFORMS='cpu'), capture_output=True, text=True)
    assert r.returncode == 0 and '| nativebit_qat |' in r.stdout, r.stderr
    rows = json.loads((tmp_path/'demo'/'results.json').read_text())
    kl = {row['method']: row['kl'] for row in rows}
    assert list(kl) == ['float', 'float_control', 'rtn', 'kmeans', 'gptq', 'nativebit_qat', 'packed']
    qat, packed = rows[-2:]
    file = tmp_path/'demo'/'nativebit_qat'/'model.nbpack.safetensors'
    assert (packed['val_ppl'], packed['test_ppl'], packed['kl']) == (qat['val_ppl'], qat['test_ppl'], qat['kl'])
    assert packed['bytes'] == file.stat().st_size and 'whole file' in r.stdout and 'class Stack' in r.stdout
    assert abs(kl['float']) < 1e-5 < kl['gptq'] < kl['kmeans'] < kl['rtn']
    for f in ('demo.png', 'sample.txt', 'nativebit_qat/log.jsonl', 'float_control/model.safetensors'): assert (tmp_path/'demo'/f).stat().st_size > 0
    log = [json.loads(l) for l in (tmp_path/'demo'/'nativebit_qat'/'log.jsonl').read_text().splitlines()]
    assert [r.get('type') for r in log] == ['header', 'init_eval', None, 'eval']
    assert {'schema_version', 'git_hash', 'argv', 'config', 'init_from'} <= set(log[0]) and {'val_ppl', 'val_loss', 'val_batches'} <= set(log[1])
    assert {'step', 'loss', 'perplexity', 'quant_err_rms', 'cb_utilization', 'dead_frac'} <= set(log[2]) and 'test_ppl' in log[3]
