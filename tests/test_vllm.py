"The plugin for vLLM. What needs vLLM is skipped without it; how packed matrices are split over ranks needs nothing."
import json, os, subprocess, sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
import ml_dtypes, numpy as np, pytest
from nativebit.config import GEOMETRIES, QuantConfig
from nativebit.formats.hf_folder import open_folder, save_folder, stored_linear, stored_rows
from nativebit.formats.share import check_borders, range_of, sample_sums, share_of
from nativebit.formats.size import DTYPES, matrix_stored
from nativebit.formats.bitpacking import QuantizedTensor
from nativebit.quant.blocks import block_of
from nativebit.utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
needs_vllm = pytest.mark.skipif(find_spec('vllm') is None, reason="vLLM is not installed: pip install 'nativebit[vllm]'")

def random_matrix(rng, shape, quant):
    "A packed matrix of random content."
    def array(k, x):
        if k == 'words': return rng.integers(0, 2**32, x.shape, np.uint32)
        if k == 'scale': return rng.uniform(1e-3, 2e-3, x.shape).astype(DTYPES[x.dtype])
        return rng.uniform(-100, 100, x.shape).astype(DTYPES[x.dtype])
    parts = {k: array(k, x) for k,x in matrix_stored(shape, quant).items()}
    return QuantizedTensor(parts['words'], parts['codebook'], parts.get('scale'), shape, block_of(quant.block_shape, shape))

