"""docs/results.md and docs/difficulty.md say of predictions what `benchmarks/prediction.py` found, figure by figure."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "prediction.json").read_text())
TOFU = json.loads((ROOT / "benchmarks" / "results" / "prediction-tofu.json").read_text())
CONDITIONS = ("graddiff-full", "npo-full", "graddiff-lora", "npo-lora")
LATER = "later, bank of a calibration"
ROWS = {  # by what the page calls it: part and figure
    "another seed": ("left", "ceiling: another seed"),
    "initial loss": ("left", "alone: loss"),
    "gradient norm": ("left", "alone: grad_norm"),
    "rank R2: loss, length, gradient norm, author's loss": ("left", "R2: base"),
    "and hidden states, outputs": ("left", "R2: base+outputs"),
    "and edges": ("left", "R2: base+outputs+edges"),
    "gain of the hidden states and outputs": ("left", "gain of R2: outputs to base"),
    "gain of the edges": ("left", "gain of R2: edges to base+outputs"),
    "gain of the edges, to all else that CUD reads": ("left", "gain of R2: edges to base+no_edges"),
    "partial correlation of the edges": ("left", "partial: edges given base+outputs"),
    "later request: CUD": (LATER, "cud"),
    "later request: CUD without edges": (LATER, "no_edges"),
    "later request: hidden states": (LATER, "hidden"),
    "later request: edges": (LATER, "edges"),
    "later request: initial loss": (LATER, "loss"),
    "later request: CUD less CUD without edges": (LATER, "cud less no_edges"),
    "later request: CUD less initial loss": (LATER, "cud less loss"),
    "held-out samples lost: another seed": ("lost", "ceiling: another seed"),
    "held-out samples lost: initial loss": ("lost", "alone: loss"),
    "held-out samples lost: fit of all but edges": ("lost", "fit: base+outputs"),
    "held-out samples lost: fit of all": ("lost", "fit: base+outputs+edges"),
}


def shown(figure: dict) -> str:
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def row(label: str) -> str:
    part, name = ROWS[label]
    each = [f"{FOUND['conditions'][condition]['figures'][part][name]['value']:.2f}" for condition in CONDITIONS]
    return f"| {label} | {' | '.join(each)} | {shown(FOUND['all'][part][name])} | {shown(TOFU['all'][part][name])} |"


def figure(part: str, name: str, condition: str = "all") -> dict:
    return (FOUND["all"] if condition == "all" else FOUND["conditions"][condition]["figures"])[part][name]


def plain(part: str, name: str) -> str:
    return f"{figure(part, name)['value']:.2f}"


def facts() -> list[tuple[str, str]]:
    """What is said, by page."""
    sizes = {(one["forget"], one["authors"]["forget"]) for one in FOUND["worlds"].values()}
    ((samples, authors),) = sizes
    count = len(FOUND["worlds"])
    outcomes = "later, bank of outcomes"
    verdicts = FOUND["verdicts"]["all"]
    edges = "edges, to loss, length, gradient norm, author, hidden states and outputs"
    return [
        (
            "docs/results.md",
            f"{count} world{'s' * (count > 1)} of generated authors, {samples} forget samples of {authors} authors in each",
        ),
        (
            "docs/difficulty.md",
            f"edges add {shown(figure('left', 'gain of R2: edges to base+outputs'))} to the rank R2 of loss, length, "
            f"gradient norm, author's loss, hidden states and outputs, which is {plain('left', 'R2: base+outputs')} "
            f"(verdict: {verdicts[edges]})",
        ),
        (
            "docs/difficulty.md",
            f"fitted to what whole runs left of the others, ranks a later request with {plain(outcomes, 'cud')}, without "
            f"edges {plain(outcomes, 'no_edges')}, where initial loss has {plain(outcomes, 'loss')}",
        ),
        (
            "docs/difficulty.md",
            f"fitted to a calibration run it is {plain(LATER, 'cud')} and {plain(LATER, 'no_edges')}, initial loss "
            f"{plain(LATER, 'loss')} (edges in it: {verdicts['edges, in a bank of a calibration']}; the bank over the "
            f"loss: {verdicts['a bank of a calibration, over the initial loss']})",
        ),
        (
            "docs/difficulty.md",
            f"by a fit of hidden states and outputs with {plain('lost', 'fit: outputs')}, of edges with "
            f"{plain('lost', 'fit: edges')}, by initial loss with {plain('lost', 'alone: loss')}",
        ),
    ]


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("label", ROWS)
def test_table(label):
    assert row(label) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "fact"), facts())
def test_sentences(name, fact):
    assert fact in page(name)


def test_what_is_said_of_tofu():
    """No over all conditions; which single ones say something else."""
    ((samples, authors),) = {(one["forget"], one["authors"]["forget"]) for one in TOFU["worlds"].values()}
    assert f"one of TOFU (`{TOFU['command']}`), {samples} of {authors} authors" in page("docs/results.md")
    asked = [question for question in TOFU["verdicts"]["all"] if question.startswith("edges")]
    said = {name: [of[question] for question in asked] for name, of in TOFU["verdicts"].items()}
    assert set(said["all"]) == set(said["graddiff-full"]) == set(said["npo-full"]) == {"no"}
    for condition in ("graddiff-lora", "npo-lora"):
        assert said[condition].count("undecided") == 2
    others = [TOFU["verdicts"][name][asked[3]] for name in CONDITIONS]
    assert asked[3] == "edges, in a bank of a calibration" and others == ["no", "no", "no", "yes"]
    assert TOFU["verdicts"]["all"]["a bank of a calibration, over the initial loss"] == "no"


def test_what_the_pages_say_in_words():
    """Edges add nothing that could be told from nothing, in no part; the rest does; a bank of a calibration is not above
    the initial loss, one of outcomes is; hidden states say what is lost."""
    for part, name in (
        ("left", "gain of R2: edges to base+outputs"),
        ("left", "gain of R2: edges to base+no_edges"),
        (LATER, "cud less no_edges"),
        ("later, bank of outcomes", "cud less no_edges"),
    ):
        found = figure(part, name)
        assert found["low"] < 0 < found["high"] and abs(found["value"]) < 0.02, name
    assert figure("left", "partial: edges given base+outputs")["low"] > 0
    assert figure("lost", "gain of R2: edges to base+outputs")["high"] < 0.02
    assert figure("left", "gain of R2: outputs to base")["low"] > 0
    assert figure("lost", "gain of R2: outputs to base")["low"] > 0.02
    assert figure(LATER, "cud less loss")["value"] < 0.02
    assert figure("later, bank of outcomes", "cud less loss")["low"] > 0


@pytest.mark.parametrize("found", [FOUND, TOFU], ids=["generated", "tofu"])
def test_markdown_is_that_of_the_json(monkeypatch, found):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import prediction

    path = ROOT / "benchmarks" / "results" / f"{found['protocol']['name']}.md"
    assert prediction.markdown(found) == path.read_text()


@pytest.mark.parametrize(("found", "file"), [(FOUND, "generated"), (TOFU, "tofu")])
def test_protocol_is_that_of_the_file(found, file):
    import yaml

    written = yaml.safe_load((ROOT / "benchmarks" / "prediction" / f"{file}.yaml").read_text())
    assert found["protocol"] == {"name": found["protocol"]["name"], **written}


def test_verdicts_follow_from_the_intervals():
    from evaluation.prediction import adds
    from evaluation.statistics import Interval

    assert re.search(r"\b0\.02\b", FOUND["rule"])
    for question, part, name in (
        ("edges, to all that CUD reads but them", "left", "gain of R2: edges to base+no_edges"),
        ("edges, in a bank of a calibration", LATER, "cud less no_edges"),
    ):
        figure = FOUND["all"][part][name]
        assert FOUND["verdicts"]["all"][question] == adds(
            Interval(figure["value"], figure["low"], figure["high"]), FOUND["protocol"]["worth"]
        )
