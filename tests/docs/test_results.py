"""README, docs/results.md and docs/results_earlier.md say what the committed studies found: every table row, and every figure in their prose.

A figure that the committed JSON does not give stands in a sentence that says it is the audit's, or in the audit's section.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/results_earlier.md")
# Sections whose figures are the audit's, or are held to the JSON by another test.
TOLD_ELSEWHERE = (
    "What the audit found",
    "What keeps most",
    "What was tried",
    "With the other pull",
    "With a retain weight that stays",
)
ENTRIES = json.loads((RESULTS / "schedules.json").read_text())["studies"]
STUDIES = {(entry["testbed"], entry["objective"]): entry for entry in ENTRIES}
DEFAULT = "upweight_hard+odds+per_sample_stop by cud"
ROWS = {
    "GradDiff": ("generated-full", "graddiff"),
    "GradDiff, second model": ("generated-second", "graddiff"),
    "GradDiff, LoRA": ("generated-lora", "graddiff"),
    "GradDiff, TOFU": ("tofu-default", "graddiff"),
    "GradDiff, TOFU, LoRA": ("tofu-lora-long", "graddiff"),
    "GradDiff, TOFU, LoRA, 30 steps": ("tofu-lora", "graddiff"),
    "GradDiff, SmolLM2, LoRA": ("smollm2-lora", "graddiff"),
    "GradDiff, SmolLM2, LoRA, 80 steps": ("smollm2-long", "graddiff"),
    "NPO": ("generated-full", "npo"),
    "NPO, second model": ("generated-second", "npo"),
    "NPO, LoRA": ("generated-lora", "npo"),
    "NPO, TOFU": ("tofu-default", "npo"),
    "NPO, TOFU, LoRA": ("tofu-lora-long", "npo"),
    "GA": ("generated-full", "ga"),
    "GA, second model": ("generated-second", "ga"),
    "GA, LoRA": ("generated-lora", "ga"),
    "GA, TOFU": ("tofu-others", "ga"),
    "GA, TOFU, LoRA": ("tofu-lora-long", "ga"),
    "SimNPO": ("generated-simnpo", "simnpo"),
    "SimNPO, LoRA": ("generated-lora", "simnpo"),
    "SimNPO, TOFU": ("tofu-others", "simnpo"),
}


def row(testbed: str, objective: str, schedule: str, level: str = "0.98") -> dict:
    (found,) = [one for one in STUDIES[testbed, objective]["levels"][level] if one["schedule"] == schedule]
    return found


def pair(label: str, level: str = "0.98") -> tuple[dict, dict]:
    return row(*ROWS[label], "uniform", level), row(*ROWS[label], DEFAULT, level)


def by_seed(one: dict) -> dict[int, float]:
    """The predicted quarter of each seed; two runs of a seed (GA, whose retain weight says nothing) are one."""
    found: dict[int, list[float]] = {}
    for seed, value in zip(one["seeds"], one["by_seed"], strict=True):
        found.setdefault(seed, []).append(value)
    return {seed: float(np.mean(found[seed])) for seed in sorted(found)}


def arrow(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def relative(before: float, after: float) -> str:
    """Percent; nothing where `uniform` leaves so little that a share of it says nothing."""
    shown = f"{100 * (after / before - 1):+.0f}" if before >= 0.01 else "n/a"
    return "0" if shown in ("-0", "+0") else shown


def by_hand(label: str) -> str:
    """Change of the predicted quarter by seed: scipy's t interval of the paired log ratio."""
    base, best = (by_seed(one) for one in pair(label))
    assert base.keys() == best.keys()
    ratios = np.log([best[seed] / base[seed] for seed in base])
    shown = f"{100 * np.expm1(ratios.mean()):+.0f}"
    if np.mean(list(base.values())) < 0.01:
        return "n/a"
    if len(ratios) == 1:
        return f"{shown}, one seed"
    low, high = 100 * np.expm1(stats.ttest_1samp(ratios, 0).confidence_interval(0.95))
    assert low >= -100
    return f"{shown} [{low:+.0f}, {f'{high:+.0f}' if high < 1000 else 'more than +1000'}]"


