"""Each CUDA kernel on small ragged matrices, its result compared: a program for NVIDIA's compute-sanitizer, which looks at every access.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 kernels/sanitize.py

Without the sanitizer it takes seconds; --rehearse runs it on a CPU."""
import sys
from common import DEVICE, GEOMETRIES, REHEARSE, activations, say
import torch
from nativebit.config import Config, ModelConfig, get_config
from nativebit.kernels import cuda, layout, lm_head, megakernel
from nativebit.pytorch.benchmark import random_network

WAYS = dict(decode=[(M, dict(clusters=2, ranks=ranks, wide=2)) for M, ranks in ((1, 1), (3, 2), (16, 2))],
            few=[(2, {}), (16, dict(ranks=2)), (33, dict(tj=1)), (64, dict(wide=8, deep=1, tj=1)), (64, dict(wide=4, deep=1))],
            prefill=[(70, dict(bm=64)), (130, dict(bm=96))])

def products(geometry):
    "(what, its relative error) of the products of a geometry."
    bits, kind = GEOMETRIES[geometry]
    p = layout.random_matrix(136, 712, bits, kind).to(DEVICE)
    for name, ways in WAYS.items():
        for M, how in ways:
            x = activations(M, 712)
            yield f'{name} {geometry}, {M} tokens', layout.relative_error(getattr(cuda, name)(x, p, lib=cuda.library(bits, kind), **how), x, p)

def network(geometry, qk_norm):
    "A small one that fits one launch."
    shape = ModelConfig(512, 2, 136, 2, 1064 if not REHEARSE else 264, n_kv_heads=1, head_size=64, context_len=64, qk_norm=qk_norm)
    return random_network(Config('small', shape, get_config('tiny', geometry=geometry).quant), DEVICE, torch.float16, 'int8')

@torch.no_grad()
def tokens(geometry, qk_norm):
    "(what, its relative error) of one launch and of five a layer, beside a network's own operations."
    net, lib = network(geometry, qk_norm), cuda.library(*GEOMETRIES[geometry])
    caches = [net.empty_cache(1, 64) for _ in range(3)]
    for ours in zip(*caches):
        for t in zip(*ours): t[0][:, :9].normal_(); [other.copy_(t[0]) for other in t[1:]]
    x, at = activations(1, 136)[None], torch.tensor([9], device=DEVICE)
    def through(cache):
        y = x
        for layer,kv in zip(net.layers, cache): y = layer(y, net.cos, net.sin, kv, at)
        return net.norm(y)
    want, off = through(caches[0]), lambda y: ((y - want).double().norm()/want.double().norm()).item()
    how = dict(blocks=3, warps=2) if REHEARSE else dict(warps=8)
    yield f'one launch, {geometry}, queries normed: {qk_norm}', off(megakernel.TokenPlan(net, caches[1], lib=lib, **how).run(x, at))
    if REHEARSE: return
    for layer in net.layers: layer.fuse(torch.float16)
    yield f'five launches, {geometry}, queries normed: {qk_norm}', off(through(caches[2]))

def head():
    "The head of one token."
    table, scale, x = torch.randint(-127, 128, (1000, 272), device=DEVICE).to(torch.int8), torch.rand(1000, device=DEVICE), activations(1, 272)[0]
    want = (table.double() @ x.double())*scale
    yield 'head', ((lm_head.table_logits(x, table, scale, lib=cuda.library(3, 'int8')) - want).norm()/want.norm()).item()

def main():
    if not (REHEARSE or torch.cuda.is_available()): sys.exit('error: this needs an NVIDIA GPU; --rehearse tries the program on a CPU')
    torch.manual_seed(0)
    parts = [*map(products, GEOMETRIES), *(tokens(g, q) for g in ('int8', 'lut-b') for q in (False, True)), head()]
    found = [say(f'{name}: {off:.1e}') or (name, off) for part in parts for name, off in part]
    if DEVICE == 'cuda': torch.cuda.synchronize()
    if bad := [name for name, off in found if not off < 4e-3]: sys.exit(f"error: {len(bad)} are wrong: {', '.join(bad)}")

if __name__ == '__main__': main()
