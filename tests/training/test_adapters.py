"""Something is trained, and it is what was asked for: adapters on disk and in memory, frozen weights, no gradients."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from runs import checksum, make_trainer
from transformers import AutoModelForCausalLM

from cud_trainer import score_difficulty
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.models.fingerprint import model_fingerprint
from cud_trainer.models.loading import load_causal_lm, load_config, merged_adapter, tokenizer_home

pytestmark = pytest.mark.slow
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PLAIN = {"difficulty": "none", "schedule": "uniform", "passes": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def samples():
    return prepare_samples(qa_dataset(9), make_tokenizer())


@pytest.fixture(scope="module")
def folders(tmp_path_factory, samples):
    """A base model, an adapter on it that is far from it, what the pair says, and what the base alone says."""
    root = tmp_path_factory.mktemp("adapters")
    make_model(0).save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    alone = answer_probability(base, samples)
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).eval()
    model.save_pretrained(root / "adapter")
    return root, answer_probability(model, samples), alone


class TestAdapterFolders:
    def test_it_is_loaded_to_be_trained_further(self, folders, samples, tmp_path):
        root, expected, alone = folders
        trainer = make_trainer(tmp_path / "out", model=str(root / "adapter"), **{**PLAIN, "difficulty": "loss"})
        assert answer_probability(trainer.model, samples) == pytest.approx(expected, rel=1e-5)
        assert np.abs(expected - alone).max() > 1e-4
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained)
        assert np.exp(trainer.difficulty_scores["loss"]) == pytest.approx(expected, rel=1e-5)
        trainer.train()
        assert np.abs(answer_probability(trainer.model, samples) - expected).max() > 1e-6

    def test_a_new_adapter_goes_on_the_merged_one(self, folders, samples, tmp_path):
        root, expected, _ = folders
        trainer = make_trainer(tmp_path / "out", model=str(root / "adapter"), peft_config=LoraConfig(**LORA), **PLAIN)
        assert answer_probability(trainer.model, samples) == pytest.approx(expected, rel=1e-4)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        ends = answer_probability(trainer.model, samples)
        assert np.abs(ends - expected).max() > 1e-6
        for again in (
            load_causal_lm(str(tmp_path / "out")),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"),
        ):
            assert answer_probability(again, samples) == pytest.approx(ends, rel=1e-5)
        make_trainer(
            tmp_path / "out",
            model=str(root / "adapter"),
            peft_config=LoraConfig(**LORA),
            **{**PLAIN, "overwrite": True},
        ).train()

    def test_circuits_are_those_of_the_pair(self, folders, tmp_path):
        root, _, _ = folders
        whole, live = load_causal_lm(str(root / "adapter"), merge_adapter=True), load_causal_lm(str(root / "adapter"))
        assert model_fingerprint(whole) == model_fingerprint(live) != model_fingerprint(make_model(0))
        scores = [
            score_difficulty(m, qa_dataset(6), make_tokenizer(), metrics=["circuit_mass", "loss"], progress=False)
            for m in (whole, live)
        ]
        for metric in ("circuit_mass", "loss"):
            assert scores[0][metric] == pytest.approx(scores[1][metric], rel=1e-3)

    def test_configuration_and_tokenizer_are_those_of_the_base(self, folders):
        root, _, _ = folders
        assert load_config(str(root / "adapter")).model_type == "llama"
        assert tokenizer_home(str(root / "adapter")) == (str(root / "base"), None)
        assert tokenizer_home(str(root / "base")) == (str(root / "base"), None)

    def test_what_cannot_be_merged_is_refused(self):
        tied = make_model(0, tie_word_embeddings=True)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
        with pytest.raises(ValueError, match="cannot be folded into the weights"):
            merged_adapter(get_peft_model(tied, adapter))
        prefix = get_peft_model(make_model(0), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="cannot be folded into the weights"):
            merged_adapter(prefix)

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtype_has_two_names(self, folders, tmp_path, name):
        root, _, _ = folders
        for what in ("base", "adapter"):
            assert load_causal_lm(str(root / what), **{name: "bfloat16"}).dtype == torch.bfloat16
        trainer = make_trainer(
            tmp_path / name, model=str(root / "base"), model_init_kwargs={name: torch.bfloat16}, **PLAIN
        )
        assert trainer.model.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="contradict each other"):
            load_causal_lm(str(root / "base"), dtype="float32", torch_dtype=torch.bfloat16)


def frozen_model():
    model = make_model(0)
    model.requires_grad_(False)
    return model


def frozen_adapter(tmp_path):
    get_peft_model(make_model(0), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(make_model(0), tmp_path / "adapter")


class TestNothingToTrain:
    @pytest.mark.parametrize("difficulty", ["cud", "loss"])
    def test_before_anything_is_computed(self, tmp_path, difficulty, monkeypatch):
        monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", lambda *a, **k: pytest.fail("computed"))
        settings = {**PLAIN, "difficulty": difficulty}
        cases = {
            "no weight of the model takes a gradient": {"model": frozen_model()},
            "An adapter must be loaded to be trained": {"model": frozen_adapter(tmp_path)},
            "inference_mode=True": {"peft_config": LoraConfig(**LORA, inference_mode=True)},
            "the model has an adapter, and peft_config asks for another": {
                "model": get_peft_model(make_model(0), LoraConfig(**LORA)), "peft_config": LoraConfig(**LORA),
            },
            "an adapter on the output layer": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])},
            "Target modules": {"peft_config": LoraConfig(r=2, target_modules=["query"])},
            "of type PROMPT_TUNING are not supported": {
                "peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            },
            "prefix tuning needs gradient_checkpointing=False": {
                "peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            },
            "weights to train are float16": {"model": make_model(0).half()},
        }  # fmt: skip
        for message, options in cases.items():
            with pytest.raises(ValueError, match=message):
                make_trainer(tmp_path / "out", **{**settings, "model": make_model(0), **options})
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_calibration_alone(self):
        with pytest.raises(ValueError, match="no weight of the model takes a gradient"):
            score_difficulty(
                frozen_model(), qa_dataset(6), make_tokenizer(), metrics=["calibration"], folds=3, progress=False
            )

    def test_no_gradient_in_the_first_step(self, tmp_path):
        class Still(torch.autograd.Function):
            @staticmethod
            def forward(context, x):
                return x.clone()

            @staticmethod
            def backward(context, gradient):
                return torch.zeros_like(gradient)

        for where, message in (("norm", "zero in every weight"), (0, "zero in all that layer 0 trains")):
            model = make_model(0)
            module = model.model.norm if where == "norm" else model.model.layers[where]
            module.register_forward_hook(
                lambda module, args, output: Still.apply(output[0] if isinstance(output, tuple) else output)
            )
            lora = LoraConfig(r=2, target_modules=["q_proj"])
            trainer = make_trainer(tmp_path / f"{where}", model=model, peft_config=lora, **PLAIN)
            before = checksum(trainer.model)
            with pytest.raises(ValueError, match=message):
                trainer.train()
            assert checksum(trainer.model) == before

    def test_prefix_tuning_runs_without_checkpointing(self, tmp_path):
        prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        options = {**PLAIN, "objective": "graddiff", "gradient_checkpointing": False, "peft_config": prefix}
        trainer = make_trainer(tmp_path / "out", model=make_model(0), **options)
        assert trainer.train().global_step == 3

    def test_the_model_is_put_back_after_the_check(self, tmp_path):
        model = make_model(0)
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match="output layer"):
            make_trainer(tmp_path / "out", model=model, peft_config=LoraConfig(r=2, target_modules=["lm_head"]))
        assert [name for name, _ in model.named_parameters()] == names
        assert all(parameter.requires_grad for parameter in model.parameters())
