"Bad input, as a user would give it: one sentence on stderr, a non-zero exit, no traceback, nothing left behind."
import io, os, re, subprocess, sys, time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np, processes, pytest
from safetensors.numpy import save_file
from nativebit.__main__ import program
from nativebit.utils.cli import one_sentence, parse_args
from nativebit.utils.files import read_jsonl

STDLIB = Path(__file__).resolve().parent.parent/'data'/'stdlib'
TRAIN = ['nativebit', 'train', '--config', 'tiny', '--max-steps', '2', '--val-batches', '1', '--no-nativebit']

@pytest.fixture
def cwd(tmp_path):
    (tmp_path/'some.txt').write_text('\n\n'.join(f'line {i} of a small text that repeats itself' for i in range(400)))
    return tmp_path

def start(cwd, *args, **kw): return processes.start('-m', *args, cwd=cwd, NATIVEBIT_CACHE=str(cwd/'cache'), **kw)
def run(cwd, *args, **kw): return start(cwd, *args, **kw).wait()

def inside(cwd, top, command, *args):
    "As `run`, in this process, which has imported the packages and compiled the networks; `stopped` is what the program exits with."
    main, out, err, stopped = program(command).main, io.StringIO(), io.StringIO(), 0
    with chdir(cwd), patch.dict(os.environ, NATIVEBIT_CACHE=str(cwd/'cache')), redirect_stdout(out), redirect_stderr(err):
        try:
            with one_sentence(): main(**parse_args(main, list(map(str, args))))
        except SystemExit as e: stopped = e.code
    return SimpleNamespace(returncode=1 if isinstance(stopped, str) else stopped, stopped=stopped, stdout=out.getvalue(), stderr=err.getvalue())

def refused(cwd, *args, says):
    "Run a program that has to refuse; returns what it says last."
    r = inside(cwd, *args)
    sentence = isinstance(r.stopped, str)
    text = r.stopped if sentence else r.stderr   # argparse prints, and exits with 2
    assert r.stopped and says in text and not (sentence and '\n' in text), text
    return text

def test_a_good_run(cwd):
    r = run(cwd, *TRAIN, '--dataset', 'text:some.txt', '--name', 'ok', '--use-canonical-ema', '0')
    assert r.returncode == 0 and 'test perplexity' in r.stdout, r.stderr
    assert {p.name for p in (cwd/'logs'/'ok').iterdir()} == {'log.jsonl', 'model.safetensors', 'meta.json', 'report.html'}
    assert read_jsonl(cwd/'logs'/'ok'/'log.jsonl')[0]['config']['quant']['use_canonical_ema'] is False

def test_a_first_look_says_what_it_is_and_ends_with_a_page(cwd):
    r = run(cwd, *TRAIN, '--max-steps', '20', '--dataset', 'text:some.txt', '--name', 'look')
    said, (header, _, *records, end) = r.stderr.splitlines(), read_jsonl(cwd/'logs'/'look'/'log.jsonl')
    assert 'tiny, 28.8k parameters, in float' in said[0] and 'tokens of text:some.txt' in said[0] and 'to step 20, 512 tokens each' in said[1]
    assert header['config']['train']['warmup_steps'] == 2 and 'save_minutes' not in header['config']['train']
    assert 'val_loss' in records[-1] and records[-1]['step'] == 20 and end['type'] == 'eval'   # the last step is validated, whatever --val-every
    assert any(l.startswith('step 20: validation loss') for l in said) and said[-1] == "next: nativebit generate look --prompt 'Once upon a time'"
    assert '\r' not in r.stderr and sum('training' in l for l in said) == 1   # where nobody watches: one line a minute, and the last one
    page = (cwd/'logs'/'look'/'report.html').read_text()
    assert page.count('data:image/png;base64') == 2 and 'validation perplexity' in page and '--max-steps 20' in page and not re.search('(src|href)="?http', page)

