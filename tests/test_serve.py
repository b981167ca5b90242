"The server, as clients meet it: a process of its own, OpenAI's own Python client, two hundred streams at once, clients that go away, SIGTERM, and every wrong request."
import asyncio, json, os, re, shlex, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock
import httpx, openai, pytest
import nativebit as nb
from nativebit.config import get_config, override
from nativebit.data.tokenizers import train_tokenizer
from nativebit.models.checkpoint import save_checkpoint
from nativebit.models.transformer import init_model
from nativebit.pipelines.decoders import cpu_decoder, torch_decoder
from nativebit.pipelines.exporting import export_plain
from nativebit.pipelines.opening import opened
from test_chat import CHATML

ROOT = Path(__file__).resolve().parent.parent
TEXT = 'Who are you? I am a small model of few words, and I count: one, two, three. ' * 20

@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "A small random network with a chat template, packed; and the float one it was made from."
    home = tmp_path_factory.mktemp('serve')
    tok = train_tokenizer([TEXT], 300).tok
    tok.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    (home/'t').mkdir(); tok.save(str(home/'t'/'tokenizer.json'))
    cfg = get_config('tiny', context_len=256, vocab_size=304, geometry='lut-b', tokenizer=str(home/'t'/'tokenizer.json'))
    save_checkpoint(home/'run', override(cfg, nativebit=False), init_model(cfg, seed=0)[0])
    (home/'run'/'tokenizer_config.json').write_text(json.dumps(dict(chat_template=CHATML, eos_token='<|im_end|>', bos_token=None)))
    export_plain(opened(home/'run'), home/'float')
    nb.quantize(home/'float', 'lut-b', 'rtn', out=home/'small')
    return home/'small'

@contextmanager
def server(model, *flags):
    "A server on a port that is free: (its process, address)."
    p = subprocess.Popen([sys.executable, '-m', 'nativebit', 'serve', str(model), '--port', '0', *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, JAX_PLATFORMS='cpu'))
    line = p.stdout.readline()
    at = re.search(r'http://\S+', line)
    assert at, p.communicate()[1]
    try:
        for _ in range(200):
            try: httpx.get(at[0].removesuffix('/v1') + '/health'); break
            except httpx.TransportError: time.sleep(.05)
        yield p, at[0]
    finally:
        p.kill(); p.communicate()

@pytest.fixture(scope='module')
def up(packed):
    with server(packed) as (_, at): yield at

@pytest.fixture(scope='module')
def client(up): return openai.OpenAI(base_url=up, api_key='none', max_retries=0)

def by_library(packed):
    "The model, decoded by the C library for one reader."
    m = nb.load(packed)
    m.decoder = cpu_decoder(m.pack, 'int16')
    return m

def test_openais_client(client, packed):
    alone = by_library(packed)
    assert [m.id for m in client.models.list()] == ['small'] and client.models.retrieve('small').id == 'small'
    r = client.completions.create(model='small', prompt='Who are', max_tokens=20, temperature=0)
    want = alone.generate('Who are', 20, temperature=0)
    assert 'Who are' + r.choices[0].text == want and r.usage.completion_tokens <= 20 and r.choices[0].finish_reason in ('length', 'stop')
    stream = client.completions.create(model='small', prompt='Who are', max_tokens=20, temperature=0, stream=True)
    assert 'Who are' + ''.join(p.choices[0].text for p in stream) == want
    drawn = [client.completions.create(model='small', prompt='I', max_tokens=20, temperature=1.5, seed=s).choices[0].text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 'I' + drawn[0] == alone.generate('I', 20, temperature=1.5, seed=1)

def test_chats(client):
    ask = dict(model='small', messages=[dict(role='system', content='Be brief.'), dict(role='user', content='Who are you?')], max_completion_tokens=12, temperature=0)
    r = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    c = r.choices[0]
    assert c.message.role == 'assistant' and len(c.logprobs.content) == r.usage.completion_tokens - (c.finish_reason == 'stop')
    for t in c.logprobs.content: assert t.logprob <= 0 and len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options=dict(include_usage=True)))
    assert parts[0].choices[0].delta.role == 'assistant' and parts[-1].usage == r.usage
    assert ''.join(p.choices[0].delta.content or '' for p in parts[:-1]) == c.message.content and parts[-2].choices[0].finish_reason == c.finish_reason

