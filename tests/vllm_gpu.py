"""What vLLM makes of a packed folder on a GPU: the text of transformers on the same folder, and tokens a second beside bfloat16.

vllm_gpu.py kernels                   compile the CUDA kernels of both geometries, once for all processes
vllm_gpu.py build DIR [1b|8b] [GEOMETRY]  a random packed folder of Llama-3.2-1B's or Llama-3.1-8B's shape, and DIR-float: its config.json alone
vllm_gpu.py reference DIR OUT         greedy tokens and their log probabilities by transformers (nativebit.hf)
vllm_gpu.py serve DIR RANKS [OUT]     by vLLM: tokens a second of 1, 16 and 64 texts, and the text compared with OUT and with one GPU's; of DIR-float vLLM draws random weights

Each says what it found in lines of JSON, as soon as it knows, and appends them to the file that RESULTS names. EAGER=1 runs vLLM without CUDA graphs, NEW sets how many tokens a text gets.
(`python3 tests/vllm_gpu.py …`; vLLM and this package have to be importable, and the package installed, so that vLLM sees its entry point.)"""
import json, os, sys, time
# no network; NVLink multicast stays off: neither vLLM's symmetric memory nor NCCL's may use it
os.environ.update(HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1', VLLM_ALLREDUCE_USE_SYMM_MEM='0', VLLM_ALLREDUCE_USE_FLASHINFER='0', VLLM_USE_NCCL_SYMM_MEM='0', NCCL_NVLS_ENABLE='0', TORCH_SYMM_MEM_DISABLE_MULTICAST='1')
# every process is a fresh one; nothing is handed to torch.compile; of the plugins only ours
for k, v in dict(VLLM_WORKER_MULTIPROC_METHOD='spawn', TORCH_COMPILE_DISABLE='1', VLLM_PLUGINS='nativebit').items(): os.environ.setdefault(k, v)
from pathlib import Path
import ml_dtypes, numpy as np

SHAPES = {'1b': dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
          '8b': dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
          'tiny': dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)}   # to try this program
COMMON = dict(architectures=['LlamaForCausalLM'], model_type='llama', rms_norm_eps=1e-5, rope_theta=500000., max_position_embeddings=8192, hidden_act='silu', attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_id=2)
BATCHES, REPEATS = (1, 16, 64), 2
NEW, SHORT = int(os.environ.get('NEW', 256)), 32   # tokens of a timed text; of the first ones, which are compared
BEGUN = time.perf_counter()

def say(**row):
    "A line of what is known, on the screen and in the file."
    line = json.dumps(dict(what=sys.argv[1], at=round(time.perf_counter() - BEGUN, 1)) | row)
    print(line, flush=True)
    if path := os.environ.get('RESULTS'):
        with open(path, 'a') as f: f.write(line + '\n')

def kernels():
    "Compile, or find compiled."
    from concurrent.futures import ThreadPoolExecutor
    from nativebit.kernels.cuda import library
    with ThreadPoolExecutor() as pool: there = list(pool.map(lambda kind: library(3, kind) is not None, kinds := ('int8', 'float8_e4m3')))
    say(compiled=dict(zip(kinds, there)))

def pools(rng, quant, sizes):
    "Random numbers for each part of a packed matrix, a few more than the largest one takes."
    from nativebit.formats.size import DTYPES, matrix_stored
    largest = matrix_stored(max(sizes, key=np.prod), quant)
    n, K = len_of(largest['codebook']) + 9999, quant.n_entries
    codes = rng.integers(-127, 128, (n, K)) if quant.codebook_dtype == 'int8' else rng.standard_normal((n, K), np.float32)*60
    found = dict(words=np.frombuffer(rng.bytes(4*(len_of(largest['words']) + 9999)), np.uint32), codebook=np.sort(codes, 1).astype(DTYPES[largest['codebook'].dtype]))
    return found | ({'scale': (rng.uniform(.8, 1.2, n)/70/48).astype(DTYPES[largest['scale'].dtype])} if 'scale' in largest else {})

