"""What the studies of `schedules.py` found, as JSON, Markdown and a picture.

python benchmarks/schedules_report.py    # makes Markdown and picture, and all comparisons, again from the JSON
"""

import json
from operator import attrgetter, itemgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation import statistics as stats
from evaluation.endpoint import worst_quarter
from evaluation.report.cells import interval_text
from evaluation.report.plots import COLOURS
from evaluation.study.runs import (
    BASE,
    Run,
    finished_cells,
    first_seeds,
    grouped,
    leading,
    left_at,
    reported,
    tuned,
)

NEVER_SEEN = "never-seen.json"  # in the folder of a testbed
SEED = 0
NOTE = (
    "Every schedule has its learning rate and retain weight tuned on the same grid, on the first seed, for the level "
    "it is compared at; figures are means over the other seeds (`generated-simnpo`: tuned on the first three; "
    "`tofu-default` and `tofu-stop`: over all, with the settings that `tofu-full` chose; `smollm2-lora` and "
    "`smollm2-long`: there is one seed only, and it is the one that was tuned on). The default was chosen on the "
    "seeds that are shown here, and its calibration run is not counted. Utility is measured on what the retain loss "
    "trains on (TOFU, SmolLM2) or on its rewordings (generated authors). Worst: the worst quarter by outcome, of every "
    "run its own; its values by seed were not kept, so its changes have no interval. Predicted: the quarter ranked "
    "hardest before unlearning by cross-fitted CUD. The default weights that quarter up by the same CUD, so less of it "
    "says little: a random difficulty does the same to the quarter that *it* ranks hardest. Change: against `uniform`, "
    "percent (absolute where `uniform` leaves less than 0.01). Intervals: 95%, t over seeds of the paired log ratio; "
    "with two or three seeds they are wide. `by calibration` is the oracle: it knows what another uniform run left of "
    "each sample. Seconds: wall time, with other work on the machine."
)
# The default when these studies were made.
DEFAULT_WITHOUT_DIFFICULTY = "odds+per_sample_stop"
DEFAULT_SCHEDULE = f"upweight_hard+{DEFAULT_WITHOUT_DIFFICULTY}"
TWO = ' {"odds": {"power": 2}}'  # what was tried first, and with more controls
WITHOUT_STOP = DEFAULT_SCHEDULE.removesuffix("+per_sample_stop")
CONTROLS = [
    DEFAULT_WITHOUT_DIFFICULTY,
    *(name + TWO for name in (DEFAULT_SCHEDULE, DEFAULT_WITHOUT_DIFFICULTY, WITHOUT_STOP)),
]
NEXT_TO_NOTHING = 0.01  # a share of less says nothing
MARKERS = ("o", "s", "^", "v")


def runs_of(folder: Path, levels: list[float], tuning_seeds: int) -> list[Run]:
    """The finished runs of a study that figures are made of."""
    cells = finished_cells(folder)
    for cell in cells:
        if "scores_file" in cell.settings:  # relative to where the study ran
            cell.settings["scores_file"] = str(folder.parent / cell.settings["scores_file"])
    cells.sort(key=lambda cell: (cell.settings["options"]["seed"], cell.name))
    tried = first_seeds(cells, tuning_seeds)
    return [Run(folder, cell, 4) for cell in reported(folder, cells, tried, levels, 4)]


