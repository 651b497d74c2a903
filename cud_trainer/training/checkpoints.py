"""What a run leaves in its folder: names, what may be begun or continued there, and saves that are whole or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..config import CUDConfig
from ..data.ids import KEY_FILE, IdKey, keys_beside
from ..files import LOCK, DiskFullError, check_output_dir, full_disk_named, holds_something
from ..ownership import MODEL_FILES, REPORT_FILES, check_no_input, clear
from ..schedule import Schedule

STATE_FILE = "cud_state.json"
SCORES_FILE = "difficulty.parquet"
SCHEDULE_FILE = "schedule.parquet"
REFERENCE_FILE = "reference.safetensors"
BASE_DIR = "base_model"  # what a new adapter stands on, where an earlier adapter was folded into it
TEMPLATE_FILE = "template.json"  # what the chat template sees beside the messages, its date above all
WORK_DIR = "difficulty.work"  # finished parts of scores that are being computed
# What does not go to the hub with a model: `reference.safetensors` has the likely tokens of memorised answers; what a
# kill left unfinished is only removed at the next start.
LEFTOVERS = tuple(f"{above}{name}{inner}" for name in (".*.tmp", LOCK) for above in ("", "*/") for inner in ("", "/*"))
NEVER_UPLOADED = (REFERENCE_FILE, KEY_FILE, f"*/{KEY_FILE}", f"{WORK_DIR}/*", *LEFTOVERS)
UPLOADED_IF_ASKED = (SCORES_FILE, SCHEDULE_FILE)
CHECKPOINTS = "checkpoint-*"
# All that a run leaves, and the report of an audit that was put beside it.
RUN_FILES = (
    *MODEL_FILES,
    SCORES_FILE,
    SCHEDULE_FILE,
    TEMPLATE_FILE,
    REFERENCE_FILE,
    WORK_DIR,
    BASE_DIR,
    KEY_FILE,
    "trainer_state.json",
    "*_results.json",
    "runs",
    *REPORT_FILES,
)
# One of these shows that there was a run: a folder without any is somebody's own, and its README stays.
MARKS = (
    CHECKPOINTS,
    SCORES_FILE,
    SCHEDULE_FILE,
    TEMPLATE_FILE,
    WORK_DIR,
    "training_args.bin",
    "adapter_model.*",
    "model*.safetensors*",
    "results.json",
)


def last_checkpoint(output: Path) -> str | None:
    """The last complete checkpoint in `output`: one whose writing was cut short has no state of ours yet."""
    complete = [path.parent for path in output.glob(f"checkpoint-*/{STATE_FILE}") if path.parent.name[11:].isdecimal()]
    return str(max(complete, key=lambda path: int(path.name[11:]))) if complete else None


def begun(output: str | Path) -> set[str]:
    """Names in `output` of what a run leaves that ended before its first checkpoint was whole; the trainer checks
    that it was the same run."""
    output = Path(output)
    names = {SCORES_FILE, WORK_DIR, REFERENCE_FILE, SCHEDULE_FILE, TEMPLATE_FILE, BASE_DIR, KEY_FILE}
    if (output / SCHEDULE_FILE).exists():
        cut_short = {path.name for path in output.glob("checkpoint-*") if not (path / STATE_FILE).exists()}
        names |= {"README.md", *cut_short}
    return names


def check_may_start(args: CUDConfig) -> None:
    """An output directory with something foreign in it is refused at once; whether a run in it is resumed or started
    anew is only known in `train`."""
    output = Path(args.output_dir)
    ran_before = output.is_dir() and ((output / SCORES_FILE).exists() or any(output.glob("checkpoint-*")))
    resume = bool(args.resume_from_checkpoint) or ran_before
    check_output_dir(output, overwrite=args.overwrite, resume=resume, known=begun(output))


def check_is_no_model(args: CUDConfig, model: Any) -> None:
    """Raise `ValueError` when the output directory is the folder that the model comes from."""
    check_no_input(Path(args.output_dir), {"the model's folder": getattr(model, "name_or_path", model)})


def clear_before(args: CUDConfig) -> None:
    """Let nothing of an overwritten run be there when the new one begins to write.

    Its checkpoints stay until `train` where it may yet be asked to go on from one of them: unless
    `args.resume_from_checkpoint` is `False`.
    """
    output = Path(args.output_dir)
    if args.overwrite and args.process_index == 0 and any(any(output.glob(mark)) for mark in MARKS):
        anew = args.resume_from_checkpoint is False
        kept = () if anew else (KEY_FILE,)  # what the checkpoints were made with
        clear(output, [*(name for name in RUN_FILES if name not in kept), *([CHECKPOINTS] if anew else [])])


def remove_cut_short(output: Path) -> None:
    """Delete checkpoints whose writing was cut short; only where nobody is writing."""
    for path in output.glob(CHECKPOINTS):
        if path.name[11:].isdecimal() and not (path / STATE_FILE).exists():
            shutil.rmtree(path, ignore_errors=True)


def check_starts_anew(output: Path, schedule: Schedule) -> None:
    """Raise `ValueError` when `output` holds more than the same run leaves before its first checkpoint."""
    own_names = {SCORES_FILE, WORK_DIR, REFERENCE_FILE, TEMPLATE_FILE, BASE_DIR, KEY_FILE}
    if _holds_schedule(output / SCHEDULE_FILE, schedule):  # a run that was killed before its first checkpoint
        own_names = begun(output)
    if holds_something(output, own_names):
        check_output_dir(output)


def _holds_schedule(path: Path, schedule: Schedule) -> bool:
    try:
        found = Schedule.load(path)
        return found.hash in (schedule.hash, *(schedule.keyed(key).hash for key in found.keys))
    except ValueError:
        return False


def checkpoint_to_resume(output: Path, asked: str | bool | None) -> Path | None:
    """The checkpoint folder that `resume_from_checkpoint` stands for; `ValueError` for `True` where there is none."""
    if asked is not True:
        return Path(asked) if asked else None
    last = last_checkpoint(output)
    if last is None:
        raise ValueError(f"there is no complete checkpoint to resume from in {output}")
    return Path(last)


def recorded_template(folder: str | Path) -> dict[str, Any] | None:
    """What a chat template saw in the run whose folder or checkpoint this is; `None` where nothing is recorded."""
    for path in (Path(folder) / TEMPLATE_FILE, Path(folder) / STATE_FILE):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = found.get("template") if path.name == STATE_FILE and isinstance(found, dict) else found
        if isinstance(found, dict):
            return found
    return None


def template_to_go_on_with(args: CUDConfig, scores: Any) -> dict[str, Any] | None:
    """What the chat template saw in the run that is resumed, in an earlier start of this one, or in its scores."""
    output = Path(args.output_dir)
    if args.resume_from_checkpoint and str(args.resume_from_checkpoint).lower() != "false":
        asked = args.resume_from_checkpoint
        checkpoint = last_checkpoint(output) if str(asked).lower() == "true" else asked
        found = recorded_template(checkpoint) if checkpoint else None
    else:
        found = None if args.overwrite else recorded_template(output)
    if found is None and scores is not None:
        found = scores.provenance.get("template")
    return getattr(args, "recorded_template", None) if found is None else found


def key_of_checkpoint(checkpoint: Path) -> IdKey:
    """The key of what a checkpoint says of the samples; `ValueError` where it is missing."""
    keys = keys_beside(checkpoint)
    if not keys:
        raise ValueError(
            f"cannot resume from {checkpoint}: the key that its ids were made with is missing; give its file as "
            f"id_key, or put it back as {checkpoint.parent / KEY_FILE}"
        )
    return keys[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """State at `checkpoint`; `ValueError` where there is none."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no complete checkpoint of CUDTrainer: {STATE_FILE} is missing")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(state, dict) or "schedule" not in state:
        raise ValueError(f"{path} holds no state of a run")
    return state


