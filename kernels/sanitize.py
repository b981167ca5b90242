"""Each CUDA kernel on small ragged matrices, its result compared: a program for NVIDIA's compute-sanitizer, which looks at every access.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python3 kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 kernels/sanitize.py

With PyTorch's cache of memory an access behind a tensor can fall into another one, and nobody notices. Without the sanitizer it takes seconds; --rehearse runs it on a CPU."""
import sys
from functools import partial
from common import DEVICE, GEOMETRIES, REHEARSE, activations, say
import torch
from nativebit.config import Config, ModelConfig, get_config
from nativebit.kernels import between, cuda, layout, lm_head, megakernel, triton_lut, triton_prefill
from nativebit.pytorch import attention
from nativebit.pytorch.benchmark import random_network

WAYS = dict(decode=[(M, dict(clusters=2, ranks=ranks, wide=2)) for M, ranks in ((1, 1), (3, 2), (16, 2))],
            few=[(1, {}), (2, {}), (16, dict(ranks=2)), (33, dict(tj=1)), (64, dict(wide=8, deep=1, tj=1)), (64, dict(wide=4, deep=1))],
            prefill=[(70, dict(bm=64)), (130, dict(bm=96)), (130, dict(bm=88, how=1)), (130, dict(bm=256, how=3))])
BY_INTEGERS = [(1, {}), (9, dict(ranks=2)), (16, dict(tj=1)), (32, dict(tj=1)), (32, {})]

def products(geometry):
    "(what, its relative error) of the products of a geometry."
    bits, kind = GEOMETRIES[geometry]
    p = layout.random_matrix(136, 712, bits, kind).to(DEVICE)
    integers = [(M, dict(how, planes=True)) for M, how in BY_INTEGERS if kind == 'int8']
    for name, ways in WAYS.items():
        for M, how in [*ways, *(integers if name == 'few' else [])]:
            x = activations(M, 712)
            yield f'{name} {geometry}, {M} tokens{", by integers"*("planes" in how)}', layout.relative_error(getattr(cuda, name)(x, p, lib=cuda.library(bits, kind), **how), x, p)

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

def relative(y, want): return ((y.double() - want).norm()/want.norm()).item()

def head():
    "The head of one token, and of several."
    table, scale, x = torch.randint(-127, 128, (1000, 272), device=DEVICE).to(torch.int8), torch.rand(1000, device=DEVICE), activations(5, 272)
    want = (x.double() @ table.double().T)*scale
    yield 'head', relative(lm_head.table_logits(x[0], table, scale, lib=cuda.library(3, 'int8')), want[0])
    yield 'head, 5 tokens', relative(lm_head.rows_logits(x, table, scale), want)

def triton_products(geometry):
    "Those that GPUs without nvcc take."
    p = layout.random_matrix(40, 200, *GEOMETRIES[geometry]).to(DEVICE)
    for name, f, M in (('decode', triton_lut.triton_decode, 3), ('matmul', partial(triton_prefill.triton_matmul, bm=16, bn=16), 19), ('dequantize', triton_prefill.dequantized_linear, 70)):
        x = activations(M, 200)
        yield f'Triton {name} {geometry}, {M} tokens', layout.relative_error(f(x, p), x, p)

