"Files and tokenizers as people have them, each of a kind that once was read wrong without a word."
import bz2, gzip, json, lzma
import numpy as np, pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from nativebit.config import NO_TOKENIZER
from nativebit.data.corpora import file_documents
from nativebit.data.loader import prepare
from nativebit.data.prompts import text_pieces
from nativebit.data.tokenizers import BPETokenizer, load_tokenizer, train_tokenizer
from nativebit.utils.cli import UserError

TEXTS = ['one morning', 'two evenings, and a night', 'drei Tage']

def written(path, text): path.write_bytes(text if isinstance(text, bytes) else text.encode()); return path

@pytest.mark.parametrize('name, text', {
    'list.json': json.dumps([dict(text=t, more=1) for t in TEXTS]), 'indented.JSON': json.dumps([dict(text=t) for t in TEXTS], indent=2), 'a line each.json': '\n'.join(json.dumps(dict(text=t)) for t in TEXTS),
    'x.NDJSON': '\n'.join(json.dumps(dict(text=t)) for t in TEXTS), 'packed.json.xz': lzma.compress(json.dumps([dict(text=t) for t in TEXTS]).encode()),
    'x.jsonl.gz': gzip.compress('\n'.join(json.dumps(dict(text=t)) for t in TEXTS).encode(), mtime=0), 'over several lines.json': '\n\n'.join(json.dumps(dict(text=t), indent=4) for t in TEXTS),
    'table.csv': 'id,text,more\n' + ''.join(f'{i},"{t}",x\n' for i,t in enumerate(TEXTS)), 'table.TSV.bz2': bz2.compress(('text\tid\n' + ''.join(f'{t}\t{i}\n' for i,t in enumerate(TEXTS))).encode()),
    'put together.JL': b''.join(b'\xef\xbb\xbf' + json.dumps(dict(text=t)).encode() + b'\n' for t in TEXTS), 'wide.txt': '\n'.join(TEXTS).encode('utf-16'), 'wider.txt.gz': gzip.compress('\n'.join(TEXTS).encode('utf-32'), mtime=0),
    'marked.jsonl': b'\xef\xbb\xbf' + '\n'.join(json.dumps(dict(text=t)) for t in TEXTS).encode(), 'marked.txt': b'\xef\xbb\xbf' + '\n'.join(TEXTS).encode()}.items())
def test_files_are_what_they_are(tmp_path, name, text): assert list(file_documents(written(tmp_path/name, text))) == TEXTS

def test_an_object_without_text_is_named(tmp_path):
    with pytest.raises(UserError, match='object 2 of .*not an object such as'): list(file_documents(written(tmp_path/'x.json', json.dumps([dict(text='a'), dict(txt='b')]))))

@pytest.mark.parametrize('name, text, what', [('x.txt', gzip.compress(b'text', mtime=0), 'is a .gz file and no text; give it that ending'), ('x.jsonl.zst', b'(\xb5/\xfd\xff\xff', 'is a .zst file and no text; unpack it'),
    ('x.json', b'PAR1\xff', 'is a .parquet file'), ('x.csv', 'id,body\n1,a\n', 'only id, body'), ('x.txt.gz', gzip.compress(b'text'*99, mtime=0)[:-9], 'is damaged'), ('x.txt', 'déjà'.encode('latin-1'), 'not UTF-8')])
def test_files_that_are_something_else(tmp_path, name, text, what):
    with pytest.raises(UserError, match=what): list(file_documents(written(tmp_path/name, text)))

@pytest.mark.parametrize('kind', ['string_view', 'binary_view', 'large_string'])
def test_columns_of_any_kind_of_text(tmp_path, kind):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table(dict(text=pa.array([t.encode() if 'binary' in kind else t for t in TEXTS], getattr(pa, kind)()))), tmp_path/'x.parquet')
    assert list(file_documents(tmp_path/'x.parquet')) == TEXTS

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with a tokenizer whose texts end with <end>."
    monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    tok = train_tokenizer(['a small text of few words, ' * 20], 300).tok
    tok.add_special_tokens(['<end>', '<turn>', '<begin>'])
    tok.save(str(tmp_path/'tokenizer.json'))
    return tmp_path