def saved_names(folder: str | Path) -> set[str]:
    """Names of the weights in the files of a model; none where it has no such files."""
    names: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def save_base(model: Any, args: CUDConfig) -> None:
    """Write the model that a new adapter stands on into the output directory, and let it say so: an adapter names its
    base model, and where an earlier adapter was folded into that, no other folder holds it."""
    target = Path(args.output_dir).resolve() / BASE_DIR
    if args.process_index == 0 and not target.is_dir():
        staging = target.with_name(f".{BASE_DIR}.{os.getpid()}.tmp")
        try:
            with full_disk_named(target):
                model.save_pretrained(staging)
                os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    model.name_or_path = str(target)


@contextmanager
def whole_model(target: Path, *, writes: bool) -> Iterator[Path]:
    """A folder to save a model in; on leaving, its files go one by one to their place in `target`.

    Args:
        writes: whether this process is one that writes.
    """
    staging = target / f".model.{os.getpid()}.tmp"
    try:
        with full_disk_named(target):
            if writes and (target / "README.md").is_file():  # PEFT adds to it
                staging.mkdir(parents=True)
                shutil.copy(target / "README.md", staging)
            yield staging
            made = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
            stale = target.glob("model*.safetensors*") if made else ()
            for path in [path for path in stale if path.relative_to(target) not in made]:
                path.unlink()  # weights that were saved in another number of files
            for name in sorted(made):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def whole_checkpoint(checkpoint: Path, *, writes: bool) -> Iterator[None]:
    """A checkpoint that cannot be written whole is removed; until it is, it has no state of ours."""
    if writes:
        (checkpoint / STATE_FILE).unlink(missing_ok=True)
    try:
        with full_disk_named(checkpoint):
            yield
    except DiskFullError:
        if writes:
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise
