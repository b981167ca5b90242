"Kernels without a GPU: layouts over many shapes, Triton in its interpreter, the CUDA source lane by lane on a CPU, PTX compiled ahead of time."
import ctypes, os, shutil, subprocess, sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
os.environ.setdefault('TRITON_INTERPRET', '1')   # before Triton is imported
torch, triton = pytest.importorskip('torch', reason='the kernels need the extra `torch`'), pytest.importorskip('triton', reason='no Triton for this system')
from hypothesis import given, settings, strategies as st
from nativebit.pytorch import attention, decode as torch_decode, linear as torch_linear, model as torch_model
from nativebit.pytorch.attention import cached_attention
from nativebit.config import get_config
from nativebit.kernels import between, cuda, decode_layer, layout, lm_head, megakernel, ops, triton_lut, triton_prefill
from nativebit.pytorch.benchmark import dequantized, random_network

ROOT = Path(__file__).resolve().parent.parent
GXX = ['g++', '-std=c++17', '-O1', '-DON_CPU', '-I../../tests', '-x', 'c++', '-shared', '-fPIC', '-pthread']
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason='Triton was imported before TRITON_INTERPRET=1 was set')

sizes = dict(o=st.integers(1, 70), i=st.integers(1, 70).map(lambda n: 8*n), bits=st.sampled_from([2, 3, 4]), kind=st.sampled_from(list(layout.KINDS)))

@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_units_can_be_undone(o, i, bits, kind):
    q = layout.random_tensor(o, i, bits, kind)
    again = layout.from_units(layout.to_units(q), (o, i), bits, kind, None if kind == 'int8' else q.scale)
    for k, x in q.arrays().items(): assert torch.equal(x.view(torch.uint8), again.arrays()[k].view(torch.uint8))

@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_dequantize_is_what_the_file_says(o, i, bits, kind):
    q = layout.random_tensor(o, i, bits, kind)
    cb, (bo, bi) = q.codebook.float()*q.scale.float().reshape(-1, 1), layout.KINDS[kind][1]
    w = layout.dequantize(layout.to_kernel_layout(q))
    row, col = torch.arange(o)[:, None], torch.arange(i)[None, :]
    block = row//bo * -(-i//bi) + col//bi
    idx = q.indices().long()[block, row % bo * bi + col % bi]
    assert torch.equal(w, cb[block, idx])

@pytest.mark.parametrize('kind', list(layout.KINDS))
def test_codebooks_of_few_entries(kind):
    q = layout.random_tensor(16, 128, 3, kind)
    q = replace(q, words=layout.pack_indices(q.indices().clamp(max=5).flatten(), 3))
    p = layout.to_kernel_layout(replace(q, codebook=q.codebook.view(torch.uint8)[:, :6].contiguous().view(q.codebook.dtype)))
    assert p.kind == kind and torch.equal(layout.dequantize(p), layout.dequantize(layout.to_kernel_layout(q)))

def test_odd_inputs_go_the_slow_way():
    p = layout.to_kernel_layout(layout.random_tensor(16, 100, 3, 'int8'))
    assert p.kind == 'float' and p.shape == (16, 100)

