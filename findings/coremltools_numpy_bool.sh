#!/usr/bin/env bash
# coremltools 9.0: a program with a reduction of a constant is written, and can't be read again where NumPy is 2.
#
# Valid input: an mlprogram whose reduce_mean (keep_dims=True) has a constant input, saved without folding it, and read by coremltools' own reader.
# Expected:    the program, as it was before it was saved.
# Seen:        TypeError: 'numpy.bool' object cannot be interpreted as an integer. The reader makes keep_dims a numpy.bool, and np.mean takes a bool alone.
# Workaround:  make bool of numpy.bool before an operation is evaluated.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check coremltools==9.0 numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging, sys
logging.getLogger('coremltools').setLevel(logging.ERROR)
import numpy as np, coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.milproto.load import load
@mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)
def program(x):
    mean = mb.reduce_mean(x=np.arange(24, dtype=np.float32).reshape(2, 12), axes=[-1], keep_dims=True)
    return mb.add(x=x, y=mean)
model = ct.convert(program, convert_to='mlprogram', minimum_deployment_target=ct.target.iOS18, skip_model_load=True, pass_pipeline=ct.PassPipeline.EMPTY,
                   compute_precision=ct.precision.FLOAT32)
model.save('a.mlpackage')
spec = ct.utils.load_spec('a.mlpackage')
try: load(spec, spec.specificationVersion, 'a.mlpackage/Data/com.apple.CoreML/weights')
except TypeError as e: print(f"written, and not read again: TypeError: {e}"); sys.exit(0)
sys.exit("changed")
PYTHON
