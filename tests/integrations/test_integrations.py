"""`with_difficulty`: what other trainers serve and weigh, and what they are refused."""

import json

import numpy as np
import pytest
import torch
from builders import SUPPORT, make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from own_trainer import Mine, N, arguments, checksum, collate, make, samples, scores
from processes import run
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from cud_trainer import DifficultyScores, sample_ids, score_difficulty, with_difficulty
from cud_trainer.data import pad_batch, prepare_dataset
from cud_trainer.integrations.trainers import own_draws
from cud_trainer.logprobs import score_answers
from cud_trainer.schedule import make_schedule


def numbers(ids) -> list[int]:
    position = {name: row for row, name in enumerate(samples()["sample_id"])}
    return [position[name] for name in ids]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("runs") / "out", schedule="hard_to_easy+upweight_hard")
    trainer.train()
    return trainer


class TestPlainTrainer:
    def test_the_plan_is_served(self, straight):
        table = scores()
        plan = make_schedule("hard_to_easy+upweight_hard", table.ids, difficulty=table["loss"], passes=2, seed=3)
        assert straight.planned_ids == plan.order.tolist() and len(plan.order) == 20  # five whole steps
        assert straight.seen == numbers(straight.planned_ids)
        assert type(straight).__name__ == "MineWithDifficulty" and straight.state.global_step == 5

    def test_first_loss_by_hand(self, straight):
        """Weighted mean over the first four samples, one at a time."""
        model, data, total = make_model(0).double(), samples(), 0.0
        for row, weight in zip(straight.seen[:4], straight.schedule.weight, strict=False):
            with torch.no_grad():
                total += float(weight) * float(score_answers(model, pad_batch([data[row]], 0)).mean_logps)
        assert straight.state.log_history[0]["loss"] == pytest.approx(total / 4, rel=1e-5)

    def test_last_step_is_filled(self, tmp_path):
        trainer = make(tmp_path / "out", per_device_train_batch_size=3, num_train_epochs=1)
        trainer.train()
        assert len(trainer.seen) == 12 and trainer.seen[:10] == numbers(trainer.schedule.order.tolist())
        assert trainer.seen[10:] == trainer.seen[:2]  # the next pass would begin with the easiest again

    def test_a_step_larger_than_the_dataset_is_filled(self, tmp_path):
        trainer = make(
            tmp_path / "out", per_device_train_batch_size=8, gradient_accumulation_steps=4, num_train_epochs=1
        )
        trainer.train()
        assert len(trainer.seen) == 32 and trainer.seen == (trainer.seen[:10] * 4)[:32]
        assert trainer.state.global_step == 1

    @pytest.mark.parametrize(
        "options",
        [
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
        ],
    )
    def test_any_split_is_the_same_run(self, straight, tmp_path, options):
        trainer = make(tmp_path / "out", schedule="hard_to_easy+upweight_hard", **options)
        trainer.train()
        assert trainer.seen == straight.seen
        assert checksum(trainer.model) == pytest.approx(checksum(straight.model), rel=1e-10)

    def test_resume_is_bit_identical(self, straight, tmp_path):
        make(tmp_path / "out", schedule="hard_to_easy+upweight_hard").train()
        again = make(tmp_path / "out", schedule="hard_to_easy+upweight_hard")
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert again.seen == straight.seen[8:]
        assert checksum(again.model) == checksum(straight.model)

    @pytest.mark.subprocess
    def test_two_processes_straight_and_resumed(self, straight, tmp_path):
        for name, more in (("a", []), ("b", [str(tmp_path / "out" / "checkpoint-2")])):
            arguments = [tmp_path / "out", tmp_path / f"{name}.json", 2, 1, *more]
            done = run(SUPPORT / "integration_worker.py", *arguments, processes=2)
            assert done.returncode == 0, done.stdout + done.stderr
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert found["checksum"] == pytest.approx(checksum(straight.model), rel=1e-10)
            pairs = [np.array(part).reshape(-1, 2) for part in found["served"]]
            served = np.stack(pairs, axis=1).reshape(-1).tolist()  # batches are dealt to the processes in turn
            assert served == straight.seen[0 if name == "a" else 8 :]

    def test_weighted_sampling(self, tmp_path):
        class Plain(Mine):
            per_sample_loss = None

        trainer = make(
            tmp_path / "out",
            schedule="upweight_hard",
            weights="sampling",
            num_train_epochs=400,
            kind=Mine,
            save_strategy="no",
            schedule_args={"strength": 1.0},
        )
        counts = np.bincount(numbers(trainer.planned_ids), minlength=N) / 400
        rank = np.argsort(np.argsort(scores()["loss"])) / (N - 1)
        np.testing.assert_allclose(counts, 2 * rank, atol=0.25)
        assert (trainer.schedule.weight <= 2).all() and not trainer._weighted


