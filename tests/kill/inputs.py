"""Small inputs for every program that writes, and the commands: what is killed, and what must be there when it has been run again."""
import json, sys
from pathlib import Path
import numpy as np
sys.path[:0] = [str(Path(__file__).parents[1]/'fuzz')]
from readers import HF, gguf, packed_folder
from nativebit.__main__ import main
from nativebit.config import get_config
from nativebit.data.tokenizers import train_tokenizer
from nativebit.formats.size import param_shapes
from nativebit.interop.families import hf_names, model_config
from nativebit.utils.safetensors import save_arrays

TEXT = '\n\n'.join(f'{i} and {i} are {2*i}' for i in range(600))
TRAIN = '--config tiny --dataset text:t.txt --val-batches 1 --batch-size 2 --test-tokens 64'.split()
SETTINGS = 'max_steps=2 val_batches=1 batch_size=2 test_tokens=64 dataset=text:t.txt'

def hub_model(folder):
    "A model of random weights with its tokenizer, as the hub would hold it."
    folder.mkdir(); config = {**HF, 'vocab_size': 280, 'hidden_size': 32, 'intermediate_size': 48}
    (folder/'config.json').write_text(json.dumps(config))
    train_tokenizer([TEXT], 280).tok.save(str(folder/'tokenizer.json'))
    m, r = model_config(config), np.random.default_rng(0)
    save_arrays(folder/'model.safetensors', {hf_names(m)[n]: np.ones(s, np.float16) if len(s) == 1 else (.1*r.standard_normal(s)).astype(np.float16) for n,s in param_shapes(m)})

def checkpoint(folder, quantized):
    "A network of random weights, as a run leaves it; JAX is not started."
    from nativebit.models.checkpoint import save_checkpoint
    cfg, r = get_config('tiny', nativebit=quantized, n_layers=1, codebook_dtype='int8'), np.random.default_rng(0)
    w = {n: np.ones(s, np.float32) if len(s) == 1 else (.1*r.standard_normal(s)).astype(np.float32) for n,s in param_shapes(cfg.model)}
    books = {n.replace('.weight', '.codebook'): np.tile(np.linspace(-127, 127, 8).astype(np.float32)/512, (x.size//32, 1)) for n,x in w.items() if x.ndim == 2 and n != 'embed'}
    save_checkpoint(folder, cfg, w, books if quantized else None)

def make_inputs(folder:Path, quick:bool):
    "All inputs, in the current folder, or only what quick programs need, without JAX."
    (folder/'t.txt').write_text(TEXT); hub_model(folder/'m'); gguf(folder)
    for name, quantized in (('c', False), ('cq', True)): checkpoint(folder/name, quantized)
    if quick: return packed_folder(folder)
    main(['quantize', 'm', '--method', 'rtn', '--out', 'q'])
    main(['train', *TRAIN, '--max-steps', '4', '--save-every', '2', '--name', 'r'])

# name: command line, and whether it is quick enough (below a second of CPU time) for the sample of every `make test`
PROGRAMS = {
    'export': ('export q --out e', True),
    'export to one file': ('export q --to nbpack --out e.nbpack', True),
    'convert': ('convert m --out cm', True),
    'convert a GGUF file': ('convert x.gguf --out cg', True),
    'train a tokenizer': ('data text:t.txt --config stdlib-5m --train-tokenizer-to new.json', True),
    'prepare data': ('data text:t.txt --config tiny', True),
    'synthesize': ('synthesize c --tokens 160 --context-len 8 --out own', False),
    'quantize with its own text': ('quantize m --data self --geometry lut-b --calibration-tokens 256 --no-report --out qs', False),
    'pack': ('pack cq --out p.nbpack', False),
    'pack a float checkpoint': ('pack c --posthoc kmeans --out pc.nbpack', False),
    'quantize': ('quantize m --method kmeans --out qk', False),
    'quantize with a table': ('quantize m --method rtn --data text:t.txt --test-tokens 64 --out qd', False),
    'compare': ('compare m q --texts a=text:t.txt --max-tokens 64 --out cmp.jsonl', False),
    'evaluate': ('evaluate c --data text:t.txt --max-tokens 64 --out ev.jsonl', False),
    'kept': ('kept r', False),
    'plots': ('plots logs/r --out runs.png', False),
    'posthoc': ('posthoc --ckpt c --methods rtn,nf --dataset text:t.txt --max-tokens 64 --out rows.jsonl', False),
    'sweep': (['sweep', f'lr=1e-3,2e-3 save_every=1 {SETTINGS}', 's.jsonl', '--config', 'tiny'], False),
    'results': (['results', '--run', '--experiment', 'method=rtn,float', '--config', 'tiny', '--init-from', 'c', '--settings', f'n_layers=1 {SETTINGS}', '--out', 'res.jsonl'], False),
    'train': (['train', *TRAIN, '--max-steps', '4', '--save-every', '1', '--keep', '1', '--name', 'new', '--resume'], False),
}
