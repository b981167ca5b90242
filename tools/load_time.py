"""How long a file of arrays takes to load with all checksums, beside reading it alone: `python tools/load_time.py [GB [warm|cold]] >> data/results/load_time.jsonl`.

Both fill new arrays with the same threads, in turns, seven times each, now one and now the other first; the file lies in the page cache, or (cold) has been taken out of it.
Medians, seconds of the clock and of CPU time, on however many cores are free; `best` is the quickest of each, which other programs disturb least."""
import json, os, statistics, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from nativebit.utils.files import git_hash
from nativebit.utils.safetensors import ARRAY_TYPES, PIECE, file_header, read_arrays, save_arrays

def read_alone(path):
    "The arrays of a file, nothing checked."
    held, _, start = file_header(path)
    def read(x):
        out = np.empty(x['shape'], ARRAY_TYPES[x['dtype']]); part = out.reshape(-1).view(np.uint8)
        with open(path, 'rb', buffering=0) as f:
            f.seek(start + x['data_offsets'][0])
            for k in range(0, part.size, PIECE): f.readinto(part[k:k+PIECE])
        return out
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool: return [*pool.map(read, held.values())]

def forget(path):
    "Take a file out of the page cache."
    with open(path, 'rb') as f: os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def timed(f, path, cold):
    if cold: forget(path)
    clock, cpu = time.perf_counter(), time.process_time()
    f(path)
    return time.perf_counter() - clock, time.process_time() - cpu

def main(gb=2., cache='warm', rounds=7):
    with tempfile.TemporaryDirectory() as d:   # TMPDIR says on which disk
        path, r = Path(d)/'x.safetensors', np.random.default_rng(0)
        save_arrays(path, {f'{i:02}': r.integers(0, 255, int(gb*1e9/32), np.uint8) for i in range(32)}, sealed=True)
        found, ways = {f: [] for f in (read_alone, read_arrays)}, [read_alone, read_arrays]
        for f in ways: f(path)
        for k in range(rounds):
            for f in ways[::(-1)**k]: found[f].append(timed(f, path, cache == 'cold'))
    med = {f.__name__: [statistics.median(x) for x in zip(*found[f])] for f in ways}
    row = {f'{n}_{k}_s': round(x, 3) for n,v in med.items() for k,x in zip(('clock', 'cpu'), v)}
    best = [min(x[k] for x in found[read_arrays])/min(x[k] for x in found[read_alone]) for k in (0, 1)]
    ratios = [round(b[0]/a[0], 3) for a,b in zip(*found.values())]
    print(json.dumps(dict(gb=gb, cache=cache, rounds=rounds, cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), **row, clock_ratio=round(med['read_arrays'][0]/med['read_alone'][0], 3), cpu_ratio=round(med['read_arrays'][1]/med['read_alone'][1], 3),
                          median_of_ratios=statistics.median(ratios), best_clock_ratio=round(best[0], 3), best_cpu_ratio=round(best[1], 3), ratios=ratios, git_hash=git_hash(), command=f"python tools/load_time.py {gb:g} {cache}")))

if __name__ == '__main__': main(float(sys.argv[1]) if len(sys.argv) > 1 else 2., sys.argv[2] if len(sys.argv) > 2 else 'warm')
