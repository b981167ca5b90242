"""Run the notebooks that have cells for a GPU, and bring what these cells write into the repository.

    python tools/gpu_cells.py run FOLDER [NOTEBOOK…]   on a GPU: each in a process, under a time limit, what it wrote into FOLDER
    python tools/gpu_cells.py merge FOLDER             anywhere: from there into the notebooks, cells whose code is still the same
"""
import argparse, json, os, re, socket, subprocess, sys, time
from contextlib import chdir
from pathlib import Path
from gpu_check import ROOT, gpu_name, gpu_notebooks
sys.path.insert(0, str(ROOT))

FIRST = 'kernels/cuda kernels/ops kernels/megakernel kernels/between kernels/decode_layer kernels/lm_head pytorch/benchmark'.split()   # most wanted: room/name of a notebook, its numbers left out
PATHS = ['/tmp/', '/home/', '/root/', '/usr/', '/work/', str(ROOT)]

def by_want(path):
    name = re.sub(r'[0-9]+_', '', '/'.join(Path(path).with_suffix('').parts[-2:]))
    return FIRST.index(name) if name in FIRST else len(FIRST)

def source(cell): return ''.join(cell['source'])
def flags(cell): return {*re.findall(r'^#\| *(\w+)', source(cell), re.M)} if cell['cell_type'] == 'code' else set()

def fault(outputs):
    "Why outputs are not for a notebook, in words; None where they are."
    if any(o['output_type'] == 'error' for o in outputs): return 'ended in an error'
    words = [w for w in (*PATHS, socket.gethostname()) if w in json.dumps(outputs)]
    return f"wrote {words[0]}, which only this machine has" if words else None

def run_one(path, out):
    "Run a notebook as nbdev_test does, cells for a GPU, too. It is written after each of these: a time limit leaves what there is. Whether all cells ended well."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    nb, skipped, bad = read_nb(path), {*get_config().tst_flags.split()} - {'gpu'}, []
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = []
    def after(cell):
        if shell.exc: print(shell.prettytb(path), file=sys.stderr)
        if 'gpu' not in flags(cell): return bad.append('a cell') if shell.exc else None
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']   # warnings
        if why := fault(cell.outputs): bad.append(why); cell.outputs = []; print(f'{path}: left out: a cell {why}', flush=True)
        write_nb(nb, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shell = CaptureShell(path)
    with chdir(path.parent): shell.run_all(nb, preproc=lambda c: c.cell_type != 'code' or skipped & flags(c), postproc=after)
    return not bad

def run(folder, notebooks, seconds, rehearse=False):
    "Each notebook in a process, the most wanted first; whether all ended well."
    if not (gpu_name() or rehearse): sys.exit('error: there is no NVIDIA GPU here; --rehearse runs what a CPU can')
    env, bad = dict(os.environ, PYTHONPATH=str(ROOT), IN_TEST='1'), []
    if not rehearse: env.pop('TRITON_INTERPRET', None)   # kernels are to run on the GPU
    for path in sorted(notebooks, key=by_want):
        begun = time.time()
        try: code = subprocess.run([sys.executable, __file__, 'one', folder, path], env=env, stdin=subprocess.DEVNULL, timeout=seconds).returncode
        except subprocess.TimeoutExpired: code = 'at the limit'
        print(f'{time.time()-begun:5.0f} s, exit {code}: {path}', flush=True)
        if code: bad.append(path)
    return not bad

def merge(folder, root=ROOT):
    "Put outputs into the notebooks of the same names, as nbdev_clean leaves them; notebook → number of cells that have new ones."
    from nbdev.clean import nbdev_clean
    merged, found = {}, sorted(folder.rglob('*.ipynb'))
    if not found: sys.exit(f'error: {folder} has no notebooks; gpu_cells.py run writes some')
    for ran in found:
        path = root/ran.relative_to(folder)
        if not path.is_file(): sys.exit(f'error: {ran}: {root} has no such notebook; name the folder that gpu_cells.py run wrote into')
        nb, new = json.loads(path.read_text()), {source(c): c['outputs'] for c in json.loads(ran.read_text())['cells'] if 'gpu' in flags(c)}
        cells = [c for c in nb['cells'] if 'gpu' in flags(c) and new.get(source(c))]
        for c in cells:
            c['outputs'] = new[source(c)]
            if why := fault(c['outputs']): sys.exit(f'error: {ran}: a cell {why}')
        if not cells: continue
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
        nbdev_clean(str(path))
        merged[path] = len(cells)
    return merged

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=('run', 'merge', 'one'), help='one: a notebook in this process')
    ap.add_argument('folder', type=lambda p: Path(p).resolve(), help='of what notebooks wrote; not in the repository')
    ap.add_argument('notebooks', nargs='*', help='seen from the root; all that have such cells')
    ap.add_argument('--seconds', type=int, default=120, help='that a notebook may take')
    ap.add_argument('--rehearse', action='store_true', help='run on a CPU')
    a = ap.parse_args()
    if a.what == 'one': sys.exit(not run_one(ROOT/a.notebooks[0], a.folder/a.notebooks[0].lstrip('/')))
    if a.what == 'run': sys.exit(not run(a.folder, a.notebooks or gpu_notebooks(), a.seconds, a.rehearse))
    for path,n in merge(a.folder).items(): print(f'{path.relative_to(ROOT)}: {n}')

if __name__ == '__main__': main()
