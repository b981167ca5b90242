"""A long training, killed at random times, beside one that nobody disturbs: `python tests/kill/long.py --hours 3 --kills 200 >> data/results/reliability.jsonl`.

The undisturbed one comes first and takes the hours that were asked for (it is stopped at a number of steps that a trial of a minute suggests); the other takes as long and what is lost by killing.
Of five kills one comes while a process starts, four after a random number of steps of its own; what XLA compiled is kept in a cache, which is being written then, too.
States of both lie on a tmpfs of --megabytes, which root can mount; without it, in /dev/shm. Both must end with the same bytes of weights and the same losses, nothing but the last states may be left,
and memory must be flat: the mean of the last sixth of the undisturbed process's resident bytes over that of its second sixth, until its last step."""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import mean
from nativebit.utils.files import git_hash, read_jsonl

TRAIN = '--config tiny --dataset text:t.txt --batch-size 4 --val-batches 1 --val-every 1000 --log-every 10 --start kmeans --requantize-every 3 --dropout 0.1 --quant-reg-weight 0.1 --keep 2 --resume'.split()

def start(home, name, steps, save_every):
    "A training process; what it says is appended to a file."
    with open(home/f'{name}.txt', 'ab') as said:
        return subprocess.Popen([sys.executable, '-m', 'nativebit', 'train', *TRAIN, '--max-steps', str(steps), '--save-every', str(save_every), '--name', name, '--states', str(home/'states'/name)], cwd=home, stdout=said, stderr=said)

def resident(pid):
    "Bytes of memory of a process; 0 where it has ended."
    try: return int(Path(f'/proc/{pid}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
    except (OSError, IndexError): return 0

def steps_of(home, name):
    "The step of the log's last record of one; after a kill it goes back to the last state."
    log = home/'logs'/name/'log.jsonl'
    return next((r['step'] for r in reversed(read_jsonl(log) if log.exists() else []) if 'step' in r), 0)

def trial_rate(home, seconds=60):
    "Steps a second, starting left out, and the seconds of starting again."
    def first_step(p):
        while p.poll() is None and not steps_of(home, 'trial'): time.sleep(.1)
        if p.poll() is not None: sys.exit((home/'trial.txt').read_text()[-2000:])
    for again in (False, True):   # the second finds what is compiled
        begun = time.time(); p = start(home, 'trial', 10**9, 10**9); first_step(p); starting = time.time() - begun
        if not again: p.kill(); p.wait(); shutil.rmtree(home/'logs/trial')
    begun, first = time.time(), steps_of(home, 'trial'); time.sleep(seconds)
    rate = (steps_of(home, 'trial') - first)/(time.time() - begun); p.kill(); p.wait()
    return rate, starting

def undisturbed(home, steps, save_every):
    "Seconds of a run, and its memory in MB: of the second sixth, and of the last before the last step."
    begun, p, memory = time.time(), start(home, 'whole', steps, save_every), []
    while p.poll() is None:
        if steps_of(home, 'whole') < steps: memory.append(resident(p.pid))
        time.sleep(1)
    if p.returncode: sys.exit((home/'whole.txt').read_text()[-2000:])
    sixth = len(memory)//6
    return time.time() - begun, mean(memory[sixth:2*sixth])/2**20, mean(memory[-sixth:])/2**20

def wait(p, seconds=float('inf'), until=lambda: False):
    "Wait for a process, or so long, or until something is so."
    end = time.time() + seconds
    while p.poll() is None and time.time() < end and not until(): time.sleep(.05)

def wait_to_kill(home, p, steps, kills, starting, r):
    if r.random() < .2: return wait(p, r.uniform(0, starting))
    at = steps_of(home, 'killed')
    wait(p, until=lambda: steps_of(home, 'killed') != at)   # it has begun again, where its last state is
    enough = steps_of(home, 'killed') + r.uniform(0, 2*steps/kills)
    wait(p, until=lambda: steps_of(home, 'killed') >= enough)

def disturbed(home, steps, save_every, starting, kills, r):
    "Kill a run at random moments and let it end; how often it was killed, and the most bytes of its states."
    done, most = 0, 0
    while True:
        p = start(home, 'killed', steps, save_every)
        wait_to_kill(home, p, steps, kills, starting, r) if done < kills else p.wait()
        if alive := p.poll() is None: p.kill(); p.wait()
        most, done = max(most, sum(f.stat().st_size for f in (home/'states').rglob('*') if f.is_file())), done + alive
        if not alive and p.returncode: sys.exit((home/'killed.txt').read_text()[-2000:])
        if not alive: return done, most

def losses(home, name): return {r['step']: r['loss'] for r in read_jsonl(home/'logs'/name/'log.jsonl') if 'loss' in r}
def files(folder): return sorted(p.name for p in folder.iterdir())

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--hours', type=float, default=3); a.add_argument('--kills', type=int, default=200); a.add_argument('--seed', type=int, default=0); a.add_argument('--megabytes', type=int, default=64)
    a = a.parse_args()
    home = Path(tempfile.mkdtemp(prefix='long-')); small = home/'states'; small.mkdir()
    (home/'t.txt').write_text('\n\n'.join(f'line {i} of a text that repeats itself, {i*i % 97}' for i in range(5000)))
    os.environ.update(JAX_PLATFORMS='cpu', NATIVEBIT_CACHE=str(home/'cache'), JAX_COMPILATION_CACHE_DIR=str(home/'compiled'), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
    mounted = os.geteuid() == 0 and not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={a.megabytes}m', 'tmpfs', small], stderr=subprocess.DEVNULL).returncode
    if not mounted: small.rmdir(); small.symlink_to(tempfile.mkdtemp(dir='/dev/shm'))
    try:
        rate, starting = trial_rate(home)
        steps = max(200, int(3600*a.hours*rate)); save_every = max(1, steps//(4*a.kills))
        seconds, second, last = undisturbed(home, steps, save_every)
        done, most = disturbed(home, steps, save_every, starting, a.kills, random.Random(a.seed))
        equal = (home/'logs/whole/model.safetensors').read_bytes() == (home/'logs/killed/model.safetensors').read_bytes() and losses(home, 'whole') == losses(home, 'killed')
        left = sorted({*files(home/'logs/killed')} ^ {*files(home/'logs/whole')})
        row = dict(steps=steps, save_every=save_every, undisturbed_s=round(seconds), starting_s=round(starting, 1), kills=done, equal=equal, leftovers=left, memory_second_sixth_mb=round(second, 1), memory_last_sixth_mb=round(last, 1), memory_ratio=round(last/second, 4),
                   states_most_mb=round(most/2**20, 1), tmpfs_mb=a.megabytes if mounted else None)
        print(json.dumps(dict(campaign='long', command=f'python tests/kill/long.py --hours {a.hours:g} --kills {a.kills} --seed {a.seed}', git_hash=git_hash()) | row))
        sys.exit(not equal or left or done < a.kills)
    finally:
        if mounted: subprocess.run(['umount', '-l', small])
        else: shutil.rmtree(small.resolve(), ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)

if __name__ == '__main__': main()
