"Packed model folders: transformers loads them, computes what the looked-up weights compute, writes them again byte for byte, and refuses what is damaged, incomplete or unknown."
import copy, json, os, pickle, shutil, subprocess, sys
from pathlib import Path
import ml_dtypes, numpy as np, pytest
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from nativebit.config import GEOMETRIES, QuantConfig
from nativebit.utils.cli import UserError
from nativebit.interop.export import export_lut_b, export_nbpack, export_safetensors
from nativebit.formats.size import CODES, DTYPES
from nativebit.formats.hf_folder import GUARD, open_folder, packed_tensors, save_folder, save_shard, weight_files
from nativebit.formats.bitpacking import entries_of
from nativebit.quant.blocks import from_blocks, to_blocks
from nativebit.utils.cli import say_once
import nativebit.interop.transformers as hf
from nativebit.interop import hf_generate
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)   # the arrays here are small
SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=.1, eos_token_id=None, bos_token_id=None)
FAMILIES = dict(llama=LlamaConfig(**SHAPE), tied=LlamaConfig(**SHAPE, tie_word_embeddings=True), biased=LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
                mistral=MistralConfig(**SHAPE, sliding_window=None), qwen2=Qwen2Config(**SHAPE), qwen3=Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True))
TOKENS = torch.arange(20).view(2, 10)*3

def quantiles(w, quant):
    "A matrix as the nearest quantiles of its blocks: weights, codes, scales."
    b = to_blocks(w, quant.block_shape)
    cb, dtype = np.quantile(b, np.linspace(.02, .98, quant.n_entries), 1).T, quant.codebook_dtype
    scale = {'int8': (abs(cb).max(1)/127).astype(np.float16), 'float8_e4m3': (abs(cb).max().reshape(1)/448).astype(np.float32)}.get(dtype)
    codes = cb if scale is None else cb/scale.astype(np.float32)[:, None]
    codes = (np.rint(codes) if dtype == 'int8' else codes).astype(DTYPES[CODES[dtype]])
    e = entries_of(codes, scale)
    idx = (b[:, :, None] > ((e[:, 1:] + e[:, :-1])/2)[:, None]).sum(2)
    return from_blocks(np.take_along_axis(e, idx, 1), w.shape, quant.block_shape), codes, scale

def float_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for n,x in model.named_parameters():
        if n.endswith('bias') or 'norm' in n: x.data += .1*torch.randn_like(x)
    return model.eval()

def pack(model, out, quant, **kw):
    def tensors():
        for n,x in model.state_dict().items():
            x = x.float().numpy()
            if n.endswith('_proj.weight'): yield from packed_tensors(n.removesuffix('.weight'), *quantiles(x, quant), quant.block_shape)
            elif not (n == 'lm_head.weight' and model.config.tie_word_embeddings): yield n, x.astype(ml_dtypes.bfloat16)
    return save_folder(out, json.loads(model.config.to_json_string(use_diff=False)), quant, tensors(), **kw)

def looked_up(model, path):
    "The float model with the folder's weights."
    f = open_folder(path)
    state = {n: torch.from_numpy(x.astype(np.float32)) for n,x in f.tensors.items() if n.rpartition('.')[0] not in f.linears or n.endswith('.bias')}
    model.load_state_dict(state | {f'{P}.weight': torch.from_numpy(f.tensor(P).dequantize()) for P in f.linears}, strict=False)
    return model

@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "Make a family's folder in a geometry, once."
    root, made = tmp_path_factory.mktemp('hf'), {}
    def make(family='llama', geometry='int8'):
        if (key := (family, geometry)) not in made: made[key] = pack(float_model(family), root/f'{family}-{geometry}', QuantConfig(**GEOMETRIES[geometry]))
        return made[key]
    return make

def load(path, **kw): return AutoModelForCausalLM.from_pretrained(path, **{'dtype': torch.float32, **kw})

@torch.no_grad()
def logits(model, tokens=TOKENS): return model(tokens).logits

@pytest.mark.parametrize('family, geometry', [*((f, 'int8') for f in FAMILIES), ('biased', 'lut-b'), ('qwen3', 'lut-b'), ('llama', 'published'),
                                              ('qwen2', '2bit'), ('llama', '4bit'), ('llama', 'int8-row')])
