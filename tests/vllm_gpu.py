"""What vLLM makes of a packed folder on a GPU: the text of transformers on the same folder, and tokens a second beside bfloat16.

vllm_gpu.py kernels                   compile the CUDA kernels of both geometries, once for all processes
vllm_gpu.py build DIR [1b|8b|small] [GEOMETRY]  a random packed folder of Llama-3.2-1B's or Llama-3.1-8B's shape, and DIR-float: its config.json alone
vllm_gpu.py reference DIR OUT         greedy tokens and their log probabilities by transformers (nativebit.hf)
vllm_gpu.py serve DIR RANKS [OUT]     by vLLM: tokens a second of 1, 16 and 64 texts, and the text compared with OUT and with one GPU's; of DIR-float vLLM draws random weights
vllm_gpu.py race SECONDS DIR[:[DTYPE][:LEVEL]]...   serve of several folders: they start side by side and are timed in turns, 16 texts first, then what a step's kernels take; all end after SECONDS
vllm_gpu.py texts DIR RANKS OUT       greedy tokens, and the log probabilities of the likeliest ones
vllm_gpu.py split SECONDS DIR         texts of one GPU and of two, which start side by side, compared: where they part, both choices have to be nearly as likely
vllm_gpu.py heads                     the last product, of int8 rows and of bfloat16, by themselves

Each says what it found in lines of JSON, as soon as it knows, and appends them to the file that RESULTS names. EAGER=1 runs vLLM without CUDA graphs, NEW sets how many tokens a text gets, DTYPE=float16 multiplies in fp16, LEVEL=2 lets vLLM compile as it does by default, TURNS='16 kernels' times only that in a race, ASKED=1 times what is asked for, a line each.
(`python3 tests/vllm_gpu.py …`; vLLM and this package have to be importable, and the package installed, so that vLLM sees its entry point.)"""
import gzip, json, os, queue, re, signal, subprocess, sys, threading, time
# no network; NVLink multicast stays off: neither vLLM's symmetric memory nor NCCL's may use it; no FlashInfer, which vLLM's sampler imports
os.environ.update(HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1', VLLM_ALLREDUCE_USE_SYMM_MEM='0', VLLM_ALLREDUCE_USE_FLASHINFER='0', VLLM_USE_FLASHINFER_SAMPLER='0', VLLM_USE_NCCL_SYMM_MEM='0', NCCL_NVLS_ENABLE='0', TORCH_SYMM_MEM_DISABLE_MULTICAST='1')
# every process is a fresh one; of the plugins only ours
LEVEL = int(os.environ.get('LEVEL', 0))   # vLLM's optimization level: 2 is what users have, and compiles
for k, v in dict(VLLM_WORKER_MULTIPROC_METHOD='spawn', TORCH_COMPILE_DISABLE='0' if LEVEL else '1', VLLM_PLUGINS='nativebit').items(): os.environ.setdefault(k, v)
from pathlib import Path
import ml_dtypes, numpy as np

SHAPES = {'1b': dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
          '8b': dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
          'small': dict(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False),
          'tiny': dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)}   # to try this program
COMMON = dict(architectures=['LlamaForCausalLM'], model_type='llama', rms_norm_eps=1e-5, rope_theta=500000., max_position_embeddings=8192, hidden_act='silu', attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_id=2)
BATCHES, REPEATS = (1, 16, 64), 2
TURNS = os.environ.get('TURNS', '16 1 64 kernels').split()   # of a race
NEW, SHORT = int(os.environ.get('NEW', 256)), 32   # tokens of a timed text; of the first ones, which are compared
BEGUN = time.perf_counter()

def say(**row):
    "A line of what is known, on the screen and in the file."
    line = json.dumps(dict(what=sys.argv[1], at=round(time.perf_counter() - BEGUN, 1)) | row)
    if path := os.environ.get('RESULTS'):
        with open(path, 'a') as f: f.write(line + '\n')
    print(line, flush=True)   # last: who listens may end this process then

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
    "vLLM as both contenders have it: CUDA graphs of the three batches, vLLM's own kernels, at level 0 nothing compiled."
    from vllm import LLM
    graphs = dict(enforce_eager=True) if os.environ.get('EAGER') == '1' else dict(compilation_config=dict(cudagraph_capture_sizes=list(BATCHES), **({} if LEVEL else dict(cudagraph_mode='FULL_DECODE_ONLY'))))
    dummy = dict(load_format='dummy') if str(folder).endswith('-float') else {}
    # the room for keys and values is said, so that nothing has to be measured first
    watched = dict(profiler='torch', torch_profiler_dir=str(traces(folder)), torch_profiler_with_stack=False, torch_profiler_dump_cuda_time_total=False,
                   ignore_frontend=True, delay_iterations=3)
    return LLM(str(folder), skip_tokenizer_init=True, dtype=os.environ.get('DTYPE', 'bfloat16'), max_model_len=1024, max_num_seqs=max(BATCHES), max_num_batched_tokens=2048,
               kv_cache_memory_bytes=4 << 30, gpu_memory_utilization=.2, profiler_config=watched,
               tensor_parallel_size=ranks, disable_custom_all_reduce=True, enable_prefix_caching=False, optimization_level=LEVEL, **graphs, **dummy)

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

