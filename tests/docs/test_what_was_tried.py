"""docs/results.md says of what was joined to the default, or took the place of a part of it, what the runs found."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# By what the page calls it: the arm of each objective, in methods-graddiff and methods-npo.
ARMS = {
    "the default": ("base", "base"),
    "the other's pull": ("odds", "unlikelihood"),
    "`tail` in place of the pull": ("tail", "tail"),
    "`dro` in place of the pull": ("dro", "dro"),
    "`dynamic` in place of the pull": ("dynamic", "dynamic"),
    "`dual` in place of the pull": ("dual", "dual"),
    "no pull, `per_sample_stop` alone": ("stop only", "stop only"),
    "`tail` joined": ("tail too", "tail too"),
    "a target that falls (`start` 0.9)": ("falling target", "falling target"),
    "target 0.03": ("target 0.03", "target 0.03"),
    "`unlikelihood` with `scale` 1": ("scale 1", None),
    "`odds` with `keep: pull`": (None, "keep pull"),
    "`beta` by length": (None, "beta by length"),
    "`risk` by calibration": ("risk by calibration", "risk by calibration"),
    "`upweight_hard` by calibration": ("by calibration", "by calibration"),
    "`step: gru`": ("gru", "gru"),
    "`step: sam`": ("sam", "sam"),
    "`retain_pairing: nearest`": ("nearest", "nearest"),
    "`trainable: circuit`": ("circuit", "circuit"),
    "`circuit_share: 0.5`": ("half of circuit", "half of circuit"),
    "half the learning rate": ("half rate", "half rate"),
    "twice the learning rate": ("double rate", "double rate"),
    "`l2_sp` 0.01": ("anchor 0.01", "anchor 0.01"),
    "`l2_sp` 0.1": ("anchor 0.1", "anchor 0.1"),
    "NLL as the retain loss": ("nll", "nll"),
}
OBJECTIVES = ("graddiff", "npo")
OTHERS = {  # objectives for which nothing is confirmed: the arms, by what the page calls them
    "simnpo": {
        "`uniform`": "uniform",
        "the schedule alone": "default",
        "`preserve`": "anchor, falling",
        "`preserve`, pull of `unlikelihood`": "anchor, falling, unlikelihood",
    },
    "ga": {
        "`uniform`": "uniform",
        "`tail+per_sample_stop`": "tail",
        "the schedule alone": "default",
        "and `l2_sp`": "default, l2_sp",
        "and the pull of `unlikelihood`": "unlikelihood, l2_sp",
    },
}


def of(name: str, objective: str) -> dict:
    found = json.loads((RESULTS / f"evidence-{name}.json").read_text())
    return found["conditions"][f"{objective}-full"]


def shown(rows: list[dict]) -> str:
    return " ".join("never" if row["H"] is None else f"{row['H']:.3f}" for row in rows)


def row(label: str) -> str:
    cells = []
    for objective, arm in zip(OBJECTIVES, ARMS[label], strict=True):
        found = of(f"methods-{objective}", objective)
        cells += ["-", "-"] if arm is None else [shown(part["arms"][arm]) for part in (found, found["strict"])]
    return f"| {label} | {' | '.join(cells)} |"


def other_row(objective: str, label: str) -> str:
    """The arm with the retain weight that did best on the first seed: of it there are both."""
    found, arm = of(objective, objective), OTHERS[objective][label]
    (weight,) = {one["retain_weight"] for one in found["arms"][arm] if one["seed"] == 2}
    cells = [
        shown([one for one in part["arms"][arm] if one["retain_weight"] == weight]) for part in (found, found["strict"])
    ]
    name = {"simnpo": "SimNPO", "ga": "GA"}[objective]
    weight_shown = "-" if objective == "ga" else f"{weight:g}" + (" to 8" if "`preserve`" in label else "")
    return f"| {name} | {label} | {weight_shown} | {' | '.join(cells)} |"


def lines() -> list[str]:
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("label", ARMS)
def test_what_was_joined(label):
    assert row(label) in lines()


@pytest.mark.parametrize(("objective", "label"), [(name, label) for name, arms in OTHERS.items() for label in arms])
def test_other_objectives(objective, label):
    assert other_row(objective, label) in lines()


def test_what_came_of_tail_in_words():
    """development-7: H, strict in brackets."""
    found = json.loads((RESULTS / "evidence-development-7.json").read_text())["conditions"]

    def kept(condition: str, arm: str) -> str:
        part = found[condition]
        return f"{shown(part['arms'][arm])} ({shown(part['strict']['arms'][arm])})"

    text = " ".join("\n".join(lines()).split())
    for fact in (
        f"(`development-7`) it keeps {kept('graddiff-full', 'tail too, quarter')}, with `retain_pairing: nearest` "
        f"beside it {kept('graddiff-full', 'tail too, nearest')}.",
        f"With LoRA it keeps {kept('graddiff-lora', 'tail too')}, where the default keeps "
        f"{kept('graddiff-lora', 'base')}.",
    ):
        assert fact in text, fact


def test_what_is_said_of_the_tables():
    graddiff, strict = (
        part["arms"] for part in (of("methods-graddiff", "graddiff"), of("methods-graddiff", "graddiff")["strict"])
    )

    def least(rows: list[dict]) -> float:
        return min(row["H"] or 0.0 for row in rows)

    others = ("odds", "tail", "dro", "dynamic", "dual", "stop only")
    assert max(row["H"] for arm in others for row in graddiff[arm]) < least(graddiff["nll"]) < least(graddiff["base"])
    assert least(strict["tail too"]) > least(strict["base"]) and least(graddiff["tail too"]) < least(graddiff["base"])
    for stuck in ("circuit", "anchor 0.1"):
        assert [row["H"] for row in graddiff[stuck]] == [None, None]
    for slow in ("half rate", "falling target"):
        assert least(graddiff[slow]) > least(graddiff["base"]) and None in [row["H"] for row in strict[slow]]
    simnpo = of("simnpo", "simnpo")
    assert all(row["H"] is None for rows in simnpo["strict"]["arms"].values() for row in rows)
    assert all(
        row["H"] is None for arm in ("anchor, falling", "anchor, falling, unlikelihood") for row in simnpo["arms"][arm]
    )