def test_the_packed_model_is_the_looked_up_model(packed, family, geometry):
    path = packed(family, geometry)
    model, dense = load(path), looked_up(float_model(family), path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, hf.NativeBitHfLinear) and type(model.lm_head) is torch.nn.Linear
    assert torch.equal(logits(model), logits(dense))
    kw = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(TOKENS, **kw), dense.generate(TOKENS, **kw))

def files_of(path): return {n: x.tobytes() for n,x in open_folder(path).tensors.items()}

@pytest.mark.parametrize('family, geometry', [('qwen2', '2bit'), ('tied', 'int8'), ('biased', 'lut-b')])
def test_saving_writes_the_same_tensors(packed, tmp_path, family, geometry):
    path = packed(family, geometry)
    load(path, dtype='auto').save_pretrained(tmp_path/'a', max_shard_size='20KB')
    assert files_of(tmp_path/'a') == files_of(path) and len(weight_files(tmp_path/'a')) > 1
    assert open_folder(tmp_path/'a').quant == open_folder(path).quant
    assert torch.equal(logits(load(tmp_path/'a')), logits(load(path)))

def test_types_and_devices(packed):
    path = packed('qwen2', 'lut-b')
    for dtype in (torch.bfloat16, torch.float16):
        model = load(path, dtype=dtype)
        assert model.dtype == logits(model).dtype == model.model.layers[0].self_attn.q_proj.bias.dtype == dtype
    want = logits(load(path))
    for device_map in ('auto', 'cpu', {'': 'cpu'}): assert torch.equal(logits(load(path, device_map=device_map)), want)
    moved = load(path).to(torch.float16)                       # codebooks and scales keep their types…
    assert {n: x.numpy().tobytes() if x.dtype != torch.float8_e4m3fn else x.view(torch.uint8).numpy().tobytes() for n,x in moved.state_dict().items() if n.endswith(('codebook', 'scale'))} \
        == {n: x for n,x in files_of(path).items() if n.endswith(('codebook', 'scale'))}
    up = lambda m: m.model.layers[0].mlp.up_proj.dense(torch.float32)
    assert torch.equal(up(moved.to(torch.float32)), up(load(path)))   # …so nothing was rounded

def test_compiles_to_one_graph(packed):
    torch._dynamo.reset()
    model = load(packed())
    with torch.no_grad(): got = torch.compile(model, fullgraph=True, backend='aot_eager')(TOKENS, use_cache=False).logits
    assert torch.allclose(got, logits(load(packed())), atol=1e-5)

@pytest.mark.parametrize('family, geometry', [('biased', 'lut-b'), ('qwen2', '2bit'), ('llama', 'published')])
def test_laid_out_for_kernels(packed, tmp_path, monkeypatch, family, geometry):
    path = packed(family, geometry)
    want, dense = files_of(path), looked_up(float_model(family), path)
    monkeypatch.setattr(hf, 'on_gpu', lambda x: True)              # lut_linear multiplies by its reference here
    model = load(path)
    assert all(m.form is not None and m.dense_weight is None for m in model.modules() if isinstance(m, hf.NativeBitHfLinear))
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    model.to(torch.float16).to(torch.float32)
    packed_only = lambda f: {n: x for n,x in f.items() if n.rpartition('.')[0] in open_folder(path).linears and not n.endswith('bias')}
    model.save_pretrained(tmp_path/'a')
    assert packed_only(files_of(tmp_path/'a')) == packed_only(want)
    model.load_state_dict(model.state_dict())
    assert type(model.dequantize().model.layers[0].mlp.up_proj) is torch.nn.Linear

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('family, geometry', [('llama', 'int8'), ('biased', 'lut-b'), ('qwen3', 'lut-b'), ('qwen2', '2bit'), ('llama', '4bit'), ('llama', 'published'), ('llama', 'int8-row')])
def test_on_a_gpu_the_kernels_multiply(packed, tmp_path, family, geometry):
    path, near = packed(family, geometry), dict(atol=.1, rtol=.05)
    model, dense = load(path, dtype=torch.bfloat16, device_map='cuda'), looked_up(float_model(family), path).to('cuda', torch.bfloat16)
    up = model.model.layers[0].mlp.up_proj
    assert up.form is not None and up.dense_weight is None and (up.weight is None) == (geometry in ('int8', 'lut-b', '2bit', '4bit'))
    assert torch.allclose(logits(model, TOKENS.cuda()), logits(dense, TOKENS.cuda()), **near)      # many tokens…
    assert torch.allclose(logits(model, TOKENS[:1, :1].cuda()), logits(dense, TOKENS[:1, :1].cuda()), **near)   # …and one: other kernels
    model.save_pretrained(tmp_path/'a')
    packed_only = lambda p: {n: x for n,x in files_of(p).items() if n.rpartition('.')[0] in open_folder(p).linears and not n.endswith('bias')}
    assert packed_only(tmp_path/'a') == packed_only(path)
    assert model.generate(TOKENS.cuda(), max_new_tokens=8, do_sample=False).shape == (2, 18)
    got = torch.compile(model, fullgraph=True)(TOKENS.cuda(), use_cache=False).logits
    assert torch.allclose(got, logits(dense, TOKENS.cuda()), **near)
    assert torch.allclose(logits(model.to('cpu', torch.float32)), logits(dense.cpu().float()), **near)

