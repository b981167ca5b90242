#!/usr/bin/env bash
# gguf 0.19.0 (GGUFReader): opening a file takes seconds for each hundred thousand strings in its header.
#
# Valid input: a GGUF file as the package's own writer makes it: no tensor, 50,000 tokens and as many merges.
#              Vocabularies of real models have 32,000 to 260,000 tokens, and about as many merges.
# Expected:    a fraction of a second; the header is two megabytes that lie one after the other.
# Seen:        the constructor makes several numpy memory-map objects for every single string, asked for or not, and there
#              is no way to leave the tokenizer out. A loop with struct over the same bytes is tens of times faster.
#              Tools that open a file twice (once for weights, once for the tokenizer) pay twice.
# Workaround:  read the header oneself, and leave dequantization to gguf.quants.
#
# Exit 0: the surprise is still there.  Exit 1: it is gone.  Exit 2: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 || exit 2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import struct, sys, time
import gguf
w = gguf.GGUFWriter('x.gguf', 'llama')
tokens, merges = [f'token{i}' for i in range(50_000)], [f'to ken{i}' for i in range(50_000)]
w.add_tokenizer_model('gpt2'); w.add_token_list(tokens); w.add_token_merges(merges)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

start = time.perf_counter()
theirs = gguf.GGUFReader('x.gguf').fields['tokenizer.ggml.tokens'].contents()
slow = time.perf_counter() - start

start = time.perf_counter()
data = open('x.gguf', 'rb').read()
at = 24                                             # magic, version, counts
def number(form):
    global at
    at += struct.calcsize(form)
    return struct.unpack_from(form, data, at - struct.calcsize(form))[0]
def text():
    global at
    n = number('<Q'); at += n
    return data[at-n:at].decode()
found = {}
for _ in range(struct.unpack_from('<Q', data, 16)[0]):
    key, kind = text(), number('<I')
    if kind == 8: found[key] = text()
    elif kind == 9 and number('<I') == 8: found[key] = [text() for _ in range(number('<Q'))]
    else: sys.exit('unexpected field ' + key)
quick = time.perf_counter() - start
assert found['tokenizer.ggml.tokens'] == theirs == tokens and found['tokenizer.ggml.merges'] == merges
print(f"100,000 strings: GGUFReader {slow:.2f} s, struct {quick:.2f} s, {slow/quick:.0f} times")
sys.exit(0 if slow > 10*quick else "changed")
PYTHON
