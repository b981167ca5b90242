"Whatever is killed, or finds the disk full, is run again and ends as if nothing had happened: three places of each quick program here (about 15 s of CPU), all places of all programs but one in `make test-slow`."
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

def trials(tmp_path, *args):
    r = subprocess.run([sys.executable, ROOT/'tests'/'kill'/'kill.py', '--out', tmp_path/'lines.jsonl', *args], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-2000:]
    return [json.loads(l) for l in (tmp_path/'lines.jsonl').read_text().splitlines()]

def test_quick_programs_killed_and_without_room(tmp_path):
    lines = trials(tmp_path, '--quick', '--most', '3')
    assert len(lines) > 40 and {l['mode'] for l in lines} == {'kill', 'full', 'small'}

NAMES = ['synthesize', 'pack', 'pack a float checkpoint', 'quantize', 'quantize with a table', 'compare', 'evaluate', 'kept', 'plots', 'posthoc', 'sweep', 'results', 'train']

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_every_place_of_a_program(tmp_path, name): trials(tmp_path, '--programs', name)

@pytest.mark.slow
def test_some_places_of_a_quantization_that_writes_its_own_text(tmp_path): trials(tmp_path, '--programs', 'quantize with its own text', '--most', '8')

@pytest.mark.slow
def test_every_place_of_the_quick_programs(tmp_path): assert len(trials(tmp_path, '--quick', '--modes', 'kill,full,small,twice')) > 1000

@pytest.mark.slow
def test_a_training_that_is_killed_at_random_times(tmp_path):
    "Two minutes of what `tests/kill/long.py` does for hours."
    r = subprocess.run([sys.executable, ROOT/'tests'/'kill'/'long.py', '--hours', '.01', '--kills', '3'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr[-2000:]
    row = json.loads(r.stdout); assert row['kills'] == 3 and row['equal'] and not row['leftovers']
