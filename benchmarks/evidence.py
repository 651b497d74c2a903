"""Does a rule keep more of what no loss sees, and does difficulty add to it? By a protocol that is committed before.

    python benchmarks/evidence.py development     # every arm with every retain weight, on seeds that nothing reports
    python benchmarks/evidence.py confirmation    # arms and weights as they stand then: fresh model, fresh seeds

A protocol (benchmarks/evidence/NAME.yaml) names worlds, objectives, parts (full, LoRA), arms and seeds. The endpoint is
that of every study with held-out samples: H, the share of the held-out probability that is kept at the first snapshot
at which a run's own worst quarter is at most what a model says that never saw the samples (or 0.10, if that is more).
With `strict: true` runs go on to 0.10, and H there stands beside it; with `whole: true` to the end of their plan, with
what is left and kept there. `weights: NAME` takes the retain weight of every arm from the results of that protocol (or
of several, the last that has it): the one that kept most at the endpoint.
What is found goes to benchmarks/results/evidence-NAME.{json,md}. A killed run goes on in `--work_dir`.
"""

import argparse
import itertools
import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for several
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
SETS = ("forget", "retain", "retain_eval", "held_out")
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
SHARED = {
    "preserve": False,  # an arm says what it has
    "group_column": "author",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "max_length": 512,
}
SEED = 0  # of bootstraps
STOP = "per_sample_stop"


def world(work: Path, name: str, spec: dict[str, Any], tofu: str, pretrained: str = "") -> tuple[Path, float]:
    """Data and a model that knows it by heart, in a folder; and the worst quarter of the forget set under a model that
    learned all but that."""
    from evaluation.endpoint import worst_quarter

    folder = work / f"{name}-{spec['seed']}"
    testbed = tofu_authors(tofu, spec) if name in ("tofu", "pretrained") else generated_authors(spec)
    if not (folder / "model").exists():
        model, tokenizer = learned(name, spec, testbed, testbed.train, pretrained)
        model.save_pretrained(folder / "part")
        tokenizer.save_pretrained(folder / "part")
        os.replace(folder / "part", folder / "model")
    for part in SETS:
        if not (folder / f"{part}.jsonl").exists():
            getattr(testbed, part).to_json(folder / "part.jsonl")
            os.replace(folder / "part.jsonl", folder / f"{part}.jsonl")
    if not (folder / "never-seen.json").exists():
        from cud_trainer.data import prepare_samples
        from cud_trainer.files import write_json
        from cud_trainer.logprobs import answer_probability

        train = testbed.train.filter(lambda split: split != "forget", input_columns="split")
        model, tokenizer = learned(name, spec, testbed, train, pretrained)
        said = answer_probability(model, prepare_samples(testbed.forget, tokenizer, name="forget"))
        write_json(folder / "never-seen.json", np.asarray(said).tolist())
    never_seen = np.array(json.loads((folder / "never-seen.json").read_text()))
    return folder, float(worst_quarter(never_seen))


def learned(name: str, spec: dict[str, Any], testbed: Any, train: Any, pretrained: str) -> tuple[Any, Any]:
    """A model that knows `train` by heart, with its tokenizer: a small Llama from nothing, or the pretrained one."""
    from dataclasses import replace

    import torch
    from difficulty import untrained

    from evaluation.testbed import memorise

    seed, is_pretrained = spec["seed"], name == "pretrained"
    model, tokenizer = untrained(testbed, seed, pretrained=pretrained if is_pretrained else None, tofu=name == "tofu")
    options = {"learning_rate": spec["learning_rate"], "batch_size": 16} if is_pretrained else {}
    # The weights change under this context: none of them may be kept as it was cast first.
    with torch.autocast("cpu", torch.bfloat16, enabled=is_pretrained, cache_enabled=False):
        memorise(
            model, tokenizer, replace(testbed, train=train), epochs=spec["epochs"], seed=seed, progress=False, **options
        )
    return model, tokenizer


