#!/usr/bin/env python3
"""Time nanoGPT's train step the way `python -m nativebit speed` times ours: same GPU, same batch, same count of operations.

usage: bench_nanogpt.py FOLDER_WITH_model.py OUT.jsonl [BATCH]     (needs PyTorch with CUDA)

124M preset, bf16 autocast, torch.compile, fused AdamW, gradient clip 1.0: the settings of nanoGPT's train_gpt2 configuration,
without its gradient accumulation. Windows of 20 steps, the median is reported. Operations: 6 for each weight of a matrix product
and token, and causal attention's 6·L·T·D."""
import json, statistics, sys, time
import torch

folder, out, B = sys.argv[1], sys.argv[2], int((sys.argv[3:] or [32])[0])
sys.path.insert(0, folder)
from model import GPT, GPTConfig

torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
cfg = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0., bias=False)
model = GPT(cfg).cuda()
opt = model.configure_optimizers(.1, 6e-4, (.9, .95), 'cuda')
net = torch.compile(model)
x, y = torch.randint(0, 50257, (2, B, cfg.block_size), device='cuda')

def step():
    with torch.autocast('cuda', torch.bfloat16): loss = net(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    opt.step(); opt.zero_grad(set_to_none=True)

def window(n):
    torch.cuda.synchronize(); start = time.time()
    for _ in range(n): step()
    torch.cuda.synchronize(); return 1000*(time.time()-start)/n

window(10)
times = [window(20) for _ in range(5)]
ms, tokens = statistics.median(times), B*cfg.block_size
weights = sum(p.numel() for n,p in model.named_parameters() if p.ndim == 2 and 'wpe' not in n)   # the head is the embedding
flops = (6*weights + 6*cfg.n_layer*cfg.block_size*cfg.n_embd)*tokens
row = dict(step='nanogpt', config='124M', batch=B, ms=round(ms, 2), ms_spread=[round(min(times), 2), round(max(times), 2)], tokens_per_s=round(1000*tokens/ms),
           tflops=round(flops/ms/1e9, 1), peak_gib=round(torch.cuda.max_memory_allocated()/2**30, 1), device=torch.cuda.get_device_name(), torch=torch.__version__)
print(json.dumps(row))
with open(out, 'a') as f: f.write(json.dumps(row) + '\n')
