"""What is CUD for: do circuits say of what unlearning leaves what cheaper features do not, also of a later request?

    python benchmarks/prediction.py                     # benchmarks/prediction/generated.yaml, some 20 minutes
    python benchmarks/prediction.py tofu                # TOFU in place of generated authors
    python benchmarks/prediction.py --tiny --output .   # every part, small: its figures mean nothing

For every world of the protocol, GradDiff and NPO, full and LoRA: `uniform` runs with several seeds (`evidence.py`). To
be predicted is the answer probability of a forget sample where a run's held-out probability first falls to 90% of its
start, mean over seeds. Asked are: how well seeds agree; nested fits, cross-fitted by author, of [loss, length,
gradient norm, mean loss of the author], then hidden states and outputs, then edges; a bank of half of the authors that
scores the other half (fitted to what the runs left, or to a calibration run of that half alone); and which held-out
samples are lost by the end of a run. Intervals are over authors; figures are means over worlds.

A killed run goes on in `--work_dir`. What is found: benchmarks/results/prediction.{json,md},
or prediction-tofu.{json,md}.
"""

import argparse
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for several
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import yaml

from evaluation.prediction import (
    adds,
    bootstrapped,
    falls_to,
    halves,
    interval,
    nested_fits,
    partial_rank_correlation,
    rank_correlation,
    rank_r2,
    ranks,
    transferred,
)

HERE = Path(__file__).parent
TINY = {
    "worlds": {"tiny": {"seed": 0, "forget": 6, "retain": 2, "heldout": 4, "facts": 2, "epochs": 12}},
    "seeds": [1, 2],
    "learning_rates": {"graddiff-full": 1e-2, "npo-lora": 1e-2},
    "passes": 2,
    "batch": 6,
    "snapshot_every": 1,
    "folds": 2,
    "partitions": 1,
    "splits": 2,
    "calibrated_splits": 1,
    "calibration_passes": 2,
    "draws": 20,
}
FEATURES = ("edges", "hidden", "gradients", "outputs")  # that a calibrated CUD can be fitted from
SINGLE = ("loss", "length", "grad_norm", "group_loss")
STEPS = {
    "base": ("base",),  # the single numbers together
    "outputs": ("hidden", "outputs"),
    "no_edges": ("hidden", "gradients", "outputs"),
    "edges": ("edges",),
}
CHAINS = (("base", "outputs", "edges"), ("base", "no_edges", "edges"), ("outputs",), ("edges",))
GAINS = (("base", "outputs"), ("base+outputs", "edges"), ("base+no_edges", "edges"))  # of what a step adds, and to what
BANKS = {"cud": FEATURES, "no_edges": STEPS["no_edges"], "hidden": ("hidden",), "edges": ("edges",)}
AGAINST = (("cud", "loss"), ("cud", "grad_norm"), ("cud", "no_edges"), ("no_edges", "loss"), ("edges", "loss"))
RULE = (
    "Yes: the gain (of rank R2 or of Spearman) is {worth:g} or more and its interval above 0. No: the interval ends "
    "below {worth:g}. Else undecided."
)

Figures = dict[str, np.ndarray]  # by name; see `evaluation.prediction`


@dataclass
class Known:
    """What the original model says of a set of samples.

    Attributes:
        context: its passes (`DifficultyContext`).
        groups: author of each sample.
        single: numbers by name, `[N]` each, higher = harder to forget as the metrics have it.
        blocks: features by name, `[N, p]` each.
    """

    context: Any
    groups: list[str]
    single: dict[str, np.ndarray]
    blocks: dict[str, np.ndarray]