def generated_authors(spec: dict[str, Any]) -> Any:
    """Authors of the generated world, as many as the protocol asks for."""
    from evaluation.testbed import build_testbed

    sizes = {f"n_{part}_authors": spec[part] for part in ("forget", "retain", "heldout")}
    return build_testbed(spec["seed"], **sizes, facts_per_author=spec.get("facts", 10))


def tofu_authors(tofu: str, spec: dict[str, Any]) -> Any:
    """Authors of TOFU: the first of forget10, and the last of retain90, of which the very last are held out."""
    from datasets import concatenate_datasets, load_dataset
    from difficulty import tofu_part

    from evaluation.testbed import REPEATS, Testbed

    n = {part: 20 * spec[part] for part in ("forget", "retain", "heldout")}
    forget = load_dataset(tofu, "forget10", split="train").select(range(n["forget"]))
    rest = load_dataset(tofu, "retain90", split="train")
    rest = rest.select(range(len(rest) - n["retain"] - n["heldout"], len(rest)))
    order = np.random.default_rng(spec["seed"]).permutation(np.resize(REPEATS, len(forget)))
    parts = {
        "forget": tofu_part(forget, "forget", order),
        "retain": tofu_part(rest.select(range(n["retain"])), "retain", np.ones(n["retain"], int)),
        "held_out": tofu_part(rest.select(range(n["retain"], len(rest))), "held_out", np.ones(n["heldout"], int)),
    }
    facts = spec.get("facts", 20)  # of each author, the first
    parts = {name: part.select([row for row in range(len(part)) if row % 20 < facts]) for name, part in parts.items()}
    retain_eval = parts["retain"].select(range(0, len(parts["retain"]), 4))
    return Testbed(**parts, retain_eval=retain_eval, train=concatenate_datasets(list(parts.values())))


def arms_of(protocol: dict[str, Any], condition: str) -> dict[str, dict[str, Any]]:
    """Options of every arm of a condition, with the retain weight that an earlier protocol has chosen."""
    arms = {name: dict(options) for name, options in protocol["arms"].items()}
    chosen = {}
    for earlier in np.atleast_1d(protocol.get("weights", [])):
        found = json.loads((HERE / "results" / f"evidence-{earlier}.json").read_text())
        chosen |= found["conditions"].get(condition, {}).get("weights", {})
    for name, options in arms.items():
        like = options.pop("like", name)
        options |= old_target(options) | old_features(options)
        if chosen:
            options["retain_weight"] = chosen[like]
    only = protocol.get("only", {}).get(condition)
    return arms if only is None else {name: arms[name] for name in only}


def old_target(options: dict[str, Any]) -> dict[str, Any]:
    """`schedule_args` of an arm that stops samples: where it names no target, that of when protocols were written."""
    parts = options["schedule"].split("+")
    if STOP not in parts:
        return {}
    given = deepcopy(options.get("schedule_args", {}))
    of_stop = given if len(parts) == 1 else given.setdefault(STOP, {})
    of_stop.setdefault("target", 0.1)
    return {"schedule_args": given}


def old_features(options: dict[str, Any]) -> dict[str, Any]:
    """`difficulty_args` of an arm by CUD: where it names none, what CUD was fitted from when protocols were written."""
    from difficulty import MEASURED

    if options.get("difficulty") != "cud" or "difficulty_args" in options:
        return {}
    return {"difficulty_args": MEASURED["cud"]}


