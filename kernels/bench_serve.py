"""A server, asked over HTTP: `nativebit serve MODEL` in a process of its own; its health, a completion, a streamed chat, many completions at once, SIGTERM while it writes. The exit code is 1 where something did not hold.

    python kernels/bench_serve.py model-4bit               JSON lines, as soon as something is known; data/results/serve.jsonl has some
    python kernels/bench_serve.py model-4bit --slots 64    as many texts are written at a time
    python kernels/bench_serve.py model-4bit --alone       the decoder without a server: what a step takes, greedy, drawn, and told with log probabilities

`turn_ms` is the server's own word (`nativebit_turn_seconds` of its /metrics): milliseconds of each part of a turn, and how many there were. `prompts` reads them, `launch` and `wait` are a step as the host sees it on a GPU (`network` and `choose` on a CPU), `hand` gives the tokens to their requests; what the turns leave of the time is other threads' (HTTP, JSON) and admission.
"""
import argparse, gc, http.client, itertools, json, os, platform, re, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('model', help='a packed folder or file')
ap.add_argument('--slots', type=int, default=8, help='texts that the server writes at a time')
ap.add_argument('--at-once', type=int, default=64, help='completions that are asked for at once')
ap.add_argument('--tokens', type=int, default=64, help='of each of them, at most')
ap.add_argument('--repeats', type=int, default=2, help='of the many: the first one also waits for CUDA graphs to be recorded')
ap.add_argument('--alone', action='store_true', help='time the decoder in this process, and start no server')
ap.add_argument('--backend', default='auto', help='as of nativebit serve')
ap.add_argument('--seconds', type=float, default=120, help='after which the server is killed')
ap.add_argument('--out', help='add the lines to this file')
ROOT = Path(__file__).resolve().parent.parent
STORY = 'The story of number {} begins'

def device():
    "The GPU's name, or the processor's kind."
    try: return subprocess.run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError): return f'CPU ({platform.machine()}, {os.cpu_count()} cores)'

def spent(before, after):
    "{part: [milliseconds of each, how many]} of what was added."
    added = {p: (n - before.get(p, (0, 0))[0], s - before.get(p, (0, 0))[1]) for p, (n, s) in after.items()}
    return {p: [round(1e3*s/n, 4), int(n)] for p, (n, s) in added.items() if n}

class Clock:
    "What a decoder does, in parts."
    def __init__(self): self.turns = {}

    @contextmanager
    def __call__(self, part):
        begun = time.perf_counter()
        yield
        n, s = self.turns.get(part, (0, 0)); self.turns[part] = n + 1, s + time.perf_counter() - begun

KINDS = dict(greedy=dict(temperature=0.), drawn=dict(temperature=.8), nucleus=dict(temperature=.8, top_p=.9), told=dict(temperature=.8, logprobs=5))

def texts(decoder, n, steps, how):
    "So many texts, so many steps: milliseconds of a step."
    for s in range(n): decoder.begin(s, [1]*12, steps + n + 1, seed=s, **how)
    while len(decoder.step()) < n: pass   # all prompts are read
    begun = time.perf_counter()
    for _ in range(steps): decoder.step()
    took = time.perf_counter() - begun
    for s in range(n): decoder.free(s)
    return round(1e3*took/steps, 4)

def alone(args, put):
    "The decoder of a server, by itself, with 1, 8 and all texts."
    from nativebit.pipelines.decoders import batch_decoder
    from nativebit.pipelines.model import load
    decoder, begun = batch_decoder(load(args.model, None).pack, args.slots, args.backend), time.perf_counter()
    gc.collect(); gc.freeze()   # as the server does
    if hasattr(decoder, 'warm'): decoder.warm()
    put(json.dumps(dict(warm_s=round(time.perf_counter() - begun, 2), slots=args.slots)))
    for n, (name, how) in itertools.product(sorted({1, min(8, args.slots), args.slots}), KINDS.items()):
        texts(decoder, n, 2, how)   # whatever is made when it is first used
        decoder.clock = clock = Clock()
        put(json.dumps(dict(alone=name, texts=n, ms_per_step=texts(decoder, n, args.tokens, how), turn_ms=spent({}, clock.turns))))
        decoder.clock = Clock()
    return 0

