"Print README.md as nbs/index.ipynb has it: stored outputs included, code hidden, image paths seen from the root."
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

nb = nbformat.read(Path(__file__).parent.parent/'nbs'/'index.ipynb', as_version=4)
exporter = MarkdownExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
text = exporter.from_notebook_node(nb)[0]
text = re.sub(r'\]\((images/|(?:\w+/)?\w+\.ipynb)', lambda m: f'](nbs/{m[1]}', text).replace('](../', '](')
print('<!-- Made from nbs/index.ipynb by `make readme`. -->\n' + re.sub(r'\n{3,}', '\n\n', text).strip())