class TestTRL:
    def test_sft(self, tmp_path):
        """TRL tokenises and drops columns; ids are those that `cud score` would give."""
        tokenizer, seen = make_tokenizer(), []
        raw = Dataset.from_list([{"prompt": f"Who is {i}?", "completion": f" Person {i * 7}"} for i in range(N)])
        table = score_difficulty(make_model(0), raw, tokenizer, metrics=["loss"], progress=False)

        class Watched(SFTTrainer):
            def compute_loss(self, model, inputs, *args, **options):
                seen.extend(tokenizer.decode([t for t in row.tolist() if t > 1]) for row in inputs["input_ids"])
                return super().compute_loss(model, inputs, *args, **options)

        args = SFTConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=5,
            num_train_epochs=2,
            report_to="none",
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = with_difficulty(Watched)(
            make_model(0),
            args,
            train_dataset=raw,
            processing_class=tokenizer,
            difficulty=table,
            schedule="hard_to_easy",
        )
        trainer.train()
        order = np.argsort(-table["loss"], kind="stable")
        assert seen == [raw[int(i)]["prompt"] + raw[int(i)]["completion"] for i in [*order, *order]]

    def test_dpo(self, tmp_path):
        tokenizer = make_tokenizer()
        raw = Dataset.from_list(
            [
                {"id": f"s{i}", "prompt": f"Who is {i}?", "chosen": " Nobody", "rejected": f" Person {i}"}
                for i in range(N)
            ]
        )
        difficulty = np.random.default_rng(0).permutation(N).astype(float)
        table = DifficultyScores([f"s{i}" for i in range(N)], {"loss": difficulty})
        args = DPOConfig(
            str(tmp_path / "out"),
            precompute_ref_log_probs=True,
            per_device_train_batch_size=5,
            num_train_epochs=1,
            report_to="none",
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        seen = []

        class Watched(DPOTrainer):
            def compute_loss(self, model, inputs, *args, **options):
                half = len(inputs["input_ids"]) // 2
                texts = [tokenizer.decode([t for t in row.tolist() if t > 1]) for row in inputs["input_ids"][half:]]
                seen.extend(int(text.split()[2].rstrip("?")) for text in texts)
                return super().compute_loss(model, inputs, *args, **options)

        trainer = with_difficulty(Watched)(
            make_model(0),
            args=args,
            train_dataset=raw,
            processing_class=tokenizer,
            difficulty=table,
            schedule="easy_to_hard",
        )
        trainer.train()
        assert seen == np.argsort(difficulty).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "uniform+per_sample_stop"}, "'per_sample_stop' follows the run: that needs CUDTrainer"),
        ({"schedule": "risk"}, "'risk' weights retain samples, too: that needs CUDTrainer"),
        ({"schedule": "upweight_hard", "kind": Trainer}, "Trainer has no per_sample_loss.*use weights='sampling'"),
        ({"weights": "both"}, "weights must be 'loss' or 'sampling'"),
        ({"difficulty": None}, "needs difficulty scores: give difficulty"),
        ({"schedule": "inverse_mass"}, "circuit_mass"),
        ({"max_steps": 30}, "max_steps is 30, and the plan has 5 steps: set num_train_epochs"),
        ({"num_train_epochs": 1.5}, "must be a whole number of passes, got 1.5"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' would undo the schedule"),
        ({"difficulty": DifficultyScores(["x"], {"loss": np.ones(1)})}, "lack 10 of 10 forget samples"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make(tmp_path / "out", **options)


def test_max_steps_ends_a_plan_earlier(tmp_path, caplog):
    trainer = make(tmp_path / "out", max_steps=2, schedule="easy_to_hard", num_train_epochs=1)
    assert "max_steps ends the run after 2 of the 3 planned steps: 2 of 10 samples are never trained on" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.seen == numbers(trainer.planned_ids)[:8]


def test_scores_from_their_file(tmp_path):
    path = scores().save(tmp_path / "scores.parquet")
    for given in (path, str(path)):
        assert make(tmp_path / "out", difficulty=given).planned_ids == make(tmp_path / "out").planned_ids
    with pytest.raises(ValueError, match="cannot read difficulty scores from .*none.parquet"):
        make(tmp_path / "out", difficulty=tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("metric", "recorded", "warned"),
    [
        ("cud", {"objective": "npo"}, True),
        ("calibration", {"objective": "npo"}, True),
        ("cud", {"objective": "mine"}, False),  # the trainer's name
        ("loss", {"objective": "npo"}, False),  # made without a calibration run
        ("cud", None, False),  # scores of others
    ],
)
def test_scores_for_another_objective_are_named(tmp_path, caplog, metric, recorded, warned):
    provenance = {} if recorded is None else {"calibration": recorded}
    values = np.arange(N, dtype=float)
    given = DifficultyScores(scores().ids, {metric: values}, provenance=provenance)
    make(tmp_path / "out", difficulty=given, schedule="easy_to_hard")
    assert ("calibrated with objective 'npo'; Mine has a loss of its own" in caplog.text) is warned


def test_sample_ids_are_those_of_scores():
    data, tokenizer = qa_dataset(3), make_tokenizer()
    assert sample_ids(data, tokenizer) == prepare_dataset(data, tokenizer)["sample_id"]
    assert sample_ids(data.add_column("id", [7, 8, 9])) == ["7", "8", "9"]
    with pytest.raises(ValueError, match="no column sample_id or id: .* a tokenizer is needed"):
        sample_ids(data)
    with pytest.raises(ValueError, match="the dataset has the id '7' twice"):
        sample_ids(data.add_column("id", [7, 8, 7]))


def test_draws_of_a_dataset_follow_from_seed_and_place():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    draws = []
    for seed, position in ((3, 0), (3, 1), (4, 0), (3, 0)):
        with own_draws(seed, position):
            draws.append(torch.rand(4))
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)  # the generator went on as if nothing had been
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_is_not_weighted(tmp_path):
    """`complete_loss` makes the loss of the step from the weighted mean."""

    class WithRetain(Mine):
        def complete_loss(self, model, inputs, loss):
            self.weighted.append(loss.item())
            return loss + 100

    WithRetain.weighted = []
    trainer = make(tmp_path / "out", schedule="upweight_hard", kind=WithRetain, num_train_epochs=1)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([loss + 100 for loss in WithRetain.weighted], rel=1e-5) and len(logged) == 3


def test_refused_datasets(tmp_path):
    kind = with_difficulty(Mine)

    def build(dataset, **options):
        return kind(make_model(0), arguments(tmp_path / "out"), train_dataset=dataset, data_collator=collate, **options)

    with pytest.raises(ValueError, match="an order needs a dataset with positions, not IterableDataset"):
        build(samples().to_iterable_dataset())
    with pytest.raises(ValueError, match="have no ids to join difficulty by"):
        build(Dataset.from_dict({"number": [1, 2]}))
    with pytest.raises(ValueError, match="ids are 2 for 10 samples"):
        build(samples(), ids=["a", "b"])
    with pytest.raises(ValueError, match="not distinct"):
        build(samples(), ids=["a"] * N)
    with pytest.raises(ValueError, match="needs train_dataset by keyword"):
        kind(make_model(0), arguments(tmp_path / "out"))
    with pytest.raises(TypeError, match="needs a subclass of transformers.Trainer"):
        with_difficulty(dict)
    long = Dataset.from_list([{"prompt": "Who?" * (9 if i == 1 else 1), "completion": " A"} for i in range(3)])
    args = SFTConfig(str(tmp_path / "o"), max_length=8, report_to="none", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="difficulty no longer belongs to them"):
        with_difficulty(SFTTrainer)(
            make_model(0),
            args,
            train_dataset=long.select(range(3)),
            processing_class=make_tokenizer(),
            ids=["a", "b", "c"],
        )


def test_a_loss_of_another_shape(tmp_path):
    class Summed(Mine):
        def per_sample_loss(self, model, inputs):
            return super().per_sample_loss(model, inputs).mean()

    with pytest.raises(ValueError, match="must return one loss per sample, \\(4,\\), not \\(\\)"):
        make(tmp_path / "out", schedule="upweight_hard", kind=Summed).train()
