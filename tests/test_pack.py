"Packed files: any shape and geometry comes back bit for bit; damage of any kind is one sentence, never a traceback, never wrong weights."
import json, math, os, subprocess, sys
from pathlib import Path
import numpy as np, processes, pytest
from hypothesis import given, settings, strategies as st
from nativebit.config import CODEBOOK_DTYPES, GEOMETRIES, config_to_dict, get_config, override
from nativebit.quant.blocks import block_of, from_blocks
from nativebit.utils.cli import UserError
from nativebit.formats.size import CODES, DTYPES, ledger_text, param_shapes
from nativebit.formats.nbpack import estimate_ledger, file_ledger, rounded_rows, metadata_crc, pack_tensors, read_pack, write_pack
from nativebit.data.tokenizers import tokenizer_note
from nativebit.formats.bitpacking import entries_of, index_width, pack_matrix

STDLIB = Path(__file__).resolve().parent.parent/'data'/'stdlib'
some = lambda n: settings(max_examples=n, deadline=None, derandomize=True)

def random_matrix(rng, shape, K, block_shape, dtype):
    "Codes, scales and a matrix made of their entries: what training leaves behind, without training."
    (bo, bi), (o, i) = block_of(block_shape, shape), shape
    G = -(-o//bo) * -(-i//bi)
    codes = rng.uniform(-120, 120, (G, K)).astype(DTYPES[CODES[dtype]])
    codes = np.take_along_axis(codes, codes.astype(np.float32).argsort(1), 1)
    scale = {'int8': rng.uniform(1e-4, 1e-2, G).astype(np.float16), 'float8_e4m3': rng.uniform(1e-4, 1e-2, 1).astype(np.float32)}.get(dtype)
    blocks = np.take_along_axis(entries_of(codes, scale), rng.integers(0, K, (G, bo*bi)), 1)
    return from_blocks(blocks, shape, block_shape), codes, scale

def random_network(seed=0, **settings):
    "A tiny network: config, weights, stored codebooks."
    cfg, rng = get_config('tiny', **{**dict(vocab_size=40, d_model=12, n_heads=2, d_ff=20, block_shape=(2, 16), codebook_dtype='int8'), **settings}), np.random.default_rng(seed)
    weights, books, q = {}, {}, cfg.quant
    for n,s in param_shapes(cfg.model):
        if len(s) == 2 and n.startswith('layers'): weights[n], *books[n.removesuffix('.weight')] = random_matrix(rng, s, q.n_entries, q.block_shape, q.codebook_dtype)
        else: weights[n] = rng.standard_normal(s).astype(np.float32)
    return cfg, weights, books

@some(200)
@given(st.integers(1, 70), st.integers(1, 200), st.integers(2, 40) | st.just(256), st.sampled_from([(1, 128), (8, 64), (3, 5), (1, 1), (1, 32), (4, 8), (1, 0), (0, 0)]),
       st.sampled_from(CODEBOOK_DTYPES), st.integers(0, 2**32-1))
def test_a_matrix_comes_back(o, i, K, block_shape, dtype, seed):
    w, codes, scale = random_matrix(np.random.default_rng(seed), (o, i), K, block_shape, dtype)
    q = pack_matrix(w, codes, scale, block_shape)
    assert np.array_equal(q.dequantize(), w)
    assert q.words.nbytes == -(-len(codes)*math.prod(block_of(block_shape, (o, i)))//32)*4*index_width(K)

@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('embed', ['bfloat16', 'int8', 'float32'])
def test_a_network_comes_back(tmp_path, geometry, embed):
    cfg, weights, books = random_network(tied=False, n_kv_heads=1, **GEOMETRIES[geometry])
    tensors = pack_tensors(cfg, weights, books, embed)
    pack = read_pack(write_pack(tmp_path/'x', tensors, cfg))
    assert pack.config == cfg and pack.meta['embed'] == embed
    for n,x in pack.weights().items():
        if n.startswith('layers') and x.ndim == 2: assert np.array_equal(x, weights[n]), n
        elif embed == 'float32': assert np.array_equal(x, weights[n]), n
        elif embed == 'int8' and x.ndim == 2: assert np.array_equal(x, entries_of(*rounded_rows(weights[n]))), n
        else: assert abs(x - weights[n]).max() <= 2**-8*abs(weights[n]).max(), n
    rows = {r['part']: r['bytes'] for r in file_ledger(tmp_path/'x')}
    assert rows['whole file'] == (tmp_path/'x').stat().st_size == sum(rows[k] for k in ('indices', 'codebooks', 'scales', 'embeddings', 'norms', 'header'))

@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    cfg, weights, books = random_network()
    path = write_pack(tmp_path_factory.mktemp('pack')/'whole', pack_tensors(cfg, weights, books), cfg)
    return path, path.read_bytes(), {n: x.copy() for n,x in read_pack(path).tensors.items()}

def read_or_refuse(path, data):
    "The tensors of damaged data, None where it is refused as it should be."
    path.write_bytes(data)
    try: return read_pack(path).tensors
    except UserError as e: assert str(e).count('\n') == 0 and len(str(e)) < 600

@some(400)
@given(where=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(packed, where, in_header, bit):
    path, whole, tensors = packed
    end = 8 + int.from_bytes(whole[:8], 'little') if in_header else len(whole)
    data, at = bytearray(whole), int(where*end)
    data[at] ^= 1 << bit
    got = read_or_refuse(path.with_name('flipped'), data)
    if got is not None:   # only blanks between the header's parts may change unnoticed
        assert whole[at] == 32 and all(np.array_equal(got[n], x) for n,x in tensors.items())

@some(150)
@given(st.floats(0, 1, exclude_max=True), st.binary(max_size=40))
def test_a_cut_file_is_refused(packed, where, more):
    path, whole, _ = packed
    assert read_or_refuse(path.with_name('cut'), whole[:int(where*len(whole))]) is None
    if more: assert read_or_refuse(path.with_name('long'), whole + more) is None

@some(150)
@given(st.binary(max_size=200), st.integers(0, 2**64-1))
def test_anything_else_is_refused(packed, data, length):
    path = packed[0].with_name('other')
    assert read_or_refuse(path, data) is None
    assert read_or_refuse(path, length.to_bytes(8, 'little') + packed[1][8:]) is None or length == int.from_bytes(packed[1][:8], 'little')

plain = st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=5)
values = st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5)

def with_header(whole, change):
    "The file with another header whose checksum is right."
    n = int.from_bytes(whole[:8], 'little')
    header = json.loads(whole[8:8+n])
    change(header)
    header['__metadata__']['crc'] = metadata_crc(header['__metadata__'])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + whole[8+n:]

@some(300)
@given(st.sampled_from(['dtype', 'shape', 'data_offsets']), st.integers(0, 100), values)
def test_a_dishonest_entry_is_refused(packed, key, which, value):
    path, whole, tensors = packed
    def change(h): h[[*tensors][which % len(tensors)]][key] = value
    assert read_or_refuse(path.with_name('entry'), with_header(whole, change)) is None

@some(300)
@given(st.sampled_from(['config', 'checksums', 'tokenizer', 'version', 'embed', 'format']), values, st.booleans())
def test_a_dishonest_header_is_refused(packed, key, value, as_json):
    path, whole, tensors = packed
    got = read_or_refuse(path.with_name('meta'), with_header(whole, lambda h: h['__metadata__'].update({key: json.dumps(value) if as_json else value})))
    assert got is None or key in ('tokenizer', 'embed')

@some(300)
@given(st.sampled_from(['model', 'quant', 'train']), st.integers(0, 50), values)
def test_a_dishonest_config_is_refused(packed, part, which, value):
    path, whole, tensors = packed
    def change(h):
        c = json.loads(h['__metadata__']['config'])
        key = [*c[part]][which % len(c[part])]
        c[part][key] = value
        h['__metadata__']['config'] = json.dumps(c)
    got = read_or_refuse(path.with_name('config'), with_header(whole, change))
    assert got is None or all(np.array_equal(got[n], x) for n,x in tensors.items())   # a setting that changes no shape

def test_no_memory_is_taken_for_absurd_sizes(packed):
    path, whole, _ = packed
    said = config_to_dict(read_pack(path).config)
    sized = lambda **sizes: lambda h: h['__metadata__'].update(config=json.dumps({**said, 'model': {**said['model'], **sizes}}))
    for change in (sized(n_layers=10**15, d_ff=10**15), sized(n_layers=1000, d_ff=4_000_000), lambda h: h['embed'].update(shape=[2**47, 2**47], data_offsets=[0, 2**95])):
        path.with_name('huge').write_bytes(with_header(whole, change))
        code = ("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\nfrom nativebit.formats.nbpack import UserError, read_pack\n"
                f"try: read_pack({str(path.with_name('huge'))!r})\nexcept UserError as e: print('refused')")
        r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ, OPENBLAS_NUM_THREADS='1'))
        assert r.stdout == 'refused\n', r.stderr

