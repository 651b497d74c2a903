"""What the studies of `schedules.py` found, as JSON, Markdown and a picture."""

import json
from operator import attrgetter, itemgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cud_trainer.config import DEFAULT_SCHEDULE, DEFAULT_WITHOUT_DIFFICULTY
from evaluation import statistics as stats
from evaluation.report import audit
from evaluation.report.plots import COLOURS
from evaluation.study.grid import Cell
from evaluation.study.runs import (
    BASE,
    Run,
    first_seeds,
    grouped,
    leading,
    left_at,
    reported,
    tuned,
    worst_quarter,
)

NEVER_SEEN = "never-seen.json"  # in the folder of a testbed
SEED = 0
NOTE = (
    "Every schedule has its learning rate and retain weight tuned on the same grid, on the first seed, for the level "
    "it is compared at; figures are means over the other seeds (`generated-simnpo`: tuned on the first three; "
    "`tofu-default` and `tofu-stop`: over all, with the settings that `tofu-full` chose; `smollm2-lora` and "
    "`smollm2-long`: there is one seed only). Hardest: the quarter ranked hardest before unlearning by cross-fitted "
    "CUD. Change: against `uniform`, percent (absolute where `uniform` leaves less than 0.01). Worst: the worst "
    "quarter by outcome, picked by the result. Intervals: 95%, paired over samples; they say nothing about other "
    "models. `by calibration` is the oracle: it knows what another uniform run left of each sample. Seconds: wall "
    "time, with other work on the machine."
)
TWO = ' {"odds": {"power": 2}}'  # what was tried first, and with more controls
WITHOUT_STOP = DEFAULT_SCHEDULE.removesuffix("+per_sample_stop")
CONTROLS = [
    DEFAULT_WITHOUT_DIFFICULTY,
    *(name + TWO for name in (DEFAULT_SCHEDULE, DEFAULT_WITHOUT_DIFFICULTY, WITHOUT_STOP)),
]
MARKERS = ("o", "s", "^", "v")


def runs_of(folder: Path, levels: list[float], tuning_seeds: int) -> list[Run]:
    """The finished runs of a study that figures are made of."""
    cells = []
    for path in sorted(folder.glob("cells/*/result.json")):
        found = json.loads(path.with_name("cell.json").read_text())
        settings = found["settings"]
        if "scores_file" in settings:  # relative to where the study ran
            settings["scores_file"] = str(folder.parent / settings["scores_file"])
        cells.append(Cell(found["kind"], path.parent.name, found["choices"], settings))
    cells.sort(key=lambda cell: (cell.settings["options"]["seed"], cell.name))
    tried = first_seeds(cells, tuning_seeds)
    return [Run(folder, cell, 4) for cell in reported(folder, cells, tried, levels, 4)]


def interval(values: stats.Interval, base: float) -> dict[str, float]:
    """A difference as a share of `base`, in percent."""
    return {key: 100 * value / max(base, 1e-12) for key, value in values.as_dict().items()}


def conditions(runs: list[Run], level: float, floor: np.ndarray, tuning_seeds: int) -> list[dict]:
    """A row per schedule at one level, tuned for it; differences from `uniform` are paired over samples.

    Args:
        floor: answer probability of each sample under a model that never saw it, `[N]`.
    """
    by_schedule = grouped(runs, attrgetter("schedule"))
    chosen = {schedule: tuned(group, level, tuning_seeds) for schedule, group in by_schedule.items()}
    first = leading([run.seed for run in runs], tuning_seeds)
    if any(run.seed not in first for run in runs):  # of a study cut short, schedules only tuned have no figure
        chosen = {name: group for name, group in chosen.items() if any(run.seed not in first for run in group)}
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
            **above(floor, [values for values, _ in found], hardest),
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
            row["relearned"] = float(np.mean([np.array(one["after"])[rest].mean() for one in again]))
        rows.append(row)
    return rows


def above(floor: np.ndarray, left: list[np.ndarray], hardest: np.ndarray) -> dict[str, float]:
    """What is left above `floor`, mean over samples and seeds: less than a model says that never saw them is no win."""
    over = np.mean([np.maximum(values - floor, 0) for values in left], axis=0)
    return {"hardest_above_never_seen": float(over[hardest].mean()), "all_above_never_seen": float(over.mean())}