def test_dequantize_gives_linears_back(packed, tmp_path):
    model = load(packed())
    want = logits(model)
    plain = model.dequantize()
    assert type(plain.model.layers[1].mlp.down_proj) is torch.nn.Linear and torch.equal(logits(plain), want)
    plain.save_pretrained(tmp_path/'plain')
    assert torch.equal(logits(load(tmp_path/'plain')), want)

def test_other_heads_and_no_head(packed):
    path = packed('llama', 'int8')
    body = AutoModel.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad(): assert torch.equal(body(TOKENS).last_hidden_state, load(path).model(TOKENS).last_hidden_state)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).model.layers[0].mlp.up_proj, hf.NativeBitHfLinear)

def test_the_quantizer_says_what_it_can(packed):
    q = load(packed()).hf_quantizer
    assert q.is_serializable() and q.is_trainable and q.is_compileable

def test_a_sharded_folder(packed, tmp_path):
    path = pack(float_model('mistral'), tmp_path/'m', QuantConfig(**GEOMETRIES['int8']), max_shard=20_000)
    assert len(weight_files(path)) > 2 and torch.equal(logits(load(path)), logits(load(packed('mistral', 'int8'))))
    weight_files(path)[1].unlink()
    with pytest.raises(UserError, match='00002-of'): open_folder(path)
    with pytest.raises((UserError, OSError), match='00002-of'): load(path)

UP = 'model.layers.0.mlp.up_proj'
CHANGES = {   # what is done to the tensors, and what the refusal says
    'is missing': lambda t: {n: x for n,x in t.items() if n != f'{UP}.codebook'},
    'lacks model.layers.0.mlp.up_proj': lambda t: {n: x for n,x in t.items() if not n.startswith(UP)},
    'lacks model.norm.weight': lambda t: {n: x for n,x in t.items() if n != 'model.norm.weight'},
    'no such linear layer': lambda t: t | {n.replace('up_proj', 'side_proj'): x for n,x in t.items() if n.startswith(UP)},
    'should be F16': lambda t: t | {f'{UP}.scale': t[f'{UP}.scale'].astype(np.float32)},
    'should be I32': lambda t: t | {f'{UP}.weight': t[f'{UP}.weight'][:-3]},
    'asks for': lambda t: t | {f'{UP}.shape': np.array([96, 60], np.int32)},
}

@pytest.mark.parametrize('says', CHANGES)
def test_tensors_that_do_not_fit_are_refused(packed, tmp_path, says):
    d = Path(shutil.copytree(packed(), tmp_path/'d'))
    save_shard(d/'model.safetensors', CHANGES[says]({n: np.array(x) for n,x in open_folder(packed()).tensors.items()}))
    with pytest.raises(UserError, match=says) as e: load(d)
    assert '\n' not in str(e.value)

def edit(path, d, **change):
    d = Path(shutil.copytree(path, d))
    c = json.loads((d/'config.json').read_text())
    (d/'config.json').write_text(json.dumps(c | dict(quantization_config=c['quantization_config'] | change)))
    return d

