"The command as a user runs it: rows as two whole networks give them, stopped and taken up again, refused where it can't be done."
import json, shutil
import ml_dtypes, numpy as np, pytest, test_cli
from safetensors.numpy import save_file
import nativebit.pipelines.compare as compare
from nativebit.models.checkpoint import fit_params
from nativebit.config import Config, QuantConfig
from nativebit.utils.cli import one_sentence, parse_args
from nativebit.utils.files import read_jsonl
from nativebit.evaluation.perplexity import compare as whole_networks, token_nll
from nativebit.interop.families import hf_names, model_config
from nativebit.formats.size import param_shapes
from nativebit.models.transformer import model_shapes
from nativebit.pipelines.quantize import quantize
from nativebit.data.tokenizers import train_tokenizer

CONFIG = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000., hidden_act='silu')
TEXTS = 'squares=text:squares.txt words=text:words.txt'

def write_model(folder, tok, seed=0, **other):
    folder.mkdir()
    config, rng = CONFIG | other, np.random.default_rng(seed)
    (folder/'config.json').write_text(json.dumps(config))
    tok.tok.save(str(folder/'tokenizer.json'))
    model = model_config(config)
    save_file({hf_names(model)[n]: (np.ones(s) if len(s) == 1 else .1*rng.standard_normal(s)).astype(ml_dtypes.bfloat16) for n,s in param_shapes(model)}, folder/'model.safetensors')

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('compare')
    (home/'squares.txt').write_text('\n\n'.join(f'line {i}: {i*i} is the square of {i}' for i in range(300)))
    (home/'words.txt').write_text('one two three four five six seven eight nine ten\n'*60)
    (home/'empty.txt').write_text(' \n')
    tok = train_tokenizer([(home/'squares.txt').read_text()], 300)
    write_model(home/'model', tok)
    write_model(home/'wider', tok, intermediate_size=256)
    write_model(home/'other words', train_tokenizer([(home/'squares.txt').read_text()], 280), vocab_size=280)
    write_model(home/'untied', tok, tie_word_embeddings=False)
    for m in ('rtn', 'kmeans'): quantize(home/'model', home/m, m, 'lut-b')
    quantize(home/'untied', home/'untied-rtn', 'rtn', 'lut-b')
    return home

def whole(where):
    "A model as `06_evaluation/01_perplexity` wants it."
    n = compare.open_network(where)
    cfg = Config('whole', n.model, QuantConfig(nativebit=False))
    return cfg, fit_params({k: np.asarray(n.read(k), np.float32) for k,_ in param_shapes(n.model)}, model_shapes(cfg.model))

