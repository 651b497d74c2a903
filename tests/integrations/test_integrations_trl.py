"""`with_difficulty` with what people use it with: KTO, and adapters on TRL's and their own trainers."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from cud_trainer import DifficultyScores, with_difficulty
from cud_trainer.data import pad_batch, prepare_dataset
from cud_trainer.logprobs import score_answers

N = 8
IDS = [f"s{i}" for i in range(N)]
DIFFICULTY = np.random.default_rng(0).permutation(N).astype(float)
SCORES = DifficultyScores(IDS, {"loss": DIFFICULTY})
EASY_TO_HARD = np.argsort(DIFFICULTY).tolist()
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def texts(tokenizer, rows) -> list[str]:
    return [tokenizer.decode([token for token in row.tolist() if token > 1]) for row in rows]


def only_the_adapter_has_moved(model, start) -> bool:
    """Whether the weights under the adapter are those of `start`, and the adapter is no longer zero."""
    own = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    base = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.named_parameters()}
    kept = all(torch.equal(base[name], value) for name, value in start.named_parameters())
    return kept and bool(own) and all(value.abs().sum() > 0 for value in own.values())


class TestKTO:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """KTO loads its reference model from where the model came from."""
        folder = tmp_path_factory.mktemp("model")
        make_model(0).save_pretrained(folder)
        return folder

    @staticmethod
    def build(folder, output, seen, peft_config=None, **options):
        tokenizer = make_tokenizer()

        class Watched(KTOTrainer):
            def compute_loss(self, model, inputs, *args, **options):
                pairs = [texts(tokenizer, inputs[key]) for key in ("input_ids", "KL_input_ids") if key in inputs]
                seen.append(pairs)
                return super().compute_loss(model, inputs, *args, **options)

        data = Dataset.from_list(
            [
                {"id": IDS[i], "prompt": f"Who is {i}?", "completion": f" Person {i}", "label": bool(i % 2)}
                for i in range(N)
            ]
        )
        return with_difficulty(Watched)(
            AutoModelForCausalLM.from_pretrained(folder),
            args=KTOConfig(str(output), **{**SETTINGS, **options}),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config,
            difficulty=SCORES,
            schedule="easy_to_hard",
        )

    @pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
    def test_pairs_are_those_of_the_batch(self, folder, tmp_path, lora):
        """The order is the schedule's, and every prompt is mismatched with a completion of its own batch."""
        seen = []
        trainer = self.build(folder, tmp_path, seen, LoraConfig(**LORA) if lora else None)
        trainer.train()
        order = EASY_TO_HARD * 2
        expected = [order[start : start + 4] for start in range(0, 2 * N, 4)]
        assert [batch[0] for batch in seen] == [[f"Who is {i}? Person {i}" for i in rows] for rows in expected]
        assert [batch[1] for batch in seen] == [
            [f"Who is {i}? Person {j}" for i, j in zip(rows, [rows[-1], *rows[:-1]], strict=True)] for rows in expected
        ]
        assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
        assert only_the_adapter_has_moved(trainer.model, make_model(0)) if lora else True

    def test_a_loss_without_pairs(self, folder, tmp_path):
        seen = []
        trainer = self.build(
            folder, tmp_path, seen, loss_type="apo_zero_unpaired", precompute_ref_log_probs=True, num_train_epochs=1
        )
        trainer.train()
        assert [text for batch in seen for text in batch[0]] == [f"Who is {i}? Person {i}" for i in EASY_TO_HARD]
        assert all(len(batch) == 1 for batch in seen)

    def test_a_reference_of_other_pairs_is_refused(self, folder, tmp_path):
        with pytest.raises(ValueError, match="precompute_ref_log_probs is not supported with KTO"):
            self.build(folder, tmp_path, [], precompute_ref_log_probs=True)


def test_dpo_with_lora(tmp_path):
    """The reference is the model without its adapter: nothing has to be precomputed."""
    tokenizer, seen = make_tokenizer(), []

    class Watched(DPOTrainer):
        def compute_loss(self, model, inputs, *args, **options):
            rejected = inputs["input_ids"][len(inputs["input_ids"]) // 2 :]
            seen.extend(int(text.split()[2].rstrip("?")) for text in texts(tokenizer, rejected))
            return super().compute_loss(model, inputs, *args, **options)

    data = Dataset.from_list(
        [{"id": IDS[i], "prompt": f"Who is {i}?", "chosen": " Nobody", "rejected": f" Person {i}"} for i in range(N)]
    )
    trainer = with_difficulty(Watched)(
        make_model(0),
        args=DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
        difficulty=SCORES,
        schedule="hard_to_easy",
    )
    trainer.train()
    assert seen == EASY_TO_HARD[::-1] * 2
    assert isinstance(trainer.model, PeftModel) and only_the_adapter_has_moved(trainer.model, make_model(0))


def test_own_trainer_with_lora(tmp_path):
    """Order and weights of a plain subclass on a model that already has an adapter; the first loss by hand."""

    class Ascent(Trainer):
        def per_sample_loss(self, model, inputs):
            numbers.extend(inputs.pop("number").tolist())
            return score_answers(model, inputs).mean_logps

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.per_sample_loss(model, inputs).mean()

    numbers, tokenizer = [], make_tokenizer()
    data = prepare_dataset(qa_dataset(N), tokenizer).add_column("number", list(range(N)))
    scores = DifficultyScores(list(data["sample_id"]), {"loss": DIFFICULTY})
    trainer = with_difficulty(Ascent)(
        get_peft_model(make_model(0), LoraConfig(**LORA)),
        TrainingArguments(str(tmp_path), logging_steps=1, remove_unused_columns=False, **SETTINGS),
        train_dataset=data,
        data_collator=lambda rows: {**pad_batch(rows, 0), "number": torch.tensor([row["number"] for row in rows])},
        difficulty=scores,
        schedule="easy_to_hard+upweight_hard",
    )
    weight = trainer.schedule.weight[:4]
    with torch.no_grad():  # the adapter starts at zero
        alone = [float(score_answers(make_model(0), pad_batch([data[i]], 0)).mean_logps) for i in EASY_TO_HARD[:4]]
    trainer.train()
    assert numbers == EASY_TO_HARD * 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(np.mean(weight * alone)), rel=1e-4)
    assert weight[0] < weight[3] and only_the_adapter_has_moved(trainer.model, make_model(0))


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_with_a_sampler_of_their_own(tmp_path, trainer, config):
    """They shuffle unless they are told not to: then every prompt comes once for each completion, as planned."""
    make_model(0).save_pretrained(tmp_path / "model")  # RLOO loads its reference model from there
    prompts = Dataset.from_list([{"prompt": f"Q{i:02d}?", "sample_id": f"s{i}"} for i in range(N)])
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(prompts)
        return [float(len(text)) for text in completions]

    def build(**options):
        generation = {"num_generations": 2, "max_completion_length": 2, "gradient_checkpointing": False, "seed": 1}
        return with_difficulty(trainer)(
            str(tmp_path / "model"),
            args=config(str(tmp_path / "out"), **{**SETTINGS, **generation, "num_train_epochs": 1, **options}),
            reward_funcs=reward,
            train_dataset=prompts,
            processing_class=make_tokenizer(),
            difficulty=SCORES,
            schedule="easy_to_hard",
        )

    with pytest.raises(ValueError, match=r"sampler of its own: at place \d .* is planned; set shuffle_dataset=False"):
        build().train()
    assert not seen
    build(shuffle_dataset=False).train()
    assert seen[::2] == seen[1::2] == [f"Q{i:02d}?" for i in EASY_TO_HARD]
