#!/usr/bin/env bash
# openvino 2026.4.1: opset.constant(Tensor(array, shape, type)) neither copies the array nor keeps it, so its numbers change later.
#
# Valid input: packed numbers as the documentation of Tensor makes them, `Tensor(array, shape, Type.u4)`, which says that the
#              memory is shared; and `constant(tensor)`, whose `shared_memory` is False unless asked for: "data is being copied".
# Expected:    the constant holds the numbers, whoever still has the array. (The Tensor does keep its array.)
# Seen:        where array and Tensor are made in a function that returns the node, their memory is given back, and the constant
#              reads whatever comes next: other weights, without an error. The same with Type.u8 for the type.
# Workaround:  make the tensor first, `Tensor(type, shape)`, and write into its `.data`.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import numpy as np, openvino as ov, openvino.opset15 as op
n = 2**20
def wrapped(): return op.constant(ov.Tensor(np.full(n, 7, np.uint8), ov.Shape([n]), ov.Type.u8))
def written():
    t = ov.Tensor(ov.Type.u8, ov.Shape([n])); t.data[:] = 7
    return op.constant(t)
def wrong(make):
    node = make()
    others = [np.full(n, 9, np.uint8) for _ in range(20)]
    x = op.parameter([1], ov.Type.f32)
    model = ov.Model([op.add(op.convert(node, 'f32'), x)], [x])
    return int((ov.Core().compile_model(model, 'CPU')(np.zeros(1, np.float32))[0] != 7).sum())
kept, lost = wrong(written), wrong(wrapped)
print(f"of {n:,} sevens, wrong in a tensor that was written into: {kept:,}; in one that wraps an array: {lost:,}")
sys.exit(0 if lost and not kept else "changed")
PYTHON
