"""Anchor banks with features: the fit of one request scores the next, and what does not compare is refused."""

import json

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from cud_trainer import score_difficulty
from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import AnchorBank, DifficultyContext
from cud_trainer.difficulty.cud import ALL_FEATURES, PENALTIES, cud
from cud_trainer.difficulty.cud.features import blocks, sample_features

RESIDUAL = np.array([0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.7, 0.6, 0.5, 0.15, 0.25, 0.35])
FIRST = dict(progress=False, batch_size=4)


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def first():
    return prepare_samples(qa_dataset(12), make_tokenizer())


@pytest.fixture(scope="module")
def later():
    return prepare_samples(qa_dataset(5, 70), make_tokenizer())


@pytest.fixture(scope="module")
def bank(model, first):
    return AnchorBank.fit(model, first, RESIDUAL, features=ALL_FEATURES, **FIRST)


def by_hand(model, known, asked, names, groups=None):
    """Ridge regression on the ranks, the penalty by cross-validation, without the product's rotation."""
    designs = []
    for name in names:
        pair = []
        for samples in (known, asked):
            context = DifficultyContext(model, samples, None, progress=False)
            edges = context.edges if name == "edges" else None
            pair.append(blocks(edges, {k: v.float() for k, v in sample_features(context, [name]).items()}, [name])[0])
        deviation = pair[0].std(0)
        moving = deviation > 1e-6
        designs.append([(x - pair[0].mean(0))[:, moving] / deviation[moving] / np.sqrt(moving.sum()) for x in pair])
    train, test = (np.concatenate([design[side] for design in designs], 1) for side in (0, 1))
    folds = None if groups is None else list(GroupKFold(min(5, len(set(groups)))).split(train, groups=groups))
    fit = RidgeCV(alphas=PENALTIES, cv=folds).fit(train, (rankdata(RESIDUAL) - 0.5) / len(RESIDUAL))
    return fit.predict(test)


