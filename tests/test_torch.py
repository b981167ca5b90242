"PyTorch serves what JAX trained: the same logits and the same greedy text from one packed file; its program says in a sentence what is wrong."
import ast, gc, os, subprocess, sys, weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
import numpy as np, processes, pytest
torch = pytest.importorskip('torch', reason="needs PyTorch: pip install -e '.[torch]'")
from nativebit.config import get_config
from nativebit.utils.cli import UserError, one_sentence
from nativebit.formats.nbpack import pack_tensors, write_pack
from nativebit.pipelines.generate import main
from nativebit.pipelines.model import load
from nativebit.pytorch.generate import continue_text, served
from nativebit.kernels import between
from nativebit.pytorch import attention, decode
from nativebit.pytorch.batch import BatchDecoder, Text, TorchBatch, generate_batch
from nativebit.pytorch.decode import Decoder, generate, recorded
from nativebit.pytorch.quant import NativeBitLinear, encode_codebook
from nativebit.pytorch.model import NativeBitGPT, from_pack
from nativebit.pytorch.linear import PackedLinear, as_array
from nativebit.pytorch.benchmark import dequantized, random_network, run_benchmark

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
PROMPT = 'def parse(path, mode="r"):\n    "Read a file."\n'
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TINY = {'published': dict(geometry='published'), 'int8': dict(geometry='int8', n_kv_heads=2, tied=False), 'lut-b': dict(geometry='lut-b', n_kv_heads=1, embed='int8'),
        '2bit': dict(geometry='2bit', block_shape=(1, 32), n_kv_heads=2), '4bit': dict(geometry='4bit', tied=False, embed='int8'), 'fp16': dict(geometry='int8', codebook_dtype='float16', block_shape=(4, 8)),
        'odd': dict(geometry='int8', n_entries=11, block_shape=(5, 7), tied=False), '256 entries': dict(geometry='int8', n_entries=256, block_shape=(4, 32))}

def pack_torch(path, embed='bfloat16', **settings):
    "Pack a network that PyTorch made: (file, the model that was packed)."
    cfg = get_config('tiny', n_heads=4, **settings)
    model = NativeBitGPT(cfg.model, cfg.quant).eval()
    modules = {n: m for n,m in model.named_modules() if isinstance(m, NativeBitLinear)}
    weights = {n: p.detach().numpy() for n,p in model.named_parameters() if not n.endswith('codebook')} | {f'{n}.weight': m.evaluated().numpy() for n,m in modules.items()}
    stored = lambda codes, scale: (as_array(codes), None if scale is None else as_array(scale.reshape(-1)))
    books = {n: stored(*encode_codebook(m.entries, cfg.quant.codebook_dtype)) for n,m in modules.items()}
    return write_pack(path, pack_tensors(cfg, weights, books, embed), cfg), model

REFERENCE = """
import sys, numpy as np, jax, jax.numpy as jnp
from nativebit.data.tokenizers import load_tokenizer
from nativebit.inference.generate import empty_cache, extend, generate, head, pack_params, scores
from nativebit.formats.nbpack import read_pack
from nativebit.ptq.pack import pack_checkpoint
folder, root, prompt = sys.argv[1:]
out, run = {}, jax.jit(extend, static_argnums=0)
for g,embed in (('lut-b', 'int8'), ('int8', 'bfloat16')): pack_checkpoint(f'{root}/data/stdlib', f'{folder}/stdlib-{g}', embed, posthoc='quantile', geometry=g)
from pathlib import Path
for f in sorted(Path(folder).iterdir()):
    pack = read_pack(f)
    p, m = pack_params(pack, False, jnp.float32), pack.config.model
    t = np.random.default_rng(0).integers(0, m.vocab_size, (1, 24))
    out[f.name] = scores(run(m, p, jnp.array(t, jnp.int32), empty_cache(m, 1, 24, jnp.float32), 0)[0], head(p))
    if f.name.startswith('stdlib'): out[f.name + ' text'] = list(generate(m, p, load_tokenizer(m.vocab_size).encode(prompt).tolist(), 128))
np.savez(f'{folder}/reference.npz', **out)
"""

