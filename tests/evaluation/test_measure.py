"""Privacy, utility, robustness: hand-worked cases and invariants."""

import math
import zlib

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset, concatenate_datasets
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score
from tofu import tofu_like

from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.models.generation import Sampling
from evaluation.metrics import privacy, robustness
from evaluation.metrics.measure import check_texts, measure
from evaluation.metrics.memorization import (
    generate_answers,
    lowest_mean,
    teacher_forced,
    verbatim,
)
from evaluation.metrics.utility import (
    answer_logps,
    closer_to_one,
    forget_quality,
    model_utility,
    normalised_probability,
    tofu_utility,
    true_better,
    truth_ratio,
)

pytestmark = pytest.mark.slow


class TestByHand:
    def test_truth_ratio(self):
        correct, wrong = np.log([0.5, 0.2]), np.log([[0.1, 0.4], [0.2, 0.2]])
        found = truth_ratio(correct, wrong)
        np.testing.assert_allclose(found, [math.sqrt(0.1 * 0.4) / 0.5, 1.0], rtol=1e-8)
        np.testing.assert_allclose(true_better(found), [0.6, 0.0], atol=1e-8)
        np.testing.assert_allclose(closer_to_one(np.array([0.4, 2.5, 1.0])), [0.4, 0.4, 1.0], rtol=1e-8)
        np.testing.assert_allclose(normalised_probability(correct, wrong), [0.5 / 1.0, 0.2 / 0.6], rtol=1e-8)

    def test_ratios_of_a_collapsed_model(self):
        """In logs: there is no floor below which everything is alike."""
        correct, wrong = (
            np.array([-60.0, -25.0, -900.0, -1.0]),
            np.array([[-60.0] * 2, [-24.0] * 2, [-1.0] * 2, [-900.0] * 2]),
        )
        found = truth_ratio(correct, wrong)
        assert found[:2] == pytest.approx([1.0, math.e]) and np.isfinite(found).all()
        assert closer_to_one(found) == pytest.approx([1.0, 1 / math.e, 0.0, 0.0])
        assert true_better(found) == pytest.approx([0.0, 0.0, 0.0, 1.0])
        assert normalised_probability(correct, wrong) == pytest.approx([1 / 3, 1 / (1 + 2 * math.e), 0.0, 1.0])
        with np.errstate(all="raise"):
            broken = truth_ratio(np.array([np.nan, -np.inf]), np.full((2, 2), -np.inf))
            assert np.isnan(broken).all() and np.isnan(closer_to_one(broken)).all()
            assert closer_to_one(np.zeros(1)).tolist() == [0.0]  # theirs may be 0

    def test_model_utility_and_forget_quality(self):
        names = [
            f"{s}/{k}"
            for s in ("retain", "real_authors", "world_facts")
            for k in ("probability", "rouge_l_recall", "truth_ratio")
        ]
        values = dict(zip(names, [0.5, 0.25, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.2], strict=True))
        assert model_utility(values) == pytest.approx(9 / sum(1 / v for v in values.values()))
        assert model_utility({**values, names[0]: 0.0}) == 0.0
        for bad in (float("nan"), 1.5, None):
            with pytest.raises(ValueError, match="model utility needs retain/probability in \\[0, 1\\]"):
                model_utility({**values, names[0]: bad})
        a, b = np.arange(20.0), np.arange(20.0) + 0.5
        assert forget_quality(a, b) == scipy_stats.ks_2samp(a, b).pvalue > 0.9
        assert forget_quality(a, a + 100) < 1e-9

    def test_attacks(self):
        values = {
            "mean_logps": np.array([-0.5, -2.0]),
            "min_k": np.array([-1.0, -5.0]),
            "min_k_plus_plus": np.array([0.5, -1.0]),
            "gradient_norm": np.array([3.0, 4.0]),
        }
        texts = ["abc" * 30, "xyzzy plugh"]
        reference = {"mean_logps": np.array([-3.0, -2.5])}
        found, loss = privacy.attack_scores(values, texts, reference), -values["mean_logps"]
        assert list(found) == list(privacy.ATTACKS)
        assert found["loss"].tolist() == [0.5, 2.0] and found["min_k"].tolist() == [1.0, 5.0]
        assert found["zlib"][0] == 0.5 / len(zlib.compress(texts[0].encode()))
        assert found["reference"].tolist() == [0.5 - 3.0, 2.0 - 2.5]
        assert found["gradient_norm"].tolist() == [3.0, 4.0]  # what was trained on has a small gradient
        assert "reference" not in privacy.attack_scores(values, texts)
        assert "gradient_norm" not in privacy.attack_scores(
            {**reference, "min_k": loss, "min_k_plus_plus": loss}, texts
        )
        # members have the lower scores: AUC 1
        assert privacy.attack_auc(np.array([0.1, 0.2]), np.array([0.3, 0.4])) == 1.0
        assert privacy.attack_auc(np.array([0.1, 0.4]), np.array([0.2, 0.3])) == 0.5
        one, two = (np.random.default_rng(seed).integers(0, 9, 20) for seed in (0, 1))  # with ties
        assert privacy.attack_auc(one, two) == pytest.approx(roc_auc_score(np.repeat([0, 1], 20), np.r_[one, two]))
        assert privacy.privleak(1.0) == pytest.approx(-100) and privacy.privleak(0.5) == 0
        assert privacy.privleak(0.9, 0.6) == pytest.approx(100 * (0.1 - 0.4) / 0.4)
        interval = privacy.attack_interval(np.arange(50.0), np.arange(50.0) + 10, n_boot=200)
        assert interval.low < interval.value < interval.high
        assert math.isnan(privacy.attack_interval(np.array([np.nan, 1.0]), np.arange(3.0)).value)

    def test_min_k(self):
        assert lowest_mean(np.array([-1.0, -9.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -0.5])) == -8.5
        assert lowest_mean(np.array([-1.0, -3.0])) == -3.0 and math.isnan(lowest_mean(np.array([])))

    def test_verbatim(self):
        truths, answers = ["a b", "a b", "a b", "a b"], ["a b c", "a bc", "x a b", "a  b"]
        assert verbatim(truths, answers).tolist() == [1, 0, 0, 1]
        assert math.isnan(verbatim([""], ["z"])[0])

    def test_round_trip(self):
        weight = torch.tensor([[1.0, -0.45, 0.26], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(robustness.round_trip(weight, 8), (weight * 127).round() / 127)
        four = robustness.round_trip(weight, 4)
        torch.testing.assert_close(four[0], torch.tensor([1.0, -3 / 7, 2 / 7]))
        wide = torch.randn(3, 256)
        grouped = robustness.round_trip(wide, 4, 128)
        assert all(len(block.unique()) <= 15 for row in grouped for block in row.split(128))
        assert (
            (grouped - wide).abs() <= wide.abs().reshape(3, 2, 128).amax(-1).repeat_interleave(128, 1) / 14 + 1e-6
        ).all()


class TestOnAModel:
    def test_token_statistics_against_full_logits(self):
        model, tokenizer = make_model(0).double(), make_tokenizer()
        data = prepare_samples(qa_dataset(5), tokenizer)
        found = teacher_forced(model, data, tokenizer, batch_size=2)
        for row, sample in enumerate(data):
            tokens = torch.tensor(sample["input_ids"])
            with torch.no_grad():
                logps = model(tokens[None]).logits[0].log_softmax(-1)
            answer = [t for t, label in enumerate(sample["labels"]) if label != -100]
            picked = np.array([float(logps[t - 1, tokens[t]]) for t in answer])
            assert found["mean_logps"][row] == pytest.approx(picked.mean())
            content = answer[:-1]  # without eos
            plain = np.sort(picked[:-1])
            count = max(1, int(0.2 * len(plain)))
            assert found["min_k"][row] == pytest.approx(plain[:count].mean())
            standard = []
            for t in content:
                row_logps = logps[t - 1].numpy()
                mean = (np.exp(row_logps) * row_logps).sum()
                deviation = math.sqrt((np.exp(row_logps) * (row_logps - mean) ** 2).sum())
                standard.append((row_logps[tokens[t]] - mean) / deviation)
            assert found["min_k_plus_plus"][row] == pytest.approx(np.sort(standard)[:count].mean())

    def test_samples(self):
        model, tokenizer = make_model(0), make_tokenizer()
        data = prepare_samples(qa_dataset(4), tokenizer)
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        drawn = [generate_answers(model, data, tokenizer, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert torch.equal(torch.random.get_rng_state(), state)  # the caller's own draws go on as before

    def test_answers_and_utility(self):
        model, tokenizer, raw = make_model(0), make_tokenizer(), tofu_like(5)
        found = answer_logps(model, raw, tokenizer, ["perturbed_answer", "answer"])
        assert found.shape == (5, 4)
        own = teacher_forced(model, prepare_samples(raw.select_columns(["question", "answer"]), tokenizer), tokenizer)
        np.testing.assert_allclose(found[:, 3], own["mean_logps"], rtol=1e-5)
        values = tofu_utility(model, {"retain": raw, "real_authors": raw, "world_facts": raw}, tokenizer)
        assert len(values) == 9 and all((column >= 0).all() and (column <= 1).all() for column in values.values())
        assert (values["real_authors/probability"] > values["retain/probability"]).all()  # one of four
        assert (values["retain/truth_ratio"] != values["real_authors/truth_ratio"]).any()  # its paraphrase is the truth
        uneven = Dataset.from_list([{**raw[0], "perturbed_answer": ["a"]}, raw[1]])
        with pytest.raises(ValueError, match="sample '1' has 3 answers, '0', the first, has 1"):
            answer_logps(model, uneven, tokenizer, ["perturbed_answer"])
        with pytest.raises(ValueError, match="has no column 'x'"):
            answer_logps(model, raw, tokenizer, ["x"])
        numbers = Dataset.from_list([{"id": "a", "question": "Who?", "answer": 7}])
        with pytest.raises(ValueError, match="sample 'a': one of its answers is of type int, no text"):
            answer_logps(model, numbers, tokenizer, ["answer"])

    def test_a_missing_answer_is_undefined_for_its_sample_alone(self):
        model, tokenizer, raw = make_model(0, num_hidden_layers=1), make_tokenizer(), tofu_like(6)
        whole = answer_logps(model, raw, tokenizer, ["perturbed_answer"])
        gaps = {0: {"perturbed_answer": None}, 1: {"perturbed_answer": ["x", None, "y"]}, 2: {"perturbed_answer": []}}
        gaps |= {3: {"question": None}, 4: {"perturbed_answer": ["x", " ", "y"]}}
        rows = [{**row, **gaps.get(number, {})} for number, row in enumerate(raw)]
        found = answer_logps(model, Dataset.from_list(rows), tokenizer, ["perturbed_answer"])
        assert np.isnan(found[:5]).all()
        np.testing.assert_allclose(found[5], whole[5], rtol=1e-5)
        assert np.isnan(answer_logps(model, Dataset.from_list(rows[:1]), tokenizer, ["perturbed_answer"])).all()

    def test_other_wordings_keep_the_ids_of_their_samples(self):
        """Two samples that are asked alike in other words are two samples; what is wrong with one names it."""
        model, tokenizer = make_model(0, num_hidden_layers=1), make_tokenizer()
        rows = [
            {"id": f"s{i}", "question": f"Who {i}?", "answer": "Ann", "paraphrased_question": "Who?"} for i in range(3)
        ]
        rows[2]["paraphrased_question"] = None
        raw = Dataset.from_list(rows)
        sets = {"forget": prepare_samples(raw, tokenizer)}
        found = measure(model, sets, raw, {}, tokenizer, generate=False)
        assert found.paraphrased[0] == found.paraphrased[1] > 0 and np.isnan(found.paraphrased[2])
        with pytest.raises(ValueError, match="s1-0"):
            check_texts(
                Dataset.from_list([rows[0], {**rows[1], "paraphrased_question": "Who " * 30}]),
                {},
                tokenizer,
                max_length=40,
            )
        twice = tofu_like(1).add_column("id", ["a"]), tofu_like(1).add_column("id", ["b"])
        both = concatenate_datasets(twice)  # the same text under two names
        assert len(tofu_utility(model, {"retain": both}, tokenizer, generate=False)["retain/probability"]) == 2

    def test_relearning_brings_back_and_restores(self):
        model, tokenizer = make_model(0), make_tokenizer()
        data = prepare_samples(qa_dataset(8), tokenizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" in name)  # whatever was frozen is relearned, too
        never_seen = prepare_samples(qa_dataset(3, 50), tokenizer)
        options = {"steps": (1, 30), "learning_rate": 1e-2}
        both = robustness.relearn(model, data, [0, 1, 2], control=never_seen, **options)
        found = both.forget
        assert sorted(found) == sorted(both.control) == [0, 1, 30]
        np.testing.assert_array_equal(both.control[0], answer_probability(model, never_seen, batch_size=16))
        assert both.control[30].mean() > 2 * both.control[0].mean()  # by itself, like all that looks like this
        np.testing.assert_array_equal(found[0], answer_probability(model, data, batch_size=16))
        assert (found[30][:3] > 5 * found[0][:3]).all()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.requires_grad == ("mlp" in name) for name, p in model.named_parameters())
        again = robustness.relearn(model, data, [0, 1, 2], **options)
        assert (again.forget[30] == found[30]).all() and again.control is None
        for bad in ({"rows": []}, {"rows": [0], "steps": ()}, {"rows": [0], "steps": (0,)}):
            with pytest.raises(ValueError, match="relearning needs"):
                robustness.relearn(model, data, bad.pop("rows"), **bad)

    def test_quantised_and_between_restore(self):
        model, other, tokenizer = make_model(0), make_model(1), make_tokenizer()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match="stop"), robustness.quantised(model, 4):
            weight = model.model.layers[0].mlp.up_proj.weight
            torch.testing.assert_close(
                weight, robustness.round_trip(before["model.layers.0.mlp.up_proj.weight"], 4, 128)
            )
            assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
            raise RuntimeError("stop")
        start = {name: p.detach().clone() for name, p in other.named_parameters()}
        data = prepare_samples(qa_dataset(3), tokenizer)
        path = robustness.straight_line(model, start, {"forget": data}, shares=(0.0, 0.5, 1.0))
        np.testing.assert_allclose(path[0]["forget"], answer_probability(other, data), rtol=1e-6)
        np.testing.assert_array_equal(path[2]["forget"], answer_probability(model, data, batch_size=16))
        with robustness.between(model, start, 0.25):
            name = "model.layers.1.self_attn.q_proj.weight"
            torch.testing.assert_close(dict(model.named_parameters())[name], 0.75 * start[name] + 0.25 * before[name])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        del start["model.norm.weight"]
        with (
            pytest.raises(ValueError, match="the models differ in model.norm.weight"),
            robustness.between(model, start, 0.5),
        ):
            pass
        with pytest.raises(ValueError, match="8 or 4 bits"), robustness.quantised(model, 3):
            pass
