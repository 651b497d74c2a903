"""Edge attribution against a brute-force oracle: the forward pass written out so that every destination reads its own
copy of every source's output, and autograd gives each edge's gradient directly."""

import pytest
import torch
from builders import make_model
from edges import random_samples, to_batch
from torch.nn.functional import silu
from transformers import AutoConfig
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from cud_trainer.circuits import Graph, edge_attributions

ARCHITECTURES = {
    "llama": (modeling_llama, "Llama"),
    "mistral": (modeling_mistral, "Mistral"),
    "qwen2": (modeling_qwen2, "Qwen2"),
    "qwen3": (modeling_qwen3, "Qwen3"),
}


@pytest.fixture(autouse=True)
def double_precision_parts(monkeypatch):
    """The library's RMSNorm and rotary embedding compute in float32 whatever the model's dtype."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        angles = position_ids[..., None].to(x.dtype) * inverse_frequencies(self.config, x.dtype)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    for module, name in ARCHITECTURES.values():
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", rotary)


def inverse_frequencies(config, dtype):
    theta = config.rope_parameters["rope_theta"]
    width = head_width(config)
    return theta ** (-torch.arange(0, width, 2, dtype=dtype) / width)


def head_width(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Oracle:
    """A forward pass of the Llama family from the model's weights in which edge (u, v) is a tensor of its own."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def norm(self, module, x):
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def rotate(self, x):
        angles = torch.arange(len(x), dtype=x.dtype)[:, None] * inverse_frequencies(self.config, x.dtype)
        half = x.shape[-1] // 2
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def run(self, embeddings):
        """`(source outputs by name, {(u, v): copy of u's output read by v}, logits)`, `embeddings [T, d]`."""
        config, decoder = self.config, self.model.model
        width, groups = head_width(config), config.num_attention_heads // config.num_key_value_heads
        outputs, edges = {"input": embeddings}, {}

        def read(destination):
            total = 0
            for name, value in outputs.items():
                edges[name, destination] = value + torch.zeros_like(value).requires_grad_()
                edges[name, destination].retain_grad()
                total = total + edges[name, destination]
            return total

        def project(attention, name, rows, x):
            linear, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
            out = x @ linear.weight[rows].T + (0 if linear.bias is None else linear.bias[rows])
            return out if norm is None else self.norm(norm, out)

        for index, layer in enumerate(decoder.layers):
            attention, new = layer.self_attn, {}
            keys, values = [], []
            for group in range(config.num_key_value_heads):
                rows = slice(group * width, (group + 1) * width)
                k_in = self.norm(layer.input_layernorm, read(f"a{index}.h{group}.k"))
                v_in = self.norm(layer.input_layernorm, read(f"a{index}.h{group}.v"))
                keys.append(self.rotate(project(attention, "k", rows, k_in)))
                values.append(project(attention, "v", rows, v_in))
            for head in range(config.num_attention_heads):
                rows = slice(head * width, (head + 1) * width)
                q_in = self.norm(layer.input_layernorm, read(f"a{index}.h{head}.q"))
                query = self.rotate(project(attention, "q", rows, q_in))
                scores = query @ keys[head // groups].T / width**0.5
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
                new[f"a{index}.h{head}"] = pattern @ values[head // groups] @ attention.o_proj.weight[:, rows].T
            outputs.update(new)
            x = self.norm(layer.post_attention_layernorm, read(f"m{index}"))
            gated = silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)
            outputs[f"m{index}"] = gated @ layer.mlp.down_proj.weight.T
        logits = self.norm(decoder.norm, read("logits")) @ self.model.lm_head.weight.T
        return outputs, edges, logits

    def scores(self, tokens, prompt, graph, points, metric):
        embeddings = self.model.model.embed_tokens(tokens).detach()
        result = torch.zeros(len(graph.sources), len(graph.destinations), dtype=embeddings.dtype)
        clean = {name: value.detach() for name, value in self.run(embeddings)[0].items()}
        for alpha in points:
            _, edges, logits = self.run(alpha * embeddings)
            logps = logits.log_softmax(-1)[prompt - 1 : -1]
            mean = logps.gather(-1, tokens[prompt:, None]).mean()
            (mean.exp() if metric == "prob" else mean).backward()
            for (source, destination), value in edges.items():
                cell = graph.sources.index(source), graph.destinations.index(destination)
                result[cell] += -(clean[source] * value.grad).sum() / len(points)
        return result


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("metric", ["prob", "logprob"])
def test_matches_oracle(side, method, metric):
    model = make_model(3).double().requires_grad_(False)
    samples = random_samples(0)
    result = edge_attributions(model, to_batch(samples, side), method=method, steps=3, metric=metric)
    points = [1.0] if method == "eap" else [1 / 3, 2 / 3, 1.0]
    assert result.scores.dtype == torch.float64
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(model).scores(tokens, prompt, result.graph, points, metric)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(result.scores[row], expected, rtol=1e-9, atol=1e-12 * expected.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"attention_bias": True},
        {"tie_word_embeddings": True, "num_hidden_layers": 3},
    ],
    ids=["multi-head", "multi-query, wide heads", "biases", "tied, 3 layers"],
)
def test_matches_oracle_on_variants(settings):
    model = make_model(4, **settings).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # initialised to zero, which would hide them
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.bias"):
            parameter.zero_()  # belongs to no head; the oracle leaves it out
    samples = random_samples(1, lengths=(7, 11))
    result = edge_attributions(model, to_batch(samples), method="eap-ig", steps=2)
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(model).scores(tokens, prompt, result.graph, [0.5, 1.0], "prob")
        torch.testing.assert_close(result.scores[row], expected, rtol=1e-9, atol=1e-12 * expected.abs().max())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("ungroup_kv", [False, True])
