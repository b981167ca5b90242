"Training in PyTorch: the loss falls where a frozen control's does not, gradients are JAX's, and the folder holds the matrices that were trained, bit for bit."
import copy, json
import pytest
torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')   # in the extra [hf]
from torch import nn
from nativebit.config import GEOMETRIES, QuantConfig
from nativebit.formats.hf_folder import open_folder
from nativebit.pytorch import NativeBitLinear, convert, distillation_loss, param_groups, quantize_
from nativebit.pytorch.qat import distillation, prepared
from nativebit.pytorch.quant import start_codebook
from nativebit.utils.cli import UserError
from test_hf import TOKENS, float_model, load, logits

torch.set_num_threads(1)   # the arrays here are small
GPU = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))

def windows(i): return torch.randint(64, (32, 12), generator=torch.Generator().manual_seed(i))

def trained(model, teacher, steps=30, lr=1e-3):
    "Losses under a teacher, on random text."
    opt, losses = torch.optim.AdamW(param_groups(model.train(), lr), betas=(.9, .95)), []
    for i in range(steps):
        x = windows(i).to(model.device)
        with torch.no_grad(): aim = teacher(x).logits
        loss = distillation_loss(aim, model(x).logits)
        for g in opt.param_groups: g['lr'] = lr*(1 - i/steps)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    return losses

@torch.no_grad()
def distance(model, teacher):
    x = windows(1000).to(model.device)
    return distillation_loss(teacher(x).logits, model.eval()(x).logits).item()

def rounded(model):
    "What stays in float as the folder has it."
    layers = prepared(model)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if n.rpartition('.')[0] not in layers or n.endswith('bias'): p.copy_(p.bfloat16())
    return model.eval()

def holds(path, model):
    "Does a folder hold a model's Q(w), bit for bit?"
    folder, layers = open_folder(path), prepared(model)
    return set(folder.linears) == set(layers) and all((folder.tensor(P).dequantize() == m.evaluated().cpu().numpy()).all() for P,m in layers.items())

@pytest.mark.parametrize('device', ['cpu', GPU])
@pytest.mark.parametrize('family, geometry', [('llama', '2bit'), ('tied', 'int8'), ('qwen2', 'lut-b')])
def test_it_learns_and_is_written(tmp_path, family, geometry, device):
    teacher = float_model(family).to(device)
    model = quantize_(copy.deepcopy(teacher), geometry)
    before = distance(model, teacher)                     # of the control, which keeps weights and entries
    losses = trained(model, teacher)
    assert distance(model, teacher) < .6*before and losses[-1] < .6*losses[0]
    assert all(len(m.evaluated()[0, :64].unique()) <= m.quant.n_entries for m in prepared(model).values())
    assert holds(convert(model, tmp_path/'a'), model)
    assert torch.equal(logits(load(tmp_path/'a')), logits(rounded(model).cpu())) or device == 'cuda'

def test_entries_alone_learn_less():
    teacher = float_model('llama')
    model = quantize_(copy.deepcopy(teacher), '2bit').requires_grad_(False)
    both = copy.deepcopy(model).requires_grad_(True)
    for m in prepared(model).values(): m.codebook.requires_grad_(True)
    before, weights = distance(model, teacher), [m.weight.clone() for m in prepared(model).values()]
    for m in (model, both): trained(m, teacher, steps=15)
    assert distance(both, teacher) < distance(model, teacher) < .95*before
    assert all(torch.equal(w, m.weight) for w,m in zip(weights, prepared(model).values()))

@pytest.mark.parametrize('family', ['mistral', 'biased', 'qwen3'])
@pytest.mark.parametrize('geometry', [*GEOMETRIES])
def test_every_geometry_is_written(tmp_path, family, geometry):
    model = quantize_(float_model(family), QuantConfig(**GEOMETRIES[geometry]))
    trained(model, float_model(family), steps=2)
    assert holds(convert(model, tmp_path/'a'), model)
    assert torch.equal(logits(load(tmp_path/'a')), logits(rounded(model)))

def test_every_head_for_itself_or_groups_of_them(tmp_path):
    for kv in (1, 2, 4):
        config = copy.deepcopy(float_model('llama').config)
        config.num_key_value_heads = kv
        torch.manual_seed(0)
        model = quantize_(transformers.AutoModelForCausalLM.from_config(config), 'int8')
        trained(model, copy.deepcopy(model), steps=1)
        assert holds(convert(model, tmp_path/str(kv)), model) and torch.equal(logits(load(tmp_path/str(kv))), logits(rounded(model)))

