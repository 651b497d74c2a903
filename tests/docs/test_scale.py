"""docs/scale.md: the formulas against values worked out by hand, and the page against the formulas."""

import json
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.cost import (
    SHAPES,
    Shape,
    activations,
    adapter_weights,
    edges,
    hours,
    kept_top,
    on_one_gpu,
    passes,
    reference,
    scoring,
    states,
    tables,
    training,
)

ROOT = Path(__file__).parents[2]
# 2 layers, 2 heads with keys of their own, width 8: small enough to count.
TINY = Shape(weights=1000.0, layers=2, heads=2, key_heads=2, hidden=8, vocabulary=10)


def test_by_hand():
    assert TINY.keys == 8
    # layer 0: q, k, v of two heads read the input: 6; the MLP reads it and two heads: 3. Layer 1: 4 sources before it,
    # 6 x 4 and 4 + 2. The logits read all 7.
    assert edges(TINY) == 6 + 3 + 24 + 6 + 7
    assert passes(TINY, 10, forward=1) == 20_000 and passes(TINY, 10, forward=1, trained=1) == 60_000
    assert scoring(TINY, 10, "loss") == (20_000, 0)
    assert scoring(TINY, 10, "cud_top_k") == (40_000, 2 * 8 * 10 * 46)
    assert scoring(TINY, 10, "cud_paper") == (40_000 * 25 / 2, 2 * 8 * 10 * 46)
    assert training(TINY, 10, adapter=False) == 80_000 and training(TINY, 10, adapter=True) == 60_000
    assert [reference(TINY, 10, 90, name) for name in ("graddiff", "npo", "npo+kl")] == [0, 20_000, 200_000]
    assert adapter_weights(TINY, rank=1) == 2 * (4 * 8 + 2 * 16)  # (8 + 8) of each of four matrices, two layers
    assert states(TINY, "full") == 16_000
    assert states(TINY, "lora") == 2000 + 16 * 16 * 128 and states(TINY, "qlora") == 562.5 + 16 * 16 * 128
    assert activations(TINY, 10, 5) == (4 + 64) * 8 * 10 + 12 * 10 * 5
    assert on_one_gpu(TINY, "full", 4, 10, 5) == 4000 + 1000 + activations(TINY, 10, 5)
    assert kept_top(10, top=2) == 200
    assert hours(989e12 * 0.4 * 3600) == pytest.approx(1) and hours(0, 67e12 * 0.4 * 3600, gpus=2) == pytest.approx(0.5)


def test_the_graph_of_gpt2_has_the_edges_that_are_known():
    """32,491: Conmy et al. 2023, as counted by Syed et al. 2023."""
    assert edges(Shape(124e6, 12, 12, 12, 768, 50_257)) == 32_491


def test_models_by_hand():
    large = SHAPES["8B"]
    assert large.keys == 1024
    assert states(large, "full") / 1e9 == pytest.approx(128.48)
    assert adapter_weights(large) == 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) == 13_631_488


def test_the_page_has_these_tables():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert tables() in page
    assert "Nothing on this page was measured on a GPU yet." in page


def test_long_sets_are_linear_as_the_page_says():
    result = json.loads(scale.RESULTS.read_text())
    assert scale.table(result) in (ROOT / "docs" / "scale.md").read_text()
    for form in ("plain", "chat"):
        assert [entry["rows"] for entry in result[form]["table"]] == [2_000, 20_000, 200_000]
        for figure in ("cpu_seconds", "peak_megabytes"):
            assert result[form]["growth"][figure]["all"][-1] < 12, (form, figure)
        for stage, grown in result[form]["growth"]["peak_megabytes"].items():
            assert grown[-1] is None or grown[-1] < 11, (form, stage)
    last = result["schedule"]["table"][-1]
    assert last["rows"] == 1_000_000
    assert last["ids_megabytes"] + last["stages"]["all"]["peak_megabytes"] < 1024


def test_what_the_page_says_of_logits_a_few_positions_at_a_time():
    rows = json.loads((ROOT / "benchmarks" / "results" / "head.json").read_text())["table"]
    whole = {(row["objective"], row["retain_loss"]): row["peak_mib"] for row in rows if row["logits_mib"] == 0}
    few = [row for row in rows if row["logits_mib"] == 128]
    shares = [row["peak_mib"] / whole[row["objective"], row["retain_loss"]] for row in few]
    assert len(few) == 3
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    assert f"a step held {min(shares):.0%} to {max(shares):.0%} of the memory".replace("% to", " to", 1) in page
    ratios = [row["ratio"] for row in few]
    assert f"took {min(ratios):.1f} to {max(ratios):.1f} times" in page
