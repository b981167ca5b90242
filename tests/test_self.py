"Text that a model writes itself, as the data of a quantization: chats, vocabularies with unused rows, test texts that must not come up, a teacher that repeats itself."
import json, re, shutil
from pathlib import Path
import ml_dtypes, numpy as np, pytest
from nativebit.data.loader import in_turn, prepare
from nativebit.data.tokenizers import load_tokenizer
from nativebit.inference.synthetic import sequences
from nativebit.interop.convert import open_model, source_tokenizer
from nativebit.pipelines import self_data
from nativebit.pipelines.self_data import own_of, own_openings, rounds, self_dataset
from nativebit.utils.cli import UserError
from test_cli import start
from test_quantize import CONFIG, hf_names, home, model_config, param_shapes, save_file   # a random network of 300 tokens, and a text

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"

@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(self_data, 'own_shape', lambda model: (16, min(model.context_len, 48)))
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))

def test_quantize_needs_nothing_but_the_model(home):
    r = start(home, 'nativebit', 'quantize', 'model', '--data', 'self', '--geometry', 'lut-b', '--calibration-tokens', '1024', '--out', 'by-itself', '--no-report', '--force').wait()
    assert r.returncode == 0, r.stderr
    got = json.loads((home/'by-itself'/'quantize.json').read_text())
    assert got['data'] == 'self' and got['text']['source'][0] == 'self' and got['rows'][1]['kl'] > 0

@pytest.mark.parametrize('data, others', [('self:0.25,text:some.txt', ['text:some.txt']), ('self,text:some.txt,text:more.txt', ['text:some.txt', 'text:more.txt'])])
def test_a_mixture_has_the_other_texts_splits_and_none_of_their_tests(home, monkeypatch, data, others):
    monkeypatch.chdir(home)
    (home/'more.txt').write_text('\n\n'.join(f'Text {i} of {i*i} words, and {i**3} more of them.' for i in range(400)))
    own, size = own_of('model'), 1536 if len(others) == 1 else 683
    dataset = self_dataset(data, own, 2048)
    assert self_dataset(data, own, 2048) == dataset
    tokens, meta = prepare(dataset, own.tok)
    alone = [prepare(d, own.tok)[0] for d in others]
    for s in ('valid', 'test'): assert np.array_equal(tokens[s][:], in_turn([a[s] for a in alone])[:]) and len(tokens[s]) == sum(len(a[s]) for a in alone)
    assert meta['also'] == [dict(dataset=d, tokens=size) for d in others]
    train = tokens['train'][:]
    written, borrowed = train[:-size*len(others)], train[-size*len(others):]
    assert np.array_equal(borrowed, np.concatenate([a['train'][:size] for a in alone]))
    for a in alone: assert not np.isin(sequences(written, 13), sequences(np.asarray(a['test'][:]), 13)).any()
    assert len(written) >= 512 and meta['train']['tokens'] == len(train)

