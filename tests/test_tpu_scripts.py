"The TPU scripts, with a stand-in for gcloud that records what it is asked and answers from a file."
import os, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml
from nativebit.utils.cli import parse_args
from nativebit.ptq.posthoc import main as posthoc
from nativebit.train.loop import main as train

SCRIPTS = Path(__file__).resolve().parent.parent/'tpu_scripts'
BASH = [p for p in SCRIPTS.iterdir() if p.is_file() and p.read_text().startswith(('#!/usr/bin/env bash', '# shellcheck'))]
CLOUD = {'provision': [], 'setup': [], 'launch': ['qat', '42', '--bucket', 'gs://bkt'], 'status': [], 'logs': [], 'fetch': ['--bucket', 'gs://bkt'], 'delete': []}
HERE = ['--project', 'my project; rm', '--zone', 'us-east5-b']

# asked for the state of a request it takes the first line of `states`, and the last one for ever; asked for a bucket or a file it fails unless `there` exists
GCLOUD = r'''#!/usr/bin/env bash
printf '%q ' gcloud "$@" >> "$CALLS/calls"; echo >> "$CALLS/calls"
case "$*" in
    *"queued-resources describe"*) head -n 1 "$CALLS/states"; [[ $(wc -l < "$CALLS/states") -le 1 ]] || sed -i 1d "$CALLS/states" ;;
    *"queued-resources create"*) [[ ! -e $CALLS/refuse ]] ;;
    *"buckets describe"*|*"storage ls"*) [[ -e $CALLS/there ]] ;;
    *"tpu-vm describe"*) cat "$CALLS/machines" ;;
esac
'''
PYTHON = r'''#!/usr/bin/env bash
printf '%q ' python "$@" >> "$CALLS/calls"; echo >> "$CALLS/calls"
n=$(grep -c ^python "$CALLS/calls"); [[ $n -gt $(cat "$CALLS/breaks") ]]
'''

@pytest.fixture
def repo(tmp_path):
    "A copy of the scripts, with stand-ins before everything else on the PATH."
    shutil.copytree(SCRIPTS, tmp_path/'tpu_scripts')
    for name,text in {'bin/gcloud': GCLOUD, 'bin/python': PYTHON, 'bin/git': '#!/usr/bin/env bash\ntouch "${5#--output=}"\n', 'states': '\n', 'machines': '1\n', 'breaks': '0\n'}.items():
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text(text)
    for p in (tmp_path/'bin').iterdir(): p.chmod(0o755)
    (tmp_path/'tmp').mkdir()
    return tmp_path

def run(repo, script, *args):
    env = {k: v for k,v in os.environ.items() if not k.startswith('NATIVEBIT')} | dict(PATH=f"{repo/'bin'}:{os.environ['PATH']}", CALLS=str(repo), TMPDIR=str(repo/'tmp'))
    return subprocess.run([repo/'tpu_scripts'/script, *args], cwd=repo, env=env, capture_output=True, text=True, timeout=60)

def calls(repo, *words): return [c for c in map(shlex.split, (repo/'calls').read_text().splitlines() if (repo/'calls').exists() else []) if set(words) <= set(c)]

@pytest.mark.parametrize('script', CLOUD)
def test_no_project_no_zone_no_call(repo, script):
    for args, says in (([], 'no project'), (HERE[:2], 'no zone'), ([*HERE[:2], '--zone', 'here'], 'is not valid'), ([*HERE, '--name', 'a b'], "--name 'a b'"), ([*HERE, '--sopt'], 'unknown option')):
        r = run(repo, script, *CLOUD[script], *args)
        assert r.returncode == 1 and r.stderr.startswith('error: ') and says in r.stderr and len(r.stderr.splitlines()) == 1
    assert not calls(repo)

@pytest.mark.parametrize('script', CLOUD)
def test_a_dry_run_prints_and_calls_nothing(repo, script):
    r = run(repo, script, *CLOUD[script], *HERE, '--dry-run')
    assert r.returncode == 0 and not calls(repo), r.stderr
    assert all('--project=my project; rm' in shlex.split(line) for line in r.stdout.splitlines() if line.startswith('gcloud'))

def test_help_and_missing_gcloud(repo):
    assert 'tpu_scripts/provision --project P' in run(repo, 'provision', '--help').stdout
    (repo/'bin'/'gcloud').unlink()
    if not shutil.which('gcloud'): assert 'gcloud is not installed' in run(repo, 'status', *HERE).stderr