def len_of(stored): return stored.shape[0]

def cut(pool, shape, quant, k):
    "A packed matrix whose weights are as large as trained ones: another part of the pools for each `k`."
    from nativebit.formats.bitpacking import QuantizedTensor
    from nativebit.formats.size import matrix_stored
    from nativebit.quant.blocks import block_of
    at = 31*k % 9999
    parts = {n: pool[n][at:at + len_of(s)] for n, s in matrix_stored(shape, quant).items()}
    return QuantizedTensor(parts['words'], parts['codebook'], parts.get('scale'), shape, block_of(quant.block_shape, shape))

def table(rng, P, rows, width):
    "An embedding of int8 rows: some are drawn, the others are these turned by a few places."
    from nativebit.formats.hf_folder import stored_rows
    drawn = rng.standard_normal((min(rows, 8192), width), np.float32)*.05
    turns = -(-rows//len(drawn))
    for name, x in stored_rows(P, drawn, 'int8'): yield name, (np.concatenate([np.roll(x, k, 1) for k in range(turns)]) if x.ndim == 2 else np.tile(x, turns))[:rows]

def build(folder, shape='1b', geometry='int8'):
    "The two folders."
    from nativebit.config import GEOMETRIES, QuantConfig
    from nativebit.formats.hf_folder import save_folder, stored_linear
    c, rng, quant, half = COMMON | SHAPES[shape], np.random.default_rng(0), QuantConfig(**GEOMETRIES[geometry]), ml_dtypes.bfloat16
    D, F, q, kv = c['hidden_size'], c['intermediate_size'], c['num_attention_heads']*c['head_dim'], c['num_key_value_heads']*c['head_dim']
    sizes = {'self_attn.q_proj': (q, D), 'self_attn.k_proj': (kv, D), 'self_attn.v_proj': (kv, D), 'self_attn.o_proj': (D, q), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D), 'mlp.down_proj': (D, F)}
    pool = pools(rng, quant, sizes.values())
    def tensors():
        yield from table(rng, 'model.embed_tokens', c['vocab_size'], D)
        for i in range(c['num_hidden_layers']):
            for k, (n, s) in enumerate(sizes.items()): yield from stored_linear(f'model.layers.{i}.{n}', cut(pool, s, quant, 7*i + k))
            for n in 'input', 'post_attention': yield f'model.layers.{i}.{n}_layernorm.weight', np.ones(D, half)
        yield 'model.norm.weight', np.ones(D, half)
        if not c['tie_word_embeddings']: yield from table(rng, 'lm_head', c['vocab_size'], D)
    save_folder(folder, c, quant, tensors(), embed='int8')
    beside = Path(f'{folder}-float'); beside.mkdir(exist_ok=True)
    (beside/'config.json').write_text(json.dumps(c | dict(dtype='bfloat16')))
    say(bytes=sum(p.stat().st_size for p in Path(folder).glob('*.safetensors')), geometry=geometry, shape=shape)

def prompts(folder):
    "64 texts of 32 random tokens."
    V = json.loads((Path(folder)/'config.json').read_text())['vocab_size']
    return [[1, *np.random.default_rng(k).integers(3, V, 31).tolist()] for k in range(64)]

