"""One cell of a study, in a process of its own: `python -m evaluation.study_cell STUDY_DIR CELL`."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .parent import end_with_parent


def main(study: Path, name: str) -> None:
    from transformers.utils.logging import set_verbosity
    from trl import ModelConfig

    from cud_trainer import CUDConfig
    from cud_trainer.commands import DataArguments, load_tokenizer
    from cud_trainer.files import write_json

    set_verbosity(logging.ERROR)
    folder = study / "cells" / name
    cell = json.loads((folder / "cell.json").read_text())
    shared = json.loads((study / "study.json").read_text())["shared"]
    known = {key: value for key, value in shared["model"].items() if key in ModelConfig.__dataclass_fields__}
    model_args = ModelConfig(**known)
    forget, retain = DataArguments(**shared["data"]).load()
    tokenizer = load_tokenizer(model_args)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a start that was killed: a run begins anew, and ends the same
    options = {
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        **cell["settings"]["options"],
    }  # fmt: skip
    args = CUDConfig(str(work / "run"), **options, overwrite=True)
    started = time.time()
    work_on = _scores if cell["kind"] == "scores" else _run
    result = work_on(study, folder, cell, args, forget, retain, tokenizer, model_args)
    shutil.rmtree(work, ignore_errors=True)
    write_json(folder / "result.json", {**result, "seconds": time.time() - started, "fingerprint": cell["fingerprint"]})


def _scores(
    study: Path, folder: Path, cell: dict, args: Any, forget: Any, retain: Any, tokenizer: Any, model_args: Any
) -> dict:
    """The difficulty scores that several runs share."""
    from cud_trainer.commands import score_model

    scores = score_model(
        args, model_args, forget, retain, tokenizer, metrics=cell["settings"]["metrics"], work_dir=folder / "parts"
    )
    scores.save(folder / "scores.parquet", overwrite=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return {"metrics": scores.metrics}


def _run(
    study: Path, folder: Path, cell: dict, args: Any, forget: Any, retain: Any, tokenizer: Any, model_args: Any
) -> dict:
    """An unlearning run and its trade-off curve."""
    from transformers.trainer_callback import PrinterCallback
    from trl import get_peft_config

    from cud_trainer import CUDTrainer, DifficultyScores
    from cud_trainer.commands import model_options
    from cud_trainer.data import evenly_spaced, prepare_dataset
    from cud_trainer.trainer import DivergenceError

    from .memorization import teacher_forced
    from .tradeoff import TradeoffCallback

    settings = cell["settings"]
    scores = None
    if settings["scores_cell"] is not None:
        scores = DifficultyScores.load(study / "cells" / settings["scores_cell"] / "scores.parquet")
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_options(model_args)}
    prepared = prepare_dataset(forget, tokenizer, max_length=args.max_length, name="forget")
    kept = None
    if retain is not None:
        part = evenly_spaced(retain, settings["retain_eval_samples"])
        kept = prepare_dataset(part, tokenizer, max_length=args.max_length, name="retain")
    pad = int(tokenizer.pad_token_id)
    path = TradeoffCallback(
        prepared, kept if kept is not None else prepared, pad_token_id=pad, every=settings["snapshot_every"]
    )
    trainer = CUDTrainer(
        model_args.model_name_or_path, args, forget_dataset=forget, retain_dataset=retain, processing_class=tokenizer,
        peft_config=get_peft_config(model_args), difficulty_scores=scores, callbacks=[path],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    diverged = None
    try:
        trainer.train()
    except DivergenceError as error:  # the curve up to there is a result
        diverged = str(error)
    finite = [i for i, snapshot in enumerate(path.path.forget) if np.isfinite(snapshot).all()]
    final = {}
    for name, part in (("forget", prepared), ("retain", kept)):
        if part is not None and diverged is None:
            values = teacher_forced(trainer.model, part, tokenizer, batch_size=args.per_device_eval_batch_size)
            final[name] = {key: column.tolist() for key, column in values.items()}
    return {
        "steps": [path.path.steps[i] for i in finite],
        "forget": [path.path.forget[i].tolist() for i in finite],
        "retain": [path.path.retain[i] for i in finite] if kept is not None else None,
        "final": final,
        "diverged": diverged,
        "forget_ids": list(prepared["sample_id"]),
    }


if __name__ == "__main__":
    end_with_parent()
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except Exception as error:
        from cud_trainer.cli import one_line
        from cud_trainer.files import disk_full

        if not (isinstance(error, (ValueError, OSError)) or disk_full(error)):
            raise
        with contextlib.suppress(OSError):
            print(one_line(error), flush=True)
        if disk_full(error):  # the log may have no room for that line
            os._exit(errno.ENOSPC)
        sys.exit(2)
