"""Descriptions that users register: verified at once, from Python or from a file."""

import pytest
import torch
from builders import make_model
from edges import random_samples, to_batch
from transformers import AutoConfig, AutoModelForCausalLM

from cud_trainer.circuits import (
    ARCHITECTURES,
    Architecture,
    check_architecture,
    edge_attributions,
    register_architecture,
    run_description,
    verify_architecture,
)
from cud_trainer.logprobs import score_answers
from cud_trainer.scoring import check_metrics

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}


def tiny(model_type, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings})).eval()


def test_a_wrong_description_is_refused_when_it_is_registered():
    for model_type, wrong, message in (
        ("phi3", Architecture(), r"'phi3' does not fit: no qkv \(layer.self_attn.q_proj\)"),
        (
            "qwen2",
            Architecture(qkv=("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")),
            "'qwen2' does not fit",
        ),
        (
            "olmo2",
            Architecture(attention_norm=None, mlp_norm=None),
            r"'olmo2' does not fit .*off by [\d.]+ of the largest",
        ),
    ):
        del ARCHITECTURES[model_type]
        with pytest.raises(ValueError, match=message):
            register_architecture(model_type, wrong)
        assert model_type not in ARCHITECTURES


def test_a_wrong_description_is_refused_when_a_model_is_first_used():
    """What the default sizes of a type hide: Granite multiplies with numbers that are 1 by default."""
    model, batch = tiny("granite", **MULTIPLIERS), to_batch(random_samples(0))
    ARCHITECTURES["granite"] = Architecture()
    with pytest.raises(ValueError, match=r"edges out of the embedding do not add up to what autograd says \(off by"):
        edge_attributions(model, batch)
    ARCHITECTURES["granite"] = Architecture(embedding_scale=3.0, residual_scale=0.5)
    edge_attributions(model, batch)


@pytest.mark.parametrize("model_type", ["granite", "smollm3", "gpt_oss"])
def test_edges_of_the_embedding_add_up_to_its_gradient(model_type):
    """For the zero baseline they are -<e, dM/de>, whatever is behind."""
    extra = MULTIPLIERS if model_type == "granite" else {"num_local_experts": 4} if model_type == "gpt_oss" else {}
    model, batch = tiny(model_type, pad_token_id=0, **extra), to_batch(random_samples(0), "left")
    found = edge_attributions(model, batch, metric="logprob").scores[:, 0].sum(-1)
    inputs = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    objective = score_answers(model, batch, inputs_embeds=inputs).mean_logps.sum()
    (gradient,) = torch.autograd.grad(objective, inputs)
    expected = -(gradient * inputs * batch["attention_mask"][..., None]).sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_is_verified_once(monkeypatch):
    from cud_trainer.circuits import verification

    seen, verify = [], verification._verify
    monkeypatch.setattr(verification, "_verify", lambda *a, **k: (seen.append(1), verify(*a, **k)))
    model, batch = make_model(0), to_batch(random_samples(0))
    for _ in range(2):
        edge_attributions(model, batch)
    assert len(seen) == 1


def test_text_models_inside_others():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**SIZES, "model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 28}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "projection_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    eyes = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    torch.manual_seed(0)
    for model in (
        LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=257)),
        Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config={**SIZES, "rope_parameters": rope, "vocab_size": 258}, vision_config=eyes)
        ),
    ):
        check_architecture(model)
        verify_architecture(model.eval())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "deepseek_v3",
            r"'cud_top_k' needs circuits, .*'deepseek_v3': its queries.*\(MLA\)\. Metrics that need none: loss, .*, cud",
        ),
        ("qwen3_next", "linear attention"),
        ("opt", "'opt'; available: .*--architecture. Metrics that need none"),
    ],
)
def test_what_works_without_circuits_is_said(model_type, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(["loss", "cud_top_k"], {}, AutoConfig.for_model(model_type))
    check_metrics(["loss", "cud"], {}, AutoConfig.for_model(model_type))
    with pytest.raises(ValueError, match="metric 'cud' needs circuits"):
        check_metrics(["cud"], {"cud": {"features": ["edges"]}}, AutoConfig.for_model(model_type))


def test_a_file_of_descriptions(tmp_path):
    from cud_trainer.commands.options import ScoreArguments

    path = tmp_path / "mine.py"
    path.write_text(
        "from cud_trainer.circuits import Architecture, register_architecture\n"
        "register_architecture('my_own', Architecture(mlp='ffn'))\n"
    )
    for _ in range(2):  # every command may read its options more than once
        ScoreArguments(architecture=str(path))
    assert ARCHITECTURES["my_own"].mlp == "ffn"
    for text, message in (("1 / 0", "division by zero"), ("x = 1", "calls register_architecture for no model type")):
        other = tmp_path / f"{len(message)}.py"
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_description(other)
    with pytest.raises(ValueError, match="no file"):
        run_description(tmp_path / "none.py")


def test_parts_that_no_gradient_reaches_are_named():
    """As with quantised weights on devices whose kernels have no backward pass."""
    model = make_model(0)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: WithoutGradient.apply(forward(x))
    with pytest.raises(
        ValueError, match="no gradient reaches what attention and MLP of layer 1 read \\(1 of 2 layers\\)"
    ):
        edge_attributions(model, to_batch(random_samples(0)))


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return None