def test_configs_that_do_not_fit_are_refused(packed, tmp_path):
    for i,(change, says) in enumerate([(dict(version=2), 'install a newer'), (dict(n_entries=16), 'should be'), (dict(codebook_dtype='float9'), 'codebook_dtype'), (dict(block_shape='x'), 'block_shape|makes no sense')]):
        with pytest.raises(UserError, match=says): load(edit(packed(), tmp_path/str(i), **change))
    float_model('llama').save_pretrained(tmp_path/'float')
    with pytest.raises(ValueError, match='pre-quantized'): load(tmp_path/'float', quantization_config=hf.NativeBitConfig(**GEOMETRIES['int8']))

def test_damage_is_refused(packed, tmp_path):
    for name,f,says in [('flip', lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:], 'checksum'), ('cut', lambda b: b[:-9], 'damaged'), ('zip', lambda b: b'PK\x03\x04' + b, 'damaged')]:
        d = Path(shutil.copytree(packed(), tmp_path/name))
        p = weight_files(d)[0]; p.write_bytes(f(p.read_bytes()))
        for reader in (open_folder, load):
            with pytest.raises(UserError, match=says): reader(d)

def test_pickles_are_never_opened(packed, tmp_path):
    d, trap = Path(shutil.copytree(packed(), tmp_path/'d')), tmp_path/'trap'
    class Trap:
        def __reduce__(self): return (os.system, (f'touch {trap}',))
    weight_files(d)[0].unlink()
    torch.save({'x': Trap()}, d/'pytorch_model.bin')
    for reader in (open_folder, load):
        with pytest.raises(UserError, match='pickle'): reader(d)
    assert not trap.exists()

def test_code_of_the_folder_is_not_run(packed, tmp_path):
    d, trap = edit(packed(), tmp_path/'d'), tmp_path/'trap'
    c = json.loads((d/'config.json').read_text())
    (d/'config.json').write_text(json.dumps(c | dict(auto_map={'AutoModelForCausalLM': 'modeling.Model', 'AutoConfig': 'modeling.Config'})))
    (d/'modeling.py').write_text(f'open({str(trap)!r}, "w")')
    load(d)
    assert not trap.exists()

def test_without_the_import_it_is_an_error(packed, tmp_path):
    load(packed(), dtype='auto').save_pretrained(tmp_path/'again')      # transformers drops the note from config.json: the shapes still stop it
    code = "import sys\nfrom transformers import AutoModelForCausalLM as A\nfor p in sys.argv[1:]:\n    try: A.from_pretrained(p)\n    except Exception as e: print(type(e).__name__, e)\n    else: print('LOADED')"
    r = subprocess.run([sys.executable, '-c', code, str(packed()), str(tmp_path/'again')], capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    note, shape = r.stdout.splitlines()
    assert note.startswith('ValueError') and 'import nativebit.hf' in note
    assert shape.startswith('RuntimeError') and 'report' in shape and GUARD in r.stderr

def test_folders_in_use_are_left_alone(packed, tmp_path):
    (tmp_path/'used').mkdir(); (tmp_path/'used'/'thesis.txt').write_text('1')
    with pytest.raises(UserError, match='not empty'): pack(float_model('llama'), tmp_path/'used', QuantConfig(**GEOMETRIES['int8']))
    assert [p.name for p in (tmp_path/'used').iterdir()] == ['thesis.txt']
    def stops(): yield 'a', np.zeros(3, np.float32); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): save_folder(tmp_path/'stopped', {}, QuantConfig(), stops())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['used']

def test_exports(packed, tmp_path):
    path = packed('qwen2', 'lut-b')
    plain = load(export_safetensors(open_folder(path), tmp_path/'plain', 'float32'))
    assert torch.equal(logits(plain), logits(load(path)))
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert export_lut_b(open_folder(path), tmp_path/'lutb') < .05
    with pytest.raises(UserError, match='--geometry lut-b'): export_lut_b(open_folder(packed()), tmp_path/'no')
    with pytest.raises(UserError, match='quant_method'): open_folder(tmp_path/'plain')

