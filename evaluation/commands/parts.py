"""What `cud evaluate` keeps of its passes until the report is written: the same command goes on after a kill."""

from __future__ import annotations

import json
from typing import Any

from cud_trainer.data.ids import plain_hash
from cud_trainer.models.fingerprint import versions
from cud_trainer.resumable import WorkDir, process_state, remove_work

from ..metrics.measure import other_answers
from .inputs import EvaluateInputs

# Options that a figure of a pass hangs on. Models and data count by what they hold; a pass has a name of its own for
# what else is done to a model; all other options choose passes, or shape the report.
SETTINGS = (
    "batch_size",
    "max_length",
    "generation_engine",
    "seed",
    "samples",
    "temperature",
    "leak_rouge",
    "leak_span",
    "nli_model",
    "relearn_samples",
    "relearn_rate",
    "works_on_weights",  # an adapter is folded in then, which rounds
)


def begin_work(inputs: EvaluateInputs) -> WorkDir:
    """The directory of finished parts, in the output directory; all processes have to ask.

    Raises:
        ValueError: when it holds parts of another evaluation, naming what differs; with `overwrite` these go.
    """
    path, identity = inputs.args.work_dir, identity_of(inputs)
    try:
        return WorkDir(path, identity)
    except ValueError:
        if not inputs.args.overwrite:
            raise
    if process_state().is_main_process:
        remove_work(path)
    return WorkDir(path, identity)


def identity_of(inputs: EvaluateInputs) -> dict[str, Any]:
    """What finished parts depend on, beside the model: plain JSON values, no text."""
    args, forget = inputs.args, inputs.forget_raw
    identity: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
    identity |= {name: str(value) for name, value in inputs.model_options.items()}
    identity |= {f"{name} dataset": part.fingerprint for name, part in inputs.sets.items()}
    asked = sorted({column for pair in other_answers(forget).values() for column in pair})
    for name, texts in {
        "other answers": [forget[column][:] for column in asked],
        "utility": {name: dataset.to_list() for name, dataset in inputs.utility.items()},
        "secrets": inputs.secrets,
    }.items():
        identity[name] = plain_hash(json.dumps(texts, default=str).encode())
    if inputs.forget.template is not None:
        identity["template"] = inputs.forget.template
    return {**identity, "versions": versions()}