def study(
    folder: Path, never_seen: float, protocol: dict[str, Any], condition: str, workers: int, pool: Any = None
) -> Any:
    """Run the study of one condition, `OBJECTIVE-PART`, in the folder of its world."""
    from trl import ModelConfig

    from evaluation.endpoint import LEVEL
    from evaluation.study.engine import run_study
    from evaluation.study.options import StudyArguments

    objective, part = condition.split("-")
    grid = {"objective": [objective], "seed": protocol["seeds"]}
    if "weights" not in protocol:
        grid["retain_weight"] = protocol["retain_weights"]
    arguments = StudyArguments(
        forget_dataset=str(folder / "forget.jsonl"),
        retain_dataset=str(folder / "retain.jsonl"),
        utility_dataset=str(folder / "retain_eval.jsonl"),
        heldout_dataset=str(folder / "held_out.jsonl"),
        never_seen=never_seen,
        output_dir=str(folder / f"{protocol['name']}-{condition}"),
        extensions=0,
        workers=workers,
        tune_on="endpoint",
        tuning_seeds=1,
        snapshot_every=protocol["snapshot_every"],
        retain_eval_samples=60,
        end_worst_quarter=0.0 if protocol.get("whole") else LEVEL if protocol["strict"] else max(LEVEL, never_seen),
        grid=grid,
        arms=arms_of(protocol, condition),
        train={
            **SHARED,
            "difficulty": "none",
            **protocol.get("train", {}),
            "passes": protocol["passes"],
            "per_device_train_batch_size": protocol["batch"],
            "learning_rate": protocol["learning_rates"][condition],
        },
    )
    adapter = LORA if part == "lora" else {}
    return run_study(arguments, ModelConfig(model_name_or_path=str(folder / "model"), **adapter), pool)


def row(run: Any, *, whole: bool) -> dict[str, Any]:
    """A run as it stands in the results; `whole`, with what is left and kept at its end."""
    from evaluation.endpoint import worst_quarter

    end = run.end
    there = end.snapshot
    found: dict[str, Any] = {}
    if whole:
        kept = run.held_out.mean(1)
        found["last"] = {"worst_quarter": float(worst_quarter(run.forget[-1])), "kept": float(kept[-1] / kept[0])}
    return {
        **found,
        "retain_weight": run.options.get("retain_weight", 1.0),
        "seed": run.seed,
        "H": end.kept,
        "step": None if there is None else int(run.steps[there]),
        "left": end.left,
        "extraction": None if there is None else float(run.extraction["worst_quarter"][there]),
        "worst_at_90": end.worst_at_kept,
        "left_at_90": end.left_at_kept,
        "lowest": end.lowest,
        "calibration_pairs": run.calibration_pairs,
    }


def condition_results(finished: Any, protocol: dict[str, Any]) -> dict[str, Any]:
    """Every run by arm; the weight that each arm did best with, or the decisions of the rule."""
    results: dict[str, Any] = {"never_seen": finished.never_seen, "failed": finished.failed}
    results |= at_level(finished, protocol, finished.never_seen)
    if protocol["strict"]:
        results["strict"] = at_level(finished, protocol, None)
    return results


def at_level(finished: Any, protocol: dict[str, Any], never_seen: float | None) -> dict[str, Any]:
    """The results with that level of the worst quarter: 0.10, or `never_seen` if that is more."""
    from dataclasses import asdict

    from evaluation.decision import compare
    from evaluation.report.schema import jsonable
    from evaluation.study.evidence import arm_of, evidence
    from evaluation.study.runs import Run, finished_cells, grouped

    cells = [cell for cell in finished_cells(finished.folder) if cell.kind == "run"]
    runs = [Run(finished.folder, cell, 4, never_seen) for cell in cells]
    runs = [run for run in runs if run.schedule in protocol["arms"]]
    by_arm = grouped(sorted(runs, key=lambda run: (run.tuning[1] or 0, run.seed)), lambda run: run.schedule)
    by_arm = {name: by_arm[name] for name in protocol["arms"] if name in by_arm}
    results: dict[str, Any] = {
        "arms": {name: [row(run, whole=protocol.get("whole", False)) for run in same] for name, same in by_arm.items()}
    }
    if "weights" not in protocol:
        results["weights"] = {name: best_weight(rows) for name, rows in results["arms"].items()}
        return results
    found = evidence("all", by_arm, finished.heldout_groups, never_seen, SEED)
    results["findings"] = found.findings
    results["decisions"] = {name: jsonable(asdict(decision)) for name, decision in found.decisions.items()}
    results["against"] = {
        name: {
            other: jsonable(asdict(compare(arm_of(same), arm_of(by_arm[other])))) for other in by_arm if other != name
        }
        for name, same in by_arm.items()
    }
    return results


