"""Linear layers of the 2.2B network for 2 to 64 tokens: cuBLAS bf16, what there was before `few`, and `few`; fresh weights for every layer, one CUDA graph a case, medians.

    python kernels/bench_few.py --minutes 1.5     writes data/results/few.jsonl, what is most wanted first
    python kernels/bench_few.py --explore         the same with configurations of every kind, of which the fastest are taken; half an hour
    python kernels/bench_few.py --network 8b      writes data/results/few_8b.jsonl: each product of Llama-3.1-8B's shapes alone, with configurations of every kind
    python kernels/bench_few.py --integers        writes data/results/few_integers.jsonl: `few` with fp16 and by integers, side by side; with --network 8b too
    python kernels/bench_few.py --check           whether products by integers are right: many shapes beside float64
    python kernels/bench_few.py --keep h200       no measuring: makes nativebit/kernels/configs/h200.json of few.jsonl, few_8b.jsonl, few_step_8b.jsonl and prefill.jsonl
    python kernels/bench_few.py --rehearse        a CPU, tiny shapes, the CUDA source lane by lane
"""
import argparse, json, os, random, sys
from pathlib import Path
from common import DEVICE, GEOMETRIES, LAYERS, REHEARSE, ROOT, SHAPES, Clock, activations, build_libraries, copy_bandwidth, error, exact_part, graph_ms, random_packed, say, write
import torch
from nativebit.kernels import cuda, layout, ops
from bench import header
from tune import few_configs
from nativebit.utils.files import atomic_path

TOKENS = (16, 8, 64, 2, 32, 4) if not REHEARSE else (3, 33)
OTHERWISE = {'one launch after the other': dict(overlap=0), 'no products': dict(flags=1), 'no activations': dict(flags=4), 'neither': dict(flags=5), 'neither, no waiting': dict(flags=7),
            '64 KB of activations ahead': dict(ahead=64), 'all shared memory': dict(kb=None)}

NETWORKS = {'2.2b': (LAYERS, SHAPES), '8b': (2, [(64, 256), (32, 256), (48, 256), (32, 512)]) if REHEARSE else (32, [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])}
FEW = 'few, default', 'few, tuned', 'few, explored'
FILES = {n: ROOT/'data'/'results'/f'few{"" if n == "2.2b" else "_" + n}.jsonl' for n in NETWORKS}

def this_gpu(): return ops.Gpu(90, 3, 101376) if REHEARSE else ops.this_gpu()

def before(shape, bits, kind, M):
    "What a product took before `few`: what was tuned, or the default."
    key = ops.config_key(shape, bits, kind, M if M <= 16 else 64)
    for name in () if REHEARSE else ('h100',):   # an H200 computes like an H100
        if ops.tuned(name).get(key, {}).get('backend') in ('decode', 'prefill'): return ops.tuned(name)[key]
    if M > 16: return dict(backend='prefill', bm=64 if REHEARSE else ops.prefill_way(shape, M)[0])
    return ops.default_decode(shape, M, bits=bits)

