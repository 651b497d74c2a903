"""Circuit vectors, distances and CUD: formulas by hand, scipy, invariants, and what cross-fitting promises."""

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance as scipy_distance

from cud_trainer.circuits import circuit_vectors, distance, top_k_mask
from cud_trainer.data import prepare_dataset
from cud_trainer.difficulty import AnchorBank, CUDSettings, DifficultyContext, cud_scores, make_folds
from cud_trainer.difficulty.cud import anchor_circuit, extremes
from cud_trainer.difficulty.metrics import METRICS, circuit_mass, cud

EDGES = torch.tensor([[3.0, -4.0, 0.0, 1.0], [0.1, 0.2, -0.3, 0.0]])


class TestVectors:
    def test_by_hand(self):
        np.testing.assert_allclose(circuit_vectors(EDGES, k=2), [[3, -4, 0, 0], [0, 0.2, -0.3, 0]], rtol=1e-6)
        assert circuit_vectors(EDGES, kind="binary", k=2).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
        assert circuit_vectors(EDGES, kind="binary").tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]
        log = circuit_vectors(EDGES, kind="log")
        np.testing.assert_allclose(log[0, [0, 1, 3]], np.log([3, 4, 1]), rtol=1e-6)
        assert torch.isfinite(log).all() and float(log[0, 2]) == pytest.approx(np.log(4e-4), rel=1e-5)
        assert torch.isfinite(circuit_vectors(torch.zeros(1, 4), kind="log")).all()

    def test_a_circuit_never_holds_an_edge_that_scores_zero(self):
        assert top_k_mask(EDGES, 4).sum(1).tolist() == [3, 3]
        assert top_k_mask(torch.zeros(1, 4), 2).sum() == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "odd"}, "unknown circuit vector 'odd'"),
            ({"k": 0}, "k must be"),
            ({"kind": "log", "k": 3}, "all edges"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            circuit_vectors(EDGES, **options)


class TestDistances:
    def test_against_scipy(self):
        a, b = torch.randn(2, 5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        binary = (a > 0).double(), (b > 0.5).double()
        for i in range(5):
            assert float(distance(a, b)[i]) == pytest.approx(scipy_distance.cosine(a[i], b[i]))
            x, y = binary[0][i].numpy().astype(bool), binary[1][i].numpy().astype(bool)
            assert float(distance(*binary, "jaccard")[i]) == pytest.approx(scipy_distance.jaccard(x, y))
            assert float(distance(*binary, "hamming")[i]) == pytest.approx(scipy_distance.hamming(x, y))

    def test_empty_circuits_have_no_distance(self):
        zero, one = torch.zeros(3), torch.ones(3)
        assert distance(zero, one).isnan() and distance(zero, zero, "jaccard").isnan()
        assert float(distance(zero, one, "jaccard")) == 1
        with pytest.raises(ValueError, match="unknown circuit distance 'l2'"):
            distance(one, one, "l2")


class TestFormula:
    def test_by_hand(self):
        easy, hard = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
        found = cud_scores(
            torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.1], [3.0, 4.0]]), easy, hard, CUDSettings("paper")
        )
        # cosines to the anchors: (.707, .707), (1, 0), (0, 1), (.6, .8)
        np.testing.assert_allclose(found, [0.5, 0.0, 1.0, 0.4 / 0.6], atol=1e-6)

    def test_anchor_is_the_mean_of_unit_circuits(self):
        np.testing.assert_allclose(anchor_circuit(torch.tensor([[3.0, 4.0], [0.0, 10.0]])), [0.3, 0.9], rtol=1e-6)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10_000), st.sampled_from(["paper", "log"]))
    def test_in_range_and_turned_round_when_the_anchors_are_swapped(self, seed, variant):
        generator = torch.Generator().manual_seed(seed)
        x, easy, hard = (torch.randn(n, 12, generator=generator) for n in (6, 3, 3))
        cut = CUDSettings(variant)
        found = cud_scores(x, easy, hard, cut)
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_allclose(cud_scores(x, hard, easy, cut), 1 - found, atol=1e-5)
        if variant == "paper":  # the cosine does not see a circuit's mass
            np.testing.assert_allclose(cud_scores(x * 7, easy, hard * 0.1, cut), found, atol=1e-5)

    def test_log_variant_sees_the_mass_that_the_published_one_does_not(self):
        generator = torch.Generator().manual_seed(0)
        base = torch.rand(40, 50, generator=generator) + 0.5
        mass = torch.logspace(0, 2, 40)[:, None]
        edges = base * mass  # the samples differ in mass only: low mass = hard
        easy, hard = edges[-10:], edges[:10]
        middle = slice(10, 30)
        log = cud_scores(edges[middle], easy, hard, CUDSettings("log"))
        paper = cud_scores(edges[middle], easy, hard, CUDSettings("paper"))
        rank = np.arange(20)
        assert np.corrcoef(rank, log)[0, 1] < -0.95 and abs(np.corrcoef(rank, paper)[0, 1]) < 0.6

    def test_an_empty_circuit_is_never_scored(self):
        found = cud_scores(torch.zeros(1, 4), EDGES[:1], EDGES[1:], CUDSettings("paper", k=2))
        assert np.isnan(found).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "old"}, "unknown CUD variant 'old'"),
            ({"vector": "raw"}, "unknown circuit vector 'raw'"),
            ({"distance": "l2", "variant": "paper"}, "unknown circuit distance 'l2'"),
            ({"k": 5}, "k does not apply"),
            ({"variant": "paper", "k": 0}, "k must be a positive number of edges or 'all'"),
            ({"anchor_share": 0.7}, "anchor_share must be in"),
            ({"variant": "log", "distance": "hamming"}, "compared by cosine"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            CUDSettings(**options)

    def test_presets(self):
        assert CUDSettings().vector == "log" and CUDSettings().edges_kept is None
        assert CUDSettings("paper").k == 200 and CUDSettings("paper", k="all").edges_kept is None
        assert CUDSettings(vector="binary", distance="jaccard", k=10).edges_kept == 10


class TestFolds:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(2, 40), st.integers(2, 8), st.integers(0, 99))
    def test_balanced(self, n, folds, seed):
        if n < folds:
            with pytest.raises(ValueError, match=f"cannot split {n} samples into {folds} folds"):
                make_folds(n, folds, seed)
            return
        counts = np.bincount(make_folds(n, folds, seed), minlength=folds)
        assert counts.max() - counts.min() <= 1 and counts.sum() == n

    def test_groups_stay_whole(self):
        groups = [f"author{i // 3}" for i in range(21)]
        fold = make_folds(21, 3, 0, groups)
        assert all(len(set(fold[i * 3 : i * 3 + 3])) == 1 for i in range(7)) and len(set(fold)) == 3
        with pytest.raises(ValueError, match="cannot split 7 groups into 8 folds"):
            make_folds(21, 8, 0, groups)

    def test_extremes(self):
        easy, hard = extremes(np.array([0.5, 0.1, 0.9, 0.3]), 0.25)
        assert (easy.tolist(), hard.tolist()) == ([1], [2])
        with pytest.raises(ValueError, match="same residual memorisation"):
            extremes(np.ones(5), 0.25)


