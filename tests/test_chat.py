"A talk in the terminal: templates render as transformers renders them and in a sandbox, the model sees what was said, Ctrl-C ends an answer and not the program, pipes work, and a talk outgrows no window."
import json, os, pty, shutil, subprocess, sys, time
from pathlib import Path
import processes, pytest
import nativebit as nb
from nativebit.config import get_config, override
from nativebit.data.tokenizers import train_tokenizer
from nativebit.models.checkpoint import save_checkpoint
from nativebit.models.transformer import init_model
from nativebit.pipelines.chat import Talk, chat_template, renderer, special_tokens, talk_files
from nativebit.utils.cli import UserError

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = dict(
    chatml=CHATML,
    llama2="{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
           "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
           "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    blocks="{%- for m in messages %}\n    {%- if m.role == 'system' %}\n        {{- m.content }}\n    {%- else %}\n        {{- '<|' ~ m.role ~ '|>' }}{% generation %}{{ m.content | trim }}{% endgeneration %}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    json="{% for m in messages %}{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    tools="{% if tools is defined and tools %}T{% endif %}{% if documents is not none and documents is defined %}D{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}")
TALKS = [[dict(role='user', content='Who are you? é')], [dict(role='system', content='Be kind.'), dict(role='user', content=' Hi '), dict(role='assistant', content='Hello!'), dict(role='user', content='Again')]]

@pytest.mark.parametrize('talk', TALKS, ids=['one', 'four'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_templates_are_transformers_own(name, talk):
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    special = dict(bos_token='<s>', eos_token='</s>')
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **special)
    want = tok.apply_chat_template(talk, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True)
    assert renderer(TEMPLATES[name], special)(talk) == want

@pytest.mark.parametrize('template, says', [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'), ("{{ messages.append(1) }}", 'unsafe'), ("{% for x in %}", "can't be used"), ("{{ raise_exception('no system here') }}", 'no system here'),
    ("{{ messages[7].content + 'x' }}", "can't be used"), ("{% import 'os' as os %}", "can't be used"), ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "can't be used"), ("{{ 'x' + 1 }}", "can't be used"),
    ("{% include '/etc/passwd' %}", "can't be used"), ("{{ cycler.__init__.__globals__.os.system('true') }}", 'unsafe')])
def test_a_template_is_somebody_elses_program(template, says):
    with pytest.raises(UserError, match=says) as e: renderer(template, {})(TALKS[0])
    assert '\n' not in str(e.value)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A random network with a tokenizer and a template, as a run, a folder, a packed folder and a file; and one whose tokens are bytes."
    home = tmp_path_factory.mktemp('chat')
    tok = train_tokenizer(['Who are you? I am a small model of few words. ' * 20], 300).tok
    tok.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    (home/'t').mkdir(); tok.save(str(home/'t'/'tokenizer.json'))
    cfg = get_config('tiny', n_layers=1, context_len=128, vocab_size=304, geometry='lut-b', tokenizer=str(home/'t'/'tokenizer.json'))
    state = init_model(cfg, seed=0)
    save_checkpoint(home/'logs'/'talks', override(cfg, nativebit=False), state[0])
    (home/'logs'/'talks'/'tokenizer_config.json').write_text(json.dumps(dict(chat_template=CHATML, eos_token='<|im_end|>', bos_token=None)))
    save_checkpoint(home/'bytes', override(get_config('tiny', n_layers=1), nativebit=False), init_model(get_config('tiny', n_layers=1), seed=0)[0])
    old = os.getcwd(); os.chdir(home)
    from nativebit.pipelines.exporting import export_plain
    from nativebit.pipelines.opening import opened
    export_plain(opened('talks'), home/'plain')
    nb.quantize(home/'plain', 'lut-b', 'rtn', out=home/'rtn')
    nb.load('rtn').save(home/'one'/'rtn.nbpack.safetensors')
    os.chdir(old)
    return home

@pytest.mark.parametrize('where', ['logs/talks', 'plain', 'rtn', 'one/rtn.nbpack.safetensors'])
def test_the_template_comes_along(home, where):
    m = nb.load(home/where)
    files = talk_files(m)
    assert chat_template(files) == CHATML and special_tokens(files)['eos_token'] == '<|im_end|>'
    ids = Talk(m, renderer(chat_template(files), {}), 8, messages=list(TALKS[0])).ids()
    assert ids[0] == m.tokenizer.tok.token_to_id('<|im_start|>') and m.tokenizer.tok.token_to_id('<|im_end|>') in m.tokenizer.ends

def test_a_gguf_file_has_its_own(tmp_path):
    pytest.importorskip('gguf'); pytest.importorskip('torch')
    from test_convert import open_model, random_transformer, write_gguf
    source = open_model(random_transformer('Llama', tmp_path/'x'))
    write_gguf(tmp_path/'x.gguf', source, tokenizer=True, add=lambda w: w.add_chat_template('{{ bos_token }}{{ messages[0].content }}'))
    files = talk_files(nb.load(tmp_path/'x.gguf'))
    assert renderer(chat_template(files), special_tokens(files))(TALKS[0]) == '<s>Who are you? é'

def recorded(m, answers):
    "A decoder that answers with given texts and keeps what it was asked."
    asked, answers = [], iter(answers)
    def decode(ids, n, stop=(), **how): asked.append(list(ids)); yield from [int(i) for i in m.tokenizer.encode_batch([next(answers)])[0]]
    m.decoder = decode
    return asked

def test_it_sees_what_was_said(home):
    m = nb.load(home/'plain')
    talk, asked = Talk(m, renderer(CHATML, {}), 8), recorded(m, ['I am a small model', 'few words', 'Who'])
    assert ''.join(talk.answer('Who are you?')) == 'I am a small model' and ''.join(talk.answer('Who?')) == 'few words'
    show = lambda ids: m.tokenizer.tok.decode(ids, skip_special_tokens=False)
    assert show(asked[1]) == '<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am a small model<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n'
    talk.reset()
    [*talk.answer('Who?')]
    assert show(asked[2]) == '<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n'

def test_a_long_talk_forgets_its_beginning_and_never_the_instruction(home):
    m = nb.load(home/'plain')
    talk, asked = Talk(m, renderer(CHATML, {}), 16, messages=[dict(role='system', content='few words')]), recorded(m, ['Who are you? ' * 3] * 30)
    for i in range(30): [*talk.answer(f'Who {i}')]
    shown = [m.tokenizer.tok.decode(ids, skip_special_tokens=False) for ids in asked]
    assert all(len(ids) <= 112 for ids in asked) and all(t.startswith('<|im_start|>system\nfew words<|im_end|>\n') and f'Who {i}<' in t for i,t in enumerate(shown)) and 'Who 0<' not in shown[-1]
    before = list(talk.messages)
    with pytest.raises(UserError, match='fewer words'): [*talk.answer('zq! ' * 200)]
    assert talk.messages == before

def test_the_decoder_is_generates(home):
    m = nb.load(home/'bytes')
    assert ''.join(Talk(m, None, 12, dict(temperature=0.)).answer('def f')) == m.generate('def f', 12, 0.)[len('def f'):]

# ---- the program --------------------------------------------------------------------------------------------

def chat(home, *words, stdin='', **kw): return processes.run('-m', 'nativebit', 'chat', *words, cwd=home, stdin=stdin, **kw)

def test_lines_that_are_piped_in(home):
    r = chat(home, 'rtn', '--max-tokens', '6', '--temperature', '0', stdin='Who?\n\nWho?\n/reset\nWho?\n/exit\nnever\n')
    assert r.returncode == 0 and 'rtn: /reset forgets' in r.stderr and '(forgotten)' in r.stderr, r.stderr
    m = nb.load(home/'rtn')
    talk = Talk(m, renderer(CHATML, {}), 6, dict(temperature=0.))
    first, second = [''.join(talk.answer('Who?')) for _ in range(2)]
    assert r.stdout == f'{first}\n{second}\n{first}\n'
    r = chat(home, 'talks', '--plain', '--backend', 'jax', '--max-tokens', '4', stdin='Who')   # a last line without its end
    assert r.returncode == 0 and 'continues your text' in r.stderr and r.stdout.endswith('\n')
    assert chat(home, 'bytes', stdin='').stdout == ''

@pytest.mark.parametrize('files, template', [
    ({'tokenizer_config.json': b'['*20_000}, ''), ({'tokenizer_config.json': b'{"chat_template": [{"name": {}, "template": "a"}, {"name": [1], "template": "b"}, 3]}'}, 'a'), ({'tokenizer_config.json': b'{"chat_template": {"x": 5}}'}, '')])
def test_small_files_that_make_no_sense(files, template): assert chat_template(files) == template and special_tokens(files) == {}

@pytest.mark.parametrize('words, says', [(['nowhere'], 'there is no model nowhere'), (['rtn', '--max-tokens', '0'], 'max_tokens=0'), (['rtn', '--backend', 'numpy'], 'auto, jax, torch or cpu'), (['rtn', '--temperature', '-1'], 'temperature')])
def test_refusals(home, words, says):
    r = chat(home, *words, stdin='x\n')
    assert r.returncode == 1 and says in r.stderr.splitlines()[-1] and 'Traceback' not in r.stderr and r.stdout == ''

def test_a_template_that_takes_no_instruction(home, tmp_path):
    shutil.copytree(home/'plain', tmp_path/'m')
    (tmp_path/'m'/'chat_template.jinja').write_text("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[-1].content }}")
    assert chat(tmp_path, 'm', '--max-tokens', '3', stdin='Who\n').returncode == 0
    r = chat(tmp_path, 'm', '--system', 'be kind', stdin='Who\n')
    assert r.returncode == 1 and r.stderr == 'error: the chat template refuses this talk: System role not supported\n'
    r = chat(tmp_path, 'm', '--system', 'be kind', '--plain', '--max-tokens', '3', stdin='Who\n')
    assert r.returncode == 0

class Terminal:
    "A program in a terminal of its own."
    def __init__(self, home, *words):
        self.text, (self.master, slave) = b'', pty.openpty()
        code = "import fcntl, runpy, signal, termios; signal.signal(signal.SIGINT, signal.default_int_handler); fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module('nativebit', run_name='__main__', alter_sys=True)"   # its own terminal, whose Ctrl-C it gets, also where these tests run in the background
        self.p = subprocess.Popen([sys.executable, '-c', code, *words], cwd=home, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(Path(nb.__file__).parents[1]), TERM='dumb'))
        os.close(slave); os.set_blocking(self.master, False)
    def write(self, text): os.write(self.master, text.encode())
    def until(self, what, seconds=120):
        "Read until something is there."
        end = time.time() + seconds
        while not what(self.text.decode(errors='replace')):
            assert time.time() < end and self.p.poll() is None, self.text.decode(errors='replace')
            try: self.text += os.read(self.master, 65536)
            except (BlockingIOError, OSError): time.sleep(.05)

def test_ctrl_c_ends_an_answer_and_ctrl_d_the_talk(home):
    t = Terminal(home, 'chat', 'bytes', '--max-tokens', '100000', '--temperature', '0')   # greedy, this network repeats one letter for ever
    try:
        t.until(lambda s: '> ' in s)
        t.write('def f\n')
        t.until(lambda s: 'def f' in s and len(s.split('def f', 1)[1]) > 40)   # it talks
        t.write('\x03')
        t.until(lambda s: s.split('(stopped)')[-1].strip('\r\n') == '> ')
        t.write('\x03')                                        # at the question
        t.until(lambda s: s.count('/exit or Ctrl-D ends') > 1 and s.endswith('> '))   # sooner, the terminal may swallow Ctrl-D while it changes its mode
        t.write('\x04')
        assert t.p.wait(60) == 0
    finally: t.p.kill(); os.close(t.master)
