"Packed matrices and whole decoders on a CPU, by every instruction set that is here: any shape, any geometry, in the memory of the file."
import ctypes, json, math, os, shutil, subprocess, sys
from functools import lru_cache
from pathlib import Path
import ml_dtypes, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from nativebit.config import CONFIGS, GEOMETRIES, Config, ModelConfig, QuantConfig, override
from nativebit.formats.bitpacking import QuantizedTensor, index_width, pack_indices
from nativebit.formats.nbpack import Pack, fold_rows, pack_tensors, read_pack, rounded_rows, write_pack
from nativebit.formats.size import DTYPES, param_shapes, stored_tensors
from nativebit.kernels import cpu
from nativebit.utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())
NAMES = cpu.instruction_sets(cpu.library()) if cpu.library() else ['scalar']

@pytest.fixture(autouse=True)
def fastest_again():
    yield
    cpu.choose(cpu.library(), '')

def random_packed(rng, shape, quant):
    (bo, bi), kind = [b or s for b,s in zip(quant.block_shape, shape)], quant.codebook_dtype
    G = -(-shape[0]//bo) * -(-shape[1]//bi)
    codes = rng.integers(-128, 128, (G, quant.n_entries)) if kind == 'int8' else rng.normal(size=(G, quant.n_entries))
    scale = dict(int8=rng.uniform(.001, .01, G).astype(np.float16), float8_e4m3=np.float32([.02])).get(kind)
    words = pack_indices(rng.integers(0, quant.n_entries, G*bo*bi), index_width(quant.n_entries))
    return QuantizedTensor(words, codes.astype(dict(float8_e4m3=ml_dtypes.float8_e4m3fn).get(kind, kind)), scale, shape, (bo, bi))

quants = st.one_of(
    st.sampled_from([QuantConfig(**g) for g in GEOMETRIES.values()]),
    st.builds(lambda K, bo, bi, kind: QuantConfig(n_entries=K, block_shape=(bo, bi), codebook_dtype=kind), st.integers(2, 16), st.integers(0, 20), st.integers(0, 200),
              st.sampled_from(['int8', 'float8_e4m3', 'float32', 'float16'])))

def bound(q, x, activations):
    "How far a sum may be off in the worst case: half a step of each activation, and of each entry that is rounded."
    w, rough = abs(q.dequantize()), q.codebook.dtype != np.int8
    top = x*0 + abs(x).max(1, keepdims=True)   # a segment's scale is no larger than the token's
    step = {'float': 0, 'int8': .51/127, 'int16': .51/127/250, 'auto': .51/127}[activations]
    entry = (abs(q.entries()).max() if activations != 'float' and rough else 0)*.51/70*1.01   # a table's scale is between 1/127 and 1/70 of its largest entry
    return top @ w.T*step + abs(x).sum(1, keepdims=True)*entry*(1 + step) + 1e-5*(abs(x) @ w.T) + 1e-6

@settings(max_examples=60, deadline=None)
@given(quants, st.integers(1, 70), st.integers(1, 300), st.integers(1, 18), st.integers(0, 2**32 - 1))
def test_products(quant, o, i, n, seed):
    rng = np.random.default_rng(seed)
    q = random_packed(rng, (o, i), quant)
    x, w = rng.normal(size=(n, i)).astype(np.float32)*10.**rng.integers(-3, 3), q.dequantize()
    m, want = cpu.packed(q), None
    np.testing.assert_array_equal(cpu.rows_of(m, np.arange(o)), w)
    for name in NAMES:
        cpu.choose(cpu.library(), name)
        for how in cpu.ACTIVATIONS:
            y = cpu.matmul(x, m, how)
            assert (abs(y - x.astype(np.float64) @ w.T) <= bound(q, x, how)).all(), (name, how)
            if how == 'int8':   # the same whole numbers: sums differ in their last digits
                if want is None: want = y
                np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4*float(abs(x).max()*abs(w).max()*i)**.5 + 1e-6)

@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(GEOMETRIES)), st.integers(1, 5), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 2**32 - 1))
def test_a_token_that_is_no_number_stays_alone(geometry, n, value, seed):
    rng = np.random.default_rng(seed)
    q = random_packed(rng, (40, 150), QuantConfig(**GEOMETRIES[geometry]))
    m, x = cpu.packed(q), rng.normal(size=(n, 150)).astype(np.float32)
    bad, row = x.copy(), rng.integers(n)
    bad[row, rng.integers(150)] = value
    for name in NAMES:
        cpu.choose(cpu.library(), name)
        for how in cpu.ACTIVATIONS:
            y = cpu.matmul(bad, m, how)
            assert not np.isfinite(y[row]).any() if how != 'float' else not np.isfinite(y[row]).all()
            np.testing.assert_array_equal(np.delete(y, row, 0), np.delete(cpu.matmul(x, m, how), row, 0))

