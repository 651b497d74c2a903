"""Runs with another objective for each bucket: the schedule's weights, resume, processes, refusals."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from runs import checksum, config, make_trainer, torchrun

from cud_trainer import DifficultyScores
from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.logprobs import score_answers

pytestmark = pytest.mark.slow

OPTIONS = {
    "objective": "npo",
    "objective_by_bucket": {"1": "ga", "3": {"objective": "simnpo", "beta": 2.0}},
    "schedule": "upweight_hard",
    "n_buckets": 3,
    "retain_loss": "nll",
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("mixed") / "out", **OPTIONS)
    trainer.train()
    return trainer


def test_first_step_by_hand(straight):
    """The loss is the weighted mean of each sample's own formula, from the model before training, plus the retain loss."""
    forget, model = straight.forget, make_model(0).double()
    with torch.no_grad():
        scores = [score_answers(model, pad_batch([forget[row]], 0)) for row in range(9)]
    order = np.argsort(np.argsort(straight.difficulty_scores["loss"])) // 3  # three buckets of three
    assert (straight.buckets == order).all()
    losses = []
    for row, score in enumerate(scores):
        mean = float(score.mean_logps)
        by_bucket = (mean, 20 * np.log(2), np.log1p(np.exp(2.0 * mean)))
        losses.append(by_bucket[order[row]])
    rows = [straight.forget_ids.index(name) for name in straight.schedule.order[:4]]
    expected = np.mean(np.array(losses)[rows] * straight.schedule.weight[:4])
    assert len({order[row] for row in rows}) > 1
    entry = straight.state.log_history[0]
    assert entry["loss"] - entry["retain_loss"] == pytest.approx(expected, rel=1e-6)  # logged in float32
    assert entry["forget_loss"] == pytest.approx(np.array(losses)[rows].mean(), rel=1e-9)


def test_any_split_and_resume_bit_for_bit(straight, tmp_path):
    split = make_trainer(
        tmp_path / "a", **OPTIONS, per_device_train_batch_size=1, gradient_accumulation_steps=4, save_strategy="no"
    )
    split.train()
    assert checksum(split.model) == pytest.approx(checksum(straight.model), rel=1e-10)
    resumed = make_trainer(straight.args.output_dir, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(straight.args.output_dir) + "/checkpoint-2")
    assert checksum(resumed.model) == checksum(straight.model)
    other = make_trainer(straight.args.output_dir, **{**OPTIONS, "objective_by_bucket": {"1": "wga"}})
    with pytest.raises(ValueError, match="cannot resume.*its objective is"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.subprocess
def test_two_processes(straight, tmp_path):
    found = torchrun(tmp_path / "out", tmp_path / "a.json", per_device_train_batch_size=2, **OPTIONS)
    assert found["served"] == straight.served_ids
    assert found["checksum"] == pytest.approx(checksum(straight.model), rel=1e-10)


def test_refused(tmp_path):
    for options, message in (
        ({"difficulty": "none", "schedule": "uniform"}, "objective_by_bucket goes by difficulty, but difficulty is"),
        ({"n_buckets": 2}, "there is no bucket 3, n_buckets is 2"),
        ({"objective_by_bucket": "ga"}, "objective_by_bucket must be a (mapping|dictionary)"),
        ({"loss_normalization": "token"}, "loss_normalization 'token' averages over tokens"),
        ({"objective_by_bucket": {"2": "pdu"}}, "objective 'pdu' holds the retain loss at a limit"),
        ({"objective_by_bucket": {"2": "dpo"}}, "give alternative_column"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **{**OPTIONS, **options})
    ids = prepare_samples(qa_dataset(9), make_tokenizer())["sample_id"]
    tied = DifficultyScores(ids, {"loss": np.array([0.0] * 5 + [1.0] * 4)})
    with pytest.raises(ValueError, match="there is no bucket 3, only 2"):
        make_trainer(tmp_path / "out", **OPTIONS, difficulty_scores=tied)