def spread(shape, M, geometry, most):
    "Configurations of `few` of every kind: the likeliest of each number of warps and tiles of a warp, with clusters and without, some with all the memory."
    gpu, found = this_gpu(), {}
    full = gpu.shared//1024
    for c in ops.few_configs(tuple(shape), M, GEOMETRIES[geometry][0], gpu):
        some = found.setdefault((min(c['wide']*c['deep']//4, 4), c['tj'], c['ranks'] > 1), [])
        if len(some) < 3: some.append(c)
    ways = [d for some in found.values() for c in some for d in ([c, dict(c, kb=full)] if c['kb'] < full else [c])]
    return random.Random(0).sample(ways, min(most, len(ways)))

def measured():
    "The header of the first file, and the rows of all."
    (head, *rows), *others = [[json.loads(l) for l in f.read_text().splitlines()] for f in FILES.values()]
    return head, [*rows, *(r for _, *more in others for r in more)]

WAY = 'backend', 'groups', 'ranks', 'wide', 'deep', 'tj', 'kb', 'ahead'
def way(r): return {k: r[k] for k in WAY if k in r}

def found(rows):
    "(geometry, tokens, shape) → the configuration in the fastest stack, or else the fastest alone."
    rows, out = sorted((r for r in rows if 'ms' in r), key=lambda r: r['ms']), {}
    together = [(r['geometry'], r['M'], s, c) for r in rows if r.get('kernel') in FEW for s, c in zip(SHAPES, r['configs'])]
    alone = [(r['geometry'], r['M'], r['shape'], r) for r in rows if 'groups' in r]
    ms = {(g, M, *s, *way(c).items()): c['ms'] for g, M, s, c in reversed(alone)}
    for g, M, s, c in [*together, *alone]:
        t = ms.get((g, M, *s, *way(c).items()))
        out.setdefault((g, M, tuple(s)), dict(way(c), **(dict(ms=round(t, 5)) if t else {})))
    return out

def in_steps():
    "Sixteen tokens: the fastest in a step of sixteen texts of a whole 8B network (tune_step.py)."
    rows = [json.loads(l) for l in (ROOT/'data'/'results'/'few_step_8b.jsonl').read_text().splitlines()[1:]]
    return {ops.config_key(r['shape'], *GEOMETRIES['int8'], r['M']): r['config'] for r in rows if r.get('kept')}

def many():
    "512 and 2,048 tokens: the fastest of prefill.jsonl, among the ways that are left; its milliseconds where it was done just as now."
    rows = [json.loads(l) for l in (ROOT/'data'/'results'/'prefill.jsonl').read_text().splitlines()[1:]]
    out, PAIR, ONCE, STEPS, RUNS, REST = {}, 4, 8, 16, 64, 128   # bits of that file
    for r in sorted((r for r in rows if r.get('how', 0) & RUNS and not r['how'] & 35), key=lambda r: r['us']):
        now = r['bm'] in (128, 256) or r['kind'] == 'int8' and r['bm'] < 160   # as of `Prefill` in lut.cu
        as_now = r['how'] & (ONCE | STEPS) == (ONCE | STEPS*now)
        c = dict(backend='prefill', bm=r['bm'], how=bool(r['how'] & PAIR) + 2*bool(r['how'] & REST), **(dict(ms=r['us']/1e3) if as_now else {}))
        out.setdefault(ops.config_key(r['shape'], *GEOMETRIES[r['kind']], r['M']), dict(c, ms=round(c['ms'], 5)) if as_now else c)
    return out

def table(rows):
    "What was found for each key, or what there was before where its stack was faster."
    ms, best = {}, many()
    for r in rows:
        if 'kernel' in r and 'ms' in r: ms.setdefault((r['kernel'] in FEW, r['kernel'] == 'before', r['geometry'], r['M']), []).append(r['ms'])
    for (g, M, shape), new in found(rows).items():
        old = {k: v for k,v in before(shape, *GEOMETRIES[g], M).items() if k != 'ms'}
        slower = min(ms[False, True, g, M]) > min(ms[True, False, g, M])
        best[ops.config_key(shape, *GEOMETRIES[g], M)] = new if slower else old
    return dict(sorted((best | in_steps()).items()))

def keep(slug):
    "Write the table of the files' GPU into the package."
    head, rows = measured()
    out = ROOT/'nativebit'/'kernels'/'configs'/f'{slug}.json'
    with atomic_path(out) as tmp: tmp.write_text(json.dumps(dict(device=head['device'], torch=head['torch'], configs=table(rows)), indent=0) + '\n')
    say(f'wrote {out.relative_to(ROOT)}')

def checked(layers, M, cfgs, dtype=torch.float16, reps=1000):
    "The largest relative error of the shapes, and whether every replay of a graph gave the same bits."
    xs = [activations(M, s[1], dtype) for s in SHAPES]
    run = lambda: [ops.run_config(x, p, c) for layer in layers for x, p, c in zip(xs, layer, cfgs)]
    want = run()
    e = max(error(y, exact_part(x, p)) for y, x, p in zip(want, xs, layers[0]))
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    def again():
        for y, w in zip(run(), want): differ.add_((y != w).sum())
    graph_ms(again, reps=reps)
    return dict(error=float(f'{e:.2e}'), same_bits=int(differ) == 0, finite=all(bool(y.isfinite().all()) for y in want))

class Bench:
    "Cases of one set of weights at a time; a row is in the file as soon as it is known."
    def __init__(self, path, clock, explore=False): self.path, self.clock, self.explore, self.bf16, self.best = path, clock, explore, {}, {}

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
        ways = spread(SHAPES[i], M, geometry, 22 if not REHEARSE else 2) if self.explore else few_configs(SHAPES[i], M, geometry, most if not REHEARSE else 1)
        for c in ways:
            try: ms = graph_ms(lambda: [ops.run_config(x, layer[i], c) for layer in layers], reps=7)/len(layers)
            except RuntimeError as e: write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, failed=str(e)[:200])); continue
            write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, ms=ms)); times.append((ms, len(times), c))
        return min(times)[2]

    def case(self, layers, geometry, M):
        packed = layers[0]
        def one(name, cfgs, check=True, **more):
            try: self.row(name, geometry, M, self.stack(layers, M, cfgs), **(checked(layers[:3], M, cfgs) if check else {}), **more)
            except RuntimeError as e:
                say(f'{geometry} M={M} {name}: FAILED {str(e)[:200]}'); write(self.path, dict(kernel=name, geometry=geometry, M=M, failed=str(e)[:300]))
                if 'illegal' in str(e): raise
        first = [ops.few_configs(p.shape, M, p.bits, this_gpu())[0] for p in packed]
        one('before', [before(p.shape, p.bits, p.kind, M) for p in packed])
        one('few, default', first, configs=first)
        tuned = [self.fastest(layers, i, M, geometry) for i in range(len(SHAPES))]
        name = 'few, explored' if self.explore else 'few, tuned'
        one(name, tuned, configs=tuned)
        if M not in (TOKENS[0], 64): return
        for what, change in OTHERWISE.items():
            if geometry == 'int8' or what in ('no products', 'no activations'): one(f'{name if self.explore else "few"}, {what}', [dict(c, **change) for c in tuned], check=False)
        if geometry != 'int8': return
        self.row('few, bf16 activations', geometry, M, self.bfloats(layers, M, tuned), **checked(layers[:3], M, tuned, torch.bfloat16))

    def bfloats(self, layers, M, cfgs):
        xs = {s[1]: activations(M, s[1], torch.bfloat16) for s in SHAPES}
        return graph_ms(lambda: [ops.run_config(xs[p.shape[1]], p, c) for layer in layers for p, c in zip(layer, cfgs)])

    def cublas(self):
        w = [[torch.randn(s, device=DEVICE).to(torch.bfloat16) for s in SHAPES] for _ in range(LAYERS)]
        for M in TOKENS:
            xs = {s[1]: activations(M, s[1], torch.bfloat16) for s in SHAPES}
            self.row('cuBLAS bf16', 'bf16', M, graph_ms(lambda: [torch.nn.functional.linear(xs[m.shape[1]], m) for layer in w for m in layer]))

    def alone(self, layers, dense, i, M):
        "A shape without the others: configurations of every kind, and the fastest with something left out."
        xs = {t: activations(M, SHAPES[i][1], t) for t in (torch.float16, torch.bfloat16)}
        def timed(part, product, **more):
            ms = graph_ms(lambda: [product(layer[i]) for layer in layers], reps=7)/len(layers)
            write(self.path, dict(shape=SHAPES[i], geometry='int8', M=M, part=part, ms=round(ms, 6))); say(f'{SHAPES[i]} M={M:<3} {part:30} {ms*1e3:8.2f} us')
        few = lambda c, t=torch.float16: lambda p: ops.run_config(xs[t], p, c)
        timed('default', few(ops.few_configs(SHAPES[i], M, 3, this_gpu())[0]))
        best = self.fastest(layers, i, M, 'int8')
        timed('fastest', few(best))
        for what, change in OTHERWISE.items(): timed(what, few(dict(best, **change)))
        timed('bf16 activations', few(best, torch.bfloat16))
        ws = iter([layer[i] for layer in dense]*1000)
        timed('cuBLAS bf16', lambda _: torch.nn.functional.linear(xs[torch.bfloat16], next(ws)))

