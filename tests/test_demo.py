"The demo on one layer of its checkpoint, with two steps on little text."
import json, pytest
from pathlib import Path
import nativebit.demo as demo
from safetensors.numpy import load_file, save_file
from nativebit.config import get_config

def one_layer(folder):
    "The shipped checkpoint without all layers but the first."
    (folder/'stdlib').mkdir()
    keep = lambda n: not n.startswith('layers.') or n.startswith('layers.0.')
    save_file({n: x for n,x in load_file(demo.DATA/'stdlib'/'model.safetensors').items() if keep(n)}, folder/'stdlib'/'model.safetensors')
    meta = json.loads((demo.DATA/'stdlib'/'meta.json').read_text())
    meta['config']['model']['n_layers'] = 1
    (folder/'stdlib'/'meta.json').write_text(json.dumps(meta))
    return folder

@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'DATA', one_layer(tmp_path))
    monkeypatch.setattr(demo, 'get_config', lambda name, **kw: get_config(name, n_layers=1, **kw))
    demo.main(out=str(tmp_path/'demo'), max_steps=2, max_tokens=2048)
    out = capsys.readouterr().out
    assert '| nativebit_qat |' in out
    rows = json.loads((tmp_path/'demo'/'results.json').read_text())
    kl = {row['method']: row['kl'] for row in rows}
    assert list(kl) == ['float', 'float_control', 'rtn', 'kmeans', 'gptq', 'nativebit_qat', 'packed']
    qat, packed = rows[-2:]
    file = tmp_path/'demo'/'nativebit_qat'/'model.nbpack.safetensors'
    assert (packed['val_ppl'], packed['test_ppl'], packed['kl']) == (qat['val_ppl'], qat['test_ppl'], qat['kl'])
    assert packed['bytes'] == file.stat().st_size and 'whole file' in out and 'class Stack' in out
    assert abs(kl['float']) < 1e-5 < min(kl[m] for m in ('rtn', 'kmeans', 'gptq', 'nativebit_qat'))   # who is better, one layer of five does not say
    for f in ('demo.png', 'sample.txt', 'nativebit_qat/log.jsonl', 'float_control/model.safetensors'): assert (tmp_path/'demo'/f).stat().st_size > 0
    log = [json.loads(l) for l in (tmp_path/'demo'/'nativebit_qat'/'log.jsonl').read_text().splitlines()]
    assert [r.get('type') for r in log] == ['header', 'init_eval', None, 'eval']
    assert {'schema_version', 'git_hash', 'argv', 'config', 'init_from'} <= set(log[0]) and {'val_ppl', 'val_loss', 'val_batches'} <= set(log[1])
    assert {'step', 'loss', 'perplexity', 'quant_err_rms', 'cb_utilization', 'dead_frac'} <= set(log[2]) and 'test_ppl' in log[3]
