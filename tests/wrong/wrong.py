"""Wrong command lines over all programs of `nativebit --help`: `python tests/wrong/wrong.py`; in `make test` a sample, in `make test-slow` all.

They are generated from the programs' own flags: one thing is wrong in each line, and the rest is right. A fork of one process that has imported everything runs it.
It must end with another exit code than 0 and in one sentence, `error: …` (or argparse's, after its usage), without a traceback, in 20 s of CPU time."""
import argparse, json, random, re, resource, sys
from pathlib import Path
sys.path[:0] = [str(Path(__file__).parents[1]/'kill')]
import kill
from inputs import SETTINGS, TRAIN, checkpoint
from importlib import import_module
from nativebit.__main__ import COMMANDS
from nativebit.utils.cli import anno_parser, hyphenate

# ---- what is right ------------------------------------------------------------------------------------------

BASE = dict(   # program: words that are right
    quantize='m --method rtn --out new', generate='c --prompt a --max-tokens 1', chat='c --max-tokens 1', evaluate='c --data text:t.txt --max-tokens 64', compare='m m2 --texts a=text:t.txt --max-tokens 64', serve='p.nbpack --port 0', export='q --out new', convert='m --out new',
    data='text:t.txt --config tiny', synthesize='c --tokens 8 --context-len 8 --out new', kept='r', plots='log.jsonl --out new.png', aot='--config tiny --n-layers 1 --batch-size 1', speed='--config tiny --attention reference --batch-size 1 --steps 1 --windows 1 --compute-dtype float32', pack='cq --out new',
    generate_torch='p.nbpack --prompt a --max-tokens 1', posthoc='--ckpt c --methods rtn --dataset text:t.txt --max-tokens 64', demo='--max-steps 1 --max-tokens 64 --out new')
BASE = {k: v.split() for k,v in BASE.items()} | dict(train=[*TRAIN, '--max-steps', '1', '--name', 'new'], sweep=[f'lr=1e-3 {SETTINGS}', 'new.jsonl', '--config', 'tiny'],
    results=['--run', '--experiment', 'method=rtn', '--config', 'tiny', '--init-from', 'c', '--settings', f'n_layers=1 {SETTINGS}', '--out', 'new.jsonl'])

def make_inputs(folder:Path):
    "Right inputs, and things that are no input."
    kill.make_inputs(folder, quick=True)
    from nativebit.ptq.pack import pack_checkpoint
    pack_checkpoint(folder/'cq', folder/'p.nbpack')
    (folder/'m2').symlink_to('m'); (folder/'empty').mkdir(); (folder/'nothing').write_bytes(b''); (folder/'binary').write_bytes(random.Random(0).randbytes(5000)); (folder/'latin.txt').write_bytes(b'caf\xe9 '*500)
    (folder/'deep.jsonl').write_text('['*20_000 + '\n'); (folder/'log.jsonl').write_text('{"type": "header"}\n'); (folder/'bad.jsonl').write_text('7\n')
    for name, meta in (('list', '[1]'), ('nested', '['*20_000), ('fieldless', '{"config": {}}'), ('other', '{"config": {"name": 3, "model": {"n_layers": "x"}}}')):
        checkpoint(folder/name, False); (folder/name/'meta.json').write_text(meta)
    for name, text in (('deepconfig', '['*20_000), ('noconfig', '{}'), ('bert', '{"model_type": "bert"}')): (folder/name).mkdir(); (folder/name/'config.json').write_text(text)
    for name, log in (('textlog', 'no JSON\n'), ('numberlog', '5\n'), ('emptylog', '')): (folder/'logs'/name).mkdir(parents=True); (folder/'logs'/name/'log.jsonl').write_text(log)

# ---- what is wrong ------------------------------------------------------------------------------------------

