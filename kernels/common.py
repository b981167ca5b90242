"What tune.py and bench.py share: shapes, random matrices, timing, and stages that can fail alone."
import ctypes, json, math, os, subprocess, sys, time
from contextlib import chdir
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REHEARSE = '--rehearse' in sys.argv
if REHEARSE: os.environ.setdefault('TRITON_INTERPRET', '1')

import torch
from nativebit.kernels import cuda, layout

DEVICE = 'cpu' if REHEARSE else 'cuda'
SHAPES = [(48, 256), (32, 256)] if REHEARSE else [(7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]   # qkv, o, gate|up, down of the 2.2B network
LAYERS = 2 if REHEARSE else 26
GEOMETRIES = {'int8': (3, 'int8'), 'lut-b': (3, 'float8_e4m3'), '2bit': (2, 'int8'), '4bit': (4, 'int8')}

if REHEARSE:   # the CUDA source runs on the CPU, lane by lane
    GXX = ['g++', '-std=c++17', '-O1', '-DON_CPU', '-I../../tests', '-x', 'c++', '-shared', '-fPIC', '-pthread']
    def _on_cpu(bits, kind, *more):
        "The same words in the same folder as in the notebooks and tests: what they have compiled is found."
        with chdir(ROOT/'nbs'/'09_kernels'): return ctypes.CDLL(str(cuda.build(bits, kind, [*GXX, *more])))
    def _library(bits, kind, libs={}):
        if (bits, kind) not in libs: libs[bits, kind] = _on_cpu(bits, kind)
        return libs[bits, kind]
    cuda.library = _library

def say(*words): print(*words, flush=True)

def write(path, record):
    "Append a record to a .jsonl file, at once."
    with Path(path).open('a') as f: f.write(json.dumps(record) + '\n')

def random_packed(shape, bits, kind):
    "A matrix of random units, made where it is used. Scales make its products about as large as trained ones."
    (o, i), (bo, bi), n = shape, layout.KINDS[kind][1], 256*bits
    T, B, table = -(-o//16), -(-i//128), (16 if kind == 'int8' else 4)*2**bits
    words = torch.randint(0, 256, (T, B, n), dtype=torch.uint8, device=DEVICE)
    if kind == 'int8':
        codes = torch.randint(-127, 128, (T, B, table), device=DEVICE).to(torch.int8).view(torch.uint8)
        scales = (torch.rand(T, B, 16, device=DEVICE)*2e-2/i**.5 + 1e-4).half().view(torch.uint8)
        return layout.PackedMatrix(torch.cat([words, codes, scales], -1), torch.empty(0, device=DEVICE), shape, (bo, bi), bits, kind)
    codes = (torch.randn(T, B, table, device=DEVICE)*60).to(torch.float8_e4m3fn).view(torch.uint8)
    return layout.PackedMatrix(torch.cat([words, codes], -1), torch.empty(0, device=DEVICE), shape, (bo, bi), bits, kind, 1/60/i**.5)

def library_for_80(bits, kind):
    "The kernels for GPUs before Hopper, as PTX, which later ones compile for themselves; in a rehearsal for this CPU."
    if REHEARSE: return _on_cpu(bits, kind, '-DARCH=80')
    flags = [f.replace('code=sm_80', 'code=compute_80') for f in cuda.nvcc_flags((8, 0))]
    return ctypes.CDLL(str(cuda.build(bits, kind, [cuda.find_nvcc(), *flags])))

def activations(M, i, dtype=torch.float16): return torch.randn(M, i, device=DEVICE).to(dtype)

def exact_part(x, p):
    "The product in float64, of the last 16 tokens."
    return x[-16:].double() @ layout.dequantize(p).double().T

def error(y, exact):
    "Relative error of a product whose last tokens should be `exact`."
    return ((y[-16:].double() - exact).norm()/exact.norm()).item()

def graph_ms(step, reps=30, warm=3):
    "Median milliseconds of `step` as one CUDA graph; on a CPU, of plain calls."
    if REHEARSE: return _plain_ms(step)
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s): step()
    torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): step()
    for _ in range(warm): g.replay()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(reps)]
    for a, b in events: a.record(); g.replay(); b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in events)[reps//2]

def _plain_ms(step):
    start = time.perf_counter(); step()
    return 1000*(time.perf_counter() - start)

def copy_bandwidth():
    "Bytes a second of a large device-to-device copy, read and written."
    n = 1 << (16 if REHEARSE else 28)
    a = torch.randn(n, device=DEVICE); b = torch.empty_like(a)
    return 8*n/graph_ms(lambda: b.copy_(a), reps=10)*1e3

class Clock:
    "How much of a time budget is left."
    def __init__(self, minutes): self.end = time.time() + 60*minutes
    @property
    def left(self): return self.end - time.time()

def run_stages(script, stages, clock, args):
    "Run each stage in a process of its own, until the time is up; a stage that dies takes nothing with it. Stages: (name, seconds to leave for later ones)."
    for name, leave in stages:
        limit = clock.left - leave
        if limit < 5: say(f'== {name}: skipped, no time left'); continue
        start = time.time()
        try: code = subprocess.run([sys.executable, script, '--stage', name, '--seconds', str(round(limit)), *args], timeout=limit + 15).returncode
        except subprocess.TimeoutExpired: code = 'killed at its limit'
        say(f'== {name}: {"done" if code == 0 else f"FAILED ({code})"} in {time.time() - start:.0f} s')

def build_libraries(which):
    "Compile the CUDA kernels of several geometries side by side."
    nvcc = cuda.find_nvcc()
    if REHEARSE or not nvcc: return say(f'CUDA kernels: {"not in a rehearsal" if REHEARSE else "no nvcc found"}')
    start = time.time()
    code = 'import sys, torch; from nativebit.kernels import cuda; print(cuda.build(int(sys.argv[1]), sys.argv[2], [cuda.find_nvcc(), *cuda.nvcc_flags(torch.cuda.get_device_capability())]))'
    jobs = [subprocess.Popen([sys.executable, '-c', code, str(bits), kind], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for bits, kind in which]
    for (bits, kind), job in zip(which, jobs):
        out, _ = job.communicate()
        say(f'built {kind} {bits}:', out.strip().splitlines()[-1][-160:] if job.returncode == 0 else 'FAILED ' + out[-1500:])
    say(f'building took {time.time() - start:.0f} s')
