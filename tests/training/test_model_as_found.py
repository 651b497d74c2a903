"""The reference is the model at step 0, and the user's model comes back as it was."""

import copy
import json
import math
import re

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import LoraConfig
from runs import make_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.models.fingerprint import model_fingerprint
from cud_trainer.models.modes import drawing_nothing

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2, "n_embd": 32,
    "n_head": 4, "n_layer": 2, "n_positions": 256, "d_model": 32, "n_heads": 4, "n_layers": 2, "ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def noisy_model(kind: str):
    """A tiny model of that type that draws all it can: every rate of its configuration is 0.4."""
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{name: value for name, value in SMALL.items() if name in known})
    for name, value in vars(config).items():
        if re.search("drop|jitter", name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


# Functional dropout, dropout modules, layers left out, jitter of a router; of each kind some.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "xglm", "phi", "phimoe", "mixtral", "bloom", "gpt_neox"])
def test_nothing_is_drawn_in_training(kind):
    model = noisy_model(kind)
    ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(0))
    settings = copy.deepcopy(model.config.to_dict())

    def said():
        return model(input_ids=ids, use_cache=False).logits.detach()

    expected = said()
    model.train()
    assert (said() - expected).abs().max() > 0.1
    with drawing_nothing(model):
        assert torch.equal(said(), expected)
    assert model.config.to_dict() == settings
    assert (said() - expected).abs().max() > 0.1  # they draw again


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_log_ratio_of_the_first_step_is_zero(tmp_path, adapter):
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4) if adapter else None
    model = make_model(0, attention_dropout=0.5)
    trainer = make_trainer(
        tmp_path / "out", model=model, peft_config=lora, difficulty="none", schedule="uniform", save_strategy="no"
    )
    trainer.train()
    assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(20 * math.log(2), rel=1e-6)
    assert model.config.attention_dropout == 0.5 and model.model.layers[0].self_attn.attention_dropout == 0.5


class Forgetful(nn.Module):
    """A checkpointed layer that draws in a way that no name gives away."""

    gradient_checkpointing = False

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize("options", [{}, {"objective": "graddiff", "schedule": "odds"}], ids=["reference", "odds"])
def test_a_model_that_still_draws_is_refused(tmp_path, options):
    model = make_model(0)
    model.model.norm = nn.Sequential(model.model.norm, Forgetful())
    settings = {"model": model, "difficulty": "none", "schedule": "uniform", **options}
    with pytest.raises(ValueError, match="something else in training mode than in evaluation mode"):
        make_trainer(tmp_path / "out", **settings)


def test_noise_on_embeddings_is_refused_where_a_run_compares(tmp_path):
    for options in ({}, {"objective": "graddiff", "retain_loss": "kl"}, {"objective": "graddiff", "schedule": "odds"}):
        with pytest.raises(ValueError, match="neftune_noise_alpha"):
            make_trainer(tmp_path / "out", neftune_noise_alpha=5.0, **{"schedule": "uniform", **options})
    make_trainer(tmp_path / "out", neftune_noise_alpha=5.0, objective="graddiff", schedule="uniform")


def found(model):
    """What a run might leave on a model."""
    return {
        # saving a model notes its class and dtype
        "config": {
            name: value for name, value in model.config.to_dict().items() if name not in ("architectures", "dtype")
        },
        "flags": {
            name: {key: value for key, value in vars(module).items() if key.endswith(("training", "checkpointing"))}
            for name, module in model.named_modules()
        },
        "forward": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "hooks": len(model.get_input_embeddings()._forward_hooks),
        "flagged": [parameter.requires_grad for parameter in model.parameters()],
    }


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])
def test_the_model_comes_back_as_it_was(tmp_path, options):
    """Also where it is a mixture of experts, whose loss TRL would change, and for a copy of it."""
    config = AutoConfig.for_model("mixtral", **SMALL, router_aux_loss_coef=0.01)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = found(model)
    trainer = make_trainer(
        tmp_path / "out", model=model, passes=1, difficulty="none", schedule="uniform",
        eval_dataset=qa_dataset(2, 200), eval_strategy="steps", eval_steps=2, save_steps=3, **options,
    )  # fmt: skip
    assert found(model) == before
    trainer.train()
    assert found(model) == before
    assert math.isfinite(trainer.evaluate(qa_dataset(2, 200))["eval_loss"])
    assert found(model) == before
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "config.json").read_text())
    assert saved["output_router_logits"] is model.config.output_router_logits is False
    assert saved["use_cache"] is model.config.use_cache is True
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    samples = prepare_samples(qa_dataset(4), make_tokenizer())
    assert answer_probability(zeros, samples) == pytest.approx(1 / 258)


def test_an_adapter_is_trained_under_either_checkpointing(tmp_path):
    ends = {}
    for reentrant in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / f"{reentrant}", model=make_model(0), difficulty="none", schedule="uniform", save_strategy="no",
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        trainer.train()
        ends[reentrant] = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(ends[False], ends[True], strict=True))


def test_a_compiled_model_is_the_model(tmp_path):
    model = make_model(0)
    compiled = torch.compile(model, backend="eager")
    assert model_fingerprint(compiled) == model_fingerprint(model)
    trainer = make_trainer(tmp_path / "out", model=compiled, passes=1, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="float32")
    assert model_fingerprint(again) == model_fingerprint(model)