def run_alone(b):
    layers = [[random_packed(s, *GEOMETRIES['int8']) for s in SHAPES] for _ in range(LAYERS)]
    dense = [[torch.randn(s, device=DEVICE).to(torch.bfloat16) for s in SHAPES] for _ in range(LAYERS)]
    for M in (16, 64) if not REHEARSE else (3,):
        for i in range(len(SHAPES)):
            if b.clock.left < 1: return say(f'{SHAPES[i]} M={M}: skipped, no time left')
            b.alone(layers, dense, i, M)

def run(b):
    b.cublas()
    weights = {g: [[random_packed(s, *GEOMETRIES[g]) for s in SHAPES] for _ in range(LAYERS)] for g in GEOMETRIES if not REHEARSE or g in ('int8', 'lut-b')}
    for M in TOKENS:
        for geometry, layers in weights.items():
            if b.clock.left < 3: return say(f'{geometry} M={M}: skipped, no time left')
            b.case(layers, geometry, M)

class Race:
    "`few` with fp16 and by integers, in turn: each shape alone with a few likely configurations, then all shapes with the fastest of each."
    def __init__(self, path, clock): self.path, self.clock = path, clock

    def ways(self, shape, M, geometry, planes):
        "What was tuned, and the first of the default's list."
        bits, kind = GEOMETRIES[geometry]
        cfg = {} if REHEARSE else ops.tuned('h200').get(ops.config_key(shape, bits, kind, M), {})
        tuned = [dict(way(cfg), **(dict(planes=True) if planes else {}))]*(cfg.get('backend') == 'few')
        likely, out = ops.few_configs(tuple(shape), M, bits, this_gpu(), planes), tuned[:]
        first = likely[0]
        for other in (lambda c: True, lambda c: c['tj'] != first['tj'], lambda c: c['ranks'] != first['ranks'], lambda c: c['deep'] != first['deep'], lambda c: c['wide'] > 4, lambda c: c['groups'] != first['groups'] and c['tj'] == 2):
            out += [c for c in likely if c not in out and other(c)][:1]
        return out if not REHEARSE else out[:2]

    def alone(self, layers, i, M, geometry):
        "The fastest configuration of fp16, and of integers with activations that are planes already."
        x, best = activations(M, SHAPES[i][1]), {}
        for planes in (False, True):
            times, a = [], cuda.as_planes(x) if planes else x
            for c in self.ways(SHAPES[i], M, geometry, planes):
                try: ms = graph_ms(lambda: [ops.run_config(a, layer[i], c) for layer in layers], reps=9)/len(layers)
                except RuntimeError as e: write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, failed=str(e)[:200])); say('failed', c, str(e)[:100]); continue
                write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, **c, ms=ms)); times.append((ms, len(times), c))
            best[planes] = min(times)[2]
            extra = ''
            if planes:
                both = graph_ms(lambda: [ops.run_config(x, layer[i], best[True]) for layer in layers], reps=9)/len(layers)
                none = graph_ms(lambda: [ops.run_config(a, layer[i], dict(best[True], flags=1)) for layer in layers], reps=9)/len(layers)
                write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, part='by integers, converted before each', ms=both))
                write(self.path, dict(shape=SHAPES[i], geometry=geometry, M=M, part='by integers, no products', ms=none))
                extra = f'   converted before each {1e3*both:6.2f}, no products {1e3*none:6.2f}'
            say(f'   {SHAPES[i]} M={M:<3} {"integers" if planes else "fp16":8} {1e3*min(times)[0]:7.2f} us  {best[planes]}{extra}')
        return best

    def case(self, layers, geometry, M):
        best = [self.alone(layers, i, M, geometry) for i in range(len(SHAPES))]
        x16 = {s[1]: activations(M, s[1]) for s in SHAPES}
        made = {k: cuda.as_planes(x) for k, x in x16.items()}
        half, whole = [b[False] for b in best], [b[True] for b in best]
        for name, xs, cfgs in (('fp16', x16, half), ('integers', made, whole), ('integers, converted before each', x16, whole),
                               ('integers, configurations of fp16', made, [dict(c, planes=True) for c in half]),
                               ('integers, no products', made, [dict(c, flags=1) for c in whole]), ('fp16, no products', x16, [dict(c, flags=1) for c in half])):
            try:
                ms = graph_ms(lambda: [ops.run_config(xs[p.shape[1]], p, c) for layer in layers for p, c in zip(layer, cfgs)])
                more = {} if 'no products' in name or xs is made else checked(layers[:2], M, cfgs, reps=200)
            except RuntimeError as e: say(f'{geometry} M={M} {name}: FAILED {str(e)[:200]}'); write(self.path, dict(kernel=name, geometry=geometry, M=M, failed=str(e)[:300])); continue
            write(self.path, dict(kernel=name, geometry=geometry, M=M, ms=round(ms, 5), **more, configs=cfgs))
            say(f'{geometry:6} M={M:<3} stack of {len(layers)} layers, {name:34} {ms:8.4f} ms', *(f'{k} {v}' for k, v in more.items()))
        conversions = graph_ms(lambda: [cuda.as_planes(x16[s[1]]) for _ in layers for s in SHAPES])
        write(self.path, dict(kernel='conversions alone', geometry=geometry, M=M, ms=round(conversions, 5)))
        say(f'{geometry:6} M={M:<3} conversions alone {conversions:8.4f} ms')

    def run(self):
        for geometry, tokens in (('int8', (16, 8, 32, 2)), ('2bit', (16,)), ('4bit', (16,))):
            layers = [[random_packed(s, *GEOMETRIES[geometry]) for s in SHAPES] for _ in range(LAYERS if LAYERS < 30 else 16)]
            for M in tokens if not REHEARSE else (3,):
                if self.clock.left < 4: say(f'{geometry} M={M}: skipped, no time left'); continue
                self.case(layers, geometry, M)

