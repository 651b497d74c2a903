"""docs/scale.md: the formulas against values worked out by hand, and the page against the formulas."""

from pathlib import Path

import pytest

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