@settings(max_examples=25, deadline=None)
@given(st.sampled_from([8, 6, 4]), st.integers(1, 90), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_rows_of_bytes(bits, o, eights, n, seed):
    rng = np.random.default_rng(seed)
    i = 4*eights if bits == 6 else 2*eights if bits == 4 else eights
    codes, scale = rounded_rows(rng.normal(size=(o, i)).astype(np.float32), bits)
    m, w, x = cpu.dense(fold_rows(codes, bits), scale, bits), codes*scale[:, None], rng.normal(size=(n, i)).astype(np.float32)
    for name in NAMES:
        cpu.choose(cpu.library(), name)
        np.testing.assert_array_equal(cpu.rows_of(m, np.arange(o)), w)
        for how in cpu.ACTIVATIONS: np.testing.assert_allclose(cpu.matmul(x, m, how), x @ w.T, rtol=1e-3, atol=2e-4*i**.5)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        d = cpu.dense(w.astype(dtype))
        np.testing.assert_allclose(cpu.matmul(x, d), x @ w.astype(dtype).astype(np.float32).T, rtol=1e-4, atol=1e-4)

def test_what_does_not_fit():
    rng = np.random.default_rng(0)
    m = cpu.packed(random_packed(rng, (8, 64), QuantConfig(**GEOMETRIES['int8'])))
    for f, says in [(lambda: cpu.matmul(np.zeros((1, 63), np.float32), m), 'do not fit a matrix with 64 columns'), (lambda: cpu.matmul(np.zeros((1, 64), np.float32), m, 'int4'), 'one of float, int8, int16'),
                    (lambda: cpu.rows_of(m, np.array([8])), 'below 8'), (lambda: cpu.packed(random_packed(rng, (8, 64), QuantConfig(n_entries=17))), 'holds 16 entries')]:
        with pytest.raises(UserError, match=says): f()
    assert cpu.matmul(np.zeros((0, 64), np.float32), m).shape == (0, 8)

# ---- whole networks -----------------------------------------------------------------------------------------------------------------------------

ODD = dict(odd=dict(vocab_size=97, n_layers=2, d_model=40, n_heads=5, d_ff=72, context_len=48, n_kv_heads=1, head_size=24, rope_scaling=('llama3', 8., 1., 4., 16), tied=False),
           qwen=dict(vocab_size=130, n_layers=2, d_model=64, n_heads=6, n_kv_heads=2, head_size=32, d_ff=100, context_len=80, qk_norm=True, biases=('attn.q', 'attn.k', 'attn.v', 'attn.o', 'mlp.gate', 'mlp.up', 'mlp.down')),
           linear=dict(vocab_size=64, n_layers=1, d_model=32, n_heads=1, d_ff=64, context_len=40, rope_scaling=('linear', 2.)))

def random_pack(name, quant, embed, path='x'):
    cfg, rng = Config('x', ModelConfig(**ODD[name]), quant), np.random.default_rng(0)
    def array(n, x):
        if x.dtype == 'U32':
            q = cfg.quant.of(n.removesuffix('.words'))
            return pack_indices(rng.integers(0, q.n_entries, x.shape[0]*32//index_width(q.n_entries)), index_width(q.n_entries))
        if x.dtype in ('I8', 'U8') : return rng.integers(-120, 120, x.shape).astype(DTYPES[x.dtype]) if x.dtype == 'I8' else rng.integers(0, 256, x.shape).astype(np.uint8)
        if n.endswith('.scale'): return rng.uniform(5e-4, 2e-3, x.shape).astype(DTYPES[x.dtype])
        return ((1 + .1*rng.normal(size=x.shape) if 'norm' in n else .1*rng.normal(size=x.shape)).astype(DTYPES[x.dtype]))
    return cfg, {n: array(n, x) for n,x in stored_tensors(cfg, embed)}

def jax_logits(pack, tokens):
    import jax.numpy as jnp
    from nativebit.inference.generate import pack_params
    from nativebit.models.transformer import model_shapes, network
    from nativebit.utils.pytree import with_leaves
    return np.asarray(network(pack.config.model, with_leaves(model_shapes(pack.config.model), pack_params(pack, False, jnp.float32)))(jnp.asarray(tokens)[None]))[0]

MIXED = QuantConfig(**GEOMETRIES['3bit-128'], overrides=(('*.k', '4bit-8x64'), ('*.up', '2bit-128'), ('layers.0.attn.o', 'float'), ('*.down', '3bit-row')))

@pytest.mark.parametrize('name, quant, embed', [('odd', MIXED, 'int8'), ('odd', QuantConfig(**GEOMETRIES['lut-b']), 'bfloat16'), ('qwen', QuantConfig(**GEOMETRIES['4bit']), '4'), ('qwen', MIXED, '6'),
                                                ('linear', QuantConfig(n_entries=20, block_shape=(1, 32)), 'float32')])
def test_a_network_is_that_of_jax(tmp_path, name, quant, embed):
    from nativebit.inference.cpu import CpuNetwork
    cfg, tensors = random_pack(name, quant, embed)
    pack = read_pack(write_pack(tmp_path/'x.safetensors', tensors, cfg))
    tokens = np.random.default_rng(1).integers(0, cfg.model.vocab_size, 37)
    want = jax_logits(pack, tokens)
    for isa in NAMES:
        cpu.choose(cpu.library(), isa)
        got = {how: CpuNetwork(pack, how).logits(tokens) for how in cpu.ACTIVATIONS}
        assert abs(got['float'] - want).max() < 2e-4*abs(want).max()
        assert np.corrcoef(got['int8'].ravel(), want.ravel())[0, 1] > .99
        net = CpuNetwork(pack, 'int16'); net.reserve(37)
        assert abs(np.concatenate([net.forward(tokens[i:i+1], i) for i in range(37)]) - got['int16']).max() < 1e-3*abs(want).max()

ALONE = """
import resource, sys
from pathlib import Path
import numpy as np
from nativebit.formats.nbpack import read_pack
from nativebit.inference.cpu import CpuNetwork, generate
from nativebit.kernels import cpu
cpu.pool()
held = lambda what: int(Path('/proc/self/status').read_text().split(what + ':')[1].split()[0])*1024
path, room = sys.argv[1], int(sys.argv[2])
size = Path(path).stat().st_size
resource.setrlimit(resource.RLIMIT_AS, (held('VmSize') + 2*size + room,)*2)   # the file is mapped, and laid out
net = CpuNetwork(read_pack(path))
said = list(generate(net, [1, 2, 3], 20))
cache = sum(x.nbytes for x in net.cache.arrays)
print(held('VmHWM'), size, cache, len(said))
assert not {'jax', 'torch', 'flax', 'transformers'} & set(sys.modules), sys.modules
"""

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='/proc')
@pytest.mark.parametrize('geometry', ['int8', 'lut-b'])
def test_memory_is_the_file_and_the_cache(tmp_path, geometry):
    "In a process whose address space ends there, and which imports neither JAX nor PyTorch."
    model = ModelConfig(vocab_size=8000, n_layers=6, d_model=1024, n_heads=16, n_kv_heads=4, d_ff=4096, context_len=256)
    cfg, rng = Config('x', model, QuantConfig(**GEOMETRIES[geometry])), np.random.default_rng(0)
    made = dict(U32=lambda s: rng.integers(0, 2**32, s, np.uint32), I8=lambda s: rng.integers(-127, 128, s, np.int8))
    tensors = {n: made.get(x.dtype, lambda s: np.full(s, .01))(x.shape).astype(DTYPES[x.dtype]) for n,x in stored_tensors(cfg, 'int8')}
    write_pack(tmp_path/'x.safetensors', tensors, cfg)
    r = subprocess.run([sys.executable, '-c', ALONE, str(tmp_path/'x.safetensors'), str(60*2**20)], capture_output=True, text=True,
                       env=os.environ | dict(MALLOC_ARENA_MAX='1'))   # else each thread reserves 64 MB of addresses
    assert r.returncode == 0, r.stderr
    peak, size, cache, said = map(int, r.stdout.split())
    assert said == 20 and size > 35e6 and peak <= size + cache + 60e6, (peak/1e6, size/1e6, cache/1e6)

# ---- what is said -------------------------------------------------------------------------------------------------------------------------------

def run(code, **env): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **env})