def test_defaults_fit_shared_memory():
    torch.manual_seed(1)   # how much 8 bits lose depends on the draw
    lib = on_cpu(3, 'int8')
    for o, i, M in ((13824, 2560, 16), (2560, 6912, 16), (32000, 8192, 1), (8192, 28672, 16), (64, 128, 2), (8, 2048, 1)):
        for bits in (2, 3, 4): assert ops.decode_bytes(-(-o//16), -(-i//128), M, bits, *[ops.default_config((o, i), M, True, 'int8', bits)[k] for k in ('clusters', 'ranks')]) < 231_000
    for (o, i), M, act in (((8, 2048), 2, 'int8'), ((40, 136), 2, 'int8'), ((8, 2048), 2, 'float'), ((72, 1032), 13, 'float')):
        p, x = layout.random_matrix(o, i, 3, 'int8'), torch.randn(M, i).half()
        cfg = ops.default_config((o, i), M, True, act)
        assert layout.relative_error(getattr(cuda, cfg.pop('backend'))(x, p, lib=lib, **cfg), x, p) < (5e-4 if act == 'float' else 1.5e-2)

@settings(max_examples=60, deadline=None)
@given(o=st.integers(1, 40000), i=st.integers(1, 4000).map(lambda n: 8*n), bits=st.sampled_from([2, 3, 4]), M=st.integers(1, 64), gpu=st.sampled_from([ops.Gpu(), ops.Gpu(80, 108, 166912), ops.Gpu(89, 128, 101376)]))
def test_every_shape_has_a_default(o, i, bits, M, gpu):
    c, tiles, blocks = ops.default_config((o, i), M, True, bits=bits, gpu=gpu), -(-o//16), -(-i//128)
    assert c['backend'] == 'decode' if 'clusters' in c else c['backend'] == 'few'
    if 'clusters' in c: assert gpu.arch != 90 and M <= (2 if bits < 4 else 1) and c['clusters']*c['ranks'] >= 1; return
    assert ops.few_bytes(tiles, blocks, M, bits, c) <= 1024*c['kb'] <= gpu.shared and c['ranks'] <= blocks and (c['ranks'] == 1 or gpu.arch >= 90)
    assert ops.few_takes(c, M, gpu.arch) and -(-tiles//c['groups']) <= c['wide']*c['tj']

def test_what_was_tuned_fits():
    "Every entry of the tables is one that its kernel takes."
    for device in ('NVIDIA H100 80GB HBM3', 'NVIDIA H200'):
        for key, c in ops.tuned(device).items():
            shape, kind, M = key.split('/')[:3]; bits, M, (o, i) = int(kind[-1]), int(M), map(int, shape.split('x'))
            assert c['backend'] in ('decode', 'prefill', 'few') and c.get('ms', 1) > 0, key
            if c['backend'] != 'few': assert 'H200' not in device or M == 2 or not ops.few_does(key), key; continue
            assert ops.few_bytes(-(-o//16), -(-i//128), M, bits, c) <= 1024*c['kb'] <= ops.Gpu().shared and -(-(-(-o//16))//c['groups']) <= c['wide']*c['tj'], key
            assert ops.few_takes(c, M, 90) and c['deep']*c['ranks'] <= -(-i//128), key

SAME_TABLE = """
import json, bench_few
head, rows = bench_few.measured()
table, tuned = bench_few.table(rows), bench_few.ops.tuned(head['device'])
assert table == json.loads((bench_few.ROOT/'nativebit'/'kernels'/'configs'/'h200.json').read_text())['configs'] != {}
others = bench_few.ops.tuned('H100')   # computes alike: its rows where `few` is of no use, and only there
assert tuned == {k: c for k,c in others.items() if k.split('/')[2] in ('1', '512', '2048') or k.endswith('/int8')} | table and any(k.endswith('-3/1') for k in tuned)
"""

def test_the_table_is_the_files():
    "What `bench_few.py --keep` makes of the measurements is what the package has."
    r = subprocess.run([sys.executable, '-c', SAME_TABLE], capture_output=True, text=True, cwd=ROOT/'kernels')
    assert r.returncode == 0, r.stderr

@pytest.mark.parametrize('o, i, bits, kind', [(24, 264, 3, 'int8'), (40, 200, 3, 'float8_e4m3'), (16, 128, 2, 'int8'), (8, 136, 4, 'float8_e4m3')])
def test_triton(o, i, bits, kind):
    p, x = layout.random_matrix(o, i, bits, kind), torch.randn(2, i).half()
    for y in (triton_lut.triton_decode(x, p, blocks=2), triton_prefill.triton_matmul(x, p, bm=16, bn=16), triton_prefill.dequantized_linear(x, p)): assert layout.relative_error(y, x, p) < 2e-3

def compiled(bits, kind, *more):
    "The same words in the same folder as in the notebooks: what they have compiled is found."
    with chdir(ROOT/'nbs'/'09_kernels'): return ctypes.CDLL(str(cuda.build(bits, kind, [*GXX, *more])))

def on_cpu(bits, kind):
    if not shutil.which('g++'): pytest.skip('no g++ to compile the CUDA source for a CPU')
    return compiled(bits, kind)

@pytest.mark.parametrize('bits, kind', [(3, 'int8'), (3, 'float8_e4m3'), (2, 'int8'), (4, 'int8'), (4, 'float8_e4m3')])
def test_cuda_source(bits, kind):
    lib = on_cpu(bits, kind)
    for (o, i), M, dtype, how in [((16, 128), 1, torch.float16, dict(clusters=1, ranks=1, wide=1)), ((120, 264), 3, torch.bfloat16, dict(clusters=2, ranks=1, wide=3, deep=2, tj=2)),
                                  ((56, 648), 16, torch.float16, dict(clusters=2, ranks=2, wide=2, tj=2)), ((136, 392), 9, torch.float16, dict(clusters=3, ranks=4, wide=2, deep=2))]:
        p, x = layout.random_matrix(o, i, bits, kind), torch.randn(M, i).to(dtype)
        assert layout.relative_error(cuda.decode(x, p, lib=lib, **how), x, p) < (5e-4 if dtype == torch.float16 else 2.2e-3), (o, i, M, how)
    p, x = layout.random_matrix(131, 200, bits, kind), torch.randn(70, 200).half()
    for bm in (64, 96): assert layout.relative_error(cuda.prefill(x, p, bm=bm, lib=lib), x, p) < 5e-4

@pytest.mark.parametrize('bits, kind', [(3, 'int8'), (3, 'float8_e4m3'), (2, 'int8'), (4, 'int8')])
def test_ways_of_prefill(bits, kind):
    "All give the same bits: of whole tiles and of parts, a ring that is filled again, an odd tile out, and rows that are left over."
    lib = on_cpu(bits, kind)
    for (o, i), M, bm, ways in [((264, 1160), 100, 88, [(88, 1), (160, 0)]), ((131, 200), 70, 64, [(64, 1)]), ((392, 136), 180, 256, [(256, 2), (256, 3)])][:3 if (bits, kind) == (3, 'int8') else 2]:
        p, x = layout.random_matrix(o, i, bits, kind), torch.randn(M, i).half()
        want = cuda.prefill(x, p, bm=bm, lib=lib)
        assert layout.relative_error(want, x, p) < 5e-4
        for bm, how in ways: assert torch.equal(cuda.prefill(x, p, bm=bm, how=how, lib=lib), want), (bm, how)
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.prefill(x, p, bm=128, how=2, lib=lib)

@settings(max_examples=60, deadline=None)
@given(o=st.integers(1, 40000), M=st.integers(65, 5000), processors=st.sampled_from([78, 114, 132]))
def test_prefill_is_shared_out(o, M, processors):
    "The busiest processor has at least its part of all tokens; the choice is the cheapest, and rests only where they help."
    cost = lambda bm, how: ops.prefill_cost((o, 128), M, bm, how, processors)
    bm, how = ops.prefill_way((o, 128), M, processors)
    c = ops.default_config((o, 128), M, True, gpu=ops.Gpu(processors=processors))
    assert c == dict(backend='prefill', bm=bm, how=how) and (how == 0 or (bm, how) == (256, 2) and cost(256, 2) < cost(256, 0))
    for way in ops.PREFILL_TILES: assert cost(bm, how) <= cost(*way) >= -(-o//128)*M/processors
    if -(-o//128)*-(-M//256) % processors == 0: assert cost(256, 2) == cost(256, 0)

@pytest.mark.parametrize('bits, kind', [(3, 'int8'), (3, 'float8_e4m3'), (4, 'float8_e4m3')])
def test_an_older_gpu(bits, kind, monkeypatch):
    "The source for 8.0: copies by all threads, one block a cluster, e4m3 without an instruction; what it has not is refused."
    on_cpu(bits, kind)
    lib, gpu = compiled(bits, kind, '-DARCH=80'), ops.Gpu(80, 3, 101376)
    for (o, i), M, dtype in [((16, 128), 1, torch.float16), ((120, 264), 3, torch.bfloat16), ((56, 648), 16, torch.float16), ((136, 2056), 9, torch.float16), ((40, 5000), 1, torch.float16)]:
        p, x = layout.random_matrix(o, i, bits, kind), torch.randn(M, i).to(dtype)
        cfg = ops.default_config((o, i), M, True, bits=bits, gpu=gpu)
        backend = cfg.pop('backend')
        assert backend == ('decode' if M == 1 else 'few') and layout.relative_error(getattr(cuda, backend)(x, p, lib=lib, **cfg), x, p) < (5e-4 if dtype == torch.float16 else 2.2e-3), (o, i, M)
    assert ops.default_config((64, 28672), 1, True, bits=bits, gpu=gpu)['backend'] == 'few' and ops.default_config((64, 512), 512, True, gpu=gpu)['backend'] == 'dequantized'
    for f, how in ((cuda.decode, dict(ranks=2)), (cuda.prefill, {})):
        with pytest.raises(RuntimeError, match='no such kernel'): f(x, p, lib=lib, **how)
    net, [cache] = normed_network('int8' if kind == 'int8' else f'{bits}bit-8x64', torch.float16, dict(n_layers=1, d_model=136, d_ff=264, **HEADED[1]), 5)
    layer, x, at, other = net.layers[0], torch.randn(1, 1, 136).half(), torch.tensor([5]), [c.clone() for c in cache]
    monkeypatch.setattr(cuda, 'library', lambda *a: lib); monkeypatch.setattr(decode_layer, 'choose_decode', lambda p: ops.default_decode(p.shape, 1, bits=p.bits, gpu=gpu))
    want = layer(x, net.cos, net.sin, cache, at)
    layer.fused = decode_layer.layer_args(layer)
    assert distance(layer(x, net.cos, net.sin, other, at), want) < 2e-3

# shapes of `few`: tokens, matrix, and how it is shared out; small kb: rings that are filled again
FEW = [(1, (24, 136), torch.float16, dict(wide=4, deep=1, tj=1)), (2, (16, 128), torch.float16, dict(wide=4, deep=1, tj=1)), (7, (120, 264), torch.bfloat16, dict(groups=2, wide=4, deep=2, tj=1)), (16, (136, 1160), torch.float16, dict(groups=2, wide=4, deep=2, tj=2, kb=64)),
       (13, (40, 904), torch.bfloat16, dict(wide=4, deep=2, tj=1, kb=42)), (33, (67, 520), torch.float16, dict(wide=4, deep=2, tj=2)), (64, (88, 648), torch.bfloat16, dict(wide=4, deep=1, kb=96)), (20, (16, 392), torch.float16, dict(wide=4, deep=2, tj=1)), (11, (136, 904), torch.bfloat16, dict(wide=12, deep=1, tj=1, kb=42)),
       (16, (56, 648), torch.float16, dict(ranks=2, wide=4, deep=1, tj=1, kb=32)), (9, (72, 1160), torch.float16, dict(groups=4, wide=4, deep=1, tj=1, kb=30, ahead=1)), (12, (40, 1032), torch.bfloat16, dict(groups=2, wide=4, deep=1, tj=1, ranks=2, kb=30, ahead=1)), (1, (136, 1160), torch.bfloat16, dict(groups=3, ranks=2, wide=4, deep=2, tj=1, kb=32))]

def over(y, x, p):
    "The worst number's error, over what it may have: half a step of its type, and for rounding on the way a part of the sum's random walk (above 16 tokens weights may become fp16); of many numbers the norm's, too, of few it would say too little."
    w, half, part, norm = layout.dequantize(p).double(), *((2.**-11, 2.**-13, 5e-4) if y.dtype == torch.float16 else (2.**-8, 2.**-13, 2.2e-3))
    exact, walk = x.double() @ w.T, x.double().norm(dim=1, keepdim=True)*w.norm(dim=1)/w.shape[1]**.5
    may = half*exact.abs() + (part if len(y) <= 16 else 16*part)*walk + 2.**-25*(y.dtype == torch.float16)   # fp16's smallest step is 2^-24
    return max(((y.double() - exact).abs()/may).max().item(), (y.numel() >= 512)*layout.relative_error(y, x, p)/norm)

def few_error(M, shape, dtype, how, bits, kind, lib):
    "Error of `few`, over the error it may have; the same bits twice, and nothing of a matrix beside it."
    p, x = layout.random_matrix(*shape, bits, kind), torch.randn(M, shape[1]).to(dtype)
    y = cuda.few(x, p, lib=lib, **how)
    assert torch.equal(y, cuda.few(x, p, lib=lib, **how))
    return over(y, x, p)

@pytest.mark.parametrize('bits, kind', [(3, 'int8'), (3, 'float8_e4m3'), (2, 'int8'), (4, 'int8'), (4, 'float8_e4m3')])
def test_few(bits, kind):
    lib = on_cpu(bits, kind)
    for case in FEW if bits == 3 else [*FEW[0:7:2], FEW[-1]]: assert few_error(*case, bits, kind, lib) < 1, case

@pytest.mark.parametrize('bits, kind', [(3, 'int8'), (4, 'float8_e4m3')])
def test_few_on_an_older_gpu(bits, kind):
    on_cpu(bits, kind)
    lib = compiled(bits, kind, '-DARCH=80')
    for M, shape, dtype, how in [(5, (60, 264), torch.float16, dict(groups=2, wide=1, deep=3)), *FEW[:-4]]: assert few_error(M, shape, dtype, how, bits, kind, lib) < 1, (M, shape, how)

BY_INTEGERS = [*[c for c in FEW if c[0] <= 32], (32, (40, 648), torch.bfloat16, dict(wide=4, deep=2, tj=2)), (25, (150, 904), torch.float16, dict(groups=2, wide=4, deep=1, tj=2, kb=44)), (17, (136, 264), torch.float16, dict(groups=2, wide=8, deep=1, tj=1, ranks=2))]

@pytest.mark.parametrize('bits', [3, 2, 4])
def test_few_by_integers(bits):
    lib = on_cpu(bits, 'int8')
    for M, shape, dtype, how in BY_INTEGERS if bits == 3 else BY_INTEGERS[1::3]: assert few_error(M, shape, dtype, dict(how, planes=True), bits, 'int8', lib) < 1, (M, shape, how)

@pytest.mark.parametrize('bits', [3, 4])
def test_few_by_integers_on_an_older_gpu(bits):
    on_cpu(bits, 'int8')
    lib, cases = compiled(bits, 'int8', '-DARCH=80'), [c for c in BY_INTEGERS if 'ranks' not in c[-1]]
    for M, shape, dtype, how in cases if bits == 3 else cases[2::3]: assert few_error(M, shape, dtype, dict(how, planes=True), bits, 'int8', lib) < 1, (M, shape, how)

def near(y, x, p):
    "Each number is as near as its type allows and activations of 16 bits do: half a step of these is a 65024th of the largest."
    w = layout.dequantize(p).double()
    exact, step = x.double() @ w.T, x.double().abs().amax(1, keepdim=True)*w.abs().sum(1)/65024
    return ((y.double() - exact).abs() <= 1.01*step + exact.abs()*2.**(-11 if y.dtype == torch.float16 else -8) + 1e-7).all()

@settings(max_examples=20, deadline=None)
@given(o=st.integers(1, 140), i=st.integers(1, 160).map(lambda n: 8*n), bits=st.sampled_from([3, 2, 4]), M=st.integers(1, 32), dtype=st.sampled_from([torch.float16, torch.bfloat16]), data=st.data())
def test_integers_of_any_shape(o, i, bits, M, dtype, data):
    "Shared out in one of the likely ways."
    _, *how = data.draw(st.sampled_from(ops.few_configs((o, i), M, bits, ops.Gpu(), True)[:30])).items()
    p, x = layout.random_matrix(o, i, bits, 'int8'), torch.randn(M, i).to(dtype)
    assert dict(how)['planes'] and near(cuda.few(x, p, lib=on_cpu(bits, 'int8'), **dict(how)), x, p)

def rounded_as_planes(x):
    "(blocks, M, 128) integers of 16 bits and (blocks, M) scales, both as float64."
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).float().unflatten(1, (-1, 128)).transpose(0, 1)
    top = blocks.abs().amax(2)
    inv = torch.where(top > 0, torch.tensor(32512.)/top, 0)
    return (blocks.double()*inv.double()[..., None]).round(), (top*(torch.tensor(1.)/32512)).double()

def read_planes(made, I):
    "The same of what `as_planes` made, out of the order of its swizzle."
    (e, KB), rows = (cuda.few_eights(made.M), -(-I//128)), torch.arange(made.M)
    high_low = made.data[:KB*e*2048].view(torch.int8).view(KB, e, 2, 8, 8, 16)                # blocks, groups of 8 tokens, planes, tokens, pieces, bytes
    pieces = high_low.permute(0, 1, 3, 2, 4, 5).reshape(KB, 8*e, 2, 8, 16)[:, :made.M]
    at = torch.arange(8)[None] ^ (rows % 8)[:, None]                                          # where a piece of 16 columns lies
    pieces = pieces.gather(3, at[None, :, None, :, None].expand_as(pieces)).double()
    column = torch.tensor([2*t + j % 2 + j//2*8 for t in range(4) for j in range(4)])         # a lane's columns of 16
    q = torch.empty(KB, made.M, 8, 16, dtype=torch.float64)
    q[..., column] = 256*pieces[:, :, 0] + pieces[:, :, 1]
    place = rows if e == 1 else rows//16*16 + rows%8//2*4 + rows//8%2*2 + rows%2
    return q.flatten(2), made.data[KB*e*2048:].view(torch.float32).view(KB, 8*e)[:, place].double()

@pytest.mark.parametrize('M, I', [(1, 8), (5, 136), (13, 264), (32, 520)])
def test_activations_become_integers(M, I):
    x = torch.randn(M, I).half()
    x[0] *= 100; x[-1, :4] = 0; x[M//2, 7] = 60000.
    got, want = read_planes(cuda.as_planes(x, on_cpu(3, 'int8')), I), rounded_as_planes(x)
    for a, b in zip(got, want): assert torch.equal(a, b)
    brain = x.bfloat16()
    assert torch.equal(read_planes(cuda.as_planes(brain, on_cpu(3, 'int8')), I)[0], rounded_as_planes(brain.half())[0])

def test_integers_bit_for_bit():
    "One worker of a tile goes through the blocks in order: sums of integers are exact, the rest is float32 in this order."
    M, (O, I) = 19, (48, 400)
    p, x = layout.random_matrix(O, I, 3, 'int8'), torch.randn(M, I).half()
    q, steps = rounded_as_planes(x)
    codes = layout.from_units(p.data, (O, I), 3, 'int8')
    scale, KB = codes.scale.float().view(O, -1), -(-I//128)
    table = codes.codebook.double().view(O, KB, 8)
    entries = torch.stack([table[:, b].gather(1, codes.indices().view(O, KB, 128)[:, b].long()) for b in range(KB)])   # (blocks, O, 128)
    if I % 128: entries[-1, :, I % 128:] = 0
    acc = torch.zeros(M, O)
    for b in range(KB):
        exact = q[b] @ entries[b].T
        part = exact.float()*steps[b].float()[:, None]
        acc = (part.double()*scale[:, b].double() + acc.double()).float()
    for how in (dict(wide=4, deep=1, tj=1), dict(wide=4, deep=1, tj=2)): assert torch.equal(cuda.few(x, p, lib=on_cpu(3, 'int8'), planes=True, **how), (acc*p.scale).half())

def test_integers_of_numbers_that_are_none():
    "Zeros, infinities and NaNs as `decode` has them; a token's do not reach the others. What is no int8, or too many tokens, is refused."
    lib, p, x = on_cpu(3, 'int8'), layout.random_matrix(40, 520, 3, 'int8'), torch.randn(6, 520).half()
    x[1] = 0; x[2, 130:260] = 0; x[3, 5] = float('inf'); x[4, 300] = float('nan')
    y, d = cuda.few(x, p, lib=lib, planes=True, deep=1), cuda.decode(x, p, clusters=1, ranks=1, lib=lib)
    assert torch.equal(y.isfinite(), d.isfinite()) and torch.allclose(y, d, 1e-3, 1e-3, equal_nan=True) and not y[1].any() and y[[0, 2, 5]].isfinite().all() and y[4].isnan().all()
    again = cuda.few(cuda.as_planes(x, lib), p, lib=lib, deep=1, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and torch.allclose(again[0].float(), y[0].float(), 1e-2, 1e-2)
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.few(torch.randn(33, 520).half(), p, lib=lib, planes=True)
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.few(x, layout.random_matrix(40, 520, 3, 'float8_e4m3'), lib=on_cpu(3, 'float8_e4m3'), planes=True)

def test_integers_are_chosen(monkeypatch):
    monkeypatch.setattr(cuda, 'library', lambda *a: True); monkeypatch.setattr(ops, 'this_gpu', ops.Gpu)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    form = lambda kind='int8', shape=(7680, 2560): (shape, (1, 128), 3, kind, 1.)
    chosen = lambda M, *a: ops.choose(layout.PackedMatrix(None, None, *form(*a)), M)
    monkeypatch.setenv('NATIVEBIT_PLANES', '0')
    assert not any('planes' in chosen(M) for M in (1, 2, 16, 64)) and ops.reads_half(form(), 16)
    monkeypatch.delenv('NATIVEBIT_PLANES')
    assert chosen(16)['planes'] and chosen(32)['planes'] and 'planes' not in chosen(64) and 'planes' not in chosen(512) and 'planes' not in chosen(16, 'float8_e4m3')
    assert not ops.reads_half(form(), 16) and ops.reads_half(form(), 64) and ops.reads_half(form('float8_e4m3'), 16)
    assert all(chosen(M, 'int8', (28672, 4096)) == chosen(16, 'int8', (28672, 4096)) for M in (1, 2, 8))   # timed for 16 alone
    monkeypatch.setattr(ops, 'this_gpu', lambda: ops.Gpu(arch=80, shared=166912)); assert 'planes' not in chosen(16)   # not timed there
    monkeypatch.setattr(ops, 'this_gpu', ops.Gpu)
    for device in ('NVIDIA H200', 'NVIDIA H100 80GB HBM3'):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: device)
        for shape in ((7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912), (28672, 4096), (4096, 14336), (8, 128)):
            for M in (2, 8, 16, 32):
                c = chosen(M, 'int8', shape)
                assert 'planes' not in c or ops.few_bytes(-(-shape[0]//16), -(-shape[1]//128), M, 3, c) <= 1024*c['kb'] <= ops.Gpu().shared

def test_few_refuses_and_saturates():
    lib, p, x = on_cpu(3, 'int8'), layout.random_matrix(40, 256, 3, 'int8'), torch.randn(3, 256).bfloat16()
    for how in (dict(ranks=3), dict(ranks=4), dict(wide=8, deep=2), dict(wide=3), dict(groups=1, wide=0, tj=2)):
        with pytest.raises(RuntimeError, match='no such kernel'): cuda.few(x, p, lib=lib, **how)
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.few(torch.randn(65, 256).half(), p, lib=lib)
    with pytest.raises(RuntimeError, match='too much shared'): cuda.few(x, p, lib=lib, kb=8)
    x[1, 5] = 1e30
    assert over(cuda.few(x, p, lib=lib), x.float().clamp(-65504, 65504), p) < 1

@settings(max_examples=15, deadline=None)
@given(o=st.integers(1, 140), i=st.integers(1, 160).map(lambda n: 8*n), geometry=st.sampled_from([(3, 'int8'), (3, 'float8_e4m3'), (4, 'int8'), (2, 'int8')]), dtype=st.sampled_from([torch.float16, torch.bfloat16]), data=st.data())
def test_one_token_by_few(o, i, geometry, dtype, data):
    "Of any shape, shared out in one of the likely ways."
    _, *how = data.draw(st.sampled_from(ops.few_configs((o, i), 1, geometry[0], ops.Gpu())[:30])).items()
    assert few_error(1, (o, i), dtype, dict(how), *geometry, on_cpu(*geometry)) < 1

def test_who_takes_one_token(monkeypatch):
    "A product alone is `few`'s where nothing was timed; a layer in one or five launches has `decode`'s configuration as before."
    monkeypatch.setattr(cuda, 'library', lambda *a: True); monkeypatch.setattr(ops, 'this_gpu', ops.Gpu)
    form = lambda *shape: layout.PackedMatrix(None, None, shape, (1, 128), 3, 'int8', 1.)
    for device in ('NVIDIA H200', 'NVIDIA H100 80GB HBM3'):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: device)
        assert ops.choose(form(7680, 2560), 1) == ops.choose_decode(form(7680, 2560)) == ops.tuned('H100')['7680x2560/int8-3/1']
        assert ops.choose(form(6144, 4096), 1)['backend'] == 'few' and ops.choose_decode(form(6144, 4096)) == ops.default_decode((6144, 4096), 1, bits=3)
        assert ops.choose(form(6144, 4096), 1, 'int8')['activations'] == 'int8' and ops.choose(form(7680, 2560), 512)['backend'] == 'prefill'
    monkeypatch.setattr(ops, 'this_gpu', lambda: ops.Gpu(89, 128, 101376)); monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA GeForce RTX 4090')
    assert ops.choose(form(4096, 14336), 1)['backend'] == 'few' and ops.choose_decode(form(4096, 14336)) is None and ops.choose(form(6144, 4096), 1)['backend'] == 'decode'

@settings(max_examples=15, deadline=None)
@given(o=st.integers(1, 140), i=st.integers(1, 90).map(lambda n: 8*n), geometry=st.sampled_from([(3, 'int8'), (3, 'float8_e4m3')]), M=st.integers(1, 75), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_products_of_any_shape(o, i, geometry, M, dtype):
    "By the kernel that a GPU would take for it, beside float64."
    p, x, c = layout.random_matrix(o, i, *geometry), torch.randn(M, i).to(dtype), ops.default_config((o, i), M, True, bits=geometry[0])
    y = getattr(cuda, c.pop('backend'))(x, p, lib=on_cpu(*geometry), **c)
    assert over(y, x, p) < 1

KINDS_OF_FLOAT = st.sampled_from([(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])   # the interpreter truncates to bfloat16

@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), D=st.integers(1, 1500), kind=KINDS_OF_FLOAT, left=st.integers(0, 3), scale=st.sampled_from([1e-4, 1, 3e4]))
def test_norms_and_gates_of_any_shape(rows, D, kind, left, scale):
    "Of parts of longer rows, beside float64 of what is rounded."
    dtype, limit = kind
    (x, y), w = torch.randn(2, rows, 2*D + left).to(dtype), torch.rand(D).to(dtype)
    x, y, up = x[:, left:left+D], y[:, :D], y[:, left+D:]
    norm = lambda h: h.double()*torch.rsqrt(h.double().square().mean(-1, keepdim=True) + .1)*w
    both, out = between.triton_norm(x, y, w, .1)
    assert distance(both, x.double() + y.double()) < limit and distance(out, norm(both)) < limit and distance(between.triton_norm(x, None, w, .1)[1], norm(x)) < limit
    assert distance(between.triton_gated(x, up), torch.nn.functional.silu(x.double())*up) < limit
    x, y, fp16 = x*scale, y*scale, torch.float16   # what is written as fp16 is the same, rounded to it
    for step in lambda to: between.triton_norm(x, y, w*scale, .1, to)[1], lambda to: between.triton_gated(x, up, to):
        assert torch.allclose(step(fp16), between.in_type(step(None), fp16), 0, 0, equal_nan=True)

@settings(max_examples=8, deadline=None)
@given(M=st.integers(1, 32), D=st.integers(1, 170).map(lambda n: 8*n), dtype=st.sampled_from([torch.float16, torch.bfloat16]), scale=st.sampled_from([.05, 1, 8]))
def test_norms_and_gates_write_integers(M, D, dtype, scale):
    "As `as_planes` makes them of the same numbers, but for what lies half-way between two; a product takes them."
    lib, x, up, w = on_cpu(3, 'int8'), *(scale*torch.randn(2, M, 1, D)).to(dtype), torch.rand(D).to(dtype)
    p = layout.random_matrix(24, D, 3, 'int8')
    for f in (lambda to: between.triton_norm(x, up, w, .1, to)[1], lambda to: between.triton_gated(x, up, to)):
        want, got = f(None), f(torch.int16)
        assert got.dtype == torch.int16 and got.shape == between.empty_for(x, torch.int16).shape and got.is_contiguous()
        room = got.new_empty(0).set_(got.untyped_storage())
        (q, steps), (exact, s) = read_planes(cuda.Planes(room.view(torch.uint8), M, dtype), D), rounded_as_planes(want.view(M, D))
        assert (q - exact).abs().max() <= 1 and (q != exact).double().mean() < .02 and torch.allclose(steps, s, 1e-6)
        assert near(cuda.few(cuda.Planes(got, M, dtype), p, lib=lib), want.view(M, D), p)

def planes_of(made, M, dtype, D):
    "What `read_planes` reads of a tensor of planes."
    room = made.new_empty(0).set_(made.untyped_storage())
    return read_planes(cuda.Planes(room.view(torch.uint8), M, dtype), D)

def ends(x, *numbers):
    "The same, with some numbers in the rows' first places."
    for row, v in zip(x, numbers): row[..., 1] = v
    return x

@settings(max_examples=12, deadline=None)
@given(M=st.integers(1, 32), D=st.integers(1, 170).map(lambda n: 8*n), dtype=st.sampled_from([torch.float16, torch.bfloat16]), scale=st.sampled_from([.05, 1, 8]), left=st.integers(0, 3))
def test_norms_and_gates_in_cuda(M, D, dtype, scale, left):
    "Of parts of longer rows: the sum is PyTorch's, planes are those of what is rounded to the type, as the same arithmetic in PyTorch makes it."
    lib, w = on_cpu(3, 'int8'), torch.rand(D).to(dtype)
    x, y = (scale*torch.randn(2, M, 2*D + 8*left)).to(dtype)
    x, y, up = x[:, 8*left:8*left + D], y[:, :D], y[:, D:2*D]
    for y in (y, None):
        both, made = cuda.norm_planes(x, y, w, .1, lib=lib)
        h = x if y is None else x + y
        assert torch.equal(both, h)
        h = h.float()
        near_planes(read_planes(made, D), ((h*torch.rsqrt((h*h).mean(-1, keepdim=True) + .1))*w).to(dtype))
    g = x.float()
    near_planes(read_planes(cuda.as_planes(x, lib, up=up), D), (g/(1 + torch.exp(-g))*up).to(dtype))
    for a, b in zip(read_planes(cuda.as_planes(x, lib), D), rounded_as_planes(x)): assert torch.equal(a, b)

def near_planes(made, want):
    "Beside planes of numbers that another order of sums may have rounded otherwise: a step of their type, where they are not the same."
    (q, steps), (exact, s) = made, rounded_as_planes(want)
    near = torch.isclose(q*steps[..., None], exact*s[..., None], 2.**-7 if want.dtype == torch.bfloat16 else 2.**-10, s.max().item())
    assert near.all() and torch.allclose(steps, s, 2.**-7)
    if q.numel() >= 512: assert (q != exact).double().mean() < .1 and (steps == s).double().mean() > .7   # of fewer one number can be a tenth

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_cuda_writes_what_triton_writes(dtype):
    "To the bit, where sums of squares are exact; the interpreter truncates to bfloat16, so those are of few bits. All that is not finite stays so."
    lib, M, D = on_cpu(3, 'int8'), 5, 520
    x, y = torch.randint(-3, 4, (2, M, D)).to(dtype)
    w = (2.**torch.randint(-2, 3, (D,))).to(dtype)
    x[1] = y[1] = 0; x[[0, 2, 3, 4], ::128] = 64; y[[0, 2, 3, 4], ::128] = 63; w[::128] = 1   # 32512 is 256 times 127
    for a, b in zip(x[:, None], y[:, None]):
        eps = 256 - ((a + b).float().square().sum()/D).item()            # all are divided by 16
        both, want = between.triton_norm(a, b, w, eps, torch.int16)
        got, made = cuda.norm_planes(a, b, w, eps, lib=lib)
        assert torch.equal(both, got)
        for p, q in zip(read_planes(made, D), planes_of(want, 1, dtype, D)): assert torch.equal(p, q)
    for f in (lambda v: cuda.norm_planes(v, y, w, .1, lib=lib)[1], lambda v: cuda.as_planes(v, lib, up=y), lambda v: cuda.as_planes(v, lib)):
        bad = ends(x.clone(), torch.nan, 0, torch.inf, -torch.inf)
        p = layout.random_matrix(24, D, 3, 'int8')
        finite = cuda.few(f(bad), p, lib=lib).isfinite()
        assert not finite[[0, 2, 3]].any() and finite[[1, 4]].all()

def test_norms_that_cuda_does_not_take(monkeypatch):
    "Rows off their 16 bytes, of odd widths or of weights in float32 are Triton's; a token too wide is refused."
    lib = on_cpu(3, 'int8'); monkeypatch.setattr(cuda, 'library', lambda *a: lib)
    x, w = torch.randn(3, 264).half(), torch.rand(264).half()
    takes = lambda *rows: between.planes_library(torch.int16, *rows) is lib
    assert takes(x, w) and takes(x[:, :256]) and takes(x[:1, :8], w) and not takes(x[:, 4:260]) and not takes(x[:, :252]) and not takes(x, w.float()) and not takes(x.float()) and not takes(x[:0])
    assert between.planes_library(torch.float16, x, w) is None
    wide = torch.randn(2, 16384).half()
    both, made = cuda.norm_planes(wide, None, torch.ones(16384).half(), 1e-5, lib=lib)
    near_planes(read_planes(made, 16384), between.rms_norm(wide, torch.ones(16384).half(), 1e-5))
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.norm_planes(torch.randn(1, 16392).half(), None, torch.ones(16392).half(), .1, lib=lib)
    for a, b in zip(between.either_norm(x, x, w.float(), .1, torch.int16), between.triton_norm(x, x, w.float(), .1, torch.int16)): assert a.shape == b.shape and a.dtype == b.dtype

@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 18), kv=st.integers(1, 2), heads=st.sampled_from([(1, 128), (3, 128), (2, 64), (4, 32), (1, 256), (4, 64)]), S=st.integers(2, 20), parts=st.integers(1, 3), normed=st.booleans(), data=st.data())
def test_attention_writes_integers(B, kv, heads, S, parts, normed, data):
    "In one part and in several: planes of what it writes in the type of its queries."
    (ratio, H), dtype = heads, torch.float16
    new, turns = [torch.randn(B, 1, n, H).to(dtype) for n in (kv*ratio, kv, kv)], torch.randn(2, S, H//2)
    caches, norms = torch.randn(2, B, S, kv, H).to(dtype), [.5 + torch.rand(H).to(dtype) for _ in range(2*normed)]
    at = torch.tensor(data.draw(st.lists(st.integers(-1, S-1), min_size=B, max_size=B)))
    step = lambda to: attention.triton_attention(*new, *turns, *caches.clone(), at, norms, .1, dtype=to, parts=parts, tile=16)
    assert attention.whole_blocks(*new[:2])
    want, got = step(None).flatten(2), step(torch.int16)
    assert got.shape == between.empty_for(want, torch.int16).shape and got.is_contiguous() and got.shape == attention.room_of(new[0], torch.int16).shape
    (q, steps), (exact, s) = planes_of(got, B, dtype, want.shape[2]), rounded_as_planes(want.flatten(0, 1))
    assert (q - exact).abs().max() <= 1 and (q != exact).double().mean() < .02 and torch.allclose(steps, s, 1e-6)

def test_who_writes_whole_blocks():
    heads = lambda T, N, n_kv, H: attention.whole_blocks(*(torch.empty(2, T, n, H) for n in (N, n_kv)))
    assert heads(1, 32, 8, 128) and heads(1, 32, 8, 64) and heads(1, 8, 8, 256) and heads(1, 8, 2, 32)
    assert not any(heads(*s) for s in ((2, 32, 8, 128), (1, 9, 3, 64), (1, 8, 8, 64), (1, 32, 8, 96), (1, 32, 8, 80), (1, 64, 8, 16)))

@pytest.mark.parametrize('H, products', [(96, 6), (64, 8)])
def test_a_step_of_several_texts_by_integers(H, products, monkeypatch):
    "A layer's norms and gate write planes, its products take them, and so does attention where it has whole blocks; else its output is converted: as without, but for roundings."
    torch.manual_seed(0)
    shape = dict(n_layers=2, d_model=136, d_ff=264, **HEADED[1] | dict(head_size=H))
    net, cache = normed_network('int8', torch.bfloat16, shape, 0)
    x, lib, seen = torch.randn(3, 1, 136).bfloat16(), on_cpu(3, 'int8'), []
    caches = [[tuple(torch.zeros(3, *t.shape[1:], dtype=t.dtype) for t in kv) for kv in cache] for _ in range(2)]
    def run(caches):
        y, h = None, x
        for layer, kv in zip(net.layers, caches): h, y = layer.terms(h, y, net.cos, net.sin, kv, torch.tensor([0, 3, 5]))
        return net.norm.added(h, y)[1]
    want = run(caches[0])
    monkeypatch.setattr(cuda, 'library', lambda *a: lib); monkeypatch.setattr(torch_linear, 'on_gpu', lambda *a: True); monkeypatch.setattr(between, 'on_gpu', lambda *a: True); monkeypatch.setattr(attention, 'on_gpu', lambda *a: True)
    monkeypatch.setattr(ops, 'choose', lambda p, M, *a: ops.few_configs(p.shape, M, p.bits, ops.Gpu(), True)[0])
    monkeypatch.setattr(cuda, 'few', lambda x, *a, few=cuda.few, **kw: seen.append(x) or few(x, *a, **kw)); monkeypatch.setitem(ops.HALVES, 'few', cuda.few)
    got = run(caches[1])
    assert sum(isinstance(x, cuda.Planes) for x in seen) == products   # qkv, gate and up, down of two layers, and o
    assert distance(got, want) < 3e-2 and distance(caches[1][1][0], caches[0][1][0]) < 3e-2

def test_operators_write_integers():
    "To `torch.compile` too, and a product of what they wrote is one of its nodes."
    x, w, p = torch.randn(3, 1, 264).bfloat16(), torch.rand(264).bfloat16(), layout.random_matrix(16, 264, 3, 'int8')
    args = [torch.int16], dict(test_utils=('test_schema', 'test_faketensor'))
    for op, given in ((between._norm, (x, w, .1)), (between._add_norm, (x, x, w, .1)), (between._gated, (x, x))): torch.library.opcheck(op, (*given, *args[0]), **args[1])
    with torch._subclasses.FakeTensorMode() as fake:
        y = ops.lut_linear(between._norm(*[fake.from_tensor(t) for t in (x, w)], .1, torch.int16), replace(p, data=fake.from_tensor(p.data), codebook=fake.from_tensor(p.codebook)), dtype=torch.bfloat16)
    assert y.shape == (3, 1, 16) and y.dtype == torch.bfloat16

@settings(max_examples=12, deadline=None)
@given(M=st.integers(1, 64), V=st.integers(1, 200), D=st.integers(1, 20).map(lambda n: 16*n))
def test_heads_of_any_shape(M, V, D):
    "Of several tokens and of one, beside float64."
    x, table, scale = torch.randn(M, D).half(), torch.randint(-127, 128, (V, D)).to(torch.int8), torch.rand(V) + .1
    want = x.double() @ table.double().T*scale
    assert distance(lm_head.rows_logits(x, table, scale), want) < 1e-5 and distance(lm_head.table_logits(x[0], table, scale, lib=on_cpu(3, 'int8')), want[0]) < 1e-5

@settings(max_examples=10, deadline=None)
@given(H=st.integers(4, 70).map(lambda n: 2*n), kv=st.integers(1, 3), ratio=st.integers(1, 5), S=st.integers(2, 90), parts=st.integers(1, 5), normed=st.booleans(), data=st.data())
def test_attention_of_any_shape(H, kv, ratio, S, parts, normed, data):
    "Of a token in three rows and of a prompt's tokens, beside array operations on float64 (norms and rotations of float32)."
    heads, T = [kv*ratio, kv, kv], data.draw(st.integers(2, S))
    turns, norms = torch.randn(2, S, H//2), [.5 + torch.rand(H) for _ in range(2*normed)]
    places, begin = data.draw(st.lists(st.integers(0, S-1), min_size=3, max_size=3)), data.draw(st.integers(0, S-T))
    for B,T,at,step in ((3, 1, places, lambda *a: attention.triton_attention(*a, parts=parts, tile=16)),
                        (1, T, range(begin, begin+T), lambda *a: cached_attention(*a, write=attention.triton_written))):
        new, cache = [torch.randn(B, T, n, H) for n in heads], [torch.randn(B, S, kv, H) for _ in range(2)]
        args = lambda kind, caches: (*(x.to(kind) for x in new), *turns.to(kind), *caches, torch.tensor([*at]), [w.to(kind) for w in norms], .1)
        exact = [x.double() for x in cache]
        want = cached_attention(*args(torch.float64, exact))
        got = step(*args(torch.float32, cache))
        assert distance(got, want) < 1e-5 and all(distance(a, b) < 1e-6 for a,b in zip(cache, exact))
        if T > 1: continue
        half = attention.triton_attention(*args(torch.float32, cache), parts=parts, tile=16, dtype=torch.float16)
        assert torch.equal(half, between.in_type(got, torch.float16))

MORE = [pytest.param(gpu, kind, marks=pytest.mark.slow) for gpu,kind in [*(((9, 0), k) for k in layout.KINDS), ((8, 9), 'int8'), ((12, 0), 'float8_e4m3')]]   # 10 to 30 seconds each

@pytest.mark.parametrize('capability, kind', [((8, 0), 'float8_e4m3'), ((10, 0), 'int8'), *MORE])
def test_nvcc_compiles_for(capability, kind):
    if not cuda.find_nvcc(): pytest.skip('no nvcc')
    assert cuda.build(3, kind, [cuda.find_nvcc(), *cuda.nvcc_flags(capability)]).stat().st_size > 1e5

def test_a_compiler_that_pip_brought(monkeypatch, tmp_path):
    "NVIDIA's wheels have neither a place on the path nor a runtime to link with."
    bin, lib = tmp_path/'cu13'/'bin', tmp_path/'cu13'/'lib'
    bin.mkdir(parents=True); lib.mkdir(); (bin/'nvcc').touch()
    monkeypatch.setattr(cuda.shutil, 'which', lambda name: None); monkeypatch.delenv('CUDA_HOME', raising=False)
    monkeypatch.setattr(cuda, 'find_spec', lambda name: None); assert str(tmp_path) not in str(cuda.find_nvcc())
    if Path('/usr/local/cuda/bin/nvcc').exists(): monkeypatch.setattr(cuda.Path, 'exists', lambda p, old=Path.exists: 'usr/local' not in str(p) and old(p))
    monkeypatch.setattr(cuda, 'find_spec', lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert cuda.find_nvcc() == str(bin/'nvcc') and '-cudart' not in cuda.nvcc_flags()
    (lib/'libcudart.so.13').touch(); assert f'-L{lib}' in cuda.nvcc_flags()

def test_integer_activations():
    torch.manual_seed(1)   # how much 8 bits lose depends on the draw
    lib, p, x = on_cpu(3, 'int8'), layout.random_matrix(64, 512, 3, 'int8'), torch.randn(2, 512).half()
    x[0, 7] = 900.                                                      # an outlier costs its own block, nothing else
    for act, limit in (('float', 5e-4), ('int8', 1.5e-2)): assert layout.relative_error(cuda.decode(x, p, activations=act, clusters=2, lib=lib), x, p) < limit, act

def test_refused_launches():
    lib, p, x = on_cpu(3, 'int8'), layout.random_matrix(32, 256, 3, 'int8'), torch.randn(1, 256).half()
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.decode(x, p, wide=17, lib=lib)
    with pytest.raises(RuntimeError, match='no such kernel'): cuda.decode(torch.randn(17, 256).half(), p, lib=lib)

def test_operator():
    p, x = layout.random_matrix(32, 256, 3, 'int8'), torch.randn(2, 3, 256)
    assert ops.lut_linear(x, p).shape == (2, 3, 32) and ops.lut_linear(x[:0], p).shape == (0, 3, 32)
    with pytest.raises(ValueError, match='takes 256 inputs'): ops.lut_linear(x[..., :8], p)
    with pytest.raises(ValueError, match="choose 'float' or 'int8'"): ops.lut_linear(x, p, 'int4')

def distance(a, b): return ((a.double() - b.double()).norm()/b.double().norm()).item()

@settings(max_examples=12, deadline=None)
@given(H=st.sampled_from(cuda.HEADS), kv=st.integers(1, 2), ratio=st.sampled_from([1, 2, 8]), at=st.integers(0, 70), ranks=st.sampled_from([1, 2, 4]), normed=st.booleans(),
       dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_attend(H, kv, ratio, at, ranks, normed, dtype):
    heads, place, limit = kv*ratio, torch.tensor([at]), 2e-3 if dtype == torch.float16 else 1.6e-2
    cos, sin = [torch.randn(80, H//2) for _ in range(2)]
    cache, qkv = [torch.randn(1, 80, kv, H).to(dtype) for _ in range(2)], (2*torch.randn(1, (heads + 2*kv)*H)).to(dtype)
    own, norms = [c.clone() for c in cache], [torch_model.RMSNorm(H, .1).to(dtype) for _ in range(2*normed)]   # an eps that counts
    for n in norms: n.weight.data = torch.rand(H).to(dtype)
    y = cuda.attend(qkv, cos, sin, own[0][0], own[1][0], place, [n.weight for n in norms], .1, ranks=ranks, lib=on_cpu(3, 'int8'))
    q, k, v = qkv.view(1, 1, -1, H).split([heads, kv, kv], 2)
    if normed: q, k = norms[0](q), norms[1](k)
    assert distance(y[0], cached_attention(q, k, v, cos, sin, *cache, place).flatten()) < limit
    assert distance(own[0], cache[0]) < limit and torch.equal(own[1], cache[1])

def normed_network(geometry, dtype, shape, before):
    "A small network with norms of queries and keys that say something, biases, and a cache."
    net = random_network(get_config('tiny', geometry=geometry, context_len=64, norm_eps=.01, **shape), dtype=dtype)
    for l in net.layers:
        for m in l.products(): m.bias = .1*torch.randn(sum(m.sizes), dtype=dtype)
        for n in (l.attn_norm, l.mlp_norm, l.attn.q_norm, l.attn.k_norm):
            if n is not None: n.weight.data = .5 + torch.rand_like(n.weight, dtype=dtype)
    cache = net.empty_cache()
    for kv in cache: [t[:, :before].normal_() for t in kv]
    return net, cache

def in_float64(net, x, cache, at):
    "A token through a network, its weights looked up, its activations in float64."
    exact, x = dequantized(net, torch.float64), x.double()
    for l, kv in zip(exact.layers, cache): x = l(x, net.cos, net.sin, [t.double() for t in kv], at)
    return x, exact.norm(x)

HEADED = [dict(n_heads=2, n_kv_heads=2, head_size=64, qk_norm=True), dict(n_heads=4, n_kv_heads=2, head_size=96, qk_norm=True), dict(n_heads=8, n_kv_heads=1, head_size=128, qk_norm=True),
          dict(n_heads=2, n_kv_heads=1, head_size=256, qk_norm=True), dict(n_heads=2, n_kv_heads=2, head_size=256, qk_norm=False)]

@pytest.mark.parametrize('i', range(len(HEADED)))
def test_a_layer_in_five_launches(i, monkeypatch):
    geometry, dtype, limit = ('int8', torch.float16, 2e-3) if i % 2 else ('lut-b', torch.bfloat16, 1.6e-2)
    net, [cache] = normed_network(geometry, dtype, dict(n_layers=1, d_model=136, d_ff=264, **HEADED[i]), 5*i)
    layer, x, at, other = net.layers[0], torch.randn(1, 1, 136, dtype=dtype), torch.tensor([5*i]), [c.clone() for c in cache]
    lib = on_cpu(3, layer.attn.qkv.packed.kind)
    monkeypatch.setattr(cuda, 'library', lambda *a: lib)
    monkeypatch.setattr(decode_layer, 'choose_decode', lambda p: dict(clusters=3, ranks=1 + i%2, wide=2))
    want, _ = in_float64(net, x, [cache], at)
    layer(x, net.cos, net.sin, cache, at)
    layer.fused = decode_layer.layer_args(layer)
    assert distance(layer(x, net.cos, net.sin, other, at), want) < limit and all(distance(a, b) < limit for a, b in zip(other, cache))
    how = dict(layer.fused, cos=net.cos, sin=net.sin, keys=other[0], values=other[1], at=at)
    torch.library.opcheck(decode_layer.decode_layer, (x,), how, test_utils=('test_schema', 'test_faketensor'))

@pytest.mark.parametrize('i', range(len(HEADED)))
def test_one_launch(i):
    geometry, dtype, limit = ('lut-b', torch.bfloat16, 1.6e-2) if i % 2 else ('int8', torch.float16, 2e-3)
    net, cache = normed_network(geometry, dtype, dict(n_layers=2, d_model=136, d_ff=264, **HEADED[i]), 7*i)
    y = x = torch.randn(1, 1, 136, dtype=dtype)
    at, other = torch.tensor([7*i]), [tuple(t.clone() for t in kv) for kv in cache]
    plan = megakernel.TokenPlan(net, other, blocks=9, warps=2, ranks=(1, 2, 1, 2), lib=on_cpu(3, net.layers[0].attn.qkv.packed.kind))
    got, (_, want) = plan.run(x, at), in_float64(net, x, cache, at)
    for l, kv in zip(net.layers, cache): y = l(y, net.cos, net.sin, kv, at)
    assert distance(got, want) < limit and all(distance(a, b) < limit for c, d in zip(other, cache) for a, b in zip(c, d))
    assert torch.equal(plan.run(x, at), got)

@pytest.mark.parametrize('geometry, parts', [('int8', 1), ('lut-b', 3)])
def test_a_step_that_converts_nothing(geometry, parts, monkeypatch):
    "Several texts of a bfloat16 network, by `few`: what is between the products writes fp16, every bit as if it were converted before, where it is beyond fp16, too."
    torch.manual_seed(0)
    net, _ = normed_network(geometry, torch.bfloat16, dict(n_layers=2, d_model=136, n_heads=4, n_kv_heads=2, head_size=64, d_ff=264), 5)
    lib, fp16, bf16, read, convert = on_cpu(3, net.layers[0].attn.o.packed.kind), torch.float16, torch.bfloat16, [], cuda._halved
    net.layers[1].mlp_norm.weight.data *= 1e5
    old, at, ids = net.empty_cache(3, 40), torch.tensor([9, -1, 4]), torch.randint(0, 99, (3, 6))
    for kv in old: [t.normal_() for t in kv]
    monkeypatch.setattr(cuda, 'library', lambda *a: lib)
    monkeypatch.setattr(cuda, '_halved', lambda x, *a: read.append(x) or convert(x, *a))
    monkeypatch.setattr(ops, 'choose', lambda p, M, *a: dict(backend='few', wide=4, deep=1, tj=1))
    monkeypatch.setattr(ops, '_multiply', lambda x, p, activations, dtype: ops.run_config(x, p, ops.choose(p, len(x)), dtype))
    monkeypatch.setattr(attention, 'cut_of', lambda *a, of=attention.cut_of: of(*a) | dict(parts=parts))
    def run(tokens, at, asks=True, kernels=True):
        "What comes out and the cache, and as what the products read their inputs."
        for module in (between, attention): monkeypatch.setattr(module, 'on_gpu', lambda *xs: kernels)
        monkeypatch.setattr(torch_linear, 'on_gpu', lambda x: asks)
        cache = [tuple(t.clone() for t in kv) for kv in old]
        read.clear()
        y = [net.hidden(tokens, cache, at), *(t for kv in cache for t in kv)]
        return y, [x.dtype for x in read], sum((x.abs() > 65000).sum().item() for x in read)
    for tokens, at, kinds in ((ids[:, :1], at, [fp16]*4), (ids, torch.arange(6), [fp16, bf16, fp16, fp16])):   # a step; prompts, whose attention is not our kernel
        (y, types, most), (want, before, _) = run(tokens, at), run(tokens, at, False)
        assert types == kinds*2 and before == [bf16]*8 and most > 0 and y[0].dtype == bf16 and y[0].isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(y, want))
        (y, types, _), (want, before, _) = run(tokens, at, kernels=False), run(tokens, at, False, False)   # by array operations
        assert types == kinds*2 and before == [bf16]*8 and all(torch.equal(a, b) for a, b in zip(y, want))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.to(torch_linear.read_type(net.layers[0].attn.o, x)), fullgraph=True, backend='aot_eager')
    monkeypatch.setattr(torch_linear, 'on_gpu', lambda x: True)
    assert compiled(torch.ones(1, 3, 256, dtype=bf16)).dtype == fp16 and compiled(torch.ones(1, 3, 256)).dtype == torch.float32
    for T in 4, 5, 7: assert compiled(torch.ones(1, T, 256, dtype=bf16)).dtype == bf16   # one program for any number of tokens: what a kernel reads is not known then

SHAPE = dict(n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, head_size=64, d_ff=512)

@pytest.mark.parametrize('change, geometry, dtype, words', [({}, 'int8', torch.float16, None), (dict(qk_norm=True, head_size=256), 'lut-b', torch.bfloat16, None),
    (dict(head_size=80), 'int8', torch.float16, 'heads have 80 numbers'), ({}, 'int8', torch.float32, 'activations are float32'), ({}, 'published', torch.float16, 'its codebooks'),
    (dict(d_model=250), 'int8', torch.float16, '250 inputs'), (dict(n_heads=64), 'int8', torch.float16, None), (dict(n_heads=128), 'int8', torch.float16, 'it has 128 heads')])
def test_why_a_network_takes_several_launches(change, geometry, dtype, words):
    net = random_network(get_config('tiny', geometry=geometry, **dict(SHAPE, **change)), dtype=dtype)
    why = megakernel.unplanned(net, processors=132)
    assert why is None if words is None else words in why

def test_why_layers_differ():
    net = random_network(get_config('tiny', geometry='3bit-8x64', qk_norm=True, **SHAPE), dtype=torch.float16)
    other = random_network(get_config('tiny', geometry='4bit-8x64', qk_norm=True, **SHAPE), dtype=torch.float16)
    ask = lambda: megakernel.unplanned(net, processors=132)
    net.layers[0].attn.q_norm.weight.data = net.layers[0].attn.q_norm.weight.float(); assert 'norm or bias is float32' in ask()
    net.layers[0].attn.q_norm.weight.data = torch.ones(128).half()[::2]; assert 'in one piece' in ask()
    net.layers[0] = other.layers[0]; assert ask() == 'its layers have different geometries'
    net.layers[0].mlp.down = net.layers[1].mlp.down; assert 'matrices have different geometries' in ask()
    net.layers[0].attn.o = net.layers[1].attn.o.dense(torch.float16); assert ask() == 'the matrix of o is not packed'
    assert megakernel.token_plan(net, net.empty_cache()) is None

def test_why_a_machine_has_no_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False); assert 'no NVIDIA GPU' in cuda.missing()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5)); assert cuda.missing() == 'this GPU has compute capability 7.5, and the kernels are for 8.0 and later'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 9))
    monkeypatch.setattr(cuda, 'find_nvcc', lambda: None); assert 'nativebit[nvcc]' in cuda.missing()
    net = random_network(get_config('tiny', geometry='int8', **SHAPE), dtype=torch.float16)
    on_gpu = SimpleNamespace(embed=SimpleNamespace(is_cuda=True), layers=net.layers, dtype=net.dtype, cfg=net.cfg)
    monkeypatch.setattr(megakernel, 'unplanned', lambda m: 'its heads are odd')
    for _ in range(2): assert megakernel.token_plan(on_gpu, []) is None
    assert capsys.readouterr().err == 'note: decoding in several launches, since its heads are odd\n'
    monkeypatch.setattr(megakernel, 'unplanned', lambda m: None); monkeypatch.setattr(megakernel, 'why_not', lambda *a: None)
    megakernel.token_plan(on_gpu, []); assert 'since this GPU has compute capability 8.9, and one launch is for 9.0' in capsys.readouterr().err
    dense = SimpleNamespace(embed=on_gpu.embed, layers=[SimpleNamespace(products=lambda: [None])])
    monkeypatch.setattr(megakernel, 'unplanned', lambda m: 'it is dense')
    megakernel.token_plan(dense, []); assert not capsys.readouterr().err

def test_a_compiled_step_takes_the_operators(monkeypatch):
    "All layers in one launch, the head and the choice as a GPU runs them, compiled and lane by lane: the same text as operation by operation."
    lib, calls = on_cpu(3, 'int8'), []
    torch.manual_seed(0)
    net = random_network(get_config('tiny', geometry='int8', n_layers=2, d_model=256, n_heads=2, n_kv_heads=1, head_size=128, d_ff=384, tied=False, context_len=32), dtype=torch.float16, embed='int8')
    for t in (net.embed, net.head): t.data = torch.randint_like(t, -127, 128)
    want = list(torch_decode.generate(torch_decode.Decoder(net), [1, 2, 3], 4))
    def plan(model, cache):
        megakernel.PLANS[cache[0][0].data_ptr()] = p = megakernel.TokenPlan(model, cache, blocks=3, warps=2, lib=lib)
        return p
    monkeypatch.setattr(torch_decode, 'token_plan', plan)
    monkeypatch.setattr(torch_model, 'fits', lambda *a: True)
    monkeypatch.setattr(cuda, 'library', lambda *a: calls.append(a) or lib)
    with torch._dynamo.config.patch(recompile_limit=1):                 # the second decoder runs what was compiled for the first
        for i in range(2): assert list(torch_decode.generate(torch_decode.Decoder(net, compile=True), [1, 2, 3], 4)) == want and len(set(want)) > 2
    assert len(calls) == 2*4                                            # the head of the prompt's last token and of three more

def test_numbers_may_come_late(monkeypatch):
    "Blocks that stumble, and numbers that arrive late and in any order, change no bit of several tokens."
    monkeypatch.setenv('FUZZ', '7')
    libs = on_cpu(3, 'int8'), compiled(3, 'int8', '-DFUZZ=atoi(getenv("FUZZ"))')
    for shape, plan in ((dict(n_layers=2, d_model=200, n_heads=2, n_kv_heads=1, head_size=128, d_ff=264), dict(blocks=5, warps=2, ranks=(1, 2, 1, 3))),
                        (dict(n_layers=2, d_model=136, n_heads=4, n_kv_heads=2, head_size=64, d_ff=400, qk_norm=True), dict(blocks=8, warps=1, ranks=(1, 1, 1, 4)))):
        net = random_network(get_config('tiny', geometry='int8', context_len=32, **shape), dtype=torch.float16)
        caches = [net.empty_cache() for _ in libs]
        plans = [megakernel.TokenPlan(net, c, lib=l, **plan) for c, l in zip(caches, libs)]
        for i in range(2):
            x, at = torch.randn(1, 1, shape['d_model']).half(), torch.tensor([i])
            a, b = [p.run(x, at) for p in plans]
            assert torch.equal(a, b) and a.isfinite().all()
        assert all(torch.equal(s, t) for c, d in zip(*caches) for s, t in zip(c, d))

AHEAD = '''
import triton
from nativebit.kernels import between, lm_head, triton_lut, triton_prefill
from nativebit.pytorch import attention
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
def ptx(fn, types, **const):
    names = fn.arg_names
    src = ASTSource(fn=fn, signature={n: types.get(n, 'constexpr') for n in names}, constexprs={(names.index(k),): v for k,v in const.items()})
    return triton.compile(src, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=4, num_stages=2)).asm['ptx']
for kind, unit, instruction in (('int8', 928, 'sub.rn.f16x2'), ('float8_e4m3', 800, 'cvt.rn.f16x2.e4m3x2')):
    const = dict(KB=4, BITS=3, E4M3=kind != 'int8', UNIT=unit, ASM=triton_lut.lookup_asm(3, kind))
    one = ptx(triton_lut.decode_kernel, dict(x='*i32', units='*i32', y='*fp16', O='i32', I='i32', scale='fp32'), BLOCKS=4, DOT=triton_lut.DOT, OVERLAP=True, **const)
    assert 'prmt.b32' in one and instruction in one and 'griddepcontrol.wait' in one
    many = ptx(triton_prefill.matmul_kernel, dict(x='*fp16', units='*i32', y='*fp16', M='i32', O='i32', I='i32', tiles='i32', scale='fp32'), BM=64, BN=64, GROUP=8, **const)
    assert 'wgmma' in many and instruction in many
half = dict.fromkeys('q k v q_norm k_norm keys values y x weight both out gate up'.split(), '*bf16') | dict.fromkeys('q_row k_row v_row cache_row x_row y_row gate_row up_row D T N'.split(), 'i32')
half |= dict(cos='*fp32', sin='*fp32', at='*i64', sums='*fp32', eps='fp32', scale='fp32')
only = lambda fn: {n: half[n] for n in fn.arg_names if n in half}
early, for_few, weighed = [], [], []   # kernels that start before the one before them has ended; those that write fp16 for a product; that of normed heads
for H, group, parts, normed in ((64, 4, 1, False), (80, 1, 4, True)):
    heads = dict(NORMED=normed, HALF=H//2, PAD=H//2 if H == 64 else 64)
    attend = lambda to, **kw: ptx(attention.decode_attention_kernel, only(attention.decode_attention_kernel) | dict(out=to, steps=to) | kw.pop('types', {}), **dict(dict(PARTS=parts, GROUP=group, ROWS=16, TILE=64, DOT=triton_lut.tl.bfloat16, EIGHTS=0, OVERLAP=True, **heads), **kw))
    (weighed if normed else early).append(attend('*bf16'))
    assert 'mma.sync' in (early + weighed)[-1] and 'bf16' in (early + weighed)[-1]
    if parts == 1: for_few.append(attend('*fp16'))
ptx(attention.write_kernel, only(attention.write_kernel), N=12, N_KV=3, ROWS=16, KV_ROWS=4, **heads)
early.append(ptx(lm_head.rows_kernel, dict(x='*bf16', table='*i8', scale='*fp32', y='*fp32', M='i32', V='i32', D='i32'), BM=16, BN=64, BK=128, OVERLAP=True))
for to, texts in (('*bf16', early), ('*fp16', for_few)):
    texts += [ptx(attention.join_kernel, dict(only(attention.join_kernel), out=to, steps=to), PARTS=3, MANY=4, HEADS=1, H=80, WIDE=128, EIGHTS=0, OVERLAP=True),
              ptx(between.norm_kernel, dict(only(between.norm_kernel), out=to, steps=to), ADD=True, BLOCK=2048, EIGHTS=0, OVERLAP=True),
              ptx(between.gate_kernel, dict(only(between.gate_kernel), out=to, steps=to), BLOCK=1024, EIGHTS=0, OVERLAP=True)]
for text in for_few:   # rounded to bf16, kept within fp16, NaN kept
    rounded, within, last = [text.find(word) for word in ('cvt.rn.bf16', 'min.NaN', 'cvt.rn.f16')]
    assert 0 < rounded < within < last
assert not any('cvt.rn.f16' in text for text in early)
planes = dict(out='*i8', steps='*fp32')
by_integers = [ptx(between.norm_kernel, only(between.norm_kernel) | planes, ADD=True, BLOCK=2048, EIGHTS=2, OVERLAP=True),
               ptx(between.gate_kernel, only(between.gate_kernel) | planes, BLOCK=1024, EIGHTS=1, OVERLAP=True),
               ptx(attention.join_kernel, only(attention.join_kernel) | planes, PARTS=3, MANY=4, HEADS=2, H=64, WIDE=64, EIGHTS=2, OVERLAP=True),
               *(attend('*i8', types=planes, NORMED=False, HALF=H//2, PAD=H//2, PARTS=1, GROUP=4, EIGHTS=2) for H in (64, 128))]
for text in early + for_few + by_integers + weighed:   # nothing is read or written before, but for weights of norms
    before, after = text.split('griddepcontrol.wait')
    first = before.split('.visible .entry')[1].split(')', 1)[1]
    assert 'griddepcontrol.launch_dependents' in before and 'st.global' not in first and 'ld.global' in after and ('ld.global' in first) == (text in weighed)
print('compiled')
'''

def test_triton_compiles_for_hopper_without_one(tmp_path):
    (tmp_path/'ahead.py').write_text(AHEAD)
    env = {k: v for k,v in os.environ.items() if k != 'TRITON_INTERPRET'}
    r = subprocess.run([sys.executable, tmp_path/'ahead.py'], env=dict(env, PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path/'cache')), capture_output=True, text=True)
    assert r.stdout.strip() == 'compiled', r.stderr[-2000:]

TWICE = """
import runpy, sys
_, path, *more = sys.argv
sys.path[0] = path.rpartition('/')[0]
for sys.argv in ([path, '--help'], *[[path]]*len(more)):
    try: runpy.run_path(path, run_name='__main__')
    except SystemExit as e: print(e.code)
"""

@pytest.mark.parametrize('script', ['bench.py', 'bench_few.py', 'bench_timeline.py', 'bench_models.py', 'tune.py'])
def test_scripts(script, tmp_path):
    "Its help, and where there is no GPU its refusal: one process, which imports PyTorch once."
    alone = not torch.cuda.is_available()
    r = subprocess.run([sys.executable, '-c', TWICE, ROOT/'kernels'/script, *['and refuse']*alone], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0 and '--rehearse' in r.stdout and 'Traceback' not in r.stderr, r.stderr
    said = r.stdout + r.stderr
    if alone: assert ('needs an NVIDIA GPU' in said or 'measures an NVIDIA GPU' in said) and r.stdout.splitlines()[-1] not in ('0', 'None'), said
