"""Residual memorisation, the trade-off path and the audit: hand-worked cases and an independent computation."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from scipy.stats import spearmanr

from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.logprobs import answer_probability
from evaluation.metrics.memorization import (
    GENERATED,
    METRICS,
    TEACHER_FORCED,
    evaluate_memorization,
    exact_memorization,
    extraction_strength,
    generate_answers,
    rouge_l_recall,
    teacher_forced,
    true_answers,
)
from evaluation.report.audit import audit_results
from evaluation.report.difficulty import difficulty_section
from evaluation.report.schema import Run, jsonable
from evaluation.statistics import spearman_difference
from evaluation.trajectory import TradeoffCallback, at_position, averaged_residual, matched_position


@pytest.fixture(scope="module")
def memorised():
    """A tiny model that knows four of eight samples by heart, and these samples."""
    tokenizer, model = make_tokenizer(), make_model(0, num_hidden_layers=1)
    data = prepare_samples(qa_dataset(8), tokenizer)
    from cud_trainer.data import pad_batch
    from cud_trainer.logprobs import score_answers

    batch = pad_batch([data[i] for i in range(4)], tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -score_answers(model, batch).mean_logps.mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model.eval(), tokenizer, data


class TestHandWorked:
    @pytest.mark.parametrize(
        ("correct", "exact", "strength", "corrected"),
        [
            ([True, True, True, True], 1.0, 1.0, 1.0),
            ([False, True, True, True], 0.75, 0.75, 0.75),
            ([True, True, False, True], 0.75, 0.25, 0.25),
            ([True, True, True, False], 0.75, 0.25, 0.0),  # at least the last token counts, unless corrected
            ([False, False], 0.0, 0.5, 0.0),
            ([True], 1.0, 1.0, 1.0),
        ],
    )
    def test_arg_max_metrics(self, correct, exact, strength, corrected):
        assert exact_memorization(correct) == exact
        assert extraction_strength(correct) == strength
        assert extraction_strength(correct, corrected=True) == corrected

    def test_rouge_l_recall(self):
        truths = ["the cat sat on the mat", "blue", "one two three four"]
        answers = ["the cat on a mat", "red", "four three two one"]
        np.testing.assert_allclose(rouge_l_recall(truths, answers), [4 / 6, 0.0, 1 / 4])


class TestOnAModel:
    def test_probability_and_arg_max_by_hand(self, memorised):
        model, tokenizer, data = memorised
        values = teacher_forced(model, data, tokenizer, batch_size=3)
        for row in range(8):
            tokens, labels = torch.tensor(data[row]["input_ids"]), torch.tensor(data[row]["labels"])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, :-1]
            answer = labels[1:] != -100
            logps = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)[answer]
            assert values["probability"][row] == pytest.approx(float(logps.mean().exp()), rel=1e-4)
            hits = (logits.argmax(-1) == tokens[1:])[answer][:-1]  # the eos token is not content
            assert values["exact_memorization"][row] == pytest.approx(float(hits.float().mean()))

    def test_memorised_samples_are_told_from_others(self, memorised):
        model, tokenizer, data = memorised
        values = evaluate_memorization(model, data, tokenizer, batch_size=3)
        assert set(values) == {*TEACHER_FORCED, *GENERATED}
        for name in values:
            assert values[name][:4].min() > values[name][4:].mean(), name
        assert values["rouge_l_recall"][:4].tolist() == [1.0] * 4

    def test_generation_is_that_of_the_library_one_by_one(self, memorised):
        model, tokenizer, data = memorised
        together = generate_answers(model, data, tokenizer, batch_size=8, extra_tokens=0)
        for row in range(8):
            start = next(i for i, label in enumerate(data[row]["labels"]) if label != -100)
            prompt = torch.tensor([data[row]["input_ids"][:start]])
            alone = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=max(len(d) for d in data["input_ids"]), pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
            text = tokenizer.decode(alone[0, start:], skip_special_tokens=True).strip()
            assert text.startswith(together[row]) or together[row].startswith(text)
        assert together[:4] == true_answers(data, tokenizer)[:4]

    def test_answer_probability_agrees(self, memorised):
        model, tokenizer, data = memorised
        expected = teacher_forced(model, data, tokenizer)["probability"]
        np.testing.assert_allclose(answer_probability(model, data, batch_size=5), expected, rtol=1e-4)


class TestPath:
    def test_matched_position_on_a_crossing(self):
        retain = np.array([1.0, 0.9, 0.7])
        forget = np.array([1.0, 0.6, 0.2])
        position = matched_position(retain, forget, 0.8)
        assert position == pytest.approx(1.5)
        assert at_position(forget, position) == pytest.approx(0.4)
        assert matched_position(retain, forget, 1.1) is None
        assert matched_position(retain, forget, 0.5) == 2.0

    def test_a_run_that_recovers_counts_at_its_best(self):
        retain = np.array([1.0, 0.5, 0.95, 0.97])
        forget = np.array([1.0, 0.5, 0.1, 0.2])
        assert matched_position(retain, forget, 0.9) == 2.0
        assert matched_position(retain, forget[::-1], 0.9) == pytest.approx(0.2)

    def test_averaged_residual_uses_the_window(self):
        forget = [np.full(2, v) for v in (1.0, 0.8, 0.5, 0.3, 0.1)]
        values, used = averaged_residual(forget)
        assert used == [2, 3] and values.tolist() == pytest.approx([0.4, 0.4])
        assert averaged_residual([np.full(2, v) for v in (1.0, 0.01)])[1] == [1]

    def test_callback_records_every_step(self, tmp_path):
        from runs import config

        from cud_trainer import CUDTrainer

        tokenizer = make_tokenizer()
        forget, retain = prepare_samples(qa_dataset(9), tokenizer), prepare_samples(qa_dataset(3, 50), tokenizer)
        callback = TradeoffCallback(forget, retain, every=2)
        model = make_model(0)
        start = answer_probability(model, forget)
        CUDTrainer(
            model, config(tmp_path / "out", save_strategy="no"), forget_dataset=qa_dataset(9),
            retain_dataset=qa_dataset(7, 100), processing_class=tokenizer, callbacks=[callback],
        ).train()  # fmt: skip
        assert callback.path.steps == [0, 2, 4, 5]
        np.testing.assert_allclose(callback.path.forget[0], start)
        np.testing.assert_allclose(callback.path.forget[-1], answer_probability(model, forget), rtol=1e-5)


class TestAudit:
    def test_difficulty_section(self):
        generator = np.random.default_rng(0)
        target = generator.normal(size=80)
        columns = {
            "cud": target + 0.1 * generator.normal(size=80),
            "loss": target + generator.normal(size=80),
            "length": generator.normal(size=80),
        }
        section = jsonable(difficulty_section("npo", columns, [target, target + 0.2], target="t", seed=0))
        rows = {row["metric"]: row for row in section["rows"]}
        assert rows["cud"]["spearman"]["value"] == pytest.approx(spearmanr(columns["cud"], target).statistic)
        assert rows["cud"]["partial"]["value"] > 0.9 and rows["loss"]["partial"] is None
        assert section["ceiling"]["agreement"]["value"] == pytest.approx(1.0)
        difference = spearman_difference(columns["cud"], columns["loss"], target, seed=0)
        assert difference.low > 0
        assert difference.value == pytest.approx(rows["cud"]["spearman"]["value"] - rows["loss"]["spearman"]["value"])

    def test_results_of_one_model(self):
        generator = np.random.default_rng(1)
        values = {name: generator.uniform(size=12) for name in METRICS}
        scores = DifficultyScores(
            [str(i) for i in range(12)],
            {"cud": values["probability"].copy(), "loss": generator.normal(size=12), "length": np.arange(12.0)},
        )
        run = Run(command="", seed=0, versions={}, model={}, data={}, seconds={})
        sets = {"forget": values, "retain": values}
        results = jsonable(
            audit_results(sets, run, before={"forget": values}, scores=scores, buckets=scores.bucketed())
        )
        buckets = results["conditions"][0]["final"]["buckets"]
        assert [row["n"] for row in buckets] == [3, 3, 3, 3]
        expected = np.sort(values["probability"]).reshape(4, 3).mean(1)
        np.testing.assert_allclose([row["probability"]["value"] for row in buckets], expected)
        assert any("Spearman of CUD" in line and "1.000" in line for line in results["findings"])
