#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: reading one tensor takes twice its bytes of memory.
#
# Valid input: a file with one float32 tensor of 256 MiB, read by safe_open(file, 'numpy').get_tensor(name).
# Expected:    memory grows by what the array takes, 256 MiB, as with numpy.fromfile of the same bytes.
# Seen:        the resident memory of the process peaks 512 MiB higher: the file is mapped, its pages are touched while they
#              are copied into the array, and both count until the file is closed. Whoever budgets memory by the largest
#              tensor (an embedding of a large vocabulary has half a gigabyte and more) is off by a factor of two.
# Workaround:  read the header, then numpy.fromfile(file, dtype, count, offset=8 + header + begin).
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" -c "
import numpy as np
from safetensors.numpy import save_file
save_file({'x': np.ones(2**26, np.float32)}, 'x.safetensors')"
cat > grown.py <<'PYTHON'
"MiB that the peak of resident memory grows by when the tensor is read: grown.py lib|numpy"
import json, resource, sys
import numpy as np
from safetensors import safe_open
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**10 if sys.platform != 'darwin' else 2**20)
before = peak()
if sys.argv[1] == 'lib':
    with safe_open('x.safetensors', 'numpy') as f: x = f.get_tensor('x')
else:
    with open('x.safetensors', 'rb') as f: head = json.loads(f.read(n := int.from_bytes(f.read(8), 'little')))
    x = np.fromfile('x.safetensors', np.float32, 2**26, offset=8 + n + head['x']['data_offsets'][0])
assert x.size == 2**26 and x[0] == x[-1] == 1
print(round(peak() - before))
PYTHON
lib=$("$folder/venv/bin/python" grown.py lib); plain=$("$folder/venv/bin/python" grown.py numpy)
echo "256 MiB read: memory grows by $lib MiB with safe_open, by $plain MiB with numpy.fromfile"
[ "$lib" -gt 440 ] && [ "$plain" -lt 330 ] || { echo "changed"; exit 1; }