def opened(folder, rows=400): return load_tokenizer(rows, str(folder/'tokenizer.json'))

@pytest.mark.parametrize('files, ends', [
    ({'config.json': dict(eos_token_id='?')}, ['<end>']), ({'config.json': dict(eos_token_id=['?', '?2'])}, ['<end>', '<turn>']),
    ({'config.json': dict(eos_token_id='?2'), 'generation_config.json': dict(eos_token_id=['?2', '?'])}, ['<turn>', '<end>']), ({'tokenizer_config.json': dict(eos_token=dict(content='<turn>'))}, ['<turn>']),
    ({'hf/config.json': dict(eos_token_id='?')}, ['<end>']), ({'special_tokens_map.json': dict(eos_token='<turn>'), 'config.json': dict(eos_token_id=None)}, ['<turn>']), ({}, ['<|endoftext|>'])])
def test_texts_end_where_the_model_says(folder, files, ends):
    ids = {'?': opened(folder).tok.token_to_id('<end>'), '?2': opened(folder).tok.token_to_id('<turn>')}
    (folder/'hf').mkdir()
    for name,x in files.items(): (folder/name).write_text(json.dumps({k: [ids[i] for i in v] if isinstance(v, list) else ids.get(v, v) if isinstance(v, str) else v for k,v in x.items()}))
    tok = opened(folder)
    assert [tok.tok.id_to_token(i) for i in tok.ends] == ends and tok.eot == tok.ends[0]

def test_texts_begin_where_the_model_says(folder):
    tok = opened(folder).tok
    tok.post_processor = processors.TemplateProcessing('<begin> $A <end>', special_tokens=[(t, tok.token_to_id(t)) for t in ('<begin>', '<end>')])
    tok.save(str(folder/'tokenizer.json'))
    (folder/'config.json').write_text(json.dumps(dict(eos_token_id=tok.token_to_id('<end>'))))
    mine = opened(folder)
    assert mine.begin.tolist() == [tok.token_to_id('<begin>')] and mine.encode('few').tolist() == [*mine.begin, *mine.encode_batch(['few'])[0]]
    written(folder/'t.txt', '\n\n'.join(f'text {i}' for i in range(60)))
    train = np.asarray(prepare(f'text:{folder}/t.txt', mine)[0]['train'])
    assert (train == mine.begin[0]).sum() == (train == mine.eot).sum() > 40 and train[0] == mine.begin[0]

@pytest.mark.parametrize('around, begin', [('<begin> $A <turn>', ['<begin>']), ('<turn> <begin> $A', ['<turn>', '<begin>']), ('$A <turn>', []), ('<begin> $A <end>', ['<begin>'])])
def test_what_stands_behind_a_text_is_no_beginning(folder, around, begin):
    tok = opened(folder).tok
    tok.post_processor = processors.TemplateProcessing(around, special_tokens=[(t, tok.token_to_id(t)) for t in ('<begin>', '<end>', '<turn>')])
    tok.save(str(folder/'tokenizer.json'))
    written(folder/'config.json', json.dumps(dict(eos_token_id=tok.token_to_id('<end>'))))   # texts end with another token than the template's
    assert [tok.id_to_token(i) for i in opened(folder).begin] == begin

def test_texts_are_neither_cut_nor_padded(folder):
    tok = opened(folder).tok
    tok.enable_truncation(4); tok.enable_padding(length=30, pad_id=0, pad_token='<end>')
    tok.save(str(folder/'tokenizer.json'))
    ids = opened(folder).encode_batch(['few words, a small text of few words', 'a'])
    assert len(ids[0]) > 4 and len(ids[1]) == 1

