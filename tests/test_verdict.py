"The built-in texts, the word for a loss, embeddings of rows, the report, and what a run leaves behind it."
import json, re
import numpy as np, pytest
from test_quantize import CONFIG, home
import nativebit as nb
from nativebit.data.tokenizers import load_tokenizer
from nativebit.evaluation.report import page, section, side_by_side
from nativebit.evaluation.verdict import LEVELS, TEXTS, Verdict, advice, builtin_documents, builtin_tokens, calibration_windows, level_of, verdict_batches
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import read_pack
from nativebit.interop.export import export_nbpack, export_safetensors
from nativebit.pipelines import quantize as q
from nativebit.pipelines.exporting import export_packed
from nativebit.pipelines.opening import opened
from nativebit.utils.cli import UserError, one_sentence, parse_args

# ---- texts --------------------------------------------------------------------------------------------------

def sentences(name): return {s.strip() for d in builtin_documents(name) for s in re.split(r'(?<=[.!?])\s+|\n', d) if len(s.strip()) > 30}

def test_the_texts_have_many_kinds_and_nothing_in_common():
    sizes = {name: sum(len(d.encode()) for d in builtin_documents(name)) for name in TEXTS}
    assert 60_000 <= sizes['calibration'] <= 120_000 and 20_000 <= sizes['verdict'] <= 30_000
    assert not sentences('calibration') & sentences('verdict')
    for name in TEXTS:
        text = '\n'.join(builtin_documents(name))
        for sign in ('<|im_start|>user', 'import ', 'SELECT', '#include', '|--', '"', 'Dear ', '²', 'der ', ' le ', ' la '): assert sign in text, (name, sign)
        long = [l for l in text.splitlines() if len(l) > 60]
        assert len(set(long)) > .98*len(long)   # nothing to fill up

def test_windows_hold_no_token_twice():
    tokens = np.arange(20_000)
    for most in (10**9, 8192, 700, 10):
        got = np.concatenate([b.reshape(-1) for b in calibration_windows(tokens, 2048, most)])
        assert len(set(got)) == len(got) <= max(most, 512) and len(got) >= .7*min(most, 20_000)
        assert got[-1] > 19_000 or len(got) < 1024   # spread over all of it
    for x,y,mask in verdict_batches(tokens, 100): assert np.array_equal(x[:, 1:], y[:, :-1]) and mask.all()

# ---- the word -----------------------------------------------------------------------------------------------

def test_levels_have_no_gap():
    tops = [0., *LEVELS.values()]
    assert [level_of(t) for t in tops[:-1]] == [*LEVELS] and level_of(float('nan')) == level_of(1e9) == 'broken'
    json.dumps(Verdict(float('nan'), .1, float('inf'), 9).to_dict(), allow_nan=False)

@pytest.mark.parametrize('method', q.METHODS)
@pytest.mark.parametrize('bits', (2, 3, 4))
def test_advice_is_something_else(method, bits):
    said = advice(method, bits)
    assert said.startswith('try ') and ('--bits 4' in said) == (bits < 4) and f'--method {method}' not in said

# ---- a run --------------------------------------------------------------------------------------------------

def main(home, capsys, monkeypatch, *words):
    "(exit code or message, stdout, stderr) of the command."
    monkeypatch.chdir(home)
    try:
        with one_sentence(): q.main(**parse_args(q.main, ['model', *words]))
        code = 0
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

def test_the_default_needs_nothing_but_the_model(home, capsys, monkeypatch):
    code, out, err = main(home, capsys, monkeypatch, '--out', 'default', '--calibration-tokens', '512')
    assert code == 0 and '| gptq | 4.2' in out and re.search('^verdict: ', out, re.M) and 'below 0.02 as good as the original' in out, out
    kept = json.loads((home/'default'/'quantize.json').read_text())
    assert kept['method'] == 'gptq' and kept['geometry'] == '4bit-8x64' and kept['verdict']['level'] in LEVELS and kept['verdict']['tokens'] >= 2000
    assert {'bytes', 'file_bits', 'of_source', 'of_bfloat16'} <= set(kept['rows'][1]) and len(kept['layers']) == 2
    text = (home/'default'/'report.html').read_text()
    assert '<script' not in text and 'http-equiv="Content-Security-Policy"' in text and text.count('<svg') >= 3 and 'Once upon a time' in text
    assert not re.findall(r'(?:href|src)="(?!#|data:)', text)
    assert 'default/report.html' in out and nb.load(home/'default').quantized
    assert err.splitlines()[-1] == "next: nativebit generate default --prompt 'Once upon a time'"

def test_json_is_all_that_is_printed(home, capsys, monkeypatch):
    code, out, _ = main(home, capsys, monkeypatch, '--out', 'j', '--method', 'rtn', '--bits', '2', '--json', '--no-report')
    got = json.loads(out)
    assert out.count('\n') == 1 and got['rows'][1]['model'] == 'rtn' and got['verdict']['level'] in LEVELS and got['report'] is None

def test_a_broken_model_is_an_error_and_is_kept(home, capsys, monkeypatch):
    monkeypatch.setattr('nativebit.pipelines.compare.losses', lambda *a: dict(tokens=2048, kl=2.4, top1=.3, increase=9.))
    words = ['--method', 'kmeans', '--bits', '3', '--no-report']
    code, out, _ = main(home, capsys, monkeypatch, '--out', 'broken', *words)
    assert code.startswith('error: the model in broken is broken (KL 2.4') and '--bits 4, --method gptq or training (--method qat)' in code and '\n' not in code
    assert 'verdict: broken' in out and open_folder(home/'broken').linears
    assert main(home, capsys, monkeypatch, '--out', 'forced', '--force', *words)[0] == 0

