"""Run every command of gpu_check.txt on a GPU and write data/results/gpu_check.json: what ended how, in how many seconds, and which geometries hold bit for bit what is evaluated.
--rehearse runs what a CPU can, slowly, and writes logs/gpu_rehearsal.json instead."""
import datetime, json, os, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS, RESULT, WORKERS, LIMIT = Path(__file__).with_suffix('.txt'), ROOT/'data'/'results'/'gpu_check.json', 8, 300   # commands at a time; seconds a command may take
sys.path.insert(0, str(ROOT))
from nativebit.config import GEOMETRIES, stored_name
from nativebit.utils.files import atomic_path, git_hash

def gpu_name():
    "The GPU's name, None where there is none."
    if not shutil.which('nvidia-smi'): return None
    r = subprocess.run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], capture_output=True, text=True)
    return r.stdout.splitlines()[0].strip() if r.returncode == 0 and r.stdout.strip() else None

def gpu_notebooks():
    "Notebooks with cells that need a GPU, seen from the root."
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '"#| gpu' in p.read_text()]

def paragraphs(text, rehearse=False):
    "Lists of commands, a list a paragraph; a line with $NOTEBOOK becomes a list for each notebook."
    lines = [[l for l in p.splitlines() if not l.startswith('#') and not (rehearse and l.endswith('# gpu'))] for p in text.split('\n\n')]
    if rehearse: lines = [[l.replace('--attention cudnn', '--attention reference') for l in p] for p in lines]
    return [q for p in lines if p for q in ([[l.replace('$NOTEBOOK', n) for l in p] for n in gpu_notebooks()] if '$NOTEBOOK' in p[0] else [p])]

def run_command(command, folder):
    "Run a line of bash; its exit code as it is, its seconds, and its output."
    env = dict(os.environ, ROOT=str(ROOT), PYTHON=sys.executable, PYTHONPATH=str(ROOT), NATIVEBIT_CACHE=str(folder/'cache'), HF_HUB_OFFLINE='1',
               XLA_PYTHON_CLIENT_PREALLOCATE='false', JAX_COMPILATION_CACHE_DIR=str(folder/'jax-cache'), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.3', PYTHONFAULTHANDLER='1')
    env.pop('TRITON_INTERPRET', None)   # kernels are to run on the GPU
    script, start = 'set -o pipefail; python() { "$PYTHON" "$@"; }\n' + command, time.time()
    r = subprocess.run(['timeout', '-k', '10', str(LIMIT), 'bash', '-c', script], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    row = dict(command=command, exit=r.returncode, seconds=round(time.time()-start, 1))
    print(f"{'ok  ' if not r.returncode else 'FAIL'} {row['seconds']:6.1f} s  {command}", flush=True)
    return row, r.stdout

def run_all(groups, folder, workers=WORKERS):
    "The first list alone, then the others side by side: (row, output) of each command, in the order of the file."
    chain = lambda group: [run_command(c, folder) for c in group]
    with ThreadPoolExecutor(workers) as pool: return [x for rows in [chain(groups[0]), *pool.map(chain, groups[1:])] for x in rows]

def bit_equal(folder):
    "What gpu_parts.py found of each geometry; False where it came to no end."
    found = {stored_name(g): folder/f'bits-{g}.json' for g in GEOMETRIES}
    return {g: p.exists() and json.loads(p.read_text()) is True for g,p in found.items()}

def passed(record): return all(r['exit'] == 0 for r in record['commands']) and all(record['bit_equal'].values())

def main(rehearse=False):
    device = gpu_name()
    if not (device or rehearse): sys.exit("error: there is no NVIDIA GPU here; run make gpu-check where there is one, or python tools/gpu_check.py --rehearse for what a CPU can run")
    out = ROOT/'logs'/'gpu_rehearsal.json' if rehearse else RESULT
    with tempfile.TemporaryDirectory() as tmp:
        start, ran = time.time(), run_all(paragraphs(COMMANDS.read_text(), rehearse), Path(tmp), WORKERS if device else 2)
        record = dict(git_hash=os.environ.get('NATIVEBIT_GIT_HASH') or git_hash(), device=device or 'cpu', date=str(datetime.date.today()), commands=[r for r,_ in ran], bit_equal=bit_equal(Path(tmp)))
    with atomic_path(out) as tmp: tmp.write_text(json.dumps(record, indent=1) + '\n')
    for row,output in ran:
        if row['exit']: print(f"\n== exit {row['exit']}: {row['command']}", *output.splitlines()[-60:], sep='\n')
    print(f"\n{sum(r['exit'] == 0 for r,_ in ran)} of {len(ran)} commands ended well in {time.time()-start:.0f} s; bit for bit: {record['bit_equal']}; in {out}")
    sys.exit(int(not passed(record)))

if __name__ == '__main__': main('--rehearse' in sys.argv[1:])