def test_matches_oracle_on_every_architecture(architecture, ungroup_kv):
    module, name = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(
        architecture,
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **({} if architecture == "qwen2" else {"head_dim": 12}),
    )
    torch.manual_seed(0)
    model = getattr(module, f"{name}ForCausalLM")(config).double().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.requires_grad_(False)
    samples = random_samples(3, lengths=(7, 11))
    result = edge_attributions(model, to_batch(samples, "left"), method="eap-ig", steps=2, ungroup_kv=ungroup_kv)
    grouped = Graph(2, 4, 2)
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(model).scores(tokens, prompt, grouped, [0.5, 1.0], "prob")
        found = result.scores[row]
        if ungroup_kv:
            found = torch.stack(
                [
                    found[:, [i for i, d in enumerate(result.graph.destinations) if ungrouped_name(d, 2) == name]].sum(
                        1
                    )
                    for name in grouped.destinations
                ],
                dim=1,
            )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


def ungrouped_name(destination, group_size):
    """The grouped destination that an ungrouped one belongs to."""
    if destination[-2:] not in (".k", ".v"):
        return destination
    layer, head, part = destination.split(".")
    return f"{layer}.h{int(head[1:]) // group_size}.{part}"


def test_invalid_edges_are_exactly_zero_and_all_valid_edges_score():
    result = edge_attributions(make_model(0).double(), to_batch(random_samples(2)))
    assert (result.scores[:, ~result.graph.mask] == 0).all()
    assert (result.scores[:, result.graph.mask] != 0).all()
    assert result.edges.shape == (3, result.graph.n_edges)


def test_graph_of_smollm2_has_the_published_size():
    graph = Graph(n_layers=30, n_heads=9, n_kv_heads=3)
    assert (len(graph.sources), len(graph.destinations)) == (301, 481)
    assert graph.sources[:3] == ["input", "a0.h0", "a0.h1"] and graph.sources[-1] == "m29"
    assert graph.destinations[8:11] == ["a0.h8.q", "a0.h0.k", "a0.h1.k"]
    ungrouped = Graph(n_layers=30, n_heads=9, n_kv_heads=9)
    assert len(ungrouped.destinations) == 841 and ungrouped.n_edges == 123_211


def test_grouped_scores_are_sums_of_ungrouped_ones():
    model, batch = make_model(5).double(), to_batch(random_samples(3))
    grouped = edge_attributions(model, batch, method="eap-ig", steps=2)
    ungrouped = edge_attributions(model, batch, method="eap-ig", steps=2, ungroup_kv=True)
    heads, groups = 4, 2
    for layer in range(2):
        for part, offset in (("k", heads), ("v", 2 * heads)):
            start = layer * ungrouped.graph.destinations_per_layer + offset
            wide = ungrouped.scores[:, :, start : start + heads]
            start = [*grouped.graph.destinations].index(f"a{layer}.h0.{part}")
            narrow = grouped.scores[:, :, start : start + groups]
            torch.testing.assert_close(wide.unflatten(-1, (groups, -1)).sum(-1), narrow)


