"The book as a reader's browser shows it: `make docs`, then from the first page to the last by its next-links."
import functools, http.server, re, shutil, subprocess, sys, threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
NOTEBOOKS = [p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('myst_nb'); out = tmp_path_factory.mktemp('site')
    r = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-c', 'tools/docs', 'nbs', str(out)], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    bad = [l for l in r.stderr.splitlines() if 'WARNING' in l and 'highlighting' not in l and 'parallel' not in l and 'serial read' not in l]
    assert not bad, bad[:10]
    return out

@pytest.fixture(scope='module')
def address(site):
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

def test_every_notebook_has_a_page(site):
    missing = [str(p) for p in NOTEBOOKS if not (site/p.relative_to(ROOT/'nbs').with_suffix('.html')).exists()]
    assert NOTEBOOKS and not missing, missing

def test_no_link_is_broken(site):
    broken = []
    for page in (p for p in site.rglob('*.html') if '_static' not in p.parts):
        for where in re.findall(r'(?:href|src)="([^"#][^"]*)"', page.read_text()):
            if re.match(r'[a-z]+:', where): continue
            if not (page.parent/unquote(urldefrag(where)[0].split('?')[0])).exists(): broken.append((page.name, where))
    assert not broken, broken[:10]

SHOWN = "() => ({next: document.querySelector('a.right-next')?.href, pictures: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src), formulas: document.querySelectorAll('math').length, text: [...document.querySelectorAll('article p, article li, article td')].map(e => e.innerText).join('\\n')})"

@pytest.mark.skipif(not BROWSER, reason='no Chromium')
def test_a_reader_comes_from_the_first_page_to_the_last(address):
    playwright = pytest.importorskip('playwright.sync_api')
    read, asked, said = [], [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        page = browser.new_page()
        page.route('**/*', lambda r: r.continue_() if r.request.url.startswith(address) else (asked.append(r.request.url), r.abort()))
        page.on('pageerror', lambda e: said.append(str(e)))
        where, formulas = address + 'index.html', 0
        while where:
            page.goto(where); page.wait_for_load_state('networkidle')
            seen = page.evaluate(SHOWN)
            assert not seen['pictures'], (where, seen['pictures'])
            assert not re.search(r'\$[^$\n]*\\[a-z]+|\\(frac|mathrm|sum|lambda)\b', seen['text']), where
            read.append(where); formulas += seen['formulas']; where = seen['next']
            assert where not in read
        page.goto(address + 'search.html?q=codebook'); page.wait_for_selector('ul.search li')
        browser.close()
    assert len(read) == len(NOTEBOOKS) and formulas > 50 and not said, (len(read), formulas, said[:3])
    assert not asked, {*asked}
