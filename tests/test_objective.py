"What a step minimises, against NumPy in float64; who moves what; and that every setting of a training does what it says."
import math
from dataclasses import asdict, fields, replace
from functools import cache
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from nativebit.train import init as start, step
from nativebit.models.attention import causal_attention
from nativebit.models.checkpoint import save_checkpoint
from nativebit.config import Config, QuantConfig, StepConfig, TrainConfig, get_config
from nativebit.utils.pytree import leaf_names
from nativebit.evaluation.perplexity import compare
from nativebit.ptq.gptq import refit_codebook
from nativebit.quant.linear import learn_layer, start_layer
from nativebit.models.transformer import forward_fn, init_model
from nativebit.train.init import init_state
from nativebit.train.distillation import _in_a_kernel, _in_passes, distillation, mixture_loss
from nativebit.train.step import first_state, lambda_at, loss_fn, make_step, structure
from nativebit.train.loop import fit, load_tokens, train, training_data

SMALL = dict(n_layers=1, d_model=16, n_heads=2, d_ff=16, context_len=8, block_shape=(1, 16), batch_size=4)   # one shape of matrix: two dozen steps are compiled

@pytest.fixture(scope='module', autouse=True)
def compiled_fast():
    "On a CPU, where equal sums are equal bits, and without the optimizations that take longer than these steps."
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    with jax.default_device(jax.devices('cpu')[0]): yield
    jax.config.update('jax_disable_most_optimizations', before)

def small(**settings): return get_config('tiny', **{**SMALL, **settings})
def arrays(tree): return {n: np.asarray(x, np.float64) for n,x in leaf_names(tree).items()}
def matrix(seed, *shape): return np.random.default_rng(seed).standard_normal(shape)
def tokens(seed, B=4, T=8, V=256): return np.random.default_rng(seed).integers(0, V, (B, T+1)).astype(np.int32)

# the terms of the loss, in NumPy

def log_softmax(x): return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)

def nearest(w, cb, width):
    "Every weight's nearest entry; blocks lie along the rows."
    b = w.reshape(-1, width)
    return np.take_along_axis(cb, np.abs(b[..., None] - cb[:, None]).argmin(-1), 1).reshape(w.shape)

D, HEAT, MATCH = .3, 2.5, .7   # no factor is 1 and no two are alike

def reference(logits, hidden, aim, aim_hidden, y, HEAT=HEAT):
    "(loss, its parts, its gradients) of the mixture, all of it written down."
    n, hot = y.size, np.eye(logits.shape[-1])[y]
    p, q, lq = np.exp(log_softmax(aim/HEAT)), np.exp(log_softmax(logits/HEAT)), log_softmax(logits)
    ce = -(hot*lq).sum()/n
    kl = HEAT**2*(p*(log_softmax(aim/HEAT) - log_softmax(logits/HEAT))).sum()/n
    size = (aim_hidden**2).sum(-1, keepdims=True)
    apart = ((hidden - aim_hidden)**2/size).sum()/n
    grads = dict(logits=(1-D)*(np.exp(lq) - hot)/n + D*HEAT*(q - p)/n, hidden=MATCH*2*(hidden - aim_hidden)/size/n)
    return (1-D)*ce + D*kl + MATCH*apart, dict(loss=ce, distill=kl, match=apart), grads

@pytest.mark.parametrize('heat', [HEAT, 1.])
def test_every_term_of_the_loss_is_numpys(heat):
    student, teacher = [dict(logits=3*matrix(s, 4, 8, 32), hidden=matrix(s+1, 4, 8, 16)) for s in (0, 2)]
    want, parts, want_grads = reference(*student.values(), *teacher.values(), tokens(0, V=32)[:, 1:], heat)
    cfg, forward = small(distill_weight=D, distill_temperature=heat, match_weight=MATCH), lambda params, *_, **__: (params['logits'], params['hidden'])
    single = [jax.tree.map(jnp.float32, x) for x in (student, teacher)]
    grads, metrics = jax.grad(loss_fn, has_aux=True)(single[0], None, tokens(0, V=32), None, single[1], cfg, forward)
    loss, _ = loss_fn(single[0], None, tokens(0, V=32), None, single[1], cfg, forward)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for n in parts: np.testing.assert_allclose(metrics[n], parts[n], rtol=1e-5, err_msg=n)
    for n in want_grads: np.testing.assert_allclose(grads[n], want_grads[n], rtol=1e-3, atol=1e-7, err_msg=n)

