"""How long arrays take to load with all checksums, beside reading them: `python tools/load_time.py [GB [warm|cold [FILES [TRIALS]]]] >> data/results/load_time.jsonl`.

Beside `read_arrays` stand three ways that check nothing: `same_way`, its own threads, pieces and new arrays; `fromfile`, NumPy's plain call; `load_file`, that of safetensors.
Each file is loaded in each way and then in each way backwards, so that what drifts meets all alike; it lies in the page cache, or (cold) has been taken out of it before each load.
Of each way the median of read_arrays' time over its own, by the clock and of CPU, with an interval that holds the median in 95 of 100 cases, and its median seconds a GB."""
import json, os, statistics, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from nativebit.utils.files import git_hash
from nativebit.utils.safetensors import ARRAY_TYPES, PIECE, file_header, read_arrays, save_arrays

def same_way(path):
    "The arrays of a file as `read_arrays` reads them, nothing checked."
    held, _, start = file_header(path)
    def read(x):
        out = np.empty(x['shape'], ARRAY_TYPES[x['dtype']]); part = out.reshape(-1).view(np.uint8)
        with open(path, 'rb', buffering=0) as f:
            f.seek(start + x['data_offsets'][0])
            for k in range(0, part.size, PIECE): f.readinto(part[k:k+PIECE])
        return out
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool: return [*pool.map(read, held.values())]

def fromfile(path): return np.fromfile(path, np.uint8)

WAYS = (read_arrays, same_way, fromfile, load_file)

def forget(path):
    "Take a file out of the page cache."
    with open(path, 'rb') as f: os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def timed(f, path, cold):
    if cold: forget(path)
    clock, cpu = time.perf_counter(), time.process_time()
    held = f(path)
    return np.array([time.perf_counter() - clock, time.process_time() - cpu])

def make_files(folder, gb, n):
    "Files of 16 sealed arrays each."
    r = np.random.default_rng(0)
    for k in range(n):
        save_arrays(folder/f'{k}.safetensors', {f'{i:02}': r.integers(0, 255, int(gb*1e9/n/16), np.uint8) for i in range(16)}, sealed=True)
        yield folder/f'{k}.safetensors'

def interval(x):
    "Between which of the sorted values the median lies, in 95 of 100 cases."
    x, h = sorted(x), .98*len(x)**.5
    return [round(x[max(0, int(len(x)/2 - h))], 3), round(x[min(len(x) - 1, int(len(x)/2 + h))], 3)]

def main(gb=2., cache='warm', files=8, trials=48):
    with tempfile.TemporaryDirectory() as d:   # TMPDIR says on which disk
        paths = [*make_files(Path(d), gb, files)]
        for f in WAYS: f(paths[0])
        found = {f: [] for f in WAYS}
        for k in range(trials):
            order = WAYS[k%4:] + WAYS[:k%4]   # each way begins as often as any other
            t = [(f, timed(f, paths[k%files], cache == 'cold')) for f in order + order[::-1]]
            for f in WAYS: found[f].append(sum(x for g,x in t if g is f))
    one = found.pop(read_arrays); row = dict(read_arrays_s_per_gb=round(statistics.median(x[0] for x in one)/2/gb*files, 3))
    for f,other in found.items():
        row[f'{f.__name__}_s_per_gb'] = round(statistics.median(x[0] for x in other)/2/gb*files, 3)
        for i,n in enumerate(('clock', 'cpu')):
            ratios = [a[i]/b[i] for a,b in zip(one, other)]
            row[f'over_{f.__name__}_{n}'], row[f'over_{f.__name__}_{n}_interval'] = round(statistics.median(ratios), 3), interval(ratios)
    print(json.dumps(dict(gb=gb, files=files, cache=cache, trials=trials, cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), **row, git_hash=git_hash(), command=f"python tools/load_time.py {gb:g} {cache} {files} {trials}")))

if __name__ == '__main__': main(*(f(x) for f,x in zip((float, str, int, int), sys.argv[1:])))
