"Set before any test imports Triton: without a GPU its kernels run in the interpreter."
import os
from importlib.util import find_spec

if find_spec('torch') is not None:
    import torch
    if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')