class TestScores:
    @pytest.mark.parametrize("names", [("edges", "hidden", "gradients", "outputs"), ("hidden", "outputs"), ("loss",)])
    def test_by_hand(self, model, first, later, bank, names):
        found = bank.score(model, later, features=names, **FIRST)
        np.testing.assert_allclose(found, by_hand(model, first, later, names), rtol=1e-4, atol=1e-5)

    def test_groups_choose_the_penalty(self, model, first, later):
        groups = [f"author {row % 4}" for row in range(12)]
        grouped = AnchorBank.fit(model, first, RESIDUAL, features=["outputs"], groups=groups, **FIRST)
        assert grouped.groups.tolist() == [0, 1, 2, 3] * 3
        expected = by_hand(model, first, later, ["outputs"], groups)
        np.testing.assert_allclose(grouped.score(model, later, **FIRST), expected, rtol=1e-4, atol=1e-5)

    def test_a_score_does_not_depend_on_the_rest_of_the_request(self, model, later, bank):
        whole = bank.score(model, later, **FIRST)
        alone = [bank.score(model, later.select([row]), **FIRST)[0] for row in range(5)]
        np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)

    def test_a_sample_of_the_bank_does_not_score_itself(self, model, first):
        """Whatever the residual of a sample is, its own score stays, and others' scores move."""
        for row in (0, 7):
            changed = RESIDUAL.copy()
            changed[row] = 5.0
            scores = [
                AnchorBank.fit(model, first, residual, features=["loss"], **FIRST).score(model, first, **FIRST)
                for residual in (RESIDUAL, changed)
            ]
            assert scores[0][row] == scores[1][row] and (scores[0] != scores[1]).any()

    def test_without_circuits_none_is_computed(self, model, first, later, monkeypatch):
        monkeypatch.setattr("cud_trainer.difficulty.context.attribute_dataset", lambda *a, **k: pytest.fail("computed"))
        monkeypatch.setattr("cud_trainer.difficulty.context.model_graph", lambda *a, **k: pytest.fail("no graph"))
        small = AnchorBank.fit(model, first, RESIDUAL, features=["hidden", "outputs"], **FIRST)
        assert small.edges is None and small.graph == "" and small.settings == {}
        assert np.isfinite(small.score(model, later, **FIRST)).all()

    def test_by_the_metric_and_without_calibration(self, model, later, bank, tmp_path):
        """`cud` with the bank, in memory and from a file, gives the very same scores; fewer samples than folds will do."""
        path = bank.save(tmp_path / "bank.safetensors")
        names = ["edges", "hidden", "gradients", "outputs"]
        expected = bank.score(model, later, features=names, **FIRST)
        for anchors in (bank, str(path)):
            scores = score_difficulty(
                model,
                later.select([0, 1, 2]),
                metrics=["cud"],
                metric_args={"cud": {"anchors": anchors, "features": names}},
                progress=False,
                batch_size=4,
            )
            np.testing.assert_allclose(scores["cud"], expected[:3], rtol=1e-4, atol=1e-5)
            assert scores.fold is None
            json.dumps(scores.provenance)
            scores.save(tmp_path / f"{type(anchors).__name__}.parquet")
        assert scores.provenance.get("calibration") is None
        context = DifficultyContext(model, later, None, progress=False)
        np.testing.assert_allclose(
            cud(context, anchors=str(path)), bank.score(model, later, **FIRST), rtol=1e-4, atol=1e-5
        )

    def test_saved_by_the_metric(self, model, first, later, tmp_path):
        """The bank of a calibrated `cud` knows the groups of its samples, and no more than its features."""
        path = str(tmp_path / "bank")
        context = DifficultyContext(
            model,
            first,
            None,
            folds=3,
            groups=[row // 3 for row in range(12)],
            calibrate=lambda _: RESIDUAL,
            progress=False,
        )
        cud(context, features=["outputs"], save_anchors=path)
        bank = AnchorBank.load(path)
        assert (
            bank.edges is None
            and bank.feature_names == ("outputs",)
            and bank.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        )
        assert "_circuits" not in context.__dict__
        expected = by_hand(model, first, later, ["outputs"], bank.groups.tolist())
        np.testing.assert_allclose(bank.score(model, later, **FIRST), expected, rtol=1e-4, atol=1e-5)


class TestFiles:
    def test_what_is_saved_is_loaded(self, model, later, bank, tmp_path):
        path = bank.save(tmp_path / "bank")
        loaded = AnchorBank.load(path)
        assert loaded.feature_names == bank.feature_names and loaded.fingerprint == AnchorBank.load(path).fingerprint
        np.testing.assert_array_equal(loaded.score(model, later, **FIRST), bank.score(model, later, **FIRST))
        changed = AnchorBank.load(path)
        changed.residual[0] += 0.1
        assert changed.fingerprint != bank.fingerprint
        assert b"author" not in path.read_bytes()

    def test_a_bank_of_an_earlier_version(self, model, later, bank, tmp_path):
        old = AnchorBank(bank.ids, bank.edges, bank.residual, bank.side, bank.graph, bank.settings, bank.features)
        with pytest.raises(ValueError, match="does not say which model it is of"):
            AnchorBank.load(old.save(tmp_path / "old")).score(model, later, **FIRST)


class TestRefusals:
    def test_another_model(self, later, bank):
        for names in (("loss",), ("edges",)):
            with pytest.raises(ValueError, match="belongs to another model"):
                bank.score(make_model(1), later, features=names, **FIRST)
        with pytest.raises(ValueError, match="another graph"):
            bank.score(make_model(0, num_hidden_layers=1), later, **FIRST)

    def test_another_template(self, model, first, bank):
        from dataclasses import replace

        written = replace(first, template={"chat_template": "a", "date": "2026-01-01", "train_on": "answer"})
        with pytest.raises(ValueError, match="another chat template"):
            bank.score(model, written, features=["loss"], **FIRST)
        of_template = AnchorBank.fit(model, written, RESIDUAL, features=["loss"], **FIRST)
        another_day = replace(written, template={**written.template, "date": "2027-01-01"})
        assert np.isfinite(of_template.score(model, another_day, **FIRST)).all()

    def test_other_circuits(self, model, first, later, bank):
        context = DifficultyContext(model, later, None, circuit_options={"metric": "logprob"}, progress=False)
        with pytest.raises(ValueError, match="other settings: metric: bank 'prob', here 'logprob'"):
            cud(context, anchors=bank)
        assert np.isfinite(cud(context, anchors=bank, features=["hidden"])).all()  # reads no circuit

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"features": ["magic"]}, "features must be a list out of"),
            ({"features": []}, "features must be a list out of"),
            ({"features": ["loss", "loss"]}, "features must be a list out of"),
            ({"features": "loss"}, "features must be a list out of"),
            ({"groups": ["a"]}, r"groups of shape \[1\] does not fit 12 samples"),
            ({"residual": RESIDUAL[:3]}, r"residual of shape \[3\] does not fit 12 samples"),
            ({"residual": np.where(RESIDUAL == 0.9, np.nan, RESIDUAL)}, "sample '.*' is not finite"),
            ({"residual": np.ones(12)}, "the same residual memorisation"),
            ({"anchor_share": 0.0}, "anchor_share must be in"),
        ],
    )
    def test_fit(self, model, first, options, message, monkeypatch):
        monkeypatch.setattr("cud_trainer.difficulty.context.attribute_dataset", lambda *a, **k: pytest.fail("computed"))
        options = {"residual": RESIDUAL, **FIRST, **options}
        with pytest.raises(ValueError, match=message):
            AnchorBank.fit(model, first, options.pop("residual"), **options)

    def test_lacking(self, model, first, later, bank):
        small = AnchorBank.fit(model, first, RESIDUAL, features=["loss"], **FIRST)
        with pytest.raises(ValueError, match=r"no features \['hidden'\]; it has \['loss'\]"):
            small.score(model, later, features=["hidden", "loss"], **FIRST)
        context = DifficultyContext(model, later, None, progress=False)
        with pytest.raises(ValueError, match="no circuits, which the CUD variant 'log' compares"):
            cud(context, anchors=small, variant="log")
        small.features["loss"] = torch.ones(12, 2)
        with pytest.raises(ValueError, match="feature 'loss' has 1 numbers here, in the anchor bank 2"):
            small.score(model, later, **FIRST)
