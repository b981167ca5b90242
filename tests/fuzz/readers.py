"""What is read: a small original of each of our formats and of those of others, written once, and what must come of it."""
import io, json, os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
import numpy as np
from nativebit.config import Config, ModelConfig, QuantConfig, TrainConfig, config_to_dict, override
from nativebit.data.loader import prepare, sealed, so_far, unsealed, write_shards
from nativebit.data.prompts import tokenizer_for
from nativebit.data.tokenizers import ByteTokenizer, digest, pack_notes
from nativebit.formats.hf_folder import open_folder, packed_tensors, save_folder, save_tensors, stored_rows
from nativebit.formats.nbpack import metadata_crc, pack_tensors, read_pack, write_pack
from nativebit.formats.size import matrix_stored, param_shapes
from nativebit.interop.convert import open_model
from nativebit.interop.export import pack_of
from nativebit.interop.families import hf_names
from nativebit.interop.ours import hub_files
from nativebit.models import checkpoint as checkpoints
from nativebit.formats.kinds import folder_kind
from nativebit.pipelines.chat import chat_template, renderer, special_tokens
from nativebit.quant.blocks import to_blocks, from_blocks
from nativebit.pipelines.self_data import chat_parts
from nativebit.utils.cli import UserError
from nativebit.utils.pytree import leaf_names
from nativebit.utils.safetensors import save_arrays

QUANT = QuantConfig(n_entries=8, block_shape=(1, 16), codebook_dtype='int8')
MODEL = ModelConfig(vocab_size=40, n_layers=1, d_model=16, n_heads=2, d_ff=32, context_len=32, n_kv_heads=1)
HF = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
          rms_norm_eps=1e-5, rope_theta=10000., hidden_act='silu', tie_word_embeddings=True)

# ---- a small network ----------------------------------------------------------------------------------------

def weights(seed=0):
    "{name: float32 array} of a float network."
    r = np.random.default_rng(seed)
    return {n: np.ones(s, np.float32) if len(s) == 1 else (.1*r.standard_normal(s)).astype(np.float32) for n,s in param_shapes(MODEL)}

def evenly(w):
    "A matrix on an even grid in each block: (Q(w), codes, scales)."
    b = to_blocks(w, QUANT.block_shape); scale = (abs(b).max(1)/127).astype(np.float16)
    codes = np.tile(np.linspace(-127, 127, 8).astype(np.int8), (len(b), 1)); cb = codes.astype(np.float32)*scale.astype(np.float32)[:, None]
    q = np.take_along_axis(cb, abs(b[:, :, None] - cb[:, None]).argmin(2), 1)
    return from_blocks(q, w.shape, QUANT.block_shape), codes, scale

def packed():
    "(weights as they are evaluated, {matrix: (codes, scale)})."
    w, books = weights(), {}
    for n in [n for n in w if w[n].ndim == 2 and n != 'embed']: w[n], *books[n.removesuffix('.weight')] = evenly(w[n])
    return w, books

# ---- originals: {file: bytes} -------------------------------------------------------------------------------

def packed_file(d):
    write_pack(d/'x.nbpack', pack_tensors(Config('x', MODEL, QUANT), *packed()), Config('x', MODEL, QUANT), tokenizer=dict(name=''))

def folder_parts():
    w, books = packed()
    for n,theirs in hf_names(MODEL).items():
        if (P := n.removesuffix('.weight')) in books: yield from packed_tensors(theirs.removesuffix('.weight'), w[n], *books[P], QUANT.block_shape)
        else: yield theirs, w[n].astype(np.float16)

def packed_folder(d, max_shard=2**30): save_folder(d/'q', HF, QUANT, folder_parts(), max_shard=max_shard)

def row_parts():
    for n,x in folder_parts(): yield from stored_rows(n.removesuffix('.weight'), x) if n.endswith('embed_tokens.weight') else [(n, x)]

def row_folder(d): save_folder(d/'q', HF, QUANT, row_parts(), embed='int8')

def tokenizer_text():
    "A tokenizer.json of 40 tokens with all its parts."
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    names = ['<unk>', '<s>', '</s>', '▁', *'abcdefghijklmnopqrstuvwxyz', 'ab', '▁ab', '<0x41>']
    t = Tokenizer(models.BPE({n: i for i,n in enumerate(names)}, [('a', 'b'), ('▁', 'ab')], unk_token='<unk>', byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r'\d+|.'), 'isolated'), pre_tokenizers.Metaspace('▁', 'never')])
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    t.add_special_tokens([AddedToken(n, special=True) for n in names[:3]])
    t.post_processor = processors.TemplateProcessing('<s> $A', '<s> $A $B', [('<s>', 1)])
    return t.to_str()

