"""One process of several that load a packed folder with vLLM's own classes, on a CPU and without vLLM's compiled files.

Usage: vllm_rank.py RANK RANKS FOLDER STORE OUT. It compares each matrix with its part of the looked-up whole and writes the logits of a text."""
import os, sys
os.environ.update(VLLM_LOGGING_LEVEL='ERROR', HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1')
import numpy as np, torch
import vllm.platforms as platforms
from vllm.platforms.cpu import CpuPlatform
platforms._current_platform = CpuPlatform()
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from nativebit.formats.hf_folder import open_folder
from nativebit.serving.vllm import PackedConfig, laid_block, register

FUSED = dict(qkv_proj=['q_proj', 'k_proj', 'v_proj'], gate_up_proj=['gate_proj', 'up_proj'])

def without_compiled_files():
    "vLLM's operator of this name is looked up and never called; attention is PyTorch's, all tokens being one text."
    global ops
    if not hasattr(torch.ops._C, 'silu_and_mul'):
        ops = torch.library.Library('_C', 'FRAGMENT')
        ops.define('silu_and_mul(Tensor! out, Tensor x) -> ()')
    def attend(self, q, k, v, *args, **kw):
        q, k, v = (x.view(len(x), -1, self.head_size).transpose(0, 1)[None] for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y[0].transpose(0, 1).reshape(q.shape[2], -1)
    Attention.forward = attend

def part_of(w, sizes, columns, rank, ranks):
    "A rank's rows and columns of a looked-up matrix, spelled out once more."
    (o, i), n = w.shape, sizes
    row = rank*o//(ranks*n)*n if n < o else 0
    column = rank*columns if columns < i else 0
    return w[row:row + n, column:column + columns]

def compare(model, folder, rank, ranks):
    "Every weight of every packed matrix of this rank."
    seen = set()
    for name, layer in model.named_modules():
        if not hasattr(layer, 'packed') or not hasattr(layer, 'quant_method'): continue
        head, _, last = name.rpartition('.')
        parts = [f'{head}.{p}' for p in FUSED.get(last, [last])]
        held = torch.cat([m.dense(torch.float32).weight for m in layer.packed]).numpy()
        first = 0
        for P, n in zip(parts, layer.output_partition_sizes):
            columns = getattr(layer, 'input_size_per_partition', layer.input_size)
            want = part_of(folder.tensor(P).dequantize(), n, columns, rank, ranks)
            np.testing.assert_allclose(held[first:first + n], want, rtol=3e-7, atol=0)   # a factor of float8's scales is not exact
            if folder.quant.of(P).codebook_dtype != 'float8_e4m3': assert np.array_equal(held[first:first + n], want), P
            first += n; seen.add(P)
        assert first == len(held)
    assert seen == set(folder.linears), set(folder.linears) - seen
    for P in folder.rows:
        m = model.get_submodule(P)
        table = m.quant_method.embedding(m, torch.arange(len(m.weight))).float().numpy()
        want = torch.from_numpy(folder.float_tensor(f'{P}.weight')).bfloat16().float().numpy()
        assert np.array_equal(table, want[rank*len(table):(rank + 1)*len(table)]), P

def main(rank, ranks, path, store, out):
    register(); register()   # as vLLM may
    torch.set_num_threads(1)
    without_compiled_files()
    cfg = EngineArgs(model=path, skip_tokenizer_init=True, dtype='bfloat16', enforce_eager=True, tensor_parallel_size=ranks,
                     compilation_config=dict(custom_ops=['none'])).create_engine_config()
    packed = cfg.model_config.quantization == 'nativebit'
    assert isinstance(cfg.quant_config, PackedConfig) == packed
    with set_current_vllm_config(cfg):
        init_distributed_environment(ranks, rank, f'file://{store}', rank, 'gloo')
        initialize_model_parallel(ranks)
        model = get_model(vllm_config=cfg)
        if packed: compare(model, open_folder(path), rank, ranks)
        with torch.no_grad(), set_forward_context(None, cfg):
            logits = model.compute_logits(model(torch.arange(3, 27), torch.arange(24)))
    if rank == 0: np.save(out, logits.float().numpy())

if __name__ == '__main__': main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