LONG = 'x'*300
WHOLE = ['word', '', '1.5', '-1', '9'*30, '-' + '9'*25, 'nan', '1e3', '0x', '１.２']
REAL = ['word', '', 'nan', '-1', '1e999', '-inf', '1,5', '--']
PATHS = ['missing', 'missing/folder', 't.txt', 'empty', 'nothing', 'binary', '/dev/null', LONG, 'latin.txt', 'deep.jsonl', 'list', 'nested', 'fieldless', 'other', 'deepconfig', 'noconfig', 'bert', '~nobody/x', 'a\nb', 'numberlog', 'textlog']
TEXTS = ['word', 'text:', 'text:missing.txt', 'text:empty', 'text:nothing', 'text:deep.jsonl', f'text:{LONG}', 'python:missing', 'python:', 'text:[', 'wikitext-9', 'text:bad.jsonl', 'text:t.txt,valid=missing.txt', 'text:t.txt,other=t.txt', 'text:m/model.safetensors']
PLACES = ['t.txt/x', '/proc/nowhere/x', '/dev/null', '/dev/full', LONG, f'{LONG}/x', 'm', 'binary/x/y']
WORDS = ['word', 'INT8', '9'*30, LONG, 'nan', 'int8 ', '-x']
KINDS = dict(model=PATHS, original=PATHS, other=PATHS, folder=PATHS, what=PATHS, ckpt=PATHS, init_from=PATHS, teacher=PATHS, against=PATHS, file=PATHS, tokenizer=PATHS, runs=PATHS, name=[*PATHS, '..', '../x', '/', 'a/b/../..'],
             data=TEXTS, dataset=TEXTS, texts=['text:t.txt', *(f'a={t}' for t in TEXTS)], calibration=TEXTS, raw=[*TEXTS, 'missing', 'binary', 'empty'], out=PLACES, train_tokenizer_to=PLACES, keep=PLACES, states=PLACES,
             grid=['lr', 'lr=', 'lr=x', 'x=1', 'lr=1e-3,x', 'max_steps=-1', 'max_steps=1.5', "lr='1", 'seed=' + '9'*30, 'lr=nan', 'block_shape=x', 'block_shape=[1]', 'remat=maybe', 'dataset=x', 'config=5'],
             experiment=['word', 'method=', 'method=word', 'lr=x', 'method', LONG, "method='"], settings=['x', 'x=1', 'lr=x', 'max_steps=-1', "a='", 'lr=nan', 'seed=' + '9'*30], mesh=['x', '0,0', '2,2', '1', '-1,-1', '1,1,1', ','],
             hosts=['x', '1', 'a,b,c', '127.0.0.1:1,0,0', '127.0.0.1:1,2,5', '127.0.0.1:x,1,0', ',,'], by=['word', 'a,b'], step=['word', '-1', '1.5', '9'*30], bits=['word', '0', '-1', '99', '1.5', '9'*30, '3,x'], methods=['word', ',', 'rtn,word', LONG])
PROMPT = ['']   # an empty one is refused, any other is a text

def wrong_values(action)->list:
    "Values that a flag can't have."
    if action.dest in ('prompt', 'system'): return PROMPT
    if action.dest in KINDS and getattr(action.type, '__name__', 'str') in ('str', 'NoneType'): return KINDS[action.dest]
    kind = getattr(action.type, '__name__', 'str')
    return dict(int=WHOLE, float=REAL, bool_arg=['maybe', '2', '']).get(kind, KINDS.get(action.dest, WORDS))

def with_flag(base, flag, value):
    "The words of a line with a flag set to a value, in the place of the one that is there."
    base = list(base)
    if flag in base: i = base.index(flag); del base[i:i + 2]
    return [*base, *([f'{flag}={value}'] if value is not None else [flag])]

def lines_of(name):
    "All wrong lines of a program: (what is wrong, words)."
    base, parser = BASE[name], anno_parser(import_module('nativebit.' + COMMANDS[name][0]).main)   # not by `program`, which may start a device, and this process will be forked
    actions = [a for a in hyphenate(parser)._actions if a.dest not in ('help', 'pdb', 'xtra')]
    n = sum(not a.option_strings for a in actions)
    if n: yield 'nothing given', base[n:]
    yield 'one too many', ['one', 'too', 'many', 'words', *base] if name not in ('compare', 'plots') else [*base, '--one']
    yield 'an unknown flag', [*base, '--no-such-flag', '1']
    yield 'a flag cut off', [*base, '--']
    for a in actions:
        flag = a.option_strings[0] if a.option_strings else None
        if flag and a.nargs != 0 and a.nargs != '?': yield f'{flag} without a value', with_flag(base, flag, None)
        if flag and a.nargs == 0: yield f'{flag}=x', [*base, f'{flag}=x']
        else:
            for v in wrong_values(a):
                if flag: yield f'{flag}={v}', with_flag(base, flag, v)
                else: i = [x.dest for x in actions if not x.option_strings].index(a.dest); yield f'{a.dest}={v}', ['--', *base[:i], v, *base[i+1:n]] if v.startswith('-') else [*base[:i], v, *base[i+1:]]

HF = [[], ['missing_module'], ['json.tool.x'], ['nativebit'], ['missing.py'], ['t.txt'], ['..'], [''], ['empty'], ['-x']]
OTHERS = [('unknown', ['nonsense']), ('empty', ['']), ('nearly', ['quantise', 'm']), ('flag', ['--nonsense']), ('shell', ['--completion', 'fish'])]