@pytest.mark.parametrize('ends', ['x', ['x'], [-1], [1.5], [2**40], [[0]], {}])
def test_ends_that_are_no_tokens(tmp_path, ends):
    cfg, weights, books = random_network()
    for said in ([0, 3], ends): path = write_pack(tmp_path/'x.nbpack', pack_tensors(cfg, weights, books), cfg, tokenizer=dict(name='', ends=said)); said is ends or read_pack(path)
    with pytest.raises(UserError, match='the tokens that end a text are none'): read_pack(path)

def run(*args, cwd): return processes.run('-m', 'nativebit', 'pack', *args, cwd=cwd)

def test_command_line(tmp_path):
    r = run(STDLIB, '--out', 'x.nbpack.safetensors', '--posthoc', 'quantile', '--geometry', 'lut-b', '--embed', 'int8', cwd=tmp_path)
    assert r.returncode == 0 and 'whole file' in r.stdout, r.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['x.nbpack.safetensors']
    assert run('--inspect', 'x.nbpack.safetensors', cwd=tmp_path).stdout == r.stdout
    again = run(STDLIB, '--out', 'x.nbpack.safetensors', '--posthoc', 'quantile', cwd=tmp_path)
    assert again.returncode != 0 and 'add --force' in again.stderr
    cfg = read_pack(tmp_path/'x.nbpack.safetensors').config
    assert ledger_text(estimate_ledger(cfg, 'int8', tokenizer_note(cfg))) + '\n' == r.stdout   # known to the byte from shapes alone

