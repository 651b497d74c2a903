"""The section of a model card that says how a model was unlearned and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..markdown import markdown_text

HEADING = "## Unlearning"
BUCKET = "forget_prob/bucket_"
NO_BASE = "[None](https://huggingface.co/None)"


def base_model(trainer: Any) -> str:
    """The model that was unlearned: its id, or the name of its folder."""
    name = str(getattr(trainer.inputs.model, "name_or_path", "") or "")
    return markdown_text(Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name) or "a model"


def add_section(path: Path, section: str, base: str) -> None:
    """Put the section at the end of the card at `path`, in place of the one that is there, and name the base model."""
    text = path.read_text(encoding="utf-8").split(HEADING)[0].rstrip()
    text = text.replace(NO_BASE, base)  # TRL names none that lies in a folder
    atomic_write(path, lambda temporary: temporary.write_text(f"{text}\n\n{section}", encoding="utf-8"))


def unlearning_section(trainer: Any) -> str:
    """Method, schedule, difficulty metric, and what evaluations and training steps last saw.

    Residual memorisation by difficulty bucket, and of the utility the retain probability or, where nothing was
    evaluated, the retain loss. No forget text, no sample id.

    Args:
        trainer: a `CUDTrainer`.
    """
    args, history = trainer.args, trainer.state.log_history
    adapter = getattr(trainer.model, "active_peft_config", None)
    settings = {
        "base model": base_model(trainer),
        "trained": "the weights" if adapter is None else f"an adapter ({getattr(adapter.peft_type, 'value', 'PEFT')})",
        "objective": _named(args.objective, args.objective_args),
        **({"objective by bucket": args.objective_by_bucket} if args.objective_by_bucket else {}),
        "retain loss": "none"
        if args.retain_loss == "none"
        else f"{args.retain_loss}, weight {args.retain_weight:g}"
        + ("" if args.retain_weight_end is None else f" at first, {args.retain_weight_end:g} at the end")
        + ("" if args.retain_limit is None else f" at first, held at a loss of {args.retain_limit:g}"),
        "difficulty": "none" if args.difficulty is None else _named(args.difficulty, args.difficulty_args),
        "schedule": _named(args.schedule, args.schedule_args),
        **_trained(args, trainer.inputs.choice),
        "forget samples": len(trainer.forget_ids),
        "passes": args.passes,
        "optimizer steps": trainer.state.global_step,
        "seed": args.seed,
    }
    lines = [HEADING, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items()), ""]
    measured = trainer.measured()
    if measured is not None:
        figures = {key.removeprefix("eval_"): value for key, value in measured.items()}
        lines.append(f"Mean answer probability, measured at step {measured['step']}:")
    else:
        steps = [entry for entry in history if "forget_prob" in entry]
        if not steps:
            return "\n".join([*lines, "Nothing was measured.", ""])
        # A step sees some samples only: of each figure, the last one.
        figures = {key: value for entry in steps for key, value in entry.items()}
        lines.append(
            "Mean answer probability of the samples in the last training steps, each before its step: not that of the "
            "forget set under these weights (`CUDTrainer.evaluate` measures it):"
        )
    whose = "forget samples of these steps" if measured is None else "forget set"
    lines += ["", "| | |", "|---|---|", f"| {whose} | {figures['forget_prob']:.4f} |"]
    if "forget_extraction" in figures:
        lines.append(f"| {whose}, extraction strength | {figures['forget_extraction']:.4f} |")
    buckets = sorted((key for key in figures if key.startswith(BUCKET)), key=lambda key: int(key.removeprefix(BUCKET)))
    for key in buckets:
        number = int(key.removeprefix(BUCKET))
        side = {1: ", easiest", len(buckets): ", hardest"}.get(number, "") if len(buckets) > 1 else ""
        lines.append(f"| difficulty bucket {number}{side} | {figures[key]:.4f} |")
    if "retain_prob" in figures:
        lines.append(f"| retain set | {figures['retain_prob']:.4f} |")
    if "heldout_prob" in figures:
        lines.append(f"| held-out set, which no loss saw | {figures['heldout_prob']:.4f} |")
    if "retain_prob" not in figures and "retain_loss" in figures:
        lines += ["", f"Retain loss ({args.retain_loss}) of the last training steps: {figures['retain_loss']:.4f}."]
    return "\n".join([*lines, ""])


def _trained(args: Any, choice: Any) -> dict[str, str]:
    """Which part of the model is trained, where it is named: what circuits chose by layer and module, or layers."""
    if choice is not None:
        return {"trained": f"{args.circuit_share:g} of the modules, chosen by circuit: {', '.join(choice.names)}"}
    return {} if args.trainable_layers is None else {"trained": f"layers {args.trainable_layers}"}


def _named(name: str, options: Any) -> str:
    shown = ", ".join(f"{key}={_value(value)}" for key, value in (options or {}).items())
    text = f"{name} ({shown})" if shown else name
    return markdown_text(text)


def _value(value: Any) -> Any:
    """An option as a stranger may see it: no ids of samples that were given, no folders of this machine."""
    if isinstance(value, dict):
        return "given"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
