"""The `cud` command."""

from __future__ import annotations

import os
import pkgutil
import sys
import warnings

# Subcommand -> (what it does, function taking the remaining arguments). Named, not imported: `cud_trainer` does not
# depend on `evaluation`, and `cud --help` does not wait for torch.
COMMANDS = {
    "demo": (
        "generate data, memorise, score, unlearn four ways, compare and report; needs nothing",
        "evaluation.demo:main",
    ),
    "score": ("score how hard each forget sample will be to unlearn", "cud_trainer.commands.score:score"),
    "train": ("unlearn a forget set with a difficulty-aware schedule", "cud_trainer.commands.train:train"),
    "study": (
        "run a grid of unlearning runs, compare them at matched retain utility, and report",
        "evaluation.study.command:main",
    ),
    "evaluate": ("measure by difficulty what a model still holds, and report", "evaluation.commands.evaluate:evaluate"),
    "import": (
        "the same report from results that open-unlearning has measured",
        "evaluation.commands.import_open_unlearning:main",
    ),
    "list": (
        "objectives, schedules, metrics, architectures, steps, attributions: a line for each",
        "cud_trainer.commands.listing:main",
    ),
}
HELP = ("-h", "--help", "--help-all", "--help_all")


def usage() -> str:
    """The text of `cud --help`."""
    lines = "\n".join(f"  {name:9} {what}" for name, (what, _) in COMMANDS.items())
    return (
        "usage: cud COMMAND [--config FILE.yaml] [--OPTION VALUE ...]\n\n"
        "Difficulty-aware LLM unlearning.\n\n"
        f"commands:\n{lines}\n\n"
        "`cud COMMAND --help` shows its options by group, with examples and recipes; every option can stand in\n"
        "the YAML file, too. `--import my.py` runs a Python file of yours that registers methods.\n\n"
        "  cud demo                                                          # a report in minutes, from nothing\n"
        "  cud train --config recipes/own_data.yaml --model_name_or_path MODEL   # your own samples\n"
        "  cud evaluate --model_name_or_path unlearned --original_model MODEL --forget_dataset forget.jsonl\n\n"
        "exit codes: 0 done, 1 cells of a study failed or a fault of cud itself, 2 bad input or a full disk,\n"
        "            3 nothing was done, 4 training diverged, 130 interrupted"
    )


def one_line(error: BaseException, most: int = 1000) -> str:
    """What an error says, in one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _end_progress_bars() -> None:
    """An error does not stand at the end of a bar's line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; what goes wrong is one line on stderr (CUD_TRACEBACK=1 shows where it came from).

    Returns:
        0; 1 when some cells of a study failed, or for a fault of ours; 2 for bad input or a full disk; what the error
        says in its `exit_code` (3: nothing was done, 4: training diverged); 130 when it was interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(f"cud-trainer {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"cud: error: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if not sys.warnoptions:  # what the stack will change concerns us, not who uses us
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if not set(rest) & set(HELP):
            from .commands.early import check_early

            check_early(name, rest)
        return pkgutil.resolve_name(COMMANDS[name][1])(rest) or 0
    except KeyboardInterrupt as interrupt:
        _end_progress_bars()
        print(f"cud {name}: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        # Before that is imported, there are no hashes; and importing takes seconds.
        ids = sys.modules.get(f"{__package__}.data.ids")
        if os.environ.get("CUD_TRACEBACK"):
            raise
        _end_progress_bars()
        code = exit_code(error)
        said = one_line(error) if ids is None else ids.without_hashes(one_line(error))
        if code == 1:
            said = f"{type(error).__name__}: {said} (a fault of cud: CUD_TRACEBACK=1 shows where)"
        print(f"cud {name}: error: {said}", file=sys.stderr)
        return code


def exit_code(error: BaseException) -> int:
    """The exit code that `error` stands for, see `main`."""
    from .files import disk_full

    foreseen = isinstance(error, (ValueError, OSError, ImportError)) or disk_full(error)
    return getattr(error, "exit_code", 2 if foreseen else 1)


if __name__ == "__main__":
    sys.exit(main())
