"""Decode and prefill on a CPU, side by side: our library, PyTorch dense, llama.cpp. Writes data/results/cpu_decode.jsonl.

  python kernels/bench_cpu.py --pack lut-b=FILE --pack int8=FILE --gguf SOURCE.gguf --llama FOLDER --out data/results/cpu_decode.jsonl

FILE is a packed file or folder (nativebit quantize SOURCE.gguf --geometry lut-b …), SOURCE.gguf the model that it was made from, FOLDER where
libllama and libggml lie (npm i node-llama-cpp: node_modules/@node-llama-cpp/linux-x64/bins/linux-x64). Each contender is a process of its own that
sleeps while others are measured; rounds go through all of them in turn, and the record has the median and every round."""
import argparse, ctypes, json, math, os, platform, re, struct, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT, STEPS, PREFILL = 32, 32, 512
SHAPE_1B = dict(vocab_size=32768, n_layers=4, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, context_len=1024, rope_theta=5e5)   # Llama-3.2-1B's layers, 4 of 16, and a head that is as large a share

def peak_mb(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1000

# ---- contenders: `decode()` returns seconds of each step, `prefill()` seconds ---------------------------------------------------------------------

class Ours:
    def __init__(self, where, activations='auto'):
        from nativebit.inference.cpu import CpuNetwork, choose
        from nativebit.kernels import cpu
        self.choose, self.cpu = choose, cpu
        if where == '1b' or where.startswith('1b:'): pack = random_pack(where.partition(':')[2] or 'int8')
        else:
            from nativebit.pipelines.opening import opened
            pack = opened(where).pack
        self.net = CpuNetwork(pack, activations)
        self.net.reserve(PREFILL + 8)

    def decode(self):
        logits, at, times = self.net.forward(np.arange(PROMPT), 0), PROMPT, [time.perf_counter()]
        for _ in range(STEPS):
            logits = self.net.forward([self.choose(logits[-1], None, 0)], at); at += 1
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def prefill(self):
        t = time.perf_counter(); self.net.forward(np.arange(PREFILL) % 1000, 0)
        return time.perf_counter() - t

    def read(self):
        "Bytes a second of a sum over as many bytes as a step reads."
        n = self.net.bytes_per_token
        x, lib = np.ones(n, np.uint8), self.cpu.library()
        times = []
        for _ in range(5):
            t = time.perf_counter(); lib.nb_read(self.cpu.pool(), x.ctypes.data, n); times.append(time.perf_counter() - t)
        return n/np.median(times)

    def about(self): return dict(bytes_per_token=self.net.bytes_per_token, peak_mb=peak_mb(), threads=self.cpu.library().nb_threads(self.cpu.pool()),
                                 cache_mb=sum(x.nbytes for x in self.net.cache.arrays)/1e6, instructions=self.cpu.instruction_sets(self.cpu.library())[0],
                                 bound=self.cpu.bound())

def random_pack(geometry):
    "A network of `SHAPE_1B` in random codebooks and indices."
    import ml_dtypes
    from nativebit.config import GEOMETRIES, Config, ModelConfig, QuantConfig
    from nativebit.formats.nbpack import Pack
    from nativebit.formats.size import DTYPES, stored_tensors
    cfg, rng = Config('1b', ModelConfig(**SHAPE_1B), QuantConfig(**GEOMETRIES[geometry])), np.random.default_rng(0)
    def array(n, x):
        if x.dtype == 'U32': return rng.integers(0, 2**32, x.shape, np.uint32)
        if x.dtype == 'I8': return rng.integers(-127, 128, x.shape, np.int8)
        if n.endswith('.scale'): return np.full(x.shape, 3e-4, DTYPES[x.dtype])
        return (np.ones if 'norm' in n else rng.standard_normal)(x.shape).astype(DTYPES[x.dtype])
    return Pack(Path('1b'), cfg, {}, {n: array(n, x) for n,x in stored_tensors(cfg, 'int8')})

class Torch:
    "transformers' Llama of the same shape in random weights: dense, with its own cache."
    def __init__(self, where, dtype):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.set_num_threads(threads()); torch.set_grad_enabled(False)
        if where.startswith('1b'):
            from nativebit.config import ModelConfig
            m = ModelConfig(**SHAPE_1B)
        else:
            from nativebit.pipelines.opening import opened
            m = opened(where).pack.config.model
        cfg = LlamaConfig(vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers, num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads,
                          max_position_embeddings=m.context_len, tie_word_embeddings=m.tied, pad_token_id=0)
        torch.set_default_dtype(getattr(torch, dtype))
        self.torch, self.model = torch, LlamaForCausalLM(cfg).eval()

    def put(self, tokens, cache=None): return self.model(self.torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode(self):
        out = self.put(list(range(PROMPT)))
        times = [time.perf_counter()]
        for _ in range(STEPS):
            out = self.put([int(out.logits[0, -1].argmax())], out.past_key_values)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def prefill(self):
        t = time.perf_counter(); self.put((np.arange(PREFILL) % 1000).tolist())
        return time.perf_counter() - t

    def about(self): return dict(peak_mb=peak_mb(), threads=self.torch.get_num_threads())

class Batch(ctypes.Structure): _fields_ = [('n', ctypes.c_int32)] + [(f'p{i}', ctypes.c_void_p) for i in range(6)]
class Params(ctypes.Structure): _fields_ = [('room', ctypes.c_uint8*1024)]   # passed on as it comes

def llama(folder):
    "llama.cpp's library, with the CPU code that it finds best here."
    path = lambda name: next(Path(folder).glob(f'{name}*.so*'))
    base, ggml = [ctypes.CDLL(str(path(n)), ctypes.RTLD_GLOBAL) for n in ('libggml-base', 'libggml.')]
    lib = ctypes.CDLL(str(path('libllama.')))
    lib.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *a: None)
    lib.llama_log_set(lib.quiet, None)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    lib.llama_backend_init()
    P, I = ctypes.c_void_p, ctypes.c_int32
    for name,result,args in [('llama_model_default_params', Params, []), ('llama_context_default_params', Params, []), ('llama_model_quantize_default_params', Params, []),
                             ('llama_model_load_from_file', P, [ctypes.c_char_p, Params]), ('llama_init_from_model', P, [P, Params]),
                             ('llama_set_n_threads', None, [P, I, I]), ('llama_batch_get_one', Batch, [P, I]), ('llama_decode', I, [P, Batch]),
                             ('llama_get_logits_ith', P, [P, I]), ('llama_get_memory', P, [P]), ('llama_memory_clear', None, [P, ctypes.c_bool]),
                             ('llama_model_get_vocab', P, [P]), ('llama_vocab_n_tokens', I, [P]), ('llama_model_size', ctypes.c_uint64, [P]),
                             ('llama_model_quantize', ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)])]:
        f = getattr(lib, name); f.restype, f.argtypes = result, args
    return lib