@pytest.mark.parametrize('family', ['llama', 'tied', 'qwen2', 'qwen3'])
def test_one_packed_file_computes_the_same(packed, tmp_path, family):
    from nativebit.formats.nbpack import read_pack
    from nativebit.pytorch.model import from_pack
    pack = read_pack(export_nbpack(open_folder(packed(family, 'int8')), tmp_path/'m.nbpack.safetensors'))
    with torch.no_grad(): got = from_pack(pack)(TOKENS)
    assert torch.allclose(got, logits(load(packed(family, 'int8'))), atol=1e-4)

# generate by the decoder (nbs/12_interop/08_hf_generate), on a CPU where a test asks for it

def ours(model, *args, **kw): return hf_generate.packed_generate(model, *args, everywhere=True, **kw)
def theirs(model, *args, **kw): return type(model).generate(model, *args, **kw)

def ragged(B=5, T=9):
    "Prompts of T, T-1, … tokens, filled up on the left."
    ids, mask = torch.randint(4, 64, (B, T), generator=torch.Generator().manual_seed(1)), torch.ones(B, T, dtype=torch.long)
    for b in range(B): ids[b, :b], mask[b, :b] = 0, 0
    return ids, mask

def note_of(capsys): return capsys.readouterr().err.strip().rpartition(': ')[2]

@pytest.fixture(autouse=True)
def fresh_notes(): say_once.cache_clear()

@pytest.mark.parametrize('family, geometry, gpu', [('llama', 'int8', False), ('biased', 'lut-b', True), ('tied', '4bit', True), ('qwen2', '2bit', True), ('qwen3', 'int8', True), ('llama', 'published', True)])
def test_generate_by_the_decoder_writes_the_same(packed, monkeypatch, capsys, tmp_path, family, geometry, gpu):
    path, (ids, mask) = packed(family, geometry), ragged()
    if gpu: monkeypatch.setattr(hf, 'on_gpu', lambda x: True)     # the layout of a GPU, multiplied by its reference
    monkeypatch.setattr(hf.NativeBitHfLinear, 'activations', 'float')   # not rounded for few tokens, which prompts of other batches are
    model = load(path)
    kw = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1)
    want = theirs(model, ids, **kw)
    ends = want[:, 9:].flatten().bincount().argsort(descending=True)[:2].tolist()
    for end in (ends[0], ends): assert torch.equal(ours(model, ids, eos_token_id=end, **kw), theirs(model, ids, eos_token_id=end, **kw))
    assert torch.equal(ours(model, ids[1:2, 1:], max_length=13, do_sample=False), theirs(model, ids[1:2, 1:], max_length=13, do_sample=False))
    assert note_of(capsys) == ''
    layer = hf_generate.SERVED[model]['net'].layers[0]
    stacks = gpu and geometry != 'published'
    assert all(isinstance(m, hf_generate.PackedLinear if stacks else hf_generate.Beside) for m in layer.products())
    attn = model.model.layers[0].self_attn
    if stacks: assert attn.q_proj.data.untyped_storage().data_ptr() == attn.v_proj.data.untyped_storage().data_ptr() == layer.attn.qkv.data.data_ptr()
    model.to(torch.bfloat16).save_pretrained(tmp_path/'a')       # views are saved as what they are
    packed_only = lambda f: {n: x for n,x in files_of(f).items() if n.rpartition('.')[0] in open_folder(path).linears and not n.endswith('bias')}
    assert packed_only(tmp_path/'a') == packed_only(path)

def test_the_logits_of_the_decoders_network(packed, monkeypatch):
    monkeypatch.setattr(hf, 'on_gpu', lambda x: True)
    for dtype,far in ((torch.float32, 1e-4), (torch.bfloat16, .03)):
        model = load(packed('qwen3', 'lut-b'), dtype=dtype)
        with torch.no_grad(): got = hf_generate.network(model)(TOKENS)
        assert (got - logits(model)).abs().max() < far*logits(model).abs().max()

def test_draws_are_the_seeds_and_no_neighbours(packed, capsys):
    model, (ids, mask) = load(packed()), ragged()
    def draw(seed, rows=slice(0, 3), f=ours, **kw):
        torch.manual_seed(seed)
        return f(model, ids[rows], attention_mask=mask[rows], do_sample=True, max_new_tokens=6, **kw)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, slice(0, 2)), draw(1)[:2])         # the first seeds are the same
    how = dict(temperature=.7, top_k=20, top_p=.9)
    assert torch.equal(draw(3, **how), draw(3, **how)) and not torch.equal(draw(3, **how), draw(3))
    assert torch.equal(draw(1, top_k=1), draw(1, f=theirs, top_k=1))
    two = draw(4, num_return_sequences=2)
    assert two.shape == (6, 15) and not torch.equal(two[0], two[1])
    assert note_of(capsys) == ''