def test_a_quantized_run_names_its_geometry_and_what_to_pack(cwd):
    r = inside(cwd, *TRAIN[:-1], '--dataset', 'text:some.txt', '--name', 'q', '--geometry', '3bit-8x64', '--override', '*.down=4bit-128')
    assert 'matrices of 3bit-8x64, 3.125 bits a weight, some otherwise' in r.stderr, r.stderr
    assert r.stderr.splitlines()[-1] == 'next: nativebit pack logs/q --out q.nbpack.safetensors'
    old = inside(cwd, *TRAIN[:-1], '--dataset', 'text:some.txt', '--name', 'old', '--geometry', 'lut-b', '--override', '*.down=4bit')
    assert old.returncode == 0 and len({(cwd/'logs'/n/'model.safetensors').read_bytes() for n in ('q', 'old')}) == 1   # earlier names are the same
    assert read_jsonl(cwd/'logs'/'q'/'log.jsonl')[0]['config']['quant'] == read_jsonl(cwd/'logs'/'old'/'log.jsonl')[0]['config']['quant']

def test_no_picture_is_worth_a_run(cwd, monkeypatch):
    monkeypatch.setattr('nativebit.train.loop.write_report', None)
    r = inside(cwd, *TRAIN, '--dataset', 'text:some.txt', '--name', 'run')
    assert r.returncode == 0 and 'no report could be drawn' in r.stderr and 'log, checkpoint in logs/run' in r.stdout, r.stderr

def test_a_tokenizer_brings_its_vocabulary(cwd):
    (cwd/'prose.txt').write_text('\n\n'.join(f'In the year {i} the old man of the sea told {i % 7} stories about whales and other weather.' for i in range(3000)))
    assert inside(cwd, 'nativebit', 'data', 'text:prose.txt', '--train-tokenizer-to', 'mine.json').returncode == 0
    r = inside(cwd, *TRAIN, '--dataset', 'text:prose.txt', '--tokenizer', 'mine.json', '--name', 'mine')
    size = read_jsonl(cwd/'logs'/'mine'/'log.jsonl')[0]['config']['model']['vocab_size']
    assert r.returncode == 0 and size != 256 and f'vocabulary of {size:,} from mine.json' in r.stderr, r.stderr
    assert inside(cwd, 'nativebit', 'train', '--name', 'mine', '--resume', '--max-steps', '2').returncode == 0
    refused(cwd, 'error', 'train', *TRAIN[2:], '--dataset', 'text:prose.txt', '--tokenizer', 'mine.json', '--init-from', STDLIB, '--name', 'other', says='')
    r = inside(cwd, 'nativebit', 'train', '--max-steps', '1', '--batch-size', '1', '--val-batches', '1', '--test-tokens', '100', '--no-nativebit', '--context-len', '32',
            '--dataset', 'text:prose.txt', '--name', 'python')
    assert 'nativebit data text:prose.txt --train-tokenizer-to prose-tokenizer.json, then train with --tokenizer prose-tokenizer.json' in r.stderr, r.stderr

def test_help_says_the_defaults():
    said = ' '.join(processes.run('-m', 'nativebit', 'train', '--help').stdout.split())
    for words in ('(default: 0.0006, 0.0001 with --recipe published, 0.0001 with --recipe qat)', 'windows a step (default: 8)', 'optimizer steps (default: 1000, 5000 with --recipe published)',
                  '3bit-8x64 (3.125)', 'earlier names are understood, such as int8 for 3bit-128'): assert words in said, words

def test_a_gpu_that_jax_cannot_use_is_named_once(cwd):
    "JAX looks for a GPU's device file; here a plain file stands for it."
    code = ("import sys, jax._src.hardware_utils as h; h._NVIDIA_GPU_DEVICES = [sys.executable]\n"
            "from nativebit.utils.cli import set_flags; set_flags(); set_flags(); import jax; jax.devices(); jax.devices()")
    r = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, JAX_PLATFORMS=''), capture_output=True, text=True)
    assert r.stderr.splitlines() == ["note: there is an NVIDIA GPU here, and JAX is installed without CUDA, so this runs on the CPU: pip install -e '.[cuda]'"], r.stderr

@pytest.mark.parametrize('says, extras', [('| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |', 'dev,cuda'), ('| Driver Version: 550.9  CUDA Version: 12.4 |', 'dev,cuda12'), ('none', 'dev')])
def test_make_env_brings_what_the_driver_can_use(cwd, says, extras):
    (cwd/'nvidia-smi').write_text(f"#!/bin/sh\necho '{says}'\n"); (cwd/'nvidia-smi').chmod(0o755)
    r = subprocess.run(['make', '-n', '-B', 'env'], cwd=STDLIB.parent.parent, env=dict(os.environ, PATH=f"{cwd}:{os.environ['PATH']}"), capture_output=True, text=True)
    assert f"-e '.[{extras}]'" in r.stdout, r.stdout + r.stderr