@pytest.mark.parametrize('name', [*NAMES, 'off', 'mmx'])
def test_the_instruction_set_is_chosen_by_name(name):
    r = run("from nativebit.kernels import cpu\nlib = cpu.library()\nprint(cpu.missing(), lib and cpu.instruction_sets(lib))", NATIVEBIT_CPU=name)
    if name == 'mmx': assert "NATIVEBIT_CPU='mmx' is not valid: it must be off, or what this CPU has: " in r.stderr
    else: assert r.returncode == 0 and r.stdout.startswith('NATIVEBIT_CPU is off None' if name == 'off' else ' ['), r.stderr

def test_without_a_compiler_there_is_one_sentence(tmp_path):
    "And text is written as before."
    shutil.copytree(ROOT/'data'/'stdlib', tmp_path/'stdlib')
    env = dict(PATH=str(tmp_path), NATIVEBIT_CACHE=str(tmp_path/'none'), CC='', JAX_PLATFORMS='cpu')
    code = (f"import nativebit as nb\nfrom nativebit.ptq.pack import pack_checkpoint\np = pack_checkpoint({str(tmp_path/'stdlib')!r}, {str(tmp_path/'x.safetensors')!r}, posthoc='quantile', geometry='int8')\n"
            "for _ in range(2): print(nb.load(p).generate('def', 3, 0.))")
    r = run(code, **env)
    assert r.returncode == 0, r.stderr
    assert r.stderr.count('note: decoding without the packed CPU kernels') == 1 and 'install gcc or clang' in r.stderr, r.stderr
    with_it = run(code.replace('range(2)', 'range(1)').replace('x.safetensors', 'y.safetensors'), JAX_PLATFORMS='cpu')
    assert with_it.returncode == 0 and 'note:' not in with_it.stderr

