"""A token through whole networks of known shapes, packed beside dense bfloat16: random weights, CUDA graphs, 512 tokens of context.

First a network with normed queries and keys is checked: one launch, and five launches a layer, against its own
operations in PyTorch, and a launch that is replayed must give the same bits every time.

    python kernels/bench_models.py --minutes 3                   writes data/results/models.jsonl
    python kernels/bench_models.py --models Qwen3-1.7B --check ''
    python kernels/bench_models.py --rehearse                    a CPU, tiny shapes
"""
import argparse, datetime, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from common import (DEVICE, GEOMETRIES, REHEARSE, ROOT, SHAPES, Clock, activations, build_libraries, error, exact_part,
                    graph_ms, library_for_80, random_packed, say, write)
import torch
from nativebit.config import Config, ModelConfig, get_config
from nativebit.kernels import cuda, megakernel, ops
from nativebit.kernels.decode_layer import float_tensors
from nativebit.kernels.triton_lut import triton_decode
from nativebit.pytorch.benchmark import device_name, random_network, run_benchmark
from nativebit.pytorch.decode import recorded

def shape(n_layers, d_model, n_heads, n_kv_heads, head_size, d_ff, vocab_size, **more):
    return ModelConfig(vocab_size, n_layers, d_model, n_heads, d_ff, n_kv_heads=n_kv_heads, head_size=head_size, **more)

MODELS = {
    'tpu-2b': get_config('tpu-2b').model,
    'Qwen3-1.7B': shape(28, 2048, 16, 8, 128, 6144, 151936, qk_norm=True, norm_eps=1e-6),
    'Llama-3.2-1B': shape(16, 2048, 32, 8, 64, 8192, 128256),
    'Llama-3.1-8B': shape(32, 4096, 32, 8, 128, 14336, 128256, tied=False),
}
LIMIT = {torch.float16: 1e-2, torch.bfloat16: 6e-2}   # of ‖one way - the other‖ / ‖the other‖, after all layers

def config(name, geometry):
    "A network's shape; in a rehearsal a tiny one with the same kind of heads."
    m = replace(MODELS[name], context_len=1024)
    if REHEARSE:
        m = replace(m, n_layers=2, d_model=136, n_heads=2, n_kv_heads=1, d_ff=264, vocab_size=64, context_len=64)
    return Config(name, m, get_config('tiny', geometry=geometry).quant)

def prepared(name, geometry, dtype, context):
    "A network whose norms say something, and a cache that is filled up to a position."
    net = random_network(config(name, geometry), DEVICE, dtype, 'int8')
    for layer in net.layers:
        for t in float_tensors(layer): t.data = .5 + torch.rand_like(t)
    cache = net.empty_cache()
    for kv in cache: [t[:, :context].normal_() for t in kv]
    return net, cache

def one_launch(net, cache, geometry):
    "The plan of a network; a rehearsal's has few blocks, for they are threads of a CPU."
    if REHEARSE: return megakernel.TokenPlan(net, cache, blocks=3, warps=2, lib=cuda.library(*GEOMETRIES[geometry]))
    return megakernel.token_plan(net, cache)

def by_layers(net, x, cache, at):
    for layer,kv in zip(net.layers, cache): x = layer(x, net.cos, net.sin, kv, at)
    return net.norm(x)

def distance(a, b): return ((a.double() - b.double()).norm()/b.double().norm()).item()

@torch.no_grad()
def check(name, geometry, dtype, context, replays):
    "Both short ways against the network's own operations, and the same bits from every replay."
    net, cache = prepared(name, geometry, dtype, context)
    x, at = torch.randn(1, 1, net.cfg.d_model, device=DEVICE, dtype=dtype), torch.tensor([context], device=DEVICE)
    want = by_layers(net, x, cache, at)
    keys = [k[0, context].clone() for k,_ in cache]
    plan, out = one_launch(net, cache, geometry), {}
    if plan is None: return dict(check=name, geometry=geometry, error='no plan', ok=False)
    off = dict(one_launch=distance(plan.run(x, at), want),
               keys=max(distance(k[0, context], old) for (k,_),old in zip(cache, keys)))
    if not REHEARSE:
        for layer in net.layers: layer.fuse(dtype)
        off['five_launches'] = distance(by_layers(net, x, cache, at), want)
    def step(): out['y'] = plan.run(x, at)
    replay = step if REHEARSE else recorded(step)
    replay(); first = out['y'].clone(); equal = 0
    for _ in range(replays): replay(); equal += torch.equal(out['y'], first)
    ok = max(off.values()) < LIMIT[dtype] and equal == replays and bool(first.isfinite().all())
    return dict(check=name, geometry=geometry, dtype=str(dtype)[6:], **{k: round(v, 6) for k,v in off.items()},
                replays=replays, equal=equal, ok=ok)

