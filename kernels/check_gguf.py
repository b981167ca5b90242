"""A model through `nativebit export --to gguf` and llama.cpp: the same tokens, and how far the logits are from ours. Appends to data/results/exports.jsonl.

  python kernels/check_gguf.py --model DIR --original SOURCE.gguf --llama FOLDER --out data/results/exports.jsonl

DIR is any model that `nativebit export` takes, FOLDER where libllama and libggml lie (npm i node-llama-cpp: node_modules/@node-llama-cpp/linux-x64/bins/linux-x64),
SOURCE.gguf a file that llama.cpp's own tools made: how far its logits are from ours says what llama.cpp's arithmetic (float16 activations and cache, or bytes) makes."""
import argparse, ctypes, json, sys, tempfile
from pathlib import Path
import numpy as np
from bench_cpu import ROOT, Llama, commit, cpu_name, threads

TOKENS = 512
PIECES = ['Hello world', ' 12 345,678', 'naïve café – “quotes”', '日本語 и русский', 'a\n\n  b\t\tc', "I'll don't WE'RE", '<|im_start|>user\nhi<|im_end|>\n', '😀 emoji', '    indented', '']

def log_p(z): z = z.astype(np.float64); z -= z.max(-1, keepdims=True); return z - np.log(np.exp(z).sum(-1, keepdims=True))

def tokens(net, text):
    "llama.cpp's tokens of a text, special ones found in it."
    raw, room = text.encode(), (ctypes.c_int32*(len(text.encode()) + 16))()
    f = net.lib.llama_tokenize
    f.restype, f.argtypes = ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
    n = f(net.lib.llama_model_get_vocab(net.model), raw, len(raw), room, len(room), True, True)
    return list(room[:n])

def logits(net, ids): return np.stack([net.put([int(i)]).copy() for i in ids])

def compared(ours, theirs):
    p, q = log_p(ours), log_p(theirs)
    return dict(max_difference=float(abs(ours - theirs).max()), rms_difference=float(np.sqrt(((ours - theirs)**2).mean())), rms_logit=float(ours.std()),
                kl=float((np.exp(p)*(p - q)).sum(-1).mean()), top1=float((p.argmax(-1) == q.argmax(-1)).mean()))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for n in ('--model', '--llama'): ap.add_argument(n, required=True)
    ap.add_argument('--original'); ap.add_argument('--out', default=str(ROOT/'data'/'results'/'exports.jsonl'))
    a = ap.parse_args()
    from nativebit.inference.cpu import CpuNetwork
    from nativebit.pipelines.exporting import export_gguf
    from nativebit.pipelines.opening import opened
    o, text = opened(a.model), (ROOT/'nativebit'/'assets'/'calibration.txt').read_text()
    tok = o.tokens_by()
    texts = [*PIECES, *(text[i:i+400] for i in range(0, 80000, 400))]
    ids = [int(i) for i in tok.encode(text[:8*TOKENS])][:TOKENS]
    ours = {}
    def float_logits(model):
        net = CpuNetwork(model.pack, 'float')
        return np.concatenate([net.logits(ids)])
    ours['packed'] = float_logits(o)
    with tempfile.TemporaryDirectory() as tmp:
        files = [(d, Path(tmp)/f'{d}.gguf', o) for d in ('f16', 'q8_0')]
        for d,f,_ in files: export_gguf(o, f, d)
        if a.original: files.append(('original', Path(a.original), None))
        for d,f,_ in files:
            net, back = Llama(str(f), a.llama), opened(f)
            same = sum(tokens(net, t) == [int(i) for i in tok.encode(t)] for t in texts)
            theirs, read = logits(net, ids), float_logits(back)
            record = dict(kind='gguf', model=Path(a.model).name, file=d, bytes=f.stat().st_size, texts=len(texts), texts_same_tokens=same, tokens=len(ids),
                          llama_against_read_back=compared(read, theirs))
            if d != 'original': record |= dict(llama_against_packed=compared(ours['packed'], theirs), read_back_against_packed=compared(ours['packed'], read))
            record |= dict(threads=threads(), cpu=cpu_name(), commit=commit(), command='python kernels/check_gguf.py --model DIR --original SOURCE.gguf --llama FOLDER')
            with open(a.out, 'a') as out: out.write(json.dumps(record) + '\n')
            print(json.dumps(record, indent=1), flush=True)

if __name__ == '__main__': sys.exit(main())
