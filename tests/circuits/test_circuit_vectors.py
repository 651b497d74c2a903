"""Circuit vectors and distances against numpy and scipy, over ranges that edge scores really have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import distance as scipy_distance

from cud_trainer.circuits import DISTANCES, circuit_vectors, distance, top_k_mask
from cud_trainer.circuits.vectors import LOG_FLOOR

FINITE = st.floats(-1e3, 1e3, width=32).map(lambda value: 0.0 if abs(value) < 1e-3 else value)
ROWS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=FINITE)
PAIRS = st.integers(2, 12).flatmap(lambda n: st.tuples(*[arrays(np.float64, (1, n), elements=FINITE)] * 2))


class TestTopK:
    @settings(deadline=None, max_examples=60)
    @given(ROWS, st.integers(1, 20))
    def test_against_a_sort(self, rows, k):
        mask = top_k_mask(torch.from_numpy(rows), k).numpy()
        for row, kept in zip(np.abs(rows), mask, strict=True):
            assert kept.sum() == min(k, np.count_nonzero(row))
            assert not kept[row == 0].any()
            # ties at the boundary may fall either way, but the magnitudes kept are the k largest
            largest = np.sort(row)[::-1][:k]
            np.testing.assert_array_equal(np.sort(row[kept])[::-1], largest[largest > 0])

    def test_ties(self):
        assert top_k_mask(torch.tensor([[1.0, -1.0, 1.0, 0.5]]), 2).sum() == 2
        assert not top_k_mask(torch.tensor([[1.0, -1.0, 1.0, 0.5]]), 2)[0, 3]

    @pytest.mark.parametrize("k", [None, 3, 9])
    def test_all_edges(self, k):
        assert top_k_mask(torch.tensor([[2.0, 0.0, -1e-30]]), k).tolist() == [[True, False, True]]


class TestVectors:
    @settings(deadline=None, max_examples=40)
    @given(ROWS, st.integers(1, 14))
    def test_kinds_belong_together(self, rows, k):
        edges = torch.from_numpy(rows)
        signed, binary = circuit_vectors(edges, k=k), circuit_vectors(edges, kind="binary", k=k)
        assert (binary == (signed != 0)).all() and (signed == edges * binary).all()
        assert signed.dtype == binary.dtype == edges.dtype

    @settings(deadline=None, max_examples=40)
    @given(ROWS, st.sampled_from([1e-30, 1e-12, 1.0, 1e12]))
    def test_log_against_numpy(self, rows, scale):
        rows = rows * np.float32(scale)
        found = circuit_vectors(torch.from_numpy(rows), kind="log").numpy()
        assert np.isfinite(found).all()
        magnitude = np.abs(rows.astype(np.float64))
        floor = np.maximum(magnitude.max(1, keepdims=True) * LOG_FLOOR, np.finfo(np.float32).tiny)
        np.testing.assert_allclose(found, np.log(np.maximum(magnitude, floor)), rtol=1e-5, atol=1e-5)

    @settings(deadline=None, max_examples=30)
    @given(ROWS, st.sampled_from([1e-8, 3.0, 1e8]))
    def test_scaling_a_sample(self, rows, scale):
        """Binary circuits do not see it, log-magnitudes are shifted by its logarithm."""
        edges = torch.from_numpy(rows[(rows != 0).any(1)])
        scaled = edges * scale
        assert torch.equal(circuit_vectors(scaled, kind="binary"), circuit_vectors(edges, kind="binary"))
        shift = circuit_vectors(scaled, kind="log") - circuit_vectors(edges, kind="log")
        torch.testing.assert_close(shift, torch.full_like(shift, float(np.log(scale))), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("k", [True, 0, -1, 2.0, "3"])
    def test_refuses_k(self, k):
        with pytest.raises(ValueError, match="k must be a positive number of edges or None"):
            circuit_vectors(torch.ones(1, 3), k=k)


class TestDistances:
    @settings(deadline=None, max_examples=60)
    @given(PAIRS)
    def test_against_scipy(self, pair):
        (a,), (b,) = pair
        left, right = torch.from_numpy(a), torch.from_numpy(b)
        found = {kind: float(distance(left, right, kind)) for kind in DISTANCES}
        if a.any() and b.any():
            assert found["cosine"] == pytest.approx(scipy_distance.cosine(a, b), abs=1e-12)
        else:
            assert np.isnan(found["cosine"])
        assert found["hamming"] == pytest.approx(scipy_distance.hamming(a != 0, b != 0))
        magnitudes = np.stack([np.abs(a), np.abs(b)])
        if magnitudes.any():
            expected = 1 - magnitudes.min(0).sum() / magnitudes.max(0).sum()
            assert found["jaccard"] == pytest.approx(expected, abs=1e-12)
            binary = distance((left != 0).double(), (right != 0).double(), "jaccard")
            assert float(binary) == pytest.approx(scipy_distance.jaccard(a != 0, b != 0))
        else:
            assert np.isnan(found["jaccard"])

    @pytest.mark.parametrize("kind", sorted(DISTANCES))
    def test_range_and_symmetry_in_float32(self, kind):
        """Rounding never takes a distance out of its range: CUD would leave [0, 1]."""
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 500, 7, generator=generator)
        upper = 2 if kind == "cosine" else 1
        for left, right in ((a, b), (a, a), (a, -a), (a, 3 * a)):
            found = distance(left, right, kind)
            assert (found >= 0).all() and (found <= upper).all()
            torch.testing.assert_close(found, distance(right, left, kind))
        torch.testing.assert_close(distance(a, a, kind), torch.zeros(500), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-12, 1e20, 1e36])
    def test_cosine_does_not_see_the_scale(self, scale):
        """Scores of saturated or hopeless answers are tiny; their squares must not underflow."""
        a, b = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 1.0, 1.0])
        expected = scipy_distance.cosine(a, b)
        for left, right in ((a * scale, b), (a, b * scale), (a * scale, b * scale)):
            assert float(distance(left, right)) == pytest.approx(expected, rel=1e-5)

    def test_broadcasting(self):
        a, b = torch.eye(3), torch.tensor([1.0, 0.0, 0.0])
        assert distance(a, b).tolist() == distance(a, b[None]).tolist() == [0, 1, 1]
        assert distance(a[:, None], a[None]).shape == (3, 3)

    def test_one_zero_row_does_not_spoil_the_others(self):
        a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        assert distance(a, torch.tensor([1.0, 0.0])).isnan().tolist() == [True, False]