CHECKED = ([(7680, 2560), (2560, 6912), (4096, 14336), (67, 520), (136, 1160), (24, 136)], (1, 2, 7, 8, 9, 16, 17, 25, 32)) if not REHEARSE else ([(67, 520), (24, 136)], (2, 17))

def check(geometry):
    "Products by integers of many shapes, tokens and configurations beside float64, and the same bits twice; how many are wrong."
    bits, kind = GEOMETRIES[geometry]
    worst, wrong, done = 0., 0, 0
    for shape in CHECKED[0]:
        p = random_packed(shape, bits, kind)
        w = layout.dequantize(p).double()
        for M in CHECKED[1]:
            for dtype in (torch.float16, torch.bfloat16):
                x = activations(M, shape[1], dtype)
                exact = x.double() @ w.T
                ways = ops.few_configs(shape, M, bits, this_gpu(), True)
                for c in [*ways[:3], *random.Random(M).sample(ways, min(5, len(ways)))] if not REHEARSE else ways[:1]:
                    y, again = ops.run_config(x, p, c), ops.run_config(cuda.as_planes(x), p, c)
                    off = (y.double() - exact).norm(dim=1)/exact.norm(dim=1)
                    bad = not float(off.max()) < (1e-3 if dtype == torch.float16 else 4e-3) or not torch.equal(y, again)
                    worst, wrong, done = max(worst, float(off.max()) if dtype == torch.float16 else 0.), wrong + bad, done + 1
                    if bad and wrong < 4:
                        rows = (y.double() - exact).norm(dim=0)/exact.norm(dim=0)
                        say(f'WRONG {geometry} {shape} M={M} {dtype} {c}: twice the same: {torch.equal(y, again)}; error of tokens', [f'{e:.1e}' for e in off.tolist()], 'of rows, the first 32', [f'{e:.1e}' for e in rows[:32].tolist()])
    say(f'{geometry}: {done} products by integers, {wrong} wrong, largest error of a token of fp16 {worst:.1e}')
    return wrong

