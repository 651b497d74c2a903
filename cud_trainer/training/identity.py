"""What a checkpoint must agree in with the run that goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CUDConfig
from ..data.ids import IdKey, key_for
from ..objectives import Reference
from ..objectives.alternatives import alternatives_fingerprint
from ..stack_options import OVERRIDABLE
from .checkpoints import checkpoint_to_resume, key_of_checkpoint, read_state
from .inputs import RunInputs
from .plan import RunPlan

# Options that decide what a step does, beside those that can be overridden.
SETTINGS = (
    *OVERRIDABLE,
    "optim",
    "optim_args",
    "optim_target_modules",
    "retain_loss",
    "loss_normalization",
    "reference_top_k",
    "trainable_layers",
    "l2_sp",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
# Of an adapter, what says where it came from and not what it is.
NO_PART_OF_AN_ADAPTER = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
SHOWN = 120


def run_identity(
    inputs: RunInputs, plan: RunPlan, model: Any, reference: Reference, key: IdKey | None
) -> dict[str, Any]:
    """Everything that the next step depends on and a checkpoint does not hold, as plain JSON values.

    Args:
        model: as it is trained, with its adapter.
        reference: with the options of the objective by sample, if there are some.
        key: of the ids in the checkpoint; `None` for hashes as they are in memory.
    """
    args = inputs.args
    objective = f"{args.objective} {json.dumps(args.objective_args, sort_keys=True)}"
    if args.step != "plain":
        objective += f" step {args.step} {json.dumps(args.step_args, sort_keys=True)}"
    if reference.option_scale is not None:
        objective += f" by sample {_digest(reference.option_scale)}"
    if reference.part is not None:
        objective += f" by bucket {json.dumps(args.objective_by_bucket)} {_digest(reference.part)}"
    identity = {
        "schedule": (plan.schedule if key is None else plan.schedule.keyed(key)).hash,
        "objective": objective,
        "alternative_answers": alternatives_fingerprint(inputs.forget),
        "model": plan.model,
        "adapter": _adapters(model),
        "trained_modules": None if inputs.choice is None else inputs.choice.modules,
        **_given(inputs),
    }
    identity = json.loads(json.dumps(identity, default=_plain, sort_keys=True))
    return identity if key is None else key.keyed_values(identity)


def checkpoint_state(trainer: Any) -> dict[str, Any]:
    """What goes into a checkpoint of a `CUDTrainer` beside weights and optimizer, as plain JSON values."""
    return {
        **trainer.run_identity(key_for(trainer.args.output_dir)),
        "optimizer_state": not trainer.args.save_only_model,
        "served": trainer.recorder.served,
        "progress": trainer.progress.state(),
        "began": trainer.void.began,
    }


def _given(inputs: RunInputs) -> dict[str, Any]:
    """The part of it that nothing has to be computed for."""
    args = inputs.args
    settings = {name: getattr(args, name) for name in SETTINGS}
    # Where the rate falls, it falls over all steps.
    settings["max_steps"] = args.max_steps if "constant" not in str(settings["lr_scheduler_type"]) else -1
    given = {
        "global_batch": inputs.global_batch,
        # Of tokens: the template, its date and its system prompt are in them.
        "forget_set": inputs.forget.fingerprint,
        "retain_set": None if inputs.retain is None else inputs.retain.fingerprint,
        **settings,
    }
    return given if inputs.forget.template is None else {**given, "template": inputs.forget.template}


def check_goes_on(inputs: RunInputs) -> None:
    """Raise `ValueError`, before anything is computed, when the checkpoint that is to be resumed from is none, or of
    a run with other data or settings."""
    asked = {"true": True, "false": False}.get(str(inputs.args.resume_from_checkpoint).lower())
    asked = inputs.args.resume_from_checkpoint if asked is None else asked
    checkpoint = checkpoint_to_resume(Path(inputs.args.output_dir), asked)
    if checkpoint is not None:
        given = json.loads(json.dumps(_given(inputs), default=_plain, sort_keys=True))
        state = read_state(checkpoint)
        check_same_run(checkpoint, state, key_of_checkpoint(checkpoint).keyed_values(given), inputs.args)


def check_same_run(checkpoint: Any, state: Mapping[str, Any], identity: Mapping[str, Any], args: CUDConfig) -> None:
    """Raise `ValueError` naming what differs between a checkpoint and the run that is to go on from it."""
    if state.get("optimizer_state") is False:
        raise ValueError(
            f"cannot resume from {checkpoint}: it was saved without the optimizer's state (save_only_model); start a "
            "new run from its weights"
        )
    for key, value in identity.items():
        if state.get(key) != value and key not in (args.override or ()):
            way = f", or ask for another one with override {key!r}" if key in OVERRIDABLE else ""
            raise ValueError(
                f"cannot resume from {checkpoint}: its {key.replace('_', ' ')} is {_short(state.get(key))}, here it is "
                f"{_short(value)}; model, data, schedule, seed, global batch and settings must be those of the "
                f"interrupted run{way}"
            )


def _adapters(model: Any) -> dict[str, Any] | None:
    """The adapters of a model by name, without where they came from."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return None
    return {
        name: {key: value for key, value in config.to_dict().items() if key not in NO_PART_OF_AN_ADAPTER}
        for name, config in configs.items()
    }


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
