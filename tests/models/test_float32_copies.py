"""Models in half precision are read in float32 where figures are made: what a memorised answer needs."""

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from cud_trainer.circuits import edge_attributions
from cud_trainer.data import prepare_samples
from cud_trainer.difficulty.gradients import mean_gradient, sample_gradients
from cud_trainer.difficulty.noise import noise_effects
from cud_trainer.difficulty.outputs import output_features
from cud_trainer.logprobs import answer_probability, score_answers
from cud_trainer.models import precision
from cud_trainer.models.precision import can_be_exact, exact


@pytest.fixture(scope="module")
def samples():
    return prepare_samples(qa_dataset(16), make_tokenizer())


@pytest.fixture(scope="module")
def by_heart(samples):
    """Weights of a tiny model that gives its 16 answers a probability near 1."""
    model = make_model(0, hidden_size=64, intermediate_size=128)
    batch = samples.pad(list(range(len(samples))))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(200):
        loss = -score_answers(model, batch).mean_logps.mean()
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def in_bfloat16(model, back=False):
    copy = make_model(0, hidden_size=64, intermediate_size=128)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    return copy.float() if back else copy


def test_scores_rank_as_in_float32_on_a_model_that_knows_its_answers(by_heart, samples):
    batch = samples.pad(list(range(len(samples))))
    half, rounded = in_bfloat16(by_heart), in_bfloat16(by_heart, back=True)
    full = answer_probability(by_heart, samples)
    assert full.min() > 0.9
    found = answer_probability(half, samples)
    np.testing.assert_allclose(found, answer_probability(rounded, samples), rtol=1e-6)
    assert spearmanr(found, full).statistic > 0.95  # what rounding the weights does; none of it is the computation's
    with torch.no_grad():  # what the same model answers in bfloat16
        plain = score_answers(half, batch).mean_logps
    assert abs(plain.numpy() / np.log(found) - 1).max() > 0.01
    edges = {name: edge_attributions(model, batch).edges for name, model in (("full", by_heart), ("half", half))}
    for a, b in zip(edges["full"], edges["half"], strict=True):
        assert spearmanr(a.abs(), b.abs()).statistic > 0.95
    torch.testing.assert_close(edges["half"], edge_attributions(rounded, batch).edges)


def test_every_figure_is_that_of_float32_weights(by_heart, samples):
    batch = samples.pad([0, 3, 5])
    half, rounded = in_bfloat16(by_heart), in_bfloat16(by_heart, back=True)
    figures = {
        "outputs": lambda model: output_features(model, batch)["margin"],
        "gradients": lambda model: sample_gradients(model, batch)["squares"],
        "noise": lambda model: noise_effects(model, batch, sigma=0.01, draws=1, seed=0)["deviation"],
    }
    for name, figure in figures.items():
        with torch.no_grad() if name != "gradients" else torch.enable_grad():
            torch.testing.assert_close(figure(half), figure(rounded), rtol=1e-4, atol=1e-7, msg=name)
    for found, expected in zip(mean_gradient(half, [batch]), mean_gradient(rounded, [batch]), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=1e-6)  # kept as wide as the weight


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj"]))])
def test_the_model_comes_back_as_it_was(wrap, samples):
    model = wrap(make_model(0, tie_word_embeddings=True).bfloat16())
    before = {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()}
    buffers = {name: value.dtype for name, value in model.named_buffers()}
    with exact(model):
        assert answer_probability(model, samples).all()
    with exact(model), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]))
    assert {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()} == before
    assert {name: value.dtype for name, value in model.named_buffers()} == buffers
    assert not any("forward" in vars(module) for module in model.modules())


def test_autograd_keeps_weights_in_place_of_their_copies(samples, monkeypatch):
    kept = []

    class View(precision._View):
        def __init__(self, weight, *view):
            super().__init__(weight, *view)
            kept.append(weight.data_ptr())

    monkeypatch.setattr(precision, "_View", View)
    batch, model, wide = samples.pad([0, 1]), make_model(0).bfloat16(), make_model(0).bfloat16().float()
    with exact(model):
        loss = score_answers(model, batch).mean_logps.sum()
        matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert {weight.data_ptr() for weight in matrices} <= {*kept}
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(score_answers(wide, batch).mean_logps.sum(), list(wide.parameters()))
    for found, right in zip(gradients, expected, strict=True):  # rounded to the dtype of the weight
        torch.testing.assert_close(found.float(), right, rtol=0.01, atol=1e-5)


def test_what_cannot_be_exact_stays_as_it_is(samples):
    model = make_model(0).bfloat16()
    assert can_be_exact(model) and can_be_exact(make_model(0)) and can_be_exact(make_model(0).double())
    model.config._attn_implementation = "flash_attention_2"
    assert not can_be_exact(model)
    weights = [parameter.dtype for parameter in model.parameters()]
    with exact(model):
        assert [parameter.dtype for parameter in model.parameters()] == weights
        assert not any("forward" in vars(module) for module in model.modules())
