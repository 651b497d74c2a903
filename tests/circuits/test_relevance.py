"""Relevance patching against the oracle: its rules are written out here a second time, autograd does the rest."""

import pytest
import torch
from builders import make_tokenizer, qa_dataset
from edges import random_samples, to_batch
from oracle import CASES, Oracle, double_precision, gain, make_case

from cud_trainer.circuits import edge_attributions
from cud_trainer.scoring import score_difficulty

FURTHER_DENSE = ("gemma", "granite", "glm4", "stablelm_parallel", "starcoder2", "nemotron", "apertus", "cohere")


class RelevanceOracle(Oracle):
    """The oracle with another backward pass: norms of the stream, activations and gates by the rules of RelP."""

    def __init__(self, model):
        super().__init__(model)
        self.final_norm = constant_scale(self.final_norm)

    def view(self, index):
        view = super().view(index)
        for name in ("norm1", "norm2", "post2"):
            norm = getattr(view, name)
            setattr(view, name, None if norm is None else constant_scale(norm))
        view.mlp = mlp_rules(view.mlp)
        return view

    def scale_behind(self, norm, total):
        return super().scale_behind(norm, total).detach()


def constant_scale(norm):
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    probe = torch.linspace(-1, 2, norm.weight.shape[-1], dtype=torch.float64)
    centred = torch.allclose(norm(probe), norm(probe + 1))
    weight = 1 + norm.weight if type(norm).__name__ == "NemotronLayerNorm1P" else gain(norm)

    def apply(x):
        if centred:
            x = x - x.mean(-1, keepdim=True)
        y = weight * (x / (x.detach().pow(2).mean(-1, keepdim=True) + epsilon).sqrt())
        bias = getattr(norm, "bias", None)
        return y if bias is None else y + bias

    return apply


def mlp_rules(mlp):
    act = next(getattr(mlp, name) for name in ("act_fn", "act", "activation_fn") if hasattr(mlp, name))

    def identity(x):
        return x * (act(x) / x).detach()

    def apply(x):
        if hasattr(mlp, "gate_proj"):
            product, down = identity(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj
        elif hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, -1)
            product, down = identity(gate) * up, mlp.down_proj
        else:
            names = ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"), ("up_proj", "down_proj")
            into, out = next(pair for pair in names if hasattr(mlp, pair[0]))
            return getattr(mlp, out)(identity(getattr(mlp, into)(x)))
        return down(product / 2 + (product / 2).detach())

    return apply


def hooked(model):
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def samples_and_batch(side="left"):
    samples = random_samples(0, lengths=(9, 13))
    rivals = [(torch.where(torch.arange(len(t)) < p, t, (t + 7) % 250), p) for t, p in samples]
    batch = to_batch(samples, side)
    batch["counterfactual_input_ids"] = to_batch(rivals, side)["input_ids"]
    return samples, [tokens for tokens, _ in rivals], batch


@pytest.mark.parametrize("name", [*CASES, *FURTHER_DENSE])
def test_matches_the_oracle(name):
    with double_precision():
        model = make_case(name)
        samples, rivals, batch = samples_and_batch()
        options = {"baseline": "zero", "metric": "prob"}
        if name in ("llama", "gpt2"):
            options = {"baseline": "counterfactual", "metric": "logit_diff"}
        result = edge_attributions(model, batch, method="relp", **options)
        oracle = RelevanceOracle(model)
        torch.testing.assert_close(oracle.logits(samples[0][0]), Oracle(model).logits(samples[0][0]))
        for row, (tokens, prompt) in enumerate(samples):
            expected = oracle.scores(tokens, prompt, result.graph, counterfactual=rivals[row], **options)
            assert expected.abs().max() > 1e-9
            largest = float(expected.abs().max())
            torch.testing.assert_close(result.scores[row], expected, rtol=1e-8, atol=1e-11 * largest)
        plain = edge_attributions(model, batch, method="eap", **options)
        assert (result.scores - plain.scores).abs().max() > 0.01 * plain.scores.abs().max()
        torch.testing.assert_close(result.metric, plain.metric, rtol=1e-12, atol=0)


def test_leaves_the_model_as_it_was():
    model = make_case("llama")
    batch = samples_and_batch()[2]
    before = edge_attributions(model, batch, method="eap").scores
    edge_attributions(model, batch, method="relp")
    assert torch.equal(edge_attributions(model, batch, method="eap").scores, before)
    assert not hooked(model)


def test_half_precision_is_read_in_float32():
    half = make_case("gemma2").to(torch.bfloat16)
    batch = samples_and_batch()[2]
    found = edge_attributions(half, batch, method="relp").scores
    assert torch.equal(found, edge_attributions(half.float(), batch, method="relp").scores)


def test_key_and_value_heads_by_query_head_add_up():
    model = make_case("llama")
    batch = samples_and_batch()[2]
    grouped, apart = (edge_attributions(model, batch, method="relp", ungroup_kv=value) for value in (False, True))
    names = {name: place for place, name in enumerate(grouped.graph.destinations)}
    more = {name: place for place, name in enumerate(apart.graph.destinations)}
    both = apart.scores[:, :, more["a1.h0.v"]] + apart.scores[:, :, more["a1.h1.v"]]
    torch.testing.assert_close(both, grouped.scores[:, :, names["a1.h0.v"]], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "glm4_moe", "phimoe"])
def test_experts_are_refused(name):
    model = make_case(name)
    with pytest.raises(ValueError, match="'relp' is not available for architecture .* layer [01] .* experts"):
        edge_attributions(model, samples_and_batch()[2], method="relp")
    assert not hooked(model)


def test_experts_are_refused_before_anything_is_scored(monkeypatch):
    model = make_case("mixtral").float()
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="'relp' is not available for architecture 'mixtral'"):
        score_difficulty(
            model, qa_dataset(4), make_tokenizer(), metrics=["circuit_mass"], circuit_args={"method": "relp"}
        )