def test_cudnn_on_a_cpu_build(cwd):
    refused(cwd, 'error', 'train', *TRAIN[2:], '--dataset', 'text:some.txt', '--attention', 'cudnn', says="this one was installed without: pip install -e '.[cuda]'")

def test_kept_calls_nothing_the_best_that_was_not_validated(cwd):
    p = inside(cwd, *TRAIN, '--dataset', 'text:some.txt', '--name', 'k', '--max-steps', '12', '--save-every', '5')
    assert p.returncode == 0, p.stderr
    r = inside(cwd, 'nativebit', 'kept', 'k')
    assert r.stdout.startswith('step 10 of k (the latest, not validated) is in logs/k/latest') and not (cwd/'logs'/'k'/'best').exists(), r.stdout + r.stderr

@pytest.mark.parametrize('args, says', [
    (['--config', 'tpu-2B'], "did you mean 'tpu-2b'?"),
    (['--dataset', 'wikipedia'], "unknown dataset 'wikipedia': choose from stdlib, wikitext-2"),
    (['--dataset', 'wikitext103'], "did you mean 'wikitext-103'?"),
    (['--lr', '-1'], 'lr=-1.0 is not valid'),
    (['--lr', 'fast'], "invalid float value: 'fast'"),
    (['--learning-rate', '1'], 'unrecognized arguments'),
    (['--geometry', 'int3'], "unknown geometry 'int3'"),
    (['--dataset', 'text:some.txt', '--init-from', 'nowhere'], 'no checkpoint at nowhere'),
    (['--dataset', 'text:missing.txt'], 'cannot read the text missing.txt'),
    (['--dataset', 'text:some.txt', '--context-len', '100000'], 'longer than the data'),
    (['--dataset', 'text:some.txt', '--distill-weight', '1'], 'needs a teacher'),
])
def test_refusals(cwd, args, says):
    refused(cwd, *TRAIN, *args, says=says)
    assert not (cwd/'logs').exists()

def test_a_text_shorter_than_a_window_of_validation(cwd):
    r = inside(cwd, *TRAIN, '--dataset', 'text:some.txt', '--context-len', '1024')
    assert r.returncode == 0, r.stderr   # validation and test are read in one partial window

def test_a_quantized_checkpoint_is_no_teacher(cwd):
    quantized = [a for a in TRAIN if a != '--no-nativebit']
    assert inside(cwd, *quantized, '--dataset', 'text:some.txt', '--name', 'q').returncode == 0
    refused(cwd, *quantized, '--dataset', 'text:some.txt', '--init-from', 'logs/q', '--distill-weight', '1', says='is quantized already')
    refused(cwd, 'nativebit', 'posthoc', '--ckpt', 'logs/q', '--dataset', 'text:some.txt', says='is quantized already')

@pytest.mark.parametrize('args, says', [
    (['--methods', 'rtn,gguf'], "unknown method 'gguf'"),
    (['--geometry', 'int8,lutb'], "did you mean 'lut-b'?"),
    (['--bits', '3,9'], "bits='3,9' is not valid"),
    (['--max-tokens', '0'], 'max_tokens=0 is not valid'),
    (['--calibration-tokens', '0'], 'calibration_tokens=0 is not valid'),
    (['--calibration', 'wikitext103'], "did you mean 'wikitext-103'?"),
    (['--calibration', 'text:missing.txt'], 'cannot read the text missing.txt'),
    (['--calibration', 'text:short.txt'], 'too few to calibrate on'),
    (['--methods', 'rtn', '--out', 'some.txt'], 'cannot go on with some.txt'),
    (['--ckpt', 'nowhere'], 'no checkpoint at nowhere'),
])
def test_posthoc_refusals(cwd, args, says):
    (cwd/'short.txt').write_text('\n\n'.join(['a line']*30))
    before = (cwd/'some.txt').read_text()
    refused(cwd, 'nativebit', 'posthoc', '--ckpt', STDLIB, '--dataset', 'text:some.txt', *args, says=says)
    assert (cwd/'some.txt').read_text() == before

