"""What `make gpu-check` needs beside the programs of the README, in the folder it is called in:
gpu_parts.py inputs              write book.txt and model/, a Llama in random weights
gpu_parts.py text FOLDER         let transformers load a folder and continue a text
gpu_parts.py logits FOLDER MODEL are a packed folder's logits in PyTorch JAX's, to a thousandth?
gpu_parts.py bits GEOMETRY…       does a geometry hold, bit for bit, what is evaluated here? bits-GEOMETRY.json says so"""
import json, os, sys
from pathlib import Path
import numpy as np

LLAMA = dict(vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, bos_token_id=None, eos_token_id=0)

def inputs():
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from nativebit.data.tokenizers import EOT, train_tokenizer
    text = '\n\n'.join(p.read_text(errors='replace') for p in sorted(Path(os.__file__).parent.glob('*.py')))[:1_500_000]
    Path('book.txt').write_text(text)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype='bfloat16').save_pretrained('model')
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], LLAMA['vocab_size']).tok, eos_token=EOT).save_pretrained('model')

def text(folder):
    import nativebit.hf
    from transformers import pipeline
    pipe = pipeline('text-generation', folder, max_new_tokens=16)
    print(pipe.device, pipe.model.dtype, pipe('def ')[0]['generated_text'])

def jax_logits(folder, source, tokens):
    import jax
    from nativebit.models.checkpoint import fit_params
    from nativebit.interop.convert import open_model
    from nativebit.formats.size import param_shapes
    from nativebit.models.transformer import model_shapes, network
    from nativebit.formats.hf_folder import open_folder
    from nativebit.interop.export import folder_reader
    model = open_model(source).model
    read = folder_reader(open_folder(folder), model)
    params = fit_params({n: read(n) for n,_ in param_shapes(model)}, model_shapes(model))
    run = jax.jit(lambda params, tokens: network(model, params)(tokens))
    with jax.default_matmul_precision('highest'): return np.asarray(run(params, tokens))

def logits(folder, source):
    import torch, nativebit.hf
    from transformers import AutoModelForCausalLM
    tokens = np.random.default_rng(0).integers(0, LLAMA['vocab_size'], (2, 64))
    with torch.no_grad(): theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(tokens)).logits.numpy()
    off = abs(jax_logits(folder, source, tokens) - theirs).max()/abs(theirs).max()
    print(f"furthest apart: {off:.1e} of the largest logit")
    sys.exit(int(not off < 1e-3))

def same_bits(a, b): return a.shape == b.shape and np.asarray(a, np.float32).tobytes() == np.asarray(b, np.float32).tobytes()

def trained(folder, start=None, **settings):
    "A small run of a few steps: its config and its last state."
    from nativebit.train.states import RunStates
    from nativebit.config import get_config
    from nativebit.train.step import state_shapes
    from nativebit.train.loop import train
    cfg = get_config('tiny', n_layers=1, d_model=128, d_ff=256, n_heads=4, dataset='text:book.txt', warmup_steps=1, lr=3e-3, max_steps=4, save_every=4, val_batches=1, test_tokens=256, **settings)
    train(cfg, folder, start)
    states = RunStates(folder/'state')
    return cfg, states.restore(state_shapes(cfg), states.latest)

def file_holds_evaluated(geometry, start):
    "After training: does the packed file, read with NumPy, hold what evaluation computes with?"
    from nativebit.utils.cli import UserError
    from nativebit.utils.pytree import leaf_names
    from nativebit.ptq.pack import pack_checkpoint
    from nativebit.formats.nbpack import read_pack
    from nativebit.train.step import eval_params
    folder = Path(f'bits-{geometry}')
    cfg, state = trained(folder, start, recipe='qat', geometry=geometry)
    try: held = read_pack(pack_checkpoint(folder, folder/'one.nbpack.safetensors', 'float32')).weights()
    except UserError as e: print(f"{geometry}: {e}"); return False
    evaluated = leaf_names(eval_params(state, cfg))
    if bad := [n for n in held if not same_bits(evaluated[n], held[n])]: print(f"{geometry}: the file and evaluation differ in {len(bad)} of {len(held)} arrays, such as {bad[0]}")
    return not bad

def projected_as_on_cpu(geometry):
    "Inside one compiled function, does this device round random codebooks as a CPU does?"
    import jax
    from nativebit.quant.codebook import project
    from nativebit.config import QuantConfig, GEOMETRIES
    quant, rng = QuantConfig(**GEOMETRIES[geometry]), np.random.default_rng(0)
    cb = np.sort(rng.standard_normal((8192, quant.n_entries))*np.exp(rng.uniform(-12, 3, (8192, 1)))).astype(np.float32)
    there = lambda device: np.asarray(jax.jit(project, static_argnums=1)(jax.device_put(cb, device), quant.codebook_dtype))
    here, cpu = there(jax.devices()[0]), there(jax.devices('cpu')[0])
    if not same_bits(here, cpu): print(f"{geometry}: project differs from a CPU's in {(here != cpu).sum()} of {cb.size} entries, by {abs(here-cpu).max():.1e} at most")
    return same_bits(here, cpu)

def bits(*geometries):
    from nativebit.config import geometry_name
    start = Path(f'bits-{geometries[0]}')/'float'
    trained(start, nativebit=False)
    same = {g: all([file_holds_evaluated(g, start), projected_as_on_cpu(g)]) for g in geometries}
    for g,ok in same.items(): Path(f'bits-{geometry_name(g)}.json').write_text(json.dumps(ok))
    print(same)
    sys.exit(int(not all(same.values())))

if __name__ == '__main__': dict(inputs=inputs, text=text, logits=logits, bits=bits)[sys.argv[1]](*sys.argv[2:])