def conditions(runs: list[Run], level: float, floor: np.ndarray, tuning_seeds: int) -> list[dict]:
    """A row per schedule at one level, tuned for it; `compare` adds the changes from `uniform`.

    Args:
        floor: answer probability of each sample under a model that never saw it, `[N]`.
    """
    by_schedule = grouped(runs, attrgetter("schedule"))
    chosen = {schedule: tuned(group, level, tuning_seeds) for schedule, group in by_schedule.items()}
    first = leading([run.seed for run in runs], tuning_seeds)
    if any(run.seed not in first for run in runs):  # of a study cut short, schedules only tuned have no figure
        chosen = {name: group for name, group in chosen.items() if any(run.seed not in first for run in group)}
    left = left_at(chosen, level)
    rows = []
    for schedule, group in chosen.items():
        hardest = group[0].hardest
        points = [run.at(level) for run in group]
        row = {
            "schedule": schedule,
            "learning_rate": group[0].options["learning_rate"],
            "retain_weight": group[0].options.get("retain_weight"),
            "seeds": [run.seed for run in group],
            "hardest": stats.bootstrap_mean(left[schedule][hardest], seed=SEED).as_dict(),
            "all": stats.bootstrap_mean(left[schedule], seed=SEED).as_dict(),
            **above(floor, [values for values, _ in points], hardest),
            "worst_quarter": sum(worst_quarter(values) for values, _ in points) / len(points),
            "worst_by_seed": [worst_quarter(values) for values, _ in points],
            "all_by_seed": [float(values.mean()) for values, _ in points],
            "by_seed": [float(values[hardest].mean()) for values, _ in points],
            "steps": sum(step for _, step in points) / len(points),
            "seconds": sum(run.seconds * step / run.steps[-1] for run, (_, step) in zip(group, points, strict=True))
            / len(points),
        }
        again = [run.relearned for run in group if run.relearned]
        if again:
            rest = hardest.copy()
            rest[again[0]["taught"]] = False
            row["relearned"] = float(np.mean([np.array(one["after"])[rest].mean() for one in again]))
        rows.append(row)
    return rows


def compare(rows: list[dict]) -> None:
    """Put the changes from `uniform`, in percent, into the rows of a level; what they had of them goes."""
    base = named(rows, BASE)
    for row in rows:
        for name in ("worst", "hardest", "all"):
            row.pop(f"{name}_less_uniform", None)
            row.pop(f"{name}_change", None)
            if base is not None and row is not base:
                row[f"{name}_change"] = change(row, base, name)


def change(row: dict, base: dict, name: str) -> dict[str, float | None]:
    """By how much a schedule leaves less or more than `uniform`, percent; an interval where values by seed were kept.

    Args:
        name: `"worst"` (the worst quarter by outcome), `"hardest"` (the quarter predicted hardest) or `"all"`.
    """
    seeds = sorted(set(row["seeds"]) & set(base["seeds"]))
    key = "by_seed" if name == "hardest" else f"{name}_by_seed"
    if key not in row or key not in base or not seeds:
        return {"value": 100 * (left_of(row, name) / left_of(base, name) - 1), "low": None, "high": None}
    relative = stats.paired_change(*(np.array(list(by_seed(one, key).values())) for one in (row, base)))
    return {end: 100 * value if np.isfinite(value) else None for end, value in relative.as_dict().items()}


def by_seed(row: dict, key: str = "by_seed") -> dict[int, float]:
    """The figure of each seed; runs of GA with several retain weights, which it does not use, are one."""
    figures = grouped(list(zip(row["seeds"], row[key], strict=True)), itemgetter(0))
    return {seed: float(np.mean([value for _, value in figures[seed]])) for seed in sorted(figures)}


def left_of(row: dict, name: str) -> float:
    """Mean over seeds of what is left; `name` as in `change`."""
    return row["worst_quarter"] if name == "worst" else row[name]["value"]


def above(floor: np.ndarray, left: list[np.ndarray], hardest: np.ndarray) -> dict[str, float]:
    """What is left above `floor`, mean over samples and seeds: less than a model says that never saw them is no win."""
    over = np.mean([np.maximum(values - floor, 0) for values in left], axis=0)
    return {"hardest_above_never_seen": float(over[hardest].mean()), "all_above_never_seen": float(over.mean())}


def report(finished: list[tuple[str, str, int, Path]], output: Path, command: str) -> None:
    """Write `output`.json, .md and .png; what the first has about other studies stays."""
    import yaml

    path = output.with_suffix(".json")
    before = json.loads(path.read_text())["studies"] if path.exists() else []
    studies = {(entry["testbed"], entry["objective"]): entry for entry in before}
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
        difficulty = json.loads((folder / "results.json").read_text()).get("difficulty")
        if difficulty:
            rows = difficulty["objectives"][0]["rows"]
            studies[name, objective]["predictors"] = {row["metric"]: row["spearman"] for row in rows}
    write(list(studies.values()), output)


def write(entries: list[dict], output: Path) -> None:
    """Compare with `uniform` and write `output`.json, .md and .png."""
    for entry in entries:
        for rows in entry["levels"].values():
            compare(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"studies": entries}, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(entries))
    picture(entries).savefig(output.with_suffix(".png"), dpi=110)


