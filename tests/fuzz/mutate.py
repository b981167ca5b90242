"""Mutants of files, from a seed: the mutator knows where headers, lengths, names, types and shapes stand, and damages those as often as bytes.
Nothing is stored: a mutant is its seed. What it makes is read by our own guards before any other library sees it."""
import io, json, random, re, struct, zipfile
from copy import deepcopy

NUMBERS = [0, 1, -1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 256, 65535, 65536, 2**31-1, 2**31, 2**32-1, 2**32, 2**48, 2**53, 2**63-1, 2**63, 2**64-1, 10**30, -2**63, .5, -1.5, 1e-300, 1e308, float('nan'), float('inf'), -float('inf')]
WORDS = ['', 'x', ' ', '.', '..', '/', '../x', 'F32', 'F16', 'BF16', 'I8', 'U8', 'I32', 'I64', 'F64', 'BOOL', 'F8_E4M3', 'F8_E5M2', 'float32', 'int8', 'default', 'llama', 'é', '\u0000', '\ud800', 'x'*300, '9'*40, 'null']

# ---- bytes --------------------------------------------------------------------------------------------------

def flip(b, r): i = r.randrange(len(b)); b[i] ^= 1 << r.randrange(8)
def put(b, r): b[r.randrange(len(b))] = r.choice([0, 1, 0x7f, 0x80, 0xff, r.randrange(256)])
def put_number(b, r):
    n = r.choice([2, 4, 8]); i = r.randrange(len(b))
    b[i:i+n] = (int(r.choice([x for x in NUMBERS if isinstance(x, int)])) % 2**(8*n)).to_bytes(n, r.choice(['little', 'big']))
def cut(b, r): del b[r.randrange(len(b)):]
def cut_some(b, r): i = r.randrange(len(b)); del b[i:i+r.choice([1, 2, 4, 8, 64])]
def extend(b, r): b += bytes(r.randrange(256) for _ in range(r.choice([1, 4, 8, 100])))
def double(b, r): i = r.randrange(len(b)); n = r.choice([1, 4, 8, 64, 512]); b[i:i] = b[i:i+n]
def zeros(b, r): i = r.randrange(len(b)); n = min(len(b) - i, r.choice([4, 8, 64, 512])); b[i:i+n] = bytes(n)
def exchange(b, r):
    n = r.choice([1, 4, 8, 64]); i, j = r.randrange(len(b)), r.randrange(len(b))
    if abs(i - j) >= n and max(i, j) + n <= len(b): b[i:i+n], b[j:j+n] = b[j:j+n], b[i:i+n]
BYTES = [flip, flip, put, put_number, cut, cut_some, extend, double, zeros, exchange]

def bytes_of(data, r):
    "Damage bytes anywhere, or only near the beginning, where headers are."
    b = bytearray(data)
    part, rest = (b, b'') if r.random() < .5 else (b[:256], b[256:])
    if part: r.choice(BYTES)(part, r)
    return bytes(part + rest)

# ---- JSON ---------------------------------------------------------------------------------------------------

def nodes(x, path=()):
    "All places in a JSON value."
    yield path
    for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from nodes(v, (*path, k))

def parent_of(x, path):
    for k in path[:-1]: x = x[k]
    return x