def docs_row(label: str) -> str:
    base, best = pair(label)
    cells = [label, str(len(by_seed(base))), arrow(base["worst_quarter"], best["worst_quarter"])]
    cells.append(relative(base["worst_quarter"], best["worst_quarter"]))
    cells.append(arrow(base["all"]["value"], best["all"]["value"]))
    cells.append(" → ".join(" ".join(f"{value:.3f}" for value in by_seed(one).values()) for one in (base, best)))
    cells.append(by_hand(label))
    return f"| {' | '.join(cells)} |"


SCORES = ("cud", "cud_edges", "cud_edges_hidden", "cud_paper", "loss", "circuit_mass", "calibration")


def predictor_row(metric: str) -> str:
    """Smallest to largest over the four objectives, by testbed and part."""
    cells = []
    for name in ("difficulty", "difficulty-tofu"):
        found = json.loads((RESULTS / f"{name}.json").read_text())["summary"]
        for part in ("full", "lora"):
            values = [one["metrics"][metric]["spearman"] for one in found if one["part"] == part]
            assert len(values) == 4
            cells.append(f"{min(values):.2f} to {max(values):.2f}")
    return f"| `{metric}` | {' | '.join(cells)} |"


def summary_facts() -> list[str]:
    """What the 21 studies are summed up to."""
    pairs = [pair(label) for label in ROWS]
    worst = [best["worst_quarter"] / base["worst_quarter"] for base, best in pairs if base["worst_quarter"] >= 0.01]
    own = [
        best["hardest"]["value"] / base["hardest"]["value"] for base, best in pairs if base["hardest"]["value"] >= 0.01
    ]
    assert len(worst) == len(own) == 20
    higher = sum(best["all"]["value"] > base["all"]["value"] for base, best in pairs)
    return [
        f"The median change over the 20 studies in which `uniform` leaves anything is {100 * (np.median(own) - 1):.0f}% in "
        f"CUD's own quarter and {100 * (np.median(worst) - 1):.0f}% in the worst quarter by outcome",
        f"the mean of all samples is higher in {higher} of the 21",
    ]


def spread(labels: list[str]) -> tuple[int, int]:
    """Least and most change of the worst quarter, percent."""
    found = [100 * (best["worst_quarter"] / base["worst_quarter"] - 1) for base, best in map(pair, labels)]
    return round(max(found)), round(min(found))


def seeds_of(one: dict) -> str:
    return " and ".join(f"{value:.3f}" for value in by_seed(one).values())


