#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: save_file writes an array's memory as it lies, and says nothing.
#
# Valid input: a float32 array that is the transpose of another, as x.T gives it.
# Documented:  "Tensors need to be contiguous and dense" (docstring of safetensors.numpy.save_file).
#              So a transposed view breaks a rule that is written down, and the surprise is that nobody checks it.
# Expected:    the numbers come back, or an error, as from safetensors.torch ("You are trying to save a non contiguous tensor").
# Seen:        save_file returns, load_file gives an array of the same shape and type with other numbers.
#              A view that runs backwards (x[::-1]) is worse: what is read begins where the view does, at its last row,
#              and goes on behind the end of the array, so the file holds memory of something else.
#              In safetensors/numpy.py, _flatten passes tensor.ctypes.data and tensor.nbytes on; strides are not looked at.
# Workaround:  numpy.ascontiguousarray before save_file.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file

def there_and_back(x):
    save_file({'x': x}, 'x.safetensors')
    return load_file('x.safetensors')['x']

print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
x = np.arange(6, dtype=np.float32).reshape(2, 3)
try: back = there_and_back(x.T)
except Exception as e: sys.exit(f"changed: save_file refuses a transposed view ({type(e).__name__}: {e})")
print("written:", x.T.tolist())
print("read:   ", back.tolist())
print("row by row, after ascontiguousarray:", there_and_back(np.ascontiguousarray(x.T)).tolist())

back = there_and_back(np.arange(3, dtype=np.float32)[::-1])
print("written, a view backwards: [2.0, 1.0, 0.0]")
print("read:                     ", back.tolist())
if np.array_equal(there_and_back(x.T), x.T): sys.exit("changed: a transposed view comes back as it was")
print("seen: other numbers, and no error")
PYTHON