def test_a_packed_file_knows_where_texts_end(folder):
    "Of a model whose end of text has a name of its own: in the packed file's header, for there is no config.json beside it."
    from nativebit.config import get_config
    from nativebit.data.prompts import tokenizer_for
    from nativebit.data.tokenizers import tokenizer_note
    vocab = {t: i for i,t in enumerate(['a', '<finis>', '<over>'])}
    Tokenizer(models.WordLevel(vocab, unk_token='a')).save(str(folder/'tokenizer.json'))
    written(folder/'generation_config.json', json.dumps(dict(eos_token_id=[1, 2])))
    cfg = get_config('tiny', tokenizer=str(folder/'tokenizer.json'))
    note = tokenizer_note(cfg)
    (folder/'generation_config.json').unlink()
    tok = tokenizer_for(cfg, note)
    assert ([*tok.ends], tok.eot) == ([1, 2], 1)
    with pytest.raises(UserError, match='no token that ends a text'): tokenizer_for(cfg, {})

def test_a_token_without_a_row_matters_when_text_names_it(folder):
    tok = opened(folder, rows=opened(folder).size - 1)   # <begin> is the last one
    assert len(tok.encode('a small text')) > 0
    with pytest.raises(UserError, match="'<begin>', token number"): tok.encode('a <begin> text')

def test_no_tokenizer_is_taken_for_its_size():
    with pytest.raises(UserError, match='came without a tokenizer.json'): load_tokenizer(4096, NO_TOKENIZER)

def spelled_in_bytes(words, specials=('<s>', '[MARK]')):
    "A tokenizer as Llama 2's: ▁ for a space, bytes for what it has no letters for."
    vocab = {t: i for i,t in enumerate(['<unk>', *specials, *[f'<0x{b:02X}>' for b in range(256)], *dict.fromkeys(c for w in words for c in '▁' + w)])}
    tok = Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace('▁', 'first'), decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.add_special_tokens(list(specials))
    return BPETokenizer(tok, [1])

@pytest.mark.parametrize('text', ['ab ก็ดีครับผม ba', 'ab[MARK] ba a[MARK] b', 'a 日本語の文章です b', 'กกกกกกกกกก'])
@pytest.mark.parametrize('prompt', [1, 4, 9, 14, 25])
def test_pieces_are_the_whole(text, prompt):
    tok = spelled_in_bytes(['ab', 'ba'])
    ids = tok.encode(text).tolist()
    said = ''.join(text_pieces(tok, ids[prompt:], ids[:prompt]))
    assert tok.decode(ids).endswith(said) and '\ufffd' not in said[1:]
    if not tok.decode(ids[:prompt]).endswith('\ufffd'): assert tok.decode(ids[:prompt]) + said == tok.decode(ids)

@pytest.mark.parametrize('text', ['ก'*40, '😀'*30, 'é'*100, 'ab ' + '日本語の文章です。'*8 + ' ba', '日😀é'*20])
@pytest.mark.parametrize('begin', ['', 'ab ', 'ก'*4])
def test_long_rows_of_bytes(text, begin):
    "Any number of tokens that are bytes; of a long row each character as soon as it is there."
    tok = spelled_in_bytes(['ab', 'ba'])
    whole, before = tok.encode(begin + text).tolist(), tok.encode(begin).tolist()
    pieces = list(text_pieces(tok, whole[len(before):], before))
    assert tok.decode(before) + ''.join(pieces) == tok.decode(whole) and (len(pieces) > len(text)//3 or len(whole) < 80)

@pytest.mark.parametrize('row', [b'*\x00\x9d', b'a\xff', bytes(range(60))])
def test_a_row_that_is_no_text_is_spelled_as_transformers_does(row):
    tok = spelled_in_bytes(['ab', 'ba'])
    ids = [tok.tok.token_to_id(f'<0x{b:02X}>') for b in row] + tok.encode('ab').tolist()
    assert ''.join(text_pieces(tok, ids)) == tok.decode(ids)

def test_names_that_look_like_bytes():
    "Of a tokenizer that has such tokens and does not spell in bytes."
    vocab = {t: i for i,t in enumerate(['a', '<0x41>', 'b'])}
    tok = BPETokenizer(Tokenizer(models.WordLevel(vocab, unk_token='a')), [2])
    assert tok.byte_of(1) is None and ''.join(text_pieces(tok, [1, 2], [0])) == tok.decode([0, 1, 2])[1:]

@pytest.fixture
def llama(tmp_path):
    "A small Llama with tied embeddings, as transformers saves it."
    transformers = pytest.importorskip('transformers')
    c = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    m = transformers.LlamaForCausalLM(c)
    m.save_pretrained(tmp_path/'m')
    return tmp_path/'m', m

def weights(folder): from safetensors.numpy import load_file; return load_file(folder/'model.safetensors')

def test_a_tied_matrix_under_the_heads_name(llama, tmp_path):
    from safetensors.torch import save_file
    from nativebit.interop.convert import convert
    folder, m = llama
    state = {n: x.contiguous() for n,x in m.state_dict().items() if n != 'model.embed_tokens.weight'}
    save_file(state, folder/'model.safetensors', metadata=dict(format='pt'))
    convert(folder, tmp_path/'c')
    assert np.array_equal(weights(tmp_path/'c')['embed'], m.lm_head.weight.detach().numpy())

def test_null_is_absent(llama, tmp_path):
    from nativebit.interop.convert import convert
    c = json.loads((llama[0]/'config.json').read_text())
    (llama[0]/'config.json').write_text(json.dumps({**c, 'rope_scaling': None, 'rope_parameters': dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=None), 'partial_rotary_factor': None}))
    assert convert(llama[0], tmp_path/'c').model.rope_theta == 1e4

