"""All that this package overrides, or reads, of what TRL and transformers keep private: `SFTTrainerHooks`.

What stands here has a test in tests/contracts, so that an upgrade fails there and not in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..config import CUDConfig
from .checkpoints import NEVER_UPLOADED, UPLOADED_IF_ASKED, whole_checkpoint, whole_model


class SFTTrainerHooks(SFTTrainer):
    """An `SFTTrainer` that saves whole models or none, and keeps files about single samples off the hub."""

    args: CUDConfig
    # The loss is the mean of a micro-batch: dividing by the accumulation steps is left to the Trainer.
    loss_is_scaled_for_ga = False
    _tag_names = ["cud-trainer", "unlearning"]
    _name = "CUD"
    _paper = {
        "title": "Circuit-guided Unlearning Difficulty",
        "id": "2601.09624",
        "citation": "@article{cheng2026cud,\n  title={Circuit-guided Unlearning Difficulty},\n"
        "  author={Cheng, Jiali and others},\n  journal={arXiv preprint arXiv:2601.09624},\n  year={2026}\n}",
    }

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """Figures of the steps since the last log, by name; a log has their means."""
        return self._metrics["train"]

    def load_weights(self, checkpoint: str) -> None:
        """Put the weights of a checkpoint into the model."""
        self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in the base class, and what that leaves out."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        """As in the base class, and what that leaves out."""
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_renamed(self.state.best_model_checkpoint, self.model)

    def _load_renamed(self, checkpoint: str, model: Any) -> None:
        """Load what is saved under other names than the model's own: experts, the output projection of GPT-NeoX.

        Files have the names of old; only `from_pretrained` translates them. The base class drops such weights.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(model, PreTrainedModel):
            return
        saved: set[str] = set()
        for path in Path(checkpoint).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                saved |= set(file.keys())
        state = model.state_dict()
        known = {tensor.data_ptr() for name, tensor in state.items() if name in saved}  # tied weights are saved once
        if not saved or all(name in saved or tensor.data_ptr() in known for name, tensor in state.items()):
            return
        loaded = type(model).from_pretrained(checkpoint, config=model.config, dtype="auto")
        model.load_state_dict(loaded.state_dict())

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in the base class, but complete or not at all: into a folder beside it, then file by file to its place."""
        target = Path(output_dir if output_dir is not None else self.args.output_dir)
        with whole_model(target, writes=self.args.should_save) as staging:
            super()._save(str(staging), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in the base class; one that cannot be written whole is removed."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(checkpoint, writes=self.is_world_process_zero()):
            super()._save_checkpoint(model, trial)

    # -- uploading -------------------------------------------------------------------------------------------------

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, without the files that tell about single samples.

        `reference.safetensors` and unfinished scores are never uploaded, `difficulty.parquet` and `schedule.parquet`
        with `args.hub_difficulty`. The same holds for uploads of checkpoints during training.
        """
        with self._private_files_stay():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._private_files_stay():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _private_files_stay(self) -> Iterator[None]:
        """Uploads of the base class leave files out. It gives no way to say which: all go through its `hf_api`."""
        original = transformers.trainer.hf_api
        ignored = NEVER_UPLOADED if self.args.hub_difficulty else NEVER_UPLOADED + UPLOADED_IF_ASKED
        transformers.trainer.hf_api = lambda: _Uploads(original(), ignored)
        try:
            yield
        finally:
            transformers.trainer.hf_api = original


class _Uploads:
    """The hub's API, with files that folders are uploaded without."""

    def __init__(self, api: Any, ignored: tuple[str, ...]) -> None:
        self._api, self._ignored = api, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, ignore_patterns: list[str] | str | None = None, **options: Any) -> Any:
        asked = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
        return self._api.upload_folder(ignore_patterns=[*asked, *self._ignored], **options)