def known(folder: Path, name: str) -> Known:
    """Features of the set `name` of a world."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cud_trainer.data import prepare_samples
    from cud_trainer.difficulty import METRICS, DifficultyContext
    from cud_trainer.difficulty.cud.features import blocks, sample_features

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = Dataset.from_json(str(folder / f"{name}.jsonl"))
    groups = [str(author) for author in data["author"]]
    samples = prepare_samples(data, tokenizer, max_length=512, name=name)
    context = DifficultyContext(model, samples, None, groups=groups, progress=False)
    made = blocks(context.edges, sample_features(context, FEATURES), FEATURES)
    single = {metric: METRICS[metric].compute(context) for metric in ("loss", "length", "grad_norm")}
    _, place = np.unique(groups, return_inverse=True)
    single["group_loss"] = (np.bincount(place, single["loss"]) / np.bincount(place))[place]
    base = np.column_stack([single[name] for name in SINGLE])
    return Known(context, groups, single, {"base": base, **dict(zip(FEATURES, made, strict=True))})


def check_order(of: Known, start: np.ndarray) -> None:
    """Raise `ValueError` unless the samples of runs are those of the features, in their order."""
    said = np.exp(of.context.answers[0])
    if said.shape != start.shape or not np.allclose(said, start, atol=1e-3):
        raise ValueError("the samples of the runs are not those whose features were computed")


def residuals(runs: list[Any], level: float) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """What each run leaves of each forget sample where its held-out probability first falls to `level` of its start,
    `[S, N]`, and where that is; at its end, if it never does."""
    from evaluation.trajectory import at_position

    left, rows = [], []
    for run in runs:
        kept = run.held_out.mean(1) / run.held_out[0].mean()
        position = falls_to(kept, level)
        there = len(kept) - 1.0 if position is None else position
        left.append(at_position(run.forget, there))
        rows.append(
            {
                "seed": run.seed,
                "falls": position is not None,
                "step": float(at_position(run.steps, there)),
                "left": float(left[-1].mean()),
                "end": int(run.steps[-1]),
                "left_at_end": float(run.forget[-1].mean()),
                "kept_at_end": float(kept[-1]),
            }
        )
    return np.stack(left), rows


def agreement(values: np.ndarray) -> float:
    """Mean Spearman over pairs of seeds, of `values [S, N]`."""
    return float(np.mean([rank_correlation(a, b) for a, b in itertools.combinations(values, 2)]))


def asked(of: Known, by_seed: np.ndarray, protocol: dict[str, Any], number: int) -> Figures:
    """Ceiling, single numbers, nested fits: how well each says the mean over seeds of an outcome `[S, N]`.

    Args:
        number: of the world: its draws of authors.
    """
    outcome = by_seed.mean(0)
    said: dict[str, np.ndarray] = {}
    for chain in CHAINS:
        steps = [[of.blocks[name] for name in STEPS[step]] for step in chain]
        fits = np.stack(
            [
                nested_fits(steps, outcome, of.groups, folds=protocol["folds"], seed=partition)
                for partition in range(protocol["partitions"])
            ],
            axis=1,
        )
        said |= {"+".join(chain[: place + 1]): fit for place, fit in enumerate(fits)}
    target = ranks(outcome)

    def figures(rows: np.ndarray) -> dict[str, float]:
        left, series = outcome[rows], {name: fit[:, rows] for name, fit in said.items()}
        found = {"ceiling: another seed": agreement(by_seed[:, rows])}
        found |= {f"alone: {name}": rank_correlation(of.single[name][rows], left) for name in SINGLE}
        found |= {f"fit: {name}": rank_correlation(fit, left) for name, fit in series.items()}
        found |= {f"R2: {name}": rank_r2(fit, target[rows]) for name, fit in series.items()}
        for before, step in GAINS:
            found[f"gain of R2: {step} to {before}"] = found[f"R2: {before}+{step}"] - found[f"R2: {before}"]
            fit = series["outputs" if step == "no_edges" else step]
            found[f"partial: {step} given {before}"] = partial_rank_correlation(fit, left, series[before])
        return found

    return bootstrapped(figures, of.groups, seed=number, n_boot=protocol["draws"])


def banks(of: Known, residual: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of every sample from a bank of the half that it is not in, by what the bank reads, `[splits, N]` each.

    The same as `AnchorBank.fit` on one half and `score` of the other, with passes that all of them share.

    Args:
        residual: what the banks are fitted to, `[splits, N]`.
        first: halves, bool `[splits, N]`.
    """
    import torch

    from cud_trainer.difficulty import AnchorBank
    from cud_trainer.difficulty.cud.features import sample_features

    features = sample_features(of.context, FEATURES)
    nobody = torch.zeros(len(of.groups), dtype=torch.int8)  # a fit has no anchors
    scores: dict[str, list[np.ndarray]] = {name: [] for name in BANKS}
    for left, half in zip(residual, first, strict=True):
        bank = AnchorBank.of(of.context, left, nobody, FEATURES, features)
        folds = [(np.flatnonzero(test), np.flatnonzero(~test)) for test in (half, ~half)]
        for name, reads in BANKS.items():
            scores[name].append(bank.fitted(of.context, reads, folds))
    return {name: np.stack(rows) for name, rows in scores.items()}


