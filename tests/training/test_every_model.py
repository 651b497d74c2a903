"""A few of the types that `benchmarks/architectures.py` goes through: their runs go on as they were."""

import pytest
import torch
from builders import make_tokenizer, qa_dataset
from every_model import tiny
from runs import make_trainer

RUN = {"objective": "npo", "passes": 1, "n_buckets": 2, "save_steps": 1}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_neox", "roberta", "hrm_text"])
def test_a_resumed_run_ends_with_the_same_weights(model_type, tmp_path):
    """Files keep old names of experts and of GPT-NeoX's output; the base class leaves out what it does not find."""
    data = {"forget": qa_dataset(8), "retain": qa_dataset(4, 100), "tokenizer": make_tokenizer()}
    trainer = make_trainer(tmp_path / "out", model=tiny(model_type), **data, **RUN)
    trainer.train()
    again = make_trainer(tmp_path / "out", model=tiny(model_type), **data, **RUN)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for (name, expected), found in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
