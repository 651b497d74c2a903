"""Positions: figures do not depend on the rest of the batch; sequences end where positions do."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer
from datasets import Dataset
from runs import make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from cud_trainer import score_difficulty
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import score_answers
from cud_trainer.models.generation import continuations
from cud_trainer.models.positions import check_positions, positions_of

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LONG = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}


def build(model_type, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings})).eval()


def longrope():
    rope = {**LONG, "original_max_position_embeddings": 64}
    return build("phi3", max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope)


def dynamic():
    return make_model(0, max_position_embeddings=64, rope_parameters=DYNAMIC)


def samples(*lengths):
    rows = [{"question": "q" * n, "answer": f"ans {n} " * 2} for n in lengths]
    return Dataset.from_list(rows)


def alone(model, row):
    """Mean log-probability of a sample's answer, by the model's own forward pass."""
    tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])[:, 1:]
    with torch.no_grad():
        logps = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return float(logps[labels != -100].mean())


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_rotary_embeddings_that_follow_the_longest_of_a_batch(make):
    model, tokenizer = make(), make_tokenizer()
    rows = samples(110, 5, 80, 20)
    options = {"metrics": ["loss", "circuit_mass"], "progress": False}
    one, all_ = (score_difficulty(model, rows, tokenizer, batch_size=size, **options) for size in (1, 4))
    for metric in ("loss", "circuit_mass"):
        np.testing.assert_allclose(one[metric], all_[metric], rtol=1e-4)
    expected = []
    for row in prepare_samples(rows, tokenizer, name="forget"):
        model(input_ids=torch.tensor([[1]]))  # one that dynamic NTK starts afresh from
        expected.append(-alone(model, row))
    np.testing.assert_allclose(np.abs(one["loss"]), np.abs(expected), rtol=1e-4)


def roberta():
    return build("roberta", is_decoder=True, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("make", "lengths"), [(longrope, (3, 62, 90)), (dynamic, (3, 62, 90)), (roberta, (3, 20)), (roberta, (3, 61))]
)
def test_what_is_written_does_not_depend_on_the_batch(make, lengths):
    """Whatever is written crosses the length at which frequencies change, and ends with the positions."""
    model = make()
    prompts = [[5 + n % 7, 9, 30][: n % 3] + [40 + n % 5] * (n - n % 3) for n in lengths]
    found = continuations(model, prompts, [5] * len(prompts), stop=[], pad=0, batch_size=4)
    for prompt, written in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(5 if make is not roberta else min(5, 63 - len(prompt))):
            with torch.no_grad():
                model(input_ids=torch.tensor([[1]]))  # one that dynamic NTK starts afresh from
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if make is longrope and len(prompt) == 62:  # its cache keeps keys of before the change
            written, tokens = written[:2], tokens[:64]
        assert written == tokens[len(prompt) :]


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_the_reference_is_the_model_at_the_first_step(make, tmp_path):
    """NPO's loss at a log-ratio of 0 is 2 / beta * log 2, whoever shares the batch."""
    forget = Dataset.from_list([{"question": "q" * n, "answer": f"ans {n}"} for n in (5, 8, 11, 14)])
    retain = Dataset.from_list([{"question": "r" * n, "answer": f"other {n}"} for n in (10, 103, 12, 105)])
    trainer = make_trainer(
        tmp_path / "out",
        model=make(),
        forget=forget,
        retain=retain,
        objective="npo",
        per_device_train_batch_size=2,
        passes=1,
        n_buckets=2,
        learning_rate=0.0,
        save_strategy="no",
    )
    trainer.train()
    losses = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert losses == pytest.approx([2 / 0.1 * np.log(2)] * 2, rel=1e-4)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_the_roberta_family_begin_behind_the_padding_index(model_type, side):
    model = build(model_type, is_decoder=True, max_position_embeddings=64)
    prepared = prepare_samples(samples(3, 9), make_tokenizer(), name="forget")
    batch = prepared.pad([0, 1])
    if side == "left":
        shift = int((batch["attention_mask"][0] == 0).sum())
        for name in batch:
            if batch[name].shape == batch["input_ids"].shape:
                batch[name][0] = batch[name][0].roll(shift)
    with torch.no_grad():
        found = score_answers(model, batch).mean_logps
    np.testing.assert_allclose(found, [alone(model, row) for row in prepared], rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "settings", "limit"),
    [
        ("gpt2", {"n_positions": 64}, 64),
        ("opt", {"max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}, 64),
        ("gptj", {"n_positions": 64, "rotary_dim": 4}, 64),
        ("roberta", {"max_position_embeddings": 64, "is_decoder": True}, 63),
        ("llama", {"max_position_embeddings": 64}, None),
    ],
)
def test_a_sample_beyond_the_positions_is_named(model_type, settings, limit, tmp_path):
    model, tokenizer = build(model_type, **settings), make_tokenizer()
    rows = samples(4, 40).add_column("sample_id", ["short", "long"])
    assert positions_of(model).limit == limit
    if limit is None:
        score_difficulty(model, rows, tokenizer, metrics=["loss"], progress=False)
        return
    for call in (
        lambda: score_difficulty(model, rows, tokenizer, metrics=["loss"], progress=False),
        lambda: make_trainer(tmp_path / "out", model=model, forget=rows, n_buckets=2),
    ):
        with pytest.raises(
            ValueError, match=f"forget sample 'long' has .* tokens, and the model has {limit} positions"
        ):
            call()
    check_positions(model, "forget", ["exact"], [limit])
