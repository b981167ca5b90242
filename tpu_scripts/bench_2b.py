"""Measure the tpu-2b step on GPUs: float against codebooks, on one and on several, saving and restoring; rows of data/results/scaling.jsonl.

    python tpu_scripts/bench_2b.py --gpus 1,2,4 --minutes 25 --out data/results/scaling.jsonl

Random weights, real text, FSDP over the first GPUs. Each row is measured in a process of its own and written when it is done; a row that is there
is not measured again, so the command can be repeated until nothing is left. A row that did not fit or was cut off says so and is tried again only with --again.
MFU is useful operations (`nativebit.train.benchmark.step_flops`: nothing for recomputed layers, half of causal attention's square) over 989 TFLOP/s a GPU,
the dense bfloat16 peak that NVIDIA states for an H100 or H200 (SXM).
"""
import json, os, statistics, subprocess, sys, tempfile, time, zlib
from pathlib import Path
import jax, numpy as np
from fastcore.script import bool_arg
from nativebit.train.states import RunStates
from nativebit.config import get_config
from nativebit.utils.cli import UserError, one_sentence, parse_args
from nativebit.utils.files import git_hash, read_jsonl
from nativebit.data.loader import prepare
from nativebit.data.tokenizers import load_tokenizer
from nativebit.distributed.sharding import make_mesh, shard_shapes, use_mesh
from nativebit.train.benchmark import step_flops, windows
from nativebit.train.step import make_quant_ops, make_step, quantize_now, state_shapes
from nativebit.train.init import init_state
from nativebit.train.loop import training_data

PEAK = 989e12   # FLOP/s, dense bfloat16
KEYS = ('config', 'kind', 'gpus', 'mode', 'requantize_every', 'batch_per_gpu', 'remat', 'saved_on')

def tokens_for(cfg):
    "The demo's text in the model's tokens; without GPT-2's tokenizer, in the demo's own, whose numbers a larger vocabulary has too."
    try: return prepare('stdlib', load_tokenizer(cfg.model.vocab_size))[0]['train']
    except UserError: return prepare('stdlib', load_tokenizer(4096))[0]['train']

def config_of(row):
    gpu = jax.default_backend() == 'gpu'
    kw = dict(batch_size=row['batch_per_gpu']*row['gpus'], remat=row['remat'], nativebit=row['mode'] != 'float', attention='cudnn' if gpu else 'reference')
    return get_config(row['config'], geometry=row['geometry'], requantize_every=row['requantize_every'], **kw)

def mesh_of(row): return make_mesh(devices=jax.devices()[:row['gpus']]) if row['gpus'] > 1 else None

def peak_gib(n): return [round((d.memory_stats() or {}).get('peak_bytes_in_use', 0)/2**30, 1) for d in jax.devices()[:n]]

def timed(f):
    start = time.time()
    return f(), time.time()-start

def measure_step(row):
    "Time windows of steps, and of requantizing alone."
    cfg, mesh = config_of(row), mesh_of(row)
    data = training_data(cfg, tokens_for(cfg), mesh)
    with use_mesh(mesh):
        (state, _), built_s = timed(lambda: jax.block_until_ready(init_state(cfg, mesh=mesh)))
        at, step, ops = [state], make_step(cfg), make_quant_ops(cfg.quant)
        del state
        def run(i): at[0] = quantize_now(step(at[0], data[i], i)[0], i+1, cfg, ops)
        wait = lambda: jax.block_until_ready(at[0])
        _, compile_s = timed(lambda: (run(0), wait()))
        times, peak = windows(run, wait, row['steps'], row['windows']), peak_gib(row['gpus'])
        def again(i): at[0] = ops['requantize'](at[0])
        quant = windows(again, wait, row['steps'], row['windows']) if cfg.quant.nativebit else []
    ms, tokens = statistics.median(times), cfg.train.batch_size*cfg.model.context_len
    mfu = step_flops(cfg)/(ms/1e3*row['gpus']*PEAK) if jax.default_backend() == 'gpu' else None
    result = dict(ms=round(ms, 2), ms_spread=[round(min(times), 2), round(max(times), 2)], tokens_per_s=round(1e3*tokens/ms), mfu=mfu and round(mfu, 4), peak_gib=peak)
    return dict(result, requantize_ms=round(statistics.median(quant), 2) if quant else None, build_s=round(built_s, 1), compile_s=round(compile_s, 1))

def measure_save(row):
    "Write a whole state, and wait until it is on the disk."
    cfg, mesh = config_of(row), mesh_of(row)
    with use_mesh(mesh):
        state, saved = init_state(cfg, mesh=mesh)[0], RunStates(row['states'], keep=1)
        if saved.latest: return dict(bytes=sum(x.nbytes for x in jax.tree.leaves(state)), note='was there already')
        _, blocked = timed(lambda: saved.save(state, 1))
        _, rest = timed(saved.close)
    return dict(bytes=sum(x.nbytes for x in jax.tree.leaves(state)), blocked_s=round(blocked, 1), save_s=round(blocked+rest, 1))

