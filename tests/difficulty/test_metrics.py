"""Difficulty metrics that need no circuits, and the calibrated CUD, against formulas computed in another way."""

import copy

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from edges import random_samples, to_batch
from oracle import CASES, double_precision, make_case

from cud_trainer import score_difficulty
from cud_trainer.data import prepare_samples
from cud_trainer.data.ids import id_key_kept_in
from cud_trainer.difficulty import METRICS, AnchorBank, DifficultyContext, DifficultyScores
from cud_trainer.difficulty import metrics as M
from cud_trainer.difficulty.circuit_metrics import signature
from cud_trainer.difficulty.cud import agreement, calibrated_scores, cud
from cud_trainer.difficulty.gradients import mean_gradient, sample_gradients
from cud_trainer.difficulty.noise import hash_of, noise_effects, parameter_noise
from cud_trainer.difficulty.outputs import output_features
from cud_trainer.logprobs import score_answers
from cud_trainer.models.matrices import weight_matrices


def make_context(n=12, retain=True, residual=None, **options) -> DifficultyContext:
    tokenizer = make_tokenizer()
    residual = np.linspace(0, 1, n) if residual is None else residual
    return DifficultyContext(
        make_model(0),
        prepare_samples(qa_dataset(n), tokenizer),
        prepare_samples(qa_dataset(9, 50), tokenizer) if retain else None,
        folds=4,
        progress=False,
        calibrate=lambda objective: residual,
        metrics=("grad_alignment",) if retain else (),
        **options,
    )


def one(prepared, row):
    return prepared.pad([row])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CASES)
class TestGradients:
    def test_against_autograd(self, name, tied):
        model = make_case(name, tie_word_embeddings=tied)
        # eager attention of the library is not float64 and breaks on left padding
        batch = to_batch(random_samples(0, lengths=(9, 13)), "right" if name == "gemma2" else "left")
        with double_precision():
            direction = mean_gradient(model, [batch])
            found = sample_gradients(model, batch, direction)
            weights = [matrix.weight for matrix in weight_matrices(model)]
            assert not any(weight.requires_grad for weight in weights) and all(w.grad is None for w in weights)
            for weight in weights:
                weight.requires_grad_(True)
            total = 0.0
            for row in range(2):
                scores = score_answers(model, {key: values[row : row + 1] for key, values in batch.items()})
                gradients = torch.autograd.grad(-scores.mean_logps.sum(), weights)
                squares = torch.stack([gradient.square().sum() for gradient in gradients])
                torch.testing.assert_close(found["squares"][row], squares, rtol=1e-9, atol=1e-12 * float(squares.max()))
                product = sum((a * b).sum() for a, b in zip(gradients, direction, strict=True))
                torch.testing.assert_close(found["products"][row], product, rtol=1e-9, atol=0)
                total = [g + (0 if row == 0 else t) for g, t in zip(gradients, total or gradients, strict=True)]
            for mean, summed in zip(direction, total, strict=True):
                torch.testing.assert_close(mean, summed / 2, rtol=1e-9, atol=1e-14)