class Kept:
    "A streamer that keeps what it is given."
    def __init__(self): self.given, self.ended = [], False
    def put(self, x): self.given.append(x.tolist())
    def end(self): self.ended = True

def test_a_streamer_gets_every_step(packed):
    model, (ids, mask) = load(packed()), ragged()
    for rows in (slice(0, 1), slice(0, 3)):
        kw = dict(attention_mask=mask[rows], max_new_tokens=3, do_sample=False, eos_token_id=None)
        a, b = Kept(), Kept()
        ours(model, ids[rows], streamer=a, **kw); theirs(model, ids[rows], streamer=b, **kw)
        assert a.given == b.given and a.ended and len(a.given) == 4

class Never(transformers.StoppingCriteria):
    def __call__(self, ids, scores, **kw): return torch.zeros(len(ids), dtype=torch.bool)

class Same(transformers.LogitsProcessor):
    def __call__(self, ids, scores): return scores

THEIRS = {'beam_search': dict(num_beams=2), 'RepetitionPenaltyLogitsProcessor': dict(repetition_penalty=1.3), 'MaxTimeCriteria': dict(max_time=99.),
          'logits_processor': dict(logits_processor=[Same()]), 'stopping_criteria': dict(stopping_criteria=[Never()]), 'MinPLogitsWarper': dict(do_sample=True, min_p=.1),
          'return_dict_in_generate': dict(return_dict_in_generate=True, output_scores=True), 'use_cache=False': dict(use_cache=False), 'cache_implementation': dict(cache_implementation='static'),
          'past_key_values': dict(past_key_values=None), 'position_ids': dict(position_ids=torch.arange(9).expand(5, 9)), 'prefix_allowed_tokens_fn': dict(prefix_allowed_tokens_fn=lambda b, ids: [*range(64)]),
          'a prompt that is not filled up on its left': dict(attention_mask=ragged()[1].flip(1)), '65 prompts, more than 64': dict(do_sample=True, num_return_sequences=13)}

@pytest.mark.parametrize('why', THEIRS)
def test_what_goes_transformers_own_way_is_named(packed, capsys, why):
    model, (ids, mask) = load(packed()), ragged()
    def run(f):
        torch.manual_seed(0)
        cache = dict(past_key_values=transformers.DynamicCache()) if why == 'past_key_values' else {}
        got = f(model, ids, **{'attention_mask': mask, 'max_new_tokens': 2, 'do_sample': False} | THEIRS[why] | cache)
        return got if isinstance(got, torch.Tensor) else got.sequences
    got = run(ours)
    assert note_of(capsys) == why and torch.equal(got, run(theirs))
    run(ours); assert capsys.readouterr().err == ''               # once

def test_a_model_that_was_changed(packed, capsys):
    kw, ids = dict(max_new_tokens=5, do_sample=False), TOKENS[:1]
    model = load(packed())
    text, other = ours(model, ids, **kw), copy.deepcopy(model)
    assert other.generate.__self__ is other and torch.equal(ours(other, ids, **kw), text)
    other.model.norm.weight = torch.nn.Parameter(-other.model.norm.weight)
    assert torch.equal(ours(other, ids, **kw), theirs(other, ids, **kw)) and not torch.equal(ours(other, ids, **kw), text)
    with torch.no_grad(): other.model.norm.weight.neg_()          # in place: the same tensors
    assert torch.equal(ours(other, ids, **kw), text)
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(ids, **kw), text)
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(ours(model, ids, **kw), text) and note_of(capsys) == ''
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    ours(model, ids, **kw); assert note_of(capsys) == 'a hook on model.layers.1.mlp'
    hook.remove(); model.train()
    ours(model, ids, **kw); assert note_of(capsys) == 'the model is in training mode'
    plain = model.eval().dequantize()
    assert torch.equal(ours(plain, ids, **kw), theirs(plain, ids, **kw)) and note_of(capsys) == ''