def measure_restore(row):
    "Read it onto another number of GPUs, and take a step."
    cfg, mesh, saved = config_of(row), mesh_of(row), RunStates(row['states'], keep=1)
    if not saved.latest: raise UserError(f"no state in {row['states']}; a row of kind save makes one")
    with use_mesh(mesh):
        state, restore_s = timed(lambda: jax.block_until_ready(saved.restore(shard_shapes(state_shapes(cfg), mesh, cfg.quant))))
        checksum = zlib.crc32(np.asarray(state.params['embed'][...]))   # the same, whatever the number of GPUs
        state, metrics = make_step(cfg)(state, training_data(cfg, tokens_for(cfg), mesh)[0], 1)
        return dict(restore_s=round(restore_s, 1), loss_of_next_step=float(metrics['loss']), checksum=checksum, peak_gib=peak_gib(row['gpus']))

MEASURE = dict(step=measure_step, save=measure_save, restore=measure_restore)

def plan(config, gpus, batch, remat, geometry, steps, windows, states):
    "The rows of a sitting, what matters most first."
    base = dict(config=config, geometry=geometry, batch_per_gpu=batch, remat=remat, steps=steps, windows=windows, states=states, saved_on=None)
    row = lambda kind, n, mode='qat', every=10, **kw: dict(base, kind=kind, gpus=n, mode=mode, requantize_every=every, **kw)
    rows = [row('step', n, mode, every) for n in gpus for mode,every in (('float', 10), ('qat', 10), ('qat', 1))]
    return rows + [row('save', max(gpus))] + [row('restore', n, saved_on=max(gpus)) for n in sorted(gpus, reverse=True)]

def in_a_process(row, timeout):
    "Measure a row in a fresh process; what went wrong is part of the row."
    try: p = subprocess.run([sys.executable, __file__, '--row', json.dumps(row)], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired: return dict(error=f'cut off after {timeout:.0f} s')
    if p.returncode == 0: return json.loads(p.stdout.splitlines()[-1])
    return dict(error='out of memory' if 'out of memory' in p.stderr or 'RESOURCE_EXHAUSTED' in p.stderr else p.stderr[-600:])

def main(
    config:str='tpu-2b',         # preset
    gpus:str='1',                # numbers of GPUs, such as 1,2,4
    batch_per_gpu:int=16,        # windows a GPU and step
    remat:bool_arg=False,        # 1: recompute layers in the backward pass
    geometry:str='int8',         # of the codebooks
    steps:int=10,                # in a timed window; multiples of 10 hold as many codebook updates as they should
    windows:int=3,               # timed windows
    minutes:float=9,             # no row is begun after so many; a row under way is cut off
    states:str=None,             # folder for the saved state; a temporary one by default
    out:str='data/results/scaling.jsonl',  # where rows go
    again:bool=False,            # try rows once more that did not fit or were cut off
    row:str=None,                # used by this program itself
):
    "Measure training of a large model on GPUs, row by row."
    if row: print(json.dumps(MEASURE[json.loads(row)['kind']](json.loads(row)))); return
    end, path = time.time() + 60*minutes, Path(out)
    numbers = [int(n) for n in gpus.split(',') if n.isdigit() and int(n)]
    if len(numbers) != len(gpus.split(',')): raise UserError(f"--gpus {gpus!r} is not valid: give numbers such as 1,2,4")
    done = read_jsonl(path) if path.exists() else []
    key = lambda r: tuple(r.get(k) for k in KEYS)
    have = {key(r) for r in done if not (again and 'error' in r)}
    states = states or str(Path(tempfile.gettempdir())/f'bench-{config}-{max(numbers)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a') as f:
        write = lambda r: (f.write(json.dumps(r) + '\n'), f.flush(), print(json.dumps(r), flush=True))
        if not done: write(dict(type='header', command=' '.join(['python', 'tpu_scripts/bench_2b.py', *sys.argv[1:]]), peak_flops=PEAK, git_hash=git_hash()))
        for r in plan(config, numbers, batch_per_gpu, bool(remat), geometry, steps, windows, states):
            left = end - time.time()
            if key(r) in have or left < 20: continue
            r = {**r, **in_a_process(r, left)}
            write({k: v for k,v in r.items() if k != 'states'})

if __name__ == '__main__':
    os.environ.setdefault('XLA_FLAGS', '--xla_gpu_enable_triton_gemm=false')   # as the package's own commands do (08_train/07_benchmark)
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.94')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(Path(tempfile.gettempdir())/'bench-jax'))          # rows that differ in requantize_every alone compile once
    with one_sentence(): main(**parse_args(main))
