"""All that this package overrides, or reads, of what TRL and transformers keep private: `SFTTrainerHooks`.

What stands here has a test in tests/contracts, so that an upgrade fails there and not in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer
from torch import Tensor, nn
from trl import SFTTrainer

from ..config import CUDConfig
from ..models.layers import base_causal_lm
from ..models.modes import answering, drawing_nothing, left_as_found
from .checkpoints import NEVER_UPLOADED, UPLOADED_IF_ASKED, saved_names, whole_checkpoint, whole_model

# Where an optimizer keeps what an option sets, and the options that make the learning rate of a step.
GROUP_KEYS = {
    "learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
RATE_OPTIONS = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}


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

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """As in the base class; what that hangs on the model is on it only while it is used."""
        own = vars(base_causal_lm(model))
        before = own.get("forward")
        with left_as_found(model):
            super().__init__(model=model, **options)
            # TRL's way through the output layer is bound to this very model: a copy would answer like the original.
            self._fused_forward = own["forward"]
        assert own.get("forward") is before
        self._inputs_take_gradients(False)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """TRL's, which says how a model was trained by the names of the class: here by those of the run."""
        model_name = model_name or Path(self.args.hub_model_id or self.args.output_dir).name
        difficulty = self.args.difficulty or "none"
        said = f"{self.args.objective}, schedule {self.args.schedule}, difficulty {difficulty}"
        by_cud = difficulty in ("cud", "cud_paper")
        self._name, self._paper = (f"CUD ({said})", SFTTrainerHooks._paper) if by_cud else (said, {})
        super().create_model_card(model_name, *args, **kwargs)

    def _inputs_take_gradients(self, wanted: bool) -> None:
        """Whether embeddings give out tensors with gradients: what checkpointing needs that keeps no graph."""
        model = base_causal_lm(self.model)
        if wanted:
            model.enable_input_require_grads()
        elif getattr(model, "_require_grads_hook", None) is not None:
            model.disable_input_require_grads()

    def train_loop(self, checkpoint: str | None, **options: Any) -> Any:
        """The training loop of the base class. The model comes back with the modes, the forward function and the
        configuration that it came with."""
        checkpointed = bool(self.args.gradient_checkpointing) and hasattr(self.model, "peft_config")
        with left_as_found(self.model):
            self._inputs_take_gradients(checkpointed)
            try:
                return super().train(resume_from_checkpoint=checkpoint, **options)
            finally:
                self._inputs_take_gradients(False)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the base class. What `draw_nothing` begins ends with the backward pass, which may run layers again."""
        with ExitStack() as self._during_step:
            return super().training_step(model, inputs, num_items_in_batch)

    def draw_nothing(self, model: nn.Module) -> None:
        """From here to the end of the step nothing is drawn at random: a loss compares the model with what it said."""
        self._during_step.enter_context(drawing_nothing(model))

    def ordinary_loss(self, model: nn.Module, inputs: dict[str, Any], *options: Any) -> Any:
        """The loss of the base class, for batches that are no pairs."""
        with answering(base_causal_lm(self.model), self._fused_forward), self.accelerator.autocast():
            return super().compute_loss(model, inputs, *options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in the base class, but for what is to differ from the checkpoint (`args.override`)."""
        changed = set(self.args.override or ()) if checkpoint is not None else set()
        keys = {key for name, key in GROUP_KEYS.items() if name in changed}
        own = [dict(group) for group in self.optimizer.param_groups] if changed else []
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, values in zip(self.optimizer.param_groups if changed else (), own, strict=True):
            group.update({key: values[key] for key in keys if key in values})
        if changed & RATE_OPTIONS:
            scheduler = self.lr_scheduler
            rates = [group["initial_lr"] for group in self.optimizer.param_groups]
            factors = [rate(scheduler.last_epoch) for rate in getattr(scheduler, "lr_lambdas", ())] or [1.0] * len(
                rates
            )
            scheduler.base_lrs = rates
            for group, rate, factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
                group["lr"] = rate * factor
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what a log shows

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """Figures of the steps since the last log, by name; a log has their means."""
        return self._metrics["train"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in the base class, also where weights have other names in a file than in the model.

        A mixture of experts is saved expert by expert. The base class takes by name, and leaves the others as they are.
        """
        if not self._taken_as_saved(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._taken_as_saved(str(self.state.best_model_checkpoint), self.model):
            super()._load_best_model()

    def _taken_as_saved(self, checkpoint: str, model: nn.Module) -> bool:
        """Whether weights were loaded the way a model is; `False` where the names are those of the model."""
        base: Any = base_causal_lm(model)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(model, "peft_config"))
        names = saved_names(checkpoint) if whole and not getattr(base, "is_quantized", False) else set()
        if not names or names >= {name for name, _ in base.named_parameters()}:
            return False
        loaded = type(base).from_pretrained(checkpoint, dtype=base.dtype)
        base.load_state_dict(loaded.state_dict())
        return True

    def load_weights(self, checkpoint: str) -> None:
        """Put the weights of a checkpoint into the model."""
        self._load_from_checkpoint(checkpoint)

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


def make_repository(args: CUDConfig) -> None:
    """Make the repository that a run is uploaded to, as the base class does when difficulty has been computed."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    transformers.trainer.hf_api().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)


class _Uploads:
    """The hub's API, with files that folders are uploaded without."""

    def __init__(self, api: Any, ignored: tuple[str, ...]) -> None:
        self._api, self._ignored = api, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, ignore_patterns: list[str] | str | None = None, **options: Any) -> Any:
        asked = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
        return self._api.upload_folder(ignore_patterns=[*asked, *self._ignored], **options)