def test_estimates_meet_their_aims():
    total = lambda geometry, embed='bfloat16': next(r['bytes'] for r in estimate_ledger(get_config('tpu-2b', geometry=geometry), embed) if r['part'] == 'whole file')/1e9
    assert total('int8') <= 1.20 and total('lut-b', 'int8') <= .95 and round(total('published', 'float32'), 2) == 1.80

@pytest.mark.parametrize('args, says', [
    ([STDLIB, '--out', 'x'], 'is a float checkpoint; train codebooks with'),
    (['nowhere', '--out', 'x'], 'no checkpoint at nowhere'),
    ([STDLIB], 'give one of: CHECKPOINT --out FILE'),
    ([STDLIB, '--out', 'x', '--embed', 'int4'], "embed='int4' is not valid"),
    ([STDLIB, '--out', 'x', '--posthoc', 'rtn'], "start='rtn' is not valid"),
    ([STDLIB, '--out', 'x', '--posthoc', 'kmeans', '--geometry', 'lutb'], "did you mean 'lut-b'?"),
    (['--inspect', 'nowhere'], 'cannot read nowhere'),
    (['--inspect', STDLIB/'model.safetensors'], 'is no packed network'),
    (['--inspect', STDLIB], 'cannot read'),
    (['--estimate', 'tpu-2B'], "did you mean 'tpu-2b'?"),
])
def test_refusals(tmp_path, args, says):
    r = run(*args, cwd=tmp_path)
    assert r.returncode != 0 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not [*tmp_path.iterdir()]

def test_neither_jax_nor_torch():
    code = "import sys; sys.modules['jax'] = sys.modules['torch'] = None\nfrom nativebit.formats.nbpack import read_pack; from nativebit.ptq.pack import main; main('tpu-2b', estimate=True)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and 'whole file' in r.stdout, r.stderr

ALONE = """
import sys
from configparser import ConfigParser
from nativebit.formats.hf_folder import open_folder
from nativebit.formats.nbpack import read_pack
print(sum(w.size for w in read_pack(sys.argv[1]).weights().values()))
ini = ConfigParser(delimiters=['=']); ini.read(sys.argv[2])
wanted = {r.split('>')[0].split('=')[0].strip() for r in ini['DEFAULT']['requirements'].split()} | {'nativebit', 'wadler_lindig'}   # the last is jaxtyping's
files = {n.split('.')[0]: getattr(m, '__file__', None) for n,m in sys.modules.items() if '.' not in n}
print(sorted(n for n,f in files.items() if f and 'site-packages' in f and n not in wanted and not n.startswith('_')))
"""

def test_reading_needs_no_jax_and_no_pytorch(tmp_path):
    cfg, weights, books = random_network()
    path = write_pack(tmp_path/'m.nbpack.safetensors', pack_tensors(cfg, weights, books), cfg)
    r = subprocess.run([sys.executable, '-c', ALONE, str(path), str(STDLIB.parent.parent/'settings.ini')], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    size, others = r.stdout.splitlines()
    assert int(size) == sum(w.size for w in weights.values()) and others == '[]'