def mixture(aim, logits, y, share):
    "(cross-entropies, KL, what is added and what is subtracted in the gradient of the mean mixture) in float64."
    lp, lq = [log_softmax(np.asarray(x, np.float64)) for x in (aim, logits)]
    hot = np.eye(lq.shape[-1])[y]
    return -(hot*lq).sum(-1), (np.exp(lp)*(lp - lq)).sum(-1), np.exp(lq)/y.size, (share*np.exp(lp) + (1-share)*hot)/y.size

@pytest.mark.parametrize('V, W, size, share', [(257, 384, 3, .3), (97, 97, 1, 1.), (128, 256, 60, 1.), (1000, 1024, 3, 0.)])   # 60: one token has it all
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_mixture_ignores_what_is_no_token(V, W, size, share, dtype):
    aim, noise, y = size*matrix(0, 2, 3, W), .3*size*matrix(1, 2, 3, W), np.random.default_rng(2).integers(0, V, (2, 3))
    aim, logits = [jnp.asarray(x, dtype).at[..., V:].set(99) for x in (aim, aim + noise)]
    ce, kl, up, down = mixture(aim[..., :V], logits[..., :V], y, share)
    value_and_grad = jax.value_and_grad(lambda z: (lambda loss, *parts: (loss, parts))(*mixture_loss(aim, z, jnp.asarray(y), share, V)), has_aux=True)
    (loss, parts), back = jax.jit(value_and_grad)(logits)
    np.testing.assert_allclose([loss, *parts], [(1-share)*ce.mean() + share*kl.mean(), ce.mean(), kl.mean()], rtol=1e-5, atol=1e-6)
    exact = 2e-6 + 2**-23*np.abs(logits[..., :V]).max()   # of an exponential of a float32 sum of such numbers
    rounded = 2**-8 if dtype == jnp.bfloat16 else 2**-24
    assert np.all(np.abs(np.float64(back[..., :V]) - (up - down)) <= exact*(up + down) + rounded*np.abs(up - down) + 1e-30)
    assert back.dtype == dtype and not np.any(back[..., V:])

@pytest.mark.parametrize('V, W, width, at_once', [(257, 384, 64, 2), (257, 384, 64, 4), (97, 97, 32, 1), (128, 256, 256, 2)])
def test_a_kernel_of_one_reading_says_what_passes_say(V, W, width, at_once):
    aim, logits = jnp.bfloat16(9*matrix(0, 2, 2, 3, W)).at[..., V:].set(99).at[..., 5].set(-jnp.inf)
    y = jnp.asarray(np.random.default_rng(2).integers(0, V, (2, 3)))
    one, passes = _in_a_kernel(aim, logits, y, .3, V, width, at_once, interpret=True), _in_passes(aim, logits, y, .3, V)
    for a,b,eps in zip(one, passes, (1e-6, 1e-6, 2**-8)): np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=eps, atol=1e-6)
    assert not np.any(one[2][..., V:])

def test_a_student_that_is_its_teacher_has_no_gradient():
    logits, y = jnp.bfloat16(9*matrix(0, 2, 3, 64)), jnp.zeros((2, 3), int)
    (_, _, kl), back = jax.vjp(lambda z: mixture_loss(logits, z, y, 1., 64), logits)
    assert kl == 0 and not np.any(back((jnp.float32(1), kl, kl))[0])

