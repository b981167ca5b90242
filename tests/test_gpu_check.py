"`make gpu-check` without a GPU: its commands parse, exit codes are written as they were; and results that a GPU measured say whether entries were rounded."
import json, re, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from nativebit.config import GEOMETRIES, geometry_name, stored_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import gpu_check

LATER = set()   # geometries that are newer than the last sitting with a GPU: emptied at the next one

def check_shape(record, later=()):
    assert list(record) == ['git_hash', 'device', 'date', 'commands', 'bit_equal'] and [*map(geometry_name, record['bit_equal'])] == [g for g in GEOMETRIES if g not in later]
    assert record['commands'] and all(list(r) == ['command', 'exit', 'seconds'] for r in record['commands'])

def test_what_is_committed_is_green():
    if not gpu_check.RESULT.exists(): pytest.skip('no gpu_check.json yet')
    record = json.loads(gpu_check.RESULT.read_text())
    check_shape(record, LATER)
    assert [r for r in record['commands'] if r['exit']] == [] and all(x is True for x in record['bit_equal'].values())
    assert 'NVIDIA' in record['device'] and record['git_hash'] != 'unknown'

def test_commands_parse():
    groups = gpu_check.paragraphs(gpu_check.COMMANDS.read_text())
    lines = [l for g in groups for l in g]
    assert all(re.match(r'(cd \$ROOT && )?python -', l) or l.startswith('python $ROOT/tools/') for l in lines)
    assert all(find_spec(m) for l in lines for m in re.findall(r'python -m (nativebit\.\w+)', l))
    compared = [g for l in lines if ' bits ' in l for g in l.split(' bits ')[1].split()]
    assert sorted(map(geometry_name, compared)) == sorted(GEOMETRIES)
    run = [m[1] for l in lines if (m := re.search(r'nbdev_test\(path="([^"]+)", flags="gpu"', l))]   # given as arguments: `python -c` hands it no flags, and it would run all notebooks
    assert run == gpu_check.gpu_notebooks() and run
    rehearsed = [l for g in gpu_check.paragraphs(gpu_check.COMMANDS.read_text(), rehearse=True) for l in g]
    assert len(rehearsed) == len(lines) - 1 and not any('cudnn' in l for l in rehearsed)

def run_main(tmp_path, monkeypatch, commands, device='NVIDIA of paper'):
    (tmp_path/'commands.txt').write_text(commands)
    for n,x in dict(COMMANDS=tmp_path/'commands.txt', RESULT=tmp_path/'gpu_check.json', gpu_name=lambda: device).items(): monkeypatch.setattr(gpu_check, n, x)
    monkeypatch.setenv('NATIVEBIT_GIT_HASH', 'abc')
    with pytest.raises(SystemExit) as e: gpu_check.main()
    return e.value.code, json.loads((tmp_path/'gpu_check.json').read_text()) if device else None

ALL_EQUAL = 'for g in ' + ' '.join(GEOMETRIES) + '; do echo true > bits-$g.json; done\n\n'

def test_exit_codes_are_written_as_they_were(tmp_path, monkeypatch, capsys):
    code, record = run_main(tmp_path, monkeypatch, ALL_EQUAL + "python -c 'print(6*7)'\necho why; exit 3\n\nfalse | cat\npython -c 'import os; os.kill(os.getpid(), 9)'\n")
    check_shape(record)
    assert code == 1 and [r['exit'] for r in record['commands']] == [0, 0, 3, 1, 137]
    assert (record['git_hash'], record['device']) == ('abc', 'NVIDIA of paper')
    said = capsys.readouterr().out
    assert '== exit 3: echo why' in said and '\nwhy\n' in said and '\n42\n' not in said   # the output of what failed, and of nothing else

def test_it_passes_only_with_every_geometry(tmp_path, monkeypatch):
    assert run_main(tmp_path, monkeypatch, ALL_EQUAL)[0] == 0
    code, record = run_main(tmp_path, monkeypatch, 'echo true > bits-3bit-128.json; echo false > bits-3bit-8x64.json')
    assert code == 1 and record['bit_equal'] == {stored_name(g): g == '3bit-128' for g in GEOMETRIES}
    assert run_main(tmp_path, monkeypatch, 'true')[0] == 1   # nothing was compared

def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    assert 'no NVIDIA GPU here' in run_main(tmp_path, monkeypatch, 'true', None)[0] and not (tmp_path/'gpu_check.json').exists()

RESULTS = {p.stem: [json.loads(l) for l in p.read_text().splitlines()] for p in sorted((ROOT/'data'/'results').glob('*.jsonl'))}
FLOAT = {'float', 'control', 'taught', 'float_scratch'}

def on_gpu(records): return any('NVIDIA' in str(r.get('device')) for r in records)

def all_float(first, *rows):
    "Is it plain that no row is of a quantized network? What is not plain counts as quantized."
    if isinstance(c := first.get('config'), dict): return c['quant']['nativebit'] is False
    return all(r.get('method') in FLOAT or r.get('flags', {}).get('no-nativebit') for r in rows)

def says_what_it_lost(rows): return any(k.endswith('ppl') or k in ('kl', 'top1') for r in rows for k in r)

@pytest.mark.parametrize('name', [n for n,r in RESULTS.items() if on_gpu(r) and says_what_it_lost(r[1:]) and not all_float(*r)])
def test_results_of_a_gpu_say_whether_entries_were_rounded(name): assert RESULTS[name][0].get('entries') in ('rounded', 'not rounded')

NOTE = "† Measured when a GPU's compiler still dropped the rounding of codebooks"

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'studies').glob('*.ipynb')) + [ROOT/'nbs'/'index.ipynb'], ids=lambda p: p.stem)
def test_notebooks_mark_what_was_not_rounded(path):
    code = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code')
    reads = lambda name: re.search(rf"""load\w*\(['"]{name}['"]|results/{name}\.jsonl|for n in \([^)]*['"]{name}['"]""", code)
    stale = [n for n,r in RESULTS.items() if r[0].get('entries') == 'not rounded' and reads(n)]
    assert bool(stale) == (NOTE in path.read_text()), stale