def test_every_template_travels_and_nothing_becomes_infinite(llama, tmp_path):
    import torch
    from nativebit.interop.export import export_safetensors
    from nativebit.formats.hf_folder import open_folder
    from nativebit.pipelines.quantize import quantize
    folder, m = llama
    with torch.no_grad(): m.model.norm.weight[3] = 7e4
    m.to(torch.bfloat16).save_pretrained(folder)
    (folder/'additional_chat_templates').mkdir()
    for n in ('chat_template.jinja', 'additional_chat_templates/tools.jinja'): (folder/n).write_text(n)
    quantize(folder, tmp_path/'q', 'rtn', 'int8')
    export_safetensors(open_folder(tmp_path/'q'), tmp_path/'plain', 'bfloat16')
    for out in ('q', 'plain'): assert {str(p.relative_to(tmp_path/out)) for p in (tmp_path/out).rglob('*.jinja')} == {'chat_template.jinja', 'additional_chat_templates/tools.jinja'}
    with pytest.raises(UserError, match='model.norm.weight holds 7'): export_safetensors(open_folder(tmp_path/'q'), tmp_path/'half', 'float16')
    assert not (tmp_path/'half').exists()

@pytest.mark.parametrize('name', ['model.embed_tokens.weight', 'model.norm.weight', 'model.layers.0.input_layernorm.weight', 'model.layers.0.self_attn.k_proj.weight'])
@pytest.mark.parametrize('value, dtype', [('nan', 'float32'), ('-inf', 'bfloat16')])
def test_what_is_no_number_is_named(llama, tmp_path, name, value, dtype):
    import nativebit, torch
    from nativebit.interop.convert import convert
    from nativebit.pipelines.quantize import quantize
    folder, m = llama
    with torch.no_grad(): m.to(getattr(torch, dtype)).get_parameter(name).view(-1)[-1] = float(value)
    m.save_pretrained(folder)
    for use in (lambda: convert(folder, tmp_path/'c'), lambda: quantize(folder, tmp_path/'q', 'rtn'), lambda: nativebit.load(folder).read('layers.0.attn.k.weight') if 'k_proj' in name else nativebit.load(folder).logits([[1]])):
        with pytest.raises(UserError, match=name + ' .* holds NaN or infinite'): use()
    assert not (tmp_path/'c').exists() and not (tmp_path/'q').exists()

@pytest.mark.parametrize('method', ['gptq', 'rtn'])
def test_another_network_is_another_job(llama, tmp_path, monkeypatch, method):
    "What GPTQ finds depends on config.json, and not on weights and text alone."
    from nativebit.pipelines import quantize as q
    monkeypatch.setattr(q, 'source_tokenizer', lambda source: None)
    monkeypatch.setattr(q, 'read_data', lambda data, tokenizer: ({}, 'a text'))
    monkeypatch.setattr(q, 'calibrated', lambda *a: None)
    def stopped(work, setup): begun.append(json.dumps(setup)); raise KeyboardInterrupt
    monkeypatch.setattr(q, 'begin_work', stopped)
    begun = []
    for theta in (1e4, 1e4, 5e5):
        config_changed(llama[0], rope_parameters=dict(rope_type='default', rope_theta=theta))
        with pytest.raises(KeyboardInterrupt): q.quantize(llama[0], tmp_path/'q', method, data='text:x')
    assert begun[0] == begun[1] and (begun[1] == begun[2]) == (method == 'rtn')

