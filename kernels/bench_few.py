"""Linear layers of the 2.2B network for 2 to 64 tokens: cuBLAS bf16, what there was before `few`, and `few`; fresh weights for every layer, one CUDA graph a case, medians.

    python kernels/bench_few.py --minutes 1.5     writes data/results/few.jsonl, what is most wanted first
    python kernels/bench_few.py --rehearse        a CPU, tiny shapes, the CUDA source lane by lane
"""
import argparse, sys
from pathlib import Path
from common import DEVICE, GEOMETRIES, LAYERS, REHEARSE, ROOT, SHAPES, Clock, activations, build_libraries, copy_bandwidth, error, exact_part, graph_ms, random_packed, say, write
import torch
from nativebit.kernels import ops
from bench import header
from tune import few_configs

TOKENS = (16, 8, 64, 2, 32) if not REHEARSE else (3, 33)
OTHERWISE = {'one launch after the other': dict(overlap=0), 'no products': dict(flags=1), 'no activations': dict(flags=4), 'neither': dict(flags=5), 'neither, no waiting': dict(flags=7),
            'activations read by two blocks together': dict(share=2), 'by four': dict(share=4), 'activations copied by threads': dict(copied=1), '64 KB of activations ahead': dict(ahead=64), 'all shared memory': dict(kb=None)}

def before(p, M):
    "What a product took before `few`: what was tuned, or the default."
    key = ops.config_key(p.shape, p.bits, p.kind, M if M <= 16 else 64)
    for name in () if REHEARSE else (torch.cuda.get_device_name(), 'h100'):   # an H200 computes like an H100
        if ops.tuned(name).get(key, {}).get('backend') in ('decode', 'prefill'): return ops.tuned(name)[key]
    if M > 16: return dict(backend='prefill', bm=64 if REHEARSE else ops.prefill_bm(p.shape, M))
    return dict(ops.default_config(p.shape, M, True, 'int8', p.bits), activations='float')

