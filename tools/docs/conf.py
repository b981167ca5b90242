"How Sphinx makes the book out of the notebooks as they are, none of them run again: `make docs`."
import json, re
from pathlib import Path
from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
PARTS = {'Tutorials': ['tutorials/quickstart', 'tutorials/lut_b', 'tutorials/qat_on_a_gpu', 'tutorials/on_a_tpu'], 'The method': ['01_quant'], 'What is stored': ['02_formats'], 'A network and its text': ['03_data', '05_models', '06_evaluation'],
         'Training': ['08_train', '04_distributed'], 'Models that are there': ['07_ptq', '12_interop', '13_pipelines', '18_serving', '15_hf'], 'Fast': ['09_kernels', '10_inference', '11_pytorch'],
         'Experiments': ['14_experiments', 'studies'], 'Foundations': ['00_utils', '00_config', '16_command', '17_api']}

project, author, copyright = 'NativeBit', 'NativeBit developers', '2026, NativeBit developers'
extensions = ['myst_nb', 'sphinx_external_toc']
exclude_patterns = ['**/.ipynb_checkpoints', '_*', '**/_*', 'images/**']
html_theme, html_title = 'sphinx_book_theme', 'NativeBit'
html_theme_options = dict(repository_url='https://github.com/nativebit/nativebit', path_to_docs='nbs', use_repository_button=True, show_navbar_depth=1, navbar_persistent=[])
html_math_renderer = 'mathml'   # formulas as the browser's own, so that no script is fetched
nb_execution_mode, nb_merge_streams = 'off', True
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3

def chapter(name:str)->dict:
    "A folder, its first page in front, or a notebook that stands alone."
    if (NBS/f'{name}.ipynb').exists(): return dict(file=name)
    first, *rest = [f'{name}/{p.stem}' for p in sorted((NBS/name).glob('*.ipynb'))]
    return dict(file=first, sections=[dict(file=p) for p in rest]) if first.endswith('00_overview') else dict(chapters=[dict(file=p) for p in (first, *rest)])

def contents()->dict:
    "All notebooks, in parts."
    parts = []
    for caption,names in PARTS.items():
        found = [chapter(n) for n in names]
        parts.append(dict(caption=caption, chapters=[c for f in found for c in f.get('chapters', [f])]))
    return dict(format='jb-book', root='index', parts=parts)

external_toc_path = str(ROOT/'_docs'/'_toc.yml')
Path(external_toc_path).parent.mkdir(exist_ok=True)
Path(external_toc_path).write_text(json.dumps(contents()))   # JSON is YAML

def with_tags(app, name, source):
    "nbdev's directives as tags that MyST-NB knows: hidden cells go, `echo: false` hides the code."
    if not source[0].startswith('{'): return
    nb = json.loads(source[0])
    nb['metadata']['language_info'] = dict(name='python', pygments_lexer='ipython3')   # knows `!` and `%`
    for c in nb['cells']:
        text = ''.join(c['source'])
        tags = ['remove-cell'] if re.search(r'^#\| *(hide|default_exp)', text, re.M) else ['remove-input'] if re.search(r'^#\| *echo: false', text, re.M) else []
        c['metadata']['tags'] = tags
        if c['cell_type'] == 'code': c['source'] = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
        for o in c.get('outputs', []):
            if shown := o.get('data', {}).get('text/markdown'): o['data']['text/markdown'] = re.sub(r'\]\(([^):]+)\.ipynb', r'](\1.html', ''.join(shown))
    source[0] = json.dumps(nb)

def visit_math(self, node, display='inline'):
    self.body.append(convert(node.astext(), display=display).replace('<mo>&#x02016;</mo>', '<mo stretchy="false">&#x02016;</mo>'))   # Chromium stretches a norm's bars
    raise nodes.SkipNode

def setup(app):
    app.connect('source-read', with_tags)
    app.add_html_math_renderer('mathml', (visit_math, None), (lambda self, node: visit_math(self, node, 'block'), None))
