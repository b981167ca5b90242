"""Search kernel configurations on this GPU and keep the fastest of each shape.

    python kernels/tune.py --minutes 4 --out DIR      every timing goes to DIR/tune.jsonl, the table to nativebit/kernels/configs/<gpu>.json
    python kernels/tune.py --rehearse                 a CPU, tiny shapes, Triton's interpreter
"""
import argparse, itertools, json, shutil, sys
from common import DEVICE, GEOMETRIES, LAYERS, REHEARSE, ROOT, SHAPES, Clock, activations, build_libraries, copy_bandwidth, error, exact_part, graph_ms, random_packed, run_stages, say, write
import torch
from nativebit.utils.files import atomic_path
from nativebit.kernels import cuda, ops
from nativebit.kernels.decode_layer import layer_products

LIMIT = 2e-3    # relative error a configuration may have; int8 activations: 1.5e-2

def decode_cost(tiles, blocks, M, c):
    "A guess at the cycles of a product: the lookups of the busiest processor, or the wait for one after the other, and what a cluster's exchange costs."
    n, nk, per = -(-tiles//c['clusters']), -(-blocks//c['ranks']), -(-c['clusters']*c['ranks']//132)
    units = -(--(-n//c['wide'])//c['tj'])*c['tj'] * -(-nk//c['deep'])
    return per*max(units*c['wide']*c['deep']/4*(96 if M <= 8 else 150), units*(260 if c['tj'] == 1 else 170)) + (600 if c['ranks'] > 1 else 0) + 40*c['deep']*M**.5

def decode_configs(shape, M, act='float', most=28):
    "CUDA decode configurations worth a try: likely ones first, of each number of ranks."
    tiles, blocks, out = -(-shape[0]//16), -(-shape[1]//128), {}
    if REHEARSE: return [dict(backend='decode', activations=act, clusters=2, ranks=r, wide=1, deep=2, tj=1) for r in (1, 2)]
    for ranks, waves, wide, deep, tj in itertools.product((1, 2, 4), (1, 2), range(1, 17), (1, 2, 3, 4, 5, 7, 10, 14, 16), (1, 2)):
        c = dict(backend='decode', activations=act, clusters=132*waves//ranks, ranks=ranks, wide=wide, deep=deep, tj=tj)
        n = -(-tiles//c['clusters'])
        if not 5 <= wide*deep <= 16 or wide > n or deep > blocks//ranks or tj > tiles//c['clusters'] or (M > 8 and deep > 5): continue
        out.setdefault((ranks, waves), []).append((decode_cost(tiles, blocks, M, c), c))
    return [c for q in out.values() for _, c in sorted(q, key=lambda t: t[0])[:most//len(out)]]

def few_configs(shape, M, geometry, most=24):
    "Configurations of `few` worth a try: likely ones first, at most two of each number of ranks and tiles, and of the likeliest with all the shared memory, or more activations ahead."
    gpu, out, seen = ops.Gpu(90, 3, 101376) if REHEARSE else ops.this_gpu(), [], {}
    for c in ops.few_configs(tuple(shape), M, GEOMETRIES[geometry][0], gpu):
        key = c['ranks'], -(-shape[0]//16//c['groups'])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 2: continue
        others = [dict(c, kb=gpu.shared//1024)]*(c['kb'] < gpu.shared//1024) + [dict(c, ahead=64)]
        out += [c, *(others if gpu.arch >= 90 else others[-1:])[:max(0, 5 - len(out)//2)]]   # of the likeliest all variants, of others fewer
        if len(out) >= most: break
    return out[:most]

def prefill_configs(shape, M, most=3):
    "Tiles that share the work out best, each in several ways (`How` of lut.cu)."
    if REHEARSE: return [dict(backend='prefill', bm=64, how=how) for how in (0, 1)]
    out = []
    for how in range(4):
        bms = sorted((256,) if how & 2 else (b for b in (64, 88, 96, 128, 160, 192, 256) if b < 2*M and b*16 >= M), key=lambda bm: ops.prefill_cost(shape, M, bm, how))
        out += [dict(backend='prefill', bm=bm, how=how) for bm in bms[:most]]
    return out

def triton_configs(M):
    "Triton configurations worth a try."
    if M <= 4: yield from (dict(backend='triton_decode', blocks=b, warps=w, overlap=o) for b, w in ((8, 8), (4, 4), (16, 8), (8, 4), (16, 16)) for o in (True, False))
    if 4 <= M <= 64: yield from (dict(backend='triton_matmul', bm=16*-(-M//16), bn=bn, warps=w, stages=s) for bn, w, s in ((64, 4, 3), (32, 4, 4), (64, 8, 3)))
    if M > 64: yield dict(backend='dequantized')

class Tuner:
    "Times configurations of one matrix shape: fresh weights for every layer, one graph."
    def __init__(self, out, clock): self.out, self.clock, self.best, self.tried = out, clock, {}, {}

    def shape(self, shape, geometry, M, configs, layers=None):
        "Time `configs`; the fastest that is right is kept."
        bits, kind = GEOMETRIES[geometry]
        n = layers or LAYERS*(2 if shape[0]*shape[1] < 1e7 else 1)
        matrices, x = [random_packed(shape, bits, kind) for _ in range(n)], activations(M, shape[1])
        exact = exact_part(x, matrices[0])
        for cfg in configs:
            if self.clock.left < 0: return say('   time is up')
            self.one(matrices, x, exact, shape, geometry, M, cfg)

    def one(self, matrices, x, exact, shape, geometry, M, cfg):
        int8 = cfg.get('activations') == 'int8'
        record = dict(shape=list(shape), geometry=geometry, M=M, **cfg)
        try:
            y = ops.run_config(x, matrices[0], cfg)
            e = error(y, exact)
            if not e < (1.5e-2 if int8 else LIMIT): raise RuntimeError(f'wrong: relative error {e:.2e}')
            ms = graph_ms(lambda: [ops.run_config(x, p, cfg) for p in matrices], reps=15)/len(matrices)
        except Exception as err:
            write(self.out, dict(record, failed=str(err)[:300]))
            if 'CUDA error' in str(err) and 'illegal' in str(err).lower(): raise
            return say(f'   {geometry} M={M} {shape} {cfg}: SKIPPED, {str(err).splitlines()[0][:160] if str(err) else type(err).__name__}')
        write(self.out, dict(record, ms=ms, error=e, gb_s=matrices[0].nbytes/ms/1e6))
        key = (tuple(shape), geometry, M, 'int8' if int8 else 'float', cfg['backend'])
        self.tried.setdefault(key, []).append((ms, cfg, e, matrices[0].nbytes))
        self.best[key] = min(self.tried[key], key=lambda t: t[0])

    def report(self):
        for (shape, geometry, M, act, backend), (ms, cfg, e, size) in self.best.items():
            say(f'   {geometry:6} M={M:<5} {str(shape):14} {act:5} {ms*1e3:8.2f} us {size/ms/1e6:6.0f} GB/s err {e:.1e} {cfg}')

    def layers(self, geometry):
        "Weights and inputs of the whole stack."
        bits, kind = GEOMETRIES[geometry]
        return [[random_packed(s, bits, kind) for s in SHAPES] for _ in range(LAYERS)]

    def stack_ms(self, layers, M, cfgs, reps=15):
        xs = {s[1]: activations(M, s[1]) for s in SHAPES}
        return graph_ms(lambda: [ops.run_config(xs[p.shape[1]], p, cfg) for layer in layers for p, cfg in zip(layer, cfgs)], reps=reps)

    def stack(self, geometry, M, wanted='decode', act='float', changes=(), others=0):
        "The whole stack with the best of each shape; then with each of the `others` next ones, one shape at a time; then `changes` of the winner."
        keys = [(tuple(s), geometry, M, act, wanted) for s in SHAPES]
        if any(k not in self.best for k in keys): return say(f'   stack {geometry} M={M}: a shape has no configuration')
        layers, cfgs = self.layers(geometry), [self.best[k][1] for k in keys]
        size, ms = sum(p.nbytes for layer in layers for p in layer), self.stack_ms(layers, M, cfgs, 30)
        say(f'   STACK {geometry} M={M} {wanted} {act}: {ms:.4f} ms, {size/ms/1e6:.0f} GB/s')
        for i, k in enumerate(keys if others else ()):
            for _, cfg, *_ in sorted(self.tried[k], key=lambda t: t[0])[1:others + 1]:
                new = self.stack_ms(layers, M, [*cfgs[:i], cfg, *cfgs[i+1:]])
                if new < ms*.995: ms, cfgs = new, [*cfgs[:i], cfg, *cfgs[i+1:]]
        if others: ms = self.stack_ms(layers, M, cfgs, 30); say(f'   STACK {geometry} M={M} {wanted} {act}, refined: {ms:.4f} ms, {size/ms/1e6:.0f} GB/s {cfgs}')
        for k, cfg in zip(keys, cfgs): write(self.out, dict(shape=list(k[0]), geometry=geometry, M=M, **cfg, ms=next(t[0] for t in self.tried[k] if t[1] == cfg), chosen=True))
        write(self.out, dict(stack=geometry, M=M, backend=wanted, act=act, ms=ms, bytes=size))
        for change in changes:
            ms = self.stack_ms(layers, M, [dict(c, **change) for c in cfgs])
            write(self.out, dict(stack=geometry, M=M, backend=wanted, act=act, change=change, ms=ms, bytes=size)); say(f'   STACK {geometry} M={M} {change}: {ms:.4f} ms, {size/ms/1e6:.0f} GB/s')

def bf16_stack(out, M):
    "cuBLAS in bfloat16, for the ratio."
    xs = {s[1]: activations(M, s[1], torch.bfloat16) for s in SHAPES}
    w = [[torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in SHAPES] for _ in range(LAYERS)]
    ms = graph_ms(lambda: [torch.nn.functional.linear(xs[m.shape[1]], m) for layer in w for m in layer], reps=15)
    per = {str(s): graph_ms(lambda: [torch.nn.functional.linear(xs[s[1]], layer[i]) for layer in w], reps=10)/LAYERS for i, s in enumerate(SHAPES)}
    write(out, dict(stack='bf16', M=M, ms=ms, per_shape=per)); say(f'   STACK cuBLAS bf16 M={M}: {ms:.4f} ms; ' + ', '.join(f'{k} {v*1e3:.1f} us' for k,v in per.items()))

def small(shape, M, cfg):
    "The same, small enough for a rehearsal."
    if 'bm' in cfg: return (131, 256), 70, dict(cfg, bm=64)
    if cfg.get('backend') == 'few': return (shape[0] % 2560 or 256, 256), M, dict(cfg, groups=None, ranks=1, wide=8, deep=1, tj=2)
    return (48 + shape[0] % 2560, 256 + shape[1] % 2560), M, dict(cfg, clusters=2, ranks=min(cfg.get('ranks', 2), 2), wide=1, deep=min(cfg.get('deep', 1), 2), tj=1)

def stage_smoke(t):
    "Every CUDA kernel once, small: which are right at all?"
    stage_chain(t)
    for geometry, (bits, kind) in GEOMETRIES.items():
        for shape, M, cfg in [((2560, 2560), 1, {}), ((2568, 2600), 3, dict(clusters=132, ranks=1, wide=2, deep=5)), ((2560, 2560), 16, dict(clusters=33, ranks=4, wide=4, tj=2)),
                              ((2560, 2560), 1, dict(clusters=33, ranks=4, wide=5, deep=3)), ((2568, 2600), 9, dict(clusters=66, ranks=2, wide=3, deep=2, overlap=0)),
                              ((2568, 2600), 16, dict(backend='few', ranks=2, wide=4, deep=2, tj=1)), ((2561, 2560), 7, dict(backend='few', wide=4, deep=3, tj=1)), ((2560, 6912), 33, dict(backend='few', wide=4, deep=2, kb=113)), ((2560, 2560), 7, dict(activations='int8')),
                              ((2568, 2600), 70, dict(bm=64)), ((2561, 2560), 300, dict(bm=96)), ((2560, 2560), 300, dict(bm=128)), ((2560, 2560), 600, dict(bm=160)), ((2568, 2560), 600, dict(bm=192)), ((2560, 2560), 600, dict(bm=256)), ((2568, 2600), 300, dict(bm=88, how=1)), ((2560, 2560), 600, dict(bm=192, how=1)), ((9000, 648), 600, dict(bm=256, how=3))]:
            if kind != 'int8' and 'activations' in cfg: continue
            if REHEARSE and (cfg.get('bm', 0) > 64 or geometry == '4bit'): continue
            if REHEARSE: shape, M, cfg = small(shape, M, cfg)
            backend, p = cfg.get('backend') or ('prefill' if 'bm' in cfg else 'decode'), random_packed(shape, bits, kind)
            for dtype in (torch.float16, torch.bfloat16)[:1 if REHEARSE else 2]:
                x = activations(M, shape[1], dtype)
                try: y = ops.run_config(x, p, dict(cfg, backend=backend)); e = error(y, exact_part(x, p)); again = torch.equal(y, ops.run_config(x, p, dict(cfg, backend=backend)))
                except Exception as err: say(f'   {geometry} {shape} M={M} {cfg} {dtype}: FAILED {str(err)[:200]}'); write(t.out, dict(smoke=geometry, M=M, **cfg, failed=str(err)[:300])); continue
                ok = e < (1.5e-2 if 'activations' in cfg else 2.2e-3) and again
                write(t.out, dict(smoke=geometry, M=M, **cfg, dtype=str(dtype), error=e, same_twice=again))
                say(f'   {"ok   " if ok else "WRONG"} {geometry:6} {shape} M={M:<3} {backend} {cfg} {str(dtype)[6:]}: error {e:.1e}{"" if again else ", differs between runs"}')

def stage_chain(t, n=12):
    "Products that feed each other, in one graph, must be the same bits with and without overlapping launches."
    d, n = (256, 2) if REHEARSE else (2560, n)
    layers = [random_packed((d, d), 3, 'int8') for _ in range(n)]
    for M, cfg in ((1, dict(backend='decode', clusters=132, ranks=1, wide=1, deep=8)), (1, dict(backend='decode', clusters=33, ranks=4)), (16, dict(backend='decode', wide=4)),
                   (16, dict(backend='few', groups=40, wide=4, deep=3, tj=1)), (64, dict(backend='few', groups=32, ranks=4, wide=8, deep=1, tj=1)), (300, dict(backend='prefill', bm=128 if not REHEARSE else 64)), (300, dict(backend='prefill', bm=96 if not REHEARSE else 64, how=1))):
        if REHEARSE: _, M, cfg = small((d, d), M, cfg)
        x = activations(M, d)
        def chain(overlap):
            y = x
            for p in layers: y = ops.run_config(y, p, dict(cfg, overlap=overlap))/32
            z = x
            for p in layers: z = ops.run_config(z, p, dict(cfg, overlap=overlap))
            return y, z
        try:
            want, same = chain(0), True
            for _ in range(1 if REHEARSE else 20): same &= all(torch.equal(a, b) for a, b in zip(chain(1), want))
            say(f'   {"ok   " if same else "RACE "} chain of {n}, M={M} {cfg}'); write(t.out, dict(chain=n, M=M, **cfg, same=bool(same)))
        except Exception as err: say(f'   chain M={M} {cfg}: FAILED {str(err)[:200]}')

ABLATIONS = (dict(overlap=0), dict(flags=1), dict(flags=3))   # one launch after the other; no products; no products and no waiting

def stage_decode(t, geometry='int8', Ms=(1, 16), act='float', full=True):
    for M in Ms:
        for s in SHAPES: t.shape(s, geometry, M, decode_configs(s, M, act, 160 if full else 40))
        t.stack(geometry, M, act=act, changes=ABLATIONS if full else (), others=4 if full else 1)

def stage_floor(t, n=104):
    "What a launch costs that has next to nothing to do: a block of columns a processor, each kernel waiting for the one before it."
    for shape, cfg in (((2112, 128), dict(clusters=132, ranks=1, wide=1)), ((528, 512), dict(clusters=33, ranks=4, wide=1))):
        if REHEARSE: (_, _, cfg), shape, n = small(shape, 1, cfg), (64, 512), 2
        matrices, x = [random_packed(shape, 3, 'int8') for _ in range(n)], activations(1, shape[1])
        for change in (dict(), dict(overlap=0), dict(flags=1), dict(flags=3)):
            ms = graph_ms(lambda: [ops.run_config(x, p, dict(cfg, backend='decode', **change)) for p in matrices])
            write(t.out, dict(floor=list(shape), **cfg, change=change, us=1e3*ms/n)); say(f'   FLOOR {shape} {cfg} {change}: {1e3*ms/n:.2f} us a launch')

def stage_layer(t, geometry='int8', context=512, others=5):
    "Whole layers of one token, attention over `context` others included: what was best alone, then each of the next ones in its place."
    bits, kind = GEOMETRIES[geometry]
    D, F, N, H = (256, 384, 2, 128) if REHEARSE else (2560, 6912, 20, 128)
    shapes, lib = [(3*D, D), (D, D), (2*F, D), (D, F)], cuda.library(bits, kind)
    tried = [sorted(t.tried.get((s, geometry, 1, 'float', 'decode'), [(0., ops.default_decode(s, 1), 0, 0)]), key=lambda c: c[0])[:others+1] for s in shapes]
    half = lambda *size: torch.randn(*size, device=DEVICE).half()
    layers = [([random_packed(s, bits, kind) for s in shapes], [half(D), half(D)], half(2, context + 8, N, H)) for _ in range(LAYERS)]
    cos, sin, at, x = torch.ones(context + 8, H//2, device=DEVICE), torch.zeros(context + 8, H//2, device=DEVICE), torch.tensor([context], device=DEVICE), half(1, D)
    def run(cfgs, ranks):
        y = x
        for p, norms, (keys, values) in layers:
            product = lambda x, m, **kw: cuda.decode(x, m, lib=lib, **{k: v for k,v in cfgs[next(i for i in range(4) if p[i] is m)].items() if k != 'backend'}, **kw)
            y = layer_products(y, p, norms, [None]*4, [[]]*4, [[]]*4, lambda qkv: cuda.attend(qkv, cos, sin, keys, values, at, ranks=ranks, lib=lib), 1e-5, product)
    def timed(cfgs, ranks=8): return graph_ms(lambda: run(cfgs, ranks), reps=20)
    cfgs = [c[0][1] for c in tried]
    best = timed(cfgs); say(f'   LAYERS {geometry}: {best:.4f} ms')
    for ranks in (4, 2): say(f'   LAYERS {geometry}, {ranks} blocks a head: {timed(cfgs, ranks):.4f} ms')
    for i in range(4):
        for _, cfg, *_ in tried[i][1:]:
            if t.clock.left < 0: break
            new = timed([*cfgs[:i], cfg, *cfgs[i+1:]])
            if new < best*.998: best, cfgs = new, [*cfgs[:i], cfg, *cfgs[i+1:]]
    say(f'   LAYERS {geometry}, refined: {best:.4f} ms {cfgs}')
    for s, c, cfg in zip(shapes, tried, cfgs): write(t.out, dict(shape=list(s), geometry=geometry, M=1, **cfg, ms=next(m for m, k, *_ in c if k == cfg), chosen=2))
    write(t.out, dict(layers=geometry, context=context, ms=best))
    def products(): [[ops.run_config(half_x[m.shape[1]], m, c) for m, c in zip(p, cfgs)] for p, *_ in layers]
    half_x = {s[1]: half(1, s[1]) for s in shapes}
    alone = graph_ms(products, reps=20); write(t.out, dict(stack=geometry, M=1, backend='decode', act='float', change='configurations of whole layers', ms=alone)); say(f'   their products alone: {alone:.4f} ms')

def stage_few(t, Ms=(16, 8, 64, 4, 32, 2)):
    for M in Ms if not REHEARSE else (3, 33):
        for geometry in GEOMETRIES if not REHEARSE else ('int8',):
            if t.clock.left < 1: return say('   time is up')
            for s in SHAPES: t.shape(s, geometry, M, few_configs(s, M, geometry, 24 if not REHEARSE else 2), layers=LAYERS)
            t.stack(geometry, M, 'few', others=1, changes=ABLATIONS if (geometry, M) == ('int8', 16) else ())

def stage_prefill(t, Ms=(512, 2048)):
    for M in Ms:
        bf16_stack(t.out, M)
        for geometry in ('int8', 'lut-b'):
            for s in SHAPES: t.shape(s, geometry, M, prefill_configs(s, M), layers=2 if REHEARSE else 8)
            t.stack(geometry, M, 'prefill', others=2)

def stage_triton(t):
    for M in (1, 16, 512):
        for s in SHAPES: t.shape(s, 'int8', M, list(triton_configs(M)), layers=None if M < 512 else 2 if REHEARSE else 8)
        t.stack('int8', M, 'triton_decode' if M == 1 else 'triton_matmul' if M == 16 else 'dequantized')

def stage_rest(t):
    for geometry, M in (('int8', 2), ('int8', 4), ('int8', 8), ('2bit', 1), ('4bit', 1), ('lut-b', 2), ('lut-b', 4), ('lut-b', 8)): stage_decode(t, geometry, (M,), full=False)
    for s in SHAPES: t.shape(s, 'int8', 64, prefill_configs(s, 64), layers=8)

def stage_int(t): stage_decode(t, 'int8', (1, 16), 'int8', full=False)

def stage_bf16(t):
    say(f'   copy bandwidth {copy_bandwidth()/1e9:.0f} GB/s')
    for M in (1, 16): bf16_stack(t.out, M)

PARTS = dict(bf16=(stage_bf16, 20), floor=(stage_floor, 5), decode=(stage_decode, 70), layer=(stage_layer, 20), lutb=(lambda t: stage_decode(t, 'lut-b'), 45),
             layer_lutb=(lambda t: stage_layer(t, 'lut-b'), 20), prefill=(stage_prefill, 60), int=(stage_int, 15), few=(stage_few, 90), rest=(stage_rest, 30))

def stage_main(t):
    "Everything of CUDA, each part within its seconds."
    end = t.clock
    for name, (part, seconds) in PARTS.items():
        t.clock = Clock(min(seconds, end.left)/60); start = t.clock.left
        say(f'-- {name}')
        try: part(t)
        except Exception as e:
            say(f'-- {name} FAILED: {str(e)[:300]}')
            if 'CUDA error' in str(e): raise
        say(f'-- {name} took {start - t.clock.left:.0f} s')

def stage_profile(t):
    "A few products for a profiler to look at."
    for geometry, M, cfg in (('int8', 1, dict(backend='decode', clusters=33, ranks=4, wide=3, deep=5)), ('int8', 2048, dict(backend='prefill', bm=256))):
        bits, kind = GEOMETRIES[geometry]
        matrices, x = [random_packed(SHAPES[-2], bits, kind) for _ in range(4)], activations(M, SHAPES[-2][1])
        for _ in range(8):
            for p in matrices: ops.run_config(x, p, cfg)

STAGES = dict(smoke=stage_smoke, main=stage_main, few=stage_few, triton=stage_triton, profile=stage_profile)
LEAVE = dict(smoke=60, main=50, few=2, triton=2, profile=0)   # seconds each leaves for those behind it

def table(jsonl, device):
    "The fastest CUDA configuration of each shape, from all timings."
    best = {}
    for r in map(json.loads, jsonl.read_text().splitlines()):
        if 'shape' not in r or 'ms' not in r: continue
        bits, kind = GEOMETRIES[r['geometry']]
        key = ops.config_key(tuple(r['shape']), bits, kind, r['M'], r.get('activations', 'float'))
        cfg = {k: v for k,v in r.items() if k not in ('shape', 'geometry', 'M', 'error', 'gb_s', 'chosen')}
        ours, rank = cfg['backend'] in ('decode', 'few', 'prefill'), (int(r.get('chosen', 0)), -r['ms'])   # what was best in whole layers goes before what was best in the stack, and that before what was best alone
        if ours and rank > best.get(key, ((0, -1e9),))[0]: best[key] = rank, dict(cfg, ms=round(r['ms'], 5))
    return dict(device=device, torch=torch.__version__, configs={k: c for k, (_, c) in sorted(best.items())})

def keep(jsonl, name):
    "Write the table into the package, where `kernels/configs` points to."
    slug = next((w.lower() for w in name.split() if w[0] in 'HAB' and w[1:4].isdigit()), 'gpu')
    out = ROOT/'nativebit'/'kernels'/'configs'/f'{slug}.json'
    made, there = table(jsonl, name), json.loads(out.read_text())['configs'] if out.exists() else {}
    made['configs'] = {**there, **made['configs']}   # what was not timed now stays
    with atomic_path(out) as tmp: tmp.write_text(json.dumps(made, indent=0) + '\n')
    say(f'wrote {out.relative_to(ROOT)}')
    return out

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--minutes', type=float, default=4, help='time budget')
    ap.add_argument('--only', default='smoke,main,triton', help=f'stages, of {", ".join(STAGES)}')
    ap.add_argument('--out', default='logs/tune', help='folder of tune.jsonl')
    ap.add_argument('--merge', action='store_true', help='keep what tune.jsonl already holds')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    ap.add_argument('--stage', help=argparse.SUPPRESS); ap.add_argument('--seconds', type=float, help=argparse.SUPPRESS)
    a = ap.parse_args()
    out = ROOT/a.out; out.mkdir(parents=True, exist_ok=True)
    jsonl = out/'tune.jsonl'
    if a.stage:
        t = Tuner(jsonl, Clock(a.seconds/60))
        STAGES[a.stage](t); return t.report()
    if not REHEARSE and not torch.cuda.is_available(): sys.exit('error: tuning needs an NVIDIA GPU; --rehearse tries the program on a CPU')
    clock = Clock(a.minutes)
    if not a.merge: jsonl.unlink(missing_ok=True)
    build_libraries(list(GEOMETRIES.values()))
    jsonl.touch()
    stages = a.only.split(',')
    run_stages(__file__, [(s, LEAVE[s] if s != stages[-1] else 2) for s in stages], clock, ['--out', str(out), *(['--rehearse'] if REHEARSE else [])])
    if REHEARSE: return say(json.dumps(table(jsonl, 'rehearsal'))[:400])
    shutil.copy(keep(jsonl, torch.cuda.get_device_name()), out)

if __name__ == '__main__': main()
