"""`cud evaluate`: what a model on disk still holds of the forget set, by difficulty, and what it kept."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from cud_trainer.circuits import CircuitTable, dataset_faithfulness
from cud_trainer.circuits.attribution import needs_counterfactual
from cud_trainer.commands import DataArguments, load_tokenizer, model_options
from cud_trainer.data import check_disjoint, prepare_dataset
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import check_output_dir
from cud_trainer.fingerprint import model_fingerprint, versions

from . import audit
from .memorization import evaluate_memorization


@dataclass
class EvaluateArguments(DataArguments):
    """What `cud evaluate` reads besides TRL's `ModelConfig`; `model_name_or_path` is the unlearned model or adapter."""

    output_dir: str = field(default="cud-evaluation", metadata={"help": "Where the report goes."})
    overwrite: bool = field(default=False, metadata={"help": "Allow an output directory that is not empty."})
    original_model: str | None = field(
        default=None, metadata={"help": "The model before unlearning, to be measured beside it."}
    )
    scores: str | None = field(
        default=None, metadata={"help": "Difficulty scores (parquet); without them there are no buckets."}
    )
    circuits: str | None = field(
        default=None,
        metadata={"help": "Edge scores of the forget set (`cud score --save_circuits`), for pictures of the circuits."},
    )
    faithfulness: bool = field(
        default=False,
        metadata={
            "help": "Measure what share of the answer metric the circuits keep in the original model, beside random "
            "circuits (needs circuits and original_model; eight passes)."
        },
    )
    metric: str | None = field(default=None, metadata={"help": "Metric that makes the buckets (default: the primary)."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    generate: bool = field(default=True, metadata={"help": "Generate answers for ROUGE-L recall."})
    batch_size: int = field(default=16, metadata={"help": "Samples per forward pass."})
    max_length: int | None = field(default=1024, metadata={"help": "The longest sample in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap intervals."})

    def __post_init__(self) -> None:
        for name in ("n_buckets", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def load_model(path: str, options: dict[str, Any]) -> Any:
    """A causal LM, or an adapter on its base model, in evaluation mode on the best device; `ValueError` if neither."""
    try:
        if (Path(path) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {path!r}: {error}") from None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval()


def evaluate(argv: list[str]) -> int:
    """Entry point of `cud evaluate`."""
    from .report import write_report

    args, model_args = TrlParser((EvaluateArguments, ModelConfig), prog="cud evaluate").parse_args_and_config(argv)
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    forget_raw, retain_raw = args.load()
    tokenizer = load_tokenizer(model_args)
    forget = prepare_dataset(forget_raw, tokenizer, max_length=args.max_length, name="forget")
    retain = None
    if retain_raw is not None:
        retain = prepare_dataset(retain_raw, tokenizer, max_length=args.max_length, name="retain")
        check_disjoint(forget, retain)
    scores = None
    if args.scores:
        scores = DifficultyScores.load(args.scores).aligned(list(forget["sample_id"]))
        scores.buckets(args.metric, args.n_buckets)  # refuses before any compute
    table = None
    if args.circuits:
        if scores is None:
            raise ValueError("circuits are shown by difficulty bucket: give --scores, too")
        table = CircuitTable.load(args.circuits).aligned(list(forget["sample_id"]))
    if args.faithfulness and not (args.circuits and args.original_model):
        raise ValueError("faithfulness is that of circuits in the original model: give --circuits and --original_model")
    if (
        args.faithfulness
        and table is not None
        and needs_counterfactual(table.settings["baseline"], table.settings["metric"])
    ):
        raise ValueError("faithfulness needs circuits of the zero or mean baseline and the metric prob or logprob")
    options = model_options(model_args)

    def load(path: str) -> Any:
        model = load_model(path, options)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of {path!r}")
        return model

    def measure(model: Any, what: str) -> dict[str, dict[str, np.ndarray]]:
        found = {}
        for name, part in (("forget", forget), ("retain", retain)):
            if part is not None:
                found[name] = evaluate_memorization(
                    model, part, tokenizer, batch_size=args.batch_size, generate=args.generate, desc=f"{what}: {name}"
                )
        return found

    before, kept = None, None
    if args.original_model:
        model = load(args.original_model)
        if scores is not None:
            scores.check_provenance(model=model_fingerprint(model))
        before = measure(model, "original")
        if args.faithfulness and table is not None:
            kept = dataset_faithfulness(
                model, forget, audit.strongest_edges(table), pad_token_id=tokenizer.pad_token_id,
                batch_size=args.batch_size, seed=args.seed, baseline=table.settings["baseline"],
                metric=table.settings["metric"], ungroup_kv=table.settings.get("ungroup_kv", False),
            )  # fmt: skip
        del model  # before the other one comes
    model = load(model_args.model_name_or_path)
    after, fingerprint = measure(model, "unlearned"), model_fingerprint(model)
    results = audit_results(
        after, before=before, scores=scores, metric=args.metric, n_buckets=args.n_buckets, seed=args.seed,
        name=Path(model_args.model_name_or_path).name,
    )  # fmt: skip
    if table is not None and scores is not None:
        bucket = scores.buckets(args.metric, args.n_buckets)
        note = f"Buckets are those of {args.metric or scores.metrics[0]}."
        results["circuits"] = audit.circuit_section(
            table, bucket, after["forget"]["probability"], seed=args.seed, note=note, kept=kept
        )
    results["run"] = {
        "command": "cud evaluate " + " ".join(argv),
        "seed": args.seed,
        "versions": versions(),
        "model": {"path": model_args.model_name_or_path, "fingerprint": fingerprint},
        "data": {"n_forget": len(forget), "n_retain": 0 if retain is None else len(retain)},
        "seconds": {},
    }
    frame = pd.DataFrame({"sample_id": forget["sample_id"], **after["forget"]})
    if before is not None:
        frame = frame.assign(**{f"before/{name}": values for name, values in before["forget"].items()})
    if scores is not None:
        frame = frame.assign(**scores.columns, bucket=scores.buckets(args.metric, args.n_buckets) + 1)
    path = write_report(results, Path(args.output_dir), frame)
    for line in results["findings"]:
        print(f"- {line}")
    print(f"report: {path.resolve()}")
    return 0


def audit_results(
    after: dict[str, dict[str, np.ndarray]],
    *,
    before: dict[str, dict[str, np.ndarray]] | None = None,
    scores: DifficultyScores | None = None,
    metric: str | None = None,
    n_buckets: int = 4,
    seed: int = 0,
    name: str = "model",
) -> dict[str, Any]:
    """Sections of `results.json` for one unlearned model.

    Args:
        after, before: `{"forget": {metric: [N]}, "retain": {metric: [M]}}` of the unlearned and the original model.
        scores: difficulty of the forget samples, in the same order.
    """
    final: dict[str, Any] = {part: audit.means(values, seed) for part, values in after.items()}
    findings = []
    left = final["forget"]["probability"]
    line = f"mean forget probability {audit.shown(left)}"
    if before is not None:
        started = audit.means(before["forget"], seed)["probability"]["value"]
        line += f" (before unlearning {started:.3f})"
    findings.append(line)
    if "retain" in final:
        line = f"mean retain probability {audit.shown(final['retain']['probability'])}"
        if before is not None and "retain" in before:
            line += f" (before unlearning {audit.means(before['retain'], seed)['probability']['value']:.3f})"
        findings.append(line)
    results: dict[str, Any] = {
        "schema_version": 1,
        "title": f"Residual memorisation of {name}",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "conditions": [
            {"name": name, "objective": None, "schedule": None, "retain_weight": None, "learning_rate": None,
             "seeds": [], "curve": [], "final": final}
        ],
        "findings": findings,
    }  # fmt: skip
    if before is not None:
        results["before"] = {part: audit.means(values, seed) for part, values in before.items()}
    if scores is not None:
        final["buckets"] = audit.by_bucket(after["forget"], scores.buckets(metric, n_buckets), seed)
        easy, hard = final["buckets"][0]["probability"], final["buckets"][-1]["probability"]
        findings.append(f"easiest bucket {audit.shown(easy)}, hardest bucket {audit.shown(hard)} (answer probability)")
        if all(column in scores.columns for column in audit.TRIVIAL):
            section = audit.difficulty_section(
                name, scores.columns, [after["forget"]["probability"]], target="answer probability now", seed=seed
            )
            results["difficulty"] = {
                "note": "One unlearned model: without a second seed there is no ceiling to compare with.",
                "objectives": [section],
            }
            rows = {row["metric"]: row for row in section["rows"]}
            for key in [metric or scores.metrics[0], "loss"]:
                findings.append(f"Spearman of {rows[key]['label']} with it: {audit.shown(rows[key]['spearman'])}")
    return results
