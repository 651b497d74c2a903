"""Tasks of lm-evaluation-harness."""

import pytest
from builders import make_model, make_tokenizer
from datasets import Dataset

from evaluation.metrics.lm_eval import lm_eval_figures
from evaluation.report import tables as sections
from evaluation.report.schema import jsonable

pytestmark = pytest.mark.slow


def test_lm_eval_on_a_local_task(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "label": i % 2} for i in range(6)]
    Dataset.from_list(rows).to_json(tmp_path / "even.jsonl")
    (tmp_path / "even.yaml").write_text(
        f"task: tiny_even\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'even.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    figures = lm_eval_figures(make_model(0), make_tokenizer(), ["tiny_even"], str(tmp_path))
    table = jsonable(sections.lm_eval_table(figures))
    (row,) = [row for row in table["rows"] if row["label"] == "tiny_even: acc"]
    assert 0 <= row["cells"][0] <= 1
    with pytest.raises(ValueError, match="has no task 'missing_task'"):
        lm_eval_figures(make_model(0), make_tokenizer(), ["missing_task"], str(tmp_path))
