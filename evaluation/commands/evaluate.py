"""`cud evaluate`: what a model on disk still holds of the forget set, by difficulty, and what it kept."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from trl import ModelConfig

from cud_trainer.circuits import CircuitTable, dataset_faithfulness
from cud_trainer.circuits.attribution import needs_counterfactual
from cud_trainer.commands.options import DataArguments, load_tokenizer, model_options
from cud_trainer.commands.parser import parse_options
from cud_trainer.data import check_disjoint, prepare_samples
from cud_trainer.data.sources import load_samples
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.files import check_output_dir
from cud_trainer.logprobs import answer_probability
from cud_trainer.models.fingerprint import model_fingerprint, versions
from cud_trainer.models.loading import load_causal_lm

from ..metrics import measure as harness
from ..metrics import robustness
from ..metrics.memorization import true_answers
from ..metrics.utility import UTILITY_SETS
from ..report import audit
from ..report import tables as sections


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
    generate: bool = field(default=True, metadata={"help": "Generate answers for ROUGE-L recall and verbatim match."})
    samples: int = field(
        default=0, metadata={"help": "Also draw as many answers per prompt at `temperature`; the worst one counts."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of these samples."})
    reference_model: str | None = field(
        default=None,
        metadata={"help": "A model that never saw the forget set: relative memorisation, forget quality, PrivLeak."},
    )
    holdout_dataset: str | None = field(
        default=None,
        metadata={"help": "Samples that no model saw, for membership inference; default: the forget dataset."},
    )
    holdout_config: str | None = field(
        default=None, metadata={"help": "Its configuration name; one of the two must be given for attacks."}
    )
    holdout_split: str = field(default="train", metadata={"help": "Its split."})
    neighbour_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Samples near the forget set (same topic, not to be forgotten); default: the forget dataset."
        },
    )
    neighbour_config: str | None = field(
        default=None, metadata={"help": "Its configuration name; one of the two must be given for a neighbour set."}
    )
    neighbour_split: str = field(default="train", metadata={"help": "Its split."})
    tofu: str | None = field(
        default=None,
        metadata={"help": "Id or folder of TOFU, for model utility (retain, real authors, world facts)."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column of the forget dataset (author, topic, source) for a table by group."}
    )
    relearn_samples: int = field(
        default=0, metadata={"help": "Fine-tune a copy on as many forget samples again and see what else comes back."}
    )
    relearn_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10], metadata={"help": "After these steps."})
    relearn_rate: float = field(default=1e-5, metadata={"help": "Learning rate of relearning."})
    quantize: list[int] = field(default_factory=list, metadata={"help": "Round the weights to so many bits: 8, 4."})
    straight_line: bool = field(
        default=False, metadata={"help": "Measure along the line from the original to the unlearned weights."}
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness (extra `lm-eval`)."}
    )
    lm_eval_include: str | None = field(default=None, metadata={"help": "Folder with tasks of your own for it."})
    show_text: bool = field(
        default=False, metadata={"help": "Put forget text and answers into per_sample.parquet. Off: no text anywhere."}
    )
    batch_size: int = field(default=16, metadata={"help": "Samples per forward pass."})
    max_length: int | None = field(default=1024, metadata={"help": "The longest sample in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap intervals."})

    def __post_init__(self) -> None:
        for name, least in (("n_buckets", 1), ("batch_size", 1), ("samples", 0), ("relearn_samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0 or not self.relearn_rate > 0:
            raise ValueError("temperature and relearn_rate must be positive")
        if any(bits not in (4, 8) for bits in self.quantize):
            raise ValueError(f"quantize takes 8 and 4 bits, got {self.quantize}")
        if self.relearn_samples and (not self.relearn_steps or min(self.relearn_steps) < 1):
            raise ValueError(f"relearn_steps must be at least 1, got {self.relearn_steps}")
        if self.straight_line and not self.original_model:
            raise ValueError("the straight line starts at the original model: give --original_model")


def load_model(path: str, options: dict[str, Any]) -> Any:
    """A causal LM, or an adapter on its base model, in evaluation mode on the best device; `ValueError` if neither."""
    try:
        if (Path(path) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(path, **options)
        else:
            model = load_causal_lm(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: one of another base model
        raise ValueError(f"cannot load a model from {path!r}: {str(error)[:500]}") from None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device).eval()


def evaluate(argv: list[str]) -> int:
    """Entry point of `cud evaluate`."""
    from ..report.page import write_report

    args, model_args = parse_options((EvaluateArguments, ModelConfig), argv, "cud evaluate")
    check_output_dir(args.output_dir, overwrite=args.overwrite)
    tokenizer = load_tokenizer(model_args)
    raw = dict(zip(("forget", "retain"), args.load(tokenizer), strict=True))
    for name in ("neighbour", "holdout"):
        source, config, split = (getattr(args, f"{name}_{kind}") for kind in ("dataset", "config", "split"))
        if source or config:
            raw[name] = args.read(source or args.forget_dataset, config, split, None, name, tokenizer)
    sets = {
        name: prepare_samples(part, tokenizer, max_length=args.max_length, name=name)
        for name, part in raw.items()
        if part is not None
    }
    forget = sets["forget"]
    for name in ("retain", "neighbour", "holdout"):
        if name in sets:
            check_disjoint(forget, sets[name])
    utility = {}
    if args.tofu:
        utility = {part: load_samples(args.tofu, name, "train", None, part) for part, name in UTILITY_SETS.items()}
    groups = None
    if args.group_column:
        if args.group_column not in raw["forget"].column_names:
            raise ValueError(
                f"forget dataset has no column {args.group_column!r}; it has {sorted(raw['forget'].column_names)}"
            )
        groups = list(raw["forget"][args.group_column])
        if len(set(map(str, groups))) < 2:
            raise ValueError(f"group column {args.group_column!r} has one value only")
    if args.relearn_samples >= len(forget):
        raise ValueError(
            f"relearn_samples must leave some of the {len(forget)} forget samples, got {args.relearn_samples}"
        )
    if args.lm_eval_tasks:
        harness.check_lm_eval()
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
    for path in (args.original_model, args.reference_model):
        if path:
            check_same_tokenizer(tokenizer, path)

    def load(path: str) -> Any:
        model = load_model(path, options)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than the embeddings of {path!r}")
        return model

    def measure(model: Any, what: str) -> harness.Measured:
        return harness.measure(
            model, sets, raw["forget"], utility, tokenizer, batch_size=args.batch_size, max_length=args.max_length,
            generate=args.generate, samples=args.samples, temperature=args.temperature, seed=args.seed, desc=what,
        )  # fmt: skip

    fingerprints = {}
    before, reference, kept, start = None, None, None, None
    if args.original_model:
        model = load(args.original_model)
        fingerprints["original"] = model_fingerprint(model)
        if scores is not None:
            scores.check_provenance(model=fingerprints["original"])
        before = measure(model, "original")
        if args.faithfulness and table is not None:
            kept = dataset_faithfulness(
                model, forget, audit.strongest_edges(table),
                batch_size=args.batch_size, seed=args.seed, baseline=table.settings["baseline"],
                metric=table.settings["metric"], ungroup_kv=table.settings.get("ungroup_kv", False),
            )  # fmt: skip
        if args.straight_line:
            start = {name: value.detach().cpu().clone() for name, value in merged(model).named_parameters()}
        del model  # before the other one comes
    if args.reference_model:
        model = load(args.reference_model)
        fingerprints["reference"] = model_fingerprint(model)
        reference = measure(model, "reference")
        del model
    model = load(model_args.model_name_or_path)
    fingerprint = model_fingerprint(model)
    if fingerprint == fingerprints.get("reference"):
        raise ValueError(f"the reference model {args.reference_model} has the weights of the model that is evaluated")
    after = measure(model, "unlearned")
    results = audit_results(
        after.sets, before=None if before is None else before.sets, scores=scores, metric=args.metric,
        n_buckets=args.n_buckets, seed=args.seed, name=Path(model_args.model_name_or_path).name,
    )  # fmt: skip
    if fingerprint == fingerprints.get("original"):
        results["findings"].insert(0, "the model has the very weights of the original model: nothing was unlearned")
    bucket = None if scores is None else scores.buckets(args.metric, args.n_buckets)
    tables, findings = harness.tables(after, before, reference, bucket, args.n_buckets, args.seed)
    primary = None if scores is None else scores[args.metric or scores.metrics[0]]
    if groups is not None:
        extra, line = sections.group_table(after.sets["forget"]["probability"], groups, primary, args.seed)
        tables.append(extra)
        findings.append(line)
    if primary is not None:
        tables.append(sections.reliability_by_decile(primary, after.sets["forget"]["probability"], args.seed))
    if table is not None and bucket is not None:
        note = f"Buckets are those of {args.metric or scores.metrics[0]}."  # type: ignore[union-attr]
        results["circuits"] = audit.circuit_section(
            table, bucket, after.sets["forget"]["probability"], seed=args.seed, note=note, kept=kept
        )
        extra, line = sections.mechanism_table(audit.signature_of(table), bucket, args.seed)
        tables.append(extra)
        findings.append(line)
    model = merged(model)
    base = after.sets["forget"]["probability"]
    parts = [] if bucket is None else [bucket == number for number in range(args.n_buckets)]
    if args.quantize:
        conditions = {"as it is": base}
        for bits in args.quantize:
            with robustness.quantised(model, bits):
                conditions[f"{bits} bits"] = answer_probability(model, forget, batch_size=args.batch_size)
        note = "Answer probability of the forget set with rounded weights; what rises was only moved a little."
        tables.append(
            sections.change_table("quantisation", "Quantisation", note, "as it is", conditions, parts, args.seed)
        )
    if start is not None:
        path = robustness.straight_line(
            model, start, {name: sets[name] for name in ("forget", "retain") if name in sets},
            batch_size=args.batch_size,
        )  # fmt: skip
        tables.append(harness.line_table(path, args.seed))
    if args.relearn_samples:
        taught = np.zeros(len(forget), dtype=bool)
        taught[np.random.default_rng(args.seed).permutation(len(forget))[: args.relearn_samples]] = True
        found = robustness.relearn(
            model, forget, np.flatnonzero(taught).tolist(), steps=args.relearn_steps,
            learning_rate=args.relearn_rate, batch_size=args.batch_size, seed=args.seed,
        )  # fmt: skip
        tables.append(sections.relearning_table(found, taught, bucket, args.n_buckets, args.seed))
    if args.lm_eval_tasks:
        tables.append(
            harness.lm_eval_table(model, tokenizer, args.lm_eval_tasks, args.lm_eval_include, args.batch_size)
        )
    results["tables"] = tables
    results["findings"] += findings
    results["run"] = {
        "command": "cud evaluate " + " ".join(argv),
        "seed": args.seed,
        "versions": versions(),
        "model": {"path": model_args.model_name_or_path, "fingerprint": fingerprint, **fingerprints},
        "data": {f"n_{name}": len(part) for name, part in sets.items()},
        "seconds": {},
    }
    frame = pd.DataFrame({"sample_id": forget["sample_id"], **after.per_sample()})
    for name, other in (("before", before), ("reference", reference)):
        if other is not None:
            frame = frame.assign(**{f"{name}/{key}": values for key, values in other.per_sample().items()})
    if scores is not None:
        frame = frame.assign(**scores.columns, bucket=bucket + 1)  # type: ignore[operator]
    if groups is not None:
        frame = frame.assign(group=[str(group) for group in groups])
    if args.show_text:
        frame = frame.assign(true_answer=true_answers(forget, tokenizer))
    written = write_report(results, Path(args.output_dir), frame)
    for line in results["findings"]:
        print(f"- {line}")
    print(f"report: {written.resolve()}")
    return 0


def merged(model: Any) -> Any:
    """The model itself, an adapter folded into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def check_same_tokenizer(tokenizer: Any, path: str) -> None:
    """Raise `ValueError` when the model at `path` comes with another vocabulary: its figures would mean nothing."""
    if not Path(path).is_dir() or not any(
        (Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return
    other = AutoTokenizer.from_pretrained(path)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{path!r} has another tokenizer ({len(other)} tokens, that of the evaluated model has {len(tokenizer)}): "
            "the same text is not the same tokens"
        )


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
                "note": "One unlearned model: without a second seed there is no ceiling to compare with. "
                + sections.comparisons_note(len(section["rows"])),
                "objectives": [section],
            }
            rows = {row["metric"]: row for row in section["rows"]}
            for key in [metric or scores.metrics[0], "loss"]:
                findings.append(f"Spearman of {rows[key]['label']} with it: {audit.shown(rows[key]['spearman'])}")
    return results
