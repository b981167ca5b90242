"""Where a launch of `few` spends its time: each block says when it has got how far, on a clock that all of the GPU shares.

    python kernels/bench_timeline.py              writes data/results/few_timeline.jsonl; a minute, most of it compiling
    python kernels/bench_timeline.py --rehearse   a CPU, tiny shapes

Launches of a shape follow each other in one CUDA graph, each with weights of its own. Times are nanoseconds from the moment in which the last
block of the launch before has ended: what lies before 0 overlaps it.
"""
import argparse, ctypes, sys
from common import DEVICE, GEOMETRIES, REHEARSE, ROOT, activations, copy_bandwidth, random_packed, say, write
import torch
from nativebit.kernels import cuda
from bench import header
if REHEARSE: from common import _on_cpu

WHEN = 'begun', 'allowed', 'first there', 'multiplied', 'gathered', 'sent', 'ended'   # few.cuh's Stamps; 'allowed': the launch before has ended
LAUNCHES, REPLAYS = (2, 1) if REHEARSE else (8, 15)

def way(groups, ranks, wide, deep, tj, **more): return dict(groups=groups, ranks=ranks, wide=wide, deep=deep, tj=tj, kb=113, planes=True, **more)
CASES = [((28672, 4096), [way(224, 1, 4, 2, 2), way(128, 1, 4, 2, 2), way(132, 2, 8, 1, 2)]),
         ((4096, 14336), [way(22, 8, 12, 1, 1), way(32, 8, 4, 2, 2), way(33, 4, 4, 2, 2), way(64, 4, 4, 3, 1), way(32, 4, 4, 2, 2), way(16, 8, 8, 1, 2)]),
         ((6144, 4096), [way(96, 2, 4, 3, 1), way(48, 4, 4, 2, 2)]), ((4096, 4096), [way(64, 4, 4, 2, 1), way(64, 2, 4, 3, 1)]),
         ((7680, 2560), [way(120, 2, 4, 3, 1), way(60, 2, 4, 2, 2)]), ((2560, 6912), [way(40, 4, 4, 2, 1), way(20, 8, 4, 2, 2)])]
if REHEARSE: CASES = [((136, 1160), [way(3, 2, 4, 2, 1)])]

def library():
    "The kernels of 3 bits with their stamps."
    if REHEARSE: return _on_cpu(3, 'int8', '-DSTAMPS')
    return ctypes.CDLL(str(cuda.build(3, 'int8', [cuda.find_nvcc(), *cuda.nvcc_flags(torch.cuda.get_device_capability()), '-DSTAMPS'])))

def recorded(run):
    "A CUDA graph of it, or on a CPU the function."
    if REHEARSE: return run
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): run()
    return g.replay

def timeline(lib, shape, M, c):
    "(replays, launches, blocks, stamps) nanoseconds from the end of the launch before, the first launch left out; which processor each block was on; milliseconds a launch."
    blocks, layers = c['groups']*c['ranks'], [random_packed(shape, *GEOMETRIES['int8']) for _ in range(LAUNCHES)]
    x, stamps = cuda.as_planes(activations(M, shape[1]), lib), torch.zeros(LAUNCHES, blocks, 8, dtype=torch.int64, device=DEVICE)
    run = lambda: [cuda.few(x, p, lib=lib, **{k: v for k,v in c.items() if k != 'planes'}) for p in layers]
    lib.nativebit_stamps(None); run()
    lib.nativebit_stamps(ctypes.c_void_p(stamps.data_ptr()))
    replay, seen = recorded(run), []
    for _ in range(REPLAYS + 2):
        if REHEARSE: lib.nativebit_stamps(ctypes.c_void_p(stamps.data_ptr()))
        replay()
        if DEVICE == 'cuda': torch.cuda.synchronize()
        seen.append(stamps.cpu())
    lib.nativebit_stamps(None)
    t = torch.stack(seen[2:])
    ended = t[:, :-1, :, 6].amax(2)
    return t[:, 1:, :, :7] - ended[..., None, None], t[0, 1, :, 7], (t[:, -1, :, 6].amax(1) - t[:, 0, :, 6].amax(1)).double().median().item()/1e6/(LAUNCHES - 1)

def case(out, lib, shape, M, c):
    t, processor, ms = timeline(lib, shape, M, c)
    of_blocks = {q: f(t.double()).flatten(0, 1).median(0).values.round().long().tolist() for q, f in (('first', lambda t: t.amin(2)), ('median', lambda t: t.median(2).values), ('last', lambda t: t.amax(2)))}
    row = dict(shape=shape, geometry='int8', M=M, **c, ms=round(ms, 6), **{q: dict(zip(WHEN, v)) for q, v in of_blocks.items()})
    write(out, dict(row, processor=processor.tolist(), blocks=t[-1, -1].tolist()))
    say(f'{shape} M={M} {c["groups"]}x{c["ranks"]} wide {c["wide"]} deep {c["deep"]} tj {c["tj"]}{" flags " + str(c["flags"]) if "flags" in c else ""}: {1e3*ms:.2f} us, {len(set(processor.tolist()))} processors')
    for q in of_blocks: say(f'   {q:7}', *(f'{w} {v/1e3:6.2f}' for w, v in zip(WHEN, of_blocks[q])))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', help='where the rows go, if not into data/results/few_timeline.jsonl')
    ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
    a = ap.parse_args()
    if not REHEARSE and not torch.cuda.is_available(): sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
    out = ROOT/'logs'/'timeline_rehearsal.jsonl' if REHEARSE else ROOT/'data'/'results'/'few_timeline.jsonl'
    if a.out: out = type(out)(a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    lib = library()
    with torch.inference_mode():
        write(out, dict(header(copy_bandwidth(), 'bench_timeline'), launches=LAUNCHES, replays=REPLAYS))
        for shape, ways in CASES:
            for c in [*ways, dict(ways[0], flags=1), dict(ways[0], flags=4), dict(ways[0], flags=5)]:
                try: case(out, lib, shape, 16 if not REHEARSE else 3, c)
                except RuntimeError as e: say(f'{shape} {c}: FAILED {str(e)[:200]}'); write(out, dict(shape=shape, **c, failed=str(e)[:300]))
    say(f'wrote {out}')

if __name__ == '__main__': main()