def changed(c, change):
    "A configuration with something else; a cluster has 8 blocks at most."
    return {**c, **change, **(dict(share=min(change['share'], 8//c['ranks'])) if 'share' in change else {})}

class Bench:
    "Cases of one set of weights at a time; a row is in the file as soon as it is known."
    def __init__(self, path, clock): self.path, self.clock, self.bf16, self.best = path, clock, {}, {}

    def row(self, kernel, geometry, M, ms, **more):
        self.bf16.setdefault(M, ms)                              # cuBLAS is first
        r = dict(kernel=kernel, geometry=geometry, M=M, ms=round(ms, 5), ratio_to_bf16=round(self.bf16[M]/ms, 3), **more)
        write(self.path, r)
        say(f'{geometry:6} M={M:<3} {kernel:34} {ms:8.4f} ms {r["ratio_to_bf16"]:6.2f}x', *(f'{k} {v}' for k,v in more.items() if k != 'configs'))

    def stack(self, layers, M, cfgs, reps=30):
        xs = {s[1]: activations(M, s[1]) for s in SHAPES}
        return graph_ms(lambda: [ops.run_config(xs[p.shape[1]], p, c) for layer in layers for p, c in zip(layer, cfgs)], reps=reps)

    def fastest(self, layers, i, M, geometry, most=8):
        "Of the likely configurations of a shape, alone."
        x, times = activations(M, SHAPES[i][1]), []
        for c in few_configs(SHAPES[i], M, geometry, most if not REHEARSE else 1):
            try: ms = graph_ms(lambda: [ops.run_config(x, layer[i], c) for layer in layers], reps=7)/len(layers)
            except RuntimeError as e: write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, failed=str(e)[:200])); continue
            write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, ms=ms)); times.append((ms, len(times), c))
        return min(times)[2]

    def checked(self, layers, M, cfgs, dtype=torch.float16):
        "The largest relative error of the four shapes, and whether every replay of a graph gave the same bits."
        xs = [activations(M, s[1], dtype) for s in SHAPES]
        few = layers[:3] if not REHEARSE else layers[:1]
        run = lambda: [ops.run_config(x, p, c) for layer in few for x, p, c in zip(xs, layer, cfgs)]
        want = run()
        e = max(error(y, exact_part(x, p)) for y, x, p in zip(want, xs, few[0]))
        differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
        def again():
            for y, w in zip(run(), want): differ.add_((y != w).sum())
        graph_ms(again, reps=1000)
        return dict(error=float(f'{e:.2e}'), same_bits=int(differ) == 0, finite=all(bool(y.isfinite().all()) for y in want))

    def case(self, layers, geometry, M):
        packed = layers[0]
        def one(name, cfgs, check=True, **more):
            try: self.row(name, geometry, M, self.stack(layers, M, cfgs), **(self.checked(layers, M, cfgs) if check else {}), **more)
            except RuntimeError as e:
                say(f'{geometry} M={M} {name}: FAILED {str(e)[:200]}'); write(self.path, dict(kernel=name, geometry=geometry, M=M, failed=str(e)[:300]))
                if 'illegal' in str(e): raise
        gpu = ops.Gpu(80, 3, 101376) if REHEARSE else ops.this_gpu()
        first = [ops.few_configs(p.shape, M, p.bits, gpu)[0] for p in packed]
        one('before', [before(p, M) for p in packed])
        one('few, default', first, configs=first)
        tuned = [self.fastest(layers, i, M, geometry) for i in range(len(SHAPES))]
        one('few, tuned', tuned, configs=tuned)
        if geometry != 'int8' or M not in (TOKENS[0], 64): return
        for name, change in OTHERWISE.items(): one(f'few, {name}', [changed(c, change) for c in first], check=False)
        self.row('few, bf16 activations', geometry, M, self.bfloats(layers, M, tuned), **self.checked(layers, M, tuned, torch.bfloat16))

    def bfloats(self, layers, M, cfgs):
        xs = {s[1]: activations(M, s[1], torch.bfloat16) for s in SHAPES}
        return graph_ms(lambda: [ops.run_config(xs[p.shape[1]], p, c) for layer in layers for p, c in zip(layer, cfgs)])

    def cublas(self):
        w = [[torch.randn(s, device=DEVICE).to(torch.bfloat16) for s in SHAPES] for _ in range(LAYERS)]
        for M in TOKENS:
            xs = {s[1]: activations(M, s[1], torch.bfloat16) for s in SHAPES}
            self.row('cuBLAS bf16', 'bf16', M, graph_ms(lambda: [torch.nn.functional.linear(xs[m.shape[1]], m) for layer in w for m in layer]))

def run(b):
    b.cublas()
    weights = {g: [[random_packed(s, *GEOMETRIES[g]) for s in SHAPES] for _ in range(LAYERS)] for g in GEOMETRIES if not REHEARSE or g in ('int8', 'lut-b')}
    for M in TOKENS:
        for geometry, layers in weights.items():
            if b.clock.left < 3: return say(f'{geometry} M={M}: skipped, no time left')
            b.case(layers, geometry, M)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--minutes', type=float, default=1.5, help='time budget, without compiling')
    ap.add_argument('--out', default=str(ROOT/'data'/'results'/'few.jsonl'), help='where the rows go')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    a = ap.parse_args()
    if not REHEARSE and not torch.cuda.is_available(): sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
    out = Path(ROOT/'logs'/'few_rehearsal.jsonl' if REHEARSE else a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    build_libraries(list(GEOMETRIES.values()))
    clock = Clock(a.minutes)
    with torch.inference_mode():
        write(out, dict(header(copy_bandwidth()), command=' '.join(['python', 'kernels/bench_few.py', *sys.argv[1:]])))
        run(Bench(out, clock))
    say(f'wrote {out}')

if __name__ == '__main__': main()
