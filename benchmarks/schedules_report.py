"""What the studies of `schedules.py` found, as JSON, Markdown and a picture."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from evaluation import statistics as stats
from evaluation.plots import COLOURS, STYLES
from evaluation.study import Cell
from evaluation.study_report import BASE, Run, left_at, reported, tuned, worst_quarter

SEED = 0
NOTE = (
    "Every schedule has its learning rate and retain weight tuned on the same grid, on the first seed, for the level "
    "it is compared at; figures are means over the other seeds. Hardest: the quarter ranked hardest before unlearning "
    "by cross-fitted CUD. Change: against `uniform`, percent. Worst: the worst quarter by outcome, picked by the "
    "result. Intervals: 95%, paired over samples; they say nothing about other models. `by calibration` is the oracle: "
    "it knows what another uniform run left of each sample."
)
DRAWN = ("uniform", "inverse_mass", "upweight_hard by cud", "per_sample_stop", "upweight_hard+per_sample_stop by cud")


def runs_of(folder: Path, levels: list[float]) -> list[Run]:
    """The finished runs of a study that figures are made of."""
    cells = []
    for path in sorted(folder.glob("cells/*/result.json")):
        found = json.loads(path.with_name("cell.json").read_text())
        settings = found["settings"]
        if "scores_file" in settings:  # relative to where the study ran
            settings["scores_file"] = str(folder.parent / settings["scores_file"])
        cells.append(Cell(found["kind"], path.parent.name, found["choices"], settings))
    cells.sort(key=lambda cell: (cell.settings["options"]["seed"], cell.name))
    return [Run(folder, cell, 4) for cell in reported(folder, cells, levels, 4)]


def interval(values: stats.Interval, base: float) -> dict[str, float]:
    """A difference as a share of `base`, in percent."""
    return {key: 100 * value / max(base, 1e-12) for key, value in values.as_dict().items()}


def conditions(runs: list[Run], level: float) -> list[dict]:
    """A row per schedule at one level, tuned for it; differences from `uniform` are paired over samples."""
    chosen = {
        schedule: tuned([run for run in runs if run.schedule == schedule], level)
        for schedule in dict.fromkeys(run.schedule for run in runs)
    }
    left = left_at(chosen, level)
    base, rows = left[BASE], []
    for schedule, group in chosen.items():
        hardest = group[0].hardest
        found = [run.at(level) for run in group]
        row = {
            "schedule": schedule,
            "learning_rate": group[0].options["learning_rate"],
            "retain_weight": group[0].options.get("retain_weight"),
            "seeds": [run.seed for run in group],
            "hardest": stats.bootstrap_mean(left[schedule][hardest], seed=SEED).as_dict(),
            "all": stats.bootstrap_mean(left[schedule], seed=SEED).as_dict(),
            "worst_quarter": sum(worst_quarter(values) for values, _ in found) / len(found),
            "by_seed": [float(values[hardest].mean()) for values, _ in found],
            "steps": sum(step for _, step in found) / len(found),
            "seconds": sum(run.seconds * step / run.steps[-1] for run, (_, step) in zip(group, found, strict=True))
            / len(found),
        }
        if schedule != BASE:
            for name, part in (("hardest", hardest), ("all", slice(None))):
                difference = stats.paired_difference(left[schedule][part], base[part], seed=SEED)
                row[f"{name}_less_uniform"] = difference.as_dict()
                row[f"{name}_change"] = interval(difference, float(base[part].mean()))
        again = [run.relearned for run in group if run.relearned]
        if again:
            rest = hardest.copy()
            rest[again[0]["taught"]] = False
            row["relearned"] = (
                sum(sum(one["after"][i] for i in rest.nonzero()[0]) for one in again) / rest.sum() / len(again)
            )
        rows.append(row)
    return rows


def report(finished: list[tuple[str, str, int, Path]], output: Path, command: str) -> None:
    """Write `output`.json, .md and .png."""
    import yaml

    entries = []
    for name, objective, model_seed, folder in finished:
        settings = yaml.safe_load(folder.with_suffix(".yaml").read_text())
        levels = settings["retain_level"]
        runs = runs_of(folder, levels)
        start = sum(float(run.retain[0]) for run in runs) / len(runs)
        entries.append(
            {
                "testbed": name,
                "objective": objective,
                "model_seed": model_seed,
                "samples": len(runs[0].ids),
                "runs": len(runs),
                "retain_start": start,
                "forget_start": float(runs[0].forget[0].mean()),
                "levels": {str(level): conditions(runs, level) for level in levels},
            }
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"command": command, "studies": entries}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(entries, command))
    picture(entries).savefig(output.with_suffix(".png"), dpi=110)


def percent(change: dict[str, float] | None) -> str:
    if change is None:
        return ""
    return f"{change['value']:+.0f} [{change['low']:+.0f}, {change['high']:+.0f}]"


def markdown(entries: list[dict], command: str) -> str:
    lines = ["# Schedules at equal retain utility", "", f"`{command}`", "", NOTE, ""]
    for entry in entries:
        title = f"{entry['testbed']}, {entry['objective']}, model {entry['model_seed']}"
        levels = sorted(entry["levels"], reverse=True)
        lines += [
            f"## {title}", "",
            f"{entry['samples']} forget samples, starting answer probability {entry['forget_start']:.3f}, utility "
            f"{entry['retain_start']:.3f}; {entry['runs']} runs.", "",
            "| schedule | " + " | ".join(f"{level}: left, hardest (all)" for level in levels) + " | "
            + " | ".join(f"{level}: change, %" for level in levels) + " | worst | steps | s | relearned |",
            "|---" * (2 * len(levels) + 5) + "|",
        ]  # fmt: skip
        first = next(iter(entry["levels"]))
        for row in entry["levels"][first]:
            at = {
                level: next(r for r in entry["levels"][level] if r["schedule"] == row["schedule"]) for level in levels
            }
            cells = [f"`{row['schedule']}`"]
            cells += [f"{at[level]['hardest']['value']:.3f} ({at[level]['all']['value']:.3f})" for level in levels]
            cells += [percent(at[level].get("hardest_change")) for level in levels]
            relearned = f"{row['relearned']:.3f}" if "relearned" in row else ""
            cells += [f"{row['worst_quarter']:.3f}", f"{row['steps']:.0f}", f"{row['seconds']:.0f}", relearned]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"Worst quarter, steps, seconds and the hardest quarter after relearning: at {first}.", ""]
    return "\n".join(lines)


def picture(entries: list[dict]) -> Figure:
    """Tuned trade-off curves: share of the starting utility against what is left of the hardest quarter."""
    figure = Figure(figsize=(3.6 * len(entries), 3.4), layout="constrained")
    axes = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
    for ax, entry in zip(axes, entries, strict=True):
        levels = sorted(entry["levels"], key=float)
        for number, schedule in enumerate(DRAWN):
            rows = [next((r for r in entry["levels"][level] if r["schedule"] == schedule), None) for level in levels]
            if any(row is None for row in rows):
                continue
            ax.errorbar(
                [float(level) for level in levels], [row["hardest"]["value"] for row in rows],
                yerr=[
                    [row["hardest"]["value"] - row["hardest"]["low"] for row in rows],
                    [row["hardest"]["high"] - row["hardest"]["value"] for row in rows],
                ],
                linestyle=STYLES[number % len(STYLES)], color=COLOURS[number % len(COLOURS)], marker=".", capsize=2,
                label=schedule,
            )  # fmt: skip
        ax.set_title(f"{entry['objective']}\n{entry['testbed']}, model {entry['model_seed']}", fontsize=9)
        ax.set_xlabel("share of the utility that is kept")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("left of the hardest quarter\n(answer probability)")
    axes[0].legend(fontsize=7, frameon=False)
    return figure