@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('ranks', [1, 2, 4, 8])
def test_shares_of_a_layer(geometry, ranks):
    "Queries of 16 heads, keys and values of 4 (fewer than 8 ranks), gate and up, and what comes back by columns: equal to slices of the looked-up matrices."
    rng, quant, H, D, F = np.random.default_rng(0), QuantConfig(**GEOMETRIES[geometry]), 64, 512, 2048
    heads = dict(q=16, k=4, v=4)
    for name, n in heads.items():
        q, size = random_matrix(rng, (n*H, D), quant), max(n//ranks, 1)*H
        w = q.dequantize()
        for r in range(ranks):
            head = r*n//ranks if n >= ranks else r//(ranks//n)
            assert np.array_equal(share_of(q, range_of(name, n*H, size, r, ranks), (0, D), name).dequantize(), w[head*H:head*H + size])
    for name in 'gate', 'up':
        q = random_matrix(rng, (F, D), quant)
        got = [share_of(q, range_of(name, F, F//ranks, r, ranks), (0, D)).dequantize() for r in range(ranks)]
        assert np.array_equal(np.concatenate(got), q.dequantize())
    for name, columns in dict(o=16*H, down=F).items():
        q, step, width = random_matrix(rng, (D, columns), quant), columns//ranks, block_of(quant.block_shape, (D, columns))[1]
        cut = lambda r: share_of(q, (0, D), range_of(name, columns, step, r, ranks), name).dequantize()
        if step % width == 0: assert np.array_equal(np.concatenate([cut(r) for r in range(ranks)], 1), q.dequantize())
        else:
            with pytest.raises(UserError, match=f"{name} can't be split at column {step}: its blocks of .* × {width} end at multiples of {width}"): cut(0)

def test_shares_by_torch():
    torch = pytest.importorskip('torch')
    from nativebit.pytorch.linear import as_tensor
    for g in GEOMETRIES:
        q = random_matrix(np.random.default_rng(1), (64, 512), QuantConfig(**GEOMETRIES[g]))
        t = q.map(as_tensor)
        assert np.array_equal(share_of(t, (8, 40), (0, 512)).dequantize().numpy(), q.dequantize()[8:40]) and sample_sums(t) == sample_sums(q)

@pytest.mark.parametrize('rows, columns, says', [((0, 4), (0, 256), 'row 4: its blocks of 8 × 64 end at multiples of 8'), ((8, 20), (0, 256), 'row 20'), ((0, 60), (32, 256), 'column 32'), ((0, 60), (0, 200), 'column 200')])
def test_odd_borders_are_named(rows, columns, says):
    with pytest.raises(UserError, match="model.layers.3.mlp.down_proj can't be split at " + says): check_borders('model.layers.3.mlp.down_proj', (60, 256), (8, 64), rows, columns)

def test_borders_at_the_end(): check_borders('x', (60, 200), (8, 64), (56, 60), (192, 200))

def test_shares_that_do_not_come_out_even():
    for full, size, ranks in [(100, 33, 3), (128, 0, 2), (128, 96, 2), (64, 128, 1)]:
        with pytest.raises(UserError, match=f'x has {full} rows or columns'): range_of('x', full, size, 0, ranks)

def test_without_vllm_one_sentence():
    r = subprocess.run([sys.executable, '-c', "import sys; sys.modules['vllm'] = None; import nativebit.serving.vllm"], capture_output=True, text=True)
    assert r.stderr.splitlines()[-1] == "ImportError: nativebit.serving.vllm needs vLLM 0.26: pip install 'nativebit[vllm]'"

def test_the_entry_point_names_register():
    assert "'vllm.general_plugins': ['nativebit = nativebit.serving.vllm:register']" in (ROOT/'setup.py').read_text()
    assert 'def register():' in (ROOT/'nativebit'/'serving'/'vllm.py').read_text()
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini')
    assert 'vllm>=0.26' in cfg['DEFAULT']['vllm_requirements']

@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('M', [1, 2, 16, 17, 64])
@pytest.mark.parametrize('kind', ['int8', 'float8_e4m3'])
def test_products_of_an_8b_take_the_kernel_for_few(kind, M, ranks):
    "From one text to 64, on an H200, whole and split: no product of Llama-3.1-8B's falls back to what is made for prompts, and none asks for more memory than a block has."
    pytest.importorskip('torch')
    from nativebit.kernels import ops
    table, gpu = ops.tuned('NVIDIA H200'), ops.Gpu()
    for shape in (6144//ranks, 4096), (4096, 4096//ranks), (28672//ranks, 4096), (4096, 14336//ranks):
        c = table.get(ops.config_key(shape, 3, kind, M)) or ops.default_config(shape, M, True, 'float', 3, gpu)
        assert c['backend'] == 'few', (shape, c)
        assert ops.few_takes(c, M, 90) and ops.few_bytes(-(-shape[0]//16), -(-shape[1]//128), M, 3, c) <= gpu.shared

@needs_vllm
def test_logits_of_rows_come_from_the_kernel_that_reads_bytes(monkeypatch):
    "On a GPU in half precision, up to 64 texts; elsewhere from rows made float, as exactly."
    import torch
    from nativebit.serving import vllm as plugin
    asked, codes = [], torch.randint(-127, 128, (9000, 64), dtype=torch.int8)
    scale = torch.rand(9000) + .5
    monkeypatch.setattr(plugin, 'lm_head_rows', lambda x, c, s: asked.append(len(x)))
    class OnGpu:   # all that is looked at
        is_cuda = True
        def __init__(self, n, dtype=torch.bfloat16): self.n, self.dtype = n, dtype
        def __len__(self): return self.n
    for n in 1, 16, 64: plugin.rows_product(OnGpu(n), codes, scale)
    assert asked == [1, 16, 64]
    for n in 3, 65:
        x = torch.randn(n, 64)
        want = x.double() @ (codes.double()*scale.double()[:, None]).T
        got = plugin.rows_product(x, codes, scale)
        assert got.dtype == torch.float32 and (got - want).norm() < 1e-6*want.norm()
    assert asked == [1, 16, 64]

SHAPE = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=256, hidden_act='silu', bos_token_id=1, eos_token_id=2)

def write_folders(tmp, geometry='int8', embed='', tied=False, overrides=(), **change):
    "A packed folder of random matrices, and the same network in float."
    c, rng, half = SHAPE | dict(tie_word_embeddings=tied) | change, np.random.default_rng(0), ml_dtypes.bfloat16
    quant = QuantConfig(**GEOMETRIES[geometry], overrides=overrides)
    D, F, V, q, kv = c['hidden_size'], c['intermediate_size'], c['vocab_size'], c['num_attention_heads']*c['head_dim'], c['num_key_value_heads']*c['head_dim']
    sizes = {'self_attn.q_proj': (q, D), 'self_attn.k_proj': (kv, D), 'self_attn.v_proj': (kv, D), 'self_attn.o_proj': (D, q), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D), 'mlp.down_proj': (D, F)}
    def table(P):
        w = (rng.standard_normal((V, D))*.5).astype(np.float32)
        yield from stored_rows(P, w, embed) if embed else [(f'{P}.weight', w.astype(half))]
    def tensors():
        yield from table('model.embed_tokens')
        for i in range(c['num_hidden_layers']):
            for n, shape in sizes.items():
                P = f'model.layers.{i}.{n}'
                if (own := quant.of(P)) is None: yield f'{P}.weight', (rng.standard_normal(shape)*.05).astype(half)
                else: yield from stored_linear(P, random_matrix(rng, shape, own))
            for n in 'input', 'post_attention': yield f'model.layers.{i}.{n}_layernorm.weight', np.ones(D, half)
        yield 'model.norm.weight', np.ones(D, half)
        if not tied: yield from table('lm_head')
    save_folder(tmp/'packed', c, quant, tensors(), embed=embed, max_shard=200_000)
    f = open_folder(tmp/'packed')
    from nativebit.utils.safetensors import save_arrays
    (tmp/'float').mkdir()
    (tmp/'float'/'config.json').write_text(json.dumps(c | dict(dtype='bfloat16')))
    loose = [n for n in f.tensors if n.rpartition('.')[0] not in f.linears and not n.endswith('_scale')]
    save_arrays(tmp/'float'/'model.safetensors', {n: np.asarray(f.float_tensor(n)).astype(half) for n in loose} | {f'{P}.weight': f.tensor(P).dequantize().astype(half) for P in f.linears})
    return tmp/'packed', tmp/'float'

def start(folder, tmp, ranks=1):
    "The logits that vLLM's model gives; or what it says."
    env, store = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}, tmp/f'store-{folder.name}-{ranks}'
    jobs = [subprocess.Popen([sys.executable, ROOT/'tests'/'vllm_rank.py', str(r), str(ranks), folder, store, tmp/'logits.npy'], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(ranks)]
    said = [j.communicate(timeout=600)[1] for j in jobs]
    if any(j.returncode for j in jobs): raise RuntimeError('\n'.join(said))
    return np.load(tmp/'logits.npy')

CASES = {'int8': dict(), 'lut-b': dict(geometry='lut-b'), 'published, tied': dict(geometry='published', tied=True), 'int8 rows, tied': dict(embed='int8', tied=True), 'rows of 6 bits': dict(geometry='4bit-8x64', embed='6'),
         'a mixture': dict(overrides=(('model.layers.0.self_attn.v_proj', '4bit'), ('model.layers.1.mlp.*', 'float'))), 'one head of keys': dict(num_key_value_heads=1, geometry='2bit-8x64')}

@needs_vllm
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('ranks', [1, 2])
def test_vllm_loads_what_was_packed(tmp_path, case, ranks):
    packed, dense = write_folders(tmp_path, **CASES[case])
    want, got = start(dense, tmp_path), start(packed, tmp_path, ranks)   # each rank has compared its matrices by then
    assert np.linalg.norm(got - want) < .03*np.linalg.norm(want), case

@needs_vllm
@pytest.mark.parametrize('ranks, change, says', [
    (2, dict(geometry='3bit-row'), r"self_attn.o_proj can't be split at column 128: its blocks of 1 × 256 end at multiples of 256; use fewer devices"),
    (1, dict(overrides=(('model.layers.0.self_attn.v_proj', 'float'),)), 'self_attn.q_proj is packed and model.layers.0.self_attn.v_proj is in float'), (1, 'lost', 'index names'), (1, 'turned', 'its checksum does not match'), (1, 'norm', 'its checksum does not match')])
def test_vllm_refuses(tmp_path, ranks, change, says):
    packed, _ = write_folders(tmp_path, **(change if isinstance(change, dict) else {}))
    if change == 'lost': (packed/'model-00002-of-00005.safetensors').unlink() if (packed/'model-00002-of-00005.safetensors').exists() else sorted(packed.glob('*.safetensors'))[1].unlink(); says = 'model-0000'
    if change in ('turned', 'norm'):
        for p in sorted(packed.glob('*.safetensors')):
            data, n = bytearray(p.read_bytes()), int.from_bytes(p.read_bytes()[:8], 'little')
            head = json.loads(data[8:8 + n])
            if name := next((k for k in head if k.endswith('norm.weight' if change == 'norm' else 'up_proj.codebook')), None):
                data[8 + n + head[name]['data_offsets'][0]] ^= 1
                p.write_bytes(data); break
    with pytest.raises(RuntimeError, match=says): start(packed, tmp_path, ranks)

FAKE = '''
import json
from pathlib import Path
from types import SimpleNamespace as Some
__version__ = 'fake'
SamplingParams = Some
class LLM:
    def __init__(self, folder, profiler_config, **kw):
        assert 'broken' not in folder, 'a broken engine'
        self.traces = Path(profiler_config['torch_profiler_dir'])
        self.llm_engine = Some(vllm_config=Some(compilation_config=Some(cudagraph_mode=''), model_config=Some(quantization=None), use_v2_model_runner=True))
        self.ranks = kw['tensor_parallel_size']
        self.odd = -.05 if 'near' in folder else -3.
    def generate(self, texts, params, use_tqdm):   # from the fifth token on two GPUs choose otherwise
        def one(k):
            tokens = [7 if self.ranks == 2 and i >= 5 and k == 0 else 4 for i in range(params.max_tokens)]
            return Some(token_ids=tokens, logprobs=[{t: Some(logprob=-1.), 11 - t: Some(logprob=-1. + self.odd)} for t in tokens])
        return [Some(outputs=[one(k)]) for k,_ in enumerate(texts)]
    def start_profile(self): self.traces.mkdir(parents=True)
    def stop_profile(self):
        events = [dict(cat='kernel', name=n, dur=500) for n in 'aab'*2] + [dict(cat='cuda_runtime', name='cudaGraphLaunch', dur=1)]*2
        (self.traces/'t.json').write_text(json.dumps(dict(traceEvents=events)))
'''

def test_a_race_of_engines(tmp_path):
    "The program for a GPU, with an engine that does nothing: in turns, 16 texts first, and one that fails stops nobody."
    (tmp_path/'vllm.py').write_text(FAKE)
    for n in 'one', 'broken', 'two':
        (tmp_path/n).mkdir(); (tmp_path/n/'config.json').write_text('{"vocab_size": 99}')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)]), 'RESULTS': str(tmp_path/'rows')}
    r = subprocess.run([sys.executable, ROOT/'tests'/'vllm_gpu.py', 'race', '40', *(str(tmp_path/n) for n in ('one', 'broken', 'two'))], env=env, capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and 'a broken engine' in r.stderr, r.stderr
    rows = [json.loads(line) for line in (tmp_path/'rows').read_text().splitlines()]
    failed, = [r for r in rows if 'failed' in r]
    assert Path(failed['failed']).name == 'broken' and failed['why'][-1] == 'AssertionError: a broken engine'
    timed = [(r['folder'], r.get('batch', 'kernels')) for r in rows if 'batch' in r or 'kernels' in r]
    assert timed == [(n, b) for b in (16, 1, 64, 'kernels') for n in ('one', 'two')]
    assert [Path(f).name for f in rows[-1]['in time']] == ['one', 'two']
    last = rows[-2]
    assert (last['steps'], last['ms'], last['launches'], last['most']) == (2, 1.5, 3., [['a', 1., 2.], ['b', .5, 1.]])

def test_a_contender_has_its_own_type_and_level(monkeypatch):
    from vllm_gpu import Contender, subprocess
    asked = []
    class Job:
        def __init__(self, words, env, **kw): asked.append((words[3], *(env.get(k) for k in ('DTYPE', 'LEVEL', 'TORCH_COMPILE_DISABLE')))); self.stdout = self.stderr = []
        def wait(self): return 0
    monkeypatch.setattr(subprocess, 'Popen', Job)
    for k in 'DTYPE', 'LEVEL': monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('TORCH_COMPILE_DISABLE', '1')
    for f in '8b', '8b:float16', '8b::2', '8b:float16:2', '8b::0': Contender(f)
    assert asked == [('8b', None, None, '1'), ('8b', 'float16', None, '1'), ('8b', None, '2', '0'), ('8b', 'float16', '2', '0'), ('8b', None, '0', '1')]

@pytest.mark.parametrize('name, ok', [('near', True), ('far', False), ('broken', False)])
def test_texts_of_one_gpu_and_of_two(tmp_path, name, ok):
    "Where they part, both choices have to be nearly as likely."
    (tmp_path/'vllm.py').write_text(FAKE)
    (tmp_path/name).mkdir(); (tmp_path/name/'config.json').write_text('{"vocab_size": 99}')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)]), 'RESULTS': str(tmp_path/'rows')}
    r = subprocess.run([sys.executable, ROOT/'tests'/'vllm_gpu.py', 'split', '40', tmp_path/name], env=env, capture_output=True, text=True, timeout=60)
    last = json.loads((tmp_path/'rows').read_text().splitlines()[-1])
    assert (r.returncode == 0, last['ok']) == (ok, ok), r.stderr
    if name != 'broken': assert last['same_tokens'] == [5] + 7*[32] and last['gaps'] == [.05 if ok else 3.]