TEMPLATE = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] | trim }}]{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"

def small(d):
    "The small files of a model, as they are before a packed file takes them."
    (d/'s').mkdir(); own = dict(bos_token='<s>', eos_token=dict(content='</s>', special=True), chat_template=[dict(name='default', template=TEMPLATE)], clean_up_tokenization_spaces=False)
    for n,x in {'config.json': HF | dict(eos_token_id=2), 'generation_config.json': dict(eos_token_id=[2], temperature=.7), 'tokenizer_config.json': own, 'special_tokens_map.json': dict(bos_token='<s>')}.items(): (d/'s'/n).write_text(json.dumps(x))
    (d/'s'/'tokenizer.json').write_text(tokenizer_text()); (d/'s'/'LICENSE').write_text('Any use.')

def carrying(d, files:dict, embed='bfloat16', tokenizer=dict(name='', ends=[2])):
    "A packed file with small files in it."
    cfg = Config('x', MODEL, QUANT, TrainConfig(tokenizer='tokenizer.json' if 'tokenizer.json' in files else ''))
    return write_pack(d/'again.nbpack', pack_tensors(cfg, *packed(), embed=embed), cfg, tokenizer=tokenizer, files=files)

def packed_with_files(d): small(d); carrying(d, {p.name: p.read_bytes() for p in (d/'s').iterdir()}, 'int8'); [p.unlink() for p in (d/'s').iterdir()]; (d/'s').rmdir()

TEXTS = [('train', 'a b c ' * 40), ('train', 'some more text '*20), ('valid', 'x'*70), ('test', 'y'*70)]
ABOUT = dict(dataset='self', source=['self', {'x': '1'}, 100, 0], tokenizer=digest('bytes'))
def shards(d): (d/'d').mkdir(); write_shards(TEXTS, ByteTokenizer(), d/'d', ABOUT, 250)

def half_shards(d):
    "Shards that are being written."
    shards(d); meta = unsealed(d/'d'/'meta.json'); (d/'d'/'meta.json').unlink(); (d/'d'/'progress.json').write_bytes(sealed(meta))

def checkpoint(d, quantized=True):
    w, cfg = weights(), Config('x', MODEL, QuantConfig(8, (1, 16), 'float32', nativebit=quantized), TrainConfig(compute_dtype='float32'))
    books = {n.replace('.weight', '.codebook'): np.sort(np.random.default_rng(1).standard_normal(matrix_stored(x.shape, cfg.quant)['codebook'].shape).astype(np.float32), 1) for n,x in w.items() if x.ndim == 2 and n != 'embed'}
    checkpoints.save_checkpoint(d/'c', cfg, w, books if quantized else None)

def npz(d): np.savez(d/'x.npz', **{n: x.astype(np.float16) for n,x in weights().items()})

def hub(d, max_shard=2**30):
    (d/'m').mkdir(); save_tensors(d/'m', ((theirs, weights()[n].astype(np.float16)) for n,theirs in hf_names(MODEL).items()), max_shard)
    (d/'m'/'config.json').write_text(json.dumps(HF))

def gguf(d):
    import gguf as g
    from nativebit.interop.families import their_name
    w = g.GGUFWriter(d/'x.gguf', 'llama')
    w.add_context_length(32); w.add_embedding_length(64); w.add_feed_forward_length(64); w.add_block_count(1); w.add_head_count(2); w.add_head_count_kv(1); w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(1e4)
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', 'a', 'b', 'ab', '▁a', '▁ab']
    w.add_tokenizer_model('llama'); w.add_tokenizer_pre('default'); w.add_token_list(tokens); w.add_token_types([2, 3, 3] + [6]*256 + [1]*6); w.add_token_scores([0.]*259 + [-float(i) for i in range(6)])
    m, r = ModelConfig(vocab_size=len(tokens), n_layers=1, d_model=64, n_heads=2, d_ff=64, context_len=32, n_kv_heads=1), np.random.default_rng(0)
    for n,s in param_shapes(m):
        x = r.standard_normal(s).astype(np.float32)
        if n.endswith('up.weight'): w.add_tensor(their_name(n, True), g.quants.quantize(x, g.GGMLQuantizationType.Q8_0), raw_dtype=g.GGMLQuantizationType.Q8_0)
        else: w.add_tensor(their_name(n, True), x.astype(np.float16) if x.ndim == 2 else x)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

# ---- readers: what a path is read as, {name: array} ---------------------------------------------------------

def read_folder(p):
    assert folder_kind(p)
    f = open_folder(p)
    return {**{P: f.tensor(P).dequantize() for P in f.linears}, **{n: x for n,x in f.tensors.items() if n.rpartition('.')[0] not in f.linears}}

def read_checkpoint(p): return {n: np.asarray(x) for n,x in leaf_names(checkpoints.load_network(p)[1]).items()}

def read_source(p):
    s = open_model(p); s.files
    return {n: s.read(n) for n in s.names}

def read_rows(p):
    f = open_folder(p); cfg, tensors = pack_of(f, exact=True)
    return {n: np.asarray(x) for n,x in {**tensors, **read_folder(p)}.items()}

def used_files(pack):
    "What comes of the files in a packed file: tokens, a chat's text, and what export writes beside the weights."
    cfg, files = pack.config, pack.files
    tok = tokenizer_for(cfg, pack.meta['tokenizer'])
    ids = tok.encode('ab cab.')
    text = tok.decode(ids) + ' '.join(map(str, tok.ends))
    if template := chat_template(files): text += renderer(template, special_tokens(files))([dict(role='user', content='ab'), dict(role='assistant', content='c'), dict(role='user', content='d')])
    return {'ids': np.array(ids), 'text': np.frombuffer(text.encode(errors='replace'), np.uint8), **{n: np.frombuffer(x, np.uint8) for n,x in {**files, **hub_files(cfg)}.items()}}

def read_small(p):
    "Small files, put into a packed file as they are beside a model, and read from it."
    for left in p.parent.glob('.*'): left.unlink()
    notes = pack_notes(Config('x', MODEL, QUANT, TrainConfig(tokenizer=str(p/'tokenizer.json'))))
    chat_parts(notes['files'])
    return used_files(read_pack(carrying(p.parent, notes['files'], tokenizer=notes['tokenizer'])))

def read_carrying(p): x = read_pack(p); return {**x.weights(), **used_files(x)}

def read_again(p):
    "A packed file whose header's checksum is made to fit, whatever else is wrong with it."
    b = p.read_bytes(); n = int.from_bytes(b[:8], 'little')
    try: head = json.loads(b[8:8+n]); meta = head['__metadata__']; meta['crc'] = metadata_crc(meta)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError): pass
    else: text = json.dumps(head).encode(); p.write_bytes(len(text).to_bytes(8, 'little') + text + b[8+n:])
    return read_carrying(p)

