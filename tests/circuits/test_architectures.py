"""Edge attribution of every architecture against one brute-force oracle, in float64."""

import dataclasses

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from edges import random_samples, to_batch
from oracle import CASES, FURTHER, Oracle, double_precision, make_case
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from cud_trainer.circuits import (
    ARCHITECTURES,
    Architecture,
    circuit_metric,
    dataset_faithfulness,
    edge_attributions,
    faithfulness,
    mean_outputs,
    model_graph,
    register_architecture,
    verification,
    verify_architecture,
)
from cud_trainer.data import prepare_samples
from cud_trainer.models import precision

LENGTHS = (9, 13)
# Tests with models in float32 or less, and the library's own norms.
SINGLE = ("half_precision", "faithfulness_of_a_dataset", "users_describe", "another_kind", "what_an_option_needs")


@pytest.fixture(autouse=True)
def exact(request):
    if any(name in request.node.name for name in SINGLE):
        yield
        return
    with double_precision():
        yield


@pytest.fixture(scope="module")
def case():
    """A model by name, made once."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = make_case(name)
        return models[name]

    return get


def samples_and_batch(side="right"):
    """Samples, their counterfactual tokens (same length, same prompt) and the batch of both."""
    samples = random_samples(0, lengths=LENGTHS)
    rivals = []
    for tokens, prompt in samples:
        rival = tokens.clone()
        rival[prompt:] = (tokens[prompt:] + 7) % 250
        rivals.append((rival, prompt))
    batch = to_batch(samples, side)
    batch["counterfactual_input_ids"] = to_batch(rivals, side)["input_ids"]
    return samples, [tokens for tokens, _ in rivals], batch


def assert_same(found, expected):
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11 * float(expected.abs().max()))


def test_every_architecture_has_a_case():
    # gemma3, text and images, has the text model inside and a test of its own
    text_inside = {"gemma3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    assert {model_type for model_type, _ in [*CASES.values(), *FURTHER.values()]} == set(ARCHITECTURES) - text_inside


def test_faithfulness_of_a_dataset_is_that_of_its_samples():
    model, tokenizer = make_model(0), make_tokenizer()
    prepared = prepare_samples(qa_dataset(7), tokenizer, name="forget")
    n_edges = model_graph(model).n_edges
    circuits = torch.rand(7, n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = dataset_faithfulness(model, prepared, circuits, batch_size=3, n_random=2, progress=False)
    for row in range(7):
        alone = faithfulness(model, prepared.pad([row]), circuits[[row]], n_random=0)
        for name in ("clean", "baseline", "circuit"):
            torch.testing.assert_close(getattr(whole, name)[row], getattr(alone, name)[0], rtol=1e-5, atol=1e-9)
    assert whole.random_share.shape == (2, 7)
    with pytest.raises(ValueError, match="circuits"):
        dataset_faithfulness(model, prepared, circuits[:6], progress=False)


def test_text_inside_a_model_of_text_and_images(case):
    text = case("gemma3_text")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=255,
        boi_token_index=254,
        eoi_token_index=253,
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config).double().eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    batch = samples_and_batch("left")[2]
    for method in ("eap", "ig-activations"):
        expected = edge_attributions(text, batch, method=method, steps=2).scores
        assert_same(edge_attributions(model, batch, method=method, steps=2).scores, expected)
    verify_architecture(model)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_computes_what_the_model_computes(case, name):
    tokens, _ = random_samples(0, lengths=LENGTHS)[1]
    logits = case(name)(tokens[None]).logits[0]
    torch.testing.assert_close(Oracle(case(name)).logits(tokens), logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "ig-activations"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(case, name, method):
    samples, _, batch = samples_and_batch("left" if method == "eap" else "right")
    result = edge_attributions(case(name), batch, method=method, steps=2)
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(case(name)).scores(tokens, prompt, result.graph, method=method, steps=2)
        assert_same(result.scores[row], expected)
    assert (result.scores[:, ~result.graph.mask] == 0).all()


@pytest.mark.parametrize("name", FURTHER)
def test_further_architectures(name, monkeypatch):
    """Everything that is asked of the others, of one model each: logits, scores, circuits, altered descriptions."""
    model = make_case(name)
    oracle = Oracle(model)
    samples, rivals, batch = samples_and_batch("left")
    tokens, prompt = samples[0]
    torch.testing.assert_close(oracle.logits(tokens), model(tokens[None]).logits[0], rtol=1e-9, atol=1e-10)
    for options in ({"method": "eap"}, {"method": "ig-activations", "steps": 2, "baseline": "counterfactual"}):
        result = edge_attributions(model, batch, **options)
        rival = rivals[0] if "baseline" in options else None
        assert_same(result.scores[0], oracle.scores(tokens, prompt, result.graph, counterfactual=rival, **options))
    graph = result.graph
    chosen = torch.rand(2, graph.n_edges, generator=torch.Generator().manual_seed(1)) < 0.6
    found = circuit_metric(model, batch, chosen, baseline="counterfactual", metric="logprob")
    full = torch.zeros_like(graph.mask)
    full[graph.mask] = chosen[0]
    options = {"baseline": "counterfactual", "metric": "logprob", "counterfactual": rivals[0]}
    expected = oracle.circuit_metric(tokens, prompt, graph, full, **options)
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-10)
    verify_architecture(model)
    for description in altered(name, model):
        monkeypatch.setitem(ARCHITECTURES, model.config.model_type, description)
        with pytest.raises(ValueError, match="does not fit"):
            verify_architecture(model)


@pytest.mark.parametrize("metric", ["logprob", "logit_diff"])
@pytest.mark.parametrize("method", ["eap-ig", "ig-activations"])
@pytest.mark.parametrize("name", ["llama_biases", "gemma2", "gpt2", "gpt_neox", "phi", "olmo2"])
def test_matches_the_oracle_with_a_counterfactual(case, name, method, metric):
    samples, rivals, batch = samples_and_batch("left")
    options = {"method": method, "steps": 2, "baseline": "counterfactual", "metric": metric}
    result = edge_attributions(case(name), batch, **options)
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(case(name)).scores(tokens, prompt, result.graph, counterfactual=rivals[row], **options)
        assert_same(result.scores[row], expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox", "phi"])
def test_matches_the_oracle_with_the_mean(case, name):
    samples, _, batch = samples_and_batch()
    oracle = Oracle(case(name))
    collected = [oracle.run(oracle.embed(tokens))[0] for tokens, _ in samples]
    means = {key: torch.cat([outputs[key] for outputs in collected]).mean(0).detach() for key in collected[0]}
    # one batch a sample: means do not depend on how samples are batched
    ours = mean_outputs(case(name), [to_batch([sample]) for sample in samples])
    for method in ("eap-ig", "ig-activations"):
        options = {"method": method, "steps": 2, "baseline": "mean"}
        result = edge_attributions(case(name), batch, means=ours, **options)
        for row, (tokens, prompt) in enumerate(samples):
            assert_same(result.scores[row], oracle.scores(tokens, prompt, result.graph, means=means, **options))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_the_references_quirk(case, name):
    samples, _, batch = samples_and_batch()
    options = {"method": "ig-activations", "steps": 2}
    result = edge_attributions(case(name), batch, reference_quirk=True, **options)
    without = edge_attributions(case(name), batch, **options)
    # with learned positions even the first layer reads something that has a gradient in the reference
    quirk = name != "gpt2"
    assert torch.equal(result.scores, without.scores) != quirk
    for row, (tokens, prompt) in enumerate(samples):
        expected = Oracle(case(name)).scores(tokens, prompt, result.graph, reference_quirk=quirk, **options)
        assert_same(result.scores[row], expected)


@pytest.mark.parametrize("baseline", ["zero", "counterfactual"])
@pytest.mark.parametrize("name", CASES)
def test_circuit_metric_matches_the_oracle(case, name, baseline):
    samples, rivals, batch = samples_and_batch("left")
    graph = edge_attributions(case(name), batch).graph
    chosen = torch.rand(2, graph.n_edges, generator=torch.Generator().manual_seed(1)) < 0.6
    found = circuit_metric(case(name), batch, chosen, baseline=baseline, metric="logprob")
    for row, (tokens, prompt) in enumerate(samples):
        full = torch.zeros_like(graph.mask)
        full[graph.mask] = chosen[row]
        expected = Oracle(case(name)).circuit_metric(
            tokens, prompt, graph, full, baseline=baseline, metric="logprob", counterfactual=rivals[row]
        )
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if name != "olmo2"])
def test_ungrouped_scores_sum_to_grouped_ones(case, name):
    _, _, batch = samples_and_batch()
    options = {"method": "ig-activations", "steps": 2}
    narrow = edge_attributions(case(name), batch, **options)
    wide = edge_attributions(case(name), batch, ungroup_kv=True, **options)
    summed = torch.zeros_like(narrow.scores)
    group = 4 // narrow.graph.n_kv_heads
    for column, destination in enumerate(wide.graph.destinations):
        if destination[-2:] in (".k", ".v"):
            layer, head, part = destination.split(".")
            destination = f"{layer}.h{int(head[1:]) // group}.{part}"
        summed[:, :, narrow.graph.destinations.index(destination)] += wide.scores[:, :, column]
    assert_same(summed, narrow.scores)


def test_key_heads_behind_a_joint_norm_are_not_ungrouped(case):
    with pytest.raises(ValueError, match="ungroup_kv is not defined"):
        edge_attributions(case("olmo2"), samples_and_batch()[2], ungroup_kv=True)


def altered(name, model):
    """Descriptions with one field changed to something that the model also has."""
    description = ARCHITECTURES[model.config.model_type]
    description = description if isinstance(description, Architecture) else description(model.config)
    for field in ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"):
        if getattr(description, field) is not None:
            yield dataclasses.replace(description, **{field: None})
    if not (description.parallel and description.mlp_norm == description.attention_norm):
        yield dataclasses.replace(description, parallel=not description.parallel)
    if len(description.qkv) == 3:
        q, k, v = description.qkv
        yield dataclasses.replace(description, qkv=(q, v, k))
    for field in ("residual_scale", "embedding_scale"):
        if getattr(description, field) != 1.0:
            yield dataclasses.replace(description, **{field: 1.0})
    if description.qkv_layout == "interleaved" or name == "gpt2":
        other = {"stacked": "interleaved", "interleaved": "stacked"}[description.qkv_layout]
        yield dataclasses.replace(description, qkv_layout=other)


@pytest.mark.parametrize("name", CASES)
def test_an_altered_description_is_noticed(case, name, monkeypatch):
    """By `verify_architecture`, and by the oracle."""
    model = case(name)
    verify_architecture(model)
    samples, _, batch = samples_and_batch()
    for description in altered(name, model):
        monkeypatch.setitem(ARCHITECTURES, model.config.model_type, description)
        with pytest.raises(ValueError, match="does not fit"):
            verify_architecture(model)
        try:
            result = edge_attributions(model, batch)
        except (ValueError, RuntimeError):
            continue
        tokens, prompt = samples[0]
        expected = Oracle(model).scores(tokens, prompt, result.graph)
        with pytest.raises(AssertionError):
            assert_same(result.scores[0], expected)


def test_users_describe_their_own_architecture(monkeypatch):
    model = make_model(0)
    monkeypatch.setattr(model.config, "model_type", "mine", raising=False)
    batch = samples_and_batch()[2]
    with pytest.raises(ValueError, match="'mine'.*Llama's names: try register_architecture"):
        edge_attributions(model, batch)
    monkeypatch.delitem(ARCHITECTURES, "mine", raising=False)
    register_architecture("mine", Architecture())
    try:
        verify_architecture(model)
        assert edge_attributions(model, batch).edges.isfinite().all()
        with pytest.raises(ValueError, match="already registered"):
            register_architecture("mine", Architecture())
        ARCHITECTURES["mine"] = Architecture(o="self_attn.dense", mlp="feed_forward")
        with pytest.raises(ValueError, match=r"no o \(layer.self_attn.dense\); no mlp \(layer.feed_forward\)"):
            edge_attributions(model, batch)
    finally:
        ARCHITECTURES.pop("mine")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_layout": "mixed"}, "unknown qkv_layout 'mixed'"),
        ({"qkv": "self_attn.qkv"}, "tuple of one path"),
        ({"qkv_layout": "interleaved"}, "one fused projection"),
        ({"mlp_norm": "input_layernorm"}, "parallel must be True"),
    ],
)
def test_descriptions_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**fields)


def test_a_norm_of_another_kind_is_refused():
    class Scale(torch.nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32))

        def forward(self, x):
            return x * self.weight / x.abs().amax(-1, keepdim=True)

    model = make_model(0)
    model.model.layers[1].input_layernorm = Scale()
    with pytest.raises(ValueError, match="Scale is neither an RMSNorm nor a LayerNorm"):
        edge_attributions(model, samples_and_batch()[2])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_in_float32(name, dtype):
    _, _, batch = samples_and_batch("left")
    half = edge_attributions(make_case(name).to(dtype), batch).edges
    same_weights = edge_attributions(make_case(name).to(dtype).float(), batch).edges
    torch.testing.assert_close(half, same_weights, rtol=1e-4, atol=1e-5 * float(same_weights.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_half_precision_ranks_edges_alike_where_there_can_be_no_copies(name, monkeypatch):
    from scipy.stats import spearmanr

    _, _, batch = samples_and_batch("left")
    full = edge_attributions(make_case(name).float(), batch).edges
    for module in (precision, verification):
        monkeypatch.setattr(module, "can_be_exact", lambda model: False)
    half = edge_attributions(make_case(name).bfloat16(), batch).edges
    assert half.dtype == torch.float32
    for a, b in zip(full, half, strict=True):
        assert spearmanr(a.abs(), b.abs()).statistic > 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma3_text"])
def test_offloaded_weights(case, name):
    from accelerate import cpu_offload

    _, _, batch = samples_and_batch()
    expected = edge_attributions(case(name), batch, method="ig-activations", steps=2).scores
    model = cpu_offload(make_case(name), execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    assert_same(edge_attributions(model, batch, method="ig-activations", steps=2).scores, expected)


def test_offloaded_half_precision_weights():
    from accelerate import cpu_offload
    from scipy.stats import spearmanr

    _, _, batch = samples_and_batch()
    full = edge_attributions(make_case("llama").float(), batch).edges
    half = edge_attributions(cpu_offload(make_case("llama").bfloat16(), execution_device="cpu"), batch).edges
    for a, b in zip(full, half, strict=True):
        assert spearmanr(a.abs(), b.abs()).statistic > 0.99


def test_gradient_checkpointing_and_training_mode_change_nothing(case):
    _, _, batch = samples_and_batch()
    for name in ("llama", "gpt2"):
        model = make_case(name)
        expected = edge_attributions(model, batch, method="ig-activations", steps=2).scores
        model.train()
        model.gradient_checkpointing_enable()
        assert torch.equal(edge_attributions(model, batch, method="ig-activations", steps=2).scores, expected)


@pytest.mark.parametrize("method", ["eap-ig", "ig-activations"])
def test_adapters_on_fused_and_transposed_projections(method):
    from peft import LoraConfig, get_peft_model

    _, _, batch = samples_and_batch()
    for name, targets in (("gpt2", ["c_attn", "c_proj"]), ("phi3", ["qkv_proj", "o_proj"]), ("olmo2", ["q_proj"])):
        adapted = get_peft_model(
            make_case(name), LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
        )
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        live = edge_attributions(adapted, batch, method=method, steps=2).scores
        merged = edge_attributions(adapted.merge_and_unload(), batch, method=method, steps=2).scores
        assert_same(live, merged)


def test_everything_is_put_back(case):
    model = case("phi3")
    batch = samples_and_batch()[2]
    forward = [module.__dict__.get("forward") for module in model.modules()]
    edge_attributions(model, batch, method="ig-activations", steps=2, ungroup_kv=True)
    circuit_metric(model, batch, torch.ones(2, model_graph(model).n_edges, dtype=torch.bool))
    assert [module.__dict__.get("forward") for module in model.modules()] == forward
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    attention = model.model.layers[0].self_attn
    assert (attention.num_key_value_groups, attention.num_key_value_heads) == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "go together"),
        ({"baseline": "counterfactual"}, "baseline='counterfactual' needs counterfactual_input_ids"),
        ({"metric": "logit_diff"}, "metric='logit_diff' needs counterfactual_input_ids"),
    ],
)
def test_what_an_option_needs_is_asked_for(options, message):
    batch = samples_and_batch()[2]
    rival = batch.pop("counterfactual_input_ids")
    with pytest.raises(ValueError, match=message):
        edge_attributions(make_model(0), batch, **options)
    if "mean" not in options.values():
        with pytest.raises(ValueError, match="shape"):
            edge_attributions(make_model(0), {**batch, "counterfactual_input_ids": rival[:, 1:]}, **options)
