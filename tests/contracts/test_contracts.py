"""What we rely on beyond documented interfaces: one test each, so that an upgrade fails here and not in a run."""

import dataclasses
import inspect
from collections import defaultdict

import numpy as np
import pytest
import torch
import transformers
import trl
from builders import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from cud_trainer.training.checkpoints import STATE_FILE, last_checkpoint


def test_trl_averages_the_lists_in_metrics_on_log(monkeypatch):
    trainer = object.__new__(SFTTrainer)
    trainer.model = torch.nn.Linear(1, 1).train()
    trainer._metrics = {"train": defaultdict(list, {"forget_prob": [0.2, 0.4]}), "eval": defaultdict(list)}
    logged = {}
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.update(logs))
    trainer.log({"loss": 1.0})
    assert logged == {"loss": 1.0, "forget_prob": pytest.approx(0.3)} and not trainer._metrics["train"]


@pytest.fixture
def sft(tmp_path):
    """Builds an `SFTTrainer` on rows that are no text, as `CUDTrainer` does."""

    def build(cls=SFTTrainer, **options):
        settings = dict(bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
        settings |= dict(dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)
        return cls(
            make_model(0),
            SFTConfig(str(tmp_path), **{**settings, "train_sampling_strategy": "sequential", **options}),
            data_collator=lambda rows: {"row": torch.tensor([row["row"] for row in rows])},
            train_dataset=Dataset.from_dict({"row": list(range(10)), "weight": [0.5] * 10}),
            processing_class=make_tokenizer(),
        )

    return build


def test_prepared_rows_are_taken_as_they_are(sft):
    assert sft().train_dataset.to_dict() == {"row": list(range(10)), "weight": [0.5] * 10}
    assert "dataset_kwargs" in SFTConfig._VALID_DICT_FIELDS


def test_rows_are_served_in_order(sft):
    trainer = sft(per_device_train_batch_size=3)
    assert [batch["row"].tolist() for batch in trainer.get_train_dataloader()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.SequentialSampler)


def test_metrics_are_lists_by_mode(sft):
    metrics = sft()._metrics
    assert set(metrics) >= {"train", "eval"} and all(metrics[mode]["new"] == [] for mode in ("train", "eval"))


def test_a_loss_may_say_that_it_is_not_scaled_for_accumulation(sft):
    """Then the Trainer divides by the accumulation steps: the gradient is the mean over the global batch."""
    assert Trainer.loss_is_scaled_for_ga is None

    class Rows(SFTTrainer):
        loss_is_scaled_for_ga = False
        seen = []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model.lm_head.weight[0, 0] * inputs["row"].float().mean()

        def _clip_grad_norm(self, model):
            self.seen.append(model.lm_head.weight.grad[0, 0].item())
            return super()._clip_grad_norm(model)

    assert hasattr(Trainer, "_clip_grad_norm")
    trainer = sft(Rows, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert Rows.seen == pytest.approx([np.mean([0, 1, 2, 3]), np.mean([4, 5, 6, 7])])


def test_sequential_is_a_sampling_strategy():
    help_text = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["help"]
    assert "sequential" in help_text
    assert 'train_sampling_strategy == "sequential"' in inspect.getsource(Trainer._get_train_sampler)


def test_model_card_hooks():
    for name in ("_tag_names", "_name", "_paper"):
        assert hasattr(SFTTrainer, name)


def test_uploads_go_through_one_function():
    """`CUDTrainer` stands between the Trainer and the hub there, so that files about single samples stay here."""
    assert callable(transformers.trainer.hf_api)
    module = inspect.getsource(inspect.getmodule(Trainer))
    methods = [inspect.getsource(getattr(Trainer, name)) for name in ("push_to_hub", "_push_from_checkpoint")]
    assert [source.count("hf_api().upload_folder(") for source in methods] == [1, 2]
    assert module.count("upload_folder(") == 3  # there is no other way
    for other in ("upload_file(", "create_commit(", "upload_large_folder(", "self.model.push_to_hub("):
        assert other not in module
    base = inspect.getsource(inspect.getmodule(SFTTrainer)) + inspect.getsource(
        inspect.getmodule(SFTTrainer.__mro__[1])
    )
    assert "hf_api" not in base and "upload" not in base and "def push_to_hub" not in base


def test_the_fused_head_hangs_on_the_model_alone(sft):
    """What the trainer takes off, and puts on where the base class computes its loss."""
    trainer = sft()
    assert "forward" in vars(trainer.model) and "fused_lm_head" in inspect.getsource(SFTTrainer.compute_loss)
    assert "self.compute_loss(" in inspect.getsource(Trainer.training_step)


def test_checkpoint_folders(tmp_path):
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    for step in (2, 10, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 30:  # the last one was cut short
            (tmp_path / f"checkpoint-{step}" / STATE_FILE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_everything_is_saved_through_two_methods():
    assert list(inspect.signature(Trainer._save).parameters) == ["self", "output_dir", "state_dict"]
    assert list(inspect.signature(SFTTrainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert "self._save(output_dir" in inspect.getsource(Trainer.save_model)


def test_checkpoints_are_loaded_through_three_methods():
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters)[:2] == ["self", "resume_from_checkpoint"]
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]
    assert list(inspect.signature(Trainer._load_optimizer_and_scheduler).parameters) == ["self", "checkpoint"]
    loop = inspect.getsource(Trainer)
    for name in ("_load_from_checkpoint(", "_load_best_model()", "_load_optimizer_and_scheduler("):
        assert f"self.{name}" in loop


def test_taking_an_adapter_off_needs_what_calibration_puts_back():
    """The tables of a module that calibration restores, and the name of PEFT's way of taking an adapter off."""
    model = make_model(0)
    assert isinstance(model._modules, dict) and isinstance(model._forward_hooks, dict)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert wrapped.unload() is model and not hasattr(model, "peft_config")
    assert LoraConfig().init_lora_weights is True and not LoraConfig().is_prompt_learning
    assert wrapped.active_peft_config.peft_type == "LORA"


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


def test_metrics_stay_the_same_dictionary(sft):
    """The recorder of a run puts its figures there for as long as the trainer lives."""
    trainer = sft()
    trainer.model.train()
    metrics = trainer._metrics["train"]
    metrics["forget_prob"].append(0.5)
    trainer.log({"loss": 1.0})
    assert trainer._metrics["train"] is metrics and not metrics


def test_weights_of_a_checkpoint_can_be_loaded(sft, tmp_path):
    trainer = sft()
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_options_are_added_through_argparse():
    """A mapping is read as JSON because its option passes `add_argument` with its type."""
    added = []

    class Parser(trl.TrlParser):
        def add_argument(self, *names, **options):
            added.append((names[0], options.get("type")))
            return super().add_argument(*names, **options)

    @dataclasses.dataclass
    class Options:
        args: dict[str, int] = dataclasses.field(default_factory=dict)

    Parser([Options])
    assert ("--args", dict[str, int]) in added


def test_versions_are_the_tested_ones():
    assert trl.__version__.startswith("1.16.") and transformers.__version__.startswith("5.")