def read_tokens(p): tokens, meta = prepare(f'shards:{p}', ByteTokenizer()); return {**{s: np.asarray(x[:]) for s,x in tokens.items()}, 'meta': np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8)}

def read_half(p):
    meta = so_far(p, ABOUT)
    if not meta['sums']: raise UserError('begun anew')
    return {'meta': np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8)}

def read_unsealed(p):
    "Shards of an older nativebit."
    f = p/'meta.json'
    with suppress(OSError, ValueError, AttributeError, RecursionError): x = json.loads(f.read_text()); x.pop('sum', 0); x.pop('sums', 0); f.write_text(json.dumps(x))
    return read_tokens(p)

class Reader(NamedTuple):
    write:object     # of a folder: makes the original in it
    where:str        # what is read, in that folder
    read:object      # of a path: {name: array}
    ours:bool        # with checksums: what loads must be the original
    targets:dict|None=None  # {file: how often it is damaged}

READERS = {
    'packed file': Reader(packed_file, 'x.nbpack', lambda p: read_pack(p).weights(), True),
    'packed folder': Reader(packed_folder, 'q', read_folder, True, {'q/model.safetensors': 3, 'q/config.json': 1}),
    'packed folder, sharded': Reader(lambda d: packed_folder(d, 1500), 'q', read_folder, True),
    'checkpoint': Reader(checkpoint, 'c', read_checkpoint, True, {'c/model.safetensors': 1}),
    'meta.json': Reader(checkpoint, 'c', read_checkpoint, True, {'c/meta.json': 1}),
    'npz': Reader(npz, 'x.npz', lambda p: checkpoints.read_tensors(p), False),
    'hub folder': Reader(hub, 'm', read_source, False),
    'hub folder, sharded': Reader(lambda d: hub(d, 1500), 'm', read_source, False, {'m/config.json': 1, 'm/model.safetensors.index.json': 3, 'm/model-00001-of-00006.safetensors': 1}),
    'gguf': Reader(gguf, 'x.gguf', read_source, False),
    'packed file with files': Reader(packed_with_files, 'again.nbpack', read_carrying, True),
    'packed file, sealed again': Reader(packed_with_files, 'again.nbpack', read_again, False),
    'files in a packed file': Reader(small, 's', read_small, False, {'s/tokenizer.json': 4, 's/tokenizer_config.json': 2, 's/config.json': 1, 's/generation_config.json': 1, 's/special_tokens_map.json': 1}),
    'packed folder, int8 rows': Reader(row_folder, 'q', read_rows, True, {'q/model.safetensors': 3, 'q/config.json': 1}),
    'shards, half written': Reader(half_shards, 'd', read_half, True, {'d/progress.json': 1}),
    'shards without checksums': Reader(shards, 'd', read_unsealed, False, {'d/meta.json': 3, 'd/train-00000.npy': 3}),
    'shards': Reader(shards, 'd', read_tokens, True, {'d/meta.json': 3, 'd/train-00000.npy': 2, 'd/train-00001.npy': 1, 'd/valid-00000.npy': 1}),
}
