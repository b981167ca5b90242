"""Damaged files for every reader: `python tests/fuzz/campaign.py` (`make fuzz`: 200,000 for each; stopped, the same command goes on).

Each mutant is read in a process of its own making, which a parent watches: it has 2 s of CPU time and 1.5 GB more memory than it began with. A mutant ends
refused (`UserError`), loaded, or as a failure: `traceback` (anything else was raised), `slow`, `crashed`, or `wrong` (a format of ours with checksums came out as another network)."""
import argparse, json, mmap, os, resource, select, shutil, signal, struct, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path
sys.path[:0] = [str(Path(__file__).parent)]
os.environ.setdefault('JAX_PLATFORMS', 'cpu'); os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
import numpy as np
from tqdm import tqdm
from mutate import mutant
from readers import READERS
from nativebit.utils import safetensors as files
from nativebit.utils.cli import UserError

SECONDS, MEMORY, CHUNK = 2, 1_500_000_000, 2000   # of CPU time a mutant, of bytes, mutants a process reads
GOOD, BAD = ('refused', 'loaded'), ('traceback', 'slow', 'crashed', 'wrong')

# ---- one mutant ---------------------------------------------------------------------------------------------

def original(name, folder:Path):
    "The files of a reader's original, and what they hold."
    folder.mkdir(parents=True); READERS[name].write(folder)
    held = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    return held, {n: np.array(x) for n,x in READERS[name].read(folder/READERS[name].where).items()}   # copies: some are mapped from files that will change

def write_files(folder:Path, held:dict, there:dict):
    "Make a folder hold these files; only what differs from what is there is written."
    for n in {*there} - {*held}: (folder/n).unlink()
    for n,x in held.items():
        if there.get(n) is not x: (folder/n).write_bytes(x)
    return dict(held)

def same(a:dict, b:dict)->bool: return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)

class Silent:
    "Standard error, of which only a note that a file has no checksums is wanted."
    said = False
    def write(self, text): self.said |= 'has no checksums' in text
    def flush(self): pass

def verdict(name, path, want)->tuple:
    "What becomes of a damaged file: (verdict, why)."
    r, sys.stderr = READERS[name], Silent()
    files.say_unsealed.cache_clear()
    begun = time.process_time()
    try: got = r.read(path)
    except UserError as e: out = ('refused', str(e)) if str(e) and '\n' not in str(e).strip() else ('traceback', f'a sentence of several lines: {e}')
    except BaseException as e: out = 'traceback', f"{type(e).__name__}: {str(e)[:200]} | {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__)[::-1][:5])}"
    else: out = ('loaded', '') if not r.ours or sys.stderr.said or same(got, want) else ('wrong', ', '.join([n for n in want if n not in got or not same({n: got[n]}, {n: want[n]})][:3]))
    finally: sys.stderr = sys.__stderr__
    return ('slow', f'{time.process_time() - begun:.1f} s of CPU') if time.process_time() - begun > SECONDS else out

# ---- a process that reads a chunk, and its parent ------------------------------------------------------------

def read_chunk(name, seeds, folder, at, out):
    "The child: read mutants, say which one is at hand, write a line for each."
    tempfile.tempdir = str(folder)   # what readers write beside their files
    shutil.rmtree(folder/'x', ignore_errors=True)
    held, want = original(name, folder/'x'); there = dict(held)
    size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY)); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for k,seed in seeds:
        at[:8] = struct.pack('<q', k)
        there = write_files(folder/'x', mutant(held, seed, READERS[name].targets), there)
        what, why = verdict(name, folder/'x'/READERS[name].where, want)
        out.write(json.dumps([k, what, why]) + '\n'); out.flush()
    at[:8] = struct.pack('<q', -1)

