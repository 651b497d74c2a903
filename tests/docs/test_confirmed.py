"""README and the pages of results say of the confirmed rule what the committed runs found, figure by figure."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EARLIER = "docs/results_earlier.md"
FOUND = {
    name: json.loads((RESULTS / f"evidence-{name}.json").read_text())
    for name in (
        "development",
        "development-2",
        "development-3",
        "development-4",
        "development-5",
        "development-6",
        "confirmation",
        "confirmation-2",
        "confirmation-3",
        "confirmation-4",
        "tofu",
        "tofu-2",
        "tofu-3",
        "pretrained-development",
        "pretrained-development-2",
        "pretrained",
        "pretrained-2",
    )
}
# What README and the first table have: the protocols of a condition, and what each arm is called there.
GENERATED = {"uniform": "uniform", "alone": "odds", "preserve": "preserve", "cud": "preserve by cud"}
GENERATED |= {"random": "preserve by random"}
ON_TOFU = {"uniform": "uniform", "alone": "odds", "preserve": "anchor, falling"}
SOURCES = {
    "GradDiff": (["confirmation-4"], "graddiff-full", GENERATED),
    "NPO": (["confirmation-3"], "npo-full", GENERATED),
    "GradDiff, LoRA": (["confirmation-4"], "graddiff-lora", GENERATED),
    "NPO, LoRA": (["confirmation-3"], "npo-lora", GENERATED),
    "GradDiff, TOFU": (["tofu", "tofu-3"], "graddiff-full", {**ON_TOFU, "preserve": "preserve"}),
    "NPO, TOFU": (["tofu", "tofu-2"], "npo-full", ON_TOFU),
    "GradDiff, SmolLM2": (["pretrained-2"], "graddiff-full", {"uniform": "uniform", "preserve": "preserve"}),
}
PULLS = ("odds", "unlikelihood 0.3", "root")  # of development-6
# With the other pull in `preserve`: GradDiff with that of `odds`, NPO with that of `unlikelihood`.
OTHER = {
    "GradDiff": (["confirmation-3"], "graddiff-full", GENERATED),
    "NPO": (["confirmation-4"], "npo-full", GENERATED),
    "GradDiff, LoRA": (["confirmation-3"], "graddiff-lora", GENERATED),
    "NPO, LoRA": (["confirmation-4"], "npo-lora", GENERATED),
    "GradDiff, TOFU": (["tofu", "tofu-2"], "graddiff-full", ON_TOFU),
    "NPO, TOFU": (["tofu", "tofu-3"], "npo-full", {**ON_TOFU, "preserve": "preserve"}),
}
SHOWN = {
    "uniform": "`uniform`",
    "alone": "the schedule alone",
    "preserve": "`preserve`",
    "cud": "`preserve`, by CUD",
    "random": "`preserve`, by a random difficulty",
}
# The earlier protocols, with a retain weight that stays.
CONDITIONS = {
    "GradDiff": ("confirmation-2", "graddiff-full"),
    "NPO": ("confirmation", "npo-full"),
    "GradDiff, LoRA": ("confirmation", "graddiff-lora"),
    "NPO, LoRA": ("confirmation", "npo-lora"),
    "GradDiff, TOFU": ("tofu", "graddiff-full"),
    "NPO, TOFU": ("tofu", "npo-full"),
}
ARMS = {
    "anchor": "anchored",
    "anchor by cud": "anchored, by CUD",
    "anchor by random": "anchored, by a random difficulty",
    "anchor by calibration": "anchored, by calibration",
    "anchor by oracle": "anchored, by the oracle",
}


Source = tuple[list[str], str, dict[str, str]]


def first(source: Source, arm: str, *, strict: bool = False) -> list[dict]:
    """Runs of a row of the first table, or of that with the other pull."""
    names, key, arms = source
    for name in names if arm in arms else ():
        found = FOUND[name]["conditions"][key]
        part = found.get("strict", {"arms": {}}) if strict else found
        if rows := part["arms"].get(arms[arm]):
            return rows
    return []


def by_seed(rows: list[dict]) -> dict[int, float | None]:
    return {row["seed"]: row["H"] for row in rows}


def first_row(condition: str, source: Source, arm: str) -> str:
    rows = first(source, arm)
    values, strict = (by_seed(first(source, arm, strict=only)).values() for only in (False, True))
    weight = f"{rows[0]['retain_weight']:g}" + (" to 8" if arm in ("preserve", "cud", "random") else "")
    return f"| {condition} | {SHOWN[arm]} | {weight} | {shown(values)} | {mean(values)} | {shown(strict) or '-'} |"


def runs(condition: str, arm: str, *, strict: bool = False) -> list[dict]:
    name, key = CONDITIONS[condition]
    found = FOUND[name]["conditions"][key]
    return (found["strict"] if strict else found)["arms"].get(arm, [])


def shown(values) -> str:
    return " ".join("never" if value is None else f"{value:.3f}" for value in values)


def mean(values) -> str:
    values = list(values)
    some = [value for value in values if value is not None]
    if len(some) < len(values):
        return f"{len(some)} of {len(values)} seeds"
    return f"{np.mean(some):.2f}" if some else "-"


def docs_row(condition: str, arm: str) -> str:
    values, strict = (by_seed(runs(condition, arm, strict=only)).values() for only in (False, True))
    weight = runs(condition, arm)[0]["retain_weight"]
    return f"| {condition} | {ARMS[arm]} | {weight:g} | {shown(values)} | {mean(values)} | {shown(strict)} |"


def readme_row(condition: str) -> str:
    return f"| {condition} | {' | '.join(mean(by_seed(first(SOURCES[condition], arm)).values()) for arm in SHOWN)} |"


def difference(ours: dict[int, float | None], theirs: dict[int, float | None]) -> str:
    """Of H, paired by seed, with its 95% t interval; in how many seeds it is reached, where not in all."""
    if None in (*ours.values(), *theirs.values()):
        there, other = (sum(value is not None for value in one.values()) for one in (ours, theirs))
        return f"in {there} of {len(ours)} seeds, against {other}"
    values = np.array([ours[seed] - theirs[seed] for seed in ours], dtype=float)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def flat(name: str) -> str:
    return " ".join(page(name).split())


@pytest.mark.parametrize("condition", SOURCES)
def test_first_table(condition):
    assert readme_row(condition) in page("README.md").splitlines()
    check_rows(condition, SOURCES[condition], "docs/results.md")


def pulls_row(condition: str) -> str:
    arms = FOUND["development-6"]["conditions"][SOURCES[condition][1]]["arms"]
    kept, strict = ([shown(row["H"] for row in rows[pull]) for pull in PULLS] for rows in (arms, _strict(condition)))
    return f"| {condition} | {' | '.join(f'{one} ({other})' for one, other in zip(kept, strict, strict=True))} |"


def _strict(condition: str) -> dict[str, list[dict]]:
    return FOUND["development-6"]["conditions"][SOURCES[condition][1]]["strict"]["arms"]


@pytest.mark.parametrize("condition", [name for name in SOURCES if "TOFU" not in name and "Smol" not in name])
def test_pulls_in_development(condition):
    assert pulls_row(condition) in map(str.strip, page("docs/results.md").splitlines())


@pytest.mark.parametrize("condition", OTHER)
def test_with_the_other_pull(condition):
    check_rows(condition, OTHER[condition], EARLIER)


def check_rows(condition: str, source: Source, name: str) -> None:
    """Rows of a table of a page, and what is said of them below it."""
    lines, text = page(name).splitlines(), flat(name)
    for arm in SHOWN:
        assert not first(source, arm) or first_row(condition, source, arm) in lines
    uniform = by_seed(first(source, "uniform"))
    for arm in ("alone", "preserve"):
        assert not first(source, arm) or f"{condition} {difference(by_seed(first(source, arm)), uniform)}" in text
    if first(source, "cud"):
        against = difference(by_seed(first(source, "cud")), by_seed(first(source, "random")))
        assert f"{condition} {against}" in text
        (protocol,) = source[0]
        decided = FOUND[protocol]["conditions"][source[1]]["decisions"]["preserve by cud"]
        assert f"{condition}: {decided['verdict']}" in text


@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_with_a_weight_that_stays(condition):
    lines = page(EARLIER).splitlines()
    for arm in ARMS:
        assert not runs(condition, arm) or docs_row(condition, arm) in lines
    name, key = CONDITIONS[condition]
    decided, text = FOUND[name]["conditions"][key]["decisions"], flat(EARLIER)
    for arm in ("anchor by cud", "anchor by calibration", "anchor by oracle"):
        assert arm not in decided or f"{ARMS[arm]}, {condition}: {decided[arm]['verdict']}" in text


def test_what_failed_is_said():
    """The weight at the edge of the grid, on the first fresh model."""
    (weight,) = {run["retain_weight"] for run in FOUND["confirmation"]["conditions"]["graddiff-full"]["arms"]["anchor"]}
    ends = [run["H"] for run in FOUND["confirmation"]["conditions"]["graddiff-full"]["arms"]["anchor"]]
    assert ends == [None] * 4 and weight == 256
    text = flat(EARLIER)
    assert "never forgot enough in any of four seeds" in text
    lowest = [run["lowest"] for run in first(SOURCES["NPO, TOFU"], "preserve") if run["H"] is None]
    assert "got there in three of four seeds; the fourth came to {:.3f}".format(*lowest) in flat("docs/results.md")
    lowest = {f"{run['lowest']:.2f}" for run in first(OTHER["NPO, TOFU"], "preserve")}
    assert f"on TOFU it left {' '.join(lowest)} of the worst quarter in every seed" in text


def test_a_pretrained_model_in_words():
    """One seed, every weight."""
    found = FOUND["pretrained-development"]["conditions"]["graddiff-full"]["arms"]
    uniform, alone, falling = ([run["H"] for run in found[arm]] for arm in ("uniform", "odds", "anchor, falling"))
    text = flat("docs/results.md")
    for fact in (
        f"`uniform` kept {min(uniform):.2f} to {max(uniform):.2f} with retain weights 4, 16 and 64",
        f"the schedule alone {min(alone):.2f} to {max(alone):.2f}",
        "{:.2f}, {:.2f} and {:.2f}.".format(*falling),
    ):
        assert fact in text
    again = FOUND["pretrained-development-2"]["conditions"]["graddiff-full"]["arms"]
    (first_,), (second,) = again["unlikelihood 0.3"], again["unlikelihood 1"]
    assert f"the same weight kept {first_['H']:.2f} (scale 0.3) and {second['H']:.2f} (scale 1)" in text
    four = FOUND["pretrained"]["conditions"]["graddiff-full"]["arms"]
    assert [run["H"] for run in four["preserve"]] == [None] * 4
    kept = [run["H"] for run in four["uniform"]]
    assert f"got there in none of four seeds, `uniform` in all, with {min(kept):.2f} to {max(kept):.2f} kept" in text


def test_ends_of_plans_in_words():
    conditions = FOUND["development-5"]["conditions"]

    def last(condition: str, arm: str) -> dict:
        return conditions[condition]["arms"][arm][0]["last"]

    graddiff, npo = (last(condition, "linear") for condition in ("graddiff-full", "npo-full"))
    constant = [last(condition, "constant")["kept"] for condition in ("graddiff-full", "npo-full")]
    uniform = [last(condition, "uniform")["kept"] for condition in ("graddiff-full", "npo-full")]
    text = flat("docs/results.md")
    for fact in (
        f"GradDiff ends with {graddiff['kept']:.2f} kept and {graddiff['worst_quarter']:.3f} in the worst quarter",
        f"NPO with {npo['kept']:.2f} and {npo['worst_quarter']:.3f}",
        "with a constant rate {:.2f} and {:.2f} are kept".format(*constant),
        "`uniform` ends with {:.2f} and {:.2f}".format(*uniform),
    ):
        assert fact in text, fact


@pytest.mark.parametrize("name", FOUND)
def test_results_are_of_the_committed_protocol(name):
    written = yaml.safe_load((ROOT / "benchmarks" / "evidence" / f"{name}.yaml").read_text())
    assert FOUND[name]["protocol"] == {"name": name, **written}


@pytest.mark.parametrize("name", FOUND)
def test_the_tables_are_those_of_the_json(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    assert evidence.markdown(FOUND[name]) == (RESULTS / f"evidence-{name}.md").read_text()
