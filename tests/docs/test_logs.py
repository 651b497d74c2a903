"""docs/logs.md names what a run logs, and nothing else."""

import re
from pathlib import Path

import pytest
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer import CUDConfig, CUDTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "logs.md").read_text(encoding="utf-8")
NAMED = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M) for name in re.findall(r"`([^`]+)`", row)}
# The Trainer's own, of speed and compute.
OTHERS = r"(eval|test|train)_(runtime|samples_per_second|steps_per_second|loss)|total_flos|num_input_tokens_seen|step|.*_(time|model_preparation_time)"


@pytest.mark.slow
def test_every_logged_name_is_on_the_page(tmp_path):
    args = CUDConfig(
        str(tmp_path),
        objective="graddiff",
        difficulty="loss",
        schedule="upweight_hard+per_sample_stop",
        n_buckets=2,
        schedule_args={"per_sample_stop": {"target": 1e-6}},
        passes=2,
        per_device_train_batch_size=4,
        retain_limit=1.0,
        log_update_share=True,
        eval_strategy="epoch",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_grad_norm=1.0,
    )
    data = {
        "forget_dataset": qa_dataset(8),
        "retain_dataset": qa_dataset(8, 100),
        "heldout_dataset": qa_dataset(4, 200),
    }
    trainer = CUDTrainer(make_model(0), args, processing_class=make_tokenizer(), **data)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    own = {name for name in logged if not re.fullmatch(OTHERS, name)}
    buckets = {re.sub(r"bucket_\d+", "bucket_1", name) for name in own}
    assert buckets == NAMED
