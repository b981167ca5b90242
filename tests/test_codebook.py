"Properties of the quantizer over random shapes, entries and geometries."
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from hypothesis import given, settings, strategies as st
from nativebit.quant.codebook import assign, bits_per_weight, dequantize, init_codebook, lloyd, project, hard_weight
from nativebit.quant.blocks import from_blocks, to_blocks
from nativebit.config import GEOMETRIES, QuantConfig, get_config
from nativebit.quant.linear import EMAState, quantized_params, requantize_layer, start_layer
from nativebit.models.transformer import init_model
from nativebit.utils.pytree import leaf_names

shapes, seeds = st.sampled_from([(1, 1), (7, 130), (64, 64)]), st.integers(0, 2**31-1)   # few shapes, many values: each shape is compiled
blocks = st.sampled_from([(1, 128), (8, 64), (3, 5), (1, 1)])
cfg, few = get_config('tiny', n_layers=1), settings(max_examples=15, deadline=None)

def matrix(seed, *shape): return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape), jnp.float32)*.02

@few
@given(shapes, blocks, seeds)
def test_blocks_round_trip(shape, block_shape, seed):
    w = matrix(seed, *shape)
    b = to_blocks(w, block_shape)
    assert b.shape[1] == block_shape[0]*block_shape[1]
    assert (from_blocks(b, w.shape, block_shape) == w).all()
    assert set(np.unique(b)) == set(np.unique(w))   # filling up repeats the block's own weights

@few
@given(st.sampled_from([(1, 2, 3), (1, 100, 2), (40, 2, 8), (40, 100, 8)]), seeds)
def test_assign_is_the_nearest_entry(sizes, seed):
    (g, e, k), b = sizes, matrix(seed, *sizes[:2])
    cb = init_codebook(b, k)
    q = dequantize(assign(b, cb), cb)
    nearest = jnp.abs(b[:, :, None] - cb[:, None]).min(-1)
    np.testing.assert_allclose(jnp.abs(b - q), nearest, atol=1e-8)

@few
@given(st.sampled_from([(1, 8), (20, 100)]), seeds)
def test_lloyd_never_hurts(shape, seed):
    b = matrix(seed, *shape)
    cb = init_codebook(b, 8)
    error = lambda cb: float(((b - dequantize(assign(b, cb), cb))**2).sum())
    assert error(lloyd(b, cb, 10)) <= error(cb)*(1+1e-5) + 1e-12

@few
@given(st.sampled_from([*((name, (7, 130)) for name in GEOMETRIES), ('lut-b', (1, 1)), ('int8', (64, 64))]), seeds)
def test_every_geometry_holds_what_it_counts(case, seed):
    quant, w = QuantConfig(**GEOMETRIES[case[0]]), matrix(seed, *case[1])
    s = start_layer(w, quant)
    s = requantize_layer(w, s['codebook'], EMAState(s['counts'], s['sums']), quant)
    assert (jnp.diff(s['codebook']) >= 0).all()
    hard = hard_weight(w, s['codebook'], quant)
    assert (hard_weight(hard, s['codebook'], quant) == hard).all()            # Q(Q(w)) = Q(w)
    assert max(len(np.unique(r)) for r in to_blocks(hard, quant.block_shape)) <= quant.n_entries
    assert bits_per_weight(quant, w.shape) >= np.log2(quant.n_entries)

@few
@given(st.sampled_from(['float16', 'int8', 'float8_e4m3']), st.sampled_from([1, 30]), seeds)
def test_projection_is_idempotent_and_sorted(dtype, g, seed):
    cb = jnp.sort(matrix(seed, g, 8), 1)
    p = project(cb, dtype)
    np.testing.assert_allclose(project(p, dtype), p, rtol=1e-6)
    assert (jnp.diff(p) >= 0).all()

def test_biases_of_some_are_no_matter_to_the_quantizer():
    "Qwen2's q adds a bias and its o, of the same shape, none."
    plain, biased = [init_model(replace(cfg, model=replace(cfg.model, biases=b)), seed=0) for b in ((), ('attn.q', 'mlp.up'))]
    quantized = [leaf_names(quantized_params(nnx.merge_state(*x), cfg.quant)) for x in (plain, biased)]
    for n,w in quantized[0].items(): np.testing.assert_array_equal(w, quantized[1][n], n)