def calibrated(folder: Path, of: Known, first: np.ndarray, condition: str, protocol: dict[str, Any]) -> np.ndarray:
    """What a calibration run of each half, alone, leaves of its samples, `[splits, N]`; kept in the folder."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from cud_trainer.data import prepare_samples
    from cud_trainer.files import write_json
    from cud_trainer.objectives import UnlearningLoss
    from cud_trainer.scoring.calibration import CalibrationSettings, calibrate

    objective, part = condition.split("-")
    adapter = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = CalibrationSettings(
        loss=UnlearningLoss(objective),
        retain_weight=protocol["retain_weights"][0],
        learning_rate=protocol["learning_rates"][condition],
        max_passes=protocol["calibration_passes"],
        batch_size=protocol["batch"],
        peft_config=adapter if part == "lora" else None,
    )
    identity = settings.identity()  # before a run: PEFT writes into the configuration of an adapter
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    retain = prepare_samples(Dataset.from_json(str(folder / "retain.jsonl")), tokenizer, max_length=512, name="retain")
    residual = np.full(first.shape, np.nan)
    for split, side in itertools.product(range(len(first)), (True, False)):
        rows = np.flatnonzero(first[split] == side)
        path = folder / f"calibrated-{condition}-{split}-{side}.json"
        same = {"rows": rows.tolist(), "settings": identity}
        if not path.exists() or json.loads(path.read_text())["of"] != same:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # of the adapter
                found = calibrate(of.context.model, of.context.forget.select(rows), retain, settings, progress=False)
            write_json(path, {"of": same, "residual": found.residual.tolist(), "pairs": found.pairs})
        residual[split, rows] = json.loads(path.read_text())["residual"]
    return residual


def later(
    of: Known, scores: dict[str, np.ndarray], first: np.ndarray, outcome: np.ndarray, seed: int, draws: int
) -> Figures:
    """How well a later request is scored: Spearman within a half, by banks of the other and by what needs none."""
    scores = {**scores, **{name: of.single[name] for name in ("loss", "grad_norm")}}

    def figures(rows: np.ndarray) -> dict[str, float]:
        found = {name: transferred(one[..., rows], first[:, rows], outcome[rows]) for name, one in scores.items()}
        return found | {f"{a} less {b}": found[a] - found[b] for a, b in AGAINST}

    return bootstrapped(figures, of.groups, seed=seed, n_boot=draws)


def condition_in(
    folder: Path, sets: dict[str, Known], runs: list[Any], condition: str, protocol: dict[str, Any], number: int
) -> tuple[dict[str, Figures], dict[str, Any]]:
    """All figures of a condition in a world, and the state of its runs."""
    from evaluation.trajectory import averaged_residual

    forget, held_out = sets["forget"], sets["held_out"]
    check_order(forget, runs[0].forget[0])
    check_order(held_out, runs[0].held_out[0])
    left, rows = residuals(runs, protocol["kept"])
    outcome = left.mean(0)
    lost = np.stack([run.held_out[0] - run.held_out[-1] for run in runs])
    first = halves(forget.groups, protocol["splits"], 0)
    some = first[: protocol["calibrated_splits"]]
    of_outcomes = banks(forget, np.tile(outcome, (len(first), 1)), first)
    of_calibration = banks(forget, calibrated(folder, forget, some, condition, protocol), some)
    found = {
        "left": asked(forget, left, protocol, number),
        "later, bank of outcomes": later(forget, of_outcomes, first, outcome, number, protocol["draws"]),
        "later, bank of a calibration": later(forget, of_calibration, some, outcome, number, protocol["draws"]),
        "lost": asked(held_out, lost, protocol, number),
    }
    middle = np.mean([averaged_residual(list(run.forget))[0] for run in runs], axis=0)
    return found, {"runs": rows, "with the middle of the runs": rank_correlation(middle, outcome)}


def pooled(many: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Means of the same figures, draw by draw."""
    return {
        part: {name: np.mean([one[part][name] for one in many], axis=0) for name in figures}
        for part, figures in many[0].items()
    }


def plain(found: dict[str, Figures], by: dict[str, dict[str, Figures]]) -> dict[str, Any]:
    """Figures with their intervals, and what each of `by` says alone."""
    return {
        part: {
            name: {**interval(values).as_dict(), "each": {key: float(one[part][name][0]) for key, one in by.items()}}
            for name, values in figures.items()
        }
        for part, figures in found.items()
    }


def verdicts(found: dict[str, Figures], worth: float) -> dict[str, str]:
    """The questions that the protocol asks, by the rule of `adds`."""
    questions = {
        "edges, to loss, length, gradient norm, author, hidden states and outputs": (
            "left",
            "gain of R2: edges to base+outputs",
        ),
        "edges, to all that CUD reads but them": ("left", "gain of R2: edges to base+no_edges"),
        "hidden states and outputs, to loss, length, gradient norm and author": (
            "left",
            "gain of R2: outputs to base",
        ),
        "edges, in a bank of outcomes": ("later, bank of outcomes", "cud less no_edges"),
        "edges, in a bank of a calibration": ("later, bank of a calibration", "cud less no_edges"),
        "a bank of a calibration, over the initial loss": ("later, bank of a calibration", "cud less loss"),
        "edges, for what is lost of the held-out samples": ("lost", "gain of R2: edges to base+outputs"),
    }
    return {question: adds(interval(found[part][name]), worth) for question, (part, name) in questions.items()}


