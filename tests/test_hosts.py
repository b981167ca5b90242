"Two processes train together under jax.distributed: one is killed, both start again, and end where an undisturbed run does."
import os, signal, socket, subprocess, sys, time
import numpy as np, pytest
from nativebit.models.checkpoint import load_checkpoint
from nativebit.utils.files import read_jsonl

RUN = ['--config', 'tiny', '--dataset', 'text:some.txt', '--max-steps', '20', '--batch-size', '8', '--val-batches', '1', '--warmup-steps', '5',
       '--save-every', '5', '--val-every', '10', '--log-every', '5', '--requantize-every', '3', '--quant-reg-weight', '0.1']

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def start(cwd, name, n=2):
    "The processes of a run, a device each."
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(cwd/'jax'), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
    env = dict(os.environ, NATIVEBIT_CACHE=str(cwd/'cache'), JAX_PLATFORMS='cpu', OMP_NUM_THREADS='1', XLA_FLAGS='--xla_backend_optimization_level=0', **cache)
    at = f'127.0.0.1:{free_port()}'
    hosts = [['--hosts', f'{at},{n},{i}'] for i in range(n)]
    return [subprocess.Popen([sys.executable, '-m', 'nativebit', 'train', *RUN, '--name', name, '--resume', *h], cwd=cwd, env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for h in hosts]

def finish(ps):
    out = [p.communicate(timeout=240) for p in ps]
    assert all(p.returncode == 0 for p in ps), out
    return out

def losses(cwd, name): return {r['step']: (r['loss'], r.get('val_loss')) for r in read_jsonl(cwd/'logs'/name/'log.jsonl') if 'loss' in r}
def saved(cwd, name): return {int(p.name) for p in (cwd/'logs'/name/'state').glob('*') if p.name.isdigit()}

@pytest.fixture(scope='module')
def cwd(tmp_path_factory):
    d = tmp_path_factory.mktemp('hosts')
    (d/'some.txt').write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(2000)))
    return d

@pytest.mark.slow
def test_a_run_of_two_processes_survives_the_loss_of_one(cwd):
    out = finish(start(cwd, 'whole'))
    assert ['test perplexity' in stdout for stdout,_ in out] == [True, False]   # the first alone reports
    a = losses(cwd, 'whole')
    ps = start(cwd, 'killed')
    while all(p.poll() is None for p in ps) and not any(s >= 5 for s in saved(cwd, 'killed')): time.sleep(.02)
    ps[1].kill()
    time.sleep(1)
    ps[0].kill()                                                 # on a TPU the other hosts notice by themselves, after a while
    for p in ps: p.communicate()
    assert max(saved(cwd, 'killed')) < 20
    finish(start(cwd, 'killed'))
    assert losses(cwd, 'killed') == a
    one, two = [load_checkpoint(cwd/'logs'/n)[0] for n in ('whole', 'killed')]
    for n in one: np.testing.assert_array_equal(one[n], two[n], err_msg=n)