def older(geometry, layers):
    "Products of one token by the kernels for GPUs before Hopper: their error, and milliseconds beside this GPU's own and Triton's."
    lib, (bits, kind) = library_for_80(*GEOMETRIES[geometry]), GEOMETRIES[geometry]
    weights = [random_packed(s, bits, kind) for _ in range(layers) for s in SHAPES]
    xs = {s[1]: activations(1, s[1]) for s in SHAPES}
    config = lambda p, gpu: {k: v for k,v in ops.default_decode(p.shape, 1, bits=bits, gpu=gpu).items() if k != 'backend'}
    gpu = ops.Gpu(90, 3) if REHEARSE else ops.this_gpu()
    old = gpu._replace(arch=80, shared=min(gpu.shared, 101376 if REHEARSE else 166912))   # as an A100 has
    ways = {'for 8.0': lambda x, p: cuda.decode(x, p, lib=lib, **config(p, old)),
            'for 9.0': lambda x, p: cuda.decode(x, p, lib=cuda.library(bits, kind), **config(p, gpu)), 'Triton': triton_decode}
    off = max(error(ways['for 8.0'](xs[p.shape[1]], p), exact_part(xs[p.shape[1]], p)) for p in weights[:4])
    ms = {k: round(graph_ms(lambda: [f(xs[p.shape[1]], p) for p in weights]), 4) for k,f in ways.items()}
    return dict(older=geometry, layers=layers, error=float(f'{off:.2e}'), ms=ms, ok=off < 1e-3)

def measure(name, geometry, context, tokens, out):
    "Packed and dense, a row each."
    net = random_network(config(name, geometry), DEVICE, torch.float16 if REHEARSE else torch.bfloat16, 'int8')
    run_benchmark(f'{name} {geometry}', net, context, tokens, out, compile=not REHEARSE, graph=not REHEARSE)

def compile_ahead(names, geometry):
    "Processes in which torch.compile meets each network, side by side: what they make is found by the timed one."
    if REHEARSE or len(names) < 2: return []
    command = [sys.executable, __file__, '--check', '', '--tokens', '8', '--out', '', '--geometry', geometry, '--models']
    return [subprocess.Popen([*command, n], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for n in names]

def ended(jobs, seconds):
    "Wait for processes; those that take longer are stopped."
    end = time.time() + seconds
    for job in jobs:
        try: job.wait(max(0, end - time.time()))
        except subprocess.TimeoutExpired: job.kill(); job.wait()

def header():
    return dict(type='header', command=' '.join(['python', 'kernels/bench_models.py', *sys.argv[1:]]),
                device=device_name(DEVICE), torch=torch.__version__, date=str(datetime.date.today()),
                git_hash=os.environ.get('NATIVEBIT_GIT_HASH', 'unknown'))

def run(a, clock, jobs):
    out, context, tokens, replays = a.out, 512, a.tokens, 1000
    if REHEARSE: context, tokens, replays = 9, 8, 3
    bad = 0
    for name in a.check:
        for geometry, dtype in (('int8', torch.float16), ('int8', torch.bfloat16), ('lut-b', torch.bfloat16)):
            row = check(name, geometry, dtype, context, replays)
            say(row); bad += not row['ok']
            if out: write(out, row)
    if a.older:                                                          # timed: after those that compile
        ended(jobs, clock.left/2)
        for geometry in ('int8', 'lut-b'):
            row = older(geometry, 1 if REHEARSE else 8)
            say(row); bad += not row['ok']
            if out: write(out, row)
    start = time.time(); ended(jobs, clock.left/2)
    if jobs: say(f'waited {time.time() - start:.0f} s for what was compiled ahead')
    for name in a.models:
        if clock.left < 5: say(f'{name}: skipped, no time left'); continue
        try: measure(name, a.geometry, context, tokens, out or None)
        except (RuntimeError, torch.OutOfMemoryError) as e: say(f'{name}: failed, {str(e).splitlines()[0][:160]}'); bad += 1
    return bad

def names(text):
    found = [n for n in text.split(',') if n]
    if odd := set(found) - set(MODELS): raise argparse.ArgumentTypeError(f"{', '.join(odd)}: choose from {', '.join(MODELS)}")
    return found

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--minutes', type=float, default=3, help='time budget')
    ap.add_argument('--out', default=str(ROOT/('logs/models_rehearsal.jsonl' if REHEARSE else 'data/results/models.jsonl')),
                    help="where the rows go; '': nowhere")
    ap.add_argument('--models', type=names, default=list(MODELS), help=f"to time: some of {', '.join(MODELS)}")
    ap.add_argument('--check', type=names, default=['Qwen3-1.7B'], help="to check first; '': none")
    ap.add_argument('--older', action='store_true', help='the kernels for GPUs before Hopper, too: right, and how fast?')
    ap.add_argument('--geometry', choices=list(GEOMETRIES), default='int8', help='of the networks that are timed')
    ap.add_argument('--tokens', type=int, default=128, help='tokens to time')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    a = ap.parse_args()
    if not REHEARSE and not torch.cuda.is_available():
        sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
    if a.out: Path(a.out).parent.mkdir(parents=True, exist_ok=True); Path(a.out).unlink(missing_ok=True); write(a.out, header())
    clock, jobs = Clock(a.minutes), compile_ahead(a.models, a.geometry)
    if a.out: build_libraries(sorted({GEOMETRIES[g] for g in [a.geometry, *(['int8', 'lut-b'] if a.check or a.older else [])]}))
    if bad := run(a, clock, jobs): sys.exit(f'error: {bad} of the checks or networks failed')

if __name__ == '__main__': main()
