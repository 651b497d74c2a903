"""Options by type and range: one check for the command line, YAML, the grids of studies and Python."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MANY = 2**31 - 1  # of anything that is counted; what has its own bound below would take all memory, or never end
# The least and the most that a number may be, by option: the same wherever an option of this name stands. A third value
# says which of the two is itself too little ("(") or too much (")").
RANGES: dict[str, tuple[float, float] | tuple[float, float, str]] = {
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "generate_seeds": (0, 2**32 - 1),
    "per_device_train_batch_size": (1, 2**16),
    "per_device_eval_batch_size": (1, 2**16),
    "batch_size": (1, 2**16),
    "gradient_accumulation_steps": (1, 2**16),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1, ")"),
    "adam_beta2": (0, 1, ")"),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, MANY),
    "label_smoothing_factor": (0, 1, ")"),
    "neftune_noise_alpha": (0, math.inf, "("),
    "max_steps": (-1, MANY),
    "logging_steps": (0, MANY, "("),
    "save_steps": (0, MANY, "("),
    "eval_steps": (0, MANY, "("),
    "eval_delay": (0, MANY),
    "save_total_limit": (1, MANY),
    "torch_empty_cache_steps": (1, MANY),
    "eval_accumulation_steps": (1, MANY),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 1024),
    "dataset_num_proc": (1, 1024),
    "ddp_timeout": (1, MANY),
    "ddp_bucket_cap_mb": (1, MANY),
    "router_aux_loss_coef": (0, math.inf),
    "max_length": (1, MANY),
    "max_forget_samples": (1, MANY),
    "max_retain_samples": (1, MANY),
    "chunk_tokens": (2, MANY),
    "scoring_batch_bytes": (1, 2**62),
    "logits_bytes": (0, 2**62),
    "batch_bytes": (1, 2**62),
    "passes": (1, 100_000),
    "max_passes": (1, 100_000),
    "folds": (2, 10_000),
    "n_buckets": (1, 10_000),
    "reference_top_k": (1, 1_000_000),
    "eval_retain_samples": (1, MANY),
    "retain_weight": (0, math.inf),
    "l2_sp": (0, 1, ")"),
    "dual_rate": (0, math.inf, "("),
    "calibration_share": (0, 1, "("),
    "circuit_share": (0, 1, "("),
    "samples": (0, 10_000),
    "temperature": (0, math.inf, "("),
    "leak_rouge": (0, 1, "("),
    "leak_span": (1, MANY),
    "relearn_samples": (0, MANY),
    "relearn_steps": (1, 1_000_000),
    "relearn_rate": (0, math.inf, "("),
    "workers": (1, 1024),
    "time": (1, MANY),
    "gpus": (0, 1024),
    "cpus": (1, 2**16),
    "mem": (0, 2**20, "("),
    "snapshot_every": (1, MANY),
    "retain_eval_samples": (1, MANY),
    "tuning_seeds": (1, MANY),
    "heldout_samples": (1, MANY),
    "extensions": (0, MANY),
    "end_below": (0, 1, ")"),
    "end_worst_quarter": (0, 1, ")"),
    "epochs": (1, 100_000),
    "report_seeds": (2, 1024),
    "lora_r": (1, 2**16),
    "lora_alpha": (1, MANY),
    "lora_dropout": (0, 1, ")"),
}
# Values that the stack takes, or makes itself, beside the type that it gives the field: one name of several as it is.
ALSO: dict[str, type] = {"lora_target_modules": str, "fsdp": bool}
# Where an empty text says something.
MAY_BE_EMPTY = {"difficulty", "debug", "fsdp"}


def check_options(options: Any, *, strict: bool = True) -> None:
    """Check every field of a dataclass; paths become strings, and numbers of NumPy those of Python.

    Args:
        strict: also refuse objects that are no plain values where the field has no place for them; without, whoever
            takes them may.

    Raises:
        ValueError: naming the option whose value is of another type, empty, not finite, or out of its range.
    """
    for name, hint in _hints(type(options)).items():  # type: ignore[arg-type]
        value = getattr(options, name)
        plain = _plain(value)
        if plain is not value:
            object.__setattr__(options, name, plain)  # of a frozen one, too
            value = plain
        # The types that the stack gives its fields leave out what it makes of them itself.
        unsaid = not strict and (not _is_plain(value) or (value is None and name not in RANGES))
        unsaid = unsaid or isinstance(value, ALSO.get(name, ()))
        if not fits(value, hint) and not unsaid:
            raise ValueError(f"{name} must be {described(hint)}, got {shown(value)}")
        if value == "" and name not in MAY_BE_EMPTY:
            raise ValueError(f"{name} is empty")
        for one in value if isinstance(value, (list, tuple)) else [value]:
            check_number(name, one)


def check_values(kind: type, values: dict[str, Any], where: str) -> None:
    """As `check_options`, of values for fields of `kind` that no instance has yet; other names are left alone.

    Args:
        where: what names are put behind in errors.
    """
    for name, value in values.items():
        hint = _hints(kind).get(name)
        if hint is None:
            continue
        unsaid = isinstance(value, ALSO.get(name, ())) or (value is None and name not in RANGES)
        if _is_plain(value) and not fits(value, hint) and not unsaid:
            raise ValueError(f"{where}: {name} must be {described(hint)}, got {shown(value)}")
        if value == "" and name not in MAY_BE_EMPTY:
            raise ValueError(f"{where}: {name} is empty")
        try:
            check_number(name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def defaults(options: Any) -> dict[str, Any]:
    """What the fields of a dataclass, or of its instance, are when nothing is said; they all have a default."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(options)
    }


