"""Linear layers of the 2.2B network, packed, beside bfloat16 and four-bit peers: fresh weights for every layer, one CUDA graph, medians.

    python kernels/bench.py --minutes 4     writes data/results/decode.jsonl
    python kernels/bench.py --rehearse      a CPU, tiny shapes, Triton's interpreter
"""
import argparse, datetime, math, os, sys
from pathlib import Path
from common import DEVICE, GEOMETRIES, LAYERS, REHEARSE, ROOT, SHAPES, Clock, activations, build_libraries, copy_bandwidth, error, exact_part, graph_ms, random_packed, say, write
import torch
from nativebit.kernels import ops
from nativebit.utils.files import git_hash

TOKENS = (1, 2, 4, 8, 16, 64, 512, 2048)
WEIGHTS = LAYERS*sum(math.prod(s) for s in SHAPES)

class Bench:
    "Collects rows; every number is in the file as soon as it is known."
    def __init__(self, path, clock, tokens, shapes): self.path, self.clock, self.tokens, self.each, self.bf16 = path, clock, tokens, shapes, {}

    def row(self, kernel, M, ms, size, weights=WEIGHTS, shape=None, **more):
        base = self.bf16.setdefault((M, shape), ms)              # the first kernel is cuBLAS
        r = dict(kernel=kernel, M=M, bits_per_weight=round(8*size/weights, 4), ms=round(ms, 5), bytes=size, bandwidth_fraction=round(size/ms*1e3/self.bandwidth, 4),
                 ratio_to_bf16=round(base/ms, 3), **(dict(shape=list(shape)) if shape else {}), **more)
        write(self.path, r)
        if not shape: say(f"{kernel:34} M={M:<5} {ms:9.4f} ms {r['bits_per_weight']:6.3f} bits {r['bandwidth_fraction']:6.2f} of copy {r['ratio_to_bf16']:6.2f}x" + ''.join(f' {k} {v}' for k,v in more.items()))

    def kernel(self, name, make, call, size, tokens=None, dtype=torch.float16, check=None):
        "Time a kind of matrix: `make(shape)` → weight, `call(x, weight)` → y, `size(weight)` → bytes."
        try: layers = [[make(s) for s in SHAPES] for _ in range(LAYERS)]
        except Exception as e: return say(f'{name}: skipped, {str(e).splitlines()[0][:160] if str(e) else type(e).__name__}')
        total = sum(size(w) for layer in layers for w in layer)
        for M in tokens or self.tokens:
            if self.clock.left < 3: return say(f'{name} M={M}: skipped, no time left')
            if M not in self.tokens: continue
            try: self._tokens(name, layers, call, size, total, M, dtype, check)
            except Exception as e:
                say(f'{name} M={M}: skipped, {str(e).splitlines()[0][:160] if str(e) else type(e).__name__}')
                if 'illegal' in str(e): raise

    def _tokens(self, name, layers, call, size, total, M, dtype, check):
        xs = {s[1]: activations(M, s[1], dtype) for s in SHAPES}
        more = {}
        if check: more['error'] = float(f'{max(error(call(xs[s[1]], w), exact_part(xs[s[1]], w)) for s, w in zip(SHAPES, layers[0])):.2e}')
        reps = 60 if M <= 16 else 20
        self.row(name, M, graph_ms(lambda: [call(xs[s[1]], w) for layer in layers for s, w in zip(SHAPES, layer)], reps=reps), total, **more)
        if not self.each: return
        for i, s in enumerate(SHAPES):
            ms = graph_ms(lambda: [call(xs[s[1]], layer[i]) for layer in layers], reps=20)
            self.row(name, M, ms/LAYERS, size(layers[0][i]), math.prod(s), tuple(s))

def bf16(b):
    b.kernel('cuBLAS bf16', lambda s: torch.randn(s, device=DEVICE).to(torch.bfloat16), torch.nn.functional.linear, lambda w: w.nbytes, dtype=torch.bfloat16)

def ours(b, geometry, act='float', dtype=torch.float16, tokens=None, note='', run=None):
    bits, kind = GEOMETRIES[geometry]
    if REHEARSE and not run: run = lambda x, p: ops.run_config(x, p, ops.default_config(p.shape, len(x), True, act))   # the CUDA source, on the CPU
    b.kernel(f'nativebit {geometry}{note}', lambda s: random_packed(s, bits, kind), run or (lambda x, p: ops.lut_linear(x, p, act)), lambda p: p.nbytes, tokens, dtype, check=True)

