"""Circuit vectors, distances and CUD: formulas by hand, scipy, invariants, and what cross-fitting promises."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance as scipy_distance

from cud_trainer.circuits import circuit_vectors, distance, top_k_mask
from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.difficulty import (
    METRICS,
    AnchorBank,
    CUDSettings,
    DifficultyContext,
    cud_scores,
    make_folds,
    register_metric,
)
from cud_trainer.difficulty.circuit_metrics import circuit_mass
from cud_trainer.difficulty.cud import anchor_circuit, cud, extremes, log_standardisation
from cud_trainer.logprobs import score_answers

VARIANTS = [
    {"variant": "log"},
    {"variant": "top_k", "k": 3},
    {"variant": "top_k", "k": "all"},
    {"variant": "top_k", "vector": "binary", "k": 3, "distance": "cosine"},
    {"variant": "top_k", "vector": "binary", "k": 3, "distance": "jaccard"},
    {"variant": "top_k", "vector": "binary", "k": 3, "distance": "hamming"},
    {"variant": "top_k", "vector": "signed", "k": "all", "distance": "jaccard"},
]
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
            torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.1], [3.0, 4.0]]), easy, hard, CUDSettings("top_k")
        )
        # cosines to the anchors: (.707, .707), (1, 0), (0, 1), (.6, .8)
        np.testing.assert_allclose(found, [0.5, 0.0, 1.0, 0.4 / 0.6], atol=1e-6)

    def test_anchor_is_the_mean_of_unit_circuits(self):
        np.testing.assert_allclose(anchor_circuit(torch.tensor([[3.0, 4.0], [0.0, 10.0]])), [0.3, 0.9], rtol=1e-6)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10_000), st.sampled_from(["top_k", "log"]))
    def test_in_range_and_turned_round_when_the_anchors_are_swapped(self, seed, variant):
        generator = torch.Generator().manual_seed(seed)
        x, easy, hard = (torch.randn(n, 12, generator=generator) for n in (6, 3, 3))
        cut = CUDSettings(variant)
        found = cud_scores(x, easy, hard, cut)
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_allclose(cud_scores(x, hard, easy, cut), 1 - found, atol=1e-5)
        if variant == "top_k":  # the cosine does not see a circuit's mass
            np.testing.assert_allclose(cud_scores(x * 7, easy, hard * 0.1, cut), found, atol=1e-5)

    def test_log_variant_sees_the_mass_that_the_published_one_does_not(self):
        generator = torch.Generator().manual_seed(0)
        base = torch.rand(40, 50, generator=generator) + 0.5
        mass = torch.logspace(0, 2, 40)[:, None]
        edges = base * mass  # the samples differ in mass only: low mass = hard
        easy, hard = edges[-10:], edges[:10]
        middle = slice(10, 30)
        log = cud_scores(edges[middle], easy, hard, CUDSettings("log"))
        paper = cud_scores(edges[middle], easy, hard, CUDSettings("top_k"))
        rank = np.arange(20)
        assert np.corrcoef(rank, log)[0, 1] < -0.95 and abs(np.corrcoef(rank, paper)[0, 1]) < 0.6

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 10_000), st.sampled_from(VARIANTS), st.sampled_from([1e-25, 1e-14, 1.0, 1e10]))
    def test_invariants(self, seed, options, scale):
        """In [0, 1] to the last bit; anchors exchanged: the complement; circuits scaled: the same."""
        generator = torch.Generator().manual_seed(seed)
        edges, easy, hard = (torch.randn(n, 6, generator=generator) for n in (5, 3, 2))
        chosen = CUDSettings(**options)
        standardisation = log_standardisation(torch.cat([edges, easy, hard])) if chosen.vector == "log" else None
        found = cud_scores(edges, easy, hard, chosen, standardisation)
        assert ((found >= 0) & (found <= 1) | np.isnan(found)).all()
        np.testing.assert_allclose(cud_scores(edges, hard, easy, chosen, standardisation), 1 - found, atol=1e-6)
        if chosen.vector != "log" and chosen.distance != "jaccard":  # those see the mass
            scaled = cud_scores(edges * scale, easy * scale, hard * scale, chosen)
            np.testing.assert_allclose(scaled, found, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
    def test_anchors_score_as_what_they_are(self, options):
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):  # rounding must not take one below 0 or above 1
            easy, hard, other = torch.randn(3, 1, 9, generator=generator)
            chosen = CUDSettings(**options)
            if chosen.distance == "jaccard":  # compares with anchors of unit length
                easy, hard = easy / easy.norm(), hard / hard.norm()
            standardisation = log_standardisation(torch.cat([easy, hard, other])) if chosen.vector == "log" else None
            first, second = cud_scores(torch.cat([easy, hard]), easy, hard, chosen, standardisation)
            assert 0 <= first < 1e-5 and 1 - 1e-5 < second <= 1

    def test_log_by_hand(self):
        """Standardised log-magnitudes, the mean of each anchor, cosine, in numpy."""
        edges, easy, hard = np.exp(np.random.default_rng(0).normal(size=(3, 4, 5)))
        everything = np.log(np.concatenate([edges, easy, hard]))
        mean, deviation = everything.mean(0), everything.std(0, ddof=1)

        def cosine_distance(x, anchor):
            x, anchor = (np.log(x) - mean) / deviation, ((np.log(anchor) - mean) / deviation).mean(0)
            return 1 - x @ anchor / np.linalg.norm(x, axis=1) / np.linalg.norm(anchor)

        to_easy, to_hard = cosine_distance(edges, easy), cosine_distance(edges, hard)
        edges, easy, hard = (torch.from_numpy(x) for x in (edges, easy, hard))
        found = cud_scores(edges, easy, hard, CUDSettings("log"), log_standardisation(torch.cat([edges, easy, hard])))
        np.testing.assert_allclose(found, to_easy / (to_easy + to_hard), rtol=1e-10)

    def test_an_edge_that_never_varies_says_nothing(self):
        edges = torch.tensor([[1.0, 2.0, 7.0], [2.0, 1.0, 7.0], [4.0, 3.0, 7.0]])
        mean, deviation = log_standardisation(edges)
        assert torch.isinf(deviation).tolist() == [False, False, True]
        with_it = cud_scores(edges[:1], edges[1:2], edges[2:], CUDSettings("log"), (mean, deviation))
        without = cud_scores(
            edges[:1, :2], edges[1:2, :2], edges[2:, :2], CUDSettings("log"), (mean[:2], deviation[:2])
        )
        # only the floor of the logarithm could differ, and 1 is above 1e-4 of 7
        np.testing.assert_allclose(with_it, without, rtol=1e-6)

    def test_a_strong_sample_does_not_outvote_the_others(self):
        easy = torch.tensor([[1e-14, 0.0], [0.0, 1e3]])
        np.testing.assert_allclose(anchor_circuit(easy), [0.5, 0.5], rtol=1e-6)
        np.testing.assert_allclose(anchor_circuit(torch.tensor([[0.0, 0.0], [0.0, 2.0]])), [0, 0.5])

    def test_an_empty_circuit_is_never_scored(self):
        found = cud_scores(torch.zeros(1, 4), EDGES[:1], EDGES[1:], CUDSettings("top_k", k=2))
        assert np.isnan(found).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "old"}, "unknown CUD variant 'old'"),
            ({"vector": "raw"}, "unknown circuit vector 'raw'"),
            ({"distance": "l2", "variant": "top_k"}, "unknown circuit distance 'l2'"),
            ({"k": 5}, "k does not apply"),
            ({"variant": "top_k", "k": 0}, "k must be a positive number of edges or 'all'"),
            ({"anchor_share": 0.7}, "anchor_share must be in"),
            ({"variant": "log", "distance": "hamming"}, "compared by cosine"),
            ({"vector": "signed"}, "'calibrated' reads log edge scores; 'signed' vectors are for 'top_k'"),
            ({"variant": ["log"]}, "unknown CUD variant \\['log'\\]"),
            ({"variant": "top_k", "distance": ["cosine"]}, "unknown circuit distance"),
            ({"variant": "top_k", "k": "many"}, "or 'all', got 'many'"),
            ({"variant": "top_k", "k": True}, "or 'all', got True"),
            ({"anchor_share": "0.3"}, "'anchor_share' of CUD must be a number, got '0.3'"),
            ({"anchor_share": 0}, "anchor_share must be in \\(0, 0.5\\], got 0"),
            ({"anchor_share": float("nan")}, "'anchor_share' of CUD must be a finite number"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            CUDSettings(**options)

    def test_presets(self):
        assert CUDSettings("log").vector == "log" and CUDSettings("log").edges_kept is None
        assert CUDSettings("top_k").k == 200 and CUDSettings("top_k", k="all").edges_kept is None
        assert CUDSettings("top_k", vector="binary", distance="jaccard", k=10).edges_kept == 10


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

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=30), st.integers(2, 5), st.integers(0, 9))
    def test_groups_never_straddle(self, groups, folds, seed):
        if len(set(groups)) < folds:
            with pytest.raises(ValueError, match=f"cannot split {len(set(groups))} groups into {folds} folds"):
                make_folds(len(groups), folds, seed, groups)
            return
        fold = make_folds(len(groups), folds, seed, groups)
        by_group = {group: {int(f) for f, g in zip(fold, groups, strict=True) if g == group} for group in groups}
        assert all(len(found) == 1 for found in by_group.values()) and set(fold) == set(range(folds))
        assert (fold == make_folds(len(groups), folds, seed, groups)).all()

    @pytest.mark.parametrize("folds", [1, 0, -3, 2.0, "5", True])
    @pytest.mark.parametrize("groups", [None, list("abcdef")])
    def test_number_of_folds(self, folds, groups):
        with pytest.raises(ValueError, match="cross-fitting needs at least 2 folds, got"):
            make_folds(6, folds, 0, groups)

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1), st.floats(0.01, 0.5))
    def test_extremes_are_the_ends(self, residual, share):
        residual = np.array(residual, dtype=float)
        easy, hard = extremes(residual, share)
        assert len(easy) and len(hard) and residual[easy].max() < residual[hard].min()
        # equal ones are on the same side, or on none
        rest = np.delete(residual, easy)
        assert residual[easy].max() < rest.min() and residual[hard].min() > np.delete(residual, hard).max()
        if len(set(residual)) == len(residual):
            assert len(easy) == len(hard) and abs(len(easy) - share * len(residual)) <= 1
        order = np.random.default_rng(0).permutation(len(residual))
        moved = extremes(residual[order], share)
        assert [set(order[rows]) for rows in moved] == [set(easy), set(hard)]

    def test_extremes(self):
        easy, hard = extremes(np.array([0.5, 0.1, 0.9, 0.3]), 0.25)
        assert (easy.tolist(), hard.tolist()) == ([1], [2])
        with pytest.raises(ValueError, match="same residual memorisation"):
            extremes(np.ones(5), 0.25)


def make_context(residual=None, **options) -> DifficultyContext:
    """Twelve samples of the tiny model; residuals given, or counting up."""
    forget = prepare_samples(qa_dataset(12), make_tokenizer())
    residual = np.arange(12.0) if residual is None else residual
    return DifficultyContext(
        make_model(0), forget, None, folds=4, progress=False, calibrate=lambda objective: residual, **options
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

    def test_a_fold_never_helps_to_make_its_anchors(self):
        """Also through the scale of the log-magnitudes: nothing of a fold enters what scores it but its own circuits."""
        plain = cud(make_context())
        for number in range(4):
            context = make_context()
            rows = np.flatnonzero(context.fold == number)
            context.residual[rows] = np.linspace(-1000, 1000, len(rows))
            assert (cud(context)[rows] == plain[rows]).all()
            others = np.flatnonzero(context.fold != number)
            context.edges[rows[1:]] *= 1e6  # of fold mates
            assert cud(context)[rows[0]] == plain[rows[0]]
            assert (cud(context)[others] != plain[others]).any()

    def test_anchors_by_id(self):
        context = make_context()
        ids = list(context.forget["sample_id"])
        found = cud(context, anchors={"easy": ids[:4], "hard": ids[-4:]}, variant="top_k", k="all")
        fold = context.fold
        for row in range(12):
            easy = [i for i in range(4) if fold[i] != fold[row]]
            hard = [i for i in range(8, 12) if fold[i] != fold[row]]
            expected = cud_scores(
                context.edges[[row]], context.edges[easy], context.edges[hard], CUDSettings("top_k", k="all")
            )
            assert found[row] == pytest.approx(expected[0])

    @pytest.mark.parametrize(
        ("anchors", "message"),
        [
            ({"easy": ["nobody"], "hard": []}, "easy anchor 'nobody' is not a forget sample"),
            ({"easy": []}, "exactly the keys"),
            (3, "anchors must be 'calibration'"),
            ("missing.safetensors", "cannot read an anchor bank"),
            (
                {"easy": ["sha256:106ef231441914ce"], "hard": ["sha256:106ef231441914ce"]},
                "'sha256:106ef231441914ce' is both an easy and a hard",
            ),
            ({"easy": [], "hard": []}, "give more anchor ids"),
            (
                {"easy": ["sha256:106ef231441914ce"], "hard": ["sha256:f9a0ba90095ddf34"]},
                "a fold holds all easy or all hard anchors",
            ),
        ],
    )
    def test_anchor_refusals_come_before_the_circuits(self, anchors, message, monkeypatch):
        context = make_context()
        monkeypatch.setattr("cud_trainer.difficulty.context.attribute_dataset", lambda *a, **k: pytest.fail("computed"))
        with pytest.raises(ValueError, match=message):
            cud(context, anchors=anchors)

    def test_bank(self, tmp_path):
        path = tmp_path / "bank.safetensors"
        plain = cud(make_context(), variant="log", save_anchors=str(path))
        bank = AnchorBank.load(path)
        context = make_context()
        names = list(context.forget["sample_id"])
        (key,) = bank.keys
        ids = [key.keyed(name) for name in names]
        assert bank.easy_ids == ids[:3] and bank.hard_ids == ids[-3:]
        again = cud(context, variant="log", anchors=str(path))
        assert np.corrcoef(plain, again)[0, 1] > 0.5  # other anchors per fold, the same direction
        row = ids.index(bank.easy_ids[0])  # an anchor sample is scored by the others
        held_out = np.flatnonzero(context.fold == context.fold[row])
        rows = bank.without({names[i] for i in held_out})
        assert {bank.ids[other] for other in rows} == set(ids) - {ids[i] for i in held_out}
        easy, hard = (bank.edges[rows][bank.side[rows] == side] for side in (-1, 1))
        expected = cud_scores(
            context.edges[[row]], easy, hard, CUDSettings("log"), log_standardisation(bank.edges[rows])
        )
        assert again[row] == pytest.approx(expected[0])
        with pytest.raises(ValueError, match="another graph"):
            cud(
                DifficultyContext(make_model(0, num_hidden_layers=1), context.forget, None, folds=4, progress=False),
                anchors=str(path),
            )
        with pytest.raises(ValueError, match="other settings: .*metric: bank 'prob', here 'logprob'"):
            cud(make_context(circuit_options={"metric": "logprob"}), anchors=str(path))
        with pytest.raises(ValueError, match="exists"):
            cud(make_context(), save_anchors=str(path))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot read an anchor bank"):
            AnchorBank.load(path)

    def test_a_bank_is_refused_before_the_circuits(self, tmp_path, monkeypatch):
        path = str(tmp_path / "bank.safetensors")
        context = make_context()
        features = ["edges", "hidden"]
        cud(context, save_anchors=path, features=features)
        small = AnchorBank.load(path)
        small.side[small.ids.index(small.easy_ids[0]) + 1 : 6] = 0  # one easy sample is left
        small.save(tmp_path / "small.safetensors")
        monkeypatch.setattr("cud_trainer.difficulty.context.attribute_dataset", lambda *a, **k: pytest.fail("computed"))
        for other, anchors, options, message in (
            (make_context(circuit_options={"ungroup_kv": True}), path, {}, "another graph"),
            (make_context(circuit_options={"metric": "logprob"}), path, {}, "other settings"),
            (make_context(), str(tmp_path / "small.safetensors"), {}, "leaves no anchor sample"),
            (make_context(), path, {"save_anchors": path + ".new"}, "save_anchors has nothing new to save"),
            (make_context(), "calibration", {"save_anchors": path, "features": features}, "exists"),
        ):
            with pytest.raises(ValueError, match=message):
                cud(other, anchors=anchors, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.safetensors", "ids.key", "small.safetensors"]

    @pytest.mark.parametrize("ungroup_kv", [False, True])
    def test_the_graph_is_that_of_the_circuits(self, ungroup_kv):
        context = make_context(circuit_options={"ungroup_kv": ungroup_kv})
        assert context.graph.fingerprint == context._circuits[3].fingerprint
        assert context.edges.shape == (12, context.graph.n_edges)

    def test_bank_files(self, tmp_path):
        """What is saved is what is loaded; a file cut anywhere, or of something else, is refused."""
        from safetensors.torch import save_file

        side, residual = torch.tensor([-1, 1], dtype=torch.int8), torch.tensor([0.1, float("nan")], dtype=torch.float64)
        settings, features = {"method": "eap", "steps": 1}, {"hidden": torch.ones(2, 3)}
        bank = AnchorBank(["a", "é|,"], EDGES[:2], residual, side, "g", settings, features)
        path = bank.save(tmp_path / "bank.safetensors")
        loaded = AnchorBank.load(path)
        for name in ("edges", "residual", "side"):
            torch.testing.assert_close(getattr(loaded, name), getattr(bank, name), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(loaded.features["hidden"], features["hidden"])
        assert bank.save(tmp_path / "again").read_bytes() == path.read_bytes()
        assert (loaded.easy_ids, loaded.hard_ids, loaded.graph, loaded.settings) == (["a"], ["é|,"], "g", bank.settings)
        loaded.check("g", {"method": "eap", "steps": 1})
        with pytest.raises(ValueError, match="method: bank 'eap', here 'eap-ig'; steps: bank 1, here 5"):
            loaded.check("g", {"method": "eap-ig", "steps": 5})
        whole = path.read_bytes()
        for size in range(0, len(whole), 29):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cannot read an anchor bank"):
                AnchorBank.load(path)
        save_file({"easy": torch.ones(1)}, tmp_path / "foreign.safetensors")
        for foreign in (tmp_path / "foreign.safetensors", tmp_path):
            with pytest.raises(ValueError, match="cannot read an anchor bank"):
                AnchorBank.load(foreign)

    def test_bank_leaves_out(self):
        side = torch.tensor([-1, -1, -1, 1, 1, 0])
        bank = AnchorBank(list("abcdef"), torch.arange(12.0).view(6, 2), torch.zeros(6), side, "g", {})
        assert bank.without({"b", "e", "x"}).tolist() == [0, 2, 3, 5]
        with pytest.raises(ValueError, match="leaves no anchor sample"):
            bank.without({"d", "e"})

    def test_empty_circuits_are_named(self):
        context = make_context()
        context.edges[4] = 0
        for metric in (lambda c: cud(c, variant="top_k"), circuit_mass):
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
        with pytest.raises(ValueError, match="options of difficulty metric 'loss' must be a dictionary, got None"):
            METRICS["loss"].check_options(None)

    def test_registering(self):
        with pytest.raises(ValueError, match="'cud' is already registered"):
            register_metric("cud")(lambda context: None)

    def test_answers_leave_the_modes_alone(self):
        context = make_context()
        context.model.train().model.layers[0].eval()
        before = [module.training for module in context.model.modules()]
        scored = [score_answers(context.model, pad_batch([s], 0)) for s in context.forget]
        np.testing.assert_allclose(context.answers[0], [float(s.mean_logps.detach()) for s in scored], rtol=1e-4)
        assert context.answers[1].tolist() == [int(s.lengths) for s in scored]
        assert [module.training for module in context.model.modules()] == before