def test_gradients_leave_the_model_as_it_was():
    model = make_model(0)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    prepared = prepare_samples(qa_dataset(3), make_tokenizer())
    next(model.parameters()).grad = kept = torch.ones_like(next(model.parameters()))

    def broken():
        yield prepared.pad([0, 1])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        mean_gradient(model, broken())
    sample_gradients(model, prepared.pad([0, 1]))
    assert next(model.parameters()).grad is kept and (kept == 1).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_metrics():
    context = make_context()
    weights = [matrix.weight for matrix in weight_matrices(context.model)]
    retain = torch.cat([g.flatten() for g in mean_gradient(context.model, [one(context.retain, r) for r in range(9)])])
    norm, cosine, part = [], [], []
    for row in range(12):
        scores = score_answers(context.model, one(context.forget, row))
        gradients = torch.autograd.grad(-scores.mean_logps.sum(), weights)
        gradient = torch.cat([g.flatten() for g in gradients])
        norm.append(-float(gradient.norm().log()))
        cosine.append(float(torch.cosine_similarity(gradient, retain, dim=0)))
        chosen = [g for g, m in zip(gradients, weight_matrices(context.model), strict=True) if "layers.1.mlp" in m.name]
        part.append(-float(torch.cat([g.flatten() for g in chosen]).norm().log()))
    np.testing.assert_allclose(M.grad_norm(context), norm, rtol=1e-4)
    np.testing.assert_allclose(M.grad_alignment(context), cosine, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(M.grad_norm(context, matrices=r"layers\.1\.mlp"), part, rtol=1e-4)
    with pytest.raises(ValueError, match="matches none, e.g. 'model.embed_tokens.weight'"):
        M.grad_norm(context, matrices="nowhere")


def test_modules_that_are_not_understood():
    model = make_model(0)
    model.extra = torch.nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="extra belongs to no linear map"):
        weight_matrices(model)
    model = make_model(0)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    prepared = prepare_samples(qa_dataset(2), make_tokenizer())
    with pytest.raises(ValueError, match="up_proj.weight is used more than once"):
        sample_gradients(model, one(prepared, 0))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3_text"])
