"lm-evaluation-harness on a packed folder, where it is installed: a task of one's own, its rows, and what is no task."
import json
import pytest
from nativebit.pipelines.evaluate import main, on_tasks, task_rows
from nativebit.utils.cli import UserError
from test_serve import packed   # noqa: F401, a fixture

pytest.importorskip('lm_eval', reason="pip install -e '.[lm-eval]'")
TASK = dict(task='my_text', dataset_path='json', test_split='test', output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{text}}', metric_list=[dict(metric='word_perplexity'), dict(metric='byte_perplexity')])

def test_a_task_of_ones_own(packed, tmp_path, capsys):
    (tmp_path/'docs.jsonl').write_text(json.dumps(dict(text='Who are you? I count: one, two.')) + '\n')
    (tmp_path/'my_text.yaml').write_text(json.dumps(TASK | dict(dataset_kwargs=dict(data_files=dict(test=str(tmp_path/'docs.jsonl'))))))   # JSON is YAML
    main(str(packed), tasks='my_text', include_path=str(tmp_path), out=str(tmp_path/'rows.jsonl'))
    assert 'byte_perplexity' in capsys.readouterr().out
    header, *rows = map(json.loads, (tmp_path/'rows.jsonl').read_text().splitlines())
    assert {r['metric'] for r in rows} == {'word_perplexity', 'byte_perplexity'} and all(r['value'] > 1 for r in rows)
    with pytest.raises(UserError, match="unknown task 'my_texd'"): on_tasks(packed, 'my_texd', tmp_path)