@pytest.mark.parametrize('geometry', ['int8', 'lut-b', '2bit'])
def test_gradients_are_jaxs(geometry):
    "Of entries: what JAX adds up over the blocks, its own assignment included; of weights: the gradient of Q(w)."
    jnp = pytest.importorskip('jax.numpy')
    from nativebit.quant.blocks import to_blocks
    from nativebit.quant.codebook import assign, hard_weight, project
    from nativebit.quant.codebook_gradient import codebook_gradient
    torch.manual_seed(0)
    layer, g = NativeBitLinear(200, 36, QuantConfig(**GEOMETRIES[geometry], start='kmeans')), torch.randn(36, 200)   # sides that are no multiples
    (q := layer.forward_weight()).backward(g)
    w, cb, quant = jnp.array(layer.weight.detach().numpy()), jnp.array(layer.entries.detach().numpy()), layer.quant
    idx = assign(to_blocks(w, quant.block_shape), project(cb, quant.codebook_dtype))
    theirs = codebook_gradient(to_blocks(jnp.array(g.numpy()), quant.block_shape), idx, quant.n_entries)
    assert (q.detach().numpy() == hard_weight(w, cb, quant)).all() and torch.equal(layer.weight.grad, g)
    assert abs(layer.codebook.grad.numpy() - theirs).max() < 1e-4

@pytest.mark.parametrize('temperature', [1., 2.])
def test_the_loss_is_jaxs(temperature):
    jax = pytest.importorskip('jax')
    from nativebit.train.distillation import distillation as theirs
    torch.manual_seed(0)
    y, z = 3*torch.randn(2, 5, 40), 3*torch.randn(2, 5, 40)
    loss = lambda z: theirs(y.numpy()/temperature, z/temperature).mean()*temperature**2
    want, grad = jax.value_and_grad(loss)(z.numpy())
    ours = distillation_loss(y, z.requires_grad_(), temperature)
    ours.backward()
    assert abs(ours.item() - want) < 1e-5 and abs(z.grad.numpy() - grad).max() < 1e-6
    assert distillation(y.bfloat16(), z.detach().bfloat16()).dtype == torch.float32

def test_the_filter_is_asked(tmp_path):
    asked, model = [], float_model('llama')
    quantize_(model, '2bit', lambda m, name: asked.append((type(m), name)) or name.endswith('down_proj'))
    assert {t for t,_ in asked} == {nn.Linear} and ('lm_head' in {n for _,n in asked})
    assert set(prepared(model)) == {f'model.layers.{i}.mlp.down_proj' for i in range(2)}
    quantize_(model, QuantConfig(**GEOMETRIES['lut-b'], overrides=[('*.k_proj', 'float'), ('*.0.*v_proj', '4bit')]))
    assert holds(convert(model, tmp_path/'a'), model) and torch.equal(logits(load(tmp_path/'a')), logits(rounded(model)))
    folder = open_folder(tmp_path/'a')
    assert folder.quant.of('model.layers.1.mlp.down_proj').n_entries == 4 and folder.quant.of('model.layers.0.self_attn.v_proj').n_entries == 16
    assert {'lm_head', 'model.layers.0.self_attn.k_proj'} <= set(folder.config['quantization_config']['modules_to_not_convert'])

def linear(*names, **kw):
    "A module of linear layers."
    return nn.ModuleDict({n: nn.Linear(8, 8, **kw) for n in names})

def shared(model):
    model['b'].weight = model['a'].weight
    return model

def spoiled(model, x):
    with torch.no_grad(): model['a'].weight[0, 0] = x
    return model

@pytest.mark.parametrize('model, config, says', [
    (linear('a'), 'lutb', "did you mean 'lut-b'?"), (linear('a'), 'float', 'unknown geometry'), (linear('a'), 8, 'config is 8'), (linear('a'), dict(GEOMETRIES['int8']), 'give the name of a geometry'), (linear('a'), None, 'config is None'),
    (linear('a'), QuantConfig(start='gptq'), "choose 'kmeans' or 'quantile'"), (linear('a'), QuantConfig(nativebit=False), 'nativebit=True'),
    (linear('lm_head'), 'int8', 'check filter_fn'), (nn.Linear(8, 8), 'int8', 'check filter_fn'), (quantize_(linear('a'), 'int8'), 'int8', 'it is prepared already'),
    (shared(linear('a', 'b')), 'int8', 'a shares its weight with b.weight'), (spoiled(linear('a'), float('nan')), 'int8', 'a.weight holds NaN'), (spoiled(linear('a'), float('inf')), 'int8', 'infinite')])
def test_mistakes_are_one_sentence(model, config, says):
    before = [*map(type, model.modules())]
    with pytest.raises(UserError) as e: quantize_(model, config)
    assert says in str(e.value) and '\n' not in str(e.value) and [*map(type, model.modules())] == before

def test_what_can_not_be_written(tmp_path):
    def refused(model, says, out='x'):
        with pytest.raises(UserError) as e: convert(model, tmp_path/out)
        assert says in str(e.value) and '\n' not in str(e.value)
    refused(float_model('llama'), 'call quantize_')
    refused(quantize_(linear('a'), 'int8'), 'this is a ModuleDict')
    for leaf in ('weight', 'codebook'):
        model = quantize_(float_model('llama'), 'int8')
        with torch.no_grad(): getattr(model.model.layers[1].mlp.up_proj, leaf)[0, 0] = torch.nan
        refused(model, f'model.layers.1.mlp.up_proj.{leaf} holds NaN')
    model = quantize_(float_model('llama'), QuantConfig(block_shape=(1, 32)), lambda m, n: 'q_proj' in n)
    refused(quantize_(model, 'int8'), 'has a geometry of its own')
    assert not (tmp_path/'x').exists()
    (tmp_path/'used').mkdir(); (tmp_path/'used'/'a').write_text('mine')
    refused(quantize_(float_model('llama'), 'int8'), 'is not empty', 'used')

