"""Texts decoded together, and transformers' generate by the decoder, on a random packed folder of Llama-3.2-1B's shape: checks, and times beside transformers in bfloat16 and our own program.

    python kernels/bench_generate.py                        JSON lines: {"check": …, "ok": …} and {"time": …}; data/results/generate.jsonl has seven runs
    python kernels/bench_generate.py --only eight_billion   16 and 64 texts of a network of Llama-3.1-8B's shape, packed beside dense bfloat16 of the same code; and where a step's time goes
    python kernels/bench_generate.py --rehearse             a CPU, tiny shapes
"""
import argparse, os, sys
from pathlib import Path
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--rehearse', action='store_true', help='on a CPU, tiny')
SECTIONS = 'between logits batches the_same times steps eight_billion'.split()
ap.add_argument('--only', default=','.join(SECTIONS), help='some of ' + ','.join(SECTIONS))
args = ap.parse_args()
TINY, ONLY = args.rehearse, args.only.split(',')
if odd := set(ONLY) - set(SECTIONS): sys.exit(f"error: no section {', '.join(sorted(odd))}; there are {', '.join(SECTIONS)}")
os.environ['HF_HUB_OFFLINE'] = '1'
if TINY: os.environ.setdefault('TRITON_INTERPRET', '1')   # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import json, shutil, tempfile, time, traceback
begun = time.time()
import nativebit.hf
import ml_dtypes, numpy as np, torch, transformers
if not (TINY or torch.cuda.is_available()): sys.exit('error: this measures an NVIDIA GPU; --rehearse tries the program on a CPU')
from dataclasses import replace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from nativebit.config import Config, GEOMETRIES, ModelConfig, QuantConfig
from nativebit.formats.hf_folder import open_folder, save_folder, stored_linear
from nativebit.interop import hf_generate
from nativebit.interop.export import pack_of
from nativebit.formats.nbpack import Pack
from nativebit.pytorch.batch import BatchDecoder, Text, generate_batch
from nativebit.pytorch.benchmark import dequantized, random_network, random_tensor
from nativebit.pytorch.decode import Decoder, generate
from nativebit.pytorch.linear import as_array
from nativebit.pytorch.model import from_pack
transformers.utils.logging.disable_progress_bar(); transformers.utils.logging.set_verbosity_error()
DEVICE, DTYPE = ('cpu', torch.float32) if TINY else ('cuda', torch.bfloat16)
SHAPE = (dict(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32) if TINY else
         dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64))
CONTEXT, N = (64, 24) if TINY else (512, 128)
def say(**row): print(json.dumps(row | {'at_s': round(time.time() - begun, 1)}), flush=True)
def sync(): None if TINY else torch.cuda.synchronize()

def folder(out):
    config = LlamaConfig(**SHAPE, max_position_embeddings=2048 if TINY else 131072, tie_word_embeddings=True, rms_norm_eps=1e-5, architectures=['LlamaForCausalLM'],
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device('meta'): model = LlamaForCausalLM(config)
    quant, tables = QuantConfig(**GEOMETRIES['int8']), {}
    def tensors():
        for n,x in model.state_dict().items():
            if '_proj.weight' in n:
                q = random_tensor(tuple(x.shape), quant, DEVICE).map(as_array)
                yield from stored_linear(n.removesuffix('.weight'), replace(q, words=q.words.view(np.uint32)))
            elif n.endswith('embed_tokens.weight'):
                yield n, np.random.default_rng(0).integers(-127, 128, x.shape, dtype=np.int8)
                yield n.replace('weight', 'weight_scale'), np.full(len(x), 3e-4, np.float32)
            elif 'norm' in n: yield n, np.ones(x.shape, ml_dtypes.bfloat16)
    return save_folder(out, json.loads(config.to_json_string(use_diff=False)), quant, tensors(), embed='int8')

def section(f):
    t = time.time()
    try: f()
    except Exception: say(failed=f.__name__, error=traceback.format_exc()[-3000:])
    say(section=f.__name__, seconds=round(time.time() - t, 1))

def header(**row):
    say(type='header', command=' '.join(['python kernels/bench_generate.py', *sys.argv[1:]]), git_hash=os.environ.get('NATIVEBIT_GIT_HASH', 'unknown'), device='CPU' if TINY else torch.cuda.get_device_name(), torch=torch.__version__,
        transformers=transformers.__version__, gib=0 if TINY else round(torch.cuda.memory_allocated()/2**30, 2), **row)

torch.manual_seed(0)
tmp = Path(tempfile.mkdtemp())
if ONLY != ['eight_billion']:
    path = folder(tmp/'packed')
    say(made='folder', bytes=sum(p.stat().st_size for p in path.glob('*.safetensors')))
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE).dequantize().to(DTYPE)
    cfg, tensors = pack_of(open_folder(path), 2048, exact=True)
    program = from_pack(Pack(path, cfg, {}, tensors), DEVICE, DTYPE, not TINY)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=DEVICE).dequantize()
