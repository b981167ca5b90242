"Notebooks run on a GPU: what their cells wrote comes into the repository, and nothing else does."
import json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import gpu_cells

def stream(text): return dict(name='stdout', output_type='stream', text=[text])
def notebook(path, *cells):
    "A notebook of (code, outputs)."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='code', id=str(i), metadata={}, execution_count=None, source=s.splitlines(True), outputs=o) for i,(s,o) in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5), indent=1) + '\n')
def outputs(path): return [c['outputs'] for c in json.loads(path.read_text())['cells']]

def test_the_most_wanted_come_first():
    paths = sorted(gpu_cells.gpu_notebooks(), key=gpu_cells.by_want)
    assert [Path(p).stem.partition('_')[2] for p in paths[:len(gpu_cells.FIRST)]] == [n.partition('/')[2] for n in gpu_cells.FIRST]

CELLS = ["n = 6", "#| gpu\nimport warnings; warnings.warn('so'); print(n*7)", "#| tpu\n1/0", "#| gpu\n1/0", "#| gpu\nprint('/tmp/here')", "#| gpu\nobject()"]

def test_cells_for_a_gpu_are_run(tmp_path):
    path, out = tmp_path/'nb.ipynb', tmp_path/'out'/'nb.ipynb'
    notebook(path, *[(c, [stream('old')]) for c in CELLS])
    r = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT/"tools")!r}); from gpu_cells import *; print(run_one(Path(sys.argv[1]), Path(sys.argv[2])))', path, out], capture_output=True, text=True, cwd=ROOT)
    assert r.stdout.splitlines()[-1] == 'False' and 'ended in an error' in r.stdout and 'only this machine has' in r.stdout and 'ZeroDivisionError' in r.stderr, r.stderr
    got = outputs(out)
    assert got[:5] == [[], [stream('42\n')], [], [], []] and '<object at 0x' in str(got[5])

def test_outputs_are_merged_where_the_code_is_the_same(tmp_path):
    here, ran = tmp_path/'repo'/'nbs'/'a.ipynb', tmp_path/'out'/'nbs'/'a.ipynb'
    notebook(here, ('1', [stream('one')]), ('#| gpu\n2', []), ('#| gpu\n3', [stream('three')]), ('#| gpu\n4', [stream('four')]))
    notebook(ran, ('1', [stream('uno')]), ('#| gpu\n2', [dict(output_type='execute_result', execution_count=7, metadata={}, data={'text/plain': ['<a at 0x7f12>']})]), ('#| gpu\n3 + 0', [stream('tre')]), ('#| gpu\n4', []))
    assert gpu_cells.merge(tmp_path/'out', tmp_path/'repo') == {here: 1}
    one, two, three, four = outputs(here)
    assert (one, three, four) == ([stream('one')], [stream('three')], [stream('four')])
    assert two[0]['execution_count'] is None and two[0]['data'] == {'text/plain': ['<a>']}
    notebook(ran, ('#| gpu\n2', [stream('/home/me')]))
    with pytest.raises(SystemExit, match='only this machine has'): gpu_cells.merge(tmp_path/'out', tmp_path/'repo')
    assert outputs(here)[1] == two

def test_a_folder_of_something_else_is_refused(tmp_path):
    for d in 'none', 'other': (tmp_path/d).mkdir()
    notebook(tmp_path/'other'/'a.ipynb', ('#| gpu\n1', [stream('1')]))
    with pytest.raises(SystemExit, match='has no notebooks'): gpu_cells.merge(tmp_path/'none', tmp_path)
    with pytest.raises(SystemExit, match='has no such notebook'): gpu_cells.merge(tmp_path/'other', tmp_path)

def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cells, 'gpu_name', lambda: None)
    with pytest.raises(SystemExit, match='no NVIDIA GPU here'): gpu_cells.run(tmp_path, [], 1)

def test_a_notebook_that_takes_too_long_leaves_what_there_is(tmp_path, capsys):
    path = tmp_path/'nb.ipynb'
    notebook(path, ("#| gpu\nprint(42)", []), ("import time; time.sleep(60)", []))
    assert not gpu_cells.run(tmp_path/'out', [str(path)], 6, rehearse=True) and 'at the limit' in capsys.readouterr().out
    assert outputs(tmp_path/'out'/str(path).lstrip('/'))[0] == [stream('42\n')]
