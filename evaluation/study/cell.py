"""Works on the cells of a study whose names it reads from standard input: `python -m evaluation.study.cell STUDY_DIR`.

A finished cell is answered by a line on standard output; what else a cell prints goes to its `log.txt`. After a failure
the process ends, so that no cell starts from what another left behind.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cud_trainer.cli import one_line
from cud_trainer.files import disk_full


def main(study: Path, name: str) -> None:
    from transformers.utils.logging import set_verbosity
    from trl import ModelConfig

    from cud_trainer import CUDConfig
    from cud_trainer.commands.options import load_tokenizer
    from cud_trainer.files import write_json

    from .command import StudyArguments

    set_verbosity(logging.ERROR)
    folder = study / "cells" / name
    cell = json.loads((folder / "cell.json").read_text())
    shared = json.loads((study / "study.json").read_text())["shared"]
    known = {key: value for key, value in shared["model"].items() if key in ModelConfig.__dataclass_fields__}
    model_args = ModelConfig(**known)
    # The grid is of no use here, but must be there.
    data = StudyArguments(**shared["data"], grid={"seed": [0]})
    tokenizer = load_tokenizer(model_args)
    forget, retain = data.load(tokenizer)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a start that was killed: a run begins anew, and ends the same
    options = {
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        **cell["settings"]["options"],
    }  # fmt: skip
    args = CUDConfig(str(work / "run"), **options, overwrite=True)
    started = time.time()
    work_on = _scores if cell["kind"] == "scores" else _run
    result = work_on(study, folder, cell, args, forget, retain, tokenizer, model_args, data.load_utility(tokenizer))
    shutil.rmtree(work, ignore_errors=True)
    write_json(folder / "result.json", {**result, "seconds": time.time() - started, "fingerprint": cell["fingerprint"]})


def _scores(
    study: Path, folder: Path, cell: dict, args: Any, forget: Any, retain: Any, tokenizer: Any, model_args: Any, _: Any
) -> dict:
    """The difficulty scores that several runs share."""
    from cud_trainer.commands.score import score_model

    scores = score_model(
        args, model_args, forget, retain, tokenizer, metrics=cell["settings"]["metrics"], work_dir=folder / "parts"
    )
    scores.save(folder / "scores.parquet", overwrite=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return {"metrics": scores.metrics}


def _run(
    study: Path,
    folder: Path,
    cell: dict,
    args: Any,
    forget: Any,
    retain: Any,
    tokenizer: Any,
    model_args: Any,
    utility: Any,
) -> dict:
    """An unlearning run and its trade-off curve."""
    from transformers.trainer_callback import PrinterCallback
    from trl import get_peft_config

    from cud_trainer import CUDTrainer, DifficultyScores
    from cud_trainer.commands.options import model_options
    from cud_trainer.data import evenly_spaced, prepare_samples
    from cud_trainer.trainer import DivergenceError

    from ..metrics.memorization import teacher_forced
    from ..metrics.robustness import relearn
    from ..trajectory import TradeoffCallback

    settings = cell["settings"]
    scores = None
    if settings["scores_cell"] is not None:
        scores = DifficultyScores.load(study / "cells" / settings["scores_cell"] / "scores.parquet")
    elif "scores_file" in settings:
        scores = DifficultyScores.load(settings["scores_file"])
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_options(model_args)}
    prepared = prepare_samples(forget, tokenizer, max_length=args.max_length, name="forget")
    kept = None
    measured = retain if utility is None else utility
    if measured is not None:
        part = evenly_spaced(measured, settings["retain_eval_samples"])
        kept = prepare_samples(part, tokenizer, max_length=args.max_length, name="utility")
    again = settings.get("relearn")
    path = TradeoffCallback(
        prepared, kept if kept is not None else prepared, every=settings["snapshot_every"],
        keep_at=None if again is None or kept is None else again["level"],
    )  # fmt: skip
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
    relearned = None
    if again is not None and path.best is not None:
        number, weights = path.best
        trainer.model.load_state_dict(weights, strict=False)
        # The same samples in every cell, so that the others can be compared one by one.
        rows = np.random.default_rng(0).permutation(len(prepared))[: again["samples"]]
        found = relearn(
            trainer.model, prepared, rows.tolist(), steps=[again["steps"]],
            learning_rate=again["rate"],
        )  # fmt: skip
        relearned = {
            "step": path.path.steps[number],
            "taught": sorted(rows.tolist()),
            "before": found[0].tolist(),
            "after": found[again["steps"]].tolist(),
        }
    return {
        "relearned": relearned,
        "steps": [path.path.steps[i] for i in finite],
        "forget": [path.path.forget[i].tolist() for i in finite],
        "retain": [path.path.retain[i] for i in finite] if kept is not None else None,
        "final": final,
        "diverged": diverged,
        "forget_ids": list(prepared.ids),
    }


def serve(study: Path) -> None:
    """Do one cell after the other until standard input ends."""
    names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            busy.set()
            names.put(line.strip())
        names.put(None)
        if busy.is_set():  # the study was killed: what is not finished is begun anew by its next start
            os._exit(1)

    answers = os.fdopen(os.dup(1), "w")
    threading.Thread(target=listen, daemon=True).start()
    while (name := names.get()) is not None:
        try:
            with (study / "cells" / name / "log.txt").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            main(study, name)
        except Exception as error:
            if not (isinstance(error, (ValueError, OSError)) or disk_full(error)):
                raise
            with contextlib.suppress(OSError):
                print(one_line(error), flush=True)
            if disk_full(error):  # the log may have no room for that line
                os._exit(errno.ENOSPC)
            sys.exit(2)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        sys.stdout.flush()
        busy.clear()
        print(name, file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
