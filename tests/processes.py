"""Python programs as a user starts them, each a process of its own: as `subprocess` would, and two to three seconds sooner.

A server that has imported the large packages forks them. A test that is about imports themselves starts Python by `subprocess`."""
import os, resource, runpy, signal, sys, tempfile
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

PRELOAD = 'jax flax.nnx optax orbax.checkpoint grain matplotlib.figure tokenizers safetensors.numpy fastcore.script jaxtyping ml_dtypes compiled'.split()
SERVER = get_context('forkserver')

def run_words(words):
    "What Python does with the words of its command line: `-m MODULE …`, `-c CODE …` or `SCRIPT …`."
    first, *rest = words
    sys.path.insert(0, str(Path(first).parent) if first[:1] != '-' else '')
    sys.argv = [first, *rest[1:]] if first in ('-m', '-c') else words
    if first == '-m': runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    elif first == '-c': exec(compile(rest[0], '<string>', 'exec'), sys.modules['__main__'].__dict__)
    else: runpy.run_path(first, run_name='__main__')

def begin(words, cwd, env, limit, files):
    "In the new process: the three streams, the folder, the environment; then the program."
    for fd,(path, mode) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))): os.dup2(os.open(path, mode | os.O_APPEND*(fd > 0)), fd)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, 'w', closefd=False), open(2, 'w', buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear(); os.environ.update(env); os.chdir(cwd)
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_words(words)

class Program:
    "A process with the methods of `subprocess.Popen` that tests use; what it wrote is there when it has ended."
    def __init__(self, words, cwd, env, limit, stdin):
        self.folder = tempfile.TemporaryDirectory(prefix='program')
        self.files = [Path(self.folder.name)/n for n in ('stdin', 'stdout', 'stderr')]
        for f,text in zip(self.files, (stdin, '', '')): f.write_text(text)
        self.process = SERVER.Process(target=begin, args=(list(map(str, words)), str(cwd), dict(os.environ, JAX_PLATFORMS='cpu', **env), limit, list(map(str, self.files))))
        with patch.dict(os.environ, JAX_PLATFORMS='cpu'): self.process.start()   # JAX reads it where it is imported, in the server
        self.pid = self.process.pid

    returncode = property(lambda self: self.process.exitcode)
    stdout, stderr = [property(lambda self, i=i: self.files[i].read_text(errors='replace')) for i in (1, 2)]
    def poll(self): return self.returncode
    def send_signal(self, number):
        "As of `Popen`: nothing where it has ended."
        with suppress(ProcessLookupError): os.kill(self.pid, number)
    def kill(self): self.send_signal(signal.SIGKILL)
    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.poll() is not None, f'still running after {timeout} s'
        return self

def start(*words, cwd='.', limit=0, stdin='', **env):
    "Start Python with these words; `limit`: so many bytes a file may have."
    SERVER.set_forkserver_preload(PRELOAD)
    return Program(words, cwd, env, limit, stdin)

def run(*words, **kw):
    "Run Python with these words: `returncode`, `stdout` and `stderr`."
    return start(*words, **kw).wait()