def report(finished: list[tuple[str, str, int, Path]], output: Path, command: str) -> None:
    """Write `output`.json, .md and .png; what the first has about other studies stays."""
    import yaml

    known = output.with_suffix(".json")
    found = json.loads(known.read_text())["studies"] if known.exists() else []
    studies = {(entry["testbed"], entry["objective"]): entry for entry in found}
    for name, objective, model_seed, folder in finished:
        settings = yaml.safe_load(folder.with_suffix(".yaml").read_text())
        levels = settings["retain_level"]
        tuning_seeds = settings.get("tuning_seeds", 1)
        runs = runs_of(folder, levels, tuning_seeds)
        start = sum(float(run.retain[0]) for run in runs) / len(runs)
        floor = np.array(json.loads((folder.parent / NEVER_SEEN).read_text()))
        studies[name, objective] = {
            "testbed": name,
            "objective": objective,
            "model_seed": model_seed,
            "command": command,
            "samples": len(runs[0].ids),
            "runs": len(runs),
            "retain_start": start,
            "forget_start": float(runs[0].forget[0].mean()),
            "never_seen": {"hardest": float(floor[runs[0].hardest].mean()), "all": float(floor.mean())},
            "levels": {str(level): conditions(runs, level, floor, tuning_seeds) for level in levels},
        }
        known_before = json.loads((folder / "results.json").read_text()).get("difficulty")
        if known_before:
            rows = known_before["objectives"][0]["rows"]
            studies[name, objective]["predictors"] = {row["metric"]: row["spearman"] for row in rows}
    entries = list(studies.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps({"studies": entries}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(entries))
    picture(entries).savefig(output.with_suffix(".png"), dpi=110)


def percent(row: dict | None) -> str:
    """The change in percent; absolute where `uniform` leaves next to nothing; nothing of what was not run."""
    if row is None or "hardest_change" not in row:
        return ""
    base = row["hardest"]["value"] - row["hardest_less_uniform"]["value"]
    form, change = (".0f", row["hardest_change"]) if base >= 0.01 else (".3f", row["hardest_less_uniform"])
    shown = f"{change['value']:+{form}} [{change['low']:+{form}}, {change['high']:+{form}}]"
    return shown if base >= 0.01 else f"{shown}, absolute"


def named(rows: list[dict], schedule: str) -> dict | None:
    """The row of a schedule; where several metrics were tried, of the one by CUD."""
    return next((row for row in rows if row["schedule"] in (schedule, f"{schedule} by cud")), None)


def default(rows: list[dict]) -> dict | None:
    """The row of the default schedule; where that was not run, of the one with power 2."""
    return named(rows, DEFAULT_SCHEDULE) or named(rows, DEFAULT_SCHEDULE + TWO)


def excess(row: dict) -> str:
    """What is left above the probability under a model that never saw the samples."""
    if "all_above_never_seen" not in row:
        return ""
    return f"{row['hardest_above_never_seen']:.3f} ({row['all_above_never_seen']:.3f})"


def summary(entries: list[dict]) -> list[str]:
    """The default schedule against `uniform`, a line for every study and level."""
    lines = [
        f"`{DEFAULT_SCHEDULE}`, the default (difficulty: CUD), against `uniform`; the same without difficulty; and "
        "with power 2 of `odds` the same, without difficulty, and without the stop. All: difference of the mean over "
        "all samples. Where the default was not run, it is the one with power 2. Above never seen: how much of what is "
        "left, hardest quarter (all), is more than a model says that never saw the forget set (empty: not measured).",
        "",
        "| testbed, model | objective | utility kept | uniform | default | change, % | no difficulty, % | power 2, % | "
        "power 2, no difficulty, % | power 2, no stop, % | all: uniform | all: difference | relearned: uniform | "
        "default | above never seen: uniform | default |",
        "|---" * 16 + "|",
    ]  # fmt: skip
    for entry in entries:
        for level, rows in sorted(entry["levels"].items(), reverse=True):
            base, best = named(rows, BASE), default(rows)
            if base is None or best is None:
                continue
            cells = [f"{entry['testbed']}, {entry['model_seed']}", entry["objective"], f"{float(level):.0%}"]
            cells += [f"{row['hardest']['value']:.3f}" for row in (base, best)]
            cells.append(percent(best))
            cells += [percent(named(rows, name)) for name in CONTROLS]
            cells.append(f"{base['all']['value']:.3f}")
            less = best["all_less_uniform"]
            cells.append(f"{less['value']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]")
            at_first = level == next(iter(entry["levels"]))
            cells += [f"{row['relearned']:.3f}" if at_first and "relearned" in row else "" for row in (base, best)]
            cells += [excess(row) for row in (base, best)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def unseen(entry: dict) -> str:
    """What a model says of the samples that never saw them."""
    if "never_seen" not in entry:
        return ""
    found = entry["never_seen"]
    return f"never seen: {found['all']:.3f} (hardest quarter {found['hardest']:.3f}); "


def predicted(entry: dict) -> list[str]:
    """How well each score, known before, ranks what the `uniform` runs left."""
    if "predictors" not in entry:
        return []
    found = [f"{name} {audit.shown(rho)}" for name, rho in entry["predictors"].items()]
    return [f"Spearman with what the `uniform` runs left (CUD cross-fitted by author): {', '.join(found)}.", ""]


def markdown(entries: list[dict]) -> str:
    commands = [f"`{command}`" for command in dict.fromkeys(entry["command"] for entry in entries)]
    lines = ["# Schedules at equal retain utility", "", "  \n".join(commands), "", NOTE, "", *summary(entries)]
    for entry in entries:
        title = f"{entry['testbed']}, {entry['objective']}, model {entry['model_seed']}"
        levels = sorted(entry["levels"], reverse=True)
        lines += [
            f"## {title}", "",
            f"{entry['samples']} forget samples, starting answer probability {entry['forget_start']:.3f}, utility "
            f"{entry['retain_start']:.3f}; {unseen(entry)}{entry['runs']} runs.", "",
            *predicted(entry),
            "| schedule | " + " | ".join(f"{level}: left, hardest (all)" for level in levels) + " | "
            + " | ".join(f"{level}: change, %" for level in levels) + " | worst | steps | s | relearned |",
            "|---" * (2 * len(levels) + 5) + "|",
        ]  # fmt: skip
        first = next(iter(entry["levels"]))
        for row in sorted(entry["levels"][first], key=lambda row: row["schedule"] != BASE):
            same = [[r for r in entry["levels"][level] if r["schedule"] == row["schedule"]] for level in levels]
            at = [found[0] if found else None for found in same]  # no figure at a level whose settings were not run
            cells = [f"`{row['schedule']}`"]
            cells += [f"{r['hardest']['value']:.3f} ({r['all']['value']:.3f})" if r else "" for r in at]
            cells += [percent(r) for r in at]
            relearned = f"{row['relearned']:.3f}" if "relearned" in row else ""
            cells += [f"{row['worst_quarter']:.3f}", f"{row['steps']:.0f}", f"{row['seconds']:.0f}", relearned]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"Worst quarter, steps, seconds and the hardest quarter after relearning: at {first}.", ""]
    return "\n".join(lines)


def picture(entries: list[dict]) -> Figure:
    """What `uniform` (hollow) and the default (filled) leave of the hardest quarter; a line per study that has both."""
    entries = [
        entry
        for entry in entries
        if any(named(rows, BASE) and named(rows, DEFAULT_SCHEDULE) for rows in entry["levels"].values())
    ]
    entries = [entry for group in grouped(entries, itemgetter("objective")).values() for entry in group]
    levels = sorted({level for entry in entries for level in entry["levels"]}, key=float)
    figure = Figure(figsize=(9, 0.42 * len(entries) + 1.2), layout="constrained")
    ax = figure.subplots()
    for line, entry in enumerate(entries):
        for number, level in enumerate(levels):
            found = entry["levels"].get(level, [])
            rows = [named(found, BASE), named(found, DEFAULT_SCHEDULE)]
            if None in rows:
                continue
            y, colour = line + 0.22 * (number - 1), COLOURS[number]
            values = [row["hardest"]["value"] for row in rows]
            ax.plot(values, [y, y], color=colour, linewidth=1, alpha=0.5)
            for row, value, face in zip(rows, values, ("white", colour), strict=True):
                ends = [[value - row["hardest"]["low"]], [row["hardest"]["high"] - value]]
                ax.errorbar(
                    [value], [y], xerr=ends, fmt=MARKERS[number], color=colour, markerfacecolor=face, markersize=5,
                    capsize=2, elinewidth=0.8,
                )  # fmt: skip
    for number, level in enumerate(levels):
        ax.plot([], [], MARKERS[number], color=COLOURS[number], label=f"{float(level):.0%} of the utility kept")
    ax.set_yticks(
        range(len(entries)), [f"{e['objective']}, {e['testbed']}, model {e['model_seed']}" for e in entries], fontsize=8
    )
    ax.set_ylim(len(entries) - 0.5, -0.5)
    ax.set_xlim(-0.03, 1.03)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False, ncols=len(levels), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.set_xlabel(
        f"answer probability left of the quarter predicted to be hardest\n{BASE} (hollow), {DEFAULT_SCHEDULE} (filled)",
        fontsize=8,
    )
    return figure