def requantize(lib, source, out, ftype):
    p = lib.llama_model_quantize_default_params()
    room = bytearray(bytes(p)); struct.pack_into('<ii', room, 0, threads(), ftype); room[16] = 1   # threads, type, and that the source may be quantized
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(Params.from_buffer(room))): raise RuntimeError(f'llama.cpp could not quantize {source}')

class Llama:
    def __init__(self, where, folder):
        self.lib = lib = llama(folder)
        self.model = lib.llama_model_load_from_file(where.encode(), lib.llama_model_default_params())
        if not self.model: raise RuntimeError(f'llama.cpp could not open {where}')
        p = lib.llama_context_default_params()
        struct.pack_into('<I', (room := bytearray(bytes(p))), 0, PREFILL + 32)   # n_ctx
        self.ctx = lib.llama_init_from_model(self.model, Params.from_buffer(room))
        lib.llama_set_n_threads(self.ctx, threads(), threads())
        self.V = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def put(self, tokens):
        t = (ctypes.c_int32*len(tokens))(*tokens)
        if self.lib.llama_decode(self.ctx, self.lib.llama_batch_get_one(ctypes.addressof(t), len(tokens))): raise RuntimeError('llama_decode failed')
        return np.ctypeslib.as_array(ctypes.cast(self.lib.llama_get_logits_ith(self.ctx, -1), ctypes.POINTER(ctypes.c_float)), (self.V,))

    def decode(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        logits, times = self.put(range(PROMPT)), [time.perf_counter()]
        for _ in range(STEPS):
            logits = self.put([int(logits.argmax())])
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def prefill(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        t = time.perf_counter(); self.put((np.arange(PREFILL) % 1000).tolist())
        return time.perf_counter() - t

    def about(self): return dict(bytes_of_weights=self.lib.llama_model_size(self.model), peak_mb=peak_mb(), threads=threads())

def threads(): return int(os.environ.get('NATIVEBIT_THREADS') or len(os.sched_getaffinity(0)))

KINDS = dict(ours=Ours, torch=Torch, llama=Llama)

def serve(kind, *args):
    "A contender: a word on standard input, a line of JSON on standard output."
    it = KINDS[kind](*args)
    print('ready', flush=True)
    for line in sys.stdin: print(json.dumps(getattr(it, line.strip())()), flush=True)

class Process:
    def __init__(self, name, kind, *args):
        self.name, self.kind, self.steps, self.prefills = name, kind, [], []
        self.p = subprocess.Popen([sys.executable, __file__, '--serve', kind, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.p.stdout.readline().strip() != 'ready': raise SystemExit(f'{name} did not start')
    def ask(self, word):
        self.p.stdin.write(word + '\n'); self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())
    def end(self): self.p.stdin.close(); self.p.wait()

# ---- models ---------------------------------------------------------------------------------------------------------------------------------------

def random_gguf(path):
    "A GGUF of `SHAPE_1B` in random float16, without a tokenizer."
    import gguf
    s, rng = SHAPE_1B, np.random.default_rng(0)
    w = gguf.GGUFWriter(str(path), 'llama')
    w.add_context_length(s['context_len']); w.add_embedding_length(s['d_model']); w.add_block_count(s['n_layers']); w.add_feed_forward_length(s['d_ff'])
    w.add_head_count(s['n_heads']); w.add_head_count_kv(s['n_kv_heads']); w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(s['rope_theta'])
    w.add_rope_dimension_count(s['d_model']//s['n_heads']); w.add_vocab_size(s['vocab_size']); w.add_tokenizer_model('no_vocab'); w.add_file_type(1)
    D, F, kv = s['d_model'], s['d_ff'], s['d_model']//s['n_heads']*s['n_kv_heads']
    add = lambda n, *shape: w.add_tensor(n, (rng.standard_normal(shape, np.float32)*.02).astype(np.float16))
    add('token_embd.weight', s['vocab_size'], D); w.add_tensor('output_norm.weight', np.ones(D, np.float32))
    for i in range(s['n_layers']):
        for n in ('attn_norm', 'ffn_norm'): w.add_tensor(f'blk.{i}.{n}.weight', np.ones(D, np.float32))
        for n,o,c in [('attn_q', D, D), ('attn_k', kv, D), ('attn_v', kv, D), ('attn_output', D, D), ('ffn_gate', F, D), ('ffn_up', F, D), ('ffn_down', D, F)]: add(f'blk.{i}.{n}.weight', o, c)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

# ---- what rounding costs --------------------------------------------------------------------------------------------------------------------------

def quality(where, source, n=1024):
    "KL of the student from its original, and of its rounded activations from its own float ones; nats a token."
    from nativebit.inference.cpu import CpuNetwork
    from nativebit.pipelines.opening import opened
    student, original = opened(where), opened(source)
    text = (ROOT/'nativebit'/'assets'/'calibration.txt').read_text()
    ids = [int(i) for i in student.tokens_by().encode(text)][:n]
    windows = [ids[i:i+256] for i in range(0, len(ids), 256)]
    def log_p(net): return np.concatenate([(z := net.logits(w).astype(np.float64)) - (m := z.max(-1, keepdims=True)) - np.log(np.exp(z - m).sum(-1, keepdims=True)) for w in windows])
    kl = lambda a, b: float((np.exp(a)*(a - b)).sum(-1).mean())
    first, exact = log_p(CpuNetwork(original.pack, 'float')), log_p(CpuNetwork(student.pack, 'float'))
    record = dict(kind='quality', tokens=len(ids), kl_student=kl(first, exact))
    for how in ('int8', 'int16'):
        rounded = log_p(CpuNetwork(student.pack, how))
        record |= {f'kl_{how}': kl(exact, rounded), f'kl_student_{how}': kl(first, rounded), f'top1_{how}': float((exact.argmax(-1) == rounded.argmax(-1)).mean())}
    return record

def commit(): return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
def cpu_name(): return next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.machine())

def race(model, contenders, rounds, out):
    "Rounds through all contenders; one record for each."
    ran = [Process(*c) for c in contenders]
    for p in ran: p.ask('decode')   # once for nothing
    for r in range(rounds):
        for p in (ran if r % 2 == 0 else ran[::-1]):
            p.steps.append(p.ask('decode'))
    for r in range(max(3, rounds//2)):
        for p in ran: p.prefills.append(p.ask('prefill'))
    about = {p: p.ask('about') for p in ran}
    reads = [ran[0].ask('read') for _ in range(5)]
    for p in ran:
        per = [1/float(np.mean(s)) for s in p.steps]
        record = dict(kind='decode', model=model, name=p.name, tokens_per_s=float(np.median(per)), rounds=[round(x, 2) for x in per],
                      best_tokens_per_s=1/float(np.quantile(np.concatenate(p.steps), .1)), prefill_s=float(np.median(p.prefills)), prefill_rounds=[round(x, 4) for x in p.prefills],
                      prompt=PROMPT, steps=STEPS, prefill_tokens=PREFILL, **about[p], load=os.getloadavg()[0])
        if 'bytes_per_token' in record: record |= dict(read_gb_per_s=float(np.median(reads))/1e9, gb_per_s=record['bytes_per_token']*record['tokens_per_s']/1e9)
        write(out, record)
        print(f"{model:12} {p.name:28} {record['tokens_per_s']:8.1f} tokens/s (best {record['best_tokens_per_s']:.1f})  prefill {record['prefill_s']:.3f} s  peak {record['peak_mb']:.0f} MB", flush=True)
        p.end()

def write(out, record):
    record |= dict(cpu=cpu_name(), cores=len(os.sched_getaffinity(0)), commit=commit(), command='python kernels/bench_cpu.py ' + ' '.join(re.sub(r'[^ =]*/', '', a) for a in sys.argv[1:]))
    with open(out, 'a') as f: f.write(json.dumps(record) + '\n')

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--pack', action='append', default=[], metavar='NAME=FILE'); ap.add_argument('--quality', action='append', default=[], metavar='NAME=FILE')
    ap.add_argument('--gguf'); ap.add_argument('--llama'); ap.add_argument('--rounds', type=int, default=7); ap.add_argument('--out', default=str(ROOT/'data'/'results'/'cpu_decode.jsonl'))
    ap.add_argument('--one-b', action='store_true', help='the 1B shape, too'); ap.add_argument('--work', help='folder for files that are made')
    a = ap.parse_args()
    packs = dict(p.split('=', 1) for p in a.pack)
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(a.work or tmp); work.mkdir(exist_ok=True, parents=True)
        def ggufs(source, stem):
            if not a.llama: return []
            lib, made = llama(a.llama), []
            for name,ftype in [('Q3_K_M', 12), ('Q4_0', 2)]:
                if not (f := work/f'{stem}-{name}.gguf').exists(): requantize(lib, source, f, ftype)
                made.append((f'llama.cpp {name}', 'llama', f, a.llama))
            return made
        if packs:
            first = next(iter(packs.values()))
            race('SmolLM2-135M', [*((f'ours {n}', 'ours', f) for n,f in packs.items()), *((f'ours {n}, x {how}', 'ours', f, how) for n,f in list(packs.items())[:1] for how in ('int8', 'int16')),
                 *((f'PyTorch {t}', 'torch', first, t) for t in ('float32', 'bfloat16')), *(ggufs(a.gguf, 'model') if a.gguf else [])], a.rounds, a.out)
        for p in a.quality:
            name, f = p.split('=', 1)
            record = quality(f, a.gguf) | dict(model='SmolLM2-135M', name=name)
            write(a.out, record); print({k: round(v, 6) if isinstance(v, float) else v for k,v in record.items()}, flush=True)
        if a.one_b:
            if a.llama and not (work/'1b.gguf').exists(): random_gguf(work/'1b.gguf')
            race('1B shape', [('ours lut-b', 'ours', '1b:lut-b'), ('ours int8', 'ours', '1b:int8'), *((f'PyTorch {t}', 'torch', '1b', t) for t in ('float32', 'bfloat16')), *ggufs(work/'1b.gguf', '1b')], a.rounds, a.out)

if __name__ == '__main__':
    if sys.argv[1:2] == ['--serve']: serve(*sys.argv[2:])
    else: main()
