"""The tables of README and docs/results.md say what the committed studies found."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = {
    (entry["testbed"], entry["objective"]): entry["levels"]
    for entry in json.loads((ROOT / "benchmarks" / "results" / "schedules.json").read_text())["studies"]
}
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


def figures(label: str, level: str) -> dict[str, str]:
    """The cells of a row: `uniform` → the default schedule."""
    rows = {row["schedule"]: row for row in STUDIES[ROWS[label]].get(level, [])}
    if not rows:
        return {"hardest": "", "all": "", "relearned": ""}
    pair = rows["uniform"], rows["upweight_hard+odds+per_sample_stop by cud"]
    found = {name: " → ".join(f"{row[name]['value']:.3f}" for row in pair) for name in ("hardest", "all")}
    if pair[0]["hardest"]["value"] >= 0.01:  # a share of next to nothing says nothing
        change = pair[1]["hardest_change"]
        found["hardest"] += f", {change['value']:+.0f} [{change['low']:.0f}, {change['high']:.0f}]"
    found["relearned"] = " → ".join(f"{row['relearned']:.3f}" for row in pair) if "relearned" in pair[0] else ""
    return found


@pytest.mark.parametrize("label", ROWS)
def test_docs(label):
    cells = [figures(label, level)["hardest"] for level in ("0.99", "0.98", "0.95")]
    cells += [figures(label, "0.98")[name] for name in ("all", "relearned")]
    line = f"| {label} | " + " | ".join(cells) + " |"
    assert line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("label", ROWS)
def test_readme(label):
    line = f"| {label} | " + " | ".join(figures(label, "0.98").values()) + " |"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
