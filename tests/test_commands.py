"Every command that is written down is one that today's programs take, or an old name that says the new one; none of them is run."
import ast, json, re, shlex
from configparser import ConfigParser
from functools import cache
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from nativebit import new_name
from nativebit.__main__ import COMMANDS, program
from nativebit.config import GEOMETRIES, RECIPES, STARTS
from nativebit.experiments.definitions import rows_of
from nativebit.experiments.grids import parse_grid
from nativebit.utils.cli import UserError, hyphenate

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT/n for n in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'kernels/README.md')] + sorted((ROOT/'data').rglob('README.md')) + sorted((ROOT/'nbs').rglob('*.ipynb'))
OTHERS = {'cd', 'curl', 'true', 'source', 'git', 'jupyter', 'sed', 'nbdev_export', 'nbdev_clean', 'nbdev_test', 'export'}   # programs of other people
THEIRS = set('--model --model_args --tasks --include_path --flags --max-bacon --no-show --rankdir --max-module-depth --cluster'.split())   # lm_eval, nbdev_test, pydeps

# ---- what is written ---------------------------------------------------------------------------------------

OURS = r'(?:[A-Z_]+=\S+ )*(?:python -m nativebit|python \w+/|nativebit(?= |`|\.\w+ -)|make |pip install|tpu_scripts/|tools/|nbdev_)'

def in_markdown(text):
    "Pairs of a command, and whether it is whole: a line of a block is, one in a sentence may leave words out."
    text = text.replace('\\\n', ' ')
    for body in re.findall(r'^```(?:bash|sh)\n(.*?)^```', text, re.S|re.M): yield from ((l, True) for l in body.splitlines())
    text = re.sub(r'^```.*?^```', '', text, flags=re.S|re.M)
    yield from ((l, True) for l in re.findall(r'^(?:    |\t)(?=[a-zA-Z_]+=|' + OURS + ')(.*)$', text, re.M))
    yield from ((c, False) for c in re.findall(rf'`({OURS}[^`\n]*)`', text))

def in_code(text):
    "Of a notebook's cell: lines of the shell, what `show` runs, and what stands in backticks."
    yield from ((c, True) for c in re.findall(r"^!(.*)$", text, re.M))
    yield from ((c, True) for c in re.findall(r"\bshow\((?:where \+ )?'([^']+)'\)", text))
    yield from ((c, False) for c in re.findall(rf'`({OURS}[^`\n]*)`', text))

def prose(path):
    if path.suffix != '.ipynb': return path.read_text()
    return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] != 'code')

@cache
def written(path):
    "The commands of a document."
    if path.suffix != '.ipynb': return list(in_markdown(path.read_text()))
    return [c for cell in json.loads(path.read_text())['cells'] for c in (in_code if cell['cell_type'] == 'code' else in_markdown)(''.join(cell['source']))]

def in_header(record):
    "The commands that made a file of results, or a part of it."
    if isinstance(record, list): return [c for x in record for c in in_header(x)]
    if not isinstance(record, dict): return []
    logged = [shlex.join(['nativebit', 'train', *record['argv'][1:]])] if 'argv' in record else []   # by a training's own log
    return logged + [c for k,v in record.items() for c in ([v] if k == 'command' and isinstance(v, str) else in_header(v))]

def split(line):
    "The simple commands of a line, as lists of words."
    line = re.sub(r'(?<=\w)\|\w+|\d?>&\d', '', line)   # this|that, 2>&1
    words = shlex.shlex(line, posix=True, punctuation_chars=';&|'); words.whitespace_split = True
    out = [[]]
    for w in words:
        if re.fullmatch('[;&|]+', w): out.append([])
        else: out[-1].append(w)
    return [c for c in out if c]

# ---- what programs take ------------------------------------------------------------------------------------

@cache
def parser(command, whole):
    "A program's parser; for a command that is not whole one that asks for no word. None takes a flag by its first letters."
    p = hyphenate(anno_parser(program(command).main)); p.allow_abbrev = False
    for a in [] if whole else p._actions:
        a.required = False
        if not a.option_strings: a.nargs, a.type = '*', None
        elif a.nargs is None: a.nargs, a.type = '?', None
    return p

def check_names(command, args):
    "Settings that are given by name are there."
    for flag, known in dict(geometry=GEOMETRIES, recipe=RECIPES, start=STARTS).items():
        for n in (args.get(flag) or '').split(','): assert not n or n in known, f"no {flag} {n}"
    if command == 'sweep' and args['grid']: parse_grid((args['grid'] if isinstance(args['grid'], str) else args['grid'][0]).removesuffix(' SETTINGS'))
    if command == 'results': rows_of(args['experiment']), parse_grid(args['settings'], several=False)

def check_ours(command, words, whole):
    "The words of `nativebit COMMAND`; capitals and … stand for others."
    if command in ('--help', '--completion', 'CMD', 'COMMAND'): return
    assert command.replace('-', '_') in COMMANDS, f"no command {command}"
    if command == 'hf' or '--help' in words: return   # another program's words
    if not whole: words = [w for w in (w.strip('[]…') for w in words) if w and not w.isupper()]
    check_names(command, vars(parser(command.replace('-', '_'), whole).parse_args(words)))