def test_a_softer_distillation_pulls_as_hard():
    "The factor T² of Hinton et al. 2015: for logits near each other the gradient does not depend on the temperature."
    aim = jnp.float32(matrix(0, 4, 8, 32))
    def pull(heat):
        cfg, forward = small(distill_weight=1., distill_temperature=heat), lambda params, *_, **__: (params['logits'], jnp.ones((4, 8, 1)))
        return jax.grad(loss_fn, has_aux=True)(dict(logits=1.01*aim), None, tokens(0, V=32), None, dict(logits=aim), cfg, forward)[0]['logits']
    one, soft = pull(20.), pull(40.)
    np.testing.assert_allclose(np.linalg.norm(soft), np.linalg.norm(one), rtol=.05)

def adamw(cfg, decayed):
    "AdamW on clipped gradients in float64, as a function of (weights, gradients, rates by name)."
    t, m, v, n = cfg.train, {}, {}, [0]
    def update(params, grads, rates):
        clip = min(1, t.clip_norm/math.sqrt(sum((g**2).sum() for g in grads.values())))
        n[0] += 1
        for k,g in grads.items():
            m[k], v[k] = .9*m.get(k, 0) + .1*clip*g, t.beta2*v.get(k, 0) + (1-t.beta2)*(clip*g)**2
            u = m[k]/(1-.9**n[0])/(np.sqrt(v[k]/(1-t.beta2**n[0])) + 1e-8) + t.weight_decay*params[k]*decayed(k)
            params = {**params, k: params[k] - rates(k)*u}
        return params
    return update

def test_steps_are_a_plain_adamw_on_the_whole_objective():
    cfg = small(max_steps=6, warmup_steps=2, lr=2e-3, lr_end=.3, weight_decay=.2, clip_norm=.3, beta2=.8,
                distill_weight=D, distill_temperature=HEAT, match_weight=MATCH, quant_reg_weight=.5, quant_reg_schedule='ramp', settle=.4)
    state, teacher, forward = first_state(cfg), init_model(small(nativebit=False), seed=1)[0], forward_fn(cfg)
    is_matrix = lambda n: '.attn.' in n or '.mlp.' in n
    quant, params, update = jax.tree.map(jnp.copy, state.quant_state), arrays(state.params), adamw(cfg, is_matrix)
    books = {n.removesuffix('codebook'): x for n,x in arrays(quant).items() if n.endswith('codebook')}
    def task(params, x, y):
        (logits, hidden), (aim, aim_hidden) = forward(params, x, quant, hidden=True), forward(teacher, x, hidden=True)
        lp, lq = jax.nn.log_softmax(aim/HEAT), jax.nn.log_softmax(logits/HEAT)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        apart = (((hidden - aim_hidden)**2).sum(-1)/(aim_hidden**2).sum(-1)).mean()
        return (1-D)*ce + D*HEAT**2*(jnp.exp(lp)*(lp - lq)).sum(-1).mean() + MATCH*apart
    grad, tree, take = jax.jit(jax.grad(task)), jax.tree.structure(state.params), make_step(cfg)
    for i,(lr, lam, moves) in enumerate(zip([0, .5, 1, 1-.7*(1-math.cos(math.pi/4))/2, 1-.7/2], [0, 1/6, 2/6, 3/6, 4/6], [1, 1, 1, 1, 0])):
        b = tokens(i)
        grads = arrays(grad(jax.tree.unflatten(tree, [jnp.float32(x) for x in params.values()]), b[:, :-1], b[:, 1:]))
        pulls = {p+'weight': params[p+'weight'] - nearest(params[p+'weight'], cb, 16) for p,cb in books.items()}
        for n,x in pulls.items(): grads[n] = grads[n] + .5*lam*2*x/len(books)
        state, metrics = take(state, b, i, teacher)
        np.testing.assert_allclose(metrics['quant_reg'], sum((x**2).sum() for x in pulls.values())/len(books), rtol=1e-4)
        np.testing.assert_allclose(metrics['grad_norm'], math.sqrt(sum((g**2).sum() for g in grads.values())), rtol=1e-4)
        before, params = params, update(params, grads, lambda n: 2e-3*lr*(moves if is_matrix(n) else 1))
        for n,x in arrays(state.params).items(): assert np.abs(x - params[n]).max() <= 1e-3*np.abs(params[n] - before[n]).max() + 1e-6, (i, n)

# the entries' own optimizer