header()
V = SHAPE['vocab_size']
rng = np.random.default_rng(1)
def prompt(n): return rng.integers(3, V, n).tolist()
def ours(**kw): return hf_generate.packed_generate(packed, **({'everywhere': True} if TINY else {}), **kw)
def padded(B):
    "B prompts of CONTEXT tokens and fewer, filled up on the left."
    ids, mask = torch.zeros(B, CONTEXT, dtype=torch.long), torch.ones(B, CONTEXT, dtype=torch.long)
    for b in range(B):
        k = b*CONTEXT//(2*B)
        ids[b, k:] = torch.tensor(prompt(CONTEXT-k)); mask[b, :k] = 0
    return dict(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE))
GREEDY = dict(do_sample=False, eos_token_id=None)

@torch.no_grad()
def gap(text, n):
    "By how much each of the last n tokens is less likely than the likeliest by float32, in standard deviations of the logits."
    z = exact(torch.tensor([text], device=DEVICE)).logits[0, -n-1:-1]
    new = torch.tensor(text[-n:], device=DEVICE)
    return ((z.max(-1).values - z.gather(1, new[:, None])[:, 0])/z.std(-1)).max().item()

def gap_of_transformers(prompts, n):
    "The same of what transformers in bfloat16 writes: random weights have many near ties."
    write = lambda p: type(dense).generate(dense, torch.tensor([p], device=DEVICE), max_new_tokens=n, **GREEDY)[0].tolist()
    return max(gap(write(p), n) for p in prompts)

