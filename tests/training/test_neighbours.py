"""Retain partners nearest in hidden space: the ranking by hand, whose turn it is, runs, processes, refusals."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from runs import checksum, make_trainer, torchrun

from cud_trainer.data import prepare_samples
from cud_trainer.training.neighbours import Nearest, nearest

NEAREST = {"retain_pairing": "nearest", "schedule": "uniform", "retain_loss": "nll"}


def test_nearest_by_hand():
    forget = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    retain = np.array([[-1.0, 0.0], [3.0, 3.0], [5.0, 0.0], [1.0, 1.0], [1.0, 1e-9]])
    # (5, 0) and (1, 1e-9) have the same direction, so do (3, 3) and (1, 1): the first in the file comes first
    assert nearest(forget, retain, 4).tolist() == [[2, 4, 1, 3], [1, 3, 0, 2], [0, 1, 2, 3]]


def test_nearest_is_the_same_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    forget, retain = generator.normal(size=(7, 5)), generator.normal(size=(11, 5))
    whole = nearest(forget, retain, 3)
    cosine = [[f @ r / np.linalg.norm(f) / np.linalg.norm(r) for r in retain] for f in forget]
    assert whole.tolist() == [np.argsort(np.negative(row))[:3].tolist() for row in cosine]
    monkeypatch.setattr("cud_trainer.training.neighbours.AT_A_TIME", 2)
    assert (nearest(forget, retain, 3) == whole).all()


def by_hand():
    """Each forget sample's retain samples, nearest first, one sample at a time, from the model's own hidden states."""
    model, tokenizer = make_model(0).double().eval(), make_tokenizer()
    sets = [prepare_samples(data, tokenizer) for data in (qa_dataset(9), qa_dataset(7, 100))]
    states = []
    for samples in sets:
        states.append([])
        for sample in samples:
            with torch.no_grad():
                layers = model(torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states
            predicts = [place - 1 for place, label in enumerate(sample["labels"]) if label != -100 and place]
            states[-1].append(layers[1][0, predicts].mean(0))  # two layers: the embedding, the middle, the last
    ids = sets[1].ids
    return {
        name: [
            ids[row]
            for row in np.argsort(
                [-round(float(torch.cosine_similarity(f, r, dim=0)), 4) for r in states[1]], kind="stable"
            )
        ]
        for name, f in zip(sets[0].ids, states[0], strict=True)
    }


@pytest.mark.slow
def test_a_run_serves_them_in_turn(tmp_path):
    trainer = make_trainer(tmp_path / "out", passes=9, **NEAREST)
    expected, schedule, seen = by_hand(), trainer.schedule, {}
    for name, partner in zip(schedule.order.tolist(), schedule.retain_id.tolist(), strict=True):
        turn = seen[name] = seen.get(name, -1) + 1
        assert partner == expected[name][turn % 7], (name, turn)
    assert schedule.settings["retain_pairing"] == "nearest" and set(seen.values()) == {8}
    ids = trainer.retain.ids
    assert trainer.plan.rows["retain_index"][:4].tolist() == [ids.index(name) for name in schedule.retain_id[:4]]
    drawn = make_trainer(tmp_path / "drawn", passes=9, **{**NEAREST, "retain_pairing": "random"}).schedule
    assert drawn.order.tolist() == schedule.order.tolist() and drawn.hash != schedule.hash


@pytest.mark.slow
@pytest.mark.subprocess
def test_resumed_and_on_two_processes(tmp_path):
    straight = make_trainer(tmp_path / "a", **NEAREST)
    straight.train()
    resumed = make_trainer(tmp_path / "a", **NEAREST)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert checksum(resumed.model) == checksum(straight.model)
    other = make_trainer(tmp_path / "a", **{**NEAREST, "retain_pairing": "random"})
    with pytest.raises(ValueError, match="cannot resume.*its schedule is"):
        other.train(resume_from_checkpoint=True)
    found = torchrun(tmp_path / "b", tmp_path / "b.json", per_device_train_batch_size=2, **NEAREST)
    assert found["checksum"] == pytest.approx(checksum(straight.model), rel=1e-10)


def test_refused(tmp_path):
    for options, message in (
        ({"retain_pairing": "near"}, "retain_pairing must be 'random' or 'nearest', got 'near'"),
        ({"retain_pairing": "nearest", "objective": "ga"}, "retain_pairing 'nearest' pairs with retain samples, but"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_several_processes_found_is_what_one_finds():
    generator = np.random.default_rng(1)
    forget, retain = generator.normal(size=(6, 4)), np.repeat(generator.normal(size=(20, 4)), 2, axis=0)  # with ties
    parts = [Nearest(forget, 5) for _ in range(3)]
    for number, part in enumerate(parts):
        rows = np.arange(number, 40, 3)
        part.see(rows[::-1], retain[rows[::-1]])
    for other in [*parts]:  # its own, too, as they are gathered
        parts[0].take(*other.found())
    assert parts[0].found()[0].tolist() == nearest(forget, retain, 5).tolist()
    cosine = [[f @ r / np.linalg.norm(f) / np.linalg.norm(r) for r in retain] for f in forget]
    by_hand = [np.argsort(np.negative(np.round(row, 4)), kind="stable")[:5].tolist() for row in cosine]
    assert parts[0].found()[0].tolist() == by_hand
