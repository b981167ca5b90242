"Wrong command lines end in one sentence: 60 of the generated ones here (10 to 15 s of CPU), all of them (some 2,000) in `make test-slow`."
import json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = 'quantize,generate,chat,serve,evaluate,compare,export,convert,hf,data,synthesize,train,kept,plots,aot,speed,pack,generate_torch,posthoc,demo,sweep,results'.split(',')

def wrong(tmp_path, *args):
    r = subprocess.run([sys.executable, ROOT/'tests'/'wrong'/'wrong.py', '--out', tmp_path/'lines.jsonl', *args], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-2000:]
    return [json.loads(l) for l in (tmp_path/'lines.jsonl').read_text().splitlines()]

def test_some_of_all_programs(tmp_path): assert len(wrong(tmp_path, '--most', '60', '--seed', 'test')) == 60

def test_every_program_is_among_them():
    from nativebit.__main__ import COMMANDS
    assert set(PROGRAMS) == set(COMMANDS)

@pytest.mark.slow
@pytest.mark.parametrize('name', PROGRAMS)
def test_all_lines_of_a_program(tmp_path, name): assert wrong(tmp_path, '--programs', name)
