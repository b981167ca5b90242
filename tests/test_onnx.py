"`nativebit export --to onnx`: what onnxruntime computes is what transformers computes, for each family, with a cache, side by side, and in windows; what goes wrong is one sentence."
import json, sys
import numpy as np, pytest
from nativebit.interop.families import FAMILIES
from nativebit.pipelines.exporting import export_onnx_folder, main as export_main
from nativebit.pipelines.opening import opened
from nativebit.utils.cli import UserError
from processes import run

torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
from nativebit.interop.to_onnx import DATA, MODEL, OnnxNetwork, onnx
from test_convert import random_transformer

ROPE3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16, rope_theta=10000.)
CASES = {
    'llama': ('Llama', dict()), 'llama biases': ('Llama', dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)), 'llama 3': ('Llama', dict(rope_parameters=ROPE3, head_dim=24, num_key_value_heads=1)),
    'mistral': ('Mistral', dict(sliding_window=8, head_dim=16)), 'qwen2': ('Qwen2', dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)), 'qwen3': ('Qwen3', dict(head_dim=16, tie_word_embeddings=True)),
}
TOKENS = np.random.default_rng(0).integers(0, 80, (2, 24))

def exported(tmp_path, kind='Llama', **settings):
    "A random model of transformers, and the folder it was exported to."
    for n in ('onnx', 'onnxruntime'): pytest.importorskip(n)
    folder = random_transformer(kind, tmp_path/'theirs', **settings)
    return folder, export_onnx_folder(opened(folder), tmp_path/'onnx')

@pytest.mark.parametrize('case', CASES)
def test_logits(tmp_path, case):
    "Two texts, the second filled up on the left: all at once, and in three steps with the cache."
    kind, settings = CASES[case]
    folder, out = exported(tmp_path, kind, **settings)
    mask = np.ones_like(TOKENS); mask[1, :7] = 0
    places = np.maximum(mask.cumsum(1) - 1, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()
    with torch.no_grad(): want = model(torch.tensor(TOKENS), attention_mask=torch.tensor(mask), position_ids=torch.tensor(places)).logits.numpy()
    net, real = OnnxNetwork(out, threads=1), mask[..., None] == 1
    onnx().checker.check_model(str(out/MODEL), full_check=True)
    whole = net.step(TOKENS, mask)
    net.reset()
    steps = np.concatenate([net.step(TOKENS[:, a:b], mask[:, :b]) for a,b in ((0, 15), (15, 16), (16, 24))], 1)
    for got in (whole, steps): assert abs((got - want)*real).max() < 1e-4*abs(want).max()

def test_every_family_is_tested(): assert {kind.lower() for kind,_ in CASES.values()} == set(FAMILIES)

def test_names_are_those_of_others(tmp_path):
    out = exported(tmp_path)[1]
    names = lambda xs: [x.name for x in xs]
    session = OnnxNetwork(out).session
    cache = [f'{i}.{k}' for i in (0, 1) for k in ('key', 'value')]
    assert names(session.get_inputs()) == ['input_ids', 'attention_mask', 'position_ids', *(f'past_key_values.{c}' for c in cache)]
    assert names(session.get_outputs()) == ['logits', *(f'present.{c}' for c in cache)]
    assert {d: s for d,s in zip('BNSH', session.get_inputs()[3].shape)} == dict(B='batch_size', N=2, S='past_sequence_length', H=8)
    assert json.loads((out/'genai_config.json').read_text())['model']['eos_token_id'] == 2

def test_what_goes_wrong(tmp_path):
    "One sentence each, and nothing is left."
    folder, out = exported(tmp_path)
    command = '-m', 'nativebit', 'export', folder, '--to', 'onnx', '--out'
    full = run(*command, tmp_path/'full', limit=20_000)
    assert full.returncode == 1 and full.stderr.startswith('error: cannot write') and full.stderr.count('\n') == 1, full.stderr
    with pytest.raises(UserError, match='exists and is not empty'): export_main(str(folder), 'onnx', str(out))
    with pytest.raises(UserError, match='cannot write'): export_main(str(folder), 'onnx', str(out/MODEL/'x'))
    with pytest.raises(UserError, match='has one type only'): export_main(str(folder), 'onnx', str(tmp_path/'x'), dtype='float16')
    model, whole = onnx().load(str(out/MODEL), load_external_data=False), (out/MODEL).read_bytes()
    model.opset_import[0].version = 99   # of a time to come
    (out/MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="^onnxruntime .* can't open .*update it"): OnnxNetwork(out).session
    (out/MODEL).write_bytes(whole)
    (out/DATA).write_bytes((out/DATA).read_bytes()[:-100])
    with pytest.raises(UserError, match='copy or export it again'): OnnxNetwork(out)
    for n in (10, 1000, 5000):
        (out/MODEL).write_bytes((out/MODEL).read_bytes()[:-n])
        with pytest.raises(UserError, match='is damaged|again'): OnnxNetwork(out)
    (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | dict(model_type='gpt2', architectures=['GPT2LMHeadModel'])))
    with pytest.raises(UserError, match="type 'gpt2', which is not supported"): export_main(str(folder), 'onnx', str(tmp_path/'x'))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['onnx', 'theirs']

@pytest.mark.parametrize('name', ['onnx', 'onnxruntime'])
def test_without_a_package(tmp_path, monkeypatch, name):
    folder = random_transformer('Llama', tmp_path/'theirs')
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='pip install onnx onnxruntime'): export_main(str(folder), 'onnx', str(tmp_path/'x'))
    assert not (tmp_path/'x').exists()