def facts() -> list[str]:
    """Sentences, or parts of them, whose figures the committed JSON gives."""

    def worst(key: str, objective: str, schedule: str, level: str = "0.98") -> str:
        return f"{row(key, objective, schedule, level)['worst_quarter']:.3f}"

    power = ' {"odds": {"power": 2}}'
    gone = spread(["GradDiff", "GradDiff, second model", "GradDiff, LoRA", "GradDiff, TOFU", "GradDiff, TOFU, LoRA"])
    cut, _ = spread(["GradDiff, TOFU, LoRA, 30 steps"])
    ga = spread(["GA", "GA, second model", "GA, LoRA", "GA, TOFU", "GA, TOFU, LoRA"])
    simnpo = spread(["SimNPO", "SimNPO, LoRA", "SimNPO, TOFU"])
    short, long = (pair(f"GradDiff, SmolLM2, LoRA{steps}") for steps in ("", ", 80 steps"))
    lucky = row("generated-others", "npo", "uniform", "0.99")
    agreement = {one["method"]: one for one in json.loads((RESULTS / "agreement.json").read_text())["rows"]}["eap"]
    peers = [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("peer", "peer_smollm2")]
    apart = max(value for peer in peers for value in peer["difference"].values())
    attribution = {
        one["method"]: one["ratio_m"]["median"]
        for one in json.loads((RESULTS / "attribution.json").read_text())["rows"]
        if one["tokens"] == 64
    }
    predictors = {key: STUDIES[key].get("predictors", {}) for key in STUDIES}
    smol = [predictors[f"smollm2-{name}", "graddiff"] for name in ("lora", "long")]
    stuck = predictors["tofu-lora-long", "npo"]

    def both(metric: str) -> str:
        return " and ".join(f"{found[metric]['value']:.2f}" for found in smol)

    tofu = "tofu-default", "graddiff"
    return [
        *summary_facts(),
        f"by {-gone[0]} to {-gone[1]}% in five of six studies",
        f"by {-cut}% where 30 steps cut it off",
        f"by {-ga[0]} to {-ga[1]}% with GA",
        f"by {-simnpo[0]} to {-simnpo[1]}% with SimNPO",
        f"two `uniform` seeds of NPO with LoRA left {seeds_of(pair('NPO, LoRA')[0])} of CUD's quarter",
        f"from {short[0]['worst_quarter']:.3f} to {short[1]['worst_quarter']:.3f} in 40 steps and from "
        f"{long[0]['worst_quarter']:.3f} to {long[1]['worst_quarter']:.3f} in 80",
        f"leaves {worst('generated-full', 'graddiff', 'per_sample_stop')}, the default "
        f"{worst('generated-full', 'graddiff', DEFAULT)}, `uniform` {worst('generated-full', 'graddiff', 'uniform')}",
        f"`uniform` leaves {worst(*tofu, 'uniform')}, the default without difficulty "
        f"{worst(*tofu, 'odds+per_sample_stop')}, with CUD {worst(*tofu, DEFAULT)}",
        f"SimNPO there {worst('tofu-others', 'simnpo', 'uniform')}, "
        f"{worst('tofu-others', 'simnpo', 'odds+per_sample_stop')} and {worst('tofu-others', 'simnpo', DEFAULT)}",
        f"GA {worst('tofu-others', 'ga', 'uniform')}, {worst('tofu-others', 'ga', 'odds+per_sample_stop')} and "
        f"{worst('tofu-others', 'ga', DEFAULT)}",
        f"without difficulty {worst('generated-full', 'graddiff', 'odds+per_sample_stop' + power)} at 98% and "
        f"{worst('generated-full', 'graddiff', 'odds+per_sample_stop' + power, '0.99')} at 99%, with CUD "
        f"{worst('generated-full', 'graddiff', 'upweight_hard+odds+per_sample_stop' + power + ' by cud')} and "
        f"{worst('generated-full', 'graddiff', 'upweight_hard+odds+per_sample_stop' + power + ' by cud', '0.99')}, with "
        f"initial loss in its place "
        f"{worst('generated-full', 'graddiff', 'upweight_hard+odds+per_sample_stop' + power + ' by loss')} and "
        f"{worst('generated-full', 'graddiff', 'upweight_hard+odds+per_sample_stop' + power + ' by loss', '0.99')}",
        f"the two seeds of `uniform` left {seeds_of(lucky)} at 99%",
        f"the two seeds of the default left {seeds_of(pair('SimNPO', '0.99')[1])}",
        f"Pearson {agreement['pearson']['value']:.2f} on SmolLM2",
        f"to {apart:.0e} of the largest score".replace("e-0", "e-"),
        f"{attribution['eap']:.2f} times its one pass for EAP, {attribution['eap-ig']:.2f} times its five for EAP-IG",
        f"CUD {both('cud')} (40 and 80 steps), initial loss {both('loss')}, the calibration run {both('calibration')}",
        f"CUD {stuck['cud']['value']:.2f}, initial loss {stuck['loss']['value']:.2f}, length {stuck['length']['value']:.2f}",
    ]


def flat(text: str) -> str:
    return " ".join(text.split())


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def claims(name: str) -> str:
    """The part of a page that tells what was measured."""
    text = page(name)
    if name == "README.md":
        text = text[text.index("## What we measured") : text.index("## Limits")]
    return text


@pytest.mark.parametrize("label", ROWS)
def test_docs(label):
    assert docs_row(label) in page("docs/results_earlier.md").splitlines()


@pytest.mark.parametrize("metric", SCORES)
def test_predictors(metric):
    assert predictor_row(metric) in page("docs/results.md").splitlines()


