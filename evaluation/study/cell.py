"""What one cell of a study does: `work_on` is its way from a folder with its settings to its result."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig

from cud_trainer import CUDConfig
from cud_trainer.data import Samples, evenly_spaced, prepare_samples
from cud_trainer.data.ids import id_key_kept_in, keyed_for
from cud_trainer.files import private_folder
from cud_trainer.logprobs import answer_probability

from ..endpoint import worst_quarter
from ..trajectory import Path as Trajectory
from ..trajectory import TradeoffCallback
from .grid import Cell
from .heldout import REFERENCE, ask_reference
from .options import EQUAL_COMPUTE, StudyArguments
from .oracle import OUTCOME, save_outcome
from .runs import pairs_of

GENERATE_BATCH = 64  # generating is slow one by one


@dataclass(frozen=True)
class _World:
    """What all cells of a study share: the model, and the data as loaded (not prepared)."""

    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    forget: Dataset
    retain: Dataset | None
    utility: Dataset | None
    held_out: Dataset | None
    holdout: Dataset | None
    day: str | None


def work_on(study: Path, cell: Cell) -> dict[str, Any]:
    """Do the work of a cell in its folder of the study; returns what its `result.json` is to hold."""
    from transformers.utils.logging import set_verbosity

    set_verbosity(logging.ERROR)
    folder = study / "cells" / cell.name
    world = _world(study, cell.settings.get("options", {}))
    with id_key_kept_in(study):
        return _work_on(study, folder, cell, world)


def _work_on(study: Path, folder: Path, cell: Cell, world: _World) -> dict[str, Any]:
    if cell.kind == REFERENCE:
        return ask_reference(cell.settings, world.forget, world.holdout, world.tokenizer, world.day)
    if cell.kind == OUTCOME:
        return save_outcome(study, cell)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a start that was killed: a run begins anew, and ends the same
    private_folder(work)
    options = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **cell.settings["options"],
    }
    args = CUDConfig(str(work / "run"), **options, overwrite=True)
    args.recorded_template = {"date": world.day}  # one day for all cells
    result = (_scores if cell.kind == "scores" else _run)(study, cell, args, world)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _world(study: Path, options: dict[str, Any]) -> _World:
    from cud_trainer.commands.imports import run_imports
    from cud_trainer.commands.options import load_tokenizer

    shared = json.loads((study / "study.json").read_text())["shared"]
    run_imports(shared.get("imports", ()))
    fields = ModelConfig.__dataclass_fields__
    model = ModelConfig(**{name: value for name, value in shared["model"].items() if name in fields})
    # The grid is of no use here, but must be there.
    data = StudyArguments(**shared["data"], grid={"seed": [0]})
    tokenizer = load_tokenizer(model, SimpleNamespace(**options))
    others = data.load_utility(tokenizer), data.load_heldout(tokenizer), data.load_holdout(tokenizer)
    return _World(model, tokenizer, *data.load(tokenizer), *others, shared.get("day"))


def _scores(study: Path, cell: Cell, args: CUDConfig, world: _World) -> dict[str, Any]:
    """The difficulty scores that several runs share."""
    from cud_trainer.commands.score import score_model

    folder = study / "cells" / cell.name
    scores = score_model(
        args,
        world.model,
        world.forget,
        world.retain,
        world.tokenizer,
        metrics=cell.settings["metrics"],
        work_dir=folder / "parts",
        template=args.template_context(args.recorded_template),
    )
    scores.save(folder / "scores.parquet", overwrite=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return {"metrics": scores.metrics}


def _run(study: Path, cell: Cell, args: CUDConfig, world: _World) -> dict[str, Any]:
    """An unlearning run and its trade-off curve."""
    from transformers.trainer_callback import PrinterCallback

    from cud_trainer import CUDTrainer
    from cud_trainer.commands.options import adapter_options, model_options
    from cud_trainer.trainer import DivergenceError

    settings = cell.settings
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), **model_options(world.model)}
    scores = _scores_of(study, settings)
    if settings.get(EQUAL_COMPUTE):
        args.passes += _more_passes(scores, len(world.forget))
    forget, utility = _measured(args, world, settings["retain_eval_samples"])
    relearning = settings.get("relearn")
    tradeoff = TradeoffCallback(
        forget,
        forget if utility is None else utility,
        every=settings["snapshot_every"],
        keep_at=None if relearning is None or utility is None else relearning["level"],
        **_endpoint_options(args, world, settings),
    )
    trainer = CUDTrainer(
        world.model.model_name_or_path,
        args,
        forget_dataset=world.forget,
        retain_dataset=world.retain,
        processing_class=world.tokenizer,
        peft_config=adapter_options(world.model),
        difficulty_scores=scores,
        callbacks=[tradeoff, _End(tradeoff, settings.get("end_below", 0.0), settings.get("end_worst_quarter", 0.0))],
    )
    trainer.remove_callback(PrinterCallback)
    diverged = None
    try:
        trainer.train()
    except DivergenceError as error:  # the curve up to there is a result
        diverged = str(error)
    path = tradeoff.path
    finite = [i for i, snapshot in enumerate(path.forget) if np.isfinite(snapshot).all()]
    final, unseen = {}, _never_seen(args, world)
    never_seen: dict[str, Any] = {}
    if diverged is None:
        if unseen is not None:
            never_seen["holdout"] = answer_probability(trainer.model, unseen).tolist()
        final = _final_metrics(trainer.model, args, world.tokenizer, forget, utility, settings.get("generate", False))
    relearned = None
    if relearning is not None and tradeoff.best is not None:
        relearned = _relearned(trainer.model, tradeoff, forget, relearning, unseen)
    return {
        "relearned": relearned,
        "steps": [path.steps[i] for i in finite],
        "forget": [path.forget[i].tolist() for i in finite],
        "retain": [path.retain[i] for i in finite] if utility is not None else None,
        "final": final,
        "diverged": diverged,
        "forget_ids": keyed_for(study / "study.json", list(forget.ids)),
        **_endpoint_results(path, finite),
        **never_seen,
        **({"pairs": args.passes * len(forget)} if path.held_out else {}),
    }


def _more_passes(scores: Any, n_forget: int) -> int:
    """Passes that take no fewer pairs than calibrating the scores did.

    Raises:
        ValueError: for scores that were not calibrated.
    """
    pairs = pairs_of(scores)
    if not pairs:
        raise ValueError(f"{EQUAL_COMPUTE}: difficulty {scores.metrics[0]!r} has no calibration to count")
    return -(-pairs // n_forget)


def _endpoint_options(args: CUDConfig, world: _World, settings: dict[str, Any]) -> dict[str, Any]:
    """What is measured beside probabilities: extraction strength, and the held-out samples of a run that is compared by
    its endpoint."""
    from cud_trainer.logprobs import answer_recall
    from cud_trainer.models.generation import stop_tokens

    def extraction(model: Any, forget: Samples) -> tuple[np.ndarray, np.ndarray]:
        return answer_recall(model, forget, stop_tokens(world.tokenizer, model))

    if world.held_out is None:
        return {"extraction": extraction}
    part = evenly_spaced(world.held_out, settings["heldout_samples"])
    template = args.template_context(args.recorded_template)
    held_out = prepare_samples(part, world.tokenizer, max_length=args.max_length, name="held-out", template=template)
    return {"held_out": held_out, "extraction": extraction}


def _endpoint_results(path: Trajectory, finite: list[int]) -> dict[str, Any]:
    """By snapshot: extraction strength of each forget sample, its mean and worst quarter, and each held-out sample."""
    found = np.array([path.extraction[i] for i in finite])
    measured: dict[str, Any] = {
        "extraction": {"mean": found.mean(1).tolist(), "worst_quarter": worst_quarter(found).tolist()},
        "strengths": found.tolist(),
    }
    if path.held_out:
        measured["held_out"] = [path.held_out[i].tolist() for i in finite]
    return measured


def _never_seen(args: CUDConfig, world: _World) -> Samples | None:
    """The never-seen samples, prepared."""
    if world.holdout is None:
        return None
    template = args.template_context(args.recorded_template)
    return prepare_samples(
        world.holdout, world.tokenizer, max_length=args.max_length, name="holdout", template=template
    )


def _measured(args: CUDConfig, world: _World, most: int) -> tuple[Samples, Samples | None]:
    """What is measured during a run, prepared: the forget set, and of what measures utility `most` samples at most."""
    template = args.template_context(args.recorded_template)
    how = {"max_length": args.max_length, "template": template}
    forget = prepare_samples(world.forget, world.tokenizer, name="forget", **how)
    utility = world.retain if world.utility is None else world.utility
    if utility is None:
        return forget, None
    part = evenly_spaced(utility, most)
    return forget, prepare_samples(part, world.tokenizer, name="utility", **how)


def _scores_of(study: Path, settings: dict[str, Any]) -> Any:
    """The difficulty scores that a run builds on: those of a cell, or made before; `None` for a run without any."""
    from cud_trainer import DifficultyScores

    if settings["scores_cell"] is not None:
        return DifficultyScores.load(study / "cells" / settings["scores_cell"] / "scores.parquet")
    return DifficultyScores.load(settings["scores_file"]) if "scores_file" in settings else None


class _End(TrainerCallback):
    """Ends a run when little of the forget set is left, on the mean or of its worst quarter.

    Args:
        tradeoff: runs before this callback.
        share: of the starting forget probability, in [0, 1); less than 0 of it is never left.
        worst: probability of the worst quarter, in [0, 1); 0 never ends a run.
    """

    def __init__(self, tradeoff: TradeoffCallback, share: float, worst: float = 0.0) -> None:
        self.tradeoff, self.share, self.worst = tradeoff, share, worst

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget = self.tradeoff.path.forget
        forgotten = self.worst > 0 and worst_quarter(forget[-1]) <= self.worst
        if forgotten or forget[-1].mean() < self.share * forget[0].mean():
            control.should_training_stop = True


def _final_metrics(
    model: Any,
    args: CUDConfig,
    tokenizer: PreTrainedTokenizerBase,
    forget: Samples,
    utility: Samples | None,
    generate: bool,
) -> dict[str, dict[str, list[float]]]:
    """What is left at the end of a run, of every sample; with `generate` also by the answers that it gives."""
    from ..metrics.memorization import evaluate_memorization

    final = {}
    for name, part in (("forget", forget), ("retain", utility)):
        if part is not None:
            values = evaluate_memorization(
                model,
                part,
                tokenizer,
                batch_size=GENERATE_BATCH if generate else args.per_device_eval_batch_size,
                generate=generate,
                token_statistics=True,
            )
            final[name] = {metric: column.tolist() for metric, column in values.items()}
    return final


def _relearned(
    model: Any, tradeoff: TradeoffCallback, forget: Samples, settings: dict[str, Any], control: Samples | None
) -> dict[str, Any]:
    """What comes back of the forget set when some of its samples are taught again, from the best snapshot; and what the
    same does to samples that were never seen."""
    from ..metrics.robustness import relearn

    assert tradeoff.best is not None
    number, weights = tradeoff.best
    model.load_state_dict(weights, strict=False)
    # The same samples in every cell, so that the others can be compared one by one.
    rows = np.random.default_rng(0).permutation(len(forget))[: settings["samples"]]
    left = relearn(
        model,
        forget,
        rows.tolist(),
        steps=[settings["steps"]],
        learning_rate=settings["rate"],
        control=control,
    )
    return {
        "step": tradeoff.path.steps[number],
        "taught": sorted(rows.tolist()),
        "before": left.forget[0].tolist(),
        "after": left.forget[settings["steps"]].tolist(),
        **({} if left.control is None else {"control": [left.control[at].tolist() for at in (0, settings["steps"])]}),
    }
