"Models of others: logits equal transformers' for each family; what can't be computed is refused by name; a damaged file is one sentence."
import json, re, subprocess, sys, tracemalloc
import jax.numpy as jnp, ml_dtypes, numpy as np, pytest
from safetensors.numpy import save_file
from nativebit.models.checkpoint import load_checkpoint, load_network
from nativebit.config import ModelConfig
from nativebit.interop.convert import convert, main as convert_main, open_model
from nativebit.utils.cli import UserError, one_sentence
from nativebit.interop.families import FAMILIES, ROPES, hf_names, model_config, their_name
from nativebit.interop.gguf import GGUF_KEYS, LLAMA3, llama3_divisors
from nativebit.formats.size import param_shapes
from nativebit.models.transformer import forward_fn

transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')

SMALL = dict(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
ROPE3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16, rope_theta=10000.)
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 40))
CASES = {
    'llama':           ('Llama',   dict(), 'float32', False),
    'llama bf16':      ('Llama',   dict(num_key_value_heads=4), 'bfloat16', True),
    'llama biases':    ('Llama',   dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5), 'float32', True),
    'llama attention': ('Llama',   dict(attention_bias=True), 'float16', False),
    'llama 3':         ('Llama',   dict(rope_parameters=ROPE3, head_dim=24), 'bfloat16', False),
    'llama linear':    ('Llama',   dict(rope_parameters=dict(rope_type='linear', factor=4., rope_theta=500.), num_key_value_heads=1), 'float32', False),
    'mistral':         ('Mistral', dict(sliding_window=64, head_dim=16), 'bfloat16', True),
    'mistral tied':    ('Mistral', dict(sliding_window=None, tie_word_embeddings=True), 'float32', False),
    'qwen2':           ('Qwen2',   dict(tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=1e6)), 'bfloat16', True),
    'qwen2 untied':    ('Qwen2',   dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=64, max_window_layers=1), 'float32', False),
    'qwen3':           ('Qwen3',   dict(head_dim=16, tie_word_embeddings=True), 'bfloat16', True),
    'qwen3 biases':    ('Qwen3',   dict(head_dim=24, attention_bias=True, num_key_value_heads=4), 'float32', False),
}

def random_transformer(kind, folder, dtype='float32', sharded=False, **settings):
    "Save a model whose every parameter is random, norms and biases too."
    torch.manual_seed(0)
    model = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**SMALL | settings))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn_like(p))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size='10KB' if sharded else '1GB')
    return folder

def theirs(folder, **kw):
    "Logits by transformers, in float32."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager', **kw).eval()
    with torch.no_grad(): return model(torch.tensor(TOKENS)).logits.numpy()

def ours(folder):
    cfg, params = load_network(folder)
    return np.asarray(forward_fn(cfg)(params, jnp.asarray(TOKENS)))

@pytest.mark.parametrize('case', CASES)
def test_logits(tmp_path, case):
    kind, settings, dtype, sharded = CASES[case]
    folder = random_transformer(kind, tmp_path/'theirs', dtype, sharded, **settings)
    assert (len(list(folder.glob('*.safetensors'))) > 1) == sharded
    source = convert(folder, tmp_path/'ours')
    want = theirs(folder)
    assert want.std() > .3 and abs(ours(tmp_path/'ours') - want).max() < 1e-4
    stored = {n: x.dtype.name for n,x in load_checkpoint(tmp_path/'ours')[0].items()}
    assert set(stored.values()) == {dtype} and list(source.names) == list(hf_names(source.model))
    assert transformers.AutoConfig.from_pretrained(tmp_path/'ours'/'hf').model_type == kind.lower()

def test_every_family_is_tested(): assert {kind.lower() for kind,*_ in CASES.values()} == set(FAMILIES)

def test_positions_of_older_files(tmp_path):
    "Transformers 4 wrote rope_theta and rope_scaling."
    config = json.loads((random_transformer('Llama', tmp_path/'x', rope_parameters=ROPE3)/'config.json').read_text())
    assert 'rope_parameters' in config
    rope = config.pop('rope_parameters')
    old = config | dict(rope_theta=rope.pop('rope_theta'), rope_scaling=rope)
    assert model_config(old) == model_config(config | dict(rope_parameters=ROPE3))
    assert model_config(old).rope_scaling == ('llama3', 8., 1., 4., 16.)

