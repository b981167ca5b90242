"A folder of notebooks is a package, its notebooks are its modules, and it imports from folders with smaller numbers alone."
import json, re, subprocess, sys, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {p.name[3:]: p for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*/'))}

def exported(path):
    "The module that a notebook exports, None for one that exports nothing."
    code = (''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')
    return next((m[1] for s in code if (m := re.match(r'#\| *default_exp (\S+)', s))), None)

def test_imports_point_down():
    r = subprocess.run([Path(sys.executable).with_name('lint-imports'), '--no-cache'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and '1 kept, 0 broken' in r.stdout, r.stdout

def test_the_contract_is_the_order_of_the_folders():
    layers = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['importlinter']['contracts'][0]['layers']
    assert [*reversed(layers)] == ['utils', 'config', *list(ROOMS)[1:], 'hf | __main__']

def test_a_notebook_is_the_module_of_its_name():
    for room, folder in ROOMS.items():
        names = {p: exported(p) for p in folder.glob('*.ipynb')}
        for p, module in names.items():
            want = dict(overview='__init__', main='__main__').get(p.stem[3:], p.stem[3:])
            assert re.fullmatch(r'\d\d_[a-z_]+', p.stem) and module == f'{room}.{want}', p
        assert len(names) <= 14 and {p.stem for p in (ROOT/'nativebit'/room).glob('*.py')} == {m.partition('.')[2] for m in names.values()}, room

def test_what_is_promised_is_importable_from_its_package():
    code = """
from nativebit.quant import to_blocks, from_blocks, init_codebook, assign, dequantize, lloyd, project, fake_quantize, EMAState, ema_canonical, ema_batch_mean
from nativebit.quant import compute_quant_reg, requantize_params, compute_quant_diagnostics, NativeBitDense
from nativebit.models import causal_attention, cross_head_attention, context_kl, NativeBitGPT
from nativebit.formats import pack_indices, unpack_indices, write_pack, read_pack
from nativebit.kernels import lut_linear
from nativebit.pytorch import NativeBitLinear
from nativebit import get_config
from nativebit.config import CONFIGS
"""
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_overviews_say_what_the_notebooks_say():
    for room, folder in ROOMS.items():
        text = '\n'.join(''.join(c['source']) for c in json.loads((folder/'00_overview.ipynb').read_text())['cells'] if c['cell_type'] == 'markdown')
        for p in folder.glob('*.ipynb'):
            title, subtitle = re.match(r'# (.+)\n+> (.+)', ''.join(json.loads(p.read_text())['cells'][0]['source'])).groups()
            assert p.stem in ('00_overview', '09_main') or f'- [{title}]({p.name}) (`nativebit.{exported(p)}`): {subtitle}\n' in text + '\n', p

def test_no_line_of_code_is_cut_off_on_screen():
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in p.parts: continue
        for c in json.loads(p.read_text())['cells']:
            long = [l for l in ''.join(c['source']).split('\n') if c['cell_type'] == 'code' and len(l) > 110]
            assert not long, f"{p.relative_to(ROOT)}, {c['id']}: {long[0]}"

def test_importing_the_package_is_cheap():
    code = "import sys, time; t = time.perf_counter(); import nativebit; print(time.perf_counter() - t); assert not {'jax', 'torch', 'numpy'} & set(sys.modules)"
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and float(r.stdout) < .3, r.stderr

def test_no_link_is_broken():
    pages = [*(ROOT/'nbs').rglob('*.ipynb'), *ROOT.glob('*.md'), *(ROOT/'data').rglob('README.md'), ROOT/'kernels'/'README.md', ROOT/'findings'/'README.md']
    for page in (p for p in pages if '.ipynb_checkpoints' not in p.parts):
        cells = json.loads(page.read_text())['cells'] if page.suffix == '.ipynb' else [dict(cell_type='markdown', source=page.read_text())]
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\(([^)#\s]+)', text): assert re.match('https?:', link) or (page.parent/link).exists(), f"{page.relative_to(ROOT)}: {link}"

def test_every_notebook_links_to_its_neighbours():
    r = subprocess.run([sys.executable, ROOT/'tools'/'links.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