def test_python_returns_the_verdict(home, monkeypatch):
    monkeypatch.setattr('nativebit.pipelines.compare.losses', lambda *a: dict(tokens=2048, kl=2.4, top1=.3, increase=9.))
    m = nb.quantize(home/'model', method='rtn', bits=3)
    assert m.verdict.broken and m.verdict.level == 'broken' and m.rows[1]['bits_per_weight'] < 3.2

def test_own_text_has_the_last_word(home):
    m = nb.quantize(home/'model', 'lut-b', 'rtn', f"text:{home/'some.txt'}", test_tokens=300)
    assert m.verdict.text == f"the test split of text:{home/'some.txt'}" and m.verdict.kl == m.rows[1]['kl']

def test_without_a_tokenizer_there_is_no_verdict(home, tmp_path):
    for n in ('config.json', 'model.safetensors'): (tmp_path/n).write_bytes((home/'model'/n).read_bytes())
    got = q.quantize(tmp_path, home/'mute', 'rtn', report=True)
    assert got.verdict is None and not got.broken and 'tokenizer.json' in got.note and q.spoken(got) == [f"no verdict: {got.note}"]
    assert open_folder(home/'mute').rows == [] and 'What the bytes are for' in (home/'mute'/'report.html').read_text()
    with pytest.raises(UserError, match='tokenizer.json.*--method kmeans reads none'): q.quantize(tmp_path, home/'x')

# ---- embeddings ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tied,embed', [(True, 'int8'), (False, 'int8'), (False, '6'), (True, '4')])
def test_embeddings_of_rows_are_read_alike(home, tmp_path, tied, embed):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    import nativebit.hf
    from test_convert import random_transformer
    source = random_transformer('Llama', tmp_path/'float', 'bfloat16', tie_word_embeddings=tied)
    for n in (embed, 'bfloat16'): q.quantize(source, tmp_path/n, 'rtn', 'lut-b', embed=n)
    folder = open_folder(tmp_path/embed)
    assert len(folder.rows) == 2 - tied and folder.config['quantization_config']['version'] == (3 if embed == 'int8' else 4)
    codes, plain = folder.tensors['model.embed_tokens.weight'], open_folder(tmp_path/'bfloat16').tensors['model.embed_tokens.weight']
    assert codes.nbytes*8 == plain.size*{'int8': 8, '6': 6, '4': 4}[embed]
    assert open_folder(tmp_path/'bfloat16').config['quantization_config']['version'] == 1
    mine, tokens = nb.load(tmp_path/embed), np.random.default_rng(0).integers(0, 80, (2, 24))
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/embed, dtype=torch.float32)
    with torch.no_grad(): want = live(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(mine.logits(tokens), want, atol=1e-4)
    # one file, and plain weights
    export_nbpack(folder, tmp_path/'one.nbpack.safetensors')
    assert read_pack(tmp_path/'one.nbpack.safetensors').meta['embed'] == embed
    np.testing.assert_allclose(nb.load(tmp_path/'one.nbpack.safetensors').logits(tokens), want, atol=2e-2)   # norms in bfloat16
    export_packed(opened(tmp_path/'one.nbpack.safetensors'), tmp_path/'back')
    back = open_folder(tmp_path/'back')
    assert back.embed == embed and all(np.array_equal(back.tensors[n], folder.tensors[n]) for P in folder.rows for n in (f'{P}.weight', f'{P}.weight_scale'))
    export_safetensors(folder, tmp_path/'plain', 'float32')
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'plain', dtype=torch.float32)
    with torch.no_grad(): np.testing.assert_allclose(plain(torch.tensor(tokens)).logits.numpy(), want, atol=1e-4)
    # saved and opened again
    live.save_pretrained(tmp_path/'again')
    again = open_folder(tmp_path/'again')
    assert again.rows == folder.rows and all(np.array_equal(again.tensors[f'{P}.weight'], folder.tensors[f'{P}.weight']) for P in folder.rows)

def test_auto_takes_int8_where_it_costs_little(home, tmp_path, monkeypatch):
    for cost, rows in ((1e-9, ['model.embed_tokens']), (1e9, [])):
        monkeypatch.setattr('nativebit.pipelines.compare.tables_kl', lambda *a, **k: cost)
        got = q.quantize(home/'model', tmp_path/f'{cost}', 'rtn', 'lut-b')
        assert open_folder(tmp_path/f'{cost}').rows == rows and (got.embed_kl is None) == (not rows)
    q.quantize(home/'model', tmp_path/'plain', 'rtn', 'lut-b', embed='bfloat16')
    a, b = (open_folder(tmp_path/n) for n in ('plain', f'{1e9}'))
    assert a.config == b.config and set(a.tensors) == set(b.tensors) and all(x.tobytes() == b.tensors[n].tobytes() for n,x in a.tensors.items())

# ---- what fails ---------------------------------------------------------------------------------------------

def test_a_refused_training_leaves_no_work(home):
    "The correction that the message suggests must be possible."
    args = (home/'model', home/'refused', 'qat')
    with pytest.raises(UserError, match='--attention reference'): q.quantize(*args, data=f"text:{home/'some.txt'}", attention='cudnn')
    assert not (home/'refused.work').exists()

def test_what_fails_before_anything_is_finished_leaves_no_work(home, monkeypatch):
    def refuse(*a, **k): raise UserError('no')
    monkeypatch.setattr(q, 'trained', refuse)
    with pytest.raises(UserError, match='no'): q.quantize(home/'model', home/'refused', 'qat', data=f"text:{home/'some.txt'}")
    assert not (home/'refused.work').exists()

def test_a_model_cannot_write_into_the_page():
    text = page('</title><script>', section('x', side_by_side([('<img src=x>', '<b>', '"&')])))
    assert '<script>' not in text and '<img' not in text and '<b>' not in text