def triton_only(x, p): return ops.run_config(x, p, TRITON.get((p.shape, len(x))) or ops.default_config(p.shape, len(x), False))

def int4(b):
    def make(s):
        q = torch.randint(0, 256, (s[0], s[1]//2), device=DEVICE, dtype=torch.uint8)
        return torch.ops.aten._convert_weight_to_int4pack(q, 8), torch.randn(s[1]//128, s[0], 2, device=DEVICE, dtype=torch.bfloat16)
    b.kernel('PyTorch int4, 128 a group', make, lambda x, w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]), lambda w: w[0].nbytes + w[1].nbytes,
             dtype=torch.bfloat16)

def nf4(b):
    try: import bitsandbytes.functional as F
    except Exception as e: return say(f'bitsandbytes NF4: skipped, not importable ({type(e).__name__})')
    def make(s): return F.quantize_4bit(torch.randn(s, device=DEVICE, dtype=torch.bfloat16), quant_type='nf4', blocksize=64)
    b.kernel('bitsandbytes NF4, 64 a block', make, lambda x, w: F.gemv_4bit(x.view(1, 1, -1), w[0].t(), state=w[1]), lambda w: w[0].nbytes + w[1].absmax.nbytes, tokens=[1], dtype=torch.bfloat16)

def header(bandwidth, program='bench'):
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU, rehearsal'
    from importlib.metadata import version
    return dict(type='header', command=' '.join(['python', f'kernels/{program}.py', *sys.argv[1:]]), device=name, torch=torch.__version__, triton=version('triton'), date=str(datetime.date.today()),
                git_hash=os.environ.get('NATIVEBIT_GIT_HASH') or git_hash(), copy_bandwidth=bandwidth, layers=LAYERS, shapes=[list(s) for s in SHAPES])

TRITON = {}   # (shape, M) → the fastest Triton configuration, from --triton

def read_triton(path):
    "The fastest Triton configuration of each shape in a tune.jsonl."
    import json
    best = {}
    for r in map(json.loads, Path(path).read_text().splitlines()):
        if 'ms' not in r or 'shape' not in r or r['geometry'] != 'int8' or r['backend'] not in ops.BACKENDS: continue
        key = tuple(r['shape']), r['M']
        if r['ms'] < best.get(key, (1e9,))[0]: best[key] = r['ms'], {k: v for k,v in r.items() if k not in ('shape', 'geometry', 'M', 'ms', 'error', 'gb_s')}
    TRITON.update({k: v[1] for k,v in best.items()})

def run(b):
    b.bandwidth = copy_bandwidth()
    write(b.path, header(b.bandwidth)); say(f'copy bandwidth {b.bandwidth/1e9:.0f} GB/s')
    bf16(b)
    ours(b, 'int8'); ours(b, 'lut-b')
    int4(b); nf4(b)
    ours(b, 'int8', 'int8', tokens=[1, 2, 4, 8, 16], note=', int8 activations')
    ours(b, 'int8', dtype=torch.bfloat16, note=', bf16 activations')
    ours(b, '2bit', tokens=[1, 16, 64, 512]); ours(b, '4bit', tokens=[1, 16, 64, 512])
    ours(b, 'int8', tokens=[1, 16, 64, 512, 2048], note=', Triton', run=triton_only)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--minutes', type=float, default=4, help='time budget')
    ap.add_argument('--out', default=str(ROOT/'data'/'results'/'decode.jsonl'), help='where the rows go')
    ap.add_argument('--tokens', default=','.join(map(str, TOKENS)), help='numbers of tokens')
    ap.add_argument('--triton', default=str(ROOT/'data'/'results'/'decode_round1.jsonl'), help='timings to take Triton configurations from')
    ap.add_argument('--no-shapes', action='store_true', help='only whole stacks')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    a = ap.parse_args()
    if not REHEARSE and not torch.cuda.is_available(): sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
    out = Path(ROOT/'logs'/'decode_rehearsal.jsonl' if REHEARSE else a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(f'.{out.name}.tmp'); tmp.unlink(missing_ok=True)
    build_libraries(list(GEOMETRIES.values()))
    if Path(a.triton).exists() and not REHEARSE: read_triton(a.triton)
    tokens = [1, 3, 70] if REHEARSE else [int(t) for t in a.tokens.split(',')]
    try:
        with torch.inference_mode(): run(Bench(tmp, Clock(a.minutes), tokens, not a.no_shapes))
    finally:
        if tmp.exists(): os.replace(tmp, out); say(f'wrote {out}')

if __name__ == '__main__': main()
