"""Every program that writes, killed, or refused space, at each of its file operations and run again: `python tests/kill/kill.py`; in `make test-slow` all, in `make test` a sample.

A server imports everything once and starts no JAX device; each trial is a fork of it, in a folder of its own. An audit hook counts the operations that change
files under that folder (open for writing, mkdir, rename, remove, rmdir, link, chmod) and, at the k-th, sends SIGKILL to its own process, or raises `ENOSPC` there and at all later ones
that need room; in a third mode no file may grow beyond some bytes (`RLIMIT_FSIZE`), in a fourth the command that runs again is killed, too. Then the same command runs again, undisturbed. It must end with 0, or say that the result `exists` where that is whole already; the files must have the names and, but for times and
commands, the bytes of an undisturbed run; nothing else may be left. A refused disk must end in a sentence and another exit code than 0, or do no harm."""
import argparse, atexit, errno, hashlib, json, os, random, re, resource, shutil, signal, sys, tempfile, threading, traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
sys.path[:0] = [str(Path(__file__).parent)]
os.environ.setdefault('JAX_PLATFORMS', 'cpu'); os.environ['HF_HUB_OFFLINE'] = '1'
from inputs import PROGRAMS, main as nativebit, make_inputs
from nativebit.__main__ import COMMANDS

# ---- in the child: the k-th operation -----------------------------------------------------------------------

WRITES, NAMED = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, {'os.mkdir': 0, 'os.rename': 1, 'os.remove': 0, 'os.rmdir': 0, 'os.link': 1, 'os.symlink': 1, 'os.chmod': 0, 'os.truncate': 0}
ROOM = ('open', 'os.mkdir', 'os.rename', 'os.link', 'os.symlink')   # operations that a full disk refuses

class Armed:
    "What the audit hook does in a child; nothing in the server."
    def __init__(self): self.folder, self.mode, self.k, self.seen, self.lock = None, None, None, [], threading.RLock()
    def __call__(self, event, args):
        if self.folder is None or event != 'open' and event not in NAMED: return
        if event == 'open' and not (isinstance(args[2], int) and args[2] & WRITES): return
        path = args[NAMED.get(event, 0)]
        if isinstance(path, int) or not os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))).startswith(self.folder): return
        with self.lock:
            self.seen.append((event, os.path.relpath(os.fsdecode(path), self.folder))); n = len(self.seen) - 1
        if self.mode == 'kill' and n == self.k: os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == 'full' and n >= self.k and event in ROOM: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

SIZES = [100, 10_000, 0, 1_000, 4_096, 100_000]   # bytes that a file may have in mode 'small': writing fails, whoever writes

ARMED = Armed()

def command(argv)->int:
    "Run a command line as a process would; its exit code."
    sys.argv = ['nativebit', *argv]
    try: nativebit(argv)
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else 1 if e.code else 0
    except BaseException: traceback.print_exc(); return 1
    return 0

def child(argv, folder, mode, k, seen, ask):
    "Fork: run a command in a folder. Returns (exit code, or minus the signal; what it said; operations that it did)."
    heard, said = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.close(heard); os.chdir(folder); os.environ.update(NATIVEBIT_CACHE=f'{folder}/cache', TMPDIR=f'{seen.parent}'); tempfile.tempdir = str(seen.parent)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(said, 1); os.dup2(said, 2); os.close(said); sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1) for fd in (1, 2))
            ARMED.folder, ARMED.mode, ARMED.k = os.path.realpath(folder), mode, k
            if mode == 'small': resource.setrlimit(resource.RLIMIT_FSIZE, (k, resource.RLIM_INFINITY))
            code = ask(argv) or 0
            threading._shutdown(); atexit._run_exitfuncs()
            ARMED.folder = None; resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2); seen.write_text(json.dumps(ARMED.seen))
        except BaseException: traceback.print_exc()
        finally:
            with suppress(OSError, ValueError): sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    os.close(said)
    with os.fdopen(heard, 'rb') as f: text = f.read().decode(errors='replace')
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text, json.loads(seen.read_text()) if seen.exists() else []