def reference(folder, out):
    "Greedy tokens of transformers, and the log probability of each."
    import nativebit.hf, torch
    from transformers import AutoModelForCausalLM
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    m, rows = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device), []
    say(phase='loaded')
    for p in prompts(folder)[:4]:
        with torch.no_grad():
            ids = m.generate(torch.tensor([p], device=device), max_new_tokens=SHORT, min_new_tokens=SHORT, do_sample=False)
            logp = m(ids).logits[0].float().log_softmax(-1)
        rows.append(dict(ids=ids[0].tolist(), logp=logp[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()))
    Path(out).write_text(json.dumps(rows))
    say(texts=len(rows), types=sorted({type(x).__name__ for x in m.modules() if 'NativeBit' in type(x).__name__}))

def engine(folder, ranks):
    "vLLM as both contenders have it: CUDA graphs of the three batches, vLLM's own kernels, nothing compiled."
    from vllm import LLM
    graphs = dict(enforce_eager=True) if os.environ.get('EAGER') == '1' else dict(compilation_config=dict(cudagraph_mode='FULL_DECODE_ONLY', cudagraph_capture_sizes=list(BATCHES)))
    dummy = dict(load_format='dummy') if str(folder).endswith('-float') else {}
    # the room for keys and values is said, so that nothing has to be measured first
    return LLM(str(folder), skip_tokenizer_init=True, dtype='bfloat16', max_model_len=1024, max_num_seqs=max(BATCHES), max_num_batched_tokens=2048, kv_cache_memory_bytes=10 << 30, gpu_memory_utilization=.4,
               tensor_parallel_size=ranks, disable_custom_all_reduce=True, enable_prefix_caching=False, optimization_level=0, **graphs, **dummy)

def asked(llm, texts, **kw):
    from vllm import SamplingParams
    return llm.generate([dict(prompt_token_ids=p) for p in texts], SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **kw), use_tqdm=False)

def timed(llm, texts, new):
    "Seconds of the fastest repeat."
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        r = asked(llm, texts, max_tokens=new)
        seconds.append(time.perf_counter() - begun)
        assert sum(len(x.outputs[0].token_ids) for x in r) == len(texts)*new
    return min(seconds)

def speed(llm, folder, row):
    "Tokens a second with the prompt's part, and milliseconds of a step without it."
    for n in BATCHES:
        texts = prompts(folder)[:n]
        asked(llm, texts, max_tokens=8)
        short, long = timed(llm, texts, SHORT), timed(llm, texts, NEW)
        say(**row, batch=n, tokens_per_second=round(n*NEW/long, 1), ms_per_step=round(1e3*(long - short)/(NEW - SHORT), 3))

def agreed(got, want): return [next((k for k, (a, b) in enumerate(zip(g, w)) if a != b), len(w)) for g, w in zip(got, want)]

def text(llm, folder, out, row):
    "Greedy tokens of vLLM against transformers' and one GPU's, and the log probabilities that it gives transformers' text."
    rows, single = json.loads(Path(out).read_text()), Path(f'{out}.vllm')
    got = [list(r.outputs[0].token_ids) for r in asked(llm, prompts(folder)[:len(rows)], max_tokens=SHORT)]
    if row['ranks'] == 1: single.write_text(json.dumps(got))
    same = dict(same_as_transformers=agreed(got, [r['ids'][-SHORT:] for r in rows])) | (dict(same_as_one_gpu=agreed(got, json.loads(single.read_text()))) if single.exists() else {})
    say(**row, same_tokens_of=SHORT, **same, tokens=got)
    scored = asked(llm, [r['ids'] for r in rows], max_tokens=1, prompt_logprobs=0)
    off = [abs(s.prompt_logprobs[k + 1][r['ids'][k + 1]].logprob - x) for s, r in zip(scored, rows) for k, x in enumerate(r['logp'])]
    say(**row, logprob_off_mean=float(np.mean(off)), logprob_off_max=float(np.max(off)))

def serve(folder, ranks=1, out=None):
    "What one engine does: its start, its speed, its text."
    ranks, begun = int(ranks), time.perf_counter()
    import vllm
    row, imported = dict(folder=Path(folder).name, ranks=ranks), time.perf_counter()
    llm = engine(folder, ranks)
    cfg = llm.llm_engine.vllm_config
    say(**row, seconds_to_import=round(imported - begun, 1), seconds_to_start=round(time.perf_counter() - imported, 1), graphs=str(cfg.compilation_config.cudagraph_mode), method=cfg.model_config.quantization, second_runner=cfg.use_v2_model_runner, vllm=vllm.__version__)
    speed(llm, folder, row)
    if out and Path(out).exists(): text(llm, folder, out, row)
    say(**row, phase='done')

if __name__ == '__main__': dict(kernels=kernels, build=build, reference=reference, serve=serve)[sys.argv[1]](*sys.argv[2:])
