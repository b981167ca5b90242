"""Decode attention of 2 to 64 texts, alone: each way to cut it (parts of a row, positions at a time, warps, stages), a CUDA graph of 32 layers with caches of their own, beside a copy of as many bytes.

    python kernels/bench_attention.py                writes data/results/attention.jsonl
    python kernels/bench_attention.py --rehearse     a CPU, tiny shapes, Triton's interpreter
"""
import argparse, itertools, multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from common import DEVICE, REHEARSE, ROOT, copy_bandwidth, graph_ms, say, write
import torch
from nativebit.config import ModelConfig
from nativebit.pytorch.attention import cached_attention, cut_of, rotations, triton_attention
from bench import header

HEADS = {'tiny': (4, 2, 16)} if REHEARSE else {'Llama-3.1-8B': (32, 8, 128), 'Llama-3.2-1B': (32, 8, 64)}
ROWS, LAYERS, CONTEXT, SLOT = ((2,), 2, 20, 32) if REHEARSE else ((2, 8, 16, 64), 32, 512, 1024)
WAYS = dict(parts=(1, 2, 4, 8, 16), tile=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
DTYPE = torch.float32 if REHEARSE else torch.bfloat16

def ways(H):
    "What fits shared memory: keys and values of `stages` tiles."
    every = (dict(zip(WAYS, w)) for w in itertools.product(*WAYS.values()))
    return [w for w in every if w['stages']*w['tile']*H*4 <= 200_000 and w['tile']*H >= 1024*w['warps']][::12 if REHEARSE else 1]

def inputs(shape, B, layers):
    "A token of each row, caches of all layers, positions around the context."
    N, n_kv, H = HEADS[shape]
    q, k, v = (torch.randn(B, 1, n, H, device=DEVICE).to(DTYPE) for n in (N, n_kv, n_kv))
    cos, sin = (r.to(DEVICE) for r in rotations(ModelConfig(8, 1, N*H, N, 8, n_kv_heads=n_kv, head_size=H, context_len=SLOT), SLOT))
    caches = [[torch.randn(B, SLOT, n_kv, H, device=DEVICE).to(DTYPE) for _ in 'kv'] for _ in range(layers)]
    return q, k, v, cos, sin, caches, CONTEXT - torch.arange(B, device=DEVICE) % 16

def compiled(job):
    "In a process of its own: Triton keeps what it has made on disk."
    shape, B, way = job
    q, k, v, cos, sin, caches, at = inputs(shape, B, 1)
    triton_attention(q, k, v, cos, sin, *caches[0], at, **way)

def error(q, k, v, cos, sin, cache, at, way):
    "Beside float64, both with a cache of their own."
    exact, ours = [[x.clone() for x in cache] for _ in '12']
    want = cached_attention(*(x.double() for x in (q, k, v)), cos, sin, *(x.double() for x in exact), at)
    y = triton_attention(q, k, v, cos, sin, *ours, at, **way).double()
    return ((y - want).norm()/want.norm()).item()

def sweep(out, bandwidth, shape, B):
    q, k, v, cos, sin, caches, at = inputs(shape, B, LAYERS)
    N, n_kv, H = HEADS[shape]
    size = 2*B*CONTEXT*n_kv*H*q.element_size()
    write(out, dict(shape=shape, rows=B, bytes=size, us_of_a_copy=round(size/bandwidth*1e6, 2), default=cut_of(n_kv*B, SLOT, 2*H*q.element_size())))
    for way in [{}, *(w for w in ways(H) if w['parts'] == 1 or w['parts']*B*n_kv <= 1024)]:
        us = graph_ms(lambda: [triton_attention(q, k, v, cos, sin, *c, at, **way) for c in caches])*1e3/LAYERS
        write(out, dict(shape=shape, rows=B, us=round(us, 2), error=error(q, k, v, cos, sin, caches[0], at, way), **way))
        say(shape, B, way, f'{us:.2f} µs')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', default=ROOT/'data'/'results'/'attention.jsonl', help='JSON lines'); ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    args = ap.parse_args()
    Path(args.out).unlink(missing_ok=True)
    bandwidth = copy_bandwidth()
    write(args.out, dict(header(bandwidth, 'bench_attention'), layers=LAYERS, shapes=HEADS, context=CONTEXT))
    jobs = [(s, ROWS[0], w) for s,(_,_,H) in HEADS.items() for w in [{}, *ways(H)]]
    if not REHEARSE:
        with ProcessPoolExecutor(min(12, os.cpu_count()), multiprocessing.get_context('spawn')) as pool: list(pool.map(compiled, jobs, chunksize=4))
    for shape in HEADS:
        for B in ROWS: sweep(args.out, bandwidth, shape, B)

if __name__ == '__main__': main()