def percent(rows: list[dict], row: dict | None, name: str) -> str:
    """The change in percent; absolute where `uniform` leaves next to nothing; nothing of what was not run."""
    base = named(rows, BASE)
    if row is None or base is None or row is base:
        return ""
    if left_of(base, name) < NEXT_TO_NOTHING:
        return f"{left_of(row, name) - left_of(base, name):+.3f}, absolute"
    interval = row[f"{name}_change"]
    if interval["low"] is None:
        return f"{interval['value']:+.0f}"
    high = f"{interval['high']:+.0f}" if interval["high"] is not None and interval["high"] < 1000 else "more than +1000"
    return f"{interval['value']:+.0f} [{interval['low']:+.0f}, {high}]"


def seeds_of(row: dict) -> str:
    """The quarter predicted hardest, of each seed."""
    return " ".join(f"{value:.3f}" for value in by_seed(row).values())


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
        "with power 2 of `odds` the same, without difficulty, and without the stop. Where the default was not run, it "
        "is the one with power 2. Above never seen: how much of what is left, predicted quarter (all), is more than a "
        "model says that never saw the forget set (empty: not measured).",
        "",
        "| testbed, model | objective | utility kept | seeds | worst: uniform | default | change, % | "
        "no difficulty, % | power 2, % | power 2, no difficulty, % | power 2, no stop, % | all: uniform | default | "
        "predicted, by seed: uniform | default | change, % | relearned: uniform | default | "
        "above never seen: uniform | default |",
        "|---" * 20 + "|",
    ]
    for entry in entries:
        for level, rows in sorted(entry["levels"].items(), reverse=True):
            base, best = named(rows, BASE), default(rows)
            if base is None or best is None:
                continue
            pair = base, best
            cells = [f"{entry['testbed']}, {entry['model_seed']}", entry["objective"], f"{float(level):.0%}"]
            cells.append(str(len(set(best["seeds"]))))
            cells += [f"{left_of(row, 'worst'):.3f}" for row in pair]
            cells.append(percent(rows, best, "worst"))
            cells += [percent(rows, named(rows, name), "worst") for name in CONTROLS]
            cells += [f"{left_of(row, 'all'):.3f}" for row in pair]
            cells += [seeds_of(row) for row in pair]
            cells.append(percent(rows, best, "hardest"))
            at_first = level == next(iter(entry["levels"]))
            cells += [f"{row['relearned']:.3f}" if at_first and "relearned" in row else "" for row in pair]
            cells += [excess(row) for row in pair]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def unseen(entry: dict) -> str:
    """What a model says of the samples that never saw them."""
    if "never_seen" not in entry:
        return ""
    left = entry["never_seen"]
    return f"never seen: {left['all']:.3f} (hardest quarter {left['hardest']:.3f}); "


def predicted(entry: dict) -> list[str]:
    """How well each score, known before, ranks what the `uniform` runs left."""
    if "predictors" not in entry:
        return []
    figures = [f"{name} {interval_text(stats.Interval(**rho))}" for name, rho in entry["predictors"].items()]
    return [f"Spearman with what the `uniform` runs left (CUD cross-fitted by author): {', '.join(figures)}.", ""]


