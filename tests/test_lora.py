"Adapters on packed models: gradients are the looked-up model's in either layout, they train, are saved and merged; what needs float matrices is refused."
import pytest
torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')   # in the extra [hf]
from peft import LoraConfig, get_peft_model
import nativebit.interop.transformers as hf
from nativebit.interop.lora import LINEARS, for_packed, merged, open_adapter
from nativebit.utils.cli import UserError
from test_hf import TOKENS, float_model, load, looked_up, packed as folder   # a fixture: a family's folder in a geometry

def adapted(model, packed=True, **kw):
    "The model with random adapters, the same each time."
    torch.manual_seed(0)
    config = LoraConfig(**dict(r=4, target_modules=LINEARS, task_type='CAUSAL_LM') | kw)
    model = get_peft_model(model, for_packed(config) if packed else config)
    with torch.no_grad():
        for n,p in sorted(model.named_parameters()):
            if 'lora_' in n: p.copy_(.1*torch.randn(p.shape))
    return model

def gradients(model, device='cpu'):
    model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss.backward()
    return {n: p.grad.float().cpu() for n,p in model.named_parameters() if p.grad is not None}

def alike(a, b, near=1e-4): return set(a) == set(b) and len(a) == 28 and all(torch.allclose(a[n], b[n], atol=near*float(b[n].abs().max()), rtol=0) for n in a)

@pytest.mark.parametrize('kernels', [False, True])
@pytest.mark.parametrize('family, geometry', [('biased', 'int8'), ('qwen2', 'lut-b'), ('qwen3', 'published')])
def test_gradients_are_those_of_the_looked_up_model(folder, monkeypatch, family, geometry, kernels):
    path = folder(family, geometry)
    want = gradients(adapted(looked_up(float_model(family), path), packed=False))
    if kernels: monkeypatch.setattr(hf, 'on_gpu', lambda x: True)   # laid out for them; the product is their reference
    model = load(path)
    with torch.inference_mode(): model(TOKENS)                       # looked up while text is written
    model = adapted(model)
    assert all((m.form is not None) == kernels for m in model.modules() if isinstance(m, hf.NativeBitHfLinear))
    assert alike(gradients(model), want)
    again = adapted(load(path)).train()
    again.gradient_checkpointing_enable(); again.enable_input_require_grads()
    assert alike(gradients(again), want)

@pytest.mark.parametrize('family, settings', [('tied', dict()), ('mistral', dict(target_modules='all-linear', use_rslora=True)), ('biased', dict(target_modules=['q_proj', 'v_proj'], bias='lora_only'))])
@pytest.mark.parametrize('kernels', [False, True])
def test_merged_is_what_was_trained(folder, tmp_path, monkeypatch, family, settings, kernels):
    if kernels: monkeypatch.setattr(hf, 'on_gpu', lambda x: True)
    model = adapted(load(folder(family)), **settings).eval()
    with torch.no_grad(): want, before = model(TOKENS).logits, load(folder(family))(TOKENS).logits
    assert (want - before).abs().max() > .01
    model.save_pretrained(tmp_path/'a')
    with torch.no_grad(): assert torch.allclose(open_adapter(load(folder(family)), tmp_path/'a').eval()(TOKENS).logits, want, atol=1e-5)
    merged(model).save_pretrained(tmp_path/'m')
    plain = load(tmp_path/'m')
    assert not any(isinstance(m, hf.NativeBitHfLinear) for m in plain.modules()) and not hasattr(plain.config, 'quantization_config')
    with torch.no_grad(): assert torch.allclose(plain(TOKENS).logits, want, atol=1e-4)

def test_peft_alone_can_merge_and_unload(folder):
    model = adapted(load(folder(), dtype=torch.bfloat16)).eval()
    with torch.no_grad(): want = model(TOKENS).logits
    plain = model.merge_and_unload()
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with torch.no_grad(): assert torch.allclose(plain(TOKENS).logits, want, atol=.1)
    again = adapted(load(folder()))
    assert isinstance(again.unload().model.layers[0].mlp.up_proj, hf.NativeBitHfLinear)

def test_the_trainer_takes_it(folder, tmp_path):
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments(tmp_path/'t', max_steps=8, per_device_train_batch_size=4, learning_rate=.02, report_to=[], logging_steps=1, use_cpu=True, save_strategy='no', disable_tqdm=True, gradient_checkpointing=True)
    rows = [dict(input_ids=x, labels=x) for x in TOKENS for _ in range(20)]
    trainer = Trainer(get_peft_model(load(folder()), for_packed(LoraConfig(r=4, task_type='CAUSAL_LM'))), args, train_dataset=rows)
    trainer.train()
    losses = [x['loss'] for x in trainer.state.log_history if 'loss' in x]
    assert losses[-1] < .7*losses[0]

@pytest.mark.parametrize('settings, what', [(dict(use_dora=True), 'use_dora'), *((dict(init_lora_weights=x), f"'{x}'") for x in ('pissa', 'olora', 'pissa_niter_4'))])
def test_what_needs_float_matrices_is_refused(settings, what):
    with pytest.raises(UserError, match=what): for_packed(LoraConfig(**settings))

def test_other_adapters_are_refused(folder, tmp_path):
    get_peft_model(float_model('llama'), peft.IA3Config(target_modules=['k_proj'], feedforward_modules=[], task_type='CAUSAL_LM')).save_pretrained(tmp_path/'ia3')
    with pytest.raises(UserError, match='adapters of kind IA3'): open_adapter(load(folder()), tmp_path/'ia3')
    with pytest.raises(UserError, match='holds no adapters'): open_adapter(load(folder()), tmp_path)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('family, geometry', [('llama', 'int8'), ('biased', 'lut-b'), ('qwen2', '2bit'), ('llama', 'published'), ('llama', 'int8-256')])
def test_on_a_gpu_gradients_are_near(folder, family, geometry):
    path = folder(family, geometry)
    want = gradients(adapted(looked_up(float_model(family), path).to('cuda', torch.bfloat16), packed=False), 'cuda')
    model = adapted(load(path, dtype=torch.bfloat16, device_map='cuda'))
    assert all(p.device.type == 'cuda' for p in model.parameters())
    assert alike(gradients(model, 'cuda'), want, .1)
    with torch.no_grad(): told = model.eval()(TOKENS.cuda()).logits
    with torch.no_grad(): assert torch.allclose(merged(model)(TOKENS.cuda()).logits, told, atol=.2, rtol=.05)
