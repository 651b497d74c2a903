"""The tables and the picture of `difficulty.py`, from the parts in its work directory."""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
from attribution import machine
from difficulty import CALIBRATED, OBJECTIVES, PARTS, RETAIN_WEIGHT, TRAINING_FREE, Cell
from scipy.stats import spearmanr

from cud_trainer.models.fingerprint import versions
from evaluation import statistics as stats
from evaluation.trajectory import averaged_residual


def read(args: argparse.Namespace, cell: Cell) -> dict | None:
    return _read(Path(args.work_dir) / f"{cell.name}.json")


@cache
def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def target(args: argparse.Namespace, seed: int, objective: str, part: str) -> dict | None:
    """Residual memorisation of a condition: by run seed `[S, N]`, and how far the runs got."""
    runs = [read(args, Cell("run", seed, objective, part, number)) for number in args.run_seeds]
    if any(run is None for run in runs):
        return None
    forget = [[np.array(snapshot) for snapshot in run["forget"]] for run in runs]
    residuals = np.stack([averaged_residual(path)[0] for path in forget])
    shares = [[float(s.mean() / path[0].mean()) for s in path] for path in forget]
    return {
        "residuals": residuals,
        "start": forget[0][0],
        "end_share": [path[-1] for path in shares],
        "snapshots_used": [sum(0.15 <= share <= 0.75 for share in path) for path in shares],
        "retain": [[run["retain"][0], run["retain"][-1]] for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }


def condition(args: argparse.Namespace, seed: int, objective: str, part: str) -> dict | None:
    found, calibrated = target(args, seed, objective, part), read(args, Cell("calibrate", seed, objective, part))
    free = read(args, Cell("score", seed))
    if found is None or calibrated is None or free is None:
        return None
    values = found["residuals"].mean(0)
    columns = {name: np.array(column) for name, column in {**free["columns"], **calibrated["columns"]}.items()}
    controls = np.column_stack([columns["loss"], columns["length"]])
    ceiling = stats.ceiling(found["residuals"], seed=0)
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
        "ceiling": ceiling,
        "rows": rows,
        "end_share": found["end_share"],
        "snapshots_used": found["snapshots_used"],
        "retain": found["retain"],
        "run_seconds": found["seconds"],
        "calibration_seconds": calibrated["seconds"],
    }


def transfer(args: argparse.Namespace, metric: str) -> list[dict]:
    """Spearman of `metric`, calibrated on one condition, with what another one leaves; mean over model seeds."""
    names = [(objective, part) for part in PARTS for objective in OBJECTIVES]
    rows = []
    for source in names:
        for goal in names:
            values = []
            for seed in args.model_seeds:
                calibrated, found = read(args, Cell("calibrate", seed, *source)), target(args, seed, *goal)
                if calibrated is not None and found is not None:
                    values.append(spearmanr(calibrated["columns"][metric], found["residuals"].mean(0)).statistic)
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
                found = [c["rows"][number] for c in same]
                spearman = [r["spearman"]["value"] for r in found]
                entry["metrics"][row["metric"]] = {
                    "spearman": float(np.mean(spearman)),
                    "each": spearman,
                    "share": float(np.mean([value / top for value, top in zip(spearman, attainable, strict=True)])),
                    "partial": None
                    if row["partial"] is None
                    else float(np.mean([r["partial"]["value"] for r in found])),
                    "auroc": float(np.mean([r["auroc"]["value"] for r in found])),
                }
            rows.append(entry)
    return rows


def costs(args: argparse.Namespace) -> dict[str, float]:
    """CPU time of a metric in training passes over the forget set, medians over models."""
    free = [part for seed in args.model_seeds if (part := read(args, Cell("score", seed)))]
    found = {
        name: float(np.median([part["seconds"][name] / part["epoch_seconds"] for part in free]))
        for name in TRAINING_FREE
    }
    calibrated = [
        part["seconds"] / base["epoch_seconds"]
        for seed, base in zip(args.model_seeds, free, strict=False)
        for objective in OBJECTIVES
        for kind in PARTS
        if (part := read(args, Cell("calibrate", seed, objective, kind)))
    ]
    return {**found, "calibration and all that it feeds": float(np.median(calibrated))}


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
            found = row["metrics"][name]
            partial = "" if found["partial"] is None else f" ({figure(found['partial'])})"
            cells.append(f"{figure(found['spearman'])}{partial}")
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
    found = {(", ".join(r["calibrated"]), ", ".join(r["target"])): r["spearman"] for r in result["transfer"]}
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {a} | " + " | ".join(figure(found.get((a, b))) for b in names) + " |" for a in names]
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


def report(args: argparse.Namespace, command: str) -> None:
    conditions = [
        found
        for seed in args.model_seeds
        for part in PARTS
        for objective in OBJECTIVES
        if (found := condition(args, seed, objective, part))
    ]
    kept = ("model", "forget_config", "forget", "retain", "model_seeds", "run_seeds", "epochs", "passes", "rate_scale")
    result = {
        "testbed": (f"TOFU, {args.model or 'small Llama'}" if args.tofu else "generated authors"),
        "command": command,
        "settings": {name: getattr(args, name) for name in kept}
        | {"retain_weight": RETAIN_WEIGHT, "rates": OBJECTIVES},
        "machine": machine(),
        "versions": versions(),
        "n": conditions[0]["n"],
        "summary": summary(conditions),
        "transfer_metric": "cud",
        "transfer": transfer(args, "cud"),
        "cost": costs(args),
        "conditions": conditions,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(result))
    picture(result, args.output.with_suffix(".png"))