def test_provision_asks_once(repo):
    ask = lambda: run(repo, 'provision', *HERE, '--bucket', 'gs://bkt', '--spot')
    assert ask().returncode == 0
    assert calls(repo, 'buckets', 'create', 'gs://bkt', '--location=us-east5')
    assert calls(repo, 'create', 'nativebit', '--accelerator-type=v6e-8', '--runtime-version=v2-alpha-tpuv6e', '--spot', '--project=my project; rm', '--zone=us-east5-b')
    (repo/'there').touch(); (repo/'states').write_text('ACTIVE\n')
    assert 'is there already' in ask().stdout
    assert len(calls(repo, 'create')) == 2                                       # the bucket's and the slice's, once each
    (repo/'states').write_text('SUSPENDED\n')
    ask()
    assert len(calls(repo, 'queued-resources', 'delete')) == 1 and len(calls(repo, 'queued-resources', 'create')) == 2
    assert 'no runtime is known' in run(repo, 'provision', *HERE, '--type', 'v9-1').stderr

def test_provision_withdraws_what_it_waited_for_in_vain(repo):
    wait = lambda: run(repo, 'provision', *HERE, '--wait', '--poll', '0')
    (repo/'states').write_text('\nWAITING_FOR_RESOURCES\nFAILED\n')
    r = wait()
    assert r.returncode == 1 and "ended as 'FAILED'" in r.stderr and calls(repo, 'queued-resources', 'delete', '--force')
    (repo/'states').write_text('\nPROVISIONING\nACTIVE\n'); (repo/'calls').unlink()
    assert wait().stdout.endswith('nativebit is there\n') and not calls(repo, 'delete')
    (repo/'refuse').touch(); (repo/'states').write_text('\n')
    assert wait().returncode != 0 and calls(repo, 'delete')

def test_setup_copies_to_all_and_leaves_nothing(repo):
    assert run(repo, 'setup', *HERE).returncode == 0
    assert calls(repo, 'scp', '--worker=all') and 'pip install' in calls(repo, 'ssh', '--worker=all')[0][-1]
    assert not list((repo/'tmp').iterdir())

def test_launch_starts_a_job_on_all_machines(repo):
    (repo/'machines').write_text('4\n')
    assert run(repo, 'launch', 'qat', '42', '--bucket', 'gs://bkt', *HERE).returncode == 0
    command = calls(repo, 'ssh', '--worker=all')[0][-1]
    assert 'tpu_scripts/job qat 42 --bucket gs://bkt --hosts auto' in command
    assert "unknown mode 'qta'" in run(repo, 'launch', 'qta', '42', '--bucket', 'gs://bkt', *HERE).stderr
    assert "no bucket" in run(repo, 'launch', 'qat', '42', *HERE).stderr

def test_launch_watches_and_starts_again_elsewhere(repo):
    (repo/'states').write_text('ACTIVE\nSUSPENDED\nSUSPENDED\nACTIVE\nACTIVE\n')
    watcher = subprocess.Popen([repo/'tpu_scripts'/'launch', 'qat', '42', '--bucket', 'gs://bkt', *HERE, '--watch', '--spot', '--poll', '0.2'], cwd=repo, text=True, stdout=subprocess.PIPE,
                               env=dict(os.environ, PATH=f"{repo/'bin'}:{os.environ['PATH']}", CALLS=str(repo), TMPDIR=str(repo/'tmp')))
    try:
        while watcher.poll() is None and len(calls(repo, 'ssh')) < 3: pass       # launch, setup, launch again
        (repo/'there').touch()
        assert watcher.wait(20) == 0 and 'the run is done' in watcher.stdout.read()
    finally: watcher.kill()
    assert calls(repo, 'queued-resources', 'create', '--spot') and calls(repo, 'scp')

def test_delete_and_status_of_nothing(repo):
    assert 'there is no nativebit' in run(repo, 'delete', *HERE).stdout and not calls(repo, 'delete')
    assert run(repo, 'status', *HERE).stdout == 'request: none\n'
    (repo/'states').write_text('ACTIVE\n')
    assert run(repo, 'delete', *HERE).returncode == 0 and calls(repo, 'delete', '--force', '--quiet')

