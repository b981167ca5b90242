"Keep the outputs of a `make demo` as data/results/demo.json and nbs/images/demo.png, which the README shows. Usage: record_demo.py SECONDS DEVICE"
import datetime, json, shutil, sys
from pathlib import Path

logs, (seconds, device) = Path('logs/demo'), sys.argv[1:]
record = dict(command='make demo', device=device, date=str(datetime.date.today()), seconds=float(seconds),
              rows=json.loads((logs/'results.json').read_text()), sample=(logs/'sample.txt').read_text())
Path('data/results/demo.json').write_text(json.dumps(record, indent=1) + '\n')
shutil.copy(logs/'demo.png', 'nbs/images/demo.png')
