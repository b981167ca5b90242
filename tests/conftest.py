"Without a GPU Triton's kernels run in the interpreter, and nothing asks the hub: both must be said before any test imports what reads them; slow tests run with `-m slow` alone."
import os
from importlib.util import find_spec
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'   # where there is no network, asking means to ask five times and to wait in between

worker = os.environ.get('PYTEST_XDIST_WORKER', '')
if worker and hasattr(os, 'sched_setaffinity'):   # macOS has none
    # before PyTorch is imported, which starts a thread a core: threads that wait for each other on one core cost up to ten times more
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

if find_spec('torch') is not None:
    import torch
    if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')

if find_spec('hypothesis') is not None:   # what passes once passes everywhere; HYPOTHESIS_PROFILE=default draws new examples
    from hypothesis import settings
    settings.register_profile('same', derandomize=True)
    settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'same'))

@pytest.fixture(autouse=True)
def same_draws():
    "A test's random numbers are its own, whichever tests ran before it."
    if find_spec('torch') is not None: torch.manual_seed(0)

def pytest_configure(config):
    import compiled   # before any test has a cache of its own
    config.addinivalue_line('markers', 'slow: too long for every run; make test-slow')

LONGEST = 'kernels resume overrides torch cli fuzz bench quantize wheel objective noun api imports hf qat reliability cpu mixed_bits fsdp codebook serve pack verdict self plots habits lora wrong chat'.split()   # the rest is short

def pytest_collection_modifyitems(config, items):
    "Files that take longest are begun first: a process runs whole files, so that it makes what their tests share once."
    rank = {f'test_{n}': i for i,n in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if config.getoption('-m'): return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='slow: make test-slow'))
