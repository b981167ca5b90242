"Eight fake devices: an FSDP step is the one-device step, its state is split by whole blocks, and what eight save two restore."
import os, subprocess, sys

PROGRAM = """
import sys, jax, numpy as np
from nativebit.train.states import RunStates
from nativebit.config import get_config
from nativebit.utils.pytree import leaf_names
from nativebit.distributed.sharding import device_bytes, make_mesh, shard_batch, shard_shapes, shard_state, shardings, use_mesh
from nativebit.train.step import first_state, make_quant_ops, make_step, state_shapes
from nativebit.models.transformer import init_model

cfg = get_config('tiny', n_layers=1, batch_size=16, requantize_every=1, quant_reg_weight=.1, distill_weight=.5, accumulate=2)
batches = np.random.default_rng(0).integers(0, 256, (3, 16, 65)).astype(np.int32)
start, teacher = first_state(cfg), init_model(get_config('tiny', n_layers=1, nativebit=False), seed=3)[0]
step, requantize = make_step(cfg), make_quant_ops(cfg.quant)['requantize']
plain = lambda tree: {n: np.asarray(x).astype(np.float64) for n,x in leaf_names(tree).items()}

def run(mesh=None):
    state, t = shard_state((jax.tree.map(jax.numpy.copy, start), teacher), mesh, cfg.quant)
    seen = []
    with use_mesh(mesh):
        for i,b in enumerate(batches):
            state, metrics = step(state, b if mesh is None else shard_batch(b, mesh), i+5, t)
            state = requantize(state)
            seen.append(plain((state, metrics)))
    return state, seen

def check(got, want, skip):
    for n in want:
        if n.endswith('.delta'): np.testing.assert_allclose(got[n], want[n], rtol=2**-7, atol=1e-6, err_msg=n)   # bfloat16: its neighbour at most
        elif not n.startswith(skip): assert np.linalg.norm(got[n] - want[n]) <= 1e-5*np.linalg.norm(want[n]), n

_, one = run()
for shape in ((8, 1), (1, 8), (2, 4)):
    mesh = make_mesh(*shape)
    state, many = run(mesh)
    check(many[0], one[0], ('-',))
    check(many[2], one[2], ('0.opt_state',))   # a delta that was rounded to its neighbour shows in the moments (04_distributed/01_sharding)
    for x,s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh, cfg.quant))): assert x.sharding.is_equivalent_to(s, x.ndim)
    held, whole = device_bytes(state), sum(x.nbytes for x in jax.tree.leaves(state))
    assert len(held) == 8 and max(held.values()) < 1.05*whole/shape[1], held

saved = RunStates(sys.argv[1])
saved.save(state, 3); saved.close()
for n in (8, 2, 1):
    back = RunStates(sys.argv[1]).restore(shard_shapes(state_shapes(cfg), make_mesh(devices=jax.devices()[:n]), cfg.quant))
    assert len(device_bytes(back)) == n
    for x,y in zip(jax.tree.leaves(state), jax.tree.leaves(back)): np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
print('ok')
"""

def test_eight_devices_are_one(tmp_path):
    flags = '--xla_force_host_platform_device_count=8 ' + os.environ.get('XLA_FLAGS', '')   # those that compile fast (Makefile)
    env = dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=flags, NPROC='32')   # NPROC: threads enough for devices that wait for one another
    p = subprocess.run([sys.executable, '-c', PROGRAM, str(tmp_path/'state')], env=env, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.endswith('ok\n'), p.stderr