# ---- logs -----------------------------------------------------------------------------------------------------

RECORDS = '{"type": "header", "config": {}}\n{"step": 5, "loss": 2.0}\n'

@pytest.mark.parametrize('damage', [b'\0'*99 + b'\n', b'\xff\xfe\xfd\n', b'{"step": "seven"}\n{"step": null}\n', b'[1, 2]\nnull\n3\n', b'{"step": 6, "lo', b'['*50_000 + b'\n', b'\n \n\r\n'])
def test_damaged_lines_of_a_log(tmp_path, capsys, damage):
    from nativebit.utils.files import JSONLogger, NoRecords, read_jsonl, read_log
    path = written(tmp_path/'log.jsonl', b'\xef\xbb\xbf' + RECORDS.encode() + damage)
    assert [r.get('step') for r in read_log(path)] == [None, 5] and not capsys.readouterr().err
    read_log(path, say=True)
    assert ('damaged lines, which are left out: 3' in capsys.readouterr().err) == (damage.endswith(b'\n') and damage.strip() != b'')
    with pytest.raises(NoRecords): read_jsonl(path)   # results of others are not left out

def test_a_text_that_has_changed_is_said(tmp_path, capsys):
    from nativebit.train.run import say_other_text, text_note
    notes = [text_note(dict(train=np.arange(n) + k, test=np.zeros(0, np.uint16))) for n,k in ((9000, 0), (9000, 1), (9001, 0))]
    written(tmp_path/'log.jsonl', RECORDS + json.dumps(dict(type='resume', text=notes[0])) + '\n')
    for note,words in zip(notes, ('', 'CRC-32', '9,001 tokens')):
        say_other_text(tmp_path, note)
        assert words in (err := capsys.readouterr().err) and bool(err) == bool(words)
    say_other_text(tmp_path/'new', notes[0])   # no run yet

GROWN = """
import resource, sys
from nativebit.interop.hub import HubFolder
folder, peak = HubFolder(sys.argv[1]), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**10 if sys.platform != 'darwin' else 2**20)
folder.held; before = peak(); x = folder.read('x'); print(peak() - before, x.sum(dtype='float64'))
"""

def test_reading_takes_the_memory_of_what_is_read(tmp_path):
    import subprocess, sys
    from safetensors.numpy import save_file
    (tmp_path/'config.json').write_text('{}')
    save_file({'x': np.ones(2**25, np.float32)}, tmp_path/'model.safetensors')
    grown, total = map(float, subprocess.run([sys.executable, '-c', GROWN, tmp_path], capture_output=True, text=True, check=True).stdout.split())
    assert total == 2**25 and grown < 1.4*2**27/2**20   # 128 MiB

# ---- the rarer ones -----------------------------------------------------------------------------------------

def config_changed(folder, **change):
    path = folder/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

@pytest.mark.parametrize('change', [dict(is_causal=False), dict(use_bidirectional_attention=True), dict(is_encoder_decoder=True)])
def test_a_model_that_looks_ahead_is_refused(llama, change):
    from nativebit.interop.convert import open_model
    config_changed(llama[0], **{k: not x for k,x in change.items()})
    assert open_model(llama[0])
    config_changed(llama[0], **change)
    with pytest.raises(UserError, match=next(iter(change))): open_model(llama[0])

def added(llama, **tensors):
    "The model's folder with more tensors in it."
    from safetensors.numpy import save_file
    save_file(weights(llama[0]) | {n.replace('__', '.'): np.ones(s, np.float32) for n,s in tensors.items()}, llama[0]/'model.safetensors', metadata=dict(format='pt'))
    return llama[0]

