"A file of arrays holds their numbers however they lie in memory, whoever writes it; and a file that holds something else never takes the place of a good one."
import re
from pathlib import Path
import jax, jax.numpy as jnp, ml_dtypes, numpy as np, pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from safetensors import deserialize
from safetensors.numpy import load_file, save_file
import nativebit, nativebit.utils.safetensors
from nativebit.models.checkpoint import load_checkpoint, load_network, save_checkpoint
from nativebit.config import Config, ModelConfig, QuantConfig, TrainConfig
from nativebit.interop.convert import write_arrays
from nativebit.utils.safetensors import TYPE_CODES, read_arrays, save_arrays
from nativebit.utils.cli import UserError
from nativebit.utils.files import atomic_path
from nativebit.utils.pytree import leaf_names, with_leaves
from nativebit.interop.hub import Held
from nativebit.models.transformer import init_model
from nativebit.ptq.pack import pack_checkpoint
from nativebit.formats.nbpack import read_pack, write_pack
from nativebit.formats.hf_folder import open_folder, packed_tensors, save_folder
from nativebit.pipelines.quantize import store_layer, stored_layer

CFG = Config('t', ModelConfig(vocab_size=256, n_layers=1, d_model=32, n_heads=2, d_ff=64, context_len=16), QuantConfig(nativebit=False), TrainConfig())

def by_columns(x): return np.asfortranarray(np.asarray(x))
def jax_by_columns(x): return jax.device_put(x, Format(Layout(major_to_minor=tuple(range(x.ndim))[::-1]), SingleDeviceSharding(jax.devices()[0])))
def inside(x): return np.pad(np.asarray(x), [(1, 1)]*x.ndim)[(slice(1, -1),)*x.ndim]
def backwards(x): return np.asarray(x)[(slice(None, None, -1),)*x.ndim].copy()[(slice(None, None, -1),)*x.ndim]
LIES = dict(by_columns=by_columns, jax_by_columns=jax_by_columns, inside=inside, backwards=backwards)

def same(a, b): return (np.asarray(a).dtype, a.shape) == (np.asarray(b).dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes()
def numbers(dtype, shape=(6, 10)): return np.random.default_rng(0).integers(0, 2 if dtype == 'bool' else 9, shape).astype(getattr(ml_dtypes, dtype, dtype))

@pytest.mark.parametrize('lies', LIES)
@pytest.mark.parametrize('dtype', TYPE_CODES)
def test_numbers_stay_however_they_lie(tmp_path, lies, dtype):
    x = numbers(dtype)
    if lies == 'jax_by_columns' and jnp.asarray(x).dtype != x.dtype: pytest.skip('JAX has no such type by default')
    there = LIES[lies](x)
    assert same(there, x) and not (np.asarray(there).flags.c_contiguous and lies != 'jax_by_columns')
    save_arrays(tmp_path/'a', dict(x=there))
    [(_, held)] = deserialize((tmp_path/'a').read_bytes())   # `load_file` knows no float8
    assert (held['dtype'], held['shape'], bytes(held['data'])) == (TYPE_CODES[dtype], [6, 10], x.tobytes())

@pytest.mark.parametrize('x', [np.float32(3), np.array(3, ml_dtypes.bfloat16), jnp.float32(3), np.zeros((0, 3), np.float32).T, np.zeros((3, 0, 2), np.int8), jnp.zeros((0, 4), jnp.bfloat16),
                               np.broadcast_to(np.float32(2), (4, 5)), np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 2, 0), np.arange(6, dtype='>f4').reshape(2, 3).T,
                               np.arange(8, dtype=np.float32)[::2], np.ones((1, 5), np.float32).T], ids=str)
def test_odd_shapes(tmp_path, x):
    save_arrays(tmp_path/'a', dict(x=x))
    back = load_file(tmp_path/'a')['x']
    assert back.shape == x.shape and np.array_equal(back, np.asarray(x))

def test_without_arrays_and_without_metadata(tmp_path):
    save_arrays(tmp_path/'a', {}); save_file({}, tmp_path/'b')
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes() and load_file(tmp_path/'a') == {}

# ---- every writer -------------------------------------------------------------------------------------------

def test_there_is_one_writer():
    for f in Path(nativebit.__file__).parent.rglob('*.py'):
        assert not re.search(r'\bsave_file\b|\bserialize(_file)?\b|safetensors\.(numpy|torch|flax) import save', f.read_text()), f"{f.name} writes safetensors itself; use utils.safetensors.save_arrays"

@pytest.mark.parametrize('lies', LIES)
def test_a_checkpoint(tmp_path, lies):
    params = init_model(CFG, seed=0)[0]
    save_checkpoint(tmp_path/'c', CFG, with_leaves(params, {n: LIES[lies](x) for n,x in leaf_names(params).items()}))
    back = leaf_names(load_network(tmp_path/'c')[1])
    assert all(same(back[n], x) for n,x in leaf_names(params).items())

def test_codebooks_of_a_checkpoint(tmp_path):
    cfg = Config('t', CFG.model, QuantConfig(), TrainConfig())
    params, state = init_model(cfg, seed=0)
    save_checkpoint(tmp_path/'c', cfg, params, with_leaves(state, {n: by_columns(x) for n,x in leaf_names(state).items()}))
    there = load_checkpoint(tmp_path/'c')[0]
    books = {n: x for n,x in leaf_names(state).items() if n.endswith('.codebook')}
    assert books and all(same(there[n], x) for n,x in books.items())