class Child:
    "A chunk that is being read; started again behind a mutant that kills its process."
    def __init__(self, name, chunk, n, seed):
        self.name, self.chunk, self.seeds, self.results = name, chunk, [(k, f'{seed}/{name}/{chunk*CHUNK + k}') for k in range(n)], {}
        self.at, self.folder = mmap.mmap(-1, 8), Path(tempfile.mkdtemp(prefix='fuzz-', dir='/dev/shm' if Path('/dev/shm').is_dir() else None))
        self.start(0)
    def start(self, k):
        self.at[:8] = struct.pack('<q', -2 - k)   # until the original is read
        r, w = os.pipe()
        if (pid := os.fork()) == 0:
            code = 1
            try: os.close(r); read_chunk(self.name, self.seeds[k:], self.folder, self.at, os.fdopen(w, 'w')); code = 0
            except BaseException: traceback.print_exc(file=sys.__stderr__)
            finally: os._exit(code)
        os.close(w); self.pid, self.pipe, self.text, self.since, self.cpu = pid, r, b'', (None, 0., 0.), 0.
    def used(self):
        "Seconds of CPU time the child has used."
        f = Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(f[11]) + int(f[12]))/os.sysconf('SC_CLK_TCK')
    def read(self):
        "Take what the child has written; False at its end."
        data = os.read(self.pipe, 2**16); *lines, self.text = (self.text + data).split(b'\n')
        for l in lines: k, what, why = json.loads(l); self.results[k] = what, why
        return bool(data)
    def watch(self):
        "Kill a child that is at one mutant for too long."
        k, now, cpu = struct.unpack('<q', self.at[:8])[0], time.monotonic(), self.used()
        if k != self.since[0]: self.since = k, now, cpu
        elif k >= 0 and k not in self.results and (cpu - self.since[2] > 2*SECONDS or now - self.since[1] > 600): os.kill(self.pid, signal.SIGKILL); self.results[k] = 'slow', 'killed'
    def ended(self)->bool:
        "Wait for the child; go on behind what killed it. True when all are read."
        os.close(self.pipe); status = os.waitpid(self.pid, 0)[1]
        k = struct.unpack('<q', self.at[:8])[0]
        if k < -1: raise RuntimeError(f'the original of {self.name} is not read')
        if k >= 0: self.results.setdefault(k, ('crashed', f'status {status}'))
        if k >= 0 and k + 1 < len(self.seeds): self.start(k + 1); return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True
    @property
    def line(self):
        failed = [[self.seeds[k][1], *x] for k,x in sorted(self.results.items()) if x[0] in BAD]
        return dict(reader=self.name, chunk=self.chunk, counts=Counter(x[0] for x in self.results.values()), failed=failed[:50])

def campaign(chunks, seed, n_processes, done=lambda line: None):
    "Read chunks [(reader, number, mutants)], some at a time; `done` is called with the line of each."
    todo, running = list(chunks)[::-1], []
    while todo or running:
        while todo and len(running) < n_processes: running.append(Child(*todo.pop(), seed))
        ready = select.select([c.pipe for c in running], [], [], .5)[0]
        for c in [*running]:
            if c.pipe in ready and not c.read() and c.ended(): running.remove(c); done(c.line)
        for c in running: c.watch()

# ---- table and command --------------------------------------------------------------------------------------

def table(lines)->str:
    "Reader × what became of its mutants."
    columns = ('tried', *GOOD, *BAD)
    counts = {r: sum((Counter(l['counts']) for l in lines if l['reader'] == r), Counter()) for r in READERS}
    rows = [[r, *(f"{c.total() if k == 'tried' else c[k]:,}" for k in columns)] for r,c in [*counts.items(), ('all', sum(counts.values(), Counter()))] if c]
    return '\n'.join('| ' + ' | '.join(x) + ' |' for x in [['reader', *columns], ['---', *['--:']*len(columns)], *rows])

def chunks_of(n:int): return [(r, k, min(CHUNK, n - k*CHUNK)) for k in range(-(-n//CHUNK)) for r in READERS]

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--mutants', type=int, default=200_000, help="of each reader")
    a.add_argument('--readers', default=';'.join(READERS), help="some of the names of the table, separated by semicolons")
    a.add_argument('--seed', default='0')
    a.add_argument('--processes', type=int, default=os.cpu_count())
    a.add_argument('--out', type=Path, help=".jsonl file, a line a chunk; given again, the campaign goes on")
    a.add_argument('--show', metavar='SEED', help="write one mutant into the folder MUTANT and say what becomes of it; SEED as in the list of failures")
    a = a.parse_args()
    if a.show: return show(a.show)
    lines = [json.loads(l) for l in a.out.read_text().splitlines()] if a.out and a.out.exists() else []
    if any(l['seed'] != a.seed for l in lines): sys.exit(f"error: {a.out} is of another seed")
    known = {(l['reader'], l['chunk']) for l in lines}
    readers = a.readers.split(';')
    with tqdm(total=len(readers)*a.mutants, initial=sum(sum(l['counts'].values()) for l in lines), unit='mutant', unit_scale=True, disable=None) as bar:
        def done(line):
            lines.append(line | dict(seed=a.seed)); bar.update(sum(line['counts'].values()))
            if a.out: a.out.parent.mkdir(parents=True, exist_ok=True); open(a.out, 'a').write(json.dumps(lines[-1]) + '\n')
        campaign([c for c in chunks_of(a.mutants) if c[0] in readers and c[:2] not in known], a.seed, a.processes, done)
    print(table(lines))
    failed = [f for l in lines for f in l['failed']]
    for f in failed[:100]: print(*f, sep=': ')
    sys.exit(bool(failed))

def show(seed):
    name = seed.split('/')[1]; held, want = original(name, Path(tempfile.mkdtemp())/'x')
    m = mutant(held, seed, READERS[name].targets)
    for n,x in m.items(): p = Path('MUTANT')/n; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(x)
    print(verdict(name, Path('MUTANT')/READERS[name].where, want))

if __name__ == '__main__': main()
