#!/usr/bin/env bash
# torchao 0.18.0: its codebook quantization (a prototype) ruins a whole matrix where one block of weights has no positive number.
#
# Valid input: random normal weights, 3 bits, one scale for each 8 weights; and weights of 64 × 64 with one row of negative numbers,
#              a scale for each row (the default), next to the same weights with the opposite sign.
# Expected:    an error like that of round-to-nearest with as many bits and scales; and the same one whatever the sign, as
#              a codebook is made from the weights. Nothing is said of signs where CodebookWeightOnlyConfig is described.
# Seen:        an error thousands of times as large as the weights, without a warning. A block's scale is its largest number, not its
#              largest magnitude; where all are negative it is set to 1e-9, and the block divided by it is what k-means sees:
#              numbers of ten millions take the entries of the table, which all blocks share, so that the others come out wrong too.
#              With the opposite sign all is well. Of blocks of 8 random weights every 256th has no positive number.
# Workaround:  blocks so large that each has a positive number about as large as its largest magnitude.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torchao==0.18.0 'torch>=2.9,<2.14' numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> log <<'PYTHON' || { rc=$?; tail -n 3 log >&2; exit $rc; }
import logging, sys
logging.disable(logging.WARNING)
import torch
from torchao.prototype.quantization.codebook import codebook_weight_only
from torchao.quantization import quantize_
def error(w, keep=slice(None), **settings):
    "of the rows kept, as a part of their norm"
    net = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
    net[0].weight.data = w.clone()
    quantize_(net, codebook_weight_only(dtype=torch.uint3, **settings))
    return ((net[0].weight.dequantize() - w)[keep].norm()/w[keep].norm()).item()
def nearest(w, size):
    "the same of round-to-nearest: eight levels from -1 to 1, times the largest magnitude of a block"
    blocks = w.view(-1, size)
    scale = blocks.abs().amax(1, keepdim=True)
    return (((3.5*(blocks/scale + 1)).round()/3.5 - 1)*scale - blocks).norm().item()/w.norm().item()
torch.manual_seed(0)
w = .02*torch.randn(256, 256)
small, plain = error(w, scale_block_size=8), nearest(w, 8)
print(f"random weights, blocks of 8: error {small:.3g} of the weights; round-to-nearest {plain:.3g}")
w = .02*torch.randn(64, 64)
w[0] = -w[0].abs()
there, mirrored, others = error(w), error(-w), error(w, slice(1, None))
print(f"one row of negative numbers: error {there:.3g}, of the other rows alone {others:.3g}; with the opposite sign {mirrored:.3g}")
sys.exit(0 if small > 10 and plain < .3 and there > 10 and mirrored < .3 else "changed")
PYTHON
