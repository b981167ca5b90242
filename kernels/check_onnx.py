"""A model through `nativebit export --to onnx` and onnxruntime: logits beside ours, memory, time to open, tokens a second. Appends to data/results/exports.jsonl.

  python kernels/check_onnx.py --model DIR --out data/results/exports.jsonl
  python kernels/check_onnx.py --model DIR --programs --out data/results/exports.jsonl
  python kernels/check_onnx.py --model DIR --programs --js FOLDER --out data/results/exports.jsonl

DIR is any model that `nativebit export` takes. Each way to open the file has a process of its own: with constants folded, as onnxruntime does by itself, and without;
and so has the same network with its indices of three bits in ONNX's UINT4, which the package does for four alone. `--programs` asks optimum and onnxruntime-genai, where they are
installed, for the greedy continuation of two texts, in optimum side by side and filled up on the left, and compares it with our CPU library's;
with --js transformers.js as well, where FOLDER is one that `npm i --ignore-scripts @huggingface/transformers` was run in."""
import argparse, ctypes, json, os, subprocess, sys, tempfile, time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import numpy as np
from bench_cpu import ROOT, commit, cpu_name, threads
from check_gguf import compared

ROUNDS, STEPS, NEW = 5, 16, 24
TEXTS = 'Once upon a time', 'The capital city of the country France is called'

def memory(): return {k: int(l.split()[1])/1000 for l in open('/proc/self/status') for k in ('VmRSS', 'VmHWM') if l.startswith(k)}

def opened_once(folder, ids, fold):
    "Measurements of one process: memory in MB beside what it had before, seconds to open, tokens a second."
    from nativebit.interop.to_onnx import OnnxNetwork
    before, begin = memory(), time.perf_counter()
    net = OnnxNetwork(folder, fold, threads())
    net.session
    load = time.perf_counter() - begin
    logits, rounds = net(ids), []
    for _ in range(ROUNDS if fold else 2):
        begin = time.perf_counter()
        for t in ids[:STEPS if fold else 4]: net([t])
        rounds.append(round((STEPS if fold else 4)/(time.perf_counter() - begin), 2))
    after = memory()
    ctypes.CDLL(None).malloc_trim(0)   # what was freed and not given back
    return logits, dict(load_s=round(load, 2), rss_mb=round(after['VmRSS'] - before['VmRSS']), rss_trimmed_mb=round(memory()['VmRSS'] - before['VmRSS']),
                        peak_mb=round(after['VmHWM']), tokens_per_s=float(np.median(rounds)), rounds=rounds)

def in_uint4():
    "Let the export write indices of three bits as ONNX's UINT4, as it writes those of four."
    import ml_dtypes
    from nativebit.interop import to_onnx
    def index_nodes(op, q, name, shape):
        idx = q.indices().reshape(-1)
        return op.stored(idx[::2] | idx[1::2] << 4, f'{name}.words', shape, ml_dtypes.uint4)
    to_onnx.index_nodes = index_nodes

def greedy(o, text):
    "Our own continuation: the prompt's tokens and the new ones."
    from nativebit.inference.cpu import CpuNetwork
    net, ids = CpuNetwork(o.pack, 'float'), [int(i) for i in o.tokens_by().encode(text)]
    new = ids[:]
    for _ in range(NEW): new.append(int(net.logits(new)[-1].argmax()))
    return ids, new[len(ids):]

def by_optimum(folder, prompts):
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    n = max(map(len, prompts))
    ids = torch.tensor([[0]*(n - len(p)) + p for p in prompts])
    mask = torch.tensor([[0]*(n - len(p)) + [1]*len(p) for p in prompts])
    return ORTModelForCausalLM.from_pretrained(folder).generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[:, n:].tolist()

def by_genai(folder, prompts):
    import onnxruntime_genai as og
    model, out = og.Model(str(folder)), []
    for p in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(p) + NEW, min_length=len(p) + NEW, do_sample=False)
        g = og.Generator(model, params)
        g.append_tokens(p)
        while not g.is_done(): g.generate_next_token()
        out.append([int(i) for i in g.get_sequence(0)][len(p):])
    return out

JS = """import { AutoModelForCausalLM, Tensor, env } from '@huggingface/transformers';
const [parent, name, prompts, n] = JSON.parse(process.argv[1]), out = [];
env.localModelPath = parent; env.allowRemoteModels = false;
const model = await AutoModelForCausalLM.from_pretrained(name, {dtype: 'fp32', subfolder: '', use_external_data_format: true});
const tensor = (x) => new Tensor('int64', BigInt64Array.from(x.map(BigInt)), [1, x.length]);
for (const p of prompts) {
    const got = await model.generate({input_ids: tensor(p), attention_mask: tensor(p.map(() => 1)), max_new_tokens: n, min_new_tokens: n, do_sample: false});
    out.push(Array.from(got.data).map(Number).slice(p.length));
}
console.log(JSON.stringify(out));"""

