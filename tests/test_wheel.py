"The package as a wheel, in an environment and a folder where no checkout is: it brings what its code and the demo need, and says where the rest is."
import os, shutil, subprocess, sys, sysconfig, venv, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

def run(*words, **kwargs): return subprocess.run([str(w) for w in words], capture_output=True, text=True, **kwargs)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy, so that nothing of an earlier build is in it and nothing is left in the checkout."
    copy = tmp_path_factory.mktemp('source')
    shutil.copytree(ROOT/'nativebit', copy/'nativebit', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/'data'/'stdlib', copy/'data'/'stdlib')
    r = run(sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '--quiet', '--disable-pip-version-check', '-w', 'dist', cwd=copy)
    assert r.returncode == 0, r.stderr
    return next((copy/'dist').glob('nativebit-*.whl'))

@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "An environment that holds the wheel, and finds its dependencies where this one has them; what is editable here is not there."
    home = tmp_path_factory.mktemp('home')
    venv.create(home/'venv', symlinks=True)
    site = home/'venv'/'lib'/f'python{sys.version_info.major}.{sys.version_info.minor}'/'site-packages'
    r = run(sys.executable, '-m', 'pip', 'install', wheel, '--no-deps', '--no-compile', '--quiet', '--disable-pip-version-check', '--target', site)
    assert r.returncode == 0, r.stderr
    (site/'dependencies.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}))
    return home/'venv'/'bin'/'python'

@pytest.fixture(scope='module')
def outside(python, tmp_path_factory):
    "Run Python words in a folder where no checkout is."
    cwd = tmp_path_factory.mktemp('outside')
    (cwd/'some.txt').write_text('\n\n'.join(f'text number {i} of a few' for i in range(400)))
    env = {k: v for k,v in os.environ.items() if not k.startswith('PYTHON')} | dict(JAX_PLATFORMS='cpu', NATIVEBIT_CACHE=str(cwd/'cache'))
    def outside(*words): return run(python, *words, cwd=cwd, env=env)
    outside.cwd = cwd
    return outside

def test_the_wheel_holds_every_file_of_the_package(wheel):
    there = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    package = {str(p.relative_to(ROOT)) for p in (ROOT/'nativebit').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    compiled = {'nativebit/kernels/_cpu.so'} if wheel.name.split('-')[-1] != 'any.whl' else set()
    assert bool(compiled) == any(map(shutil.which, ('cc', 'gcc', 'clang')))
    assert there == package | compiled | {f'nativebit/assets/stdlib/{n}' for n in ('model.safetensors', 'meta.json', 'tokenizer.json')}

WITHOUT_A_CHECKOUT = """
import sys
from pathlib import Path
import nativebit
root = Path(sys.argv[1])
assert Path(nativebit.__file__).is_relative_to(sys.prefix), nativebit.__file__
assert not [p for p in sys.path if Path(p).resolve().is_relative_to(root) and 'site-packages' not in p], sys.path

from nativebit.data.tokenizers import load_tokenizer, shipped
from nativebit.models.checkpoint import load_network
assert shipped('stdlib').is_relative_to(sys.prefix) and load_network(shipped('stdlib'))[0].name == 'stdlib-5m'   # the demo's

tok, text = load_tokenizer(4096), 'def parse(path): return open(path).read()  # é'
assert tok.decode(tok.encode(text)) == text and 0 < len(tok.encode(text)) < 30

from matplotlib import rc_context, style
from nativebit.experiments.plots import STYLE, run_colors
with style.context(STYLE): assert run_colors(2) == ['#0072b2', '#d55e00']

from nativebit.utils.cli import UserError
from nativebit.evaluation.results_file import add_row, begin_rows, load_results, run_header
begin_rows('rows.jsonl', run_header('results', dict(dataset='stdlib'))); add_row('rows.jsonl', method='rtn')
assert load_results('rows.jsonl')[1] == load_results(Path('rows.jsonl').absolute())[1] == [dict(method='rtn')]
try: load_results('headline')
except UserError as e: print(e)
"""

def test_tokenizer_checkpoint_style_and_results(outside):
    r = outside('-c', WITHOUT_A_CHECKOUT, ROOT)
    assert r.returncode == 0, r.stderr
    assert r.stdout == 'data/results comes with the repository and not with the package; clone the repository and run there, or give the path of a .jsonl file\n'

def test_a_training_and_its_picture(outside):
    r = outside('-m', 'nativebit', 'train', '--config', 'tiny', '--dataset', 'text:some.txt', '--name', 'run', '--max-steps', 3, '--batch-size', 2,
                '--log-every', 1, '--val-every', 3, '--val-batches', 1, '--test-tokens', 128)
    assert r.returncode == 0, r.stderr
    assert {p.name for p in (outside.cwd/'logs'/'run').iterdir()} == {'log.jsonl', 'model.safetensors', 'meta.json', 'report.html'}
    r = outside('-m', 'nativebit', 'plots', 'logs/run', '--out', 'runs.png')
    assert (r.returncode, r.stdout) == (0, 'drawn: runs.png\n'), r.stderr
    assert (outside.cwd/'runs.png').read_bytes().startswith(b'\x89PNG')