@pytest.mark.parametrize('original, other', [('model', 'kmeans'), ('untied', 'untied-rtn')])
def test_rows_are_those_of_two_whole_networks(home, original, other):
    data = f"text:{home/'squares.txt'}"
    row, = compare.compare_texts(home/original, [home/other], dict(squares=data), max_tokens=1000)
    (cfg, float_params), (_, params) = whole(home/original), whole(home/other)
    tokens = compare.text_tokens(data, compare.source_tokenizer(compare.open_model(home/original)), 1000)
    want, nll = whole_networks(cfg, float_params, params, tokens), [token_nll(cfg, p, tokens).mean() for p in (float_params, params)]
    np.testing.assert_allclose([row['kl'], row['top1'], row['increase']], [want['kl'], want['top1'], np.expm1(nll[1] - nll[0])], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([row['original_ppl'], row['ppl']], np.exp(nll), rtol=1e-5)
    assert row['tokens'] == len(tokens) - 1 == 1000

def test_stopped_it_goes_on_and_the_original_is_read_once_a_text(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    out, read = tmp_path/'rows.jsonl', []
    reading = compare.reading
    def counted(network, batches):
        if len(read) == 4: raise KeyboardInterrupt
        read.append(network.name); return reading(network, batches)
    run = lambda: compare.compare_texts('model', ['rtn', 'kmeans'], compare.named_texts(TEXTS), out, max_tokens=200)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): m.setattr(compare, 'reading', counted); run()
    assert read == ['model', 'rtn', 'kmeans', 'model'] and len(read_jsonl(out)) == 3
    read.clear(); monkeypatch.setattr(compare, 'reading', counted)
    rows = run()
    assert read == ['model', 'rtn', 'kmeans'] and [(r['text'], r['model']) for r in rows] == [(t, m) for t in ('squares', 'words') for m in ('rtn', 'kmeans')]
    read.clear()
    assert run() == rows == read_jsonl(out)[1:] and not read

def test_the_same_network_loses_nothing(home):
    r, = compare.compare_texts(home/'model', [home/'model'], dict(words=f"text:{home/'words.txt'}"))
    assert (r['increase'], r['kl'], r['top1']) == (0, 0, 1)

def test_a_name_means_one_text_and_one_model(home, tmp_path):
    out, data = tmp_path/'rows.jsonl', f"text:{home/'words.txt'}"
    compare.compare_texts(home/'model', [home/'rtn'], dict(words=data), out, max_tokens=100)
    (tmp_path/'kmeans').mkdir()
    (home/'kmeans').rename(tmp_path/'kmeans'/'rtn')   # another model under the name of the first
    with pytest.raises(compare.UserError, match='another model that was called rtn'): compare.compare_texts(home/'model', [tmp_path/'kmeans'/'rtn'], dict(words=data), out, max_tokens=100)
    (tmp_path/'kmeans'/'rtn').rename(home/'kmeans')
    with pytest.raises(compare.UserError, match='another text'): compare.compare_texts(home/'model', [home/'rtn'], dict(words=f"text:{home/'squares.txt'}"), out, max_tokens=100)

@pytest.mark.parametrize('args, says', [
    (['model', 'rtn'], 'say what to read'),
    (['model', '--texts', TEXTS], 'required: other'),
    (['model', 'rtn', '--texts', 'text:words.txt'], 'give each text a name'),
    (['model', 'rtn', '--texts', 'a=test:words.txt'], "unknown dataset"),
    (['model', 'rtn', '--texts', 'a=text:nowhere.txt'], 'no such file'),
    (['model', 'rtn', '--texts', 'a=text:empty.txt'], 'nothing to read'),
    (['model', 'rtn', '--texts', 'a=text:words.txt,test=words.txt'], 'several splits'),
    (['model', 'rtn', '--texts', TEXTS, '--max-tokens', '0'], 'max_tokens=0'),
    (['model', 'rtn', '--texts', TEXTS, '--context-len', '65'], 'between 1 and 64'),
    (['model', 'nowhere', '--texts', TEXTS], 'there is no model nowhere'),
    (['model', 'wider', '--texts', TEXTS], 'd_ff is 256 and not 128'),
    (['model', 'other words', '--texts', TEXTS], 'vocab_size is 280 and not 300'),
    (['model', 'rtn', './rtn', '--texts', TEXTS], 'two of the models are called rtn'),
    (['rtn', 'model', '--texts', TEXTS], 'packed already'),
    (['model', 'rtn', '--texts', TEXTS, '--out', 'words.txt'], 'cannot go on with words.txt')])
def test_refusals(home, args, says, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as e, one_sentence(): compare.main(**parse_args(compare.main, args))
    text = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert says in text and not (isinstance(e.value.code, str) and '\n' in text)

def test_a_damaged_folder_is_refused(home, tmp_path):
    damaged = tmp_path/'damaged'
    shutil.copytree(home/'rtn', damaged)
    whole = bytearray((damaged/'model.safetensors').read_bytes()); whole[-1] ^= 1
    (damaged/'model.safetensors').write_bytes(whole)
    with pytest.raises(compare.UserError): compare.compare_texts(home/'model', [damaged], dict(words=f"text:{home/'words.txt'}"))

def test_the_program(home):
    run = lambda *args: test_cli.run(home, 'nativebit', 'compare', *args)
    p = run('model', 'rtn', 'kmeans', '--texts', TEXTS, '--max-tokens', '128', '--out', 'rows.jsonl')
    assert p.returncode == 0 and p.stdout.startswith('| text | model | tokens |') and p.stdout.count('\n') == 6, p.stderr
    header, *rows = read_jsonl(home/'rows.jsonl')
    assert header['setup']['original'] == 'model' and header['command'].startswith('nativebit compare model rtn') and len(rows) == 4
    assert 'made from it' in run('--help').stdout