def markdown(entries: list[dict]) -> str:
    commands = [f"`{command}`" for command in dict.fromkeys(entry["command"] for entry in entries)]
    lines = ["# Schedules at equal retain utility", "", "  \n".join(commands), "", NOTE, "", *summary(entries)]
    for entry in entries:
        title = f"{entry['testbed']}, {entry['objective']}, model {entry['model_seed']}"
        levels = sorted(entry["levels"], reverse=True)
        lines += [
            f"## {title}",
            "",
            f"{entry['samples']} forget samples, starting answer probability {entry['forget_start']:.3f}, utility "
            f"{entry['retain_start']:.3f}; {unseen(entry)}{entry['runs']} runs.",
            "",
            *predicted(entry),
            "| schedule | seeds | "
            + " | ".join(f"{level}: left, worst (all)" for level in levels)
            + " | "
            + " | ".join(f"{level}: change of worst, %" for level in levels)
            + " | predicted, by seed | change, % | steps | s | relearned |",
            "|---" * (2 * len(levels) + 7) + "|",
        ]
        first = next(iter(entry["levels"]))
        for row in sorted(entry["levels"][first], key=lambda row: row["schedule"] != BASE):
            same = [[r for r in entry["levels"][level] if r["schedule"] == row["schedule"]] for level in levels]
            at = [rows[0] if rows else None for rows in same]  # no figure at a level whose settings were not run
            cells = [f"`{row['schedule']}`", str(len(set(row["seeds"])))]
            cells += [f"{left_of(r, 'worst'):.3f} ({left_of(r, 'all'):.3f})" if r else "" for r in at]
            cells += [percent(entry["levels"][level], r, "worst") for level, r in zip(levels, at, strict=True)]
            cells += [seeds_of(row), percent(entry["levels"][first], row, "hardest")]
            relearned = f"{row['relearned']:.3f}" if "relearned" in row else ""
            cells += [f"{row['steps']:.0f}", f"{row['seconds']:.0f}", relearned]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Predicted quarter, its change, steps, seconds and the quarter after relearning: at {first}.",
            "",
        ]
    return "\n".join(lines)


def picture(entries: list[dict]) -> Figure:
    """What `uniform` (hollow) and the default (filled) leave, a line per study that has both: of the worst quarter by
    outcome, mean over seeds, and of the quarter predicted hardest, each seed."""
    entries = [
        entry
        for entry in entries
        if any(named(rows, BASE) and named(rows, DEFAULT_SCHEDULE) for rows in entry["levels"].values())
    ]
    entries = [entry for group in grouped(entries, itemgetter("objective")).values() for entry in group]
    levels = sorted({level for entry in entries for level in entry["levels"]}, key=float)
    figure = Figure(figsize=(11, 0.42 * len(entries) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for line, entry in enumerate(entries):
        for number, level in enumerate(levels):
            compared = entry["levels"].get(level, [])
            rows = [named(compared, BASE), named(compared, DEFAULT_SCHEDULE)]
            if None in rows:
                continue
            y, colour = line + 0.22 * (number - 1), COLOURS[number]
            style = {"color": colour, "marker": MARKERS[number], "linestyle": "none", "clip_on": False}
            for ax, name, size in zip(axes, ("worst", "hardest"), (5, 3.5), strict=True):
                ax.plot([left_of(row, name) for row in rows], [y, y], color=colour, linewidth=1, alpha=0.4)
                for row, face in zip(rows, ("white", colour), strict=True):
                    values = [left_of(row, name)] if name == "worst" else list(by_seed(row).values())
                    ax.plot(values, [y] * len(values), markerfacecolor=face, markersize=size, **style)
    labels = [f"{float(level):.0%} of the utility kept" for level in levels]
    handles = [
        axes[0].plot([], [], MARKERS[number], color=COLOURS[number], label=label)[0]
        for number, label in enumerate(labels)
    ]
    axes[0].set_yticks(
        range(len(entries)),
        [f"{e['objective']}, {e['testbed']}, model {e['model_seed']} ({seeds_in(e)})" for e in entries],
        fontsize=8,
    )
    axes[0].set_ylim(len(entries) - 0.5, -0.5)
    for ax, title in zip(
        axes,
        (
            "worst quarter by outcome, mean over seeds",
            "quarter that CUD ranks hardest, each seed\n(circular: the default weights it up, by the same CUD)",
        ),
        strict=True,
    ):
        ax.set_xlim(-0.03, 1.03)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_title(title, fontsize=8)
        ax.set_xlabel(f"answer probability left\n{BASE} (hollow), {DEFAULT_SCHEDULE} (filled)", fontsize=8)
    figure.legend(handles=handles, fontsize=8, frameon=False, ncols=len(levels), loc="outside upper center")
    return figure


def seeds_in(entry: dict) -> str:
    """How many seeds are reported."""
    number = max(len(set(row["seeds"])) for rows in entry["levels"].values() for row in rows if row["schedule"] == BASE)
    return f"{number} seed{'s' if number > 1 else ''}"


if __name__ == "__main__":
    OUTPUT = Path(__file__).parent / "results" / "schedules"
    write(json.loads(OUTPUT.with_suffix(".json").read_text())["studies"], OUTPUT)
