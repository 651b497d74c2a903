"""What we rely on beyond documented interfaces: one test each, so that an upgrade fails here and not in a run."""

import inspect
from collections import defaultdict

import pytest
import torch
import transformers
import trl
from conftest import make_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer


def test_trl_averages_the_lists_in_metrics_on_log(monkeypatch):
    trainer = object.__new__(SFTTrainer)
    trainer.model = torch.nn.Linear(1, 1).train()
    trainer._metrics = {"train": defaultdict(list, {"forget_prob": [0.2, 0.4]}), "eval": defaultdict(list)}
    logged = {}
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.update(logs))
    trainer.log({"loss": 1.0})
    assert logged == {"loss": 1.0, "forget_prob": pytest.approx(0.3)} and not trainer._metrics["train"]


def test_a_loss_may_say_that_it_is_not_scaled_for_accumulation():
    assert Trainer.loss_is_scaled_for_ga is None


def test_prepared_rows_are_taken_as_they_are():
    assert "skip_prepare_dataset" in inspect.getsource(SFTTrainer.__init__)
    assert "dataset_kwargs" in SFTConfig._VALID_DICT_FIELDS


def test_sequential_is_a_sampling_strategy():
    help_text = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["help"]
    assert "sequential" in help_text
    assert 'train_sampling_strategy == "sequential"' in inspect.getsource(Trainer._get_train_sampler)


def test_model_card_hooks():
    for name in ("_tag_names", "_name", "_paper"):
        assert hasattr(SFTTrainer, name)


def test_dropout_can_be_disabled():
    from trl.trainer import disable_dropout_in_model

    module = torch.nn.Sequential(torch.nn.Dropout(0.5))
    disable_dropout_in_model(module)
    assert module[0].p == 0


def test_checkpoint_folders():
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"


def test_attention_reads_its_number_of_groups_when_it_runs():
    model = make_model(0)
    tokens = torch.arange(2, 8)[None]
    before = model(tokens).logits
    attention = model.model.layers[0].self_attn
    assert attention.num_key_value_groups == 2

    def repeat(module, args, output):
        return output.unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2).flatten(-2)

    for projection in (attention.k_proj, attention.v_proj):
        projection.register_forward_hook(repeat)
    attention.num_key_value_groups = 1
    torch.testing.assert_close(model(tokens).logits, before)


def test_logits_to_keep_takes_positions():
    model, tokens = make_model(0), torch.arange(2, 8)[None]
    kept = torch.tensor([1, 4])
    torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, model(tokens).logits[:, kept])


def test_versions_are_the_tested_ones():
    assert trl.__version__.startswith("1.16.") and transformers.__version__.startswith("5.")