def summary(
    by_condition: dict[str, dict[str, dict[str, Figures]]], states: dict[str, dict[str, Any]], worth: float
) -> dict[str, Any]:
    """The results of all conditions: means over worlds, and over conditions."""
    means = {condition: pooled(list(found.values())) for condition, found in by_condition.items()}
    everywhere = pooled(list(means.values()))
    return {
        "conditions": {
            name: {"worlds": states[name], "figures": plain(means[name], by_condition[name])} for name in means
        },
        "all": plain(everywhere, means),
        "verdicts": {name: verdicts(figures, worth) for name, figures in {**means, "all": everywhere}.items()},
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of the results, as they stand in JSON."""

    def shown(found: dict[str, Any]) -> str:
        if None in (found["value"], found["low"], found["high"]):
            return "-"
        return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    conditions, everywhere = results["conditions"], results["all"]
    worlds = ", ".join(f"{one['forget']} of {one['authors']['forget']} authors" for one in results["worlds"].values())
    heads = [*conditions, "all"]
    lines = ["# What a score known before says of what unlearning leaves", "", f"`{results['command']}`", ""]
    lines += [f"Forget samples by world: {worlds}. Means over worlds, 95% intervals over authors.", ""]
    titles = {
        "left": "What is left of a forget sample where 90% of the held-out probability is kept",
        "later, bank of outcomes": "A later request, from a bank fitted to what the runs left of the other half",
        "later, bank of a calibration": "A later request, from a bank fitted to a calibration run of the other half",
        "lost": "What is lost of a held-out sample by the end of a run",
    }
    for part, title in titles.items():
        lines += [f"## {title}", "", "| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name in everywhere[part]:
            cells = [shown(one["figures"][part][name]) for one in conditions.values()]
            lines.append(f"| {name} | {' | '.join([*cells, shown(everywhere[part][name])])} |")
        lines.append("")
    lines += ["## What adds something", "", results["rule"], ""]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [
        f"| {question} | {' | '.join(results['verdicts'][name][question] for name in heads)} |"
        for question in results["verdicts"]["all"]
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "protocol", nargs="?", default="generated", help="name of a file in benchmarks/prediction/, default %(default)s"
    )
    parser.add_argument("--tofu", default="locuslab/TOFU", help="hub id or folder of TOFU, for the protocol with it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="every part, small")
    parser.add_argument("--work_dir", type=Path, default=Path("prediction-study"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    import evidence

    from cud_trainer.files import write_json
    from cud_trainer.models.fingerprint import versions
    from evaluation.report.schema import jsonable
    from evaluation.study.pool import Pool

    protocol = yaml.safe_load((HERE / "prediction" / f"{args.protocol}.yaml").read_text())
    of_generated = args.protocol == "generated"
    name = "prediction" if of_generated else f"prediction-{args.protocol}"
    protocol = {"name": name, **protocol, **(TINY if args.tiny else {})}
    by_condition: dict[str, dict[str, dict[str, Figures]]] = {name: {} for name in protocol["learning_rates"]}
    states: dict[str, dict[str, Any]] = {name: {} for name in by_condition}
    results: dict[str, Any] = {
        "command": " ".join(
            ["python", "benchmarks/prediction.py"]
            + ([] if of_generated else [args.protocol])
            + (["--tiny"] if args.tiny else [])
        ),
        "protocol": protocol,
        "versions": versions(),
        "rule": RULE.format(worth=protocol["worth"]),
        "worlds": {},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with Pool(args.workers) as pool:
        for number, (world, spec) in enumerate(protocol["worlds"].items()):
            folder, never_seen = evidence.world(args.work_dir, world, spec, args.tofu)
            sets = {name: known(folder, name) for name in ("forget", "held_out")}
            results["worlds"][world] = {
                **{name: len(of.groups) for name, of in sets.items()},
                "authors": {name: len(set(of.groups)) for name, of in sets.items()},
                "never_seen": never_seen,
            }
            for condition, found in by_condition.items():
                study = evidence.study(folder, never_seen, protocol, condition, args.workers, pool)
                runs = sorted(study.runs(), key=lambda run: run.seed)
                found[world], states[condition][world] = condition_in(folder, sets, runs, condition, protocol, number)
                print(f"{world}, {condition}: done", flush=True)
            results |= summary(by_condition, states, protocol["worth"])  # of the worlds so far
            so_far = jsonable(results)
            write_json(args.output / f"{name}.json", so_far)
            (args.output / f"{name}.md").write_text(markdown(so_far), encoding="utf-8")
    print(markdown(so_far))


if __name__ == "__main__":
    main()