def test_the_job_goes_on_after_a_break_and_copies_its_logs(repo):
    (repo/'breaks').write_text('1\n')
    r = run(repo, 'job', 'qat', '7', '--bucket', 'gs://bkt', '--poll', '0.1')
    assert r.returncode == 0 and len(calls(repo, 'python')) == 2, r.stderr
    assert (repo/'logs'/'qat-7.done').exists() and calls(repo, 'rsync', 'logs', 'gs://bkt/logs')
    (repo/'breaks').write_text('100\n')
    assert 'broke off three times' in run(repo, 'job', 'qat', '8', '--bucket', 'gs://bkt', '--poll', '0.1').stderr

def printed(repo, *args):
    r = run(repo, 'run_2b', *args, '--dry-run')
    assert r.returncode == 0, r.stderr
    return [shlex.split(line)[2:] for line in r.stdout.splitlines()]

def test_the_published_recipe(repo):
    (module, command, *argv), = printed(repo, 'qat', '42')
    given = parse_args(train, argv)
    want = dict(config='tpu-2b', dataset='openwebtext', max_steps=5000, init_from='logs/2b-float-42', lr=1e-4, weight_decay=.01, warmup_steps=200, delay_quant_steps=0,
                ema_decay=.99, quant_reg_weight=1., use_canonical_ema=True, batch_size=64, remat=True, val_every=500, seed=42, resume=True, states=None, no_nativebit=False)
    assert (module, command) == ('nativebit', 'train') and {k: given[k] for k in want} == want

def test_all_modes_are_calls_of_the_package(repo):
    runs = printed(repo, 'all', '1', '--bucket', 'gs://bkt', '--hosts', 'auto')
    assert [run[:2] for run in runs] == [['nativebit', c] for c in ('train', 'posthoc', 'train', 'train')]
    given = [parse_args(dict(train=train, posthoc=posthoc)[command], argv) for _,command,*argv in runs]
    assert given[0]['no_nativebit'] and given[0]['states'] == 'gs://bkt/2b-float-1/state' and given[2]['hosts'] == 'auto' and given[1]['ckpt'] == given[2]['init_from']
    for args, says in ((['qat'], 'give a mode'), (['qat', 'x'], 'is not a number'), (['int3', '1'], 'choose from float, nb')): assert says in run(repo, 'run_2b', *args).stderr

def test_shellcheck():
    shellcheck = Path(sys.executable).with_name('shellcheck')   # the dev requirements bring it
    r = subprocess.run([shellcheck, '-x', '-P', SCRIPTS, *BASH], capture_output=True, text=True)
    assert len(BASH) == 10 and r.returncode == 0, r.stdout

def test_the_skypilot_task_has_documented_fields_only(repo):
    "Fields of a task, of its resources and their parts, as docs.skypilot.co lists them; SkyPilot itself is not needed."
    task = yaml.safe_load((SCRIPTS/'nativebit.sky.yaml').read_text())
    assert set(task) <= {'name', 'workdir', 'num_nodes', 'resources', 'file_mounts', 'setup', 'run', 'envs', 'secrets', 'service', 'volumes', 'config'}
    resources = task['resources']
    one = {'infra', 'accelerators', 'accelerator_args', 'cpus', 'memory', 'instance_type', 'use_spot', 'disk_size', 'disk_tier', 'network_tier', 'ports', 'image_id', 'labels', 'job_recovery', 'autostop'}
    assert set(resources) <= one | {'any_of', 'ordered'} and all(set(r) <= one for r in resources['any_of'])
    assert set(resources['job_recovery']) <= {'strategy', 'max_restarts_on_errors', 'recover_on_exit_codes'} and resources['use_spot'] is True
    assert all(set(r['accelerator_args']) == {'tpu_vm', 'runtime_version'} and r['accelerators'].startswith('tpu-') for r in resources['any_of'])
    assert all(v is None or isinstance(v, str) for v in task['envs'].values()) and isinstance(task['num_nodes'], int)
    words = shlex.split(task['run'].replace('$MODE', task['envs']['MODE']).replace('$SEED', task['envs']['SEED']).replace('$NATIVEBIT_BUCKET', 'gs://bkt'))
    assert (repo/words[0]).exists() and run(repo, 'job', *words[1:], '--poll', '0.1').returncode == 0