def test_learned_entries_take_optaxs_adam():
    quant, w = QuantConfig(block_shape=(1, 16), codebook_lr=1.), jnp.float32(.02*matrix(0, 6, 32))
    layer, opt = start_layer(w, quant), optax.adam(1e-4, b1=.9, b2=.95)
    want, moments = layer['codebook'], opt.init(layer['codebook'])
    for t in range(1, 6):
        g = matrix(t, 6, 32)*10.**-t   # each much smaller than the last: bias and the second moment's memory show
        idx = np.abs(np.asarray(w).reshape(-1, 16)[..., None] - np.asarray(want)[:, None]).argmin(-1)
        summed = np.zeros(want.shape)
        np.add.at(summed, (np.arange(len(idx))[:, None], idx), g.reshape(idx.shape))
        update, moments = opt.update(jnp.float32(summed), moments)
        before, want = want, optax.apply_updates(want, update)
        layer = learn_layer(w, w, jnp.float32(g), layer, quant, 1e-4, t)
        np.testing.assert_allclose(layer['codebook'] - before, update, rtol=1e-3, atol=1e-8)
        assert (np.diff(want) > 0).all()   # the update alone keeps them sorted, so nothing else moved them

def test_the_first_step_moves_entries_by_their_learning_rate():
    cfg = small(codebook_lr=.5, warmup_steps=0, lr=1e-4, clip_norm=1e9)
    state = first_state(cfg)
    before = arrays(state.quant_state)
    after = arrays(make_step(cfg)(state, tokens(0), 0)[0].quant_state)
    moved = np.concatenate([np.abs(after[n] - x).ravel() for n,x in before.items() if n.endswith('codebook')])
    np.testing.assert_allclose(np.median(moved), .5e-4, rtol=1e-2)   # Adam's first step is the sign of the gradient

def rested(lams, cfg):
    "Codebooks, their moments and the other parameters after steps in which the matrices rest, at one λ after another."
    state, compiled = first_state(cfg), step._compiled_step(structure(cfg))
    for i,lam in enumerate(lams): state, metrics = compiled(state, tokens(i), None, 1e-3, lam, jax.random.key(i), 0.)
    return arrays(state.quant_state), arrays(state.params), float(metrics['grad_norm'])

def test_commitment_does_not_reach_learned_entries():
    "One compiled step, matrices at rest, clipping that does not bite: whatever λ is, every bit of the codebooks is the same."
    cfg = small(codebook_lr=.5, clip_norm=1e9, quant_reg_weight=1.)
    none, light, heavy = [rested([lam]*8, cfg) for lam in (0., 1., 100.)]
    assert none[2] < light[2] < heavy[2]   # it is there: the weights would follow it
    for other in (light, heavy):
        for n,x in none[0].items(): np.testing.assert_array_equal(other[0][n], x, err_msg=n)
        for n,x in none[1].items(): np.testing.assert_array_equal(other[1][n], x, err_msg=n)

def test_a_run_with_commitment_learns_the_entries_of_one_without():
    "The same of two whole configs, which are two programs and may round differently."
    def run(lam):
        cfg = small(codebook_lr=.5, clip_norm=1e9, settle=1., quant_reg_weight=lam, quant_reg_schedule='constant')
        state, take = first_state(cfg), make_step(cfg)
        for i in range(8): state, _ = take(state, tokens(i), i)
        return arrays(state.quant_state)
    without, start = run(0.), arrays(first_state(small(codebook_lr=.5)).quant_state)
    for n,x in run(10.).items():
        if n.endswith('codebook'): assert np.linalg.norm(x - without[n]) < 1e-3*np.linalg.norm(without[n] - start[n]), n

# what a number is of