@pytest.fixture(scope='module')
def packs(tmp_path_factory):
    "Packed files, tiny ones of PyTorch's making and the shipped checkpoint in two geometries, and what JAX says of them."
    folder = tmp_path_factory.mktemp('packs')
    torch.manual_seed(0)
    models = {name: pack_torch(folder/name, **kw)[1] for name,kw in TINY.items()}
    r = processes.run('-c', REFERENCE, folder, ROOT, PROMPT)   # on a CPU, whatever PyTorch computes on
    assert r.returncode == 0, r.stderr
    return folder, dict(np.load(folder/'reference.npz')), models

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name', [*TINY, 'stdlib-lut-b', 'stdlib-int8'])
def test_logits_are_jaxs(packs, name, packed):
    folder, theirs, _ = packs
    model = from_pack(folder/name, packed=packed)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, 24)))
    assert abs(model(tokens).numpy() - theirs[name]).max() < 1e-4
    stays = packed and name not in ('odd', '256 entries')
    assert all(isinstance(layer.attn.qkv, PackedLinear) == stays for layer in model.layers)

@pytest.mark.parametrize('name', [n for n,kw in TINY.items() if 'embed' not in kw])
def test_what_was_trained_is_served(packs, name):
    folder, _, models = packs
    tokens, served = torch.randint(0, 256, (2, 20)), from_pack(folder/name)
    with torch.no_grad():
        for p in ('embed', 'head'):
            if getattr(served, p) is not None: getattr(models[name], p).copy_(getattr(served, p))   # the file rounds tables to bfloat16
        assert (served(tokens) - models[name](tokens)).abs().max() < 1e-5

def opened(path, packed=False, device='cpu', dtype=torch.float32):
    "A network in PyTorch, and its tokenizer."
    m = load(path)
    return served(m.pack, packed, torch.device(device), dtype), m.tokenizer

@pytest.mark.parametrize('geometry', ['lut-b', 'int8'])
def test_greedy_text_is_jaxs(packs, geometry):
    folder, theirs, _ = packs
    model, tok = opened(folder/f'stdlib-{geometry}')
    want, ids = theirs[f'stdlib-{geometry} text'].astype(int).tolist(), [int(i) for i in tok.encode(PROMPT)]
    assert len(want) == 128 and list(generate(Decoder(model), ids, 128)) == want
    assert list(generate(Decoder(from_pack(folder/f'stdlib-{geometry}', packed=True)), ids, 6)) == want[:6]

@pytest.mark.parametrize('how', [dict(), dict(temperature=.8, top_k=40, top_p=.9, seed=3)])
def test_a_compiled_step_changes_nothing(packs, how):
    model = from_pack(packs[0]/'lut-b', packed=True)
    texts = [list(generate(Decoder(model, **kw), [1, 2, 3], 20, **how)) for kw in (dict(), dict(compile=True, backend='aot_eager'))]
    assert texts[0] == texts[1]

HOWS = [dict(), dict(temperature=1.), dict(temperature=.8, top_k=40), dict(temperature=1.2, top_p=.9), dict(temperature=.9, top_k=70, top_p=.8)]

def many(n=20, V=256, longest=50):
    "Texts of different lengths and options."
    rng = np.random.default_rng(0)
    return [Text(rng.integers(0, V, rng.integers(1, longest)).tolist(), int(rng.integers(1, 40)), seed=i, stop=tuple(range(3*(i % 3))), **HOWS[i % len(HOWS)]) for i in range(n)]

def alone(decoder, t): return list(generate(decoder, t.ids, t.n_tokens, temperature=t.temperature, top_k=t.top_k, top_p=t.top_p, seed=t.seed, stop=t.stop))

@pytest.mark.parametrize('name, slots', [('int8', 4), ('lut-b', 3), ('odd', 1), ('2bit', 32)])
def test_texts_do_not_depend_on_their_neighbours(packs, name, slots):
    model = from_pack(packs[0]/name, packed=True)
    single, batch = Decoder(model, length=64), BatchDecoder(model, slots, 64, chunk=16)
    wrote = {t: [] for t in range(20)}
    for i,token in generate_batch(batch, many()): wrote[i].append(token)
    assert [*wrote.values()] == [alone(single, t) for t in many()] and batch.idle() == list(range(slots))

