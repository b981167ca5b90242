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

CHOICES = dict(task='my_choices', dataset_path='json', test_split='test', output_type='multiple_choice', doc_to_text='{{question}}', doc_to_choice='{{choices}}', doc_to_target='{{answer}}', metric_list=[dict(metric='acc')])

def likelier(folder, question, choices):
    "The number of the choice that transformers finds likelier behind a question."
    import nativebit.hf, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tok = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    def logp(choice):
        n, ids = len(tok(question)['input_ids']), torch.tensor([tok(question + ' ' + choice)['input_ids']])
        with torch.no_grad(): p = model(ids).logits[0, :-1].log_softmax(-1)
        return p.gather(1, ids[0, 1:, None])[n - 1:].sum().item()
    return max(range(len(choices)), key=lambda k: logp(choices[k]))

def test_choices(packed, tmp_path, capsys):
    "As arc_easy and hellaswag ask, from files of one's own: three of four answers are the likelier ones, and --limit takes the first two."
    choices, asked = ['one', 'few words'], ['Who are you?', 'I count:', 'I am', 'a model of']
    found = [likelier(str(packed), q, choices) for q in asked]
    rows = [dict(question=q, choices=choices, answer=k if i < 3 else 1 - k) for i,(q,k) in enumerate(zip(asked, found))]
    (tmp_path/'docs.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (tmp_path/'my_choices.yaml').write_text(json.dumps(CHOICES | dict(dataset_kwargs=dict(data_files=dict(test=str(tmp_path/'docs.jsonl'))))))
    for limit, want in (None, .75), (2, 1.):
        main(str(packed), tasks='my_choices', include_path=str(tmp_path), limit=limit, out=str(tmp_path/f'{limit}.jsonl'))
        header, row = map(json.loads, (tmp_path/f'{limit}.jsonl').read_text().splitlines())
        assert (row['task'], row['metric'], row['value']) == ('my_choices', 'acc', want)