def check_void(options: Any, needs: dict[str, str]) -> None:
    """Raise `ValueError` naming an option that was set although the one that gives it a meaning was not.

    Args:
        needs: that other option, by option; several, of which one is enough, are joined by "|".
    """
    usual = defaults(options)
    for name, needed in needs.items():
        set_ = getattr(options, name) != usual[name]
        if set_ and not any(getattr(options, one) for one in needed.split("|")):
            raise ValueError(f"{name} has no effect without {' or '.join(needed.split('|'))}")


def check_number(name: str, value: Any) -> None:
    """Raise `ValueError` when a number is not finite or out of the range that an option of this name has."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least, most, *ends = RANGES.get(name, (-math.inf, math.inf))
    if math.isnan(value) or (math.isinf(value) and name != "max_grad_norm"):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if isinstance(value, int) and abs(value) > 2**63 - 1:
        raise ValueError(f"{name} must be at most {most if most != math.inf else 2**63 - 1:g}, got {shown(value)}")
    if value < least or (value == least and ends == ["("]):
        bound = f"at least {least:g}" if ends != ["("] else "positive" if least == 0 else f"above {least:g}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    if value > most or (value == most and ends == [")"]):
        raise ValueError(f"{name} must be {'below' if ends == [')'] else 'at most'} {most:.10g}, got {value!r}")


def check_numbers_within(name: str, value: Any) -> None:
    """Raise `ValueError` for a number anywhere in a mapping of options that is not finite, or huge."""
    if isinstance(value, dict):
        for key, one in value.items():
            check_numbers_within(f"{name}: {key}", one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_numbers_within(name, one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    elif isinstance(value, int) and abs(value) > 2**63 - 1:
        raise ValueError(f"{name} must be at most {2**63 - 1:g}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in an error, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is one of this type; a number may stand without its decimal point."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        named = _names(hint)
        return value in named if named and isinstance(value, str) else any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is not None:
        return True  # none of those that options have
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [one.value for one in hint]
    return isinstance(hint, type) and isinstance(value, hint)


def described(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if _names(hint):
            return f"one of {_names(hint)}"
        return " or ".join(dict.fromkeys(described(one) for one in inner))
    if origin is list:
        return f"a list of {described(inner[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return "a mapping" if origin is dict or hint is dict else words.get(hint, getattr(hint, "__name__", str(hint)))


def _names(hint: Any) -> list[str]:
    """The names that a text may be where the stack takes an enumeration or its text; empty for any other type."""
    kinds = [one for one in get_args(hint) if isinstance(one, type) and issubclass(one, Enum)]
    return [str(member.value) for kind in kinds for member in kind]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return float(value)
    return value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, dict, list, tuple))