def test_latent_weights_are_float32_and_nothing_else_is_copied():
    model = float_model('biased').to(torch.bfloat16)
    q = model.model.layers[0].self_attn.q_proj
    frozen = [p.requires_grad_(False) for p in (q.weight,)]
    quantize_(model, 'int8')
    new = model.model.layers[0].self_attn.q_proj
    assert new.weight.dtype == torch.float32 and not new.weight.requires_grad and new.bias is q.bias and frozen
    assert logits(model).dtype == torch.bfloat16
    float32 = float_model('llama')
    before = {n: p.data_ptr() for n,p in float32.named_parameters()}
    assert before.items() <= {n: p.data_ptr() for n,p in quantize_(float32, 'int8').named_parameters()}.items()
    twin = quantize_(float_model('llama'), 'int8').to(torch.bfloat16)     # cast afterwards: Q(w) of rounded weights, not of their bits
    for m in prepared(twin).values(): assert m.evaluated().dtype == torch.float32 and m.evaluated().isfinite().all()

@pytest.mark.parametrize('how', ['autocast', 'checkpointing', pytest.param('compiled', marks=pytest.mark.slow)])
def test_ways_of_training(how):
    teacher = float_model('llama')
    def gradients(how=''):
        model = quantize_(copy.deepcopy(teacher), 'int8').train()
        if how == 'checkpointing': model.gradient_checkpointing_enable()
        run = torch.compile(model, backend='aot_eager') if how == 'compiled' else model
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'): out = run(TOKENS, use_cache=False).logits
        distillation_loss(logits(teacher) + torch.arange(64)/16, out).backward()
        return {n: p.grad for n,p in model.named_parameters()}
    plain, other = gradients(), gradients(how)
    near = .2 if how == 'autocast' else 1e-4
    assert all(x.dtype == torch.float32 and (x - other[n]).norm() <= near*x.norm() + 1e-8 for n,x in plain.items())

def test_in_a_trainer(tmp_path):
    "The program of 11_pytorch/08_qat, a checkpoint of it, and the folder."
    pytest.importorskip('accelerate')
    teacher = float_model('tied').requires_grad_(False)
    class Taught(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kw):
            inputs.pop('labels', None)
            with torch.no_grad(): aim = teacher(**inputs).logits
            out = model(**inputs)
            loss = distillation_loss(aim, out.logits, mask=inputs['attention_mask'].bool())
            return (loss, out) if return_outputs else loss
    data = [dict(input_ids=x, attention_mask=torch.ones_like(x), labels=x) for i in range(16) for x in windows(i)]
    def trainer(model, steps):
        args = transformers.TrainingArguments(str(tmp_path/'run'), max_steps=steps, per_device_train_batch_size=32, save_steps=8, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100)
        return Taught(model, args, train_dataset=data, optimizers=(torch.optim.AdamW(param_groups(model, 1e-3), betas=(.9, .95)), None))
    new = lambda: quantize_(float_model('tied'), '2bit')
    trainer(model := new(), 16).train()
    assert distance(model, teacher) < .8*distance(new(), teacher)
    trainer(again := new(), 16).train(resume_from_checkpoint=str(tmp_path/'run'/'checkpoint-8'))
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters()))
    assert holds(convert(model, tmp_path/'a'), model)

def test_nativebit_reads_what_was_converted(tmp_path):
    "A folder without a tokenizer, through the project's own reader, and as one file."
    pytest.importorskip('jax')
    import nativebit as nb
    model = rounded(quantize_(float_model('qwen2'), 'lut-b'))
    m = nb.load(convert(model, tmp_path/'a'))
    assert abs(m.logits(TOKENS.numpy()) - logits(model).numpy()).max() < 1e-3
    assert nb.load(m.save(tmp_path/'a.safetensors')).bits_per_weight == m.bits_per_weight
    about = json.loads((tmp_path/'a'/'config.json').read_text())
    assert about['architectures'] == ['Qwen2ForCausalLM'] and about['dtype'] == 'bfloat16' and (tmp_path/'a'/'generation_config.json').exists()

def test_lloyd_is_what_it_says():
    "On sorted blocks, with running sums, no worse than by assigning every weight."
    b = torch.randn(20, 128).pow(3)
    got = start_codebook(b, QuantConfig(start='kmeans', block_shape=(1, 128)))
    slow = torch.quantile(b, torch.linspace(0, 1, 8), 1).T.contiguous()
    for _ in range(100):
        near = (b[..., None] - slow[:, None]).abs().argmin(-1)
        slow = torch.stack([torch.where((n := (near == k).sum(1)) > 0, torch.where(near == k, b, 0).sum(1)/n.clamp(min=1), slow[:, k]) for k in range(8)], 1)
    error = lambda cb: (b[..., None] - cb[:, None]).abs().min(-1).values.pow(2).mean()
    assert abs(error(got) - error(slow)) < 1e-3*error(slow)