def test_adapters_go_transformers_own_way(packed, capsys):
    peft = pytest.importorskip('peft')
    from nativebit.interop.lora import for_packed
    model = load(packed())
    text = ours(model, TOKENS, max_new_tokens=4, do_sample=False)
    adapted = peft.get_peft_model(model, for_packed(peft.LoraConfig(r=2, target_modules=['q_proj'])))
    assert torch.equal(ours(adapted.get_base_model(), TOKENS, max_new_tokens=4, do_sample=False), text)
    assert note_of(capsys) == 'model.layers.0.self_attn.q_proj is a PackedLoraLinear'

def test_longer_and_more_texts_make_a_larger_decoder(packed):
    model, (ids, mask) = load(packed()), ragged(3)
    kw = dict(do_sample=False, eos_token_id=None)
    for B,n in ((2, 3), (3, 3), (2, 40)): assert torch.equal(ours(model, ids[:B], attention_mask=mask[:B], max_new_tokens=n, **kw), theirs(model, ids[:B], attention_mask=mask[:B], max_new_tokens=n, **kw))
    assert hf_generate.SERVED[model][2].slots == 4
    with torch.inference_mode(): got = ours(model, ids[:1], max_new_tokens=3, **kw)
    assert torch.equal(got, ours(model, ids[:1], max_new_tokens=3, **kw))

def test_a_second_call_at_a_time_is_transformers(packed, capsys):
    model, said = load(packed()), []
    class Calls(Kept):
        def put(self, x): said.append(ours(model, TOKENS[:1], max_new_tokens=3, do_sample=False))
    text = ours(model, TOKENS[:1], max_new_tokens=3, do_sample=False, streamer=Calls())
    assert note_of(capsys) == 'another call that is running' and all(torch.equal(t, text) for t in said)

def test_an_error_of_the_decoder_is_named_and_transformers_writes(packed, capsys, monkeypatch):
    model, kw = load(packed()), dict(max_new_tokens=3, do_sample=False)
    def broken(*a): raise RuntimeError("no such kernel\nand more")
    monkeypatch.setattr(hf_generate, 'written', broken)
    assert torch.equal(ours(model, TOKENS, **kw), theirs(model, TOKENS, **kw))
    assert 'the decoder ended in an error (no such kernel)' in capsys.readouterr().err
    class Streamed(Kept):
        def put(self, x): pass
    with pytest.raises(RuntimeError, match='no such kernel'): ours(model, TOKENS[:1], streamer=Streamed(), **kw)   # some of its text may have been given away

def test_a_cache_that_does_not_fit_is_named_and_transformers_writes(packed, capsys, monkeypatch):
    model, kw = load(packed()), dict(max_new_tokens=3, do_sample=False)
    def full(*a, **kw): raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(hf_generate, 'BatchDecoder', full)
    assert torch.equal(ours(model, TOKENS, **kw), theirs(model, TOKENS, **kw)) and note_of(capsys) == 'a cache for these texts does not fit the GPU'

def test_on_a_cpu_generate_is_what_it_was(packed, capsys, monkeypatch):
    model = load(packed())
    monkeypatch.setattr(hf_generate, 'our_sample', lambda *a: 1/0)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3, do_sample=False), theirs(model, TOKENS, max_new_tokens=3, do_sample=False))
    assert note_of(capsys) == ''

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('family, geometry', [('llama', 'int8'), ('qwen3', 'lut-b'), ('qwen2', '2bit')])
def test_generate_on_a_gpu(packed, capsys, family, geometry):
    model, (ids, mask) = load(packed(family, geometry), dtype=torch.bfloat16, device_map='cuda'), [x.cuda() for x in ragged()]
    got = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert got.shape == (5, 17) and got.is_cuda and note_of(capsys) == ''
    for b in range(5):                                            # each token is likely enough to be a near tie at worst
        z = logits(model, got[b:b+1, b:])[0, 8-b:-1]
        assert (z.max(-1).values - z.gather(-1, got[b, 9:, None])[:, 0]).max() < .25
    torch.manual_seed(0); a = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True)
    torch.manual_seed(0); assert torch.equal(a, model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True))
