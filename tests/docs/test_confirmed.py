"""README and docs/results.md say of the confirmed rule what the committed runs found, figure by figure."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOUND = {
    name: json.loads((RESULTS / f"evidence-{name}.json").read_text())
    for name in ("development", "development-2", "confirmation", "confirmation-2", "tofu", "development-3", "tofu-2")
}
CONDITIONS = {
    "GradDiff": ("confirmation-2", "graddiff-full"),
    "NPO": ("confirmation", "npo-full"),
    "GradDiff, LoRA": ("confirmation", "graddiff-lora"),
    "NPO, LoRA": ("confirmation", "npo-lora"),
    "GradDiff, TOFU": ("tofu", "graddiff-full"),
    "NPO, TOFU": ("tofu", "npo-full"),
}
ARMS = {
    "uniform": "`uniform`",
    "odds": "the default",
    "anchor": "anchored",
    "anchor by cud": "anchored, by CUD",
    "anchor by random": "anchored, by a random difficulty",
    "anchor by calibration": "anchored, by calibration",
    "anchor by oracle": "anchored, by the oracle",
}
IN_README = ("uniform", "odds", "anchor", "anchor by cud", "anchor by random")


def runs(condition: str, arm: str, *, strict: bool = False) -> list[dict]:
    name, key = CONDITIONS[condition]
    found = FOUND[name]["conditions"][key]
    return (found["strict"] if strict else found)["arms"].get(arm, [])


def kept(condition: str, arm: str, *, strict: bool = False) -> dict[int, float | None]:
    return {run["seed"]: run["H"] for run in runs(condition, arm, strict=strict)}


def shown(values) -> str:
    return " ".join("never" if value is None else f"{value:.3f}" for value in values)


def mean(values) -> str:
    values = list(values)
    some = [value for value in values if value is not None]
    if len(some) < len(values):
        return f"{len(some)} of {len(values)} seeds"
    return f"{np.mean(some):.2f}" if some else "-"


def docs_row(condition: str, arm: str) -> str:
    values, strict = kept(condition, arm).values(), kept(condition, arm, strict=True).values()
    weight = runs(condition, arm)[0]["retain_weight"]
    return f"| {condition} | {ARMS[arm]} | {weight:g} | {shown(values)} | {mean(values)} | {shown(strict)} |"


def readme_row(condition: str) -> str:
    return f"| {condition} | {' | '.join(mean(kept(condition, arm).values()) for arm in IN_README)} |"


def difference(condition: str, arm: str, other: str) -> str:
    """Of H, paired by seed, with its 95% t interval; in how many seeds it is reached, where not in all."""
    ours, theirs = kept(condition, arm), kept(condition, other)
    if None in ours.values():
        return f"in {sum(value is not None for value in ours.values())} of {len(ours)} seeds only"
    values = np.array([ours[seed] - theirs[seed] for seed in ours], dtype=float)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows(condition):
    assert readme_row(condition) in page("README.md").splitlines()
    lines = page("docs/results.md").splitlines()
    arms = [arm for arm in ARMS if runs(condition, arm)]
    assert set(IN_README[:3]) <= set(arms)
    for arm in arms:
        assert docs_row(condition, arm) in lines


@pytest.mark.parametrize("condition", CONDITIONS)
def test_differences(condition):
    text = " ".join(page("docs/results.md").split())
    for arm in ("odds", "anchor"):
        assert f"{condition} {difference(condition, arm, 'uniform')}" in text
    if runs(condition, "anchor by cud"):
        assert f"{condition} {difference(condition, 'anchor by cud', 'anchor by random')}" in text
        name, key = CONDITIONS[condition]
        decided = FOUND[name]["conditions"][key]["decisions"]
        for arm in ("anchor by cud", "anchor by calibration", "anchor by oracle"):
            assert f"{ARMS[arm]}, {condition}: {decided[arm]['verdict']}" in text


@pytest.mark.parametrize("key", ["graddiff-full", "npo-full"])
@pytest.mark.parametrize(("arm", "name"), [("odds, falling", "the default"), ("anchor, falling", "anchored")])
def test_falling_weights(key, arm, name):
    found = FOUND["tofu-2"]["conditions"][key]["arms"][arm]
    values = [run["H"] for run in found]
    (weight,) = {run["retain_weight"] for run in found}
    objective = {"graddiff-full": "GradDiff", "npo-full": "NPO"}[key]
    row = f"| {objective}, TOFU | {name}, falling | {weight:g} to 8 | {shown(values)} | {mean(values)} |"
    assert row in page("docs/results.md").splitlines()


def test_falling_weights_in_words():
    """Where it got there: in all four conditions of the development model, strictly too; in seven of eight runs on TOFU."""
    development = FOUND["development-3"]["conditions"]
    for found in development.values():
        runs = [run for run in found["strict"]["arms"]["anchor, falling"] if run["retain_weight"] == 256]
        assert runs and all(run["H"] is not None for run in runs)
    runs = [run for found in FOUND["tofu-2"]["conditions"].values() for run in found["arms"]["anchor, falling"]]
    assert (sum(run["H"] is not None for run in runs), len(runs)) == (7, 8)


def test_what_failed_is_said():
    """The weight at the edge of the grid, on the first fresh model."""
    (first,) = {run["retain_weight"] for run in FOUND["confirmation"]["conditions"]["graddiff-full"]["arms"]["anchor"]}
    ends = [run["H"] for run in FOUND["confirmation"]["conditions"]["graddiff-full"]["arms"]["anchor"]]
    assert ends == [None] * 4 and first == 256
    for name in ("README.md", "docs/results.md"):
        assert "never forgot enough in any of four seeds" in " ".join(page(name).split())


@pytest.mark.parametrize("name", FOUND)
def test_results_are_of_the_committed_protocol(name):
    written = yaml.safe_load((ROOT / "benchmarks" / "evidence" / f"{name}.yaml").read_text())
    assert FOUND[name]["protocol"] == {"name": name, **written}


@pytest.mark.parametrize("name", FOUND)
def test_the_tables_are_those_of_the_json(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    assert evidence.markdown(FOUND[name]) == (RESULTS / f"evidence-{name}.md").read_text()