@pytest.mark.parametrize('how', [dict(), dict(compile=True, backend='aot_eager')])
def test_slots_one_by_one(packs, how):
    "By hand: texts begin while others go on, one ends, its slot idles and is used again."
    model = from_pack(packs[0]/'int8')
    texts, single, batch = many(4), Decoder(model), BatchDecoder(model, 4, **how)
    for t in texts: t.n_tokens, t.stop = 9, ()
    want, got = [alone(single, t) for t in texts], [[] for _ in texts]
    begin = lambda slot, i: got[i].append(batch.begin(slot, texts[i].ids, **{k: getattr(texts[i], k) for k in ('temperature', 'top_k', 'top_p', 'seed')}))
    def step(names):
        for slot,token in batch.step().items(): got[names[slot]].append(token)
    begin(2, 0); step({2: 0}); begin(0, 1); step({2: 0, 0: 1}); begin(1, 2)
    for _ in range(3): step({2: 0, 0: 1, 1: 2})
    batch.free(0); got[1] = got[1][:9]; step({2: 0, 1: 2}); begin(0, 3)
    for _ in range(2): step({2: 0, 1: 2, 0: 3})
    assert [len(x) for x in got] == [9, 5, 7, 3] and all(w[:len(g)] == g for w,g in zip(want, got))

def test_idle_slots_keep_their_cache(packs):
    batch = BatchDecoder(from_pack(packs[0]/'int8'), 4)
    for slot in (0, 1, 3): batch.begin(slot, [1, 2, 3, 4, 5])
    batch.free(1)
    before = [[x[1:3].clone() for x in kv] for kv in batch.cache]
    for _ in range(3): batch.step()
    assert all(torch.equal(b, x[1:3]) for kv,old in zip(batch.cache, before) for x,b in zip(kv, old))

def test_probabilities_that_are_told(packs):
    model = from_pack(packs[0]/'int8')
    batch, ids = BatchDecoder(model, 2), [5, 6, 7]
    batch.begin(1, [9])
    for temperature in (0., 2.):
        ids = ids[:3] + [batch.begin(0, ids[:3], temperature=temperature, tell=True)]
        for _ in range(3):
            with torch.no_grad(): p = model(torch.tensor([ids]))[0, -2].log_softmax(-1)
            own, others = batch.told(0)
            assert abs(own - p[ids[-1]]) < 1e-4 and list(others) == p.topk(20).indices.tolist()
            ids.append(batch.step()[0])

LIMITS = dict(float32=1e-5, float16=2e-3, bfloat16=1.6e-2)
HEADS = [(64, 2, 4, 'float32', 3, True), (80, 1, 1, 'bfloat16', 1, True), (256, 2, 2, 'float16', 4, False), (96, 1, 7, 'bfloat16', 2, False), (128, 2, 1, 'float32', 1, False), (64, 1, 20, 'float16', 16, True)]

def off(a, b): return ((a.double() - b.double()).norm()/b.double().norm()).item()

