"""Which configurations of `few` are fastest where they run: in a step of several texts of an 8B shape, one product after the other, the best kept for those that follow.

    python kernels/tune_step.py --seconds 120    writes data/results/few_step_8b.jsonl
    python kernels/tune_step.py --rehearse       a CPU, tiny shapes

Alone, one launch after the other, a product finds a GPU that nobody else uses. In a step its weights come while another kernel still runs, if there is room for its blocks.
"""
import argparse, time
from pathlib import Path
from common import DEVICE, REHEARSE, ROOT, say, write
import torch
from nativebit import config
from nativebit.kernels import ops
from nativebit.pytorch.batch import BatchDecoder
from nativebit.pytorch.decode import Decoder
from nativebit.pytorch.benchmark import random_network
from bench import header

SHAPE = (config.ModelConfig(1000, 2, 128, 4, 256, n_kv_heads=2, context_len=256) if REHEARSE else
         config.ModelConfig(128256, 32, 4096, 32, 14336, n_kv_heads=8, head_size=128, context_len=1024, tied=False))
PROMPT, STEPS, WINDOWS = (32, 1, 1) if REHEARSE else (512, 12, 3)
GPU = ops.Gpu() if REHEARSE else ops.this_gpu()

def shapes():
    "The products of a layer, by name."
    D, F, kv = SHAPE.d_model, SHAPE.d_ff, SHAPE.n_kv_heads*SHAPE.head_dim
    return dict(down=(D, F), gate_up=(2*F, D), o=(D, D), qkv=(D + 2*kv, D))

def even(shape, M):
    "Rectangles that processors have one of, one and a half, or two, whatever the cost model says."
    tiles, blocks, full = -(-shape[0]//16), -(-shape[1]//128), GPU.shared//1024
    for per, ranks, (wide, deep, tj) in ((p, r, w) for p in (1, 1.5, 2) for r in (1, 2, 4) for w in ((4, 3, 1), (4, 2, 1), (4, 2, 2), (8, 1, 1), (8, 1, 2), (12, 1, 1))):
        c = dict(groups=min(tiles, int(per*GPU.processors)//ranks), ranks=ranks, wide=wide, deep=deep, tj=tj, kb=full if per == 1 else (full + 1)//2 - 1)
        planes = dict(c, planes=M <= 32)
        fits = -(-tiles//c['groups']) <= wide*tj and deep*ranks <= blocks and ops.few_takes(planes, M, 90)
        if fits and ops.few_bytes(tiles, blocks, M, 3, planes) <= 1024*c['kb']: yield dict(backend='few', **c)

def ways(shape, M):
    likely = [{k: v for k,v in c.items() if k != 'planes'} for c in ops.few_configs(shape, M, 3, GPU, M <= 32)[:6]]
    return [*even(shape, M), *likely][:2 if REHEARSE else None]

def step_ms(net, M):
    "Milliseconds of a step behind PROMPT tokens, the best of some windows."
    batch, best = BatchDecoder(net, M, 256 if REHEARSE else 1024), float('inf')
    for slot in range(M): Decoder.begin(batch, slot, [7*slot % 900 + 3 + i % 90 for i in range(PROMPT)])
    for _ in range(4): batch.step()
    for _ in range(WINDOWS):
        if not REHEARSE: torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS): batch.step()
        best = min(best, 1e3*(time.perf_counter() - start)/STEPS)
    return best

def search(net, M, table, seconds, put):
    "Try each way of each product in `table`, which keeps the best."
    begun, best = time.time(), step_ms(net, M)
    put(M=M, step_ms=round(best, 4), config='as the table has it')
    for name, shape in shapes().items():
        key, kept = ops.config_key(shape, 3, 'int8', M), None
        before = table.get(key)
        for c in ways(shape, M):
            if time.time() - begun > seconds: break
            table[key] = c
            try: ms = step_ms(net, M)
            except RuntimeError as e: say(f'{name} {c}: {e}'); continue
            put(M=M, product=name, shape=shape, config=c, step_ms=round(ms, 4))
            if ms < best: best, kept = ms, c
        table[key] = kept or before
        if table[key] is None: del table[key]
        if kept: put(M=M, product=name, shape=shape, config=kept, step_ms=round(best, 4), kept=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seconds', type=float, default=120, help='time budget'); ap.add_argument('--texts', type=int, default=16, help='that a step continues')
    ap.add_argument('--out', default=ROOT/'data'/'results'/'few_step_8b.jsonl', help='JSON lines'); ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    args = ap.parse_args()
    Path(args.out).unlink(missing_ok=True)
    write(args.out, dict(header(None, 'tune_step'), layers=SHAPE.n_layers, shapes=shapes()))
    def put(**row): write(args.out, row); say(row)
    quant = config.QuantConfig(**config.GEOMETRIES['int8'])
    net = random_network(config.Config('8B', SHAPE, quant), DEVICE, torch.float32 if REHEARSE else torch.bfloat16, 'int8')
    search(net, args.texts, ops.tuned('cpu' if REHEARSE else torch.cuda.get_device_name()), args.seconds, put)

if __name__ == '__main__': main()