@pytest.mark.parametrize("side", ["right", "left"])
def test_independent_of_batch_composition_and_padding(side):
    model = make_model(6).double()
    samples = random_samples(4, lengths=(12, 5, 9, 17))
    together = edge_attributions(model, to_batch(samples, side), method="eap-ig").scores
    for row, sample in enumerate(samples):
        alone = edge_attributions(model, to_batch([sample]), method="eap-ig").scores[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-8, atol=1e-11 * float(alone.abs().max()))


@pytest.mark.parametrize("side", ["right", "left"])
def test_independent_of_attention_implementation(side):
    # float32: the library's eager attention takes its softmax in float32, where the float64 mask value overflows
    batch = to_batch(random_samples(4, lengths=(12, 5, 9)), side)
    sdpa = edge_attributions(make_model(6), batch, method="eap-ig").scores
    eager = edge_attributions(make_model(6, attn_implementation="eager"), batch, method="eap-ig").scores
    torch.testing.assert_close(eager, sdpa, rtol=1e-3, atol=1e-5 * float(sdpa.abs().max()))


def test_chunks_do_not_change_scores(monkeypatch):
    from cud_trainer.circuits import contraction

    model, batch = make_model(7).double(), to_batch(random_samples(5))
    whole = edge_attributions(model, batch, method="eap-ig").scores
    monkeypatch.setattr(contraction, "CHUNK_BYTES", 1)
    torch.testing.assert_close(edge_attributions(model, batch, method="eap-ig").scores, whole)


def test_scores_of_a_sources_edges_predict_the_effect_of_removing_it_a_little():
    """Finite difference, independent of the oracle: shrinking the embedding read by `logits` alone."""
    model, samples = make_model(8).double().requires_grad_(False), random_samples(6, lengths=(8,))
    result = edge_attributions(model, to_batch(samples), metric="logprob")
    tokens, prompt = samples[0]
    embedding = model.model.embed_tokens(tokens)[None]
    values = []
    for epsilon in (1e-4, -1e-4):
        hook = model.model.norm.register_forward_pre_hook(lambda m, a, e=epsilon: (a[0] - e * embedding,))
        logps = model(tokens[None]).logits.log_softmax(-1)[0, prompt - 1 : -1]
        values.append(logps.gather(-1, tokens[prompt:, None]).mean())
        hook.remove()
    torch.testing.assert_close(result.scores[0, 0, -1], (values[0] - values[1]) / 2e-4, rtol=1e-6, atol=0)


def test_model_is_left_as_it_was():
    model = make_model(9).train()
    model.model.layers[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    for bad in (False, True):
        batch = to_batch(random_samples(7))
        if bad:
            batch["input_ids"][0, 0] = 10_000
            with pytest.raises(IndexError):
                edge_attributions(model, batch, ungroup_kv=True)
        else:
            edge_attributions(model, batch, ungroup_kv=True)
        assert model.training and all(module.training for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.model.layers[0].self_attn.num_key_value_groups == 2


def test_lora_adapter_is_part_of_the_circuit():
    from peft import LoraConfig, get_peft_model

    batch = to_batch(random_samples(9))
    adapted = get_peft_model(make_model(2).double(), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    live = edge_attributions(adapted, batch, method="eap-ig").scores
    merged = edge_attributions(adapted.merge_and_unload(), batch, method="eap-ig").scores
    torch.testing.assert_close(live, merged, rtol=1e-6, atol=1e-9 * float(merged.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "acdc"}, "unknown method 'acdc'.*eap"),
        ({"baseline": "noise"}, "unknown baseline 'noise'.*zero"),
        ({"metric": "loss"}, "unknown metric 'loss'.*prob"),
        ({"method": "eap-ig", "steps": 0}, "steps >= 1"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        edge_attributions(make_model(), to_batch(random_samples(0)), **options)


def test_unsupported_architecture_is_named():
    from transformers import OPTConfig, OPTForCausalLM

    tiny = OPTConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        word_embed_proj_dim=8,
    )
    with pytest.raises(ValueError, match="'opt'.*available: apertus"):
        edge_attributions(OPTForCausalLM(tiny), to_batch(random_samples(0, vocabulary=20)))


def test_sample_without_answer_is_refused():
    batch = to_batch(random_samples(0))
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="sample 1 of the batch has no answer"):
        edge_attributions(make_model(), batch)