RIGHT = [   # is no mistake, and why: (program, what) as regular expressions
    ('evaluate|compare|generate|generate_torch|chat|posthoc|demo|quantize|train', '--(max|test|calibration)-tokens=9{30}', "more than there are: all of them"),
    ('train', '--(log-every|val-every|save-every|requantize-every|val-batches|keep)=9{30}', "more than there are: never, or all of them; a run of 6 steps ends with the weights and records of one with a million"),
    ('train', '--warmup-steps=9{30}', "longer than the run: a note says that all of it is warm-up"),
    ('generate|generate_torch', '--context=9{30}', "more than the network reads: as much as it reads"),
    ('results', '--minutes=1e999', "no limit, as by default"),
    ('train', r'--name=(~nobody/x|t\.txt|empty|nothing|binary|latin\.txt|deep\.jsonl|list|nested|fieldless|other|deepconfig|noconfig|bert|missing(/folder)?)', "names as good as others: of logs/NAME"),
    ('train', '--states=m', "a folder that can be written"), ('results', '--keep=m', "the same"), ('demo', '--out=m', "the same"),
    ('speed', '--requantize-every=9{30}', "more than there are: never"),
    ('speed', '--out=/dev/null', "takes rows as any file does"),
    ('train|evaluate|results|posthoc|quantize|compare|sweep|speed|aot|demo', '--(tokenizer|teacher|by|bits|settings)=', "empty by default"),
    ('serve', '--name=.*', "names as good as others"),
    ('hf', 'hf nativebit', "a module as good as others: it prints its usage"),
]

def all_lines():
    "Every wrong line: (program, what is wrong, words)."
    out = [('', what, words) for what,words in OTHERS] + [('hf', f'hf {" ".join(w)}', ['hf', *w]) for w in HF]
    for name in (n for n in COMMANDS if n != 'hf'): out += [(name, what, [name, *words]) for what,words in lines_of(name)]
    return [l for l in out if not any(re.fullmatch(p, l[0]) and re.fullmatch(w, l[1]) for p,w,_ in RIGHT)]

# ---- running them -------------------------------------------------------------------------------------------

def limited(words):
    resource.setrlimit(resource.RLIMIT_CPU, (t := int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 20, t + 5))
    return kill.command(words)

def judged(code, said)->str:
    "What is wrong with how a line ended, '' if nothing is."
    last = [l.strip() for l in re.split(r'[\r\n]', said) if l.strip()][-1:]
    if 'Traceback' in said: return 'a traceback: ' + said.strip()[-700:]
    if code < 0: return f'signal {-code}: {said[-200:]}'
    if code == 0: return f'accepted: {said[-200:]}'
    if not last or not re.search(r'(^|[\]\s])(nativebit[ \w-]*: )?error: \S', last[0]) : return f'no sentence: {said[-300:]}'
    return ''

def run_all(lines, done=lambda x: None)->list:
    "Run lines, each in a fresh folder if the one before changed it: (program, what, wrong)."
    bench, out = kill.Bench(ask=limited, make=make_inputs), []
    try:
        folder = bench.fresh()
        for name, what, words in lines:
            code, said, _ = bench.run(words, folder)
            out.append(dict(program=name, what=what[:200], code=code, wrong=judged(code, said))); done(out[-1])
            if {str(p.relative_to(folder)) for p in folder.rglob('*')} != bench.names: folder = bench.fresh()
    finally: bench.close()
    return out

def table(lines):
    rows = [[p or 'nativebit', len(x := [l for l in lines if l['program'] == p]), *(sum(l['wrong'].startswith(w) for l in x) for w in ('a traceback', 'accepted', 'no sentence', 'signal'))] for p in dict.fromkeys(l['program'] for l in lines)]
    rows.append(['all', *(sum(r[i] for r in rows) for i in range(1, 6))])
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [['program', 'lines', 'tracebacks', 'accepted', 'no sentence', 'killed'], ['---', *['--:']*5], *rows])

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--most', type=int, help="a sample of so many lines; all by default"); a.add_argument('--programs'); a.add_argument('--seed', default='0'); a.add_argument('--out', type=Path); a.add_argument('--list', action='store_true')
    a = a.parse_args()
    lines = [l for l in all_lines() if not a.programs or l[0] in a.programs.split(',')]
    if a.most: lines = sorted(random.Random(a.seed).sample(lines, min(a.most, len(lines))), key=lambda l: l[0])
    if a.list: print(*(repr(l) for l in lines), len(lines), sep='\n'); sys.exit()
    def done(l):
        if a.out: open(a.out, 'a').write(json.dumps(l) + '\n')
        if l['wrong']: print(f"{l['program']}, {l['what']}: {l['wrong']}", flush=True)
    found = run_all(lines, done)
    print(table(found)); sys.exit(any(l['wrong'] for l in found))