def best_weight(rows: list[dict[str, Any]]) -> float:
    """The retain weight that keeps most at the endpoint; where none gets there, the one that comes nearest."""

    def rank(weight: float) -> tuple[float, float]:
        same = [one for one in rows if one["retain_weight"] == weight]
        kept = np.mean([-1.0 if one["H"] is None else one["H"] for one in same])
        return float(kept), -float(np.mean([one["lowest"] for one in same]))

    return max(sorted({one["retain_weight"] for one in rows}), key=rank)


def markdown(results: dict[str, Any]) -> str:
    """The tables of the results."""
    from evaluation.endpoint import LEVEL

    def shown(value: float | None) -> str:
        return "never" if value is None else f"{value:.3f}"

    lines = [f"# Evidence: {results['protocol']['name']}", "", f"`{results['command']}`", ""]
    for condition, found in results["conditions"].items():
        level = max(LEVEL, found["never_seen"])
        lines += [
            f"## {condition}",
            "",
            f"Every seed by itself; H at a worst quarter of {level:.3f}, strict: of {LEVEL:.2f}.",
            "",
        ]
        whole = any("last" in one for rows in found["arms"].values() for one in rows)
        names = ["arm", "retain weight", "H", "step", "extraction", "worst quarter at H = 90%", "H, strict"]
        names += ["worst quarter at the end", "kept at the end"] if whole else []
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for arm, rows in found["arms"].items():
            for weight in sorted({one["retain_weight"] for one in rows}):
                same = [one for one in rows if one["retain_weight"] == weight]
                steps = " ".join("-" if one["step"] is None else str(one["step"]) for one in same)
                cells = [" ".join(shown(one[name]) for one in same) for name in ("H", "extraction", "worst_at_90")]
                strict = found["strict"]["arms"][arm] if "strict" in found else []
                cells.append(" ".join(shown(one["H"]) for one in strict if one["retain_weight"] == weight))
                for name in ("worst_quarter", "kept") if whole else ():
                    cells.append(" ".join(shown(one["last"][name]) for one in same))
                lines.append(f"| {arm} | {weight:g} | {cells[0]} | {steps} | {' | '.join(cells[1:])} |")
        lines += ["", *[f"- {finding}" for finding in found.get("findings", [])], ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", help="name of a file in benchmarks/evidence/")
    parser.add_argument("--conditions", nargs="+", help="OBJECTIVE-PART, for example graddiff-full; by default all")
    parser.add_argument("--tofu", default="locuslab/TOFU", help="hub id or folder of TOFU, for a protocol with it")
    parser.add_argument(
        "--model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="hub id or folder, for a protocol with `pretrained`",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", type=Path, default=Path("evidence-study"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    protocol = {"name": args.protocol, **yaml.safe_load((HERE / "evidence" / f"{args.protocol}.yaml").read_text())}
    path = args.output / f"evidence-{args.protocol}.json"
    from cud_trainer.files import write_json
    from cud_trainer.models.fingerprint import versions

    results: dict[str, Any] = {"conditions": {}}
    if path.exists():  # what stands there of other conditions stays
        results = json.loads(path.read_text())
    command = f"python benchmarks/evidence.py {args.protocol}"
    results |= {"protocol": protocol, "versions": versions(), "command": command}
    for (name, spec), condition in itertools.product(protocol["worlds"].items(), protocol["learning_rates"]):
        if args.conditions and condition not in args.conditions:
            continue
        folder, never_seen = world(args.work_dir, name, spec, args.tofu, args.model)
        finished = study(folder, never_seen, protocol, condition, args.workers)
        results["conditions"][condition] = condition_results(finished, protocol)
        write_json(path, results)
        path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
        print(markdown({**results, "conditions": {condition: results["conditions"][condition]}}), flush=True)


if __name__ == "__main__":
    main()
