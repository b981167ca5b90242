#!/usr/bin/env bash
# openvino 2026.4.1: openvino.helpers.pack_data packs u4 (and u2) from the highest bits down; the runtime reads them from the lowest up.
#
# Valid input: the numbers 0 1 2 3 … 7 as uint8, packed by pack_data(…, Type.u4) into a u4 constant, and Convert.
# Expected:    0 1 2 3 4 5 6 7. For u3 that is what comes out.
# Seen:        1 0 3 2 5 4 7 6, without an error; for u2 3 2 1 0. unpack_data undoes pack_data, so that a test of the two alone passes.
# Workaround:  pack them oneself, the first number in the lowest bits.
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
from openvino.helpers import pack_data
def through(kind, idx):
    t = ov.Tensor(kind, ov.Shape(idx.shape)); t.data[:] = pack_data(idx, kind)
    x = op.parameter([1], ov.Type.f32)
    model = ov.Model([op.add(op.convert(op.constant(t), 'f32'), x)], [x])
    return ov.Core().compile_model(model, 'CPU')(np.zeros(1, np.float32))[0].astype(int)
same = {}
for kind,bits in ((ov.Type.u2, 2), (ov.Type.u3, 3), (ov.Type.u4, 4)):
    idx = (np.arange(64) % 2**bits).astype(np.uint8)
    got = through(kind, idx)
    same[bits] = bool((got == idx).all())
    print(f"u{bits}: put in {idx[:8]}, came out {got[:8]}")
sys.exit(0 if same == {2: False, 3: True, 4: False} else "changed")
PYTHON