def test_a_compiler_that_fails_is_no_end(tmp_path):
    (tmp_path/'cc').write_text('#!/bin/sh\necho no such instruction >&2; exit 1\n'); (tmp_path/'cc').chmod(0o755)
    r = run("from nativebit.kernels import cpu\nprint(cpu.library(), cpu.missing())", CC=str(tmp_path/'cc'), NATIVEBIT_CACHE=str(tmp_path/'cache'))
    assert r.returncode == 0 and r.stdout.startswith('None the CPU kernels could not be built') and 'no such instruction' in r.stdout

def test_threads_and_forks():
    "Products from several Python threads at once, and in a child."
    code = """
import os, numpy as np
from concurrent.futures import ThreadPoolExecutor
from nativebit.kernels import cpu
w = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
m, x = cpu.dense(w), np.ones((3, 64), np.float32)
want = cpu.matmul(x, m)
with ThreadPoolExecutor(4) as pool: assert all(np.array_equal(y, want) for y in pool.map(lambda _: cpu.matmul(x, m), range(200)))
if (child := os.fork()) == 0: os._exit(0 if np.array_equal(cpu.matmul(x, m), want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    for n in ('1', '2', '5'):
        r = run(code, NATIVEBIT_THREADS=n)
        assert r.returncode == 0, r.stderr

# ---- PyTorch ------------------------------------------------------------------------------------------------------------------------------------

@lru_cache
def with_torch():
    pytest.importorskip('torch')
    import torch
    from nativebit.kernels import cpu_op
    from nativebit.pytorch.linear import as_tensor
    return torch, cpu_op, as_tensor

def random_file(rng, shape, quant):
    "A random matrix, its last blocks filled as in a file of ours."
    from nativebit.quant.blocks import to_blocks
    q = random_packed(rng, shape, quant)
    idx = rng.integers(0, quant.n_entries, shape).astype(np.uint8)
    return QuantizedTensor(pack_indices(to_blocks(idx, q.block_shape).reshape(-1), q.bits), q.codebook, q.scale, q.shape, q.block_shape)

@settings(max_examples=30, deadline=None)
@given(quants, st.integers(1, 70), st.integers(1, 300), st.integers(1, 18), st.integers(0, 2**32 - 1))
def test_the_operator(quant, o, i, n, seed):
    "Exact and rounded products, gradients, and the file's words again, of any shape and geometry."
    torch, cpu_op, as_tensor = with_torch()
    rng = np.random.default_rng(seed)
    q = random_file(rng, (o, i), quant)
    p, x, w, b = cpu_op.to_cpu_layout(q.map(as_tensor)), rng.normal(size=(n, i)).astype(np.float32), q.dequantize(), torch.randn(o)
    tx, tw = torch.from_numpy(x), torch.from_numpy(np.array(w))
    back = cpu_op.to_file(p)
    assert back.words.numpy().tobytes() == q.words.tobytes() and back.codebook is p.codebook and torch.equal(p.dequantize(), tw)
    assert torch.equal(cpu_op.cpu_linear(tx, p, 'float', b), torch.nn.functional.linear(tx, tw, b))
    for how in cpu.ACTIVATIONS:
        if how == 'auto': want = cpu_op.cpu_linear(tx, p, 'int16' if n < cpu_op.FEW else 'float')
        assert (abs(cpu_op.cpu_linear(tx, p, how).numpy() - x.astype(np.float64) @ w.T) <= bound(q, x, how)).all(), how
    assert torch.equal(cpu_op.cpu_linear(tx, p), want)
    for dtype in (torch.bfloat16, torch.float16):
        assert cpu_op.cpu_linear(tx.to(dtype)[None], p).shape == (1, n, o) and cpu_op.cpu_linear(tx.to(dtype), p).dtype == dtype
    tx.requires_grad_()
    got, = torch.autograd.grad(cpu_op.cpu_linear(tx, p).square().sum(), tx)
    want, = torch.autograd.grad((tx @ tw.T).square().sum(), tx)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3*float(want.abs().max()) + 1e-6)

def test_the_operator_in_a_graph_and_what_it_refuses():
    torch, cpu_op, as_tensor = with_torch()
    rng = np.random.default_rng(0)
    p = cpu_op.to_cpu_layout(random_file(rng, (24, 100), QuantConfig(**GEOMETRIES['int8'])).map(as_tensor))
    x, b = torch.randn(2, 3, 100), torch.randn(24)
    torch.library.opcheck(torch.ops.nativebit.cpu_linear, (x, *p.parts, b, 'float'), test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'))
    fast = torch.compile(lambda x: cpu_op.cpu_linear(x, p, bias=b).relu(), fullgraph=True, backend='aot_eager')
    assert torch.equal(fast(x), cpu_op.cpu_linear(x, p, bias=b).relu())
    assert cpu_op.cpu_linear(torch.zeros(0, 100), p).shape == (0, 24)
    for f, says in [(lambda: cpu_op.cpu_linear(x[..., 1:], p), 'takes 100 inputs'), (lambda: cpu_op.cpu_linear(x, p, 'int4'), 'one of float, int8'), (lambda: cpu_op.cpu_linear(x.to('meta'), p), 'move one with .to')]:
        with pytest.raises(ValueError, match=says): f()
    strange = random_packed(rng, (24, 100), QuantConfig(**GEOMETRIES['int8'])).map(as_tensor)   # blocks filled up with something else: its words could not be given back
    assert cpu_op.to_cpu_layout(strange) is None

def test_a_layer_of_transformers_has_one_copy():
    "Moved, copied, saved, loaded, pickled; and without the library as before."
    pytest.importorskip('transformers')
    import copy, pickle
    torch, cpu_op, as_tensor = with_torch()
    from nativebit.interop.transformers import NativeBitHfLinear
    for geometry in ('int8', 'lut-b', '2bit', 'published'):
        quant = QuantConfig(**GEOMETRIES[geometry])
        q = random_file(np.random.default_rng(0), (40, 200), quant).map(as_tensor)
        m = NativeBitHfLinear((40, 200), quant, torch.zeros(40))
        m.load_state_dict({('weight' if k == 'words' else k): x for k,x in q.arrays().items()} | dict(shape=torch.tensor([40, 200], dtype=torch.int32), bias=torch.randn(40)))
        assert m.weight is None and m.dense_weight is None
        x = torch.randn(3, 200)
        want, again = m(x), NativeBitHfLinear((40, 200), quant, torch.zeros(40))
        again.load_state_dict(m.state_dict())
        same = [again, copy.deepcopy(m), m.half().float()] + ([] if geometry == 'lut-b' else [pickle.loads(pickle.dumps(m))])   # PyTorch pickles no float8
        for other in same: assert torch.allclose(other(x), want, atol=2e-3) and other.weight is None and other.dense_weight is None
        assert torch.equal(m.state_dict()['weight'], q.words) and torch.equal(m.float_weight(), q.dequantize())
        m.activations = 'float'
        assert torch.equal(m(x), torch.nn.functional.linear(x, q.dequantize(), m.bias))
        m(x.requires_grad_()).sum().backward()
        assert torch.allclose(x.grad, q.dequantize().sum(0).expand(3, -1), atol=1e-4*float(x.grad.abs().max()))

def test_transformers_without_the_library_says_so_once(tmp_path):
    pytest.importorskip('transformers')
    code = """
import torch
from nativebit.config import GEOMETRIES, QuantConfig
from nativebit.interop.transformers import NativeBitHfLinear, lay_out
m = [NativeBitHfLinear((8, 64), QuantConfig(**GEOMETRIES['int8'])) for _ in range(2)]
for x in m:
    for b in x.buffers(): b.zero_()
lay_out(m); lay_out(m)
print(all(x.weight is not None for x in m), m[0](torch.ones(1, 64)).shape, m[0].dense_weight is not None)
"""
    r = run(code, NATIVEBIT_CPU='off')
    assert r.returncode == 0 and r.stdout == 'True torch.Size([1, 8]) True\n' and r.stderr.count('note: multiplying without the packed CPU kernels') == 1, r.stderr