@pytest.mark.parametrize('H, kv, ratio, name, parts, normed', HEADS)
def test_attention_kernels_are_the_array_operations(H, kv, ratio, name, parts, normed):
    "Rows at different positions, one idle; and a prompt in two rows, over a cache that holds something."
    dtype, S = getattr(torch, name), 70
    draw = lambda *shape: torch.randn(shape).to(DEVICE, dtype)
    heads, turns = [kv*ratio, kv, kv], torch.randn(2, S, H//2).to(DEVICE)
    norms = [.5 + torch.rand(H).to(DEVICE, dtype) for _ in range(2*normed)]
    for B,T,at,step in ((4, 1, [5, -3, 69, 0], lambda *a: attention.triton_attention(*a, parts=parts, tile=16)),
                        (2, 5, range(9, 14), lambda *a: attention.cached_attention(*a, write=attention.triton_written))):
        qkv, cache = draw(B, T, sum(heads)*H).unflatten(-1, (-1, H)).split(heads, 2), [draw(B, S, kv, H) for _ in range(2)]
        own, at = [x.clone() for x in cache], torch.tensor([*at], device=DEVICE)
        rest = at, norms, .1   # an eps that counts
        y, want = step(*qkv, *turns, *own, *rest), attention.cached_attention(*qkv, *turns, *cache, *rest)
        live = at >= 0 if T == 1 else slice(None)
        assert off(y[live], want[live]) < LIMITS[name]
        assert off(own[0], cache[0]) < LIMITS[name] and torch.equal(own[1], cache[1])
        if T == 1: assert torch.equal(own[0][1], cache[0][1])   # the idle row

@pytest.mark.parametrize('kw', [dict(geometry='int8', qk_norm=True), dict(geometry='lut-b', n_kv_heads=1, biases=('attn.q', 'mlp.up')), dict(geometry='int8', n_kv_heads=4, head_size=24)])
def test_a_network_by_kernels(kw, monkeypatch):
    "What a GPU computes between the products is what a CPU does, and a step takes eight operations a layer, nine with biases."
    net = random_network(get_config('tiny', n_heads=4, **{'n_kv_heads': 2} | kw), DEVICE)
    for l in net.layers:
        for m in l.products() if 'biases' in kw else []: m.bias = .1*torch.randn(sum(m.sizes), device=DEVICE)
        for x in l.parameters(): x.data = .5 + torch.rand_like(x)
    prompt, token, at = [x.to(DEVICE) for x in (torch.randint(0, 99, (4, 9)), torch.randint(0, 99, (4, 1)), torch.tensor([9, 4, -1, 7]))]
    def run(by_kernels):
        for module in (between, attention): monkeypatch.setattr(module, 'on_gpu', lambda *xs: by_kernels)
        cache = net.empty_cache(4, 40)
        with torch.no_grad():
            x = net.hidden(prompt, [(k[:, :9], v[:, :9]) for k,v in cache], torch.arange(9, device=DEVICE))
            return x, net.hidden(token, cache, at), cache
    want, (x, y, cache) = run(False), run(True)
    live = at >= 0
    assert off(x, want[0]) < 1e-5 and off(y[live], want[1][live]) < 1e-5
    assert all(off(a, b) < 1e-5 for kv,other in zip(cache, want[2]) for a,b in zip(kv, other))
    names = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if not f.is_view: names.append(f.__name__.split('.')[0])
            return f(*args, **kwargs or {})
    with torch.no_grad(), Watch(): net.layers[1].terms(y, y, net.cos, net.sin, cache[1], at)
    names = [n for n in names if n not in ('view', 'split_with_sizes')]
    expected = ['add_norm', 'lut_linear', 'decode_attention', 'lut_linear', 'add_norm', 'lut_linear', 'gated', 'lut_linear']
    assert [n for n in names if n not in ('add', 'mul')] == expected
    if 'biases' not in kw: assert len(names) == 8

@pytest.mark.parametrize('graph', [False, True])
def test_prompts_are_read_together(packs, monkeypatch, graph):
    "Of several lengths, in slots that are no neighbours, while another text is written; each as if alone. With graphs, whose replay is a run here."
    monkeypatch.setattr(decode, 'recorded', lambda step, *args, **kw: step)
    model, rng = from_pack(packs[0]/'int8'), np.random.default_rng(0)
    texts = {s: rng.integers(0, 256, n).tolist() for s,n in {0: 40, 2: 3, 3: 17, 4: 16, 6: 33, 7: 1}.items()}
    hows = {s: dict(temperature=.9*(s == 3), seed=s) for s in texts}   # greedy, but for one: these logits are so flat that a draw hides a mistake
    want = {s: list(generate(Decoder(model, length=64), ids, 6, **hows[s])) for s,ids in texts.items()}
    other = list(generate(Decoder(model, length=64), [5, 6], 7))
    width = min(64, model.cfg.context_len)
    batch, shapes, hidden = BatchDecoder(model, 8, 64, chunk=16, together=4*width if graph else 64, graph=graph), [], NativeBitGPT.hidden
    got = {1: [batch.begin(1, [5, 6])]}
    monkeypatch.setattr(NativeBitGPT, 'hidden', lambda self, tokens, *a: shapes.append(tuple(tokens.shape)) or hidden(self, tokens, *a))
    got |= {s: [t] for s,t in batch.begin_all(texts, hows).items()}
    behind = [(3, 16), (2, 8)]                                          # the longest first; 3 of them go on, then 2
    if graph: assert shapes == [(4, width)]*2 + [(2, width)]*2 + behind  # each once to be recorded
    else: assert shapes == [(4, 16), (2, 3), *behind]
    for _ in range(5):
        for s,t in batch.step().items(): got[s].append(t)
    assert got.pop(1) == other[:6] and got == want

def test_a_replay_leaves_what_another_one_read(packs, monkeypatch):
    "Prompts that one recorded graph reads one after the other, before the first token of any is chosen."
    monkeypatch.setattr(decode, 'recorded', lambda step, *args, **kw: step)
    model, rng = from_pack(packs[0]/'int8'), np.random.default_rng(0)
    texts = {s: rng.integers(0, 256, 20).tolist() for s in range(4)}
    want = {s: next(generate(Decoder(model), ids, 1)) for s,ids in texts.items()}
    batch = BatchDecoder(model, 4, together=1, graph=True)
    assert batch.begin_all(texts, {s: {} for s in texts}) == want and list(batch.chunks) == [(1, min(64, model.cfg.context_len))]

def test_prompts_that_do_not_fit_change_nothing(packs):
    model = from_pack(packs[0]/'int8')
    batch, want = BatchDecoder(model, 3, 32), list(generate(Decoder(model, length=32), [5, 6], 4))
    got = [batch.begin(1, [5, 6])]
    for wrong in ([], [1]*32):
        with pytest.raises(ValueError, match='does not fit a slot'): batch.begin_all({0: [7], 1: [8, 9], 2: wrong}, {s: {} for s in range(3)})
    assert batch.begin_all({}, {}) == {} and batch.idle() == [0, 2]
    for _ in range(3): got.append(batch.step()[1])
    assert got == want

def test_a_batch_that_was_stopped_leaves_its_slots(packs):
    batch = BatchDecoder(from_pack(packs[0]/'int8'), 4, 32)
    some = generate_batch(batch, [[1], [2, 3], [4]], 20)
    for _ in range(5): next(some)
    some.close()
    assert batch.idle() == [0, 1, 2, 3] and len(list(generate_batch(batch, [[7, 8]], 3))) == 3

def test_a_prompt_nobody_waits_for_is_read_no_further(packs):
    model = from_pack(packs[0]/'int8')
    batch, got = TorchBatch(model, 4, length=64, chunk=8), {s: [] for s in range(4)}
    for s in range(3): batch.begin(s, [*range(s, s+20)], 20)
    batch.step(); batch.free(1); batch.begin(1, [7]*9, 20)   # in the slot of one that was begun
    for _ in range(14):
        for s,c in batch.step().items(): got[s].append(c.token)
    for s,ids in ((0, [*range(20)]), (1, [7]*9), (2, [*range(2, 22)])):
        assert len(got[s]) > 3 and got[s] == list(generate(Decoder(model, length=64), ids, len(got[s])))

def test_a_server_prepares_what_it_records_and_launches_before_it_waits(packs, monkeypatch):
    "With graphs, whose replay is a run here: no request records anything, no text is another one, the next step is under way when the tokens of this one are waited for."
    made, order = [], []
    monkeypatch.setattr(decode, 'recorded', lambda step, *args, **kw: made.append(step) or step)
    model, prompts = from_pack(packs[0]/'int8'), {s: [*range(3*s + 1, 5*s + 4)] for s in range(6)}
    batch = TorchBatch(model, 6, graph=True, together=4*min(64, model.cfg.context_len))
    batch.warm()
    before, read, launch = len(made), batch.read, batch.launch
    assert {n for n,*_ in batch.steps} == {1, 2, 4} and {w for _,w,_ in batch.steps} == {-1, 0} and before == len(batch.steps) + len(batch.chunks)
    assert batch.step() == {} and batch.idle() == [*range(6)]
    monkeypatch.setattr(batch, 'launch', lambda: order.append('launch') or launch())
    monkeypatch.setattr(batch, 'read', lambda: (lambda wait: lambda: order.append('wait') or wait())(read()))
    got = {s: [] for s in prompts}
    for s in range(4): batch.begin(s, prompts[s], 9, temperature=.9*(s % 2), seed=s)
    for _ in range(9):
        for s,c in batch.step().items(): got[s].append(c.token)
    for s in range(4): batch.free(s)
    for s in (4, 5): batch.begin(s - 4, prompts[s], 9)   # behind a step that was launched for nobody
    for _ in range(9):
        for s,c in batch.step().items(): got[s + 4].append(c.token)
    assert len(made) == before and order == ['launch', 'wait']*18
    for s,ids in prompts.items(): assert got[s] == list(generate(Decoder(model), ids, 9, temperature=.9*(s % 2)*(s < 4), seed=s)), s

def test_a_text_may_fill_its_slot(packs):
    "To the last place, though the next step is launched before its last token is known."
    model = from_pack(packs[0]/'int8')
    batch = TorchBatch(model, 2, length=16)
    batch.begin(0, [1, 2, 3], 13)
    got = [batch.step()[0].token for _ in range(13)]
    batch.free(0)
    assert got == list(generate(Decoder(model, length=17), [1, 2, 3], 13)) and batch.step() == {}

def test_operators_are_well_behaved(packs):
    model = from_pack(packs[0]/'int8', packed=True)
    p = model.layers[0].attn.qkv.packed
    args = torch.randn(3, p.shape[1]), p.data, p.codebook, list(p.shape), list(p.block_shape), p.bits, p.kind, p.scale, 'float'
    torch.library.opcheck(torch.ops.nativebit.lut_linear.default, args, test_utils=('test_schema', 'test_faketensor'))

def test_dense_bfloat16_is_the_same_network(packs, tmp_path):
    model = from_pack(packs[0]/'lut-b', packed=True)
    tokens = torch.randint(0, 256, (1, 12))
    assert (dequantized(model)(tokens) - model(tokens)).abs().max() < .05
    rows = run_benchmark('tiny', model, 8, 8, tmp_path/'out.jsonl')
    assert len((tmp_path/'out.jsonl').read_text().splitlines()) == 2 and rows[0]['bytes_per_token'] > 0

@pytest.mark.parametrize('args, says', [
    (dict(), 'give one of'), (dict(file='a', random='tiny'), 'give one of'), (dict(file='/nowhere'), 'there is no model /nowhere'),
    (dict(file='short'), 'copy'), (dict(file='int8', top_p=2.), 'top_p'), (dict(file='int8', dtype='int4'), 'dtype'), (dict(file='int8', device='abacus'), 'unknown device'),
    (dict(file='int8', device='cuda:7'), 'no GPU'), (dict(file='int8', device='cpu', cuda_graph=True), '--cuda-graph'), (dict(random='tpu-3b'), 'tpu-2b'),
    (dict(random='tiny', geometry='5bit'), 'geometry'), (dict(random='tiny', embed='int4'), 'embed')])
def test_mistakes_are_one_sentence(packs, args, says):
    folder = packs[0]
    if not (folder/'short').exists(): (folder/'short').write_bytes((folder/'int8').read_bytes()[:-100])
    if (f := args.pop('file', None)): args['model'] = str(folder/f) if f in ('short', 'int8') else f
    with pytest.raises(UserError) as e: main(backend='torch', **args)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_a_model_on_another_gpu_than_the_current_one(packs, monkeypatch):
    "Operators make its GPU the current one; a decoder, whose graphs are the current GPU's, says what to do."
    from nativebit.kernels import between
    from nativebit.pytorch import decode
    seen, model = [], opened(packs[0]/'int8')[0]
    monkeypatch.setattr(torch.cuda, 'device_of', lambda x: seen.append(x) or nullcontext())
    x = torch.randn(2, 8)
    between._norm(x, torch.ones(8), 1e-5, torch.float32)
    assert len(seen) == 1 and seen[0].shape == x.shape
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    assert not any(decode.not_current(torch.device(d)) for d in ('cpu', 'cuda', 'cuda:0'))
    monkeypatch.setattr(decode, 'not_current', lambda d, ask=decode.not_current: ask(torch.device('cuda:1')))
    with pytest.raises(UserError, match=r'on cuda:1 while the current GPU is cuda:0; call torch.cuda.set_device\(1\) first'): Decoder(model)

def test_a_prompt_must_leave_room(packs):
    model, tok = opened(packs[0]/'int8')
    with pytest.raises(UserError, match=r'shorten'): [*continue_text(Decoder(model), tok, 'x'*model.cfg.context_len, 5)]

def test_a_full_gpu_is_one_sentence(packs, monkeypatch):
    "What PyTorch raises, in the program that continues a text and in any other."
    def full(*a, **kw): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")
    monkeypatch.setattr(NativeBitGPT, 'empty_cache', full)
    with pytest.raises(UserError, match='too little memory for this network') as e: main(str(packs[0]/'int8'), backend='torch', prompt='x', device='cpu')
    assert '\n' not in str(e.value)
    with pytest.raises(SystemExit, match='^error: out of memory; use a smaller .*$'), one_sentence(): full()
    with pytest.raises(RuntimeError, match='another'), one_sentence(): raise RuntimeError('another')

def run_program(args, head='', name='generate_torch', **kw):
    "A program in a process of its own, after some lines of Python."
    code = f"import sys, runpy; {head}; sys.argv = ['nativebit', '{name}', *sys.argv[1:]]; runpy.run_module('nativebit', run_name='__main__', alter_sys=True)"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), **kw)

