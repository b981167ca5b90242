"Nothing lost, nothing wrong: identity, checksums, kills, locks, and inputs that make no sense."
import json, shutil
from pathlib import Path
import ml_dtypes, numpy as np, pytest
from safetensors.numpy import save_file
import nativebit.pipelines.quantize as quantizing
from nativebit.data.tokenizers import train_tokenizer
from nativebit.formats.hf_folder import linear_weight, open_folder
from nativebit.formats.size import param_shapes
from nativebit.interop.families import hf_names, model_config
from nativebit.pipelines.quantize import quantize
from nativebit.utils.cli import UserError

CONFIG = dict(architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=10000., hidden_act='silu', tie_word_embeddings=True)
TEXT = '\n\n'.join(f'{i} and {i} are {2*i}' for i in range(1500))

@pytest.fixture(scope='module')
def words(): return train_tokenizer([TEXT], 280)

def hub_model(folder, words, seed=0, change=lambda n, w: w, dtype=ml_dtypes.bfloat16):
    "A model of random weights, as the hub would hold it."
    folder.mkdir(exist_ok=True)
    (folder/'config.json').write_text(json.dumps(CONFIG))
    words.tok.save(str(folder/'tokenizer.json'))
    m, rng = model_config(CONFIG), np.random.default_rng(seed)
    weights = {hf_names(m)[n]: change(n, np.ones(s, np.float32) if len(s) == 1 else (.1*rng.standard_normal(s)).astype(np.float32)).astype(dtype) for n,s in param_shapes(m)}
    save_file(weights, folder/'model.safetensors')
    return folder

# ---- identity -----------------------------------------------------------------------------------------------

def stopped_behind(monkeypatch, name, calls=1):
    "Let a function of the pipeline end in Ctrl-C when it has done its work so many times."
    left, real = [calls], getattr(quantizing, name)
    def f(*args):
        real(*args); left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
    monkeypatch.setattr(quantizing, name, f)

def test_unfinished_work_is_of_these_weights(tmp_path, words, monkeypatch):
    hub_model(tmp_path/'m', words)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stopped_behind(m, 'store_layer'); quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    assert (tmp_path/'q.work'/'layer-0000.safetensors').exists()
    shutil.copytree(tmp_path/'m', tmp_path/'kept'); hub_model(tmp_path/'m', words, seed=1)
    with pytest.raises(UserError, match=r'q\.work holds work begun with other settings, weights or text \(weights\.model\.safetensors'): quantize(tmp_path/'m', tmp_path/'q', 'rtn')
    shutil.rmtree(tmp_path/'m')
    quantize(tmp_path/'kept', tmp_path/'q', 'rtn')   # the same weights elsewhere
    quantize(tmp_path/'kept', tmp_path/'whole', 'rtn')
    a, b = open_folder(tmp_path/'q'), open_folder(tmp_path/'whole')
    assert all(np.array_equal(linear_weight(a, P), linear_weight(b, P)) for P in b.linears)

def test_unfinished_work_is_of_this_text(tmp_path, words, monkeypatch):
    hub_model(tmp_path/'m', words); (tmp_path/'t.txt').write_text(TEXT); monkeypatch.setenv('NATIVEBIT_CACHE', str(tmp_path/'cache'))
    again = lambda: quantize(tmp_path/'m', tmp_path/'q', 'gptq', data=f"text:{tmp_path/'t.txt'}", calibration_tokens=64, test_tokens=64)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): stopped_behind(m, 'begin_work'); again()
    (tmp_path/'t.txt').write_text(TEXT.replace('and', 'plus'))
    with pytest.raises(UserError, match=r'other settings, weights or text \(text\.source'): again()
