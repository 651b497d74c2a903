"""What is loaded is whole: missing, unexpected, misshapen and non-finite weights are named, by every command."""

import shutil

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from command_lines import data, make_world, train
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cud_trainer import score_difficulty
from cud_trainer.cli import main
from cud_trainer.models.loading import load_causal_lm
from cud_trainer.models.whole import LEFT_OUT, check_adapter, check_finite, listed

HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "model"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(root / "adapter")
    make_tokenizer().save_pretrained(root / "adapter")
    return root


def changed(folder, to, change, file="model.safetensors"):
    """A copy of a model folder with other weights in it."""
    shutil.copytree(folder, to)
    weights = load_file(to / file)
    change(weights)
    save_file(weights, to / file, metadata={"format": "pt"})
    return to


def drop_a_layer(weights):
    for key in [key for key in weights if ".layers.1." in key or "layers.1.self" in key]:
        del weights[key]


WRONG = {
    "missing": (drop_a_layer, "lacks weights.*model.layers.1.input_layernorm.weight.* and 6 more"),
    "the head": (lambda weights: weights.pop(HEAD), "lacks weights.*lm_head.weight"),
    "unexpected": (
        lambda weights: weights.update({"model.layers.2.x": torch.zeros(3)}),
        "no place for: model.layers.2.x",
    ),
    "shape": (lambda weights: weights.update({HEAD: torch.zeros(3, 32)}), "another shape.*: lm_head.weight"),
    "nan": (lambda weights: weights[NORM].fill_(float("nan")), "not finite: model.norm.weight"),
    "inf": (lambda weights: weights[HEAD][5].fill_(float("inf")), "not finite: lm_head.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model(world, tmp_path, case):
    change, message = WRONG[case]
    folder = changed(world / "model", tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("tied", [False, True])
def test_whole_models(tmp_path, tied):
    """Tied embeddings stand in the file once, and inputs that a causal LM has no use for are left out."""
    model = make_model(0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    folder = changed(tmp_path / "model", tmp_path / "more", lambda weights: weights.update(
        {"vision_tower.layers.0.weight": torch.zeros(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))  # fmt: skip
    loaded = load_causal_lm(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_causal_lm(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert not LEFT_OUT.search("model.layers.1.self_attn.q_proj.bias")


def test_large_finite_weights_are_numbers():
    model = make_model(0).half()
    model.lm_head.weight.data.fill_(6e4)
    check_finite("large", model)
    assert listed("edcba") == "a, b, c and 2 more" and listed("ba") == "a, b"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "score", "evaluate", "original"])
def test_every_command(world, tmp_path, capsys, command):
    folder = str(changed(world / "model", tmp_path / "model", drop_a_layer))
    out = str(tmp_path / "out")
    lines = {
        "train": [*train(world, out), "--model_name_or_path", folder],
        "score": ["score", *data(world), "--model_name_or_path", folder, "--output", out, "--metrics", "loss",
                  "--bf16", "false", "--use_cpu", "true"],
        "evaluate": ["evaluate", *data(world), "--model_name_or_path", folder, "--output_dir", out, "--generate", "false"],
        "original": ["evaluate", *data(world), "--original_model", folder, "--output_dir", out, "--generate", "false"],
    }  # fmt: skip
    assert main(lines[command]) == 2
    assert "lacks weights, which would be random numbers: model.layers.1." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(next(iter(weights))), "lacks weights"),
        (
            lambda weights: weights.update({"base_model.model.model.layers.7.x": torch.zeros(2)}),
            "no place for.*layers.7.x",
        ),
    ],
)
def test_an_adapter(world, tmp_path, capsys, change, message):
    import re

    command = [
        "evaluate",
        *data(world),
        "--generate",
        "false",
        "--output_dir",
        str(tmp_path / "out"),
        "--model_name_or_path",
    ]
    folder = changed(world / "adapter", tmp_path / "adapter", change, "adapter_model.safetensors")
    assert main([*command, str(folder)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_adapter_that_is_not_finite(world, tmp_path):
    """`cud evaluate` reports on one; whatever trains it further is refused."""
    change = lambda weights: weights[next(iter(weights))].fill_(float("nan"))  # noqa: E731
    folder = str(changed(world / "adapter", tmp_path / "adapter", change, "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="not finite: .*lora_A"):
        check_adapter(folder, AutoPeftModelForCausalLM.from_pretrained(folder))


@pytest.mark.slow
def test_a_whole_adapter(world, tmp_path):
    command = [
        "evaluate",
        *data(world),
        "--generate",
        "false",
        "--output_dir",
        str(tmp_path / "out"),
        "--model_name_or_path",
    ]
    assert main([*command, str(world / "adapter")]) == 0


def test_models_of_ones_own(tmp_path):
    from runs import make_trainer

    model = make_model(0)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite: model.norm.weight"):
        make_trainer(tmp_path / "out", model=model)
    with pytest.raises(ValueError, match="not finite: model.norm.weight"):
        score_difficulty(model, qa_dataset(5), make_tokenizer(), metrics=["loss"])
