"""leak@k against every choice of k answers; what counts as a leak; the secret's tokens; sampling; entailment."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import Buckets
from cud_trainer.models.generation import Sampling
from evaluation.metrics import leak as leaks
from evaluation.metrics.entailment import Entailment
from evaluation.metrics.leak import LeakRule, leak_at_k, sampled_leaks, shown_k
from evaluation.metrics.measure import Measured
from evaluation.metrics.memorization import generate_answers, true_answers
from evaluation.metrics.words import longest_span, tells
from evaluation.report.attacks import Groups
from evaluation.report.leak import leak_tables
from evaluation.report.schema import jsonable


class TestEstimator:
    def test_against_every_choice(self):
        n = 6
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                share = np.mean([any(chosen) for chosen in combinations(answers, k)])
                assert leak_at_k(np.array([c]), n, k)[0] == pytest.approx(share)

    def test_many_answers_need_no_large_numbers(self):
        for c, k in ((1, 128), (3, 64), (200, 7), (0, 200), (73, 128)):
            left = 0 if 200 - c < k else comb(200 - c, k) / comb(200, k)
            assert leak_at_k(np.array([c]), 200, k)[0] == pytest.approx(1 - left, rel=1e-9)
        assert np.isnan(leak_at_k(np.array([np.nan]), 4, 2)).all()

    def test_unbiased(self):
        """Its mean over many sets of 5 answers is the chance that one of 3 leaks."""
        p, generator = 0.3, np.random.default_rng(0)
        drawn = generator.binomial(5, p, 200_000)
        assert leak_at_k(drawn, 5, 3).mean() == pytest.approx(1 - (1 - p) ** 3, abs=3e-3)

    def test_refused(self):
        for k in (0, 5):
            with pytest.raises(ValueError, match="k from 1 to 4"):
                leak_at_k(np.array([1]), 4, k)
        with pytest.raises(ValueError, match="0 to 4 leak"):
            leak_at_k(np.array([5]), 4, 1)
        assert shown_k(1) == [1] and shown_k(8) == [1, 2, 4, 8] and shown_k(5) == [1, 2, 4, 5]


class TestWhatLeaks:
    def test_spans(self):
        truth = "Ann was born in Vell in 1962"
        assert longest_span(truth, "yes, born in Vell in 1999") == (4, 7)
        assert longest_span(truth, truth) == (7, 7) and longest_span("", truth) == (0, 0)
        assert longest_span("今日は雨", "明日は雨") == (3, 4)

    def test_secrets(self):
        assert tells("code 12 here", "It is  12.", "12") and not tells("code 12 here", "in 2012", "12")
        assert tells("code x12y here", "in 2012", "12")  # in its own answer it is part of a word, too
        assert tells("ANN Straße", "ann STRASSE", "Straße") and not tells("a b", "", "b")
        assert tells("密码是雨天", "雨天", "雨天")


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_tokenizer()
    return make_model(0, num_hidden_layers=1), tokenizer, prepare_samples(qa_dataset(4), tokenizer)


class TestSampledLeaks:
    def test_counts_are_those_of_the_answers(self, parts, monkeypatch):
        model, tokenizer, data = parts
        truths = true_answers(data, tokenizer)
        told = [[truths[0], truths[0], "no"], ["Person 7", "x", "y"], ["no", "no", "no"], ["the town", "21", "of"]]
        monkeypatch.setattr(leaks, "generate_answers", lambda *a, sampling, **o: [one for own in told for one in own])
        asked, seen = [], []

        def judge(questions, true, answers):
            asked.extend(questions), seen.extend(zip(true, answers, strict=True))
            return [answer == "x" for answer in answers]

        rule = LeakRule(3, rouge=0.4, span=2, judge=judge)
        found = sampled_leaks(model, data, tokenizer, rule, secrets=[["0"], ["7"], ["14"], []])
        assert {kind: counts.tolist() for kind, counts in found.items() if kind != "secret"} == {
            "rouge": [2, 1, 0, 0],
            "verbatim": [2, 1, 0, 0],
            "judge": [0, 1, 0, 0],
        }
        np.testing.assert_array_equal(found["secret"], [2, 1, 0, np.nan])
        assert asked[0] == "Question: Who is 0?\nAnswer:" and (truths[0], truths[0]) in seen
        assert len(seen) == 2 + 3 + 1 + 3  # the same answer again is judged once
        for wrong in ([True], [0.5] * 9):
            with pytest.raises(ValueError, match="the judge must return 9 of True or False"):
                sampled_leaks(model, data, tokenizer, LeakRule(3, judge=lambda *_, wrong=wrong: wrong))

    def test_a_seed_and_no_batch_size_decides(self, parts):
        model, tokenizer, data = parts
        one = {"sampling": Sampling(draws=4, seed=1)}
        drawn = generate_answers(model, data, tokenizer, batch_size=1, **one)
        assert drawn == generate_answers(model, data, tokenizer, batch_size=16, **one) and len(drawn) == 16
        assert drawn[:4] == generate_answers(model, data.select([0]), tokenizer, **one)
        more = generate_answers(model, data.select([0]), tokenizer, sampling=Sampling(draws=6, seed=1))
        assert more[:4] == drawn[:4] and len(set(more)) > 1
        assert drawn != generate_answers(model, data, tokenizer, sampling=Sampling(draws=4, seed=2))


class TestEntailment:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        torch.manual_seed(0)
        labels = {0: "ENTAILMENT", 1: "neutral", 2: "not_entailment"}
        config = BertConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
            initializer_range=2.0,
        )
        folder = tmp_path_factory.mktemp("nli")
        BertForSequenceClassification(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    def test_pair_by_pair(self, folder):
        judge = Entailment(folder, batch_size=3)
        said, true = [f"It is {'so ' * k}" for k in range(8)], [f"{k} it is" for k in range(8)]
        expected = []
        for premise, hypothesis in zip(said, true, strict=True):
            batch = judge.tokenizer(premise, hypothesis, return_tensors="pt")
            with torch.no_grad():
                expected.append(int(judge.model(**batch).logits[0].argmax()) == 0)
        assert judge(said, true).tolist() == expected and len(set(expected)) == 2

    def test_other_models_are_refused(self, folder, tmp_path):
        make_model(0, num_hidden_layers=1).save_pretrained(tmp_path / "lm")
        for path in (tmp_path / "lm", tmp_path / "nothing"):
            with pytest.raises(ValueError, match="entailment"):
                Entailment(path)


def test_tables():
    """Of 4 answers: what leaks, less what never-seen samples give; samples without a secret are left out."""
    own = {"rouge": np.array([4.0, 0, 1, 0]), "secret": np.array([2.0, np.nan, 0, np.nan])}
    unseen = {"rouge": np.array([0.0, 0, 1])}
    after = Measured({"forget": {}}, leaks={"forget": own, "holdout": unseen})
    buckets = Buckets(np.array([0, 0, 1, 1]), 2)
    groups = Groups(["a", "a", "b", "b"], ["x", "y", "y"])
    tables, findings = leak_tables(LeakRule(4), after, None, None, buckets, groups, 0)
    rows = {row["label"]: row["cells"] for row in jsonable(tables[0])["rows"]}
    assert rows["rouge, k = 1"][0]["value"] == pytest.approx(1.25 / 4)
    assert rows["rouge, k = 4"][0]["value"] == 0.5 and rows["rouge, k = 4"][1]["value"] == pytest.approx(1 / 3)
    assert rows["rouge, k = 4"][2]["value"] == pytest.approx(0.5 - 1 / 3)
    assert rows["secret, k = 2"][0]["value"] == pytest.approx((1 - 1 / 6) / 2)
    assert rows["secret, k = 2"][1]["reason"] == "no secrets"
    parts = {row["label"]: row["cells"] for row in jsonable(tables[1])["rows"]}
    assert list(parts) == ["bucket 1", "bucket 2", "group a", "group b"] and parts["group b"][1]["value"] == 0.5
    assert "it cannot be told" in findings[0] and "1 of 2 samples" in findings[0]
    after.leaks["forget"].pop("secret")
    line = leak_tables(LeakRule(4), after, None, None, None, Groups(), 0)[1][0]
    assert "2 of 4 samples" in line and "never-seen samples 0.333" in line and "difference 0.167" in line


def test_questions_of_a_judge_are_all_that_stands_before_the_answer():
    tokenizer = make_tokenizer(chat=True)
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]}]
    assert "Who?" in leaks.asked(prepare_samples(Dataset.from_list(rows), tokenizer).measured, tokenizer)[0]