# ---- what there is afterwards -------------------------------------------------------------------------------

def plain_json(text, lines):
    "The leaves of a JSON file, by their places."
    out = {}
    def walk(x, at):
        if isinstance(x, (dict, list)) and x: [walk(v, f'{at}.{k}') for k,v in (x.items() if isinstance(x, dict) else enumerate(x))]
        elif not re.search(r'(seconds|_s|time|minutes|ms|git_hash)$', at): out[at] = x
    for i,l in enumerate(text.splitlines() if lines else [text]): walk(json.loads(l), str(i))
    return out

def content(folder:Path, inputs)->dict:
    "{file: its bytes' hash, or its leaves where it is JSON} of what is new; folders by name."
    out = {}
    for p in sorted(folder.rglob('*')):
        n = str(p.relative_to(folder))
        if n in inputs: continue
        if p.is_dir(): out[n] = 'folder'
        elif p.suffix in ('.json', '.jsonl') and p.stat().st_size < 10**5:
            with suppress(ValueError): out[n] = plain_json(p.read_text(), p.suffix == '.jsonl'); continue
            out[n] = 'no JSON'
        else: out[n] = hashlib.sha256(p.read_bytes()).hexdigest()
    return out

FREE = r'(^|/)log\.jsonl$|(^|/)state(/|$)|\.png$'   # a log says that a run was resumed; states have names and times of their own

def stable(a, b):
    "What is equal in two undisturbed runs: all that must be equal in others."
    return {n: ({k for k in x if x[k] == b[n].get(k, ...)} if isinstance(x, dict) else x == b[n]) for n,x in a.items() if not re.search(FREE, n)}

def difference(got, want, same)->str:
    "The first difference that counts, '' if there is none."
    if more := [n for n in got if n not in want and not re.search(FREE, n)]: return f'left over: {", ".join(more[:3])}'
    if less := [n for n in want if n not in got and not re.search(FREE, n)]: return f'missing: {", ".join(less[:3])}'
    for n,s in same.items():
        if isinstance(s, set) and not (isinstance(got[n], dict) and all(got[n].get(k, ...) == want[n][k] for k in s)): return f'{n} differs'
        if s is True and got[n] != want[n]: return f'{n} differs'
    return ''

# ---- trials -------------------------------------------------------------------------------------------------

class Bench:
    "Inputs, and the undisturbed result of each program."
    def __init__(self, make, ask=command):
        self.home = Path(tempfile.mkdtemp(prefix='kill-', dir='/dev/shm' if Path('/dev/shm').is_dir() else None)); self.inputs, self.ask, self.known = self.home/'inputs', ask, {}
        self.inputs.mkdir(); code, said, _ = child(None, self.inputs, None, None, self.home/'seen', lambda _: make(self.inputs))
        if code: raise RuntimeError(said)
        self.names = {str(p.relative_to(self.inputs)) for p in self.inputs.rglob('*')}
    def close(self): shutil.rmtree(self.home, ignore_errors=True)
    def run(self, argv, folder, mode=None, k=None):
        (self.home/'seen').unlink(missing_ok=True)
        return child(argv, folder, mode, k, self.home/'seen', self.ask)
    def fresh(self):
        shutil.rmtree(self.home/'work', ignore_errors=True)   # always the same path: what is prepared is known by it
        return Path(shutil.copytree(self.inputs, self.home/'work'))
    def undisturbed(self, name):
        "(operations, content, what is equal each time) of a program."
        if name not in self.known:
            argv = words(name); found = []
            for _ in range(2):
                code, said, seen = self.run(argv, folder := self.fresh())
                if code: raise RuntimeError(f'{name}: exit {code}: {said[-1500:]}')
                found.append(content(folder, self.names))
            self.known[name] = seen, found[0], stable(*found)
        return self.known[name]
    def trial(self, name, mode, k)->str:
        "What went wrong, '' if nothing did."
        (seen, want, same), argv, folder = self.undisturbed(name), words(name), self.fresh()
        if mode == 'twice': self.run(argv, folder, 'kill', k[0]); mode, k = 'kill', k[1]
        code, said, _ = self.run(argv, folder, mode, k)
        if 'Traceback' in said: return f'a traceback: {said[-1200:]}'
        if mode != 'kill' and code < 0: return f'signal {-code}'
        if mode != 'kill' and code and not re.search(r'(?:^|[\r\n\]] *)error: ', said): return f'no sentence: {said[-300:]}'
        code, said, _ = self.run(argv, folder)
        whole = difference(content(folder, self.names), want, same)
        if code and not (re.search('error: .*exists', said) and not whole): return f'again: exit {code}: {said[-700:]}'
        return whole

