"""End every notebook with a link to the one before and the one after it. `--check` writes nothing, and exits 1 where a link is missing or wrong.

Reading order: the index, folders and notebooks by number, then studies and tutorials as the index lists them."""
import json, os, re, sys
from pathlib import Path

NBS, ID = Path(__file__).resolve().parent.parent/'nbs', 'previous-next'

def cells(path): return json.loads(path.read_text())['cells']
def title(path): return re.match(r'# (.+?)(?: †)?\n', ''.join(cells(path)[0]['source']) + '\n')[1]

def reading_order():
    "All notebooks. One that is neither in a numbered place nor in the index comes last."
    numbered = sorted(NBS.glob('[0-9][0-9]_*'), key=lambda p: (p.name[:2], p.is_file()))
    chapters = [p for n in numbered for p in (sorted(n.glob('*.ipynb')) if n.is_dir() else [n])]
    table = re.findall(r'^\| (?:studies|tutorials) \|.*', '\n'.join(''.join(c['source']) for c in cells(NBS/'index.ipynb')), re.M)
    listed = [NBS/link for row in table for link in re.findall(r'\]\(([^)]+\.ipynb)\)', row)]
    rest = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    return [*dict.fromkeys([NBS/'index.ipynb', *chapters, *listed, *rest])]

def links(path, before, after):
    "The text of a notebook's last cell."
    link = lambda word, p: f"{word}: [{title(p)}]({os.path.relpath(p, path.parent)})" if p else ''
    return ' · '.join(filter(None, (link('Previous', before), link('Next', after))))

def with_links(path, text):
    "The notebook as it should be, in nbdev's spelling."
    nb = json.loads(path.read_text())
    last = dict(cell_type='markdown', id=ID, metadata={}, source=[text])
    nb['cells'] = [c for c in nb['cells'] if c.get('id') != ID] + [last]
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'

def main(check):
    order, wrong = reading_order(), []
    for before, path, after in zip([None, *order], order, [*order[1:], None]):
        new = with_links(path, links(path, before, after))
        if new == path.read_text(): continue
        wrong.append(path)
        if not check: path.write_text(new)
    for path in wrong: print(f"{path.relative_to(NBS.parent)}: {'run python tools/links.py' if check else 'written'}")
    return int(check and bool(wrong))

if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