def check_network(device=DEVICE):
    "A step of several texts in a network of bfloat16, by fp16 and by integers, beside the same in float32; how many are wrong."
    from nativebit.config import GEOMETRIES, Config, ModelConfig, QuantConfig
    from nativebit.pytorch.benchmark import dequantized, random_network
    shape = ModelConfig(1000, 3, 1024, 8, 2816, n_kv_heads=2, context_len=128, head_size=128) if not REHEARSE else ModelConfig(100, 2, 128, 4, 256, n_kv_heads=2, context_len=32)
    net = random_network(Config('check', shape, QuantConfig(**GEOMETRIES['int8'])), device, torch.bfloat16)
    exact, wrong = dequantized(net, torch.float32), 0
    for B in (2, 8, 13, 32) if not REHEARSE else (3,):
        tokens, at = torch.randint(0, shape.vocab_size, (B, 2), device=device), torch.zeros(B, dtype=torch.int64, device=device)
        def logits(model, how):
            os.environ['NATIVEBIT_PLANES'] = how
            cache = model.empty_cache(B)
            for i in range(2): y = model(tokens[:, i:i+1], cache, at + i)
            os.environ['NATIVEBIT_PLANES'] = '0'
            return y.double()
        want, by = logits(exact, '0'), {}
        for how in '01':
            y = logits(net, how)
            by[how] = ((y - want).norm()/want.norm()).item()
        bad = not by['1'] < 1.3*by['0'] + 1e-3
        wrong += bad
        say(f'a network, {B} texts: error by fp16 {by["0"]:.2e}, by integers {by["1"]:.2e}', *['WRONG']*bad)
    return wrong

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--minutes', type=float, default=1.5, help='time budget, without compiling')
    ap.add_argument('--network', choices=NETWORKS, default='2.2b', help='whose shapes; of 8b each alone')
    ap.add_argument('--out', help='where the rows go, if not into the file of the network')
    ap.add_argument('--integers', action='store_true', help='fp16 beside integers; up to 32 tokens, for more there is fp16 alone')
    ap.add_argument('--check', action='store_true', help='only whether products by integers are right, in seconds')
    ap.add_argument('--explore', action='store_true', help='configurations of every kind, not only likely ones')
    ap.add_argument('--keep', metavar='GPU', help='make the table of this name from the files, and measure nothing')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    a = ap.parse_args()
    if a.keep: return keep(a.keep)
    if not REHEARSE and not torch.cuda.is_available(): sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
    globals().update(zip(('LAYERS', 'SHAPES'), NETWORKS[a.network]))
    usual = FILES[a.network].with_name(FILES[a.network].name.replace('few', 'few_integers')) if a.integers else FILES[a.network]
    out = Path(ROOT/'logs'/'few_rehearsal.jsonl' if REHEARSE else a.out or usual)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not a.check: out.unlink(missing_ok=True)
    build_libraries([g for g in GEOMETRIES.values() if g[1] == 'int8' or not (a.integers or a.check)])
    if a.check:
        with torch.inference_mode(): sys.exit(sum(map(check, ('int8', '2bit', '4bit'))) + check_network() > 0)
    clock = Clock(a.minutes)
    with torch.inference_mode():
        write(out, dict(header(copy_bandwidth(), 'bench_few'), network=a.network, layers=LAYERS, shapes=SHAPES))
        if a.integers: Race(out, clock).run()
        elif a.network == '8b': run_alone(Bench(out, clock, explore=True))
        else: run(Bench(out, clock, a.explore))
    say(f'wrote {out}')

if __name__ == '__main__': main()
