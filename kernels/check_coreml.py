"""A model through `nativebit export --to coreml`, read again: each parameter compared bit for bit, the program evaluated in NumPy. Appends to data/results/exports.jsonl.

  python kernels/check_coreml.py --model DIR --out data/results/exports.jsonl

DIR is any model that `nativebit export` takes. Core ML itself runs on a Mac alone: what is compared with our CPU library in float is what coremltools' own value inference
makes of the file's program, in float16 as it says, and with float32 in float16's place (`wide`), which leaves the rounding of parameters alone."""
import argparse, json, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
from bench_cpu import ROOT, commit, cpu_name, threads
from check_gguf import compared

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', required=True); ap.add_argument('--tokens', type=int, default=64)
    ap.add_argument('--out', default=str(ROOT/'data'/'results'/'exports.jsonl'))
    a = ap.parse_args()
    from nativebit.config import GEOMETRIES
    from nativebit.inference.cpu import CpuNetwork
    from nativebit.interop.to_coreml import MilProgram, check_package
    from nativebit.pipelines.exporting import export_step
    from nativebit.pipelines.opening import opened
    def name_of(quant): return next((g for g,s in GEOMETRIES.items() if all(getattr(quant, k) == v for k,v in s.items())), 'another')
    o, text = opened(a.model), (ROOT/'nativebit'/'assets'/'calibration.txt').read_text()
    ids = [int(i) for i in o.tokens_by().encode(text[:16*a.tokens])][:a.tokens]
    with tempfile.TemporaryDirectory() as tmp:
        begin = time.perf_counter()
        out = export_step(o, Path(tmp)/'coreml')
        seconds = time.perf_counter() - begin
        ours = CpuNetwork(o.pack, 'float').logits(ids)
        kinds = [x.op_type for x in MilProgram(out).ops.values()]
        record = dict(kind='coreml', model=Path(a.model).name, geometry=name_of(o.pack.config.quant) if o.pack.quantized else 'float', embed=str(o.pack.tensors['embed'].dtype),
                      bytes=sum(p.stat().st_size for p in (out/'model.mlpackage').rglob('*') if p.is_file()), export_s=round(seconds, 1),
                      parameters_bit_for_bit=check_package(o.pack, out), tables=kinds.count('constexpr_lut_to_dense'), rows=kinds.count('constexpr_blockwise_shift_scale'), tokens=len(ids),
                      wide=compared(ours, MilProgram(out, wide=True)(ids)), float16=compared(ours, MilProgram(out)(ids)), library=f"coremltools {version('coremltools')}",
                      runs='not run: Core ML predicts on a Mac alone; NumPy evaluates the program of the file', threads=threads(), cpu=cpu_name(), commit=commit(),
                      command='python kernels/check_coreml.py --model DIR')
    with open(a.out, 'a') as f: f.write(json.dumps(record) + '\n')
    print(json.dumps(record, indent=1), flush=True)

if __name__ == '__main__': sys.exit(main())