@torch.no_grad()
def between():
    "A step of rows at different positions, by kernels and by array operations: as near to float32 in both, and so are the keys that prompts leave."
    from nativebit.kernels import between as kernels
    from nativebit.pytorch import attention
    B, n = 6, CONTEXT//2
    lengths, texts = [1 + b*(n-1)//(B-1) for b in range(B)], [prompt(n+1) for _ in range(B)]
    tokens = torch.tensor(texts, device=DEVICE)
    at = torch.tensor([*lengths[:-1], -5], device=DEVICE)   # the last row is idle
    def run(by_kernels):
        for module in (kernels, attention): module.on_gpu = lambda *xs: by_kernels
        cache = program.empty_cache(B, 2*n)
        program.hidden(tokens[:, :n], [(k[:, :n], v[:, :n]) for k,v in cache], torch.arange(n, device=DEVICE))
        before = cache[0][0][-1].clone()
        z = program.scores(program.hidden(torch.stack([tokens[b, l] for b,l in enumerate(lengths)])[:, None], cache, at)[:, 0])
        return z[:-1].float(), torch.equal(before, cache[0][0][-1])
    want = torch.stack([exact(tokens[b:b+1, :l+1]).logits[0, -1] for b,l in enumerate(lengths[:-1])])
    kept = kernels.on_gpu
    off = lambda z: ((z - want).norm()/want.norm()).item()
    try: (by_kernels, idle), (by_arrays, _) = run(True), run(False)
    finally: kernels.on_gpu = attention.on_gpu = kept
    say(check='logits of a step by kernels beside float32', off=round(off(by_kernels), 5), by_array_operations=round(off(by_arrays), 5), apart=round(((by_kernels - by_arrays).norm()/by_arrays.norm()).item(), 5), idle_row_kept=idle,
        ok=idle and off(by_kernels) < max(2e-2, 1.1*off(by_arrays)))

def logits():
    "Of all four against the same weights in float32: ours may be as far off as transformers in bfloat16, or 2e-2."
    ids, net = padded(2)['input_ids'][:, -48:], hf_generate.network(packed)
    with torch.no_grad():
        want = exact(ids).logits
        off = lambda z: ((z.float() - want).norm()/want.norm()).item()
        theirs = off(dense(ids).logits)
        for name,z in (('the packed model', packed(ids).logits), ('the decoder over it', net(ids)), ('our own program', program(ids))):
            say(check=f'logits of {name} in bf16 beside float32', off=round(off(z), 5), transformers_bf16=round(theirs, 5), ok=off(z) < max(2e-2, 1.1*theirs))
    data = [m.data for m in packed.modules() if isinstance(m, nativebit.hf.NativeBitHfLinear)]
    stacks = [p.data for l in net.layers for p in l.products() if hasattr(p, 'data')]
    spaces = lambda xs: {x.untyped_storage().data_ptr() for x in xs}
    say(check='one copy of the weights', ok=TINY or spaces(data) == spaces(stacks))

def batches():
    lengths = rng.integers(1, CONTEXT, 20)
    prompts, n = [prompt(k) for k in lengths], N//3
    single, batch = Decoder(program, length=2*CONTEXT+N, graph=not TINY), BatchDecoder(program, 8, 2*CONTEXT+N)
    say(one_launch=single.plan is not None, fused=program.layers[0].fused is not None)
    want, got = [list(generate(single, p, n)) for p in prompts], [[] for _ in prompts]
    for i,t in generate_batch(batch, prompts, n): got[i].append(t)
    far, theirs = [gap(p + g, n) for p,g in zip(prompts, got)], gap_of_transformers(prompts, n)
    say(check='greedy texts of 8 slots are those of the single stream, but at ties', same=sum(a == b for a,b in zip(want, got)), of=20, largest_gap=round(max(far), 4),
        largest_gap_single=round(max(gap(p + w, n) for p,w in zip(prompts, want)), 4), of_transformers=round(theirs, 4), ok=max(far) < max(.12, 1.5*theirs))
    draws = []
    for _ in range(2):
        draws.append([[] for _ in prompts])
        for i,t in generate_batch(batch, prompts, n, temperature=.8, top_k=50, top_p=.95, seed=7): draws[-1][i].append(t)
    one = [list(generate(single, p, n, temperature=.8, top_k=50, top_p=.95, seed=7+i)) for i,p in enumerate(prompts)]
    say(check='the same seeds draw the same again', ok=draws[0] == draws[1], begin_as_single=sum(a[:4] == b[:4] for a,b in zip(draws[0], one)), of=20)
    # a slot that idles between others keeps its cache
    batch = BatchDecoder(program, 4, 128)
    for s in range(4): batch.begin(s, prompt(40), tell=s == 3)
    batch.free(1); sync()
    before = [[x[1].clone() for x in kv] for kv in batch.cache]
    for _ in range(5): batch.step()
    say(check='an idle slot is not written', ok=all(torch.equal(b, x[1]) for kv,old in zip(batch.cache, before) for x,b in zip(kv, old)))
    own, others = batch.told(3)
    say(check='probabilities are told', ok=len(others) == 20 and own <= 0 and abs(own - max(others.values())) < 1e-4)

def the_same():
    kw, n = padded(6), N//4
    text = ours(**kw, max_new_tokens=n, **GREEDY)
    rows = [r[m:].tolist() for r,m in zip(text, (kw['attention_mask'] == 0).sum(1).tolist())]
    far, control = max(gap(r, n) for r in rows), gap_of_transformers([r[:-n] for r in rows], n)
    theirs = type(packed).generate(packed, **kw, max_new_tokens=n, **GREEDY)
    say(check='generate: greedy text of 6 prompts is likeliest by float32, but at ties', largest_gap=round(far, 4), of_transformers=round(control, 4), ok=far < max(.12, 1.5*control), same_rows=(text == theirs).all(1).sum().item(), of=6)
    end = text[0, CONTEXT+3].item()
    a = ours(**kw, max_new_tokens=n, do_sample=False, eos_token_id=end, pad_token_id=0)
    cut = a[0, CONTEXT:].tolist()
    say(check='an end token ends a text', ok=end in cut and set(cut[cut.index(end)+1:]) <= {0})
    how = dict(max_new_tokens=n, do_sample=True, temperature=.9, top_k=50, top_p=.95)
    torch.manual_seed(3); a = ours(**kw, **how)
    torch.manual_seed(3); b = ours(**kw, **how)
    say(check='generate: a seed draws the same again', ok=a.shape == b.shape and bool((a == b).all()))

def ms(f, **kw):
    "Milliseconds of a step after the first token, and to the first token; medians of three."
    def t(n):
        sync(); a = time.perf_counter(); f(**kw, max_new_tokens=n, **GREEDY); sync()
        return 1e3*(time.perf_counter() - a)
    t(N+1); t(1)
    med = lambda n: sorted(t(n) for _ in range(3))[1]
    first, whole = med(1), med(N+1)
    return dict(first_ms=round(first, 3), step_ms=round((whole - first)/N, 4))

def times():
    one, many = padded(1), padded(16)
    decoder = Decoder(program, graph=not TINY)
    def own(input_ids, max_new_tokens, **kw): return list(generate(decoder, input_ids[0].tolist(), max_new_tokens))
    rows = {}
    for B,kw in ((1, one), (16, many)):
        rows[B] = dict(ours=ms(ours, **kw), transformers=ms(lambda **k: type(dense).generate(dense, **k), **kw))
        if B == 1: rows[B]['program'] = ms(own, input_ids=one['input_ids'])
        for name,r in rows[B].items(): say(time=f'generate, {B} prompts of up to {CONTEXT}', by=name, **r, tokens_per_s=round(1e3*B/r['step_ms']))
    r = rows[1]
    say(check='batch 1 at 0.9 of our own program', ratio=round(r['program']['step_ms']/r['ours']['step_ms'], 3), ok=r['program']['step_ms'] >= .9*r['ours']['step_ms'])
    say(check='the first token after 512 within 1.1 of transformers bf16', ratio=round(r['ours']['first_ms']/r['transformers']['first_ms'], 3), ok=r['ours']['first_ms'] <= 1.1*r['transformers']['first_ms'])
    torch.manual_seed(0)
    for B,kw in ((1, one), (16, many)):
        how = dict(do_sample=True, temperature=.8, top_k=50, top_p=.95, eos_token_id=None)
        ours(**kw, max_new_tokens=8, **how)
        sync(); a = time.perf_counter(); ours(**kw, max_new_tokens=N+1, **how); sync()
        say(time=f'generate, drawn with top_k 50 and top_p .95, {B} prompts, prefill too', ms=round(1e3*(time.perf_counter() - a), 1), tokens=B*(N+1))

def step_times(net, slots, counts, **row):
    "Milliseconds of a step of so many slots, each behind CONTEXT tokens."
    batch, out = BatchDecoder(net, slots, 256 if TINY else 1024), {}
    for B in counts:
        for s in range(B):
            if batch.ends[s] is None: Decoder.begin(batch, s, prompt(CONTEXT))
        for _ in range(5): batch.step()
        sync(); a = time.perf_counter()
        for _ in range(20): batch.step()
        out[B] = 1e3*(time.perf_counter() - a)/20
        say(time=f'a step of {B} slots', ms=round(out[B], 3), tokens_per_s=round(1e3*B/out[B]), **row)
    return batch, out

def steps():
    step_times(dequantized(program, DTYPE), 64, (2, 8, 16, 64), by='dense bfloat16')
    batch, _ = step_times(program, 64, (1, 2, 4, 8, 16, 32, 64), by='packed')
    for how in (dict(temperature=1.), dict(temperature=1., top_k=50), dict(temperature=1., top_p=.9)):
        for s in range(16, 64):
            if batch.ends[s] is not None: batch.free(s)
        for s in range(16): Decoder.begin(batch, s, prompt(CONTEXT), **how)
        for _ in range(3): batch.step()
        sync(); a = time.perf_counter()
        for _ in range(10): batch.step()
        say(time=f'a step of 16 slots, drawn: {how}', ms=round(1e2*(time.perf_counter() - a), 3))

KINDS = {'few': ('void few',), 'decode': ('void decode<',), 'cuBLAS': ('gemm', 'nvjet', 'cutlass', 'aten::mm', 'aten::linear'), 'attention': ('decode_attention',), 'join': ('join_kernel',), 'norm': ('norm_kernel', 'norm_planes'), 'gate': ('gate_kernel', 'planes<0, 1>', 'planes<1, 1>'), 'planes': ('void planes',), 'head': ('rows_kernel',)}

def moved(events, layers):
    "Of (start, end, name) of kernels: kind → by how many microseconds these move the end on, for they overlap, and how many there are; products by their place in a layer."
    out, end, products = {}, min(events)[0], 0
    for a,b,name in sorted(events):
        kind = next((k for k,words in KINDS.items() if any(w in name for w in words)), name[:48])
        if kind in ('few', 'decode', 'cuBLAS'):
            kind += ' ' + (('qkv', 'o', 'gate_up', 'down')[products % 4] if products < 4*layers else 'head')
            products += 1
        us, n = out.get(kind, (0, 0))
        out[kind], end = (us + max(0, b - end), n + 1), max(end, b)
    return out

def profile(batch, B, layers, **row):
    from torch.profiler import ProfilerActivity, profile as profiled
    where = 'CPU' if TINY else 'CUDA'
    with profiled(activities=[ProfilerActivity.CPU] if TINY else [ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p: batch.step(); sync()
    events = [(e.time_range.start, e.time_range.end, e.name) for e in p.events() if str(e.device_type).endswith(where) and e.time_range.end > e.time_range.start and 'decode_step' not in e.name]   # which is the mark around a step
    most = sorted(moved(events, layers).items(), key=lambda r: -r[1][0])
    say(profile=f'a step of {B} slots', us=round(sum(us for _,(us,_) in most), 1), kernels=len(events), most=[[k, round(us, 1), n] for k,(us,n) in most[:13]], **row)

def eight_billion():
    "Of Llama-3.1-8B's shape, random weights made where they are needed."
    global V
    V = 1000 if TINY else 128256
    shape = ModelConfig(V, 2, 128, 4, 256, n_kv_heads=2, context_len=256) if TINY else ModelConfig(V, 32, 4096, 32, 14336, n_kv_heads=8, head_size=128, context_len=1024, tied=False)
    net, ms = random_network(Config('8B', shape, QuantConfig(**GEOMETRIES['int8'])), DEVICE, DTYPE, 'int8'), {}
    for by,make in (('packed', lambda: net), ('dense bfloat16', lambda: dequantized(net, DTYPE))):
        for B in (16, 64):
            batch, took = step_times(make(), B, (B,), shape='Llama-3.1-8B', by=by)
            ms[by, B] = took[B]
            profile(batch, B, shape.n_layers, shape='Llama-3.1-8B', by=by)
            del batch
    say(check='16 texts of the 8B shape at twice the speed of dense bfloat16 of the same code', ratio=round(ms['dense bfloat16', 16]/ms['packed', 16], 2), ok=ms['dense bfloat16', 16] >= 2*ms['packed', 16])

for name in ONLY: section(globals()[name])
shutil.rmtree(tmp)
if not TINY: say(peak_gib=round(torch.cuda.max_memory_allocated()/2**30, 2))
