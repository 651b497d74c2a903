"""Depth by layer against one sample and one layer at a time, in float64, with neither hooks nor batches."""

import copy

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from every_model import tiny
from peft import LoraConfig, get_peft_model
from tofu import tofu_like
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability, score_answers
from evaluation.metrics import depth as module
from evaluation.metrics.depth import (
    Depth,
    check_layers,
    check_same_architecture,
    depth_of_change,
    holds_answer,
    layer_drops,
    layer_states,
    logit_lens,
    patched_logps,
    unlearning_depth,
)
from evaluation.metrics.gradients import check_gradient_norms, gradient_norms
from evaluation.report.layers import depth_tables, layers_section
from evaluation.report.schema import jsonable

LAYERS = 3


def taught(model, samples, rows, steps, sign=1):
    """`model` after a few steps on the answers of `rows`, up or down."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = samples.pad(list(rows))
    for _ in range(steps):
        optimizer.zero_grad()
        (-sign * score_answers(model, batch).mean_logps.mean()).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def samples():
    return prepare_samples(qa_dataset(6), make_tokenizer())


@pytest.fixture(scope="module")
def models(samples):
    """The original saw all samples, the reference the last three, the unlearned one had three taken away."""
    original = taught(make_model(0, num_hidden_layers=LAYERS).double(), samples, range(6), 25)
    reference = taught(make_model(0, num_hidden_layers=LAYERS).double(), samples, range(3, 6), 25)
    return original, reference, taught(copy.deepcopy(original), samples, range(3), 2, -1)


def through(model, hidden, first=0):
    """States behind every layer from `first` on, of one sequence; plain calls of the layers."""
    inner = model.model
    rotary = inner.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    found = []
    for layer in inner.layers[first:]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        found.append(hidden)
    return found


def by_hand(original, source, tokens, labels):
    """Drop at every layer of one sample."""
    places = torch.tensor([t - 1 for t, label in enumerate(labels) if label != -100])
    tokens = torch.tensor(tokens)

    def said(hidden):
        logps = original.lm_head(original.model.norm(hidden))[0, places].log_softmax(-1)
        return float(logps.gather(1, tokens[places + 1][:, None]).mean())

    with torch.no_grad():
        own = through(original, original.model.embed_tokens(tokens[None]))
        others = through(source, source.model.embed_tokens(tokens[None]))
        drops = []
        for layer in range(LAYERS):
            mixed = own[layer].clone()
            mixed[0, places] = others[layer][0, places]
            drops.append(said(own[-1]) - said([mixed, *through(original, mixed, layer + 1)][-1]))
    return drops


def test_drops_by_hand(models, samples, monkeypatch):
    original, reference, unlearned = models
    for source in (reference, unlearned):
        expected = np.array([by_hand(original, source, row["input_ids"], row["labels"]) for row in samples.measured])
        assert (expected[:3].max(1) > 0.2).all()
        for size in (1, 4, 6):
            np.testing.assert_allclose(layer_drops(original, source, samples, batch_size=size), expected, atol=1e-9)
        monkeypatch.setattr(module, "BATCH_BYTES", 1)  # a layer at a time
        np.testing.assert_allclose(layer_drops(original, source, samples), expected, atol=1e-9)
        monkeypatch.undo()
    np.testing.assert_array_equal(layer_drops(original, original, samples, batch_size=1).round(12), 0)


def test_uds_by_hand(models, samples):
    original, reference, unlearned = models
    d1, d2 = layer_drops(original, reference, samples), layer_drops(original, unlearned, samples)
    for row, found in enumerate(unlearning_depth(d1, d2)):
        kept = [(a, b) for a, b in zip(d1[row], d2[row], strict=True) if a > 0.05]
        if not kept:
            assert np.isnan(found) and not holds_answer(d1)[row]
            continue
        expected = sum(a * min(max(b / a, 0.0), 1.0) for a, b in kept) / sum(a for a, _ in kept)
        assert found == pytest.approx(expected) and holds_answer(d1)[row]
    # the ends of the scale
    assert (unlearning_depth(d1, d1)[:3] == 1).all() and (unlearning_depth(d1, np.zeros_like(d1))[:3] == 0).all()
    assert np.isnan(unlearning_depth(np.array([[0.04, 0.05]]), np.ones((1, 2)))).all()  # no layer holds it
    broken = np.array([[1.0, np.nan], [1.0, 0.0], [1.0, 0.0]])
    found = unlearning_depth(broken, np.array([[1.0, 1.0], [np.nan, 0.0], [0.5, np.nan]]))
    assert np.isnan(found[:2]).all() and found[2] == 0.5  # what is needed of the last one is a number
    assert holds_answer(broken).all()


def test_depth_of_change():
    drops = np.array([[0.0, -1.0, np.log(2)], [0.0, 0.0, 0.0], [np.inf, 50.0, 1e9]])
    np.testing.assert_allclose(depth_of_change(drops), [0.5 / 3, 0.0, 1.0])
    assert Depth(drops).measure == "depth_of_change" and Depth(drops).said.all()
    assert Depth(drops, drops).measure == "uds" and Depth(drops, drops).said.tolist() == [True, False, True]


def test_padding_on_either_side(models, samples):
    original, reference, _ = models
    right = samples.measured.pad([0, 5, 2])
    left = {}
    for name, value in right.items():
        rows = [row.roll(int((mask == 0).sum())) for row, mask in zip(value, right["attention_mask"], strict=True)]
        left[name] = torch.stack(rows)
    assert (left["attention_mask"][:, 0] == 0).any()
    found = [patched_logps(original, batch, layer_states(reference, batch)) for batch in (right, left)]
    torch.testing.assert_close(*found)


def test_modes_dtypes_and_hooks(models, samples):
    original, reference, _ = models
    expected = layer_drops(original, reference, samples)
    dropping = make_model(0, num_hidden_layers=LAYERS, attention_dropout=0.5).double()
    dropping.load_state_dict(original.state_dict())
    dropping.train()
    np.testing.assert_allclose(layer_drops(dropping, reference, samples), expected, atol=1e-9)
    assert dropping.training
    half = copy.deepcopy(reference).bfloat16()
    np.testing.assert_allclose(layer_drops(original, half, samples), expected, atol=0.1)
    single = copy.deepcopy(original).float()
    np.testing.assert_allclose(layer_drops(single, half, samples), expected, atol=0.1)
    assert not any(part._forward_hooks for model in models for part in model.modules())
    assert not any("forward" in vars(part) for part in original.modules())


def test_adapters_are_as_their_merged_model(models, samples):
    original, reference, _ = models
    options = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(original), options).double().eval()
    both = [layer_drops(original, adapted, samples), layer_drops(adapted, reference, samples)]
    read, norms = logit_lens(adapted, samples), gradient_norms(adapted, samples)
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(both[0], layer_drops(original, merged, samples), atol=1e-9)
    np.testing.assert_allclose(both[1], layer_drops(merged, reference, samples), atol=1e-9)
    np.testing.assert_allclose(read, logit_lens(merged, samples), atol=1e-12)
    np.testing.assert_allclose(norms, gradient_norms(merged, samples), rtol=1e-9)


def test_refusals(models):
    original = models[0]
    check_same_architecture(original, models[1].config)
    with pytest.raises(ValueError, match="'x' has another architecture .*num_hidden_layers 2 and 3"):
        check_same_architecture(original, make_model(0), "'x'")
    with pytest.raises(ValueError, match="hidden_size 64 and 32"):
        check_same_architecture(original, make_model(0, num_hidden_layers=LAYERS, hidden_size=64))
    with pytest.raises(ValueError, match="model_type gpt2 and llama"):
        check_same_architecture(original, GPT2Config(n_layer=LAYERS, n_embd=32))


def test_logit_lens_by_hand(models, samples):
    original = models[0]
    found = logit_lens(original, samples, batch_size=4)
    for row, sample in enumerate(samples.measured):
        tokens = torch.tensor(sample["input_ids"])
        places = torch.tensor([t - 1 for t, label in enumerate(sample["labels"]) if label != -100])
        with torch.no_grad():
            states = through(original, original.model.embed_tokens(tokens[None]))
            for layer, hidden in enumerate(states):
                logps = original.lm_head(original.model.norm(hidden))[0, places].log_softmax(-1)
                expected = logps.gather(1, tokens[places + 1][:, None]).mean().exp()
                assert found[row, layer] == pytest.approx(float(expected))


TINY = dict(vocab_size=258, pad_token_id=0, eos_token_id=1, bos_token_id=1)


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        (GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=256, **TINY), "transformer.ln_f"),
        (
            Gemma2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                final_logit_softcapping=1.0,  # a cap behind the head
                **TINY,
            ),
            "model.norm",
        ),
    ],
)
def test_other_architectures(config, norm, samples):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    other = AutoModelForCausalLM.from_config(config).double().eval()
    found = logit_lens(model, samples)
    np.testing.assert_allclose(found[:, -1], answer_probability(model, samples), rtol=1e-9)
    batch = samples.measured.pad([0])
    with torch.no_grad():
        first = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
        logits = model.get_output_embeddings()(model.get_submodule(norm)(first.hidden_states[1]))
        if config.model_type == "gemma2":
            logits = torch.tanh(logits)
        labels = batch["labels"][0, 1:]
        logps = logits[0, :-1].log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])
    assert found[0, 0] == pytest.approx(float(logps.mean().exp()))
    drops = layer_drops(model, other, samples)
    assert np.isfinite(drops).all() and (layer_drops(model, model, samples, batch_size=2).round(12) == 0).all()
    # at the last layer the states of the other model are read by this one's head
    expected = np.log(answer_probability(model, samples)) - drops[:, -1]
    with torch.no_grad():
        hidden = layer_states(other, batch)[-1]
        logits = model.get_output_embeddings()(model.get_submodule(norm)(hidden))[0]
        if config.model_type == "gemma2":
            logits = torch.tanh(logits)
    assert expected[0] == pytest.approx(float(logits.log_softmax(-1).gather(1, labels[labels != -100][:, None]).mean()))


@pytest.mark.parametrize("model_type", ["openai-gpt", "gpt_neox", "mixtral", "opt", "bloom", "cohere2"])
def test_whatever_layers_hand_on(model_type, samples):
    """Tuples, lists, tensors; more behind the last layer than a norm and a head."""
    model = tiny(model_type)
    np.testing.assert_allclose(logit_lens(model, samples)[:, -1], answer_probability(model, samples), rtol=1e-4)
    np.testing.assert_allclose(layer_drops(model, model, samples, batch_size=4), 0, atol=1e-4)


def test_layers_that_hand_on_something_else(samples):
    with pytest.raises(ValueError, match="'x': layers of xlnet models hand on states of shape"):
        check_layers(tiny("xlnet"), "x", samples)


def test_gradient_norms_by_hand(samples):
    model = make_model(0).double()
    found = gradient_norms(model, samples, batch_size=4)
    for row in range(len(samples)):
        model.zero_grad()
        (-score_answers(model, samples.measured.pad([row])).mean_logps.sum()).backward()
        squares = [float(p.grad.square().sum()) for p in model.parameters() if p.ndim > 1]
        assert found[row] == pytest.approx(sum(squares) ** 0.5)
    check_gradient_norms(model, "x")
    model.odd = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="gradient_norm cannot be measured on 'x': odd belongs to no linear map"):
        check_gradient_norms(model, "x")


def test_what_the_report_shows():
    """Samples of which UDS says nothing are left out and counted; one that is no number is told."""
    reference = np.array([[1.0, 0.0], [0.01, 0.0], [1.0, 1.0], [2.0, 0.1]])
    unlearned = np.array([[0.5, 0.0], [9.0, 9.0], [1.0, 0.0], [2.0, 0.1]])
    found = Depth(unlearned, reference)
    readable = {"unlearned": np.arange(4.0) / 4, "original": None}
    tables, findings = depth_tables(found, readable, None, ["b", "a", "a", "b"], 0)
    plain = {table.id: {row.label: jsonable(row.cells) for row in table.rows} for table in tables}
    assert plain["depth"]["UDS"][0] == 3
    assert plain["depth"]["UDS"][1]["value"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert plain["depth"]["logit lens, unlearned"][1]["value"] == pytest.approx(0.375)
    assert list(plain["depth_groups"]) == ["a", "b"]  # 0.5 before 0.75
    assert plain["depth_groups"]["a"][0] == 2 and plain["depth_groups"]["a"][1]["value"] == 0.5
    assert findings[0].startswith("UDS 0.667 [") and "over 3 samples" in findings[0]
    nothing = depth_tables(Depth(unlearned[1:2], reference[1:2]), {}, None, None, 0)[0][0].rows[0].cells
    assert nothing[0] == 0 and "no layer holds" in nothing[1].reason
    broken, said = depth_tables(Depth(np.full((2, 2), np.nan), np.ones((2, 2))), {}, None, None, 0)
    assert broken[0].rows[0].cells[1].reason == "2 of 2 are not finite" and not said
    assert "depth of change" in depth_tables(Depth(unlearned), {}, None, None, 0)[1][0]
    assert depth_tables(None, {"unlearned": None}, None, None, 0) == ([], [])
    section = jsonable(layers_section({"unlearned": np.array([[0.1, 0.2], [0.3, 0.4]])}, found, 0))
    assert [value["value"] for value in section["lens"][0]["values"]] == pytest.approx([0.2, 0.3])
    assert [len(section[kind]) for kind in ("lens", "drops")] == [1, 2] and section["count"] == 2
    assert layers_section({"unlearned": None}, None, 0) is None


def test_lens_of_text_with_several_lengths():
    """Rows of very different length share a batch."""
    data = prepare_samples(tofu_like(3), make_tokenizer())
    model = make_model(0).double()
    alone = np.concatenate([logit_lens(model, data.select([row])) for row in range(3)])
    np.testing.assert_allclose(logit_lens(model, data, batch_size=3), alone, rtol=1e-9)