class Bench:
    "A server that was started, what is asked of it, and what was found."
    def __init__(self, args):
        self.args, self.begun, self.failed = args, time.perf_counter(), 0
        words = [sys.executable, '-m', 'nativebit', 'serve', args.model, '--port', '0', '--slots', str(args.slots), '--backend', args.backend]
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
        self.server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        self.end = threading.Timer(args.seconds, self.server.kill); self.end.daemon = True; self.end.start()

    def say(self, ok=True, **row):
        "A line of what is known."
        line = json.dumps(row | dict(ok=bool(ok), slots=self.args.slots, at_s=round(self.since(self.begun), 1)))
        self.failed += not ok
        self.put(line)

    def put(self, line): write(self.args, line)

    def since(self, begun): return time.perf_counter() - begun

    def open(self, method, path, body=None):
        "A response, not read yet."
        c = http.client.HTTPConnection('127.0.0.1', self.port, timeout=self.args.seconds)
        c.request(method, path, json.dumps(body) if body else None, {'Content-Type': 'application/json'})
        r = c.getresponse(); r.connection = c   # which lives as long
        return r

    def ask(self, *request):
        r = self.open(*request)
        return r.status, json.loads(r.read())

    def stream(self, path, body, third=lambda: None):
        "The events of a stream; `third` is called with the third one."
        found = []
        for line in self.open('POST', path, body | dict(stream=True)):
            if not line.startswith(b'data: '): continue
            found.append(line[6:].decode().strip())
            if len(found) == 3: third()
        return found

    def starts(self):
        line = self.server.stdout.readline()
        found = re.search(r'http://\S+?:(\d+)/v1', line)
        self.say(found, started=line.strip(), seconds=round(self.since(self.begun), 1))
        if not found: raise RuntimeError('the server did not start')
        self.port = int(found[1])
        while True:
            try: status, body = self.ask('GET', '/health'); break
            except OSError:
                if self.server.poll() is not None: raise
                time.sleep(.05)
        self.say(status == 200, health=body, seconds=round(self.since(self.begun), 1))

    def completes(self):
        begun = time.perf_counter()
        status, r = self.ask('POST', '/v1/completions', dict(prompt='Once upon a time', max_tokens=self.args.tokens, temperature=0))
        self.say(status == 200, completion=r['usage'], seconds=round(self.since(begun), 3), text=r['choices'][0]['text'][:200])

    def chats(self):
        "A model without a chat template says so, and that is an answer, too."
        talk, times = [dict(role='user', content='Who are you?')], []
        begun = time.perf_counter()
        parts = self.stream('/v1/chat/completions', dict(messages=talk, max_tokens=self.args.tokens, temperature=0), lambda: times.append(self.since(begun)))
        if not parts: return self.say(chat=self.ask('POST', '/v1/chat/completions', dict(messages=talk))[1]['error']['message'])
        text = ''.join(json.loads(p)['choices'][0]['delta'].get('content') or '' for p in parts[:-1])
        self.say(parts[-1] == '[DONE]', chat=text[:200], pieces=len(parts), seconds=round(self.since(begun), 3), third_piece_after=round(times[0], 3) if times else None)

    def one(self, k):
        "A completion: (status, its tokens, seconds)."
        begun = time.perf_counter()
        status, r = self.ask('POST', '/v1/completions', dict(prompt=STORY.format(k), max_tokens=self.args.tokens, temperature=.8, seed=k))
        return status, r.get('usage', {}).get('completion_tokens', 0), self.since(begun)

    def turns(self):
        "{part: (how many, seconds)} so far."
        text = self.open('GET', '/metrics').read().decode()
        found = {(p, k): float(x) for k, p, x in re.findall(r'^nativebit_turn_seconds_(count|sum){part="(\w+)"} (\S+)', text, re.M)}
        return {p: (found[p, 'count'], x) for (p, k), x in found.items() if k == 'sum'}

    def many(self, repeat):
        n, before, begun = self.args.at_once, self.turns(), time.perf_counter()
        with ThreadPoolExecutor(n) as pool: statuses, tokens, waits = zip(*pool.map(self.one, range(n)))
        took, waits = self.since(begun), sorted(waits)
        self.say({*statuses} == {200}, at_once=n, repeat=repeat, tokens=sum(tokens), seconds=round(took, 3), tokens_per_second=round(sum(tokens)/took, 1), median_answer_s=round(waits[n//2], 3), slowest_answer_s=round(waits[-1], 3), turn_ms=spent(before, self.turns()))

    def ends(self, n=8):
        "SIGTERM while it writes as many texts as it has slots, or `n`: all of them come to their end."
        n, ends = min(n, self.args.slots), []
        writing = [threading.Event() for _ in range(n)]   # or ended already
        body = lambda k: dict(prompt=STORY.format(k), max_tokens=4*self.args.tokens, temperature=.8, seed=k)
        def one(k):
            try: ends.append(self.stream('/v1/completions', body(k), writing[k].set))
            finally: writing[k].set()
        threads = [threading.Thread(target=one, args=(k,)) for k in range(n)]
        for t in threads: t.start()
        for w in writing: w.wait(self.args.seconds)
        begun = time.perf_counter(); self.server.send_signal(signal.SIGTERM)
        for t in threads: t.join(self.args.seconds)
        code, whole = self.server.wait(self.args.seconds), sum(e[-1:] == ['[DONE]'] for e in ends)
        self.say(code in (0, -signal.SIGTERM) and whole == n, sigterm=code, whole_answers=whole, of=n, seconds=round(self.since(begun), 3))

def header(): return json.dumps(dict(type='header', command=' '.join(['python kernels/bench_serve.py', *sys.argv[1:]]), git_hash=os.environ.get('NATIVEBIT_GIT_HASH', 'unknown'), device=device(), date=time.strftime('%Y-%m-%d')))

def write(args, line):
    "A line, seen and kept."
    print(line, flush=True)
    if args.out:
        with open(args.out, 'a') as f: f.write(line + '\n')

def main(args):
    if args.alone:
        sys.path.insert(0, str(ROOT))
        write(args, header())
        return alone(args, lambda line: write(args, line))
    bench = Bench(args)
    try:
        bench.put(header())
        for step in bench.starts, bench.completes, bench.chats: step()
        for k in range(args.repeats): bench.many(k + 1)
        bench.ends()
    except Exception as e: bench.say(False, error=f'{type(e).__name__}: {e}')
    finally: bench.server.kill()
    return bool(bench.failed)

if __name__ == '__main__': sys.exit(main(ap.parse_args()))