def speed(llm, folder, row, n):
    "Tokens a second with the prompt's part, and milliseconds of a step without it."
    texts = prompts(folder)[:n]
    asked(llm, texts, max_tokens=8)
    short, long = timed(llm, texts, SHORT), timed(llm, texts, NEW)
    say(**row, batch=n, tokens_per_second=round(n*NEW/long, 1), ms_per_step=round(1e3*(long - short)/(NEW - SHORT), 3))

def traces(folder): return Path(f'{folder}-traces-{os.getpid()}').absolute()

def times_of(trace):
    "(steps, {kernel: [milliseconds, launches]}) of a trace; a step is a graph's replay."
    with (gzip.open if trace.suffix == '.gz' else open)(trace) as f: events = json.load(f)['traceEvents']
    found = {}
    for e in events:
        if e.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset'):
            row = found.setdefault(e['name'], [0., 0])
            row[0] += e['dur']/1e3; row[1] += 1
    return sum(e.get('name') == 'cudaGraphLaunch' for e in events) or 1, found

def kernels_of(llm, folder, row, n=16):
    "What the kernels of a step take; the prompts are read before the profiler begins (see `engine`)."
    llm.start_profile()
    asked(llm, prompts(folder)[:n], max_tokens=12)
    llm.stop_profile()
    steps, found = times_of(max(traces(folder).rglob('*.json*'), key=lambda p: p.stat().st_size))
    most = sorted(found.items(), key=lambda t: -t[1][0])[:20]
    say(**row, kernels=n, steps=steps, ms=round(sum(ms for ms, _ in found.values())/steps, 3), launches=round(sum(k for _, k in found.values())/steps, 1),
        most=[[name[:90], round(ms/steps, 4), round(k/steps, 1)] for name, (ms, k) in most])

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
    row, imported = dict(folder=Path(folder).name, ranks=ranks) | {k.lower(): os.environ[k] for k in ('DTYPE', 'LEVEL') if k in os.environ}, time.perf_counter()
    llm = engine(folder, ranks)
    cfg = llm.llm_engine.vllm_config
    say(**row, seconds_to_import=round(imported - begun, 1), seconds_to_start=round(time.perf_counter() - imported, 1), graphs=str(cfg.compilation_config.cudagraph_mode), method=cfg.model_config.quantization, second_runner=cfg.use_v2_model_runner, vllm=vllm.__version__)
    for line in (sys.stdin if os.environ.get('ASKED') == '1' else BATCHES):
        if str(line).strip() == 'kernels': kernels_of(llm, folder, row)
        else: speed(llm, folder, row, int(line))
    if out and Path(out).exists(): text(llm, folder, out, row)
    say(**row, phase='done')

def reason(lines):
    "Of what a program wrote while it failed: the first error with what stands before it, and the next ones."
    lines = [line for line in lines if line.strip(' ^~\n')]
    raised = [k for k, line in enumerate(lines) if re.search(r'^\S*(Error|Exception)\b|\b\w*(Error|Exception): ', line)]
    first = raised[0] if raised else len(lines) - 1
    return [line.strip()[-300:] for line in lines[max(first - 6, 0):first + 1] + [lines[k] for k in raised[1:3]]]

