#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (CheckpointManager, with tensorstore 0.1.86 and jax 0.10.2 on a CPU): a process grows with every save.
#
# Valid input: the same sixty arrays of 32 × 32 float32 numbers, saved again and again; the manager keeps the latest two.
# Expected:    after some saves resident memory stays what it is: nothing of an older checkpoint is needed any more.
# Seen:        about a kilobyte an array and save stays behind, 50 KB and more a save here, without an end; garbage collection
#              gives none of it back. A run that keeps a state of a few hundred arrays each minute grows by tens of megabytes
#              in an hour, whatever the size of the arrays.
# Workaround:  save more rarely, or arrays stacked into fewer ones.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 || exit 2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import gc, os, sys
import jax.numpy as jnp, orbax.checkpoint as ocp
state = {f'w{i}': jnp.ones((32, 32)) for i in range(60)}
manager = ocp.CheckpointManager(os.path.abspath('states'), options=ocp.CheckpointManagerOptions(max_to_keep=2))
def resident():
    manager.wait_until_finished(); gc.collect()
    return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/1024
def save(steps):
    for step in steps: manager.save(step, args=ocp.args.StandardSave(state))
save(range(50))
memory = [resident()]
for part in range(3):
    save(range(50 + 80*part, 130 + 80*part))
    memory.append(resident())
grown = [(b - a)/80 for a, b in zip(memory, memory[1:])]
print('KB a save, in three parts of 80 saves:', ', '.join(f'{x:.0f}' for x in grown))
sys.exit(0 if min(grown) > 15 else 'changed')
PYTHON
