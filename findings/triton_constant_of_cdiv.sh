#!/usr/bin/env bash
# Triton 3.6.0, which PyTorch 2.10 and 2.11 bring: what tl.cdiv makes of constants is a constant by its annotation only.
#
# Valid input: in a kernel, lines: tl.constexpr = tl.cdiv(2*N, 128) with N: tl.constexpr, and then tl.arange(0, lines).
# Expected:    it compiles, as the same with (2*N + 127)//128 does: all parts are known when the kernel is compiled, and the
#              name is annotated as a constant.
# Seen:        the assignment is accepted, but the name holds an int32 of the running kernel (tl.static_print shows int32[]);
#              the first use as a constant fails, "arange's arguments must be of type tl.constexpr", and where that is in
#              another function, the message names only the call. In 3.7.1 it compiles: there a function whose results are
#              constants gives constants.
# Who meets it: whoever writes a kernel with the newer version for users of both. With TRITON_INTERPRET=1 both versions run it.
# Workaround:  write the division with //, or compute the constant before the launch and pass it.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
cat > "$folder/kernel.py" <<'PYTHON'
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def by_function(x, N: tl.constexpr):
    lines: tl.constexpr = tl.cdiv(2*N, 128)
    tl.store(x + tl.arange(0, lines), 1.)

@triton.jit
def by_operator(x, N: tl.constexpr):
    lines: tl.constexpr = (2*N + 127)//128
    tl.store(x + tl.arange(0, lines), 1.)

def outcome(kernel):
    "Compiled for compute capability 9.0, which needs no GPU."
    source = ASTSource(kernel, signature=dict(x='*fp32', N='constexpr'), constexprs=dict(N=128))
    try: triton.compile(source, target=GPUTarget('cuda', 90, 32))
    except triton.CompilationError as e: return str(e).splitlines()[-1]
    return 'compiles'

found = [outcome(k) for k in (by_function, by_operator)]
print(f'triton {triton.__version__}: by tl.cdiv: {found[0]}; by //: {found[1]}')
sys.exit(found != sys.argv[1:])
PYTHON
changed=0
try() {   # version, what tl.cdiv does
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$1" numpy==2.4.6 || exit 2
    TRITON_INTERPRET=0 TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernel.py" "$2" compiles || changed=1
}
try 3.6.0 "arange's arguments must be of type tl.constexpr"
try 3.7.1 compiles
exit $changed
