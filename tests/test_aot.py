"The command that compiles for a TPU that is not there, as a user would run it."
import json
from pathlib import Path
import processes, pytest

pytest.importorskip('libtpu', reason="needs the TPU compiler: pip install -e '.[tpu]'")
SCRIPT = Path(__file__).resolve().parent.parent/'tpu_scripts'/'aot_check.py'

def run(*args): return processes.run(SCRIPT, '--config', 'tiny', *args)

def test_a_small_model_fits(tmp_path):
    r = run('--topology', 'v6e:2x4', '--batch-size', '32', '--accumulate', '2', '--recipe', 'qat', '--max-steps', '10', '--mfu', '0.5', '--out', str(tmp_path/'rows.jsonl'))
    assert r.returncode == 0 and 'fits: the largest program leaves' in r.stdout and '50% (given)' in r.stdout, r.stderr
    row = json.loads((tmp_path/'rows.jsonl').read_text())
    assert row['mode'] == 'qat, teacher' and set(row['programs']) == {'train step', 'validation', 'requantizing', 'Q(w)'} and row['flops_device'] > row['useful_flops_device']

def test_what_does_not_fit_says_what_to_do():
    r = run('--topology', 'v5e-8', '--batch-size', '8388608', '--remat', '0', '--no-nativebit')
    assert r.returncode == 1 and 'does not fit: recompute layers in the backward pass with --remat 1' in r.stdout and not r.stderr, r.stderr

@pytest.mark.parametrize('args, says', [
    (['--topology', 'v6e-9'], "no TPU slice 'v6e-9'"),
    (['--batch-size', '12'], '12 windows can'),
    (['--mesh', '3,3'], 'a mesh of 3,3 needs 9 devices'),
])
def test_refusals(args, says):
    r = run(*args)
    assert r.returncode == 1 and r.stderr.startswith('error: ') and says in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