def test_stop_strings_are_not_seen(client):
    ask = dict(model='small', prompt='Who are', max_tokens=40, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[7:10]
    for stream in (False, True):
        r = client.completions.create(**ask, stop=[stop, 'never'], stream=stream)
        parts = list(r) if stream else [r]
        assert ''.join(p.choices[0].text for p in parts) == whole[:whole.index(stop)] and parts[-1].choices[0].finish_reason == 'stop'

def test_two_hundred_streams(up, packed):
    "Nothing is lost, and nothing of one stream is in another."
    alone, prompts = by_library(packed), [TEXT[i:i + 3 + i % 40] for i in range(200)]
    async def one(client, i):
        stream = await client.completions.create(model='small', prompt=prompts[i], max_tokens=5 + i % 20, temperature=.9, seed=i, stream=True)
        return ''.join([p.choices[0].text async for p in stream])
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=up, api_key='none', max_retries=0, timeout=120) as client: return await asyncio.gather(*[one(client, i) for i in range(200)])
    for i,text in enumerate(asyncio.run(all_of_them())): assert prompts[i] + text == alone.generate(prompts[i], 5 + i % 20, temperature=.9, seed=i), i

def test_by_pytorch(packed):
    "The same interface over slots of a static cache: no stream depends on the others."
    alone, prompts = nb.load(packed), [TEXT[i:i + 3 + i % 40] for i in range(20)]
    alone.decoder = torch_decoder(alone.pack, 'cpu')
    with server(packed, '--backend', 'torch') as (_, at):
        async def one(client, i):
            stream = await client.completions.create(model='small', prompt=prompts[i], max_tokens=5 + i % 20, temperature=.9*(i % 2), seed=i, stream=True)
            return ''.join([p.choices[0].text async for p in stream])
        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=at, api_key='none', max_retries=0, timeout=120) as client: return await asyncio.gather(*[one(client, i) for i in range(20)])
        for i,text in enumerate(asyncio.run(all_of_them())): assert prompts[i] + text == alone.generate(prompts[i], 5 + i % 20, temperature=.9*(i % 2), seed=i), i
        r = openai.OpenAI(base_url=at, api_key='none', max_retries=0).completions.create(model='small', prompt='Who', max_tokens=5, temperature=0, logprobs=3)
        assert all(len(t) == 3 and max(t.values()) == own for t,own in zip(r.choices[0].logprobs.top_logprobs, r.choices[0].logprobs.token_logprobs))

def test_a_full_line_a_client_that_leaves_and_sigterm(packed):
    with server(packed, '--slots', '1', '--waiting', '1', '--max-tokens', '200') as (p, at):
        numbers = lambda: dict(re.findall(r'^nativebit_(active|waiting) (\d+)', httpx.get(at.removesuffix('/v1') + '/metrics').text, re.M))
        long = dict(model='small', prompt='Who', max_tokens=200, temperature=2, stream=True)
        def until(**want):
            for _ in range(200):
                if numbers() == want: return
                time.sleep(.05)
            raise AssertionError(numbers())
        with httpx.Client(timeout=60) as c:
            answers = [c.post(at + '/completions', json=dict(long, stream=False, n=n, max_tokens=200)) for n in (1, 3)]
            assert [a.status_code for a in answers] == [200, 429] and answers[1].headers['retry-after'] == '1'
            with c.stream('POST', at + '/completions', json=dict(long, seed=1)) as r: next(r.iter_lines())
            until(active='0', waiting='0')
            with c.stream('POST', at + '/completions', json=dict(long, seed=2)) as r:
                lines = r.iter_lines(); next(lines)
                p.send_signal(signal.SIGTERM)
                assert [*lines][-2:] == ['data: [DONE]', '']
        assert p.wait(20) in (0, -signal.SIGTERM)

