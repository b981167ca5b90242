"""Run notebooks, each in a process and on a core of its own, and print how long each took. Usage: test_notebooks.py [PATH…]

What most of them import is imported once: each process is a fork of one that has it already."""
import os, re, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = 'jax flax.nnx optax orbax.checkpoint grain matplotlib.pyplot nbdev.test execnb.shell tokenizers tiktoken torch'.split()

# what compiles fastest (Makefile) runs up to three times slower than XLA's level 1: these compute more than they compile
COMPUTING = '''models/attention evaluation/perplexity ptq/baselines train/distillation inference/generate
               pipelines/compare pipelines/mixed_bits quant/ste quant/ema tutorials/quickstart'''.split()   # their numbers left out

def computes(path): return re.sub(r'[0-9]+_', '', f'{path.parent.name}/{path.stem}') in COMPUTING

def test(path, cores):
    from nbdev.test import get_config, test_nb
    core = cores.get()
    if computes(path): os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '').replace('level=0', 'level=1')   # read when the first program is compiled
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {core})   # threads that wait for each other cost a fifth more; macOS has none
    try: return path, *test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    finally: cores.put(core)

def notebooks(paths):
    "The notebooks at these paths, those that compute and then the largest first: a long one that starts last is waited for alone."
    found = {p.resolve() for path in paths for p in ([Path(path)] if Path(path).is_file() else Path(path).rglob('*.ipynb'))}
    return sorted((p for p in found if '.ipynb_checkpoints' not in p.parts), key=lambda p: (not computes(p), -p.stat().st_size))

if __name__ == '__main__':
    os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')   # read where PyTorch and NumPy are imported, before a process has its core
    server, failed, begun, available = get_context('forkserver'), [], time.time(), sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count())
    server.set_forkserver_preload(PRELOAD)
    with server.Manager() as manager, ProcessPoolExecutor(len(available), server, max_tasks_per_child=1) as pool:
        cores = manager.Queue()
        for c in available: cores.put(c)
        for done in as_completed([pool.submit(test, p, cores) for p in notebooks(sys.argv[1:] or [ROOT/'nbs'])]):
            path, passed, seconds = done.result()
            print(f"{time.time()-begun:6.1f} s: {path.relative_to(ROOT)}, {seconds:.1f} s{'' if passed else '  FAILED'}", flush=True)
            if not passed: failed.append(path)
    if failed: sys.exit(f"error: {len(failed)} notebooks failed")