def test_compare_is_kl_of_float_from_quantized_and_not_the_reverse():
    cfg = small(nativebit=False)
    teacher, student = [init_model(cfg, seed=s)[0] for s in (0, 1)]
    teacher = jax.tree.map(lambda x: 8*x, teacher)   # a sure teacher and a student that knows nothing
    text = tokens(0, 1, 48)[0]
    p, q = [log_softmax(np.asarray(forward_fn(cfg)(w, text[:-1].reshape(-1, 8)), np.float64)) for w in (teacher, student)]
    kl, reverse = (np.exp(p)*(p - q)).sum(-1), (np.exp(q)*(q - p)).sum(-1)
    assert abs(kl.mean()/reverse.mean() - 1) > .2
    got = compare(cfg, teacher, student, text)
    np.testing.assert_allclose([got['kl'], got['kl_p99'], got['top1']], [kl.mean(), np.quantile(kl, .99), (p.argmax(-1) == q.argmax(-1)).mean()], rtol=1e-4)

def test_distillation_is_kl_of_teacher_from_student():
    p, q = 3*matrix(0, 2, 3, 8), matrix(1, 2, 3, 8)
    np.testing.assert_allclose(distillation(jnp.float32(p), jnp.float32(q)), (np.exp(log_softmax(p))*(log_softmax(p) - log_softmax(q))).sum(-1), rtol=1e-5)

@pytest.mark.parametrize('block_shape', [(1, 16), (2, 16)])
def test_a_great_ridge_returns_the_old_entries(block_shape):
    quant, w, x = QuantConfig(block_shape=block_shape), jnp.float32(.02*matrix(0, 4, 32)), matrix(1, 64, 32)
    h, cb = jnp.float32(x.T @ x), start_layer(w, quant)['codebook']
    refit = lambda ridge: np.asarray(refit_codebook(w, h, w, cb, quant, ridge=ridge))
    np.testing.assert_allclose(refit(1e6), cb, rtol=1e-3, atol=1e-6)
    assert np.abs(refit(1e-3) - cb).max() > 1e-3   # with little ridge they go elsewhere

# two configs, two results

BASE = dict(max_steps=4, warmup_steps=1, clip_norm=.05, dropout=.1, beta2=.9, quant_reg_weight=5., quant_reg_schedule='constant', requantize_every=2,
            distill_weight=.5, distill_temperature=2., match_weight=.3, lr_end=.5)   # whatever can act does
CHANGES = dict(   # a value other than in BASE, with which the trained network is another
    dataset='text:other.txt', tokenizer='tokenizer.json', batch_size=2, max_steps=3, lr=1e-3, lr_end=.1, weight_decay=.5, warmup_steps=0,
    clip_norm=1e9, dropout=0., beta2=.5, quant_reg_weight=50., quant_reg_schedule='anneal', settle=.5, delay_quant_steps=2, distill_weight=.9, teacher='other',
    distill_temperature=.25, match_weight=.6, matrices_only=True, calibration_tokens=320, compute_dtype='bfloat16', attention='cudnn', seed=1)
SAME = dict(log_every=3, val_every=2, val_batches=1, save_every=2, save_minutes=.01, keep=1, test_tokens=20)   # the network is the same, bit for bit
ROUNDED = dict(accumulate=2, remat=True)                                                     # the same up to the order of additions
WITH = dict(calibration_tokens=dict(start='gptq', calibration_tokens=32), accumulate=dict(dropout=0.), remat=dict(dropout=0.))   # instead of BASE, on both sides

def test_every_field_is_in_one_table():
    tables = [*CHANGES, *SAME, *ROUNDED]
    assert sorted(tables) == sorted(f.name for f in fields(TrainConfig)), "a new field of TrainConfig: does it change the trained network or not?"

@pytest.fixture(scope='module')
def cwd(tmp_path_factory):
    "A folder with texts, a tokenizer and two float networks; and a machine on which 'cudnn' is an attention of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp('objective'))
        patch.setenv('NATIVEBIT_CACHE', str(folder/'cache'))
        patch.setitem(step.ATTENTION, 'cudnn', lambda q, k, v: causal_attention(2*q, k, v))
        patch.setattr(start, 'check_start', lambda *_: None)
        texts = dict(some='line {} of a small text that repeats itself', other='{} is a number and this is not')
        for n,line in texts.items(): (folder/f'{n}.txt').write_text('\n\n'.join(map(line.format, range(400))))
        words = Tokenizer(WordLevel({'<|endoftext|>': 0, 'line': 1, 'of': 2, 'a': 3, 'text': 4}, unk_token='<|endoftext|>'))
        words.pre_tokenizer = Whitespace()
        words.save(str(folder/'tokenizer.json'))
        for seed,n in enumerate(('float', 'other')):
            save_checkpoint(folder/n, cfg := small(nativebit=False), jax.tree.map(lambda x: 2*x, init_model(cfg, seed=seed)[0]))
        yield folder

