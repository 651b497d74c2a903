"""The tables and the picture of `difficulty.py`, from its cells and runs."""

import argparse
import json
from pathlib import Path

import numpy as np
from attribution import machine
from difficulty import CALIBRATED, OBJECTIVES, PARTS, RETAIN_WEIGHT, TRAINING_FREE, read
from scipy.stats import spearmanr

from cud_trainer.models.fingerprint import versions
from evaluation import statistics as stats
from evaluation.study.runs import Run
from evaluation.trajectory import averaged_residual

Runs = dict[tuple[int, str, str, int], Run]  # by model seed, objective, part and seed


def target(args: argparse.Namespace, runs: Runs, seed: int, objective: str, part: str) -> dict | None:
    """Residual memorisation of a condition: by run seed `[S, N]`, and how far the runs got."""
    same = [runs.get((seed, objective, part, number)) for number in args.run_seeds]
    if any(run is None for run in same):
        return None
    shares = [run.forget.mean(1) / run.forget[0].mean() for run in same]
    return {
        "residuals": np.stack([averaged_residual(list(run.forget))[0] for run in same]),
        "end_share": [float(path[-1]) for path in shares],
        "snapshots_used": [int(((path >= 0.15) & (path <= 0.75)).sum()) for path in shares],
        "retain": [[float(run.retain[0]), float(run.retain[-1])] for run in same],
        "seconds": [run.seconds for run in same],
    }


def condition(args: argparse.Namespace, runs: Runs, seed: int, objective: str, part: str) -> dict | None:
    left = target(args, runs, seed, objective, part)
    calibrated, free = read(args, f"calibrate-{seed}-{objective}-{part}"), read(args, f"score-{seed}")
    if left is None or calibrated is None or free is None:
        return None
    values = left["residuals"].mean(0)
    columns = {name: np.array(column) for name, column in {**free["columns"], **calibrated["columns"]}.items()}
    controls = np.column_stack([columns["loss"], columns["length"]])
    rows = []
    for name in (*TRAINING_FREE, *CALIBRATED):
        trivial = name in ("loss", "length")
        rows.append(
            {
                "metric": name,
                "spearman": stats.spearman(columns[name], values, seed=0).as_dict(),
                "partial": None
                if trivial
                else stats.partial_spearman(columns[name], values, controls, seed=0).as_dict(),
                "auroc": stats.auroc_extremes(columns[name], values, seed=0).as_dict(),
            }
        )
    return {
        "model_seed": seed,
        "objective": objective,
        "part": part,
        "n": len(values),
        "ceiling": stats.ceiling(left["residuals"], seed=0),
        "rows": rows,
        "end_share": left["end_share"],
        "snapshots_used": left["snapshots_used"],
        "retain": left["retain"],
        "run_seconds": left["seconds"],
        "calibration_seconds": calibrated["cpu_seconds"],
    }


def transfer(args: argparse.Namespace, runs: Runs, metric: str) -> list[dict]:
    """Spearman of `metric`, calibrated on one condition, with what another one leaves; mean over model seeds."""
    names = [(objective, part) for part in PARTS for objective in OBJECTIVES]
    rows = []
    for source in names:
        for goal in names:
            values = []
            for seed in args.model_seeds:
                calibrated = read(args, "-".join(map(str, ("calibrate", seed, *source))))
                left = target(args, runs, seed, *goal)
                if calibrated is not None and left is not None:
                    values.append(spearmanr(calibrated["columns"][metric], left["residuals"].mean(0)).statistic)
            if values:
                rows.append({"calibrated": list(source), "target": list(goal), "spearman": float(np.mean(values))})
    return rows


def summary(conditions: list[dict]) -> list[dict]:
    """Per condition and metric, means over model seeds; `share`: Spearman over what is attainable."""
    rows = []
    for part in PARTS:
        for objective in OBJECTIVES:
            same = [c for c in conditions if (c["objective"], c["part"]) == (objective, part)]
            if not same:
                continue
            attainable = [c["ceiling"]["attainable"] or float("nan") for c in same]
            entry = {
                "objective": objective,
                "part": part,
                "models": len(same),
                "attainable": float(np.mean(attainable)),
            }
            entry["agreement"] = float(np.mean([c["ceiling"]["agreement"]["value"] for c in same]))
            entry["metrics"] = {}
            for number, row in enumerate(same[0]["rows"]):
                rows_of_metric = [c["rows"][number] for c in same]
                spearman = [r["spearman"]["value"] for r in rows_of_metric]
                entry["metrics"][row["metric"]] = {
                    "spearman": float(np.mean(spearman)),
                    "each": spearman,
                    "share": float(np.mean([value / top for value, top in zip(spearman, attainable, strict=True)])),
                    "partial": None
                    if row["partial"] is None
                    else float(np.mean([r["partial"]["value"] for r in rows_of_metric])),
                    "auroc": float(np.mean([r["auroc"]["value"] for r in rows_of_metric])),
                }
            rows.append(entry)
    return rows


