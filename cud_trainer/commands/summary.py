"""The last lines of `cud score` and `cud train`: what was done, measured and written, and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.groups import group_labels
from ..difficulty import DifficultyScores
from ..training.residual import COSTLY, share_lost

FEW = 10  # samples in a bucket or group below which its mean says next to nothing
SHOWN = 3  # groups


def score_summary(scores: DifficultyScores, groups: Sequence[Any] | None, n_buckets: int) -> list[str]:
    """Buckets and the hardest groups by the primary metric, and whether there are too few samples to trust them.

    Args:
        groups: of each sample, in the order of the scores.
    """
    metric, size = scores.metrics[0], len(scores)
    values = scores[metric]
    if metric in scores.constant or size < 2:
        return [f"{metric} is the same for all samples: it ranks nothing"] if size > 1 else []
    buckets = scores.bucketed(metric, min(n_buckets, size))
    lines = [f"buckets of {metric}, higher = harder:"]
    for number, mask in enumerate(buckets.masks, start=1):
        side = {1: ", easiest", buckets.count: ", hardest"}.get(number, "")
        part = values[mask]
        lines.append(f"  {number}{side}: {part.min():.4g} to {part.max():.4g} ({mask.sum()} samples)")
    smallest = {"bucket": min(int(mask.sum()) for mask in buckets.masks)}
    if groups is not None:
        labels = np.array(group_labels(list(groups)))
        means = {label: (float(values[labels == label].mean()), int((labels == label).sum())) for label in set(labels)}
        hardest = sorted(means, key=lambda label: (-means[label][0], label))[:SHOWN]
        shown = ", ".join(f"{label} {means[label][0]:.4g} ({means[label][1]} samples)" for label in hardest)
        lines.append(f"hardest of {len(means)} groups by mean {metric}: {shown}")
        smallest["group"] = min(count for _, count in means.values())
    few = " and ".join(f"the smallest {what} has {count}" for what, count in smallest.items() if count < FEW)
    if few:
        lines.append(f"too few samples to trust this: {few}, and the mean of fewer than {FEW} is mostly chance")
    return lines


def after_scoring(output: str, read: dict[str, Any]) -> str:
    """The command that comes after `cud score`."""
    return "next: cud train" + _options(read) + f" --difficulty_scores {shlex.quote(output)} --output_dir unlearned"


def train_summary(trainer: Any, read: dict[str, Any]) -> list[str]:
    """What a run did, what was measured at its end, what its folder holds, and what comes next.

    Args:
        trainer: a `CUDTrainer` that has been evaluated.
        read: options of the command that name what it read.
    """
    folder = trainer.args.output_dir
    done = f"unlearned {len(trainer.forget_ids)} samples in {trainer.state.global_step} steps"
    start, measured = trainer.residual.at_start, trainer.measured()
    warnings: list[str] = []
    if measured is not None:
        before = "" if start is None else f"{float(start.mean()):.3f} -> "
        done += f"; mean forget probability {before}{measured['eval_forget_prob']:.3f}"
        kept, retain = trainer.residual.retain_at_start, measured.get("eval_retain_prob")
        if retain is not None:
            before = "" if kept is None else f"{kept:.3f} -> "
            done += f", retain probability {before}{retain:.3f}"
        done += f", measured at step {measured['step']}"
        lost = None if kept is None or retain is None else share_lost(kept, retain)
        if lost is not None and lost > COSTLY:
            warnings.append(
                f"warning: {lost:.0%} of the retain probability went, more than {COSTLY:.0%}: raise --retain_weight, "
                "or lower --learning_rate or --passes"
            )
    lines = [done, *warnings]
    adapter = (Path(folder) / "adapter_config.json").is_file()
    scores = "" if trainer.difficulty_scores is None else ", difficulty scores"
    lines.append(f"written: {'adapter' if adapter else 'model'}{scores}, schedule and card in {folder}")
    if adapter:
        lines.append(
            "this folder is an adapter: load it with PEFT (AutoPeftModelForCausalLM.from_pretrained), or merge it: "
            "`.merge_and_unload().save_pretrained(FOLDER)`; the other commands read it as it is"
        )
    lines.append("is it gone? the next command says it with --holdout_dataset: samples that were never in the data")
    base = read.get("model_name_or_path")
    told = {**read, "model_name_or_path": folder, "original_model": base}
    lines.append("next: cud evaluate" + _options(told) + f" --output_dir {shlex.quote(f'{folder}-report')}")
    return lines


def _options(read: dict[str, Any]) -> str:
    """Options of models and data as on a command line; what is not given is not there."""
    names = (
        "model_name_or_path",
        "original_model",
        "forget_dataset",
        "forget_config",
        "retain_dataset",
        "retain_config",
    )
    return "".join(f" --{name} {shlex.quote(str(read[name]))}" for name in names if read.get(name))