def test_noise_is_that_of_weights_moved_by_hand(name):
    model = make_case(name).float()
    batch = to_batch(random_samples(0, lengths=(9, 13)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for index, matrix in enumerate(weight_matrices(moved)):
            generator = torch.Generator().manual_seed(hash_of(3, index))
            noise = torch.randn(matrix.weight.shape, generator=generator) * matrix.weight.std()
            matrix.weight += 0.05 * noise
        expected = score_answers(moved, batch).mean_logps
        clean = score_answers(model, batch).mean_logps
        with parameter_noise(model, sigma=0.05, seed=3):
            found = score_answers(model, batch).mean_logps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ((found - clean).abs() > 1e-2).any()
    with pytest.raises(KeyError), parameter_noise(model, sigma=0.05, seed=3):
        raise KeyError
    assert torch.equal(score_answers(model, batch).mean_logps, clean)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_noise_metrics():
    context = make_context(retain=False, seed=5)
    drops, relative, deviations = np.zeros(12), np.zeros(12), np.zeros(12)
    for row in range(12):
        batch = one(context.forget, row)
        clean = score_answers(context.model, batch, output_hidden_states=True)
        feature = clean.hidden_states[-1][0, clean.positions].mean(0)
        for draw in range(3):
            with parameter_noise(context.model, sigma=0.1, seed=5 * 10_007 + draw), torch.no_grad():
                noisy = score_answers(context.model, batch, output_hidden_states=True)
            change = float(clean.mean_logps - noisy.mean_logps)
            drops[row] += change / 3
            relative[row] += change / float(-clean.mean_logps) / 3
            moved = noisy.hidden_states[-1][0, clean.positions].mean(0)
            deviations[row] += float((moved - feature).norm() / feature.norm()) / 3
    options = {"sigma": 0.1, "draws": 3}
    np.testing.assert_allclose(M.mrd(context, **options), -drops, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(M.mrd(context, relative=True, **options), -abs(relative), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(M.noise_stability(context, **options), -deviations, rtol=1e-3, atol=1e-5)
    assert list(context._noise) == [(0.1, 3)]  # one pass for all three


def test_more_noise_moves_more():
    context = make_context(retain=False)
    batch = context.forget.pad(list(range(12)))
    small, large = (noise_effects(context.model, batch, sigma=s, draws=4, seed=0)["deviation"] for s in (0.01, 0.1))
    assert (large > 3 * small).all()


def test_outputs_by_hand():
    prepared = prepare_samples(qa_dataset(4), make_tokenizer())
    model = make_model(0)
    batch = prepared.pad([0, 1, 2, 3])
    found = output_features(model, batch)
    for row in range(4):
        tokens, labels = torch.tensor(prepared["input_ids"][row]), prepared["labels"][row]
        outputs = model(tokens[None], output_hidden_states=True)
        answer = [position for position, label in enumerate(labels) if label != -100]
        p = outputs.logits[0].softmax(-1)
        own = torch.stack([p[t - 1, tokens[t]] for t in answer])
        rival = torch.stack([p[t - 1].index_fill(0, tokens[t], 0).max() for t in answer])
        entropy = torch.stack([torch.distributions.Categorical(p[t - 1]).entropy() for t in answer])
        torch.testing.assert_close(found["margin"][row], (own - rival).mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["entropy"][row], entropy.mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["mean_logps"][row], own.log().mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["lengths"][row], torch.tensor(len(answer)))
        middle = outputs.hidden_states[len(outputs.hidden_states) // 2][0]
        torch.testing.assert_close(found["hidden"][row], middle.mean(0), rtol=1e-4, atol=1e-6)
        last = outputs.hidden_states[-1][0, [t - 1 for t in answer]]
        torch.testing.assert_close(found["output"][row], last.mean(0), rtol=1e-4, atol=1e-6)


def test_self_confidence():
    context = make_context(retain=False)
    np.testing.assert_allclose(M.self_confidence(context), context.forget_outputs["margin"])
    np.testing.assert_allclose(M.self_confidence(context, kind="entropy"), -context.forget_outputs["entropy"])


def cosine_distances(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 1 - a @ b.T


def test_neighbours_by_brute_force():
    context = make_context()
    forget, retain = (o["hidden"].double().numpy() for o in (context.forget_outputs, context.retain_outputs))
    np.testing.assert_allclose(
        M.atypicality(context, k=3), np.sort(cosine_distances(forget, retain), 1)[:, :3].mean(1), atol=1e-9
    )
    distances = cosine_distances(forget, np.concatenate([forget, retain]))
    np.fill_diagonal(distances, np.inf)
    share = (distances.argsort(1)[:, :4] >= 12).mean(1)
    np.testing.assert_allclose(M.retain_similarity(context, k=4), share)
    assert len(set(share)) > 1
    assert (M.retain_similarity(context, k=1000) == 9 / 20).all()  # everyone is a neighbour


def test_hidden_neighbours_are_of_other_folds():
    context = make_context(retain=False)
    forget = context.forget_outputs["hidden"].double().numpy()
    for row, value in enumerate(M.hidden_neighbours(context, k=1)):
        others = np.flatnonzero(context.fold != context.fold[row])
        nearest = others[cosine_distances(forget[[row]], forget[others])[0].argmin()]
        assert value == pytest.approx(context.residual[nearest])


def test_group_mean():
    context = make_context(retain=False, residual=np.array([0.1, 0.2, 0.6] * 4), groups=["a"] * 6 + ["b"] * 5 + ["c"])
    found = M.group_mean(context)
    assert found[0] == pytest.approx((0.2 + 0.6 + 0.1 + 0.2 + 0.6) / 5)
    assert found[11] == pytest.approx(np.mean(context.residual[:11]))  # alone: all others


def test_memorization(tmp_path):
    make_model(0).save_pretrained(tmp_path / "same")
    make_model(1).save_pretrained(tmp_path / "other")
    make_model(0, vocab_size=300).save_pretrained(tmp_path / "wide")
    context = make_context(retain=False)
    np.testing.assert_allclose(M.memorization(context, reference_model=str(tmp_path / "same")), 0, atol=1e-6)
    expected = [
        float(score_answers(make_model(0), one(context.forget, row)).mean_logps)
        - float(score_answers(make_model(1), one(context.forget, row)).mean_logps)
        for row in range(12)
    ]
    np.testing.assert_allclose(M.memorization(context, reference_model=str(tmp_path / "other")), expected, atol=1e-5)
    with pytest.raises(ValueError, match="another vocabulary .300 tokens, the model"):
        M.memorization(context, reference_model=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="cannot load the reference model"):
        M.memorization(context, reference_model=str(tmp_path / "nothing"))


def test_signature():
    from cud_trainer.circuits import circuit_signature, select_circuits

    context = make_context(retain=False)
    circuits = select_circuits(context.edges, context.graph, selection="top_k", k=20)
    expected = circuit_signature(context.edges, context.graph, circuits)["late_share"]
    np.testing.assert_allclose(signature(context, name="late_share", k=20), expected)
    context.edges[4] = 0
    with pytest.raises(
        ValueError, match=f"circuits of 1 samples are empty, the first is '{context.forget['sample_id'][4]}'"
    ):
        signature(context)


class TestCalibrated:
    def test_finds_a_linear_signal(self):
        generator = np.random.default_rng(0)
        signal = generator.standard_normal(80)
        noise = generator.standard_normal((80, 300))
        wide = noise + 0.5 * signal[:, None] * generator.standard_normal(300)
        found = calibrated_scores([wide[:60]], np.exp(signal[:60]), [wide[60:]])
        assert np.corrcoef(found, signal[60:])[0, 1] > 0.9
        blind = calibrated_scores([noise[:60]], np.exp(signal[:60]), [noise[60:]])
        assert abs(np.corrcoef(blind, signal[60:])[0, 1]) < 0.5

    def test_a_block_without_signal_does_little(self):
        generator = np.random.default_rng(1)
        signal = generator.standard_normal((60, 1))
        noise = 100 * generator.standard_normal((60, 2))
        found = calibrated_scores([signal[:40], noise[:40]], signal[:40, 0], [signal[40:], noise[40:]])
        assert np.corrcoef(found, signal[40:, 0])[0, 1] > 0.9

    def test_is_ridge_regression(self):
        """The normal equations, with the penalty that leave-one-out prefers, by brute force."""
        from cud_trainer.difficulty.cud import PENALTIES

        generator = np.random.default_rng(2)
        x = generator.standard_normal((20, 6))
        residual = x @ generator.standard_normal(6) + generator.standard_normal(20)
        train, test = x[:15], x[15:]
        target = (residual[:15].argsort().argsort() + 0.5) / 15
        scaled, new = ((part - train.mean(0)) / train.std(0) / np.sqrt(6) for part in (train, test))

        def predict(rows, penalty, points):
            a, y = scaled[rows], target[rows]
            centred = a - a.mean(0)
            weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(6), centred.T @ (y - y.mean()))
            return (points - a.mean(0)) @ weights + y.mean()

        def error(penalty):
            left = [np.delete(np.arange(15), row) for row in range(15)]
            return sum((predict(rows, penalty, scaled[[row]])[0] - target[row]) ** 2 for row, rows in enumerate(left))

        best = min(PENALTIES, key=error)
        expected = predict(np.arange(15), best, new)
        np.testing.assert_allclose(calibrated_scores([train], residual[:15], [test]), expected, rtol=1e-6)

    def test_cross_fitted(self):
        """Nothing of a fold's residuals enters its scores; its own circuits do."""
        features = ["hidden", "gradients", "outputs"]
        np.testing.assert_array_equal(cud(make_context()), cud(make_context(), features=features))  # the default
        plain = cud(make_context(), variant="calibrated", features=["edges", *features])
        quantised = make_context()
        # a matrix that belongs to no linear map, as quantised weights and fused experts have
        quantised.model.register_parameter("codes", torch.nn.Parameter(torch.zeros(2, 2)))
        with pytest.raises(ValueError, match="codes belongs to no linear map"):
            cud(quantised, features=["gradients"])
        np.testing.assert_array_equal(cud(quantised), cud(make_context(), features=["hidden", "outputs"]))
        base = make_context()
        for number in range(4):
            changed = np.linspace(0, 1, 12)
            rows = base.fold == number
            changed[rows] = changed[rows][::-1] + 5
            found = cud(
                make_context(residual=changed),
                variant="calibrated",
                features=["edges", "hidden", "gradients", "outputs"],
            )
            np.testing.assert_array_equal(found[rows], plain[rows])
            assert (found != plain).any()

    def test_from_a_bank(self, tmp_path):
        path = str(tmp_path / "bank")
        options = {"variant": "calibrated", "features": ["edges", "hidden"]}
        cud(make_context(), save_anchors=path, **options)
        bank = AnchorBank.load(path)
        assert bank.easy_ids == bank.ids[:3] and bank.hard_ids == bank.ids[-3:] and list(bank.features) == ["hidden"]
        request = prepare_samples(qa_dataset(8, 70), make_tokenizer())
        later = DifficultyContext(make_model(0), request, None, folds=4, progress=False)
        again = cud(later, anchors=path, **options)
        assert np.isfinite(again).all() and np.ptp(again) > 0
        with pytest.raises(ValueError, match=r"no features \['gradients'\]; it has \['edges', 'hidden'\]"):
            cud(later, anchors=path, variant="calibrated", features=["gradients"])
        with pytest.raises(ValueError, match="is not a forget sample; give the key of these ids as id_key"):
            cud(make_context(), anchors={"easy": bank.easy_ids, "hard": bank.hard_ids})
        with id_key_kept_in(tmp_path):
            cud(make_context(), anchors={"easy": bank.easy_ids, "hard": bank.hard_ids}, save_anchors=path + "2")
        with pytest.raises(ValueError, match="anchors given by hand"):
            cud(later, anchors=path + "2", **options)
        np.testing.assert_array_equal(  # the log variant takes what both files agree on
            cud(later, variant="log", anchors=path), cud(later, variant="log", anchors=path + "2")
        )

    def test_refusals(self):
        with pytest.raises(ValueError, match="at least 3"):
            calibrated_scores([np.eye(2)], np.arange(2.0), [np.eye(2)])
        with pytest.raises(ValueError, match="nothing to fit"):
            calibrated_scores([np.eye(4)], np.ones(4), [np.eye(4)])


def test_agreement_by_hand():
    runs = [np.array([0, 1, 2, 3, 4, 5.0]), np.array([1, 0, 2, 3, 5, 4.0]), np.array([5, 0, 1, 2, 3, 4.0])]
    easy, hard = agreement(runs, 1 / 3, 2)
    assert easy.tolist() == [0, 1] and hard.tolist() == [4, 5]
    assert [rows.tolist() for rows in agreement(runs, 1 / 3, 3)] == [[1], [5]]
    with pytest.raises(ValueError, match="2 of 2 methods agree on 0 easy and 0 hard"):
        agreement([runs[0], runs[0][::-1]], 1 / 3, 2)


def test_agreement_anchors_run_each_method_once():
    asked = []

    def calibrate(objective):
        asked.append(objective)
        return np.linspace(0, 1, 12) if objective != "npo" else np.linspace(1, 0, 12)

    context = make_context()
    context.calibrate = calibrate
    found = cud(context, anchors="agreement", methods=["ga", "graddiff", "npo"], at_least=2)
    assert asked == ["ga", "graddiff", "npo"]
    assert found == pytest.approx(cud(make_context(), variant="log"))  # two of three count up


def test_every_metric_end_to_end(tmp_path):
    """All of them in one call, resumable, and the same again."""
    make_model(1).save_pretrained(tmp_path / "reference")
    data = qa_dataset(12).add_column("author", [f"author{i % 6}" for i in range(12)])
    options = dict(
        metrics=sorted(METRICS),
        retain_dataset=qa_dataset(9, 50),
        group_column="author",
        folds=3,
        progress=False,
        metric_args={
            "memorization": {"reference_model": str(tmp_path / "reference")},
            "mrd": {"draws": 2},
            "noise_stability": {"draws": 2},
            "cud": {"variant": "calibrated"},
        },
    )
    scores = score_difficulty(make_model(0), data, make_tokenizer(), work_dir=tmp_path / "work", **options)
    assert scores.metrics == sorted(METRICS)
    files = {path.name.rsplit("-", 2)[0] for path in (tmp_path / "work").glob("*.safetensors")}
    assert {"circuits", "outputs", "retain-outputs", "gradients-retain", "noise-0.05-2"} <= files
    again = score_difficulty(make_model(0), data, make_tokenizer(), work_dir=tmp_path / "work", **options)
    for name in scores.metrics:
        np.testing.assert_array_equal(scores[name], again[name])


def test_kept_work_is_not_taken_for_another_seed_or_reference(tmp_path):
    options = dict(metrics=["mrd"], metric_args={"mrd": {"draws": 1}}, work_dir=tmp_path / "noise", progress=False)
    score_difficulty(make_model(0), qa_dataset(4), make_tokenizer(), seed=0, **options)
    with pytest.raises(ValueError, match="seed: there 0, here 1"):
        score_difficulty(make_model(0), qa_dataset(4), make_tokenizer(), seed=1, **options)
    found = []
    for seed, name in ((1, "a/b"), (2, "a-b")):
        make_model(seed).save_pretrained(tmp_path / name)
        options = {"metric_args": {"memorization": {"reference_model": str(tmp_path / name)}}, "progress": False}
        scores = score_difficulty(
            make_model(0),
            qa_dataset(4),
            make_tokenizer(),
            metrics=["memorization"],
            work_dir=tmp_path / "work",
            **options,
        )
        found.append(scores["memorization"])
    assert (found[0] != found[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["grad_alignment"]}, "'grad_alignment' needs a retain set"),
        ({"metrics": ["atypicality"]}, "'atypicality' needs a retain set"),
        ({"metrics": ["retain_similarity"]}, "'retain_similarity' needs a retain set"),
        ({"metrics": ["group_mean"]}, "'group_mean' needs a group for every sample: give group_column"),
        ({"metrics": ["memorization"]}, "'memorization' needs a reference model"),
        ({"metric_args": {"mrd": {"sigma": 0}}}, "'sigma' of parameter noise must be positive"),
        ({"metric_args": {"mrd": {"draws": 1.5}}}, "'draws' of parameter noise must be a positive integer"),
        ({"metric_args": {"mrd": {"relative": 1}}}, "'relative' of difficulty metric 'mrd' must be true or false"),
        ({"metric_args": {"atypicality": {"k": 0}}}, "'k' .neighbours. must be a positive integer"),
        ({"metric_args": {"self_confidence": {"kind": "x"}}}, "unknown kind 'x'"),
        ({"metric_args": {"circuit_signature": {"name": "x"}}}, "unknown circuit signature 'x'"),
        ({"metric_args": {"circuit_signature": {"k": 0}}}, "edges of a circuit"),
        (
            {"metric_args": {"cud": {"variant": "log", "features": ["edges"]}}},
            "features belong to the CUD variant 'calibrated'",
        ),
        ({"metric_args": {"cud": {"variant": "calibrated", "features": ["x"]}}}, "features must be a list out of"),
        ({"metric_args": {"cud": {"variant": "calibrated", "anchors": "agreement"}}}, "fitted to a calibration run"),
        ({"metric_args": {"cud": {"anchors": "agreement", "methods": ["npo"]}}}, "two or more objectives"),
        (
            {"metric_args": {"cud": {"anchors": "agreement", "methods": ["npo", "nope"], "at_least": 2}}},
            "unknown objective 'nope'",
        ),
        ({"metric_args": {"cud": {"anchors": "agreement", "at_least": 9}}}, "at_least must be from 1 to 4"),
    ],
)
def test_refused_before_anything_is_computed(options, message, monkeypatch):
    for name in ("cud_trainer.difficulty.context.run_batches", "cud_trainer.difficulty.context.attribute_dataset"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("computed"))
    options = {"metrics": list(options.get("metric_args", ["loss"])), **options}
    with pytest.raises(ValueError, match=message):
        score_difficulty(make_model(0), qa_dataset(6), make_tokenizer(), progress=False, **options)


def test_a_constant_metric_is_reported_and_ranks_nothing(caplog, monkeypatch):
    monkeypatch.setattr("cud_trainer.difficulty.context.DifficultyContext.answers", (np.ones(4), np.arange(1.0, 5.0)))
    scores = score_difficulty(
        make_model(0), qa_dataset(4), make_tokenizer(), metrics=["loss", "length"], progress=False
    )
    assert "'loss' is the same for all 4 samples" in caplog.text
    assert scores.constant == ["loss"] and "bucket" not in scores.to_pandas()
    with pytest.raises(ValueError, match="'loss' is the same for all samples: it ranks nothing"):
        scores.buckets()
    assert scores.buckets("length", 2).tolist() == [0, 0, 1, 1]
    assert DifficultyScores(["a"], {"x": np.ones(1)}).constant == []