def make_context(residual=None, **options) -> DifficultyContext:
    """Twelve samples of the tiny model; residuals given, or counting up."""
    forget = prepare_dataset(qa_dataset(12), make_tokenizer())
    residual = np.arange(12.0) if residual is None else residual
    return DifficultyContext(
        make_model(0), forget, None, 0, folds=4, progress=False, calibrate=lambda: residual, **options
    )


class TestMetric:
    def test_a_sample_never_helps_to_make_its_own_anchors(self):
        base, plain = make_context(), cud(make_context())
        for row in range(12):
            changed = np.arange(12.0)
            changed[row] = 100.0 if row < 6 else -100.0  # from one extreme to the other
            found = cud(make_context(changed))
            assert found[row] == plain[row]
            assert (found != plain)[base.fold != base.fold[row]].any()

    def test_anchors_by_id(self):
        context = make_context()
        ids = list(context.forget["sample_id"])
        found = cud(context, anchors={"easy": ids[:4], "hard": ids[-4:]}, variant="paper", k="all")
        fold = context.fold
        for row in range(12):
            easy = [i for i in range(4) if fold[i] != fold[row]]
            hard = [i for i in range(8, 12) if fold[i] != fold[row]]
            expected = cud_scores(
                context.edges[[row]], context.edges[easy], context.edges[hard], CUDSettings("paper", k="all")
            )
            assert found[row] == pytest.approx(expected[0])

    @pytest.mark.parametrize(
        ("anchors", "message"),
        [
            ({"easy": ["nobody"], "hard": []}, "easy anchor 'nobody' is not a forget sample"),
            ({"easy": []}, "exactly the keys"),
            (3, "anchors must be 'calibration'"),
            ("missing.safetensors", "cannot read an anchor bank"),
        ],
    )
    def test_anchor_refusals_come_before_the_circuits(self, anchors, message, monkeypatch):
        context = make_context()
        monkeypatch.setattr("cud_trainer.difficulty.context.attribute_dataset", lambda *a, **k: pytest.fail("computed"))
        with pytest.raises(ValueError, match=message):
            cud(context, anchors=anchors)

    def test_bank(self, tmp_path):
        path = tmp_path / "bank.safetensors"
        plain = cud(make_context(), save_anchors=str(path))
        bank = AnchorBank.load(path)
        context = make_context()
        ids = list(context.forget["sample_id"])
        assert bank.easy_ids == ids[:3] and bank.hard_ids == ids[-3:]
        again = cud(context, anchors=str(path))
        assert np.corrcoef(plain, again)[0, 1] > 0.5  # other anchors per fold, the same direction
        row = ids.index(bank.easy_ids[0])  # an anchor sample is scored by the others
        held_out = {ids[i] for i in np.flatnonzero(context.fold == context.fold[row])}
        easy, hard = bank.without(held_out)
        expected = cud_scores(context.edges[[row]], easy, hard, CUDSettings(), (bank.mean, bank.deviation))
        assert again[row] == pytest.approx(expected[0])
        with pytest.raises(ValueError, match="another graph"):
            cud(
                DifficultyContext(make_model(0, num_hidden_layers=1), context.forget, None, 0, folds=4, progress=False),
                anchors=str(path),
            )
        with pytest.raises(ValueError, match="other settings: .*metric: bank 'prob', here 'logprob'"):
            cud(make_context(circuit_options={"metric": "logprob"}), anchors=str(path))
        with pytest.raises(ValueError, match="exists"):
            cud(make_context(), save_anchors=str(path))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot read an anchor bank"):
            AnchorBank.load(path)

    def test_empty_circuits_are_named(self):
        context = make_context()
        context.edges[4] = 0
        for metric in (lambda c: cud(c, variant="paper"), circuit_mass):
            with pytest.raises(ValueError, match=context.forget["sample_id"][4]):
                metric(context)

    def test_circuit_mass(self):
        context = make_context()
        np.testing.assert_allclose(np.exp(-circuit_mass(context)), context.edges.double().abs().sum(1))

    def test_options_are_checked_by_name(self):
        with pytest.raises(ValueError, match="'cud' has no option 'anchor'; it has .*'anchors'"):
            METRICS["cud"].check_options({"anchor": 1})
        with pytest.raises(ValueError, match="'loss' has no option 'k'; it has none"):
            METRICS["loss"].check_options({"k": 1})