def costs(args: argparse.Namespace) -> dict[str, float]:
    """CPU time of a metric in training passes over the forget set, medians over models."""
    free = {seed: part for seed in args.model_seeds if (part := read(args, f"score-{seed}"))}
    shares = {
        name: float(np.median([part["cpu_seconds"][name] / part["epoch_seconds"] for part in free.values()]))
        for name in TRAINING_FREE
    }
    calibrated = [
        part["cpu_seconds"] / base["epoch_seconds"]
        for seed, base in free.items()
        for objective in OBJECTIVES
        for kind in PARTS
        if (part := read(args, f"calibrate-{seed}-{objective}-{kind}"))
    ]
    return {**shares, "calibration and all that it feeds": float(np.median(calibrated))}


def figure(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.2f}"


def markdown(result: dict) -> str:
    table = result["summary"]
    heads = [f"{row['objective']}, {row['part']}" for row in table]
    lines = [
        f"# Difficulty metrics against what unlearning leaves: {result['testbed']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['n']} forget samples, {len(result['settings']['model_seeds'])} models, "
        f"{len(result['settings']['run_seeds'])} unlearning seeds each. Spearman with residual memorisation, mean over "
        "models (partial given loss and length in brackets). `calibration` is no prediction but the run that `cud*`, "
        "`hidden_neighbours` and `group_mean` are cross-fitted to. Intervals, AUROC, each model: the JSON beside.",
        "",
        "| metric | " + " | ".join(heads) + " | cost |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for name in table[0]["metrics"]:
        cells = []
        for row in table:
            entry = row["metrics"][name]
            partial = "" if entry["partial"] is None else f" ({figure(entry['partial'])})"
            cells.append(f"{figure(entry['spearman'])}{partial}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {figure(result['cost'].get(name))} |")
    for label, key in (("another seed", "agreement"), ("attainable", "attainable")):
        lines.append(f"| *{label}* | " + " | ".join(figure(row[key]) for row in table) + " | |")
    lines += [
        "",
        "Cost: CPU seconds over those of one training pass over the forget set; calibration with all that it feeds: "
        f"{figure(result['cost']['calibration and all that it feeds'])}.",
        "",
        f"Transfer of `{result['transfer_metric']}`: calibrated on the row, predicting the column (Spearman).",
        "",
    ]
    names = [f"{row['objective']}, {row['part']}" for row in table]
    pairs = {(", ".join(r["calibrated"]), ", ".join(r["target"])): r["spearman"] for r in result["transfer"]}
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {a} | " + " | ".join(figure(pairs.get((a, b))) for b in names) + " |" for a in names]
    return "\n".join(lines) + "\n"


def picture(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = result["summary"]
    names = list(table[0]["metrics"])
    image = np.array([[row["metrics"][name]["spearman"] for row in table] for name in names])
    figure_, axes = plt.subplots(figsize=(1.1 * len(table) + 3, 0.3 * len(names) + 1.6), layout="constrained")
    shown = axes.imshow(image, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(table)), [f"{row['objective']}\n{row['part']}" for row in table])
    axes.set_yticks(range(len(names)), names)
    for y, line in enumerate(image):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if abs(value) > 0.6 else "k"
            )
    axes.set_title(f"Spearman with residual memorisation\n{result['testbed']}", fontsize=10)
    figure_.colorbar(shown, shrink=0.6)
    figure_.savefig(path, dpi=130)


def report(args: argparse.Namespace, runs: Runs, command: str) -> None:
    conditions = [
        entry
        for seed in args.model_seeds
        for part in PARTS
        for objective in OBJECTIVES
        if (entry := condition(args, runs, seed, objective, part))
    ]
    shown = ("model", "forget_config", "forget", "retain", "model_seeds", "run_seeds", "epochs", "passes", "rate_scale")
    result = {
        "testbed": (f"TOFU, {args.model or 'small Llama'}" if args.tofu else "generated authors"),
        "command": command,
        "settings": {name: getattr(args, name) for name in shown}
        | {"retain_weight": RETAIN_WEIGHT, "rates": OBJECTIVES},
        "machine": machine(),
        "versions": versions(),
        "n": conditions[0]["n"],
        "summary": summary(conditions),
        "transfer_metric": "cud",
        "transfer": transfer(args, runs, "cud"),
        "cost": costs(args),
        "conditions": conditions,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(result))
    picture(result, args.output.with_suffix(".png"))
