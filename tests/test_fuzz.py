"Damaged files end in a sentence or in what they were: 2,000 mutants for the readers of weights here (about 40 s of CPU, and 4 for the campaign's own test), 150 for those of tokens and of what packed files carry (4 s); `make fuzz` reads 200,000 for each."
import json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = ('packed file with files', 'packed file, sealed again', 'files in a packed file', 'packed folder, int8 rows', 'shards, half written', 'shards without checksums', 'shards')
SEALED = ('packed file', *FEW[:2])   # all bytes are under checksums: fewer than 1 in 100 loads; that the undamaged one does is the campaign's first step

def campaign(out, readers, mutants):
    r = subprocess.run([sys.executable, ROOT/'tests'/'fuzz'/'campaign.py', '--mutants', str(mutants), '--seed', 'test', '--processes', '1', '--readers', ';'.join(readers), '--out', out], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-2000:]
    lines = [json.loads(l) for l in out.read_text().splitlines()]
    loads = lambda l: l['counts'].get('loaded') or l['reader'] in SEALED
    assert len(lines) == len(readers) and all(sum(l['counts'].values()) == mutants and l['counts']['refused'] > mutants//(5 if readers is FEW else 3) and loads(l) for l in lines), lines

def test_damaged_files(tmp_path):
    names = subprocess.run([sys.executable, '-c', "import sys; sys.path.insert(0, 'tests/fuzz'); from readers import READERS; print(*READERS, sep='\\n')"], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert {*FEW} < {*names} and len(names) >= 16
    campaign(tmp_path/'lines.jsonl', [n for n in names if n not in FEW], 1000)

def test_damaged_tokens_and_small_files(tmp_path): campaign(tmp_path/'lines.jsonl', FEW, 150)

def test_a_seed_makes_one_mutant():
    code = "import sys; sys.path.insert(0, 'tests/fuzz'); from mutate import mutant; import hashlib; m = [mutant({'a.json': b'{\"x\": [1, 2, {\"y\": \"z\"}]}', 'b': b'bytes'*9}, f's{i}') for i in range(99)]; print(hashlib.sha256(repr(m).encode()).hexdigest(), len({*map(repr, m)}) > 80)"
    said = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': s}).stdout for s in '12'}
    assert len(said) == 1 and said.pop().endswith(' True\n')

def test_the_campaign_finds_what_is_wrong(tmp_path):
    "A reader that forgets, one that raises, one that waits and one that dies, each put in the place of a real one."
    code = """
import os, sys, time; sys.path.insert(0, 'tests/fuzz'); sys.argv = ['x', '--mutants', '8', '--seed', 's']
import campaign, readers
def reader(f): return readers.Reader(readers.npz, 'x.npz', f, True)
first = lambda p: open(p, 'rb').read() == whole
whole = None
def once(bad):
    n = []
    def read(p):
        n.append(1)
        return {} if len(n) == 1 else bad(len(n))
    return read
def at_three(f): return lambda n: f() if n == 3 else {}
campaign.READERS.clear(); campaign.SECONDS = .3
campaign.READERS.update(other=reader(once(at_three(lambda: {'x': campaign.np.ones(1)}))), raises=reader(once(at_three(lambda: 1/0))), waits=reader(once(at_three(lambda: [0 for t in [time.process_time()] for _ in iter(lambda: time.process_time() - t < 5, False)]))),
                        dies=reader(once(at_three(lambda: os.kill(os.getpid(), 11)))), eats=reader(once(at_three(lambda: {'x': campaign.np.ones(10**10)}))))
campaign.main()
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    table = {cells[0]: [int(c) for c in cells[1:]] for l in r.stdout.splitlines() if l.startswith('| ') and (cells := [c.strip() for c in l.strip('|').split('|')])[1].isdigit()}
    assert r.returncode == 1 and table == dict(other=[8, 0, 7, 0, 0, 0, 1], raises=[8, 0, 7, 1, 0, 0, 0], waits=[8, 0, 4, 0, 4, 0, 0], dies=[8, 0, 4, 0, 0, 4, 0], eats=[8, 0, 7, 1, 0, 0, 0], all=[40, 0, 29, 2, 4, 4, 1]), r.stdout + r.stderr[-2000:]