def words(name): return c.split() if isinstance(c := PROGRAMS[name][0], str) else list(c)

def places(bench, name, mode, most=None, seed=0):
    "The operations to disturb: all that count, or a sample."
    if mode == 'small': return SIZES[:most]
    ks = [k for k,(event,_) in enumerate(bench.undisturbed(name)[0]) if mode != 'full' or event in ROOM]
    if mode == 'twice': ks = [(a, b) for a in ks for b in ks]
    return ks if most is None or len(ks) <= most else sorted(random.Random(f'{seed}{name}{mode}').sample(ks, most))

def all_trials(programs, modes=('kill', 'full', 'small'), most=None, seed=0, done=lambda line: None)->list:
    "Run them: a line for each."
    for n in programs: import_module('nativebit.' + COMMANDS[words(n)[0]][0])   # once, here, and no device is started
    bench, lines = Bench(lambda folder: make_inputs(folder, all(PROGRAMS[n][1] for n in programs))), []
    sys.addaudithook(ARMED)
    try:
        for name in programs:
            for mode in modes:
                for k in places(bench, name, mode, most, seed):
                    event, path = bench.undisturbed(name)[0][k[0] if mode == 'twice' else k] if mode != 'small' else ('files of at most', f'{k:,} bytes')
                    lines.append(dict(program=name, mode=mode, k=k, at=f'{event} {path}', wrong=bench.trial(name, mode, k))); done(lines[-1])
    finally: bench.close()
    return lines

def table(lines)->str:
    rows = [[p, *(f(m, p) for m in ('kill', 'full', 'small', 'twice') for f in (lambda m, p: sum(l['program'] == p and l['mode'] == m for l in lines), lambda m, p: sum(l['program'] == p and l['mode'] == m and l['wrong'] != '' for l in lines)))] for p in dict.fromkeys(l['program'] for l in lines)]
    rows.append(['all', *(sum(r[i] for r in rows) for i in range(1, 9))])
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [['program', 'killed', 'wrong', 'disk full', 'wrong', 'files cut', 'wrong', 'killed twice', 'wrong'], ['---', *['--:']*8], *rows])

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--programs', help="names, separated by commas; all by default"); a.add_argument('--modes', default='kill,full,small'); a.add_argument('--most', type=int, help="places of each program and mode; all by default")
    a.add_argument('--quick', action='store_true', help="the quick programs only"); a.add_argument('--seed', type=int, default=0); a.add_argument('--out', type=Path)
    a = a.parse_args()
    def done(l):
        if a.out: open(a.out, 'a').write(json.dumps(l) + '\n')
        if l['wrong']: print(f"{l['program']}, {l['mode']} at {l['k']} ({l['at']}): {l['wrong']}", flush=True)
    lines = all_trials([n for n in (a.programs.split(',') if a.programs else PROGRAMS) if PROGRAMS[n][1] or not a.quick], a.modes.split(','), a.most, a.seed, done)
    print(table(lines)); sys.exit(any(l['wrong'] for l in lines))