class Contender:
    "An engine of its own process, and what it has said; why it ended, as soon as it has."
    def __init__(self, folder, *args, command='serve', **env):
        self.folder, self.said, self.errors, self.stopped = folder, queue.Queue(), [], False
        path, dtype, level, *_ = [*folder.split(':'), '', '']
        env = {**os.environ, 'ASKED': '1', **(dict(DTYPE=dtype) if dtype else {}), **(dict(LEVEL=level, TORCH_COMPILE_DISABLE=str(int(level == '0'))) if level else {}), **env}
        self.job = subprocess.Popen([sys.executable, __file__, command, path, *(args or '1')], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace', start_new_session=True)
        self.listeners = [threading.Thread(target=f, daemon=True) for f in (self.listen, self.overhear)]
        for t in self.listeners: t.start()

    def overhear(self):
        for line in self.job.stderr:
            print(line, end='', file=sys.stderr, flush=True)
            self.errors = [*self.errors[-2000:], line]

    def listen(self):
        for line in self.job.stdout:
            print(line, end='', flush=True)
            if line.startswith('{"what"'): self.said.put(json.loads(line))
        if self.job.wait() and not self.stopped:
            self.listeners[1].join(2)
            say(failed=self.folder, exit_code=self.job.returncode, why=reason(self.errors))
        self.said.put(None)   # it has ended

    def hears(self, key, end):
        "Has a line with this key come in time?"
        try:
            while row := self.said.get(timeout=max(end - time.perf_counter(), .01)):
                if key in row: return True
        except queue.Empty: pass
        return self.stop()

    def ask(self, what, end):
        try: print(what, file=self.job.stdin, flush=True)
        except OSError: return self.stop()
        return self.hears('kernels' if what == 'kernels' else 'batch', end)

    def stop(self):
        self.stopped = True
        if self.job.poll() is None: os.killpg(self.job.pid, signal.SIGKILL)
        return False

def race(seconds, *folders):
    "Nothing starts while something is timed; an engine that fails or is late ends, and the others go on."
    end, all_of_them = BEGUN + float(seconds), [Contender(f) for f in folders]
    running = [c for c in all_of_them if c.hears('seconds_to_start', BEGUN + .7*float(seconds))]
    say(started=[c.folder for c in running])
    try:
        for what in TURNS: running = [c for c in running if c.ask(what, min(end, time.perf_counter() + 30))]
    finally:
        for c in all_of_them: c.stop()
    say(**{'in time': [c.folder for c in running]})

def texts(folder, ranks, out):
    "Eight texts, each token with the five likeliest in its place."
    llm = engine(folder, int(ranks))
    say(folder=Path(folder).name, ranks=int(ranks), phase='started')
    found = [r.outputs[0] for r in asked(llm, prompts(folder)[:8], max_tokens=SHORT, logprobs=5)]
    Path(out).write_text(json.dumps([[[t, {k: v.logprob for k, v in likely.items()}] for t, likely in zip(r.token_ids, r.logprobs)] for r in found]))
    say(folder=Path(folder).name, ranks=int(ranks), texts=len(found))

def parted(one, two):
    "(place where two texts part, how far apart both find both choices, differences of log probabilities until there)."
    k, off, worst = 0, [], 0.
    for (a, p), (b, q) in zip(one, two):
        if a != b:
            worst = max(p[str(a)] - p.get(str(b), -1e9), q[str(b)] - q.get(str(a), -1e9))
            break
        off.append(abs(p[str(a)] - q[str(a)])); k += 1
    return k, worst, off

def split(seconds, folder):
    "Does a network that is split over two GPUs write what one GPU writes?"
    end, outs = BEGUN + float(seconds), [f'{folder}-text-{ranks}.json' for ranks in (1, 2)]
    for out in outs: Path(out).unlink(missing_ok=True)
    jobs = [Contender(folder, str(ranks), out, command='texts') for ranks, out in zip((1, 2), outs)]
    done = [c.hears('texts', end) for c in jobs]
    for c in jobs: c.stop()
    if not all(done): say(split=folder, ok=False, done=done); sys.exit(1)
    rows = [parted(*pair) for pair in zip(*[json.loads(Path(out).read_text()) for out in outs])]
    off, gaps = [x for r in rows for x in r[2]], [r[1] for r in rows if r[0] < SHORT]
    ok = bool(off) and float(np.mean(off)) < .1 and max(gaps, default=0.) < .2
    say(split=Path(folder).name, ok=ok, same_tokens=[r[0] for r in rows], of=SHORT, gaps=[round(g, 4) for g in gaps], logprob_off_mean=round(float(np.mean(off or [np.inf])), 4), logprob_off_max=round(max(off, default=np.inf), 4))
    sys.exit(not ok)

def heads():
    "Microseconds of a product with 128,256 rows."
    import torch
    from nativebit.kernels.cuda import library
    from nativebit.kernels.lm_head import rows_logits, table_logits
    from triton.testing import do_bench
    for D in (2048, 4096):
        table, scale = torch.randint(-127, 128, (128256, D), dtype=torch.int8, device='cuda'), torch.rand(128256, device='cuda')
        w = (table*scale[:, None]).bfloat16()
        for M in (1, 16, 64):
            x = torch.randn(M, D, device='cuda', dtype=torch.bfloat16)
            us = dict(us_rows=lambda: rows_logits(x, table, scale), us_bfloat16=lambda: torch.nn.functional.linear(x, w))
            if M == 1: us['us_table'] = lambda: table_logits(x[0], table, scale, lib=library(3, 'int8'))
            say(width=D, tokens=M, **{k: round(1e3*do_bench(f, 10, 50)) for k, f in us.items()})

if __name__ == '__main__': dict(kernels=kernels, build=build, reference=reference, serve=serve, race=race, texts=texts, split=split, heads=heads)[sys.argv[1]](*sys.argv[2:])