def test_tensors_that_take_no_part(llama):
    from nativebit.interop.convert import open_model
    assert open_model(added(llama, v_head__summary__weight=(1, 32), v_head__summary__bias=(1,), model__layers__0__self_attn__k_scale=(1,), model__layers__0__self_attn__kv_scale=(1,),
                            model__layers__0__self_attn__v_proj__v_scale=(), model__rotary_emb__original_inv_freq=(8,)))

def test_tensors_that_may_take_part(llama):
    from nativebit.interop.convert import open_model
    with pytest.raises(UserError, match='1 differences.*unexpected model.layers.0.self_attn.k_norm.weight.*save_pretrained leave it out'): open_model(added(llama, model__layers__0__self_attn__k_norm__weight=(16,)))
    with pytest.raises(UserError, match='61 differences.*; and 53 more') as e: open_model(added(llama, **{f'model__layers__{i}__mlp__gate__weight': (2, 32) for i in range(60)}))
    assert len(str(e.value)) < 1000

@pytest.mark.parametrize('size, geometry, fits', [(1e9, 'published', True), (1e9, 'int8', False), (1e9, 'lut-b', True), (1e-9, 'int8', False), (1e-9, '4bit', False), (1e-9, 'lut-b', True), (0, 'int8', True), (1e4, 'int8', True), (1e-3, '2bit', True)])
@pytest.mark.parametrize('method', ['rtn', 'kmeans'])
def test_weights_out_of_range(llama, tmp_path, size, geometry, fits, method):
    from nativebit.formats.hf_folder import open_folder
    from nativebit.pipelines.quantize import quantize
    import torch
    with torch.no_grad(): w = llama[1].model.layers[0].mlp.up_proj.weight.mul_(size*50)
    llama[1].save_pretrained(llama[0])
    make = lambda: quantize(llama[0], tmp_path/'q', method, geometry)
    if not fits:
        with pytest.raises(UserError, match='model.layers.0.mlp.up_proj.weight .*out of the range of .* --geometry lut-b'): make()
        return
    make()
    q = open_folder(tmp_path/'q').tensor('model.layers.0.mlp.up_proj').dequantize()
    assert np.linalg.norm(q - w.detach().numpy().astype(float)) <= .6*np.linalg.norm(w.detach().numpy().astype(float))

@pytest.mark.parametrize('seed', [2**32, 2**63, 2**64, -1])
def test_a_seed_that_is_none(seed):
    from nativebit.data.prompts import check_options
    from nativebit.config import get_config
    with pytest.raises(UserError, match='seed'): check_options(1, 1., 0, 1., seed=seed)
    with pytest.raises(UserError, match='seed'): get_config('tiny', seed=seed)

@pytest.mark.parametrize('kind', ['folder', 'x.gguf'])
def test_training_begins_with_a_checkpoint(llama, tmp_path, kind):
    from nativebit.config import get_config
    from nativebit.models.checkpoint import load_checkpoint
    path = llama[0] if kind == 'folder' else written(tmp_path/kind, b'GGUF')
    for use in (load_checkpoint, get_config):
        with pytest.raises(UserError, match='nativebit convert .* --config FOLDER --init-from FOLDER'): use(str(path))

@pytest.mark.parametrize('blank', ['', ' ', '\t \t', '\u00a0', '\r'])
def test_blank_lines_may_hold_spaces(tmp_path, blank):
    paragraphs = [f'line {i}\nof a paragraph' for i in range(30)]
    assert list(file_documents(written(tmp_path/'t.txt', f'\n{blank}\n'.join(paragraphs)))) == paragraphs

def test_a_name_with_brackets(tmp_path):
    from nativebit.data.corpora import text_files
    for n in ('my[1].txt', 'my1.txt', 'a*b.txt', 'a_b.txt'): written(tmp_path/n, n)
    read = lambda p: [f.name for f in text_files(f'{tmp_path}/{p}')['train']]
    assert read('my[1].txt') == ['my[1].txt'] and read('my[12].txt') == ['my1.txt'] and read('a*b.txt') == ['a*b.txt'] and read('a?b.txt') == ['a*b.txt', 'a_b.txt']