def test_a_text_too_short_for_its_share(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (home/'short.txt').write_text('\n\n'.join(f'Text {i}, which is short.' for i in range(60)))
    own = own_of('model')
    tokens, meta = prepare(self_dataset('self,text:short.txt', own, 4096), own.tok)
    there = len(prepare('text:short.txt', own.tok)[0]['train'])
    assert meta['train']['tokens'] == len(tokens['train']) < 4096 and f'note: text:short.txt has {there:,} tokens of the 2,048 it was to give' in capsys.readouterr().err

def test_whoever_reads_the_first_tokens_has_read_all():
    assert in_turn([np.arange(5), np.arange(10, 12), np.zeros(0, int)], 2)[:].tolist() == [0, 1, 10, 11, 2, 3, 4]
    assert in_turn([np.arange(5)], 2).tolist() == [*range(5)] and not len(in_turn([])) and not len(in_turn([np.zeros(0, int)]*2))

def test_chats_by_the_models_template(home, monkeypatch, tmp_path):
    from transformers import PreTrainedTokenizerFast
    folder = tmp_path/'chatty'
    tok = PreTrainedTokenizerFast(tokenizer_file=str(home/'model'/'tokenizer.json'), eos_token='<|endoftext|>', chat_template=TEMPLATE)
    tok.save_pretrained(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert self_data.chat_parts(files) == ('[user]', '<|endoftext|>[answer]')
    assert self_data.chat_parts({}) == self_data.chat_parts({'chat_template.jinja': b'{% broken'}) == ()
    ours = load_tokenizer(300, str(folder/'tokenizer.json'))
    parts = own_openings(ours, 300, self_data.chat_parts(files))
    (question, answer, chance), (reply, end, never) = parts[-2:]
    assert ours.decode(question) == '[user]' and ours.decode(reply) == '[answer]' and (answer, end) == (len(parts)-1, -1) and chance == .5 and not never
    assert sum(c for *_,c in parts) == pytest.approx(1)

def test_rows_that_the_tokenizer_lacks_are_never_written(home, monkeypatch):
    monkeypatch.chdir(home)
    own = own_of('model')
    own.tok.size = 280   # of the model's 300 rows
    assert max(int(d.max()) for d in next(rounds(own, (16, 48), 0))) < 280

def test_without_an_end_a_document_fills_its_window(home, monkeypatch):
    monkeypatch.chdir(home)
    own = own_of('model')
    own.tok.ends = []
    assert {len(d) for d in next(rounds(own, (16, 48), 0))} <= {48}

def test_a_teacher_that_repeats_itself_is_reported(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(self_data, 'repeated', lambda doc: 1.)
    with pytest.raises(UserError, match='repeats itself: of'): next(rounds(own_of('model'), (16, 48), 0))

def test_a_network_that_says_one_word_for_ever(home, tmp_path):
    "Its matrices are zero and its embedding has one direction, longest at one token: whatever it reads, this token is next. One sentence, no traceback, no folder."
    model, words = model_config(CONFIG), np.full((300, 1), .01)
    words[40] = 4.
    (tmp_path/'model').mkdir()
    for n in ('config.json', 'tokenizer.json'): shutil.copy(home/'model'/n, tmp_path/'model'/n)
    made = {hf_names(model)[n]: np.ones(s) if len(s) == 1 else words*np.ones(s) if n == 'embed' else np.zeros(s) for n,s in param_shapes(model)}
    save_file({n: x.astype(ml_dtypes.bfloat16) for n,x in made.items()}, tmp_path/'model'/'model.safetensors')
    r = start(tmp_path, 'nativebit', 'quantize', 'model', '--data', 'self', '--geometry', 'lut-b', '--calibration-tokens', '1024', '--out', 'never').wait()
    assert r.returncode == 1 and re.search('error: .*repeats itself: of .* give it text to read instead', r.stderr) and 'Traceback' not in r.stderr and not (tmp_path/'never').exists(), r.stderr

@pytest.mark.parametrize('data, says', [('self:3,stdlib', 'is not valid'), ('self:0.5', 'is not valid'), ('self,text:gone.txt', 'no such file'), ('shards:.', 'holds no prepared tokens'), ('self,', 'is not valid'), ('self,text:some.txt,text:some.txt', 'each once'), ('self,python:nothing', 'no Python files'), ('self,text:a.txt', 'the test split of text:a.txt is empty')])
def test_what_is_no_dataset(home, tmp_path, data, says):
    (home/'nothing').mkdir(exist_ok=True); (home/'a.txt').write_text('a line and no more')
    r = start(home, 'nativebit', 'quantize', 'model', '--data', data, '--out', 'never').wait()
    assert r.returncode == 1 and says in r.stderr and r.stderr.count('\n') == 1 and not [*home.glob('never*')]
    assert not [*(tmp_path/'cache').glob('self-*')]   # nothing was written that is of no use

def test_text_that_was_begun_with_other_settings_is_not_mixed(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home); out = str(tmp_path/'own'); real = self_data.rounds
    def one(*args):
        yield next(real(*args))
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): m.setattr(self_data, 'rounds', one); self_data.main('model', out, tokens=700)
    for words in (dict(seed=1), dict(tokens=800), dict(context_len=40)):
        with pytest.raises(UserError, match='was begun with another source'): self_data.main('model', out, **dict(tokens=700) | words)
    self_data.main('model', out, tokens=700)
    self_data.main('model', whole := str(tmp_path/'whole'), tokens=700)
    read = lambda d: {p.name: p.read_bytes() for p in Path(d).iterdir()}
    assert read(out) == read(whole) and not list(tmp_path.glob('.*.lock'))

def test_no_round_is_written_for_nothing(home, monkeypatch, tmp_path):
    "On a GPU the next round is begun while documents are looked at, but only where they can't be enough; on a CPU, which can't be stopped meanwhile, it is not."
    monkeypatch.chdir(home); begun, looked, real = [], [], self_data.written_windows
    monkeypatch.setattr(self_data, 'written_windows', lambda *args: begun.append(0) or real(*args[:-1], np.float32))
    monkeypatch.setattr(self_data, 'repeated', lambda doc: looked.append(len(begun)) or 0.)
    for backend in ('gpu', 'cpu'):
        with monkeypatch.context() as m:
            m.setattr(self_data.jax, 'default_backend', lambda: backend)
            begun.clear(); looked.clear()
            self_data.main('model', str(tmp_path/backend), tokens=3000)
        assert len(begun) == json.loads((tmp_path/backend/'meta.json').read_text())['rounds'] > 3
        assert looked[0] == (2 if backend == 'gpu' else 1)

def test_a_round_of_few_windows_is_judged_by_many(home, monkeypatch):
    monkeypatch.chdir(home); sizes = []
    real = self_data.written_windows
    monkeypatch.setattr(self_data, 'written_windows', lambda *args: sizes.append(args[3][0]) or real(*args))
    docs = next(rounds(own_of('model'), (3, 48), 0))
    assert sizes == [3]*6 and sum(map(len, docs)) > 48*16

def test_what_ends_a_document_counts_among_thirteen_tokens(home, monkeypatch):
    "Twelve tokens of a test text and its end stand in no document, whose own end is added after it was looked at."
    monkeypatch.chdir(home); own = own_of('model')
    docs = next(rounds(own, (16, 48), 0))
    d = next(d for d in docs if len(d) >= 20 and d[-1] != own.tok.eot)
    kept = next(rounds(own._replace(avoid=sequences(np.append(d[-12:], own.tok.eot), 13)), (16, 48), 0))
    assert len(kept) == len(docs) - 1

def test_rounds_are_compiled_once(home, monkeypatch):
    "Their openings are as many as before, though other words are drawn."
    monkeypatch.chdir(home); seen = []
    real = self_data.written_windows
    monkeypatch.setattr(self_data, 'written_windows', lambda *args: seen.append(args[2].tokens.shape[0]) or real(*args))
    more = rounds(own_of('model'), (16, 48), 0)
    for _ in range(4): next(more)
    assert len({*seen}) == 1 and not seen[0] & (seen[0] - 1)

@pytest.mark.parametrize('left', [[], ['progress.json', 'train-00000.npy'], ['.progress.json.x.tmp']])
def test_killed_before_its_first_round_is_recorded(tmp_path, left):
    for n in left: (tmp_path/n).write_text('')
    self_data.check_fresh(tmp_path)
    (tmp_path/'progress.json').unlink(missing_ok=True); (tmp_path/'train-00000.npy').write_text('')
    with pytest.raises(UserError, match='exists; delete it'): self_data.check_fresh(tmp_path)

def test_other_test_texts_of_equal_length_are_kept_out(home, monkeypatch, tmp_path):
    "A test that has changed has the text written again, though its sequences are as many."
    monkeypatch.chdir(tmp_path)
    own, folders = own_of(str(home/'model')), []
    for word in 'line', 'text':
        Path('test.txt').write_text('\n\n'.join(f'{word} {i} of {i*i}' for i in range(100)))
        monkeypatch.setattr(self_data, 'write_own', lambda own, folder, *a: folders.append(folder))
        self_dataset(f"self,text:{home/'some.txt'},test=test.txt", own, 1024)
    assert len({*folders}) == 2

def test_a_cache_that_cannot_be_written(home, monkeypatch):
    monkeypatch.chdir(home); monkeypatch.setenv('NATIVEBIT_CACHE', str(home/'some.txt'))
    with pytest.raises(UserError, match='cannot write .*another folder with NATIVEBIT_CACHE'): self_dataset('self', own_of('model'), 1024)

def test_source_to_train_on(tmp_path, monkeypatch):
    "Files of packages and articles in turn, without what shares 13 words with a text of the test."
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    import source_text
    site, held = tmp_path/'site', tmp_path/'held'
    for d in (site/'a', site/'b'/'_vendor', held): d.mkdir(parents=True)
    body = lambda n: '\n'.join(f'def f_{n}_{i}(x): return x + {i}' for i in range(80)) + '\n'
    for k,name in enumerate(('a/one.py', 'a/two.py', 'a/tested.py', 'b/three.py', 'b/_vendor/copied.py')): (site/name).write_text(body(k))
    (site/'a'/'short.py').write_text('x = 1')
    for n in source_text.HELD: (held/f'{n}.txt').write_text('some words')
    (held/'code.txt').write_text(body(2)[500:700])
    (tmp_path/'wiki.txt').write_text('<|endoftext|>\n'.join(f'Article {i}.\n' + 'word '*100 + '\n' for i in range(30)))
    monkeypatch.setattr(source_text.sysconfig, 'get_path', lambda which: str(site))
    def run(*more):
        monkeypatch.setattr('sys.argv', ['source_text', str(tmp_path/'out.txt'), '--held', str(held), *more])
        source_text.main()
        return (tmp_path/'out.txt').read_text().split('\n<|endoftext|>\n')
    assert sorted(re.findall(r'f_(\d)_0', t)[0] for t in run('--packages', 'a b')) == ['0', '1', '3']
    texts = run('--packages', 'a', '--articles', str(tmp_path/'wiki.txt'))
    assert [t[:3] for t in texts].count('def') == 2 and texts[0].startswith('def') and texts[1].startswith('Article 0')
    assert sum(len(t) for t in texts if t[0] == 'A')/sum(len(t) for t in texts if t[0] == 'd') == pytest.approx(1.6, abs=.2)
    with pytest.raises(SystemExit, match='none of these packages'): run('--packages', 'c')
    with pytest.raises(SystemExit, match="can't be read"): run('--held', str(tmp_path))