def nested(r, n): return [nested(r, n-1)] if n and r.random() < .5 else {'x': nested(r, n-1)} if n else 0
def other(x, r):
    "Another value in place of one: near it, of its kind, or of any."
    if isinstance(x, str) and len(x) > 1 and x[0] in '{[' and r.random() < .7: return json_text(x, r)   # JSON in a string, as metadata hold it
    near = dict(bool=lambda: not x, int=lambda: r.choice([x+1, x-1, 2*x, -x, x//2, x*2**20, float(x)]), float=lambda: r.choice([x*2, -x, int(x) if abs(x) < 1e300 else 0, str(x)]),
                str=lambda: r.choice([x[:-1], x + 'x', x.upper(), x[::-1], x.replace('0', '1'), x[:1] + chr(ord(x[1]) ^ 1) + x[2:] if len(x) > 1 else 'y']), list=lambda: r.choice([x[::-1], x + deepcopy(x), x[:-1], x + [r.choice(NUMBERS)], [x]]),
                dict=lambda: dict(r.sample([*x.items()], max(0, len(x) - 1)))).get(type(x).__name__)
    if near and r.random() < .5: return near()
    return r.choice([r.choice(NUMBERS), r.choice(WORDS), None, True, False, [], {}, [0], nested(r, r.choice([2, 20, 90])), [r.choice(NUMBERS)]*r.choice([1, 2, 3, 40])])

def change(x, r):
    "Change one place of a JSON value."
    places = [*nodes(x)][1:]
    if not places: return other(x, r)
    path = r.choice(places); at = parent_of(x, path); k = path[-1]
    what = r.choice(['other']*4 + ['drop', 'rename', 'exchange', 'copy'])
    if what == 'other': at[k] = other(at[k], r)
    elif what == 'drop': del at[k]
    elif what == 'rename' and isinstance(at, dict): at[r.choice([str(other(k, r)), *map(str, at)])] = at.pop(k)
    else:
        path2 = r.choice(places); at2, k2 = parent_of(x, path2), path2[-1]
        if what == 'exchange' and path[:len(path2)] != path2 and path2[:len(path)] != path: at[k], at2[k2] = at2[k2], at[k]
        elif what == 'copy': at[k] = json.loads(json.dumps(at2[k2]))
    return x

def twice(t, r):
    "A key that stands there twice."
    m = r.choice([*re.finditer(r'"[^"]*": ?', t)] or [re.match('', t)])
    return t[:m.start()] + m.group() + r.choice(['0, ', '[], ', '"x", ']) + t[m.start():]

RAW = [lambda t, r: '['*r.choice([10, 2000, 30000]) + t, lambda t, r: t.replace(':', ': ' + '['*r.choice([5, 500, 20000]), 1), lambda t, r: t[:-1] + ',' + t[1:] if len(t) > 2 else t, lambda t, r: t[:r.randrange(len(t)+1)],
       lambda t, r: re.sub(r'\d+', lambda m: '9'*r.choice([20, 400, 5000]), t, count=1), lambda t, r: '\ufeff' + t, lambda t, r: twice(t, r), lambda t, r: twice(t, r), lambda t, r: t.replace('"', "'", 2), lambda t, r: t*2, lambda t, r: ''.join(sorted(t, key=lambda _: r.random())) if len(t) < 2000 else t]

def json_text(text, r):
    "Damage a JSON text, by its values or by its letters."
    try: x = json.loads(text)
    except (ValueError, RecursionError): return text
    if r.random() < .1: return r.choice(RAW)(text, r)
    for _ in range(r.choice([1, 1, 1, 2, 3])): x = change(x, r)
    return json.dumps(x, ensure_ascii=r.random() < .5)

def encoded(text): return text.encode('utf-8', 'surrogatepass')

def json_file(data, r): return bytes_of(data, r) if r.random() < .15 else encoded(json_text(data.decode(), r))

# ---- safetensors --------------------------------------------------------------------------------------------

def safetensors_file(data, r):
    "Damage the header's values, its length, or bytes."
    n = int.from_bytes(data[:8], 'little'); head, body = data[8:8+n], data[8+n:]
    what = r.random()
    if what < .3: return bytes_of(data, r)
    if what < .36: return r.choice([0, 1, n-1, n+1, n+8, len(data)-8, len(data), 2**31, 2**63, 2**64-1]).to_bytes(8, 'little') + head + body
    text = encoded(json_text(head.decode(), r))
    if what < .9: text = text + b' '*(-len(text) % 8)
    if what > .8 and body: body = bytes_of(body, r)
    return len(text).to_bytes(8, 'little') + text + body

# ---- npz ----------------------------------------------------------------------------------------------------

DESCR = ['<f4', '>f4', '<f8', '<i8', '|O', '|V8', '<U9', '|S0', '<f2', '|b1', '<M8[s]', [('a', '<f4')], '', 'x']
def npy_header(x, r):
    "Damage the header of an array in a zip file: its words, its shape, its length, or bytes."
    if x[:6] != b'\x93NUMPY' or r.random() < .2: return bytes_of(x, r)
    n = int.from_bytes(x[8:10], 'little'); text, body = x[10:10+n].decode('latin1'), x[10+n:]
    number = str(r.choice([y for y in NUMBERS if isinstance(y, int)]))
    text = r.choice([lambda: re.sub(r"'descr': '[^']*'", lambda m: f"'descr': {r.choice(DESCR)!r}", text), lambda: re.sub(r'\d+(?=[,)])', number, text, count=1), lambda: text.replace('False', 'True'), lambda: text.replace('(', f'({number}, ', 1),
                     lambda: text.replace('shape', 'shap'), lambda: text.replace('{', '{'*r.choice([2, 60])), lambda: bytes_of(text.encode('latin1'), r).decode('latin1')])()
    size = r.choice([len(text)]*6 + [0, 1, len(text)+1, 65535]) % 65536
    return x[:8] + size.to_bytes(2, 'little') + text.encode('latin1', 'replace') + body

def npz_file(data, r):
    "Damage an array's header, the zip file's members, or bytes, of which the last ones are its directory."
    if r.random() < .3:
        n = r.choice([22, 200, len(data)])
        return data[:-n] + bytes_of(data[-n:], r)
    with zipfile.ZipFile(io.BytesIO(data)) as z: held = {n: z.read(n) for n in z.namelist()}
    name = r.choice([*held] or ['']); what = r.random()
    held.setdefault(name, b'')
    if what < .7: held[name] = npy_header(held[name], r)
    elif what < .8: held[str(other(name, r))[:100].replace('\x00', '') or 'y'] = held.pop(name)
    elif what < .9: del held[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', r.choice([zipfile.ZIP_STORED]*3 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])) as z:
        for n,x in held.items(): z.writestr(n.encode('utf-8', 'replace').decode() or 'z', x)
    return out.getvalue()

def npy_file(data, r): return npy_header(data, r) if r.random() < .6 else bytes_of(data, r)

# ---- GGUF ---------------------------------------------------------------------------------------------------

SIZES = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}

def spans(data):
    "Every field of a GGUF header: [(what, first byte, its `struct` code, or the bytes of a string)]."
    out, at = [('magic', 0, '4s'), ('version', 4, 'I'), ('count', 8, 'Q'), ('count', 16, 'Q')], 24
    def field(what, code):
        nonlocal at
        out.append((what, at, code)); at += struct.calcsize('<' + code)
        return struct.unpack_from('<' + code, data, out[-1][1])[0]
    def text(what): field(what, f"{field('length', 'Q')}s")
    def value(kind):
        if kind == 8: return text('text')
        if kind != 9: return field('number', SIZES[kind])
        kind, n = field('kind', 'I'), field('count', 'Q')
        for _ in range(n): value(kind)
    arrays, values = struct.unpack_from('<QQ', data, 8)
    for _ in range(values): text('name'); value(field('kind', 'I'))
    for _ in range(arrays):
        text('name')
        for _ in range(field('dimensions', 'I')): field('side', 'Q')
        field('type', 'I'); field('offset', 'Q')
    return out, at

def gguf_file(data, r, cache={}):
    "Damage one to three fields of a header, or bytes."
    if data not in cache: fields, end = spans(data); cache[data] = {k: [f for f in fields if f[0] == k] for k in sorted({f[0] for f in fields})}, end
    fields, end = cache[data]
    if r.random() < .25: return bytes_of(data[:end], r) + data[end:] if r.random() < .5 else bytes_of(data, r)
    b = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 3])):
        what, at, code = r.choice(fields[r.choice([*fields])])
        n = struct.calcsize('<' + code)
        if code.endswith('s') or code in 'fd': part = bytearray(b[at:at+n]); part and r.choice([flip, put, exchange, zeros])(part, r); b[at:at+n] = part[:n].ljust(n, b'\0'); continue
        old = int.from_bytes(b[at:at+n], 'little')
        b[at:at+n] = (int(r.choice([old+1, old-1, 2*old, old//2, old^1, r.randrange(40), *(x for x in NUMBERS if isinstance(x, int))])) % 2**(8*n)).to_bytes(n, 'little')
    return bytes(b)

# ---- folders ------------------------------------------------------------------------------------------------

def kind_of(name): return next((f for end,f in (('.json', json_file), ('.safetensors', safetensors_file), ('.npz', npz_file), ('.npy', npy_file), ('.gguf', gguf_file), ('again.nbpack', safetensors_file)) if name.endswith(end)), bytes_of)

def mutant(
    files:dict,   # {name: bytes} of what a reader is given
    seed:str,
    targets=None, # {name: how often it is chosen}; all alike by default
)->dict:          # the same, damaged; never equal to the original, but perhaps in what it means
    "One damaged copy: the same one for the same seed."
    r, out = random.Random(seed), dict(files)
    names = [*(targets or files)]
    for _ in range(r.choice([1, 1, 1, 1, 2])):
        name = r.choices(names, [*(targets or dict.fromkeys(names, 1)).values()])[0]
        if name not in out: continue
        try: out[name] = kind_of(name)(out[name], r)
        except Exception:   # damaged a second time, it may have no structure any more; whatever its reader then raises here
            if out[name] == files[name]: raise
            out[name] = bytes_of(out[name], r)
    if r.random() < .02 and len(out) > 1: gone = r.choice([*out]); out[r.choice(names)] = r.choice([b'', out.pop(gone)])
    return out