@pytest.mark.parametrize("fact", facts())
def test_facts_are_said_somewhere(fact):
    assert any(fact in flat(claims(name)) for name in PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_of_unknown_origin(name):
    """What is left of a page without table rows and facts has no figure, but in a sentence that names the audit."""
    text = re.sub(rf"##+ (?:{'|'.join(TOLD_ELSEWHERE)})\n.*?(?=## |\Z)", "", claims(name), flags=re.S)
    for paragraph in re.split(r"\n\n|\n(?=- |\d\. )", text):
        rest = flat("\n".join(line for line in paragraph.splitlines() if not line.startswith("|")))
        for fact in facts():
            rest = rest.replace(fact, "")
        rest = re.sub(
            r"`[^`]*`|\]\([^)]*\)|\b9[589](, 9[589])*( or 9[589])?%( of the retain| t interval|:|\.)?", "", rest
        )
        for sentence in re.split(r"(?<=\.) ", rest):
            figures = re.findall(r"[-+]?\d*\.\d+|\d+%|\d+e-\d+", sentence)
            assert not figures or "audit" in sentence, (figures, sentence)


def test_changes_are_by_seed():
    """In the JSON, too: log-ratio intervals over seeds, and none over samples alone."""
    for entry in ENTRIES:
        for level, rows in entry["levels"].items():
            base = next((one for one in rows if one["schedule"] == "uniform"), None)
            for one in rows:
                assert not [key for key in one if key.endswith("_less_uniform")]
                if base is None or one is base:
                    continue
                where = entry["testbed"], entry["objective"], level, one["schedule"]
                found = one["hardest_change"]
                shared = sorted(set(one["seeds"]) & set(base["seeds"]))
                ratios = np.log([by_seed(one)[seed] / by_seed(base)[seed] for seed in shared])
                assert found["value"] == pytest.approx(100 * np.expm1(ratios.mean())), where
                if len(shared) > 1:
                    low, high = 100 * np.expm1(stats.ttest_1samp(ratios, 0).confidence_interval(0.95))
                    assert found["low"] == pytest.approx(low) and found["low"] >= -100, where
                    assert found["high"] == pytest.approx(high) if np.isfinite(high) else found["high"] is None, where
                else:
                    assert found["low"] is None and found["high"] is None, where


def test_the_report_is_that_of_the_json(monkeypatch):
    """`python benchmarks/schedules_report.py` would write the same Markdown."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import schedules_report

    entries = json.loads((RESULTS / "schedules.json").read_text())["studies"]
    for entry in entries:
        for rows in entry["levels"].values():
            schedules_report.compare(rows)
    assert schedules_report.markdown(entries) == (RESULTS / "schedules.md").read_text()


def test_cud_top_k_is_called_what_it_is():
    """It is inspired by the paper; nothing of ours says that it is the score as published."""
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("cud_trainer/**/*.py"),
        *ROOT.glob("evaluation/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        for paragraph in re.split(r"\n\n|\n(?=[-|] )", path.read_text(encoding="utf-8")):
            if "as published" in flat(paragraph) and "cud_top_k" in paragraph:
                assert re.search(
                    r"not (the score )?as published|cheap relative",
                    flat(paragraph),
                ), path


def test_docs_show_how_far_split_runs_come_out_apart():
    docs = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    _, *rows = json.loads((RESULTS / "sharded.json").read_text())["rows"]
    assert all(row["same_order"] for row in rows)
    for row in rows:
        figures = f"{row['loss']:.1g} | {row['log_probability']:.1g} | {abs(row['kl_at_start']):.1g}"
        assert f"| {row['run']} | {figures} |" in docs


def test_table_of_agreement_with_patching():
    """What docs/circuits.md says of attribution methods beside patching itself, from the committed JSON."""
    found = json.loads((RESULTS / "relp.json").read_text())["summary"]
    methods = ("eap", "eap-ig, 5 steps", "ig-activations, 5 steps", "relp")
    measures = {
        "edges_pearson": "edges, Pearson",
        "edges_spearman": "edges, Spearman",
        "edges_top_tenth_overlap": "edges, overlap of the strongest tenth",
        "nodes_pearson": "nodes, Pearson",
        "nodes_spearman": "nodes, Spearman",
    }
    lines = page("docs/circuits.md").splitlines()
    for baseline in ("zero", "counterfactual"):
        by_method = {row["method"]: row for row in found if row["baseline"] == baseline}
        for key, label in measures.items():
            cells = " | ".join(f"{by_method[method][key]:.2f}" for method in methods)
            assert f"| {baseline} baseline: {label} | {cells} |" in lines