def test_posthoc_goes_on_where_it_stopped(cwd):
    assert inside(cwd, *TRAIN, '--dataset', 'text:some.txt', '--name', 'float').returncode == 0
    table = ['nativebit', 'posthoc', '--ckpt', 'logs/float', '--dataset', 'text:some.txt', '--max-tokens', '64', '--calibration-tokens', '1', '--out', 'rows.jsonl']
    assert inside(cwd, *table, '--methods', 'rtn,gptq').returncode == 0
    first = (cwd/'rows.jsonl').read_text()
    r = inside(cwd, *table, '--methods', 'rtn,nf,gptq')
    assert r.returncode == 0 and '| nf | 3bit-128 | 3 |' in r.stdout and r.stdout.count('| 3bit-128 |') == 3, r.stderr
    assert (cwd/'rows.jsonl').read_text().startswith(first)
    refused(cwd, *table, '--calibration-tokens', '1024', says='rows of another setup (calibration_tokens: 1 there, 1024 here)')

def test_empty_text(cwd):
    (cwd/'empty.txt').write_text('\n \n')
    refused(cwd, *TRAIN, '--dataset', 'text:empty.txt', says='holds no text')

def test_truncated_checkpoint(cwd):
    save_file({'embed': np.ones((256, 32), np.float32)}, cwd/'cut.safetensors')
    whole = (cwd/'cut.safetensors').read_bytes()
    (cwd/'cut.safetensors').write_bytes(whole[:len(whole)//2])
    refused(cwd, *TRAIN, '--dataset', 'text:some.txt', '--init-from', 'cut.safetensors', says='is not a whole .safetensors file')

def test_wrong_shapes_are_named(cwd):
    np.savez(cwd/'wrong.npz', **{'params/embed/embedding': np.ones((256, 32)), 'params/layers_0/attn/q/kernel': np.ones((8, 32)), 'params/strange/kernel': np.ones((2, 2))})
    r = refused(cwd, *TRAIN, '--dataset', 'text:some.txt', '--init-from', 'wrong.npz', says='layers.0.attn.q.weight is (32, 8), the network has (32, 32)')
    assert '(20 differences): missing ' in r and 'unexpected strange.weight' in r and 'and 14 more; --config' in r and len(r) < 600

def test_log_folder_that_cannot_be_written(cwd):
    (cwd/'logs').write_text('a file where the folder should be')
    refused(cwd, *TRAIN, '--dataset', 'text:some.txt', says='choose another folder')

def test_ctrl_c(cwd):
    p, log = start(cwd, *TRAIN, '--dataset', 'text:some.txt', '--max-steps', '1000000', '--log-every', '1', '--name', 'long'), cwd/'logs'/'long'/'log.jsonl'
    while p.poll() is None and not (log.exists() and log.read_text().count('\n') > 3): time.sleep(.02)
    p.send_signal(2)
    assert p.wait(60).returncode == 130 and 'Traceback' not in p.stderr, p.stderr
    assert not [f for f in Path(cwd).rglob('*.tmp')]

def test_a_reader_that_has_gone_and_a_terminal_without_a_character(tmp_path):
    "`| head` ends a program without a traceback, and ASCII shows a question mark."
    (tmp_path/'program.py').write_text("from nativebit.utils.cli import run\ndef main():\n    'Count.'\n    for i in range(10**6): print('é', i, flush=True)\nrun(main, [])")
    p = subprocess.Popen([sys.executable, tmp_path/'program.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONIOENCODING='ascii', PYTHONPATH=os.getcwd()))
    first = p.stdout.readline()
    p.stdout.close()
    assert first == b'? 0\n' and p.wait(timeout=60) == 141 and p.stderr.read() == b''

@pytest.mark.parametrize('words', ['--help', '--completion bash'])
@pytest.mark.parametrize('reader', ['| true', '>/dev/full'])
def test_nothing_is_left_at_the_end(words, reader):
    "What can't be written is found before Python ends: no traceback, and no complaint of its own."
    if reader == '>/dev/full' and not Path('/dev/full').exists(): pytest.skip('no /dev/full')
    p = subprocess.run(['bash', '-c', f'"{sys.executable}" -m nativebit {words} {reader}'], capture_output=True, text=True, env={k: v for k,v in os.environ.items() if k != 'PYTHONUNBUFFERED'})
    assert p.stderr.count('\n') == (reader != '| true') and not {'Traceback', 'Exception'} & set(p.stderr.split()), p.stderr
