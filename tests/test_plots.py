"`nativebit plots` and the TensorBoard log, as a user would meet them: from a run to a picture, and one sentence for each mistake."
import processes, pytest
from nativebit.config import get_config
from nativebit.utils.files import TensorBoardLogger, read_jsonl
from nativebit.train.loop import train

HEADER, STEP = '{"type": "header", "schema_version": 2}\n', '{"step": 10, "loss": 3.0, "val_loss": 3.1}\n'
LOGS = {'good.jsonl': HEADER+STEP, 'killed.jsonl': HEADER+STEP+'{"step": 20, "lo', 'begun.jsonl': HEADER, 'notes.txt': 'today I trained\nand it was good\n',
        'broken.jsonl': HEADER+'{"step": 20, "lo\n'+STEP, 'numbers.jsonl': '1\n2\n', 'empty.jsonl': ''}

@pytest.fixture
def cwd(tmp_path):
    for name,text in LOGS.items(): (tmp_path/name).write_text(text)
    (tmp_path/'binary.jsonl').write_bytes(b'\x89PNG\xff\xfe')
    (tmp_path/'folder').mkdir()
    return tmp_path

def plots(cwd, *args): return processes.run('-m', 'nativebit', 'plots', *args, cwd=cwd)

def is_png(path): return path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size > 5000

@pytest.mark.parametrize('args, says', [
    (['gone.jsonl'], 'cannot read gone.jsonl: No such file'),
    (['folder'], 'log.jsonl: No such file'),
    (['good.jsonl', 'notes.txt'], 'record 1 of'),
    (['broken.jsonl'], 'record 2 of'),
    (['numbers.jsonl'], 'is not a JSON object'),
    (['binary.jsonl'], 'is not text'),
    (['begun.jsonl'], 'holds no steps'),
    (['empty.jsonl'], 'holds no steps'),
    (['good.jsonl', '--out', '/proc/nowhere/runs.png'], 'choose another folder'),
    (['good.jsonl', '--out', 'notes.txt/runs.png'], 'choose another folder'),
    (['good.jsonl', '--out', 'runs.pdf'], 'ends in .png'),
    (['good.jsonl', '--smooth', '-3'], 'give 1 for the raw loss'),
    ([], 'the following arguments are required: runs'),
])
def test_refusals(cwd, args, says):
    before = set(cwd.iterdir())
    r = plots(cwd, *args)
    assert r.returncode != 0 and says in r.stderr.splitlines()[-1] and 'Traceback' not in r.stderr, r.stderr
    assert set(cwd.iterdir()) == before

def test_a_killed_run_is_drawn(cwd):
    r = plots(cwd, 'killed.jsonl', 'good.jsonl', '--out', 'new/two.png', '--smooth', '5')
    assert r.returncode == 0 and not r.stderr, r.stderr
    assert [p.name for p in (cwd/'new').iterdir()] == ['two.png'] and is_png(cwd/'new'/'two.png')

def test_a_real_run(cwd, monkeypatch):
    monkeypatch.setenv('NATIVEBIT_CACHE', str(cwd/'cache'))
    (cwd/'some.txt').write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(400)))
    train(get_config('tiny', dataset=f'text:{cwd}/some.txt', max_steps=3, val_every=2, val_batches=1, log_every=1, n_layers=1, quant_reg_weight=1.), cwd/'run')
    assert plots(cwd, 'run').returncode == 0 and is_png(cwd/'runs.png')

def test_tensorboard_writes_the_same_log(cwd):
    pytest.importorskip('tensorboardX')
    with TensorBoardLogger(cwd/'run'/'log.jsonl') as logger:
        logger.log(type='header', config={})
        logger.log(step=10, loss=3.)
    assert read_jsonl(cwd/'run'/'log.jsonl') == [dict(type='header', config={}), dict(step=10, loss=3.)]
    assert sorted(p.name.split('.')[0] for p in (cwd/'run').iterdir()) == ['events', 'log']