def flags_of(path):
    "What a script of ours says of its flags."
    if path.name == 'aot_check.py': return set(parser('aot', False)._option_string_actions)
    text = path.read_text()
    if path.suffix == '.py': text += ' '.join('--' + a.arg for f in ast.parse(text).body if getattr(f, 'name', '') == 'main' for a in f.args.args)
    if path.parent.name == 'tpu_scripts': text += (path.parent/'common.sh').read_text()
    return {'--help', *re.findall(r'--[a-z][-a-z]*', text)}

def check_script(path, words):
    path = ROOT/path
    assert path.exists(), f"no {path}"
    if path.is_file(): assert not (odd := {w.strip('[]') for w in words if w.strip('[').startswith('--')} - flags_of(path)), f"{path.name} has no {odd}"

def check_extras(words):
    "What `pip install` is asked for besides is there."
    known = ConfigParser(); known.read(ROOT/'settings.ini')
    for extras in re.findall(r'\.\[([\w,]+)\]', ' '.join(words)): assert all(f'{e}_requirements' in known['DEFAULT'] for e in extras.split(',')), f"no extra {extras}"

def targets(): return set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(), re.M))

def check(words, whole):
    "A simple command."
    words = [w.replace('$ROOT/', '') for w in words]
    while words and re.match(r'[A-Z_]+=', words[0]): words = words[1:]
    match words:
        case []: pass
        case ['python', '-m', m, *rest] if m.startswith('nativebit.'):
            command = m.removeprefix('nativebit.')
            assert command in ('train', 'data', 'hf') or new_name(['python', '-m', m, *rest]) == f"error: python -m {m} is now: nativebit {command}", m
            check_ours(command, rest, whole)
        case ['python', '-m', 'nativebit', command, *rest] | ['nativebit', command, *rest]: check_ours(command, rest, whole)
        case ['python', '-m', 'nativebit'] | ['nativebit'] | ['python', '-c', *_] | ['python', '-m'] | ['python', '-m', 'pytest', *_]: pass
        case ['make', *rest]: assert {w for w in rest if '=' not in w} <= targets(), f"no target in {rest}"
        case ['pip', 'install', *rest]: check_extras(rest)
        case ['python', path, *rest] if not path.startswith('-'): check_script(path, rest)
        case [path, *rest] if path.startswith(('tpu_scripts/', 'tools/', 'tests/', 'kernels/')): check_script(path, rest)
        case [other, *_]: assert other in OTHERS, f"unknown program {other}"

def wrong(commands):
    "Those that are not taken, each with what was said."
    out = []
    for line, whole in commands:
        try:
            for words in split(line): check(words, whole)
        except (AssertionError, UserError, SystemExit, ValueError) as e: out.append((line, repr(e)))
    return out

# ---- tests -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents(path): assert not wrong(written(path))

def test_gpu_check(): assert not wrong((l, True) for l in (ROOT/'tools'/'gpu_check.txt').read_text().splitlines() if not l.startswith(('#', '$')))

@cache
def our_flags():
    "Of all commands and scripts."
    scripts = [p for d in ('tpu_scripts', 'kernels', 'tools', 'tests/fuzz', 'tests/kill', 'tests/wrong') for p in (ROOT/d).glob('*') if p.is_file()]
    return set().union(*(parser(c, False)._option_string_actions for c in COMMANDS if c != 'hf'), *map(flags_of, scripts))

@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_in_sentences(path):
    "In comments and tables, too."
    assert not set(re.findall(r'(?<![\w-])--[a-z][-\w]*', prose(path))) - our_flags() - THEIRS

def test_many_are_found():
    assert len({c for p in DOCUMENTS for c in written(p)}) > 100 and len(headers()) > 100

def headers():
    read = lambda p: [json.loads(l) for l in p.read_text().splitlines()] if p.suffix == '.jsonl' else json.loads(p.read_text())
    return sorted({c for p in (ROOT/'data'/'results').glob('*.json*') for c in in_header(read(p))})

PROGRAMS = 'python', 'nativebit', 'make'

def out_of_prose(line):
    "The commands of a header, which may stand in a sentence."
    for words in split(line):
        start = next((i for i,w in enumerate(words) if w in PROGRAMS), len(words))
        end = next((i for i,w in enumerate(words[start:], start) if w.startswith('(') or w.endswith(',')), len(words))
        yield [w.rstrip(',') for w in words[start:end+1] if not w.startswith('(')]

def test_headers():
    "What made the results is a command of today, or of a name that says the new one."
    out = []
    for line in headers():
        try:
            for words in out_of_prose(line): check(words, False)
        except (AssertionError, UserError, SystemExit, ValueError) as e: out.append((line, repr(e)))
    assert not out

@pytest.mark.parametrize('line', [
    'nativebit trian', 'nativebit train --learning-rate 1', 'nativebit train --max-step 1', 'nativebit train --lr fast', 'nativebit pack --inspect', 'nativebit train --recipe fast', 'nativebit sweep "rate=1" x.jsonl',
    'python -m nativebit.rows', 'make tests', "pip install -e '.[gpu]'", 'python tools/links2.py', 'python kernels/bench.py --hours 1', 'tpu_scripts/launch --zones Z', 'natvebit train', 'true && nativebit trian'])
def test_wrong_ones_are_found(line, capsys): assert wrong([(line, True)])