def test_a_pack(tmp_path):
    pack_checkpoint(save_checkpoint(tmp_path/'c', CFG, init_model(CFG, seed=0)[0]), tmp_path/'a', posthoc='quantile')
    pack = read_pack(tmp_path/'a')
    write_pack(tmp_path/'b', {n: by_columns(x) for n,x in pack.tensors.items()}, pack.config, tokenizer=dict(name='bytes'))
    assert load_file(tmp_path/'a').keys() == load_file(tmp_path/'b').keys()
    assert all(same(load_file(tmp_path/'b')[n], x) for n,x in load_file(tmp_path/'a').items())

def test_a_packed_folder(tmp_path):
    quant, codes = QuantConfig(block_shape=(1, 8), codebook_dtype='float32'), np.sort(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32), 1)
    w = np.take_along_axis(codes, np.random.default_rng(1).integers(0, 8, (40, 8)), 1).reshape(10, 32)
    tensors = [*packed_tensors('model.up', w, codes, None, (1, 8)), ('model.norm.weight', numbers('bfloat16'))]
    for shard in (10**9, 500):
        save_folder(tmp_path/f'f{shard}', dict(model_type='llama'), quant, ((n, by_columns(x)) for n,x in tensors), max_shard=shard)
        there = open_folder(tmp_path/f'f{shard}').tensors
        assert there.keys() == dict(tensors).keys() and all(same(there[n], x) for n,x in tensors)

def test_a_layer_of_unfinished_work(tmp_path):
    packed = dict(a=by_columns(numbers('uint32')), b=jax_by_columns(jnp.asarray(numbers('bfloat16'))))
    store_layer(tmp_path, 0, packed)
    assert all(same(stored_layer(tmp_path, 0)[n], x) for n,x in packed.items())

def test_a_conversion(tmp_path):
    held, x = {n: Held('BF16', (6, 10), None) for n in 'ab'}, numbers('bfloat16')
    write_arrays(tmp_path/'a', held, lambda n: by_columns(x))
    assert same(load_file(tmp_path/'a')['b'], x)
    with pytest.raises(ValueError, match='bytes came for'): write_arrays(tmp_path/'a', held, lambda n: x[:3])

# ---- what is read back --------------------------------------------------------------------------------------

def damaging(change):
    "A `check_arrays` that finds a file changed."
    check = nativebit.utils.safetensors.check_arrays
    def changed(path, head, sums):
        data = bytearray(Path(path).read_bytes())
        Path(path).write_bytes(change(data, len(head)))
        check(path, head, sums)
    return changed

def flip(at): return lambda data, n: data[:n+at] + bytes([data[n+at] ^ 1]) + data[n+at+1:]
DAMAGES = dict(first_byte=flip(0), last_byte=lambda data, n: data[:-1] + bytes([data[-1] ^ 128]), header=flip(-20), length=lambda data, n: b'\xff' + data[1:],
               cut=lambda data, n: data[:-3], cut_in_the_header=lambda data, n: data[:n-5], empty=lambda data, n: b'')

@pytest.mark.parametrize('damage', DAMAGES)
def test_a_file_that_holds_something_else_is_refused(tmp_path, monkeypatch, damage):
    x = numbers('float32', (300, 1000))   # more than one part is read of it
    with atomic_path(tmp_path/'a') as tmp: save_arrays(tmp, dict(x=x))
    before = (tmp_path/'a').read_bytes()
    monkeypatch.setattr('nativebit.utils.safetensors.check_arrays', damaging(DAMAGES[damage]))
    with pytest.raises(UserError, match='cannot write .*/a: the file holds other bytes of (x|y|its header) than were written'):
        with atomic_path(tmp_path/'a') as tmp: save_arrays(tmp, dict(x=x, y=x[:3]))
    assert (tmp_path/'a').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a']

def test_a_checkpoint_that_holds_something_else_leaves_the_old_one(tmp_path, monkeypatch):
    params = init_model(CFG, seed=0)[0]
    save_checkpoint(tmp_path/'c', CFG, params, step=1)
    before = {p.name: p.read_bytes() for p in (tmp_path/'c').iterdir()}
    monkeypatch.setattr('nativebit.utils.safetensors.check_arrays', damaging(DAMAGES['last_byte']))
    with pytest.raises(UserError, match='than were written'): save_checkpoint(tmp_path/'c', CFG, params, step=2)
    assert {p.name: p.read_bytes() for p in (tmp_path/'c').iterdir()} == before

def test_an_empty_array_of_endless_sides(tmp_path):
    head = b'{"x":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    (tmp_path/'x.safetensors').write_bytes(len(head).to_bytes(8, 'little') + head)
    with pytest.raises(UserError, match='the shape of x is too large'): read_arrays(tmp_path/'x.safetensors')
    save_arrays(tmp_path/'y.safetensors', {'x': np.empty((0, 300), np.uint8)})
    assert read_arrays(tmp_path/'y.safetensors')['x'].shape == (0, 300)
