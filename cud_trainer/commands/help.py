"""`cud COMMAND --help`: own options by group on one screen; a group in full; and all that the Trainer has."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..typed import described

WIDTH = 110
GROUP_NAMES = ("data", "objective", "difficulty", "schedule", "training", "model", "output")
# Options by group, the most needed first: those of `CUDConfig`, and of the stack's the few that are of daily use.
# `tests/cli/test_help.py` says which own option is in none.
GROUPS = {
    "data": "forget_dataset retain_dataset turns chat_template system_prompt chat_template_kwargs train_on "
    "alternative_column counterfactual_column group_column max_length",
    "objective": "objective objective_args objective_by_bucket preserve retain_loss retain_weight retain_weight_end "
    "retain_limit dual_rate l2_sp step step_args retain_pairing "
    "loss_normalization reference_top_k refusals target_forget_prob max_retain_loss",
    "difficulty": "difficulty difficulty_args difficulty_scores metrics circuit_args calibration_share folds n_buckets "
    "scoring_batch_bytes save_circuits anchor_bank",
    "schedule": "schedule schedule_args passes",
    "training": "learning_rate per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps "
    "optim seed bf16 use_cpu num_train_epochs train_sampling_strategy remove_unused_columns logging_nan_inf_filter "
    "eval_retain_samples logits_bytes",
    "model": "model_name_or_path trainable trainable_layers circuit_share use_peft "
    "lora_r lora_alpha lora_target_modules dtype model_revision "
    "load_in_4bit architecture",
    "output": "output_dir output overwrite resume_from_checkpoint override save_strategy logging_steps eval_strategy "
    "log_update_share keep_reference work_dir report_to push_to_hub hub_difficulty",
}
OF_NAME = {name: group for group, names in GROUPS.items() for name in names.split()}
# Where the other options of a class belong.
OF_CLASS = {
    "DataArguments": "data",
    "HeldOutArguments": "data",
    "TemplateArguments": "data",
    "TokenizerArguments": "data",
}


@dataclass(frozen=True)
class About:
    """What the help of a command says.

    Attributes:
        what: the command does, in a sentence.
        usage: the options that one needs, behind `cud COMMAND`.
        examples: command lines, each with what it is for; and recipe files.
        groups: group of an option, or of all options of a class that are in none otherwise, by its name.
    """

    what: str
    usage: str
    examples: Sequence[tuple[str, str]] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


def group_of(name: str, kinds: Sequence[type], groups: Mapping[str, str]) -> str | None:
    """The group that an option is shown in; `None` for one that only `--help-all` shows."""
    if name in groups or name in OF_NAME:
        return groups.get(name) or OF_NAME[name]
    for kind in kinds:
        for one in kind.__mro__:
            if name in vars(one).get("__annotations__", {}):
                return {**OF_CLASS, **groups}.get(one.__name__)
    return None


def options_by_group(kinds: Sequence[type], groups: Mapping[str, str]) -> dict[str, list[dataclasses.Field[Any]]]:
    """The options that are shown, by group: in the order of the groups, the most needed options first."""
    fields = {f.name: f for kind in kinds for f in dataclasses.fields(kind) if f.init}
    order = {name: number for number, name in enumerate([*OF_NAME, *groups])}
    shown: dict[str, list[dataclasses.Field[Any]]] = {}
    for name in sorted(fields, key=lambda name: order.get(name, len(order))):
        group = group_of(name, kinds, groups)
        if group is not None:
            shown.setdefault(group, []).append(fields[name])
    names = [*GROUP_NAMES, *dict.fromkeys(groups.values())]
    return {group: shown[group] for group in dict.fromkeys(names) if group in shown}


def short_help(program: str, kinds: Sequence[type], about: About) -> str:
    """The screen of `cud COMMAND --help`."""
    lines = textwrap.wrap(f"usage: {program} {about.usage}", WIDTH, subsequent_indent="       ")
    lines += ["", about.what, ""]
    for group, options in options_by_group(kinds, about.groups).items():
        text = "  ".join(_with_default(one) for one in options)
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"{group:11} ",
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
            break_long_words=False,
        )
    lines += ["", "Every option is --NAME VALUE, or `NAME: value` in the YAML file of --config."]
    lines += ["--import my.py runs a Python file of yours that registers methods (register_objective, ...)."]
    lines += [f"`{program} --help data` explains a group or an option; --help-all shows all, the Trainer's, too.", ""]
    for what, command in about.examples:
        lines.append(f"# {what}\n{command}" if command else what)
    return "\n".join(lines)


def long_help(kinds: Sequence[type], about: About, name: str) -> str:
    """What `--help NAME` says of a group or of an option.

    Raises:
        ValueError: when there is neither.
    """
    groups = options_by_group(kinds, about.groups)
    fields = {f.name: f for kind in kinds for f in dataclasses.fields(kind) if f.init}
    name = name.lstrip("-").replace("-", "_")
    if name not in groups and name not in fields:
        raise ValueError(f"there is no group or option {name!r}; groups are {', '.join(groups)}")
    hints = {n: h for kind in kinds for n, h in _hints(kind).items()}
    lines = []
    for one in groups.get(name) or [fields[name]]:
        said = one.metadata.get("help", "")
        said = " ".join(said.split()) if isinstance(said, str) else ""
        lines.append(f"--{_with_default(one)}  ({described(hints[one.name])})")
        lines += textwrap.wrap(said, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def answer(argv: Sequence[str], parser: argparse.ArgumentParser, kinds: Sequence[type], about: About | None) -> None:
    """Print the help that a command line asks for, and exit; or do nothing.

    Raises:
        ValueError: for a group or option that is not there.
    """
    for place, text in enumerate(argv):
        if text in ("--help-all", "--help_all") or (text in ("-h", "--help") and about is None):
            print(parser.format_help())
        elif text in ("-h", "--help"):
            assert about is not None
            named = argv[place + 1 : place + 2]
            print(long_help(kinds, about, named[0]) if named else short_help(parser.prog, kinds, about))
        else:
            continue
        raise SystemExit(0)


def _hints(kind: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(kind)


def _with_default(one: dataclasses.Field[Any]) -> str:
    """`name`, or `name=default` where that is short and says something."""
    default = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
    text = " ".join(map(str, default)) if isinstance(default, list) else str(getattr(default, "value", default))
    dull = default is dataclasses.MISSING or default is None or default is False or not text or text == "{}"
    return one.name if dull or len(text) > 24 else f"{one.name}={text}".replace(" ", ",")