def config(**settings): return small(**{'dataset': 'text:some.txt', **BASE, **settings})

@cache
def network(cfg, steps=True):
    "Weights and codebooks after a run, or before it."
    tokens = load_tokens(cfg)
    state, teacher = init_state(cfg, 'float', tokens['train'])
    if steps: state = fit(cfg, state, training_data(cfg, tokens['train']), teacher=teacher)
    return arrays(state.params) | arrays(state.quant_state)

def trained(**settings): return network(config(**settings))

def distance(a, b):
    "How far two trained networks are apart, relative to how far the first came."
    far = {n: x for n,x in network(config(), steps=False).items() if not n.endswith(('.codebook', '.counts', '.sums', '.delta'))}
    return math.sqrt(sum(((a[n] - b[n])**2).sum() for n in far)/sum(((a[n] - x)**2).sum() for n,x in far.items()))

@pytest.mark.parametrize('field', CHANGES)
def test_another_value_another_network(cwd, field):
    common = WITH.get(field, {})
    assert distance(trained(**common), trained(**{**common, field: CHANGES[field]})) > 1e-3

@pytest.mark.parametrize('field', ROUNDED)
def test_another_way_to_the_same_network(cwd, field):
    common = WITH.get(field, {})
    assert distance(trained(**common), trained(**common, **{field: ROUNDED[field]})) < 1e-4

def test_what_is_only_reported_changes_no_bit(cwd):
    "One run with every field of SAME at another value, through the whole of `train`: states are saved, validations made, tests cut short."
    for name,settings in (('plain', {}), ('reported', SAME)): train(config(**settings), name, 'float')
    plain, reported = [(cwd/name/'model.safetensors').read_bytes() for name in ('plain', 'reported')]
    assert plain == reported
    assert len((cwd/'plain'/'log.jsonl').read_text()) != len((cwd/'reported'/'log.jsonl').read_text())

# what is compiled

class Noted(TrainConfig):
    "A config that notes which of its fields are read."
    def __getattribute__(self, name):
        if name in TrainConfig.__dataclass_fields__: read.add(name)
        return super().__getattribute__(name)
read = set()

def test_no_field_that_a_step_is_compiled_with_is_evened_out():
    "Two runs share a compiled step where `structure` says they are alike: every field that compiling reads must be kept apart."
    cfg = config()
    state, teacher = first_state(cfg), init_model(cfg, seed=1)[0]
    noted = Config(cfg.name, cfg.model, cfg.quant, Noted(**asdict(cfg.train)))
    read.clear()
    step._compiled_step.__wrapped__(noted).trace(state, tokens(0), teacher, 1e-3, 1., jax.random.key(0), 1.)
    assert {'clip_norm', 'weight_decay', 'beta2', 'dropout', 'distill_temperature', 'match_weight', 'accumulate', 'attention', 'compute_dtype'} <= read
    assert read <= {f.name for f in fields(StepConfig)}, "compiling reads what two runs that share a step may differ in"
    others = CHANGES | SAME | ROUNDED | dict(quant_reg_weight=0.)   # of λ compiling asks whether there is one; its value is passed at run time
    shared = {n for n in read if structure(replace(cfg, train=replace(cfg.train, **{n: others[n]}))) == structure(cfg)}
    assert not shared, f"runs that differ in {', '.join(shared)} would share a step"

def test_lambda_is_passed_at_run_time():
    light, heavy = config(quant_reg_weight=1.), config(quant_reg_weight=2.)
    assert structure(light) == structure(heavy) and [float(lambda_at(c, 3)) for c in (light, heavy)] == [1., 2.]
