"""Residual memorisation: hand-worked cases and an independent computation."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset

from cud_trainer.data import prepare_dataset, prepare_samples
from cud_trainer.logprobs import answer_probability, answer_recall
from cud_trainer.models.generation import stop_tokens
from evaluation.metrics.depth import logit_lens
from evaluation.metrics.gradients import gradient_norms
from evaluation.metrics.memorization import (
    GENERATED,
    TEACHER_FORCED,
    evaluate_memorization,
    exact_memorization,
    extraction_strength,
    generate_answers,
    rouge_l_recall,
    teacher_forced,
    true_answers,
)


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
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max(len(d) for d in data["input_ids"]),
                pad_token_id=0,
                eos_token_id=1,
            )
            text = tokenizer.decode(alone[0, start:], skip_special_tokens=True).strip()
            assert text.startswith(together[row]) or together[row].startswith(text)
        assert together[:4] == true_answers(data, tokenizer)[:4]

    def test_answer_probability_agrees(self, memorised):
        model, tokenizer, data = memorised
        expected = teacher_forced(model, data, tokenizer)["probability"]
        np.testing.assert_allclose(answer_probability(model, data, batch_size=5), expected, rtol=1e-4)

    def test_both_headline_figures_in_one_pass(self, memorised):
        model, tokenizer, data = memorised
        values, stop = teacher_forced(model, data, tokenizer), stop_tokens(tokenizer, model)
        probability, strength = answer_recall(model, data, stop, batch_size=3)
        np.testing.assert_allclose(probability, values["probability"], rtol=1e-4)
        np.testing.assert_array_equal(strength, values["extraction_strength"])
        assert strength[:4].tolist() == [1.0] * 4 and strength[4:].max() < 1
        padded = answer_recall(model, data, [*stop, tokenizer.pad_token_id])[1]  # what is no answer ends none
        np.testing.assert_array_equal(padded, strength)


def test_a_prepared_dataset_does_as_samples_do(model, tokenizer):
    """`prepare_dataset` returns a dataset: the measures take it, too, and name what is not prepared."""
    dataset, samples = (kind(qa_dataset(3), tokenizer) for kind in (prepare_dataset, prepare_samples))
    ours, same = (evaluate_memorization(model, part, tokenizer) for part in (dataset, samples))
    assert {name: values.tolist() for name, values in ours.items()} == {n: v.tolist() for n, v in same.items()}
    with pytest.raises(ValueError, match="not prepared: it has no column 'sample_id'"):
        evaluate_memorization(model, qa_dataset(3), tokenizer)


def test_a_batch_that_does_not_fit_is_halved(memorised, monkeypatch):
    """Whatever is read of answers: the figures of one batch."""
    model, tokenizer, data = memorised
    passes = {
        "forced": lambda: teacher_forced(model, data, tokenizer, batch_size=8)["min_k"],
        "probability": lambda: answer_probability(model, data, batch_size=8),
        "recall": lambda: answer_recall(model, data, stop_tokens(tokenizer, model), batch_size=8)[1],
        "lens": lambda: logit_lens(model, data, batch_size=8),
        "gradients": lambda: gradient_norms(model, data, batch_size=8),
    }
    whole, sizes, forward = {name: run() for name, run in passes.items()}, [], type(model).forward

    def small(self, input_ids=None, **inputs):
        sizes.append(len(inputs["attention_mask"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(type(model), "forward", small)
    monkeypatch.setattr("cud_trainer.models.memory.free_memory", lambda: None)  # which takes its time
    for name, run in passes.items():
        sizes.clear()
        np.testing.assert_allclose(run(), whole[name], rtol=1e-4, err_msg=name)
        assert max(sizes) == 8 and sizes[-1] == 4
