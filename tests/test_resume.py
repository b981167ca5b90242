"Runs that are killed, stopped, or out of disk: what is left is whole, and --resume ends where an undisturbed run does."
import random, signal, time
import pytest
from nativebit.utils.files import read_jsonl
from test_cli import run, start

RUN = ['nativebit', 'train', '--config', 'tiny', '--dataset', 'text:some.txt', '--max-steps', '40', '--batch-size', '4', '--val-batches', '1',
       '--save-every', '5', '--val-every', '10', '--log-every', '5', '--start', 'kmeans', '--requantize-every', '3', '--dropout', '0.1', '--quant-reg-weight', '0.1']

@pytest.fixture(scope='module')
def cwd(tmp_path_factory):
    d = tmp_path_factory.mktemp('resume')
    (d/'some.txt').write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(2000)))
    assert run(d, *RUN, '--name', 'whole').returncode == 0
    return d

def saved(cwd, name): return {int(p.name) for p in (cwd/'logs'/name/'state').glob('*') if p.name.isdigit()}

def after(cwd, name, p, steps):
    "Wait until a run has saved a state from `steps` on."
    while p.poll() is None and not any(s >= steps for s in saved(cwd, name)): time.sleep(.02)

def weights(cwd, name): return (cwd/'logs'/name/'model.safetensors').read_bytes()
def losses(cwd, name): return {r['step']: r['loss'] for r in read_jsonl(cwd/'logs'/name/'log.jsonl') if 'loss' in r}

def test_kill_9_twice(cwd):
    for kill in range(2):
        p = start(cwd, *RUN, '--name', 'killed', '--resume')
        after(cwd, 'killed', p, 15*kill + 1)
        time.sleep(random.random()*.3)
        p.kill(); p.wait()
    p = run(cwd, *RUN, '--name', 'killed', '--resume')
    assert p.returncode == 0, p.stderr
    assert weights(cwd, 'killed') == weights(cwd, 'whole')
    assert losses(cwd, 'killed') == losses(cwd, 'whole')

@pytest.mark.parametrize('sig, code', [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_signals_save_and_exit(cwd, sig, code):
    name = f'stopped-{code}'
    p = start(cwd, *RUN, '--name', name)
    after(cwd, name, p, 5)
    p.send_signal(sig)
    assert p.wait(60).returncode == code and 'stopped at step' in p.stderr and 'Traceback' not in p.stderr, p.stderr
    p = run(cwd, 'nativebit', 'train', '--name', name, '--resume')   # the name is enough
    assert p.returncode == 0 and weights(cwd, name) == weights(cwd, 'whole'), p.stderr

def test_a_second_process_is_refused_and_the_first_lives(cwd):
    p = start(cwd, *RUN, '--name', 'first', '--max-steps', '100000')
    after(cwd, 'first', p, 5)
    for _ in range(2): assert ' is writing logs/first; wait for it' in run(cwd, *RUN, '--name', 'first', '--max-steps', '100000', '--resume').stderr
    assert p.poll() is None
    p.send_signal(signal.SIGTERM)
    assert 'stopped at step' in p.wait(60).stderr and p.returncode == 143

def test_a_run_that_exists_is_not_overwritten(cwd):
    before = weights(cwd, 'whole')
    p = run(cwd, *RUN, '--name', 'whole')
    assert p.returncode == 1 and 'go on with --resume' in p.stderr and weights(cwd, 'whole') == before
    for steps in ('40', '20'):
        p = run(cwd, *RUN, '--name', 'whole', '--resume', '--max-steps', steps)
        assert p.returncode == 0 and 'is finished, 40 steps' in p.stdout and weights(cwd, 'whole') == before, p.stderr

def test_nan_names_its_step_and_keeps_the_state(cwd):
    p = run(cwd, *RUN, '--name', 'nan', '--max-steps', '30', '--lr', '1e30', '--warmup-steps', '29', '--clip-norm', '1e30', '--save-every', '1')
    assert p.returncode == 1 and 'Traceback' not in p.stderr, p.stderr
    last = p.stderr.splitlines()[-1]
    assert 'try a lower --lr' in last and f"the state of step {max(saved(cwd, 'nan'))} is kept" in last, last

def test_states_by_the_clock_change_no_bit(cwd):
    "A state at nearly every step beside those of --save-every, then a kill: the same weights, and the same losses."
    name, clock = 'clock', ['--save-every', '1000', '--save-minutes', '0.0001']
    p = start(cwd, *RUN, '--name', name, *clock)
    after(cwd, name, p, 20)
    p.kill(); p.wait()
    assert saved(cwd, name) and max(saved(cwd, name)) % 1000
    p = run(cwd, *RUN, '--name', name, *clock, '--resume')
    assert p.returncode == 0 and weights(cwd, name) == weights(cwd, 'whole') and losses(cwd, name) == losses(cwd, 'whole'), p.stderr

def test_a_log_of_before_goes_on_with_its_own_warm_up(cwd):
    "Whose warm-up is longer than a tenth of its run, and whose settings are given again."
    long = [*RUN, '--warmup-steps', '20', '--name', 'long']
    assert run(cwd, *long).returncode == 0
    p = start(cwd, *long[:-1], 'goes-on')
    after(cwd, 'goes-on', p, 10)
    p.kill(); p.wait()
    p = run(cwd, *RUN, '--name', 'goes-on', '--resume')   # as a command of before that never named it
    assert p.returncode == 0 and weights(cwd, 'goes-on') == weights(cwd, 'long') != weights(cwd, 'whole'), p.stderr

@pytest.mark.slow
def test_full_disk_keeps_the_previous_state(cwd):
    assert run(cwd, *RUN, '--name', 'full', '--max-steps', '12').returncode == 0
    before = saved(cwd, 'full')
    p = run(cwd, *RUN, '--name', 'full', '--max-steps', '30', '--resume', limit=20*2**10)   # bytes a file: a state's metadata alone is larger
    assert p.returncode == 1 and "error: cannot keep the run's state" in p.stderr and saved(cwd, 'full') == before, p.stderr
    assert run(cwd, *RUN, '--name', 'full', '--resume').returncode == 0   # with room again it goes on from there