def test_the_program_needs_no_jax(packs):
    r = run_program([packs[0]/'stdlib-lut-b', '--max-tokens', 8, '--temperature', 0], "sys.modules['jax'] = None", input=PROMPT)
    assert r.returncode == 0 and r.stdout.startswith(PROMPT) and len(r.stdout) > len(PROMPT) + 8, r.stderr

@pytest.mark.parametrize('name, extra, words', [('generate_torch', 'torch', [ROOT/'data'/'stdlib', '--prompt', 'x']), ('hf', 'hf', ['json.tool'])])
def test_without_torch_it_says_so(name, extra, words):
    r = run_program(words, "sys.modules['torch'] = None", name)
    assert r.returncode == 1 and r.stderr.endswith(f"needs torch, which is not installed: pip install -e '.[{extra}]'\n") and r.stderr.count('\n') == 1, r.stderr

def imported(path):
    "Top-level packages that a module imports."
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {a.name.split('.')[0] for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module.split('.')[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}

def test_jax_and_torch_stay_apart():
    either = ROOT/'nativebit'/'pipelines'/'decoders.py'   # chooses one of them when it is asked
    for path in (ROOT/'nativebit').rglob('*.py'): assert not {'jax', 'torch'} <= imported(path) or path == either, path

@on_gpu
@pytest.mark.parametrize('name', ['stdlib-lut-b', 'stdlib-int8'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_on_a_gpu(packs, name, dtype):
    model, tok = opened(packs[0]/name, True, 'cuda', getattr(torch, dtype))
    ids = [int(i) for i in tok.encode(PROMPT)]
    plain, replayed, compiled = [list(generate(Decoder(model, **kw), ids, 64)) for kw in (dict(), dict(graph=True), dict(compile=True, graph=True))]
    whole = (64*ids)[:64]                                               # fills a recorded prompt: the same products, bit for bit
    assert list(generate(Decoder(model), whole, 64)) == list(generate(Decoder(model, graph=True), whole, 64))
    ties = [end for _,end in between_ties(packs[0]/name, ids, plain, margin=.1 if dtype == 'bfloat16' else .02)]
    for other in (replayed, compiled):                                  # prompts of another length, sums in another order: a near tie may fall otherwise
        assert next((i for i,(a,b) in enumerate(zip(plain, other)) if a != b), 64) in ties

@pytest.mark.parametrize('geometry, dtype', [('int8', 'bfloat16'), ('lut-b', 'float16')])
@pytest.mark.parametrize('rows, tokens', [(1, 1), (2, 1), (16, 1), (64, 1), (1, 70), (3, 33)])
def test_replays_give_equal_bits_on_a_gpu(monkeypatch, geometry, dtype, rows, tokens):
    "All that several texts and prompts take: products of one to 99 tokens, norms, gates, attention in one part and in more, head. On a CPU: repeated calls."
    if DEVICE == 'cpu': monkeypatch.setattr(decode, 'recorded', lambda step: step)
    kind, many = (getattr(torch, dtype), 1000) if DEVICE == 'cuda' else (torch.float32, 2)
    net = random_network(get_config('tiny', geometry=geometry, n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, head_size=64, d_ff=520, context_len=512, qk_norm=True), DEVICE, kind, 'int8')
    cache, ids = net.empty_cache(rows, 512), torch.randint(0, 256, (rows, tokens), device=DEVICE)
    at, out, differ = torch.arange(tokens if tokens > 1 else rows, device=DEVICE) + 400, {}, 0
    for kv in cache: [x.normal_() for x in kv]
    def step(): out['y'] = net.scores(net.hidden(ids, cache, at)[:, -1])
    with torch.no_grad():
        replay = decode.recorded(step)
        replay(); want = out['y'].clone()
        for _ in range(many): replay(); differ += not torch.equal(out['y'], want)
    assert differ == 0 and want.isfinite().all() and want.std() > 0

class FakeGraph:
    "What `recorded` needs of torch.cuda, without a GPU: it records nothing and does nothing again."
    def replay(self): pass

@pytest.fixture
def fake_graphs(monkeypatch):
    still = lambda *a, **kw: nullcontext()
    for name,fake in dict(Stream=lambda device: SimpleNamespace(device=device, wait_stream=still), current_device=lambda: 1, current_stream=lambda: SimpleNamespace(wait_stream=still), stream=still, graph=still, CUDAGraph=FakeGraph).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    decode.side_stream.cache_clear()

def test_what_a_graph_reads_stays_where_it_is(fake_graphs):
    positions = torch.arange(3)
    seen, run = weakref.ref(positions), recorded(lambda positions=positions: positions.sum())
    del positions; gc.collect()
    assert seen() is not None                                           # the graph holds its address
    del run; gc.collect()
    assert seen() is None

def test_a_graph_is_recorded_on_its_own_gpu(fake_graphs, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, pool, stream: streams.append(stream) or nullcontext())
    for k in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: k)
        recorded(lambda: None)
    assert [s.device for s in streams] == [0, 1, 0] and streams[0] is streams[2]   # one stream of each: graphs that share memory share it, too

def test_nothing_ends_during_a_recording(fake_graphs, monkeypatch):
    class Ring: pass                                                    # an older decoder: only the collector frees it
    old = Ring(); old.itself = old
    gone, during = weakref.ref(old), []
    del old
    @contextmanager
    def graph(*a, **kw):
        during.append((gone(), gc.isenabled()))
        yield
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    recorded(lambda: None)
    assert during == [(None, False)] and gc.isenabled()

def test_a_decoder_is_free_without_the_collector(fake_graphs, packs):
    model, _ = opened(packs[0]/'stdlib-int8', True, 'cpu', torch.float32)
    decoder = Decoder(model)
    decoder.recorded_chunk(1, 64)
    gc.collect(); gc.disable()
    try:
        seen = weakref.ref(decoder)
        del decoder
        assert seen() is None                                           # and with it its cache
    finally: gc.enable()

def between_ties(path, ids, text, margin=.02):
    "Stretches (begin, end) of a greedy text without a choice that a rounding could turn, where the runner-up is within a margin."
    top = from_pack(path)(torch.tensor([[*ids, *text[:-1]]]))[0, len(ids)-1:].topk(2).values
    ties = [i for i,m in enumerate((top[:, 0] - top[:, 1]).tolist()) if m < margin]
    return list(zip([0, *(i+1 for i in ties)], [*ties, len(text)]))

@on_gpu
@pytest.mark.parametrize('geometry', ['lut-b', 'int8'])
def test_greedy_text_is_jaxs_on_a_gpu(packs, geometry):
    path, want = packs[0]/f'stdlib-{geometry}', packs[1][f'stdlib-{geometry} text'].astype(int).tolist()
    model, tok = opened(path, True, 'cuda', torch.float16)
    ids, stretches = [int(i) for i in tok.encode(PROMPT)], []
    for begin,end in between_ties(path, ids, want):
        assert list(generate(Decoder(model, graph=True), [*ids, *want[:begin]], end-begin)) == want[begin:end]
        stretches.append(end-begin)
    assert sum(stretches) >= 126                                        # of 128: a tie or two

@on_gpu
@pytest.mark.parametrize('name', ['int8', 'lut-b', 'published'])
def test_recorded_batches(packs, name):
    model = from_pack(packs[0]/name, 'cuda', torch.bfloat16)
    texts = [[[] for _ in range(20)] for _ in range(2)]
    for wrote,graph in zip(texts, (False, True)):
        for i,token in generate_batch(BatchDecoder(model, 8, graph=graph), many()): wrote[i].append(token)
    same = sum(a == b for a,b in zip(*texts))
    assert same >= 15, f"{same} of 20 texts are the same"   # a graph has other numbers of rows than the prefill of a single text: near ties