def by_js(folder, prompts, js):
    "By transformers.js in node."
    words = json.dumps([str(folder.parent), folder.name, prompts, NEW])
    return json.loads(subprocess.run(['node', '--input-type=module', '-e', JS, words], cwd=js, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

def js_version(js, name): return f"{name} {json.loads((Path(js)/'node_modules'/name/'package.json').read_text())['version']}"

def installed(name):
    try: return f'{name} {version(name)}'
    except PackageNotFoundError: return ''

def programs(o, folder, js):
    "What other people's programs make of the folder: tokens that are ours, of all."
    prompts, want = zip(*(greedy(o, t) for t in TEXTS))
    ways = {' '.join(filter(None, map(installed, names))): run for run,names in ((by_optimum, ('optimum-onnx', 'transformers')), (by_genai, ('onnxruntime-genai',))) if installed(names[0])}
    if js: ways[f"{js_version(js, '@huggingface/transformers')} {js_version(js, 'onnxruntime-node')}"] = partial(by_js, js=js)
    for name,run in ways.items():
        got = run(folder, list(map(list, prompts)))
        yield dict(program=name, tokens=NEW*len(TEXTS), same_tokens=sum(a == b for x,y in zip(got, want) for a,b in zip(x, y)))

def measured(o, model, ids, tmp):
    "Each way to open the file, in a process of its own: what it takes, and its logits beside ours."
    from nativebit.inference.cpu import CpuNetwork
    from nativebit.pipelines.exporting import export_onnx_folder
    ours = CpuNetwork(o.pack, 'float').logits(ids)
    for indices in ('words', 'uint4'):
        folder = tmp/indices
        folder.mkdir()
        (folder/'ids.json').write_text(json.dumps(ids))
        if indices == 'uint4': in_uint4()
        begin = time.perf_counter()
        out = export_onnx_folder(o, folder/'onnx')
        seconds = time.perf_counter() - begin
        for way in ('folded', 'unfolded') if indices == 'words' else ('folded',):
            r = subprocess.run([sys.executable, __file__, '--model', model, '--one', f'{indices}-{way}', '--folder', str(folder)], capture_output=True, text=True, check=True)
            logits = np.load(folder/'logits.npy')
            yield dict(indices=indices, constants=way, bytes=sum((out/n).stat().st_size for n in ('model.onnx', 'model.onnx_data')), export_s=round(seconds, 1),
                       parameters_bit_for_bit=len(o.pack.weights()), tokens=len(ids)) | json.loads(r.stdout.splitlines()[-1]) \
                | dict(max_difference_over_largest_logit=float(abs(logits - ours).max()/abs(ours).max()), against_ours=compared(ours, logits))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', required=True); ap.add_argument('--tokens', type=int, default=64); ap.add_argument('--name', help='what the rows call it'); ap.add_argument('--js', help='where transformers.js is installed'); ap.add_argument('--programs', action='store_true')
    ap.add_argument('--out', default=str(ROOT/'data'/'results'/'exports.jsonl'))
    ap.add_argument('--one', help="of a process that this one starts: words or uint4, and whether constants are folded"); ap.add_argument('--folder')
    a = ap.parse_args()
    from nativebit.pipelines.exporting import export_onnx_folder
    from nativebit.pipelines.opening import opened
    from nativebit.config import geometry_words
    text = (ROOT/'nativebit'/'assets'/'calibration.txt').read_text()
    if a.one:
        ids = json.loads((Path(a.folder)/'ids.json').read_text())
        logits, found = opened_once(Path(a.folder)/'onnx', ids, a.one.endswith('-folded'))
        np.save(Path(a.folder)/'logits.npy', logits)
        return print(json.dumps(found))
    o = opened(a.model)
    ids = [int(i) for i in o.tokens_by().encode(text[:16*a.tokens])][:a.tokens]
    about = dict(kind='onnx', model=a.name or Path(a.model).name, geometry=geometry_words(o.pack.config.quant) if o.pack.quantized else 'float', embed=str(o.pack.tensors['embed'].dtype))
    versions = dict(library=f"onnxruntime {version('onnxruntime')}, onnx {version('onnx')}", threads=threads(), busy=round(os.getloadavg()[0], 1), cpu=cpu_name(), commit=commit())
    records = []
    with tempfile.TemporaryDirectory() as tmp:
        if a.programs:
            out = export_onnx_folder(o, Path(tmp)/'onnx')
            records = [about | r | versions | dict(command='python kernels/check_onnx.py --model DIR --programs' + ' --js FOLDER'*bool(a.js)) for r in programs(o, out, a.js)]
        else:
            records = [about | r | versions | dict(command='python kernels/check_onnx.py --model DIR') for r in measured(o, a.model, ids, Path(tmp))]
    with open(a.out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in records)
    for r in records: print(json.dumps(r, indent=1), flush=True)

if __name__ == '__main__': sys.exit(main())