@pytest.mark.parametrize('body, status, says', [
    (b'{"model"', 400, 'not JSON'), (dict(prompt=5), 400, 'prompt'), (dict(model='other', prompt='a'), 404, "no model 'other'"), (dict(prompt='a', max_tokens=0), 400, 'max_tokens'), (dict(prompt='a', max_tokens=10**6), 400, 'at most'),
    (dict(prompt='a', temperature=3), 400, 'temperature'), (dict(prompt='Who are you? '*200), 400, 'context holds 256'), (dict(prompt='a', frequency_penalty=1), 400, 'frequency_penalty is not supported'), (dict(prompt=[[5, 10**9]]), 400, 'tokens'), (dict(prompt='a'*2**21), 413, 'longer than'),
    (dict(prompt='a', logprobs=50), 400, 'logprobs'), ([], 400, 'the body is no JSON object; send one'), (b'', 400, 'the body is no JSON object; send one'), (dict(prompt='a', stop=3), 400, 'stop')])
def test_wrong_requests(up, body, status, says):
    r = httpx.post(up + '/completions', content=body if isinstance(body, bytes) else json.dumps(body), headers={'Content-Type': 'application/json'})
    assert r.status_code == status and says in r.json()['error']['message'] and '\n' not in r.json()['error']['message'], r.text

@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('body, status, says', [
    (b'{"messages": [', 400, 'not JSON'), (dict(model='other'), 404, "no model 'other'"), (dict(content='Who are you? '*200), 400, 'context holds 256'), (dict(content='Hi', max_tokens=250), 400, 'context holds 256')])
def test_wrong_chats_are_refused_before_a_stream_begins(up, stream, body, status, says):
    "With the status that says so: a stream that has begun could only break off."
    if isinstance(body, dict): body = json.dumps(dict(messages=[dict(role='user', content=body.get('content', 'Hi'))], stream=stream) | {k: v for k,v in body.items() if k != 'content'})
    r = httpx.post(up + '/chat/completions', content=body, headers={'Content-Type': 'application/json'})
    assert r.status_code == status and says in r.json()['error']['message'] and r.headers['content-type'] == 'application/json', r.text

@pytest.mark.skipif(shutil.which('curl') is None, reason='no curl')
def test_readmes_curl(up):
    line = next(l for l in (ROOT/'README.md').read_text().splitlines() if l.startswith('curl'))
    words = [w.replace('http://127.0.0.1:8000/v1', up) for w in shlex.split(line, comments=True)]
    out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [l.removeprefix('data: ') for l in out.splitlines() if l]
    assert parts[-1] == '[DONE]' and json.loads(parts[0])['choices'][0]['delta']['role'] == 'assistant' and json.loads(parts[-2])['choices'][0]['finish_reason'] in ('stop', 'length')

def test_a_body_without_its_header(up):
    "As curl sends it, which says that it is a form."
    r = httpx.post(up + '/completions', content=json.dumps(dict(prompt='a')), headers={'Content-Type': 'application/x-www-form-urlencoded'})
    assert r.status_code == 400 and 'with the header Content-Type: application/json' in r.json()['error']['message']

def test_wrong_paths(up):
    assert httpx.post(up + '/embeddings', json={}).json()['error']['message'].startswith('there is nothing at /v1/embeddings; this server has /health, ')
    r = httpx.get(up + '/completions')
    assert r.json()['error']['message'] == '/v1/completions takes POST, and this is GET' and r.headers['allow'] == 'POST'
    assert httpx.get(up + '/nothing').status_code == 404 and httpx.get(up + '/completions').status_code == 405 and 'error' in httpx.get(up + '/nothing').json()
    assert httpx.post(up + '/chat/completions', json=dict(messages=[dict(role='user', content=[dict(type='image_url', image_url='x')])])).status_code == 400

