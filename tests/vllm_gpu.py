"""What vLLM makes of a packed folder on a GPU: the text of transformers on the same folder, and tokens a second beside bfloat16.

vllm_gpu.py build DIR [1b|8b]      a random packed folder of Llama-3.2-1B's or Llama-3.1-8B's shape, and DIR-float: its config.json alone
vllm_gpu.py reference DIR OUT      greedy tokens and their log probabilities by transformers (nativebit.hf)
vllm_gpu.py serve DIR RANKS [OUT]  by vLLM: tokens a second of 1, 16 and 64 texts, and the text compared with OUT; of DIR-float vLLM draws random weights

Each prints a line of JSON. (`python3 tests/vllm_gpu.py …`; vLLM and this package have to be importable, and the package installed, so that vLLM sees its entry point.)"""
import json, os, sys, time
os.environ.setdefault('HF_HUB_OFFLINE', '1'); os.environ.setdefault('VLLM_NO_USAGE_STATS', '1'); os.environ.setdefault('VLLM_WORKER_MULTIPROC_METHOD', 'spawn')
from pathlib import Path
import ml_dtypes, numpy as np

SHAPES = {'1b': dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
          '8b': dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)}
COMMON = dict(architectures=['LlamaForCausalLM'], model_type='llama', rms_norm_eps=1e-5, rope_theta=500000., max_position_embeddings=8192, hidden_act='silu', attention_bias=False, mlp_bias=False, bos_token_id=128000, eos_token_id=128001)
PROMPTS, NEW = [[128000, *np.random.default_rng(k).integers(0, 128000, 31).tolist()] for k in range(64)], 32

def random_tensor(rng, shape, quant):
    "A packed matrix whose weights are as large as trained ones."
    from nativebit.formats.bitpacking import QuantizedTensor
    from nativebit.formats.size import DTYPES, matrix_stored
    from nativebit.quant.blocks import block_of
    s = matrix_stored(shape, quant)
    codes = np.sort(rng.integers(-127, 128, s['codebook'].shape), 1) if quant.codebook_dtype == 'int8' else np.sort(rng.standard_normal(s['codebook'].shape)*60, 1)
    words = np.frombuffer(rng.bytes(4*int(np.prod(s['words'].shape))), np.uint32)
    scale = None if 'scale' not in s else (rng.uniform(.8, 1.2, s['scale'].shape)/70/shape[1]**.5).astype(DTYPES[s['scale'].dtype])
    return QuantizedTensor(words, codes.astype(DTYPES[s['codebook'].dtype]), scale, shape, block_of(quant.block_shape, shape))

def build(folder, shape='1b', geometry='int8', embed='int8'):
    "The two folders."
    from nativebit.config import GEOMETRIES, QuantConfig
    from nativebit.formats.hf_folder import save_folder, stored_linear, stored_rows
    c, rng, quant, half = COMMON | SHAPES[shape], np.random.default_rng(0), QuantConfig(**GEOMETRIES[geometry]), ml_dtypes.bfloat16
    D, F, q, kv = c['hidden_size'], c['intermediate_size'], c['num_attention_heads']*c['head_dim'], c['num_key_value_heads']*c['head_dim']
    sizes = {'self_attn.q_proj': (q, D), 'self_attn.k_proj': (kv, D), 'self_attn.v_proj': (kv, D), 'self_attn.o_proj': (D, q), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D), 'mlp.down_proj': (D, F)}
    def table(P): yield from stored_rows(P, rng.standard_normal((c['vocab_size'], D), np.float32)*.05, embed)
    def tensors():
        yield from table('model.embed_tokens')
        for i in range(c['num_hidden_layers']):
            for n, s in sizes.items(): yield from stored_linear(f'model.layers.{i}.{n}', random_tensor(rng, s, quant))
            for n in 'input', 'post_attention': yield f'model.layers.{i}.{n}_layernorm.weight', np.ones(D, half)
        yield 'model.norm.weight', np.ones(D, half)
        if not c['tie_word_embeddings']: yield from table('lm_head')
    save_folder(folder, c, quant, tensors(), embed=embed)
    beside = Path(f'{folder}-float'); beside.mkdir(exist_ok=True)
    (beside/'config.json').write_text(json.dumps(c | dict(dtype='bfloat16')))
    return dict(bytes=sum(p.stat().st_size for p in Path(folder).glob('*.safetensors')), geometry=geometry, shape=shape)

def reference(folder, out):
    "Greedy tokens of transformers, and the log probability of each."
    import nativebit.hf, torch
    from transformers import AutoModelForCausalLM
    m, rows = AutoModelForCausalLM.from_pretrained(folder, device_map='cuda'), []
    for p in PROMPTS[:4]:
        with torch.no_grad(): ids = m.generate(torch.tensor([p], device='cuda'), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        with torch.no_grad(): logp = m(ids).logits[0].float().log_softmax(-1)
        rows.append(dict(ids=ids[0].tolist(), logp=logp[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()))
    Path(out).write_text(json.dumps(rows))
    return dict(texts=len(rows), types=sorted({type(x).__name__ for x in m.modules() if 'NativeBit' in type(x).__name__}))

def engine(folder, ranks, **kw):
    from vllm import LLM
    dummy = dict(load_format='dummy') if str(folder).endswith('-float') else {}
    return LLM(str(folder), skip_tokenizer_init=True, dtype='bfloat16', max_model_len=1024, max_num_seqs=64, gpu_memory_utilization=.5, tensor_parallel_size=int(ranks), enable_prefix_caching=False, **dummy, **kw)

def asked(llm, prompts, **kw):
    from vllm import SamplingParams
    return llm.generate([dict(prompt_token_ids=p) for p in prompts], SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **kw), use_tqdm=False)

def text(llm, out):
    "Greedy tokens of vLLM against transformers', and the log probabilities that it gives transformers' text."
    rows = json.loads(Path(out).read_text())
    got = [list(r.outputs[0].token_ids) for r in asked(llm, PROMPTS[:len(rows)], max_tokens=NEW)]
    want = [r['ids'][-NEW:] for r in rows]
    same = [next((k for k, (a, b) in enumerate(zip(g, w)) if a != b), NEW) for g, w in zip(got, want)]
    scored = asked(llm, [r['ids'] for r in rows], max_tokens=1, prompt_logprobs=0)
    off = [abs(s.prompt_logprobs[k + 1][r['ids'][k + 1]].logprob - x) for s, r in zip(scored, rows) for k, x in enumerate(r['logp'])]
    return dict(same_tokens_of=NEW, same=same, logprob_off_mean=float(np.mean(off)), logprob_off_max=float(np.max(off)))

def speed(llm, new=256):
    "Tokens a second, the best of three."
    found = {}
    for n in 1, 16, 64:
        seconds = []
        for k in range(4):
            begun = time.perf_counter()
            r = asked(llm, PROMPTS[:n], max_tokens=new)
            if k: seconds.append(time.perf_counter() - begun)
        assert sum(len(x.outputs[0].token_ids) for x in r) == n*new
        found[n] = round(n*new/min(seconds), 1)
    return dict(tokens_per_second=found)

def serve(folder, ranks=1, out=None):
    "What one engine does."
    begun, llm = time.perf_counter(), engine(folder, ranks)
    row = dict(folder=Path(folder).name, ranks=int(ranks), seconds_to_start=round(time.perf_counter() - begun, 1)) | speed(llm)
    return row | (text(llm, out) if out else {})

if __name__ == '__main__': print(json.dumps(dict(what=sys.argv[1]) | dict(build=build, reference=reference, serve=serve)[sys.argv[1]](*sys.argv[2:])), flush=True)