@pytest.mark.parametrize('kind', FAMILIES)
def test_a_config_that_says_little(kind):
    "Defaults are those of transformers."
    Config = {k.lower(): getattr(transformers, f'{k}Config') for k in ('Llama', 'Mistral', 'Qwen2', 'Qwen3')}[kind]
    said = dict(model_type=kind, vocab_size=80, hidden_size=512, intermediate_size=48, num_hidden_layers=2, num_attention_heads=32)
    full = Config(**{k: v for k,v in said.items() if k != 'model_type'}).to_dict()
    got, want = [model_config(c, 64) for c in (said, full)]
    assert got == want and got.rope_theta == full['rope_parameters']['rope_theta'] and not got.tied

def test_little_is_imported():
    "Reading a model needs NumPy: no JAX, no torch, and the optional packages only where they are used."
    code = "import sys, nativebit.interop.convert; print({'jax', 'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stdout + done.stderr

# ---- refusals -----------------------------------------------------------------------------------------------

CONFIG = dict(SMALL, model_type='llama', architectures=['LlamaForCausalLM'])

def write_model(folder, config=CONFIG, dtype=np.float32, **changed):
    "A model folder without transformers; a tensor that is changed to None is left out."
    m = model_config(CONFIG)
    weights = {hf_names(m)[n]: np.full(s, .1, dtype) for n,s in param_shapes(m)} | changed
    folder.mkdir()
    (folder/'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({n: x for n,x in weights.items() if x is not None}, folder/'model.safetensors')
    return folder

REFUSED = {
    'gemma':         (dict(model_type='gemma2', architectures=['Gemma2ForCausalLM']), "Gemma2ForCausalLM of type 'gemma2', which is not supported; supported are"),
    'phi':           (dict(model_type='phi3', architectures=['Phi3ForCausalLM']), "'phi3'"),
    'mixtral':       (dict(model_type='mixtral', architectures=['MixtralForCausalLM']), "'mixtral'"),
    'classifier':    (dict(architectures=['LlamaForSequenceClassification']), 'LlamaForSequenceClassification'),
    'nameless':      (dict(architectures=None, model_type=None), 'supported are'),
    'yarn':          (dict(rope_scaling=dict(rope_type='yarn', factor=4.)), "'yarn'"),
    'dynamic':       (dict(rope_scaling=dict(type='dynamic', factor=4.)), "'dynamic'"),
    'longrope':      (dict(rope_parameters=dict(rope_type='longrope', long_factor=[1.], rope_theta=1e4)), "'longrope'"),
    'factorless':    (dict(rope_scaling=dict(rope_type='linear')), 'factor is None'),
    'partial rope':  (dict(partial_rotary_factor=.5), 'partial_rotary_factor'),
    'window':        (dict(model_type='mistral', architectures=['MistralForCausalLM'], sliding_window=32), '--context-len 32'),
    'switched on':   (dict(model_type='qwen2', architectures=['Qwen2ForCausalLM'], use_sliding_window=True, sliding_window=8), '--context-len 8'),
    'gelu':          (dict(hidden_act='gelu_pytorch_tanh'), "'gelu_pytorch_tanh'"),
    'quantized':     (dict(quantization_config=dict(quant_method='awq', bits=4)), 'quantized already (awq)'),
    'no size':       (dict(hidden_size=None), 'hidden_size is None'),
    'text size':     (dict(num_hidden_layers='many'), "num_hidden_layers is 'many'"),
    'negative':      (dict(intermediate_size=-1), 'intermediate_size is -1'),
    'endless':       (dict(num_hidden_layers=10**9), 'num_hidden_layers'),
    'odd heads':     (dict(num_key_value_heads=3), 'n_kv_heads=3'),
    'other width':   (dict(intermediate_size=40), 'model.layers.1.mlp.down_proj.weight is (32, 48), config.json says (32, 40)'),
    'more layers':   (dict(num_hidden_layers=3), 'missing model.layers.2.'),
    'fewer layers':  (dict(num_hidden_layers=1), 'unexpected model.layers.1.'),
    'biases':        (dict(attention_bias=True), 'missing model.layers.0.self_attn.q_proj.bias (32,)'),
    'tied':          (dict(tie_word_embeddings=True), None),
}

@pytest.mark.parametrize('name', REFUSED)
def test_a_config_is_refused(tmp_path, name):
    change, what = REFUSED[name]
    folder = write_model(tmp_path/'x', CONFIG | change)
    if what is None: assert open_model(folder).model.tied; return   # its head equals the embedding: no harm
    with pytest.raises(UserError) as e: open_model(folder, 64 if '--context-len' in what else None)
    assert what in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('value', [None, True, 0, -1, 1.5, float('nan'), float('inf'), 10**30, 'x', [], [1], {}, {'a': {}}], ids=str)
def test_odd_values_never_give_a_traceback(value):
    everything = CONFIG | dict(head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, rope_parameters=None, sliding_window=None, use_sliding_window=False, hidden_act='silu',
                               quantization_config=None, attention_bias=False, tie_word_embeddings=False, partial_rotary_factor=1.)
    for kind in FAMILIES:
        for key in everything:
            c = everything | dict(model_type=kind, architectures=None) | {key: value}
            try: assert isinstance(model_config(c), ModelConfig)
            except UserError: pass

@pytest.mark.parametrize('text', ['', '[]', '{"model_type": ', 'null', '\x00'])
def test_a_config_that_is_none(tmp_path, text):
    with pytest.raises(UserError, match='config.json'): open_model(write_model(tmp_path/'x', text))

def test_all_differences_are_listed(tmp_path):
    folder = write_model(tmp_path/'x', **{'lm_head.weight': None, 'model.norm.weight': np.ones((31,), np.float32), 'model.extra': np.ones(1, np.float32), 'model.layers.0.self_attn.q_proj.weight': np.ones((32, 32), np.int32)})
    with pytest.raises(UserError) as e: open_model(folder)
    for what in ('(4 differences)', 'missing lm_head.weight (80, 32)', 'unexpected model.extra', 'model.norm.weight is (31,)', 'q_proj.weight is I32, supported are F32, F16, BF16'): assert what in str(e.value)

@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn', 'float64'])
def test_a_wrong_type(tmp_path, dtype):
    with pytest.raises(UserError, match='supported are F32, F16, BF16'): open_model(write_model(tmp_path/'x', dtype=np.dtype(dtype)))

def test_a_head_that_is_not_the_embedding(tmp_path):
    with pytest.raises(UserError, match='lm_head.weight differs'): open_model(write_model(tmp_path/'x', CONFIG | dict(tie_word_embeddings=True), **{'lm_head.weight': np.zeros((80, 32), np.float32)}))

def test_harmless_buffers(tmp_path):
    assert open_model(write_model(tmp_path/'x', **{'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}))

@pytest.mark.parametrize('suffix', ['bin', 'pt', 'pth'])
def test_pickles_are_never_loaded(tmp_path, suffix):
    write_model(tmp_path/'x')
    (tmp_path/'x'/'model.safetensors').unlink()
    (tmp_path/'x'/f'pytorch_model.{suffix}').write_bytes(b'cos\nsystem\n(S"touch ran"\ntR.')
    for where in (tmp_path/'x', tmp_path/'x'/f'pytorch_model.{suffix}'):
        with pytest.raises(UserError, match=f'pytorch_model.{suffix}: these are pickles, which are never loaded'): open_model(where)

@pytest.mark.parametrize('change,what', [
    (lambda d, i: (d/i['weight_map']['model.norm.weight']).unlink(), r'lacks model-\d+-of-\d+.safetensors; download'),
    (lambda d, i: i['weight_map'].update(x='../other.safetensors'), 'names ../other.safetensors'),
    (lambda d, i: i['weight_map'].update(x='weights.bin'), 'names weights.bin'),
    (lambda d, i: i.pop('weight_map'), 'lacks any shard'),
    (lambda d, i: i.update(weight_map=['x']), 'lacks any shard'),
    (lambda d, i: i.update(weight_map=dict(x=next(iter(i['weight_map'].values())))), 'do not fit its config'),
])
def test_shards(tmp_path, change, what):
    folder = random_transformer('Llama', tmp_path/'x', sharded=True)
    index = folder/'model.safetensors.index.json'
    data = json.loads(index.read_text())
    change(folder, data); index.write_text(json.dumps(data))
    with pytest.raises(UserError, match=what): open_model(folder)

def test_a_file_cut_anywhere(tmp_path):
    folder = write_model(tmp_path/'x')
    path = folder/'model.safetensors'; whole = path.read_bytes()
    for n in {*range(0, 40, 3), *range(40, len(whole), len(whole)//40)}:
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match=r'not a whole \.safetensors file'): open_model(folder)

def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path/'x.txt').write_text('x')
    for where, what in [('no-such-model', 'there is no no-such-model'), (tmp_path/'nowhere', 'there is no'), (tmp_path/'x.txt', 'no .gguf file'), ('a/b.gguf', 'there is no a/b.gguf'), (tmp_path, 'no config.json')]:
        with pytest.raises(UserError, match=what): open_model(where)
    def offline(name, **kw): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.snapshot_download', offline)
    with pytest.raises(UserError, match=r"there is no folder some/model, and it can't be downloaded .*no network.*check the name"): open_model('some/model')

def test_a_model_by_name(tmp_path, monkeypatch):
    asked, folder = {}, write_model(tmp_path/'0123abc')
    (folder/'modeling.py').write_text('raise SystemExit')
    def download(name, **kw): asked.update(kw, name=name); return folder
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    assert convert('some/model', tmp_path/'out').name == 'model' and asked['name'] == 'some/model'
    assert json.loads((tmp_path/'out'/'meta.json').read_text())['config']['name'] == 'model'
    assert not any('py' in p.split('.') or 'bin' in p for p in asked['allow_patterns'])
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['hf', 'meta.json', 'model.safetensors']

def test_one_array_in_memory(tmp_path):
    folder, config = tmp_path/'x', dict(CONFIG, num_hidden_layers=24, hidden_size=128, intermediate_size=512)
    folder.mkdir(); (folder/'config.json').write_text(json.dumps(config))
    m = model_config(config)
    save_file({hf_names(m)[n]: np.ones(s, np.float32) for n,s in param_shapes(m)}, folder/'model.safetensors')
    size = (folder/'model.safetensors').stat().st_size
    tracemalloc.start()
    convert(folder, tmp_path/'out')
    tracked = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert tracked < size/3, (tracked, size)

def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
    folder = write_model(tmp_path/'x')
    def full(*a, **k): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('nativebit.interop.convert.write_arrays', full)
        with pytest.raises(UserError, match='No space left on device'): convert(folder, tmp_path/'out')
    assert [p.name for p in tmp_path.iterdir()] == ['x']
    convert(folder, tmp_path/'out')
    with pytest.raises(UserError, match='exists and is not empty; choose another --out'): convert(folder, tmp_path/'out')
    with pytest.raises(SystemExit, match='a checkpoint of nativebit already'), one_sentence(): convert_main(str(tmp_path/'out'), tmp_path/'again')

# ---- GGUF ---------------------------------------------------------------------------------------------------

gguf = pytest.importorskip('gguf')

def shuffled(w, n_heads): return w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

def write_gguf(path, source, arch='llama', tokenizer=False, types={}, rope_freqs=None, add=lambda w: None):
    "A model as llama.cpp's converter would write it. `types`: {our name: GGML type}, float32 for the others."
    w, c = gguf.GGUFWriter(path, arch), source.config
    heads = {'q': c['num_attention_heads'], 'k': c['num_key_value_heads']}
    values = c | dict(rope_theta=source.model.rope_theta, head_dim=source.model.head_dim)
    for k,g in GGUF_KEYS.items(): (w.add_float32 if isinstance(values[k], float) else w.add_uint32)(f'{arch}.{g}', values[k])
    w.add_rope_dimension_count(source.model.head_dim); w.add_vocab_size(c['vocab_size']); w.add_bos_token_id(1); w.add_eos_token_id(2)
    if tokenizer:
        tokens = ['<unk>', '<s>', '</s>'] + [chr(33+i) for i in range(76)] + ['AB']
        w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('gpt-2'); w.add_token_list(tokens); w.add_token_types([3]*3 + [1]*77); w.add_token_merges(['A B'])
    add(w)
    if rope_freqs is not None: w.add_tensor('rope_freqs.weight', rope_freqs.astype(np.float32))
    for n in source.names:
        x, part = source.read(n).astype(np.float32), re.search(r'attn\.([qk])\.', n)
        if part and arch == 'llama': x = shuffled(x, heads[part[1]])
        kind = types.get(n, gguf.GGMLQuantizationType.F32)
        w.add_tensor(their_name(n, True), gguf.quants.quantize(x, kind), raw_dtype=kind)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path

T = gguf.GGMLQuantizationType

@pytest.mark.parametrize('kind,settings', [('Llama', dict(rms_norm_eps=1e-5)), ('Llama', dict(tie_word_embeddings=True, num_key_value_heads=4, attention_bias=True)), ('Qwen2', dict(tie_word_embeddings=True)), ('Qwen3', dict(head_dim=16))])
def test_gguf_equals_the_folder(tmp_path, kind, settings):
    source = open_model(random_transformer(kind, tmp_path/'x', **settings))
    got = open_model(write_gguf(tmp_path/'x.gguf', source, kind.lower()))
    assert got.model == source.model
    for n in source.names: assert np.array_equal(got.read(n), source.read(n)), n

def test_gguf_equals_transformers(tmp_path):
    "Types of several kinds and a tokenizer, against transformers' own reading of the file."
    source = open_model(random_transformer('Llama', tmp_path/'x'))
    types = {'layers.0.attn.q.weight': T.Q8_0, 'layers.0.mlp.up.weight': T.Q4_1, 'layers.1.attn.k.weight': T.Q4_1, 'layers.1.attn.v.weight': T.F16, 'embed': T.BF16}
    (tmp_path/'g').mkdir()
    path = write_gguf(tmp_path/'g'/'x.gguf', source, tokenizer=True, types=types)
    convert(path, tmp_path/'out')
    assert abs(ours(tmp_path/'out') - theirs(tmp_path/'g', gguf_file='x.gguf')).max() < 1e-4
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path/'out'/'hf')
    assert tok('ABA')['input_ids'] == [79, 35] and (tok.bos_token, tok.eos_token) == ('<s>', '</s>')
    assert (tmp_path/'out'/'tokenizer.json').exists()
    again = transformers.AutoConfig.from_pretrained(tmp_path/'out'/'hf')   # what describes it is a config that transformers reads
    assert (again.head_dim, again.num_key_value_heads, again.vocab_size, again.eos_token_id) == (8, 2, 80, 2)

def test_gguf_keeps_how_positions_are_stretched(tmp_path):
    source = open_model(random_transformer('Llama', tmp_path/'x', rope_parameters=dict(zip(ROPES['llama3'], LLAMA3[0]), rope_type='llama3', rope_theta=5e5), head_dim=64))
    got = open_model(write_gguf(tmp_path/'x.gguf', source, rope_freqs=llama3_divisors(5e5, 32, LLAMA3[0])))
    assert got.model.rope_scaling == source.model.rope_scaling == ('llama3', 8., 1., 4., 8192.)
    source = open_model(random_transformer('Llama', tmp_path/'y', rope_parameters=dict(rope_type='linear', factor=4., rope_theta=1e4)))
    def linear(w): w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR); w.add_rope_scaling_factor(4.)
    assert open_model(write_gguf(tmp_path/'y.gguf', source, add=linear)).model == source.model

def test_divisors_are_those_of_transformers():
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=dict(zip(ROPES['llama3'], LLAMA3[1]), rope_type='llama3', rope_theta=5e5))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    stretched = ROPE_INIT_FUNCTIONS['llama3'](config, 'cpu')[0].numpy()
    assert np.allclose(5e5**(-np.arange(32)/32)/stretched, llama3_divisors(5e5, 32, LLAMA3[1]), rtol=1e-5)

@pytest.mark.parametrize('arch,add,what', [
    ('gemma2', lambda w: None, "architecture 'gemma2'"),
    ('llama', lambda w: w.add_expert_count(8), 'mixture of experts'),
    ('llama', lambda w: w.add_uint16('split.count', 3), 'one of 3 parts'),
    ('llama', lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.YARN), w.add_rope_scaling_factor(4.)), "'yarn'"),
])
def test_gguf_refusals(tmp_path, arch, add, what):
    source = open_model(write_model(tmp_path/'x', CONFIG | dict(rms_norm_eps=1e-5, rope_theta=1e4)))
    with pytest.raises(UserError, match=what): open_model(write_gguf(tmp_path/'x.gguf', source, arch, add=add))

def test_a_gguf_file_cut_anywhere(tmp_path):
    source = open_model(write_model(tmp_path/'x', CONFIG | dict(rms_norm_eps=1e-5, rope_theta=1e4)))
    whole = write_gguf(tmp_path/'x.gguf', source, tokenizer=True).read_bytes()
    for n in {*range(0, 64, 5), *range(64, len(whole), len(whole)//60)}:
        (tmp_path/'cut.gguf').write_bytes(whole[:n])
        with pytest.raises(UserError): open_model(tmp_path/'cut.gguf')