def between_products():
    "Norms and gates, of parts of longer rows."
    x, y, weight = activations(7, 3*136)[:, 136:272], activations(7, 136), activations(1, 136)[0]
    for name, y in (('norm', None), ('a sum and its norm', y)):
        h = x.double() if y is None else (x + y).double()
        yield name, relative(between.triton_norm(x, y, weight, .1)[1], h*torch.rsqrt((h*h).mean(-1, keepdim=True) + .1)*weight)
    gate, up = activations(7, 2*1100).chunk(2, -1)
    yield 'gate', relative(between.triton_gated(gate, up), torch.nn.functional.silu(gate.double())*up)
    p, lib = layout.random_matrix(40, 1100//8*8, *GEOMETRIES['int8']).to(DEVICE), cuda.library(*GEOMETRIES['int8'])
    gate, up = [h[:, :p.shape[1]] for h in (gate, up)]
    rows = gate.contiguous(), up.contiguous()   # which begin at 16 bytes
    for name, f in (('gate', between.triton_gated), ('norm', lambda x, y, to=None: between.triton_norm(x, y, torch.ones_like(x[0]), .1, to)[1])):
        yield f'{name}, written for a product by integers', layout.relative_error(cuda.few(cuda.Planes(f(gate, up, torch.int16), 7, torch.float16), p, lib=lib), f(gate, up), p)
        made = cuda.as_planes(rows[0], lib, up=rows[1]) if name == 'gate' else cuda.norm_planes(*rows, torch.ones_like(rows[0][0]), .1, lib=lib)[1]
        yield f'{name}, written so in CUDA', layout.relative_error(cuda.few(made, p, lib=lib), f(gate, up), p)

def attentions(H, parts):
    "Of one token in rows at different places, one of them idle, and of a prompt in two rows: beside array operations in float64."
    S, kv, N = 70, 2, 6
    turns, norms = torch.randn(2, S, H//2, device=DEVICE), [.5 + torch.rand(H, device=DEVICE).half() for _ in range(2)]
    one = partial(attention.triton_attention, parts=parts, tile=16)
    for what, B, T, at, f in (('one token', 4, 1, [5, -3, S-1, 0], one), ('a prompt', 2, 5, range(S-5, S), partial(attention.cached_attention, write=attention.triton_written))):
        qkv = [x.view(B, T, -1, H) for x in activations(B*T, (N + 2*kv)*H).split([N*H, kv*H, kv*H], 1)]
        cache, at = [activations(B*S*kv, H).view(B, S, kv, H) for _ in range(2)], torch.tensor([*at], device=DEVICE)
        want = attention.cached_attention(*(x.double() for x in qkv), *turns.double(), *(x.double() for x in cache), at, [x.double() for x in norms], .1)
        live = at >= 0 if T == 1 else slice(None)
        yield f'attention, {what}, heads of {H}, {parts} parts', relative(f(*qkv, *turns, *cache, at, norms, .1)[live], want[live])

def attention_planes():
    "Of three texts at different places, written as integers for the next product."
    N, kv, H, S = 8, 2, 64, 70
    qkv, cache = [activations(3*n, H).view(3, 1, n, H) for n in (N, kv, kv)], [activations(3*S*kv, H).view(3, S, kv, H) for _ in range(2)]
    turns, at, lib = torch.randn(2, S, H//2, device=DEVICE), torch.tensor([5, 0, S-1], device=DEVICE), cuda.library(*GEOMETRIES['int8'])
    p = layout.random_matrix(40, N*H, *GEOMETRIES['int8']).to(DEVICE)
    for parts in (1, 3):
        step = partial(attention.triton_attention, *qkv, *turns, *cache, at, [], .1, parts=parts, tile=16)
        yield f'attention, written for a product by integers, {parts} parts', layout.relative_error(cuda.few(cuda.Planes(step(dtype=torch.int16), 3, torch.float16), p, lib=lib), step().flatten(1), p)

def main():
    if not (REHEARSE or torch.cuda.is_available()): sys.exit('error: this needs an NVIDIA GPU; --rehearse tries the program on a CPU')
    torch.manual_seed(0)
    parts = [*map(products, GEOMETRIES), *(tokens(g, q) for g in ('int8', 'lut-b') for q in (False, True)), head(), between_products(), attentions(64, 1), attentions(80, 3), attention_planes(), *map(triton_products, GEOMETRIES)]
    found = [say(f'{name}: {off:.1e}') or (name, off) for part in parts for name, off in part]
    if DEVICE == 'cuda': torch.cuda.synchronize()
    if bad := [name for name, off in found if not off < 4e-3]: sys.exit(f"error: {len(bad)} are wrong: {', '.join(bad)}")

if __name__ == '__main__': main()