def test_wrong_starts(packed, tmp_path):
    def says(*words):
        r = subprocess.run([sys.executable, '-m', 'nativebit', 'serve', *map(str, words)], capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS='cpu'), timeout=60)
        assert r.returncode and 'Traceback' not in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr
        return r.stderr
    assert f"nativebit quantize {packed.parent/'float'} --out" in says(packed.parent/'float', '--port', 0)   # a command that works
    assert 'holds no model' in says(tmp_path, '--port', 0)
    assert 'slots=65' in says(packed, '--slots', 65, '--port', 0)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        assert "can't listen on 127.0.0.1" in says(packed, '--port', s.getsockname()[1])
    assert 'choose another --host' in says(packed, '--host', 'nowhere.invalid', '--port', 0)
    for n in ('config.json', 'openvino_model.xml', 'openvino_model.bin'): (tmp_path/n).write_text('{}')   # our own export
    assert 'exported to OpenVINO, for other programs; give the one' in says(tmp_path, '--port', 0)

def test_the_benchmark(packed, tmp_path):
    "It finds that all is well, and says so where nothing starts."
    def rows(model, *flags):
        r = subprocess.run([sys.executable, ROOT/'kernels'/'bench_serve.py', model, '--slots', '2', '--at-once', '5', '--tokens', '9', *flags], capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS='cpu'), timeout=120)
        return r.returncode, [json.loads(line) for line in r.stdout.splitlines()]
    code, (header, *found) = rows(packed, '--out', tmp_path/'rows')
    assert code == 0 and header['type'] == 'header' and all(r['ok'] for r in found), found
    assert [next(iter(r)) for r in found] == ['started', 'health', 'completion', 'chat', 'at_once', 'at_once', 'sigterm']
    assert found[2]['completion']['completion_tokens'] <= 9 and found[3]['pieces'] > 1 and 5 <= found[4]['tokens'] <= 45 and found[6]['whole_answers'] == 2
    turns = found[5]['turn_ms']
    assert {*turns} == {'prompts', 'network', 'choose', 'hand'} and turns['prompts'][1] == 5 and turns['network'][1] <= turns['hand'][1] <= 45 and all(ms > 0 for ms,_ in turns.values())
    assert len((tmp_path/'rows').read_text().splitlines()) == 8
    for backend, parts in dict(cpu=('prompts', 'network', 'choose'), torch=('prompts', 'launch', 'wait')).items():
        code, (_, warm, *found) = rows(packed, '--alone', '--backend', backend)
        assert code == 0 and warm['slots'] == 2 and {(r['alone'], r['texts']) for r in found} == {(k, n) for k in ('greedy', 'drawn', 'nucleus', 'told') for n in (1, 2)}
        assert all(r['ms_per_step'] > 0 and {*r['turn_ms']} == {*parts} for r in found)
    code, (_, *found) = rows(tmp_path)
    assert code == 1 and not found[-1]['ok'] and 'did not start' in found[-1]['error']

def test_the_benchmark_leaves_no_server_and_waits_for_no_text_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'kernels'))
    import bench_serve
    server = Mock(**{'wait.return_value': 0})
    monkeypatch.setattr(bench_serve.subprocess, 'Popen', lambda *a, **kw: server)
    monkeypatch.setattr(bench_serve, 'device', lambda: '')
    args = lambda *flags: bench_serve.ap.parse_args(['model', '--seconds', '60', *map(str, flags)])
    with pytest.raises(FileNotFoundError): bench_serve.main(args('--out', tmp_path/'no folder'/'rows'))
    assert server.kill.called
    bench, begun = bench_serve.Bench(args('--slots', 2)), time.time()
    monkeypatch.setattr(bench, 'stream', lambda path, body, third: ['', '[DONE]'])   # no third event
    bench.ends()
    bench.end.cancel()
    assert not bench.failed and time.time() - begun < 20
