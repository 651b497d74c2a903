"""A brute-force oracle of edge attribution, written once for all architectures.

The forward pass is written out in float64 so that every destination reads its own copy of the residual stream, built from
the outputs of the sources that exist by then. It shares nothing with `cud_trainer.circuits`: which weights are whose is
said here a second time.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM

GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
CASES = {
    "llama": ("llama", GROUPED),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_biases": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", GROUPED),
    "gemma2": (
        "gemma2",
        {
            **GROUPED,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_implementation": "eager",
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", {**GROUPED, "pad_token_id": 0}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 2}),
    "phi_qk_norm": ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "gpt2": ("gpt2", {"n_positions": 64}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox_sequential": ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
}
# One test each (`test_further_architectures`).
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
ONE_DENSE = {
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "n_group": 1,
    "topk_group": 1,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FURTHER = {
    "gemma": ("gemma", GROUPED),
    "smollm3": ("smollm3", {**GROUPED, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "granite": ("granite", {**GROUPED, **MULTIPLIERS}),
    "granitemoe": ("granitemoe", {**EXPERTS, **MULTIPLIERS, "num_local_experts": 4, "head_dim": 8}),
    "ministral": ("ministral", {**GROUPED, **WINDOW}),
    "ministral3": ("ministral3", GROUPED),
    "glm": ("glm", {**GROUPED, "pad_token_id": 0}),
    "glm4": ("glm4", {**GROUPED, "pad_token_id": 0}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {"num_key_value_heads": 2, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {**GROUPED, "sliding_window": 4}),
    "nemotron": ("nemotron", GROUPED),
    "arcee": ("arcee", GROUPED),
    "apertus": ("apertus", GROUPED),
    "helium": ("helium", {"num_key_value_heads": 2, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", GROUPED),
    "seed_oss": ("seed_oss", GROUPED),
    "ernie4_5": ("ernie4_5", GROUPED),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, **WINDOW}),
    "exaone4": ("exaone4", {**GROUPED, **WINDOW}),
    "cohere": ("cohere", {"num_key_value_heads": 2, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**GROUPED, **WINDOW, "logit_scale": 0.5}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "olmoe": ("olmoe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "gpt_oss": (
        "gpt_oss",
        {**EXPERTS, **WINDOW, "num_local_experts": 4, "attn_implementation": "eager", "rope_parameters": None},
    ),
    "llama4_text": (
        "llama4_text",
        {**EXPERTS, "num_local_experts": 2, "no_rope_layers": [1, 0], "attn_temperature_tuning": False},
    ),
    "cwm": ("cwm", GROUPED),
    "internlm3": ("internlm3", GROUPED),
    "jais2": ("jais2", GROUPED),
    "phimoe": ("phimoe", {**EXPERTS, "num_local_experts": 4}),
    "minimax_m2": ("minimax_m2", {**EXPERTS, "num_local_experts": 4}),
    "flex_olmo": ("flex_olmo", {**EXPERTS, "num_experts": 4, "head_dim": 8, "pad_token_id": 0}),
    "aria_text": ("aria_text", {**EXPERTS, "moe_num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "ernie4_5_moe": ("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, **ONE_DENSE}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**EXPERTS, "num_experts": 4, "moe_topk": 2}),
    "dots1": ("dots1", {**EXPERTS, "n_routed_experts": 4, **ONE_DENSE}),
    "glm4_moe": ("glm4_moe", {**EXPERTS, "n_routed_experts": 4, **ONE_DENSE}),
    "solar_open": ("solar_open", {**EXPERTS, "n_routed_experts": 4, **ONE_DENSE}),
    "exaone_moe": ("exaone_moe", {**EXPERTS, "num_experts": 4, **ONE_DENSE, **WINDOW}),
    "cohere2_moe": ("cohere2_moe", {**EXPERTS, "num_experts": 4, **ONE_DENSE, **WINDOW, "logit_scale": 0.5}),
}
# rotation of neighbours
PAIRWISE = ("cohere", "cohere2", "cohere2_moe", "glm", "glm4", "helium", "ernie4_5", "ernie4_5_moe", "llama4_text")
BEHIND = ("olmo2", "olmo3", "exaone4", "flex_olmo")  # norms behind attention and MLP only
# norms of queries and keys, over all heads together
WHOLE_WIDTH = ("olmo2", "olmo3", "olmoe", "flex_olmo", "minimax_m2")
BY_HEAD = ("qwen3", "gemma3_text", "qwen3_moe", "exaone4", "exaone_moe", "apertus", "dots1")


def make_case(name: str, **overrides):
    """A tiny random model in float64 in which no bias and no gain is trivial."""
    model_type, settings = {**CASES, **FURTHER}[name]
    options = {key: settings[key] for key in ("attn_implementation", "experts_implementation") if key in settings}
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **settings,
            **overrides,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **{"attn_implementation": "sdpa", **options}).double().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 1:
            low, high = (-0.5, 0.5) if model_type.startswith("gemma") else (0.5, 1.5)
            torch.nn.init.uniform_(parameter, low, high)
        parameter.requires_grad_(False)
    return model


def gain(norm):
    return 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight


def rms(norm, x):
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


@contextmanager
def double_precision():
    """The library computes norms, rotary embeddings, routers and softmax in float32 whatever the model's dtype."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def keep(x, *args, **options):
        def double(value):
            return torch.float64 if value is torch.float32 and x.dtype == torch.float64 else value

        return to(x, *map(double, args), **{name: double(value) for name, value in options.items()})

    def in_its_own(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim, _stacklevel, None if x.dtype == torch.float64 else dtype)

    with (
        patch.object(torch.Tensor, "to", keep),
        patch.object(torch.Tensor, "type", keep),
        patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.double()),
        patch.object(torch.nn.functional, "softmax", in_its_own),
    ):
        yield


def heads_of(linear, count):
    """Rows of a projection by head, `(weight [head_dim, d], bias)` each."""
    bias = linear.bias if linear.bias is not None else torch.zeros(len(linear.weight), dtype=linear.weight.dtype)
    return list(zip(linear.weight.chunk(count), bias.chunk(count), strict=True))


class Oracle:
    def __init__(self, model):
        self.model, self.config, self.type = model, model.config, model.config.model_type
        self.n_heads = self.config.num_attention_heads
        self.n_kv = getattr(self.config, "num_key_value_heads", None) or self.n_heads
        root = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(self.type, "model")
        self.decoder = getattr(model, root)
        self.layers = self.decoder.h if self.type == "gpt2" else self.decoder.layers
        self.whole_width, self.by_head = self.type in WHOLE_WIDTH, self.type in BY_HEAD
        self.into = getattr(self.config, "residual_multiplier", 1.0)
        final = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm"}.get(self.type, "norm")
        self.final_norm = getattr(self.decoder, final)
        self.shared_norm = self.type in ("phi", "cohere", "cohere2", "cohere2_moe") or (
            self.type == "stablelm" and self.config.use_parallel_residual
        )
        self.parallel = self.shared_norm or (self.type == "gpt_neox" and self.config.use_parallel_residual)

    def view(self, index):
        """One layer: norms before and after, heads of the projections, columns of W_O."""
        layer, n, kv = self.layers[index], self.n_heads, self.n_kv
        if self.type == "gpt2":
            rows = SimpleNamespace(weight=layer.attn.c_attn.weight.T, bias=layer.attn.c_attn.bias)
            heads = heads_of(rows, 3 * n)
            out = SimpleNamespace(weight=layer.attn.c_proj.weight.T, bias=layer.attn.c_proj.bias)
            return SimpleNamespace(
                norm1=layer.ln_1,
                norm2=layer.ln_2,
                post1=None,
                post2=None,
                q=heads[:n],
                k=heads[n : 2 * n],
                v=heads[2 * n :],
                out=out,
                attention=layer.attn,
                mlp=layer.mlp,
            )
        attention = layer.attention if self.type == "gpt_neox" else layer.self_attn
        view = SimpleNamespace(
            norm1=getattr(layer, "input_layernorm", None),
            norm2=getattr(layer, "post_attention_layernorm", None),
            post1=None,
            post2=None,
            attention=attention,
            mlp=next(
                getattr(layer, name) for name in ("mlp", "block_sparse_moe", "feed_forward") if hasattr(layer, name)
            ),
        )
        if self.type == "gpt_neox":
            heads = heads_of(attention.query_key_value, 3 * n)  # q, k, v of one head after the other
            view.q, view.k, view.v, view.out = heads[0::3], heads[1::3], heads[2::3], attention.dense
        elif self.type == "phi3":
            heads = heads_of(attention.qkv_proj, n + 2 * kv)
            view.q, view.k, view.v, view.out = heads[:n], heads[n : n + kv], heads[n + kv :], attention.o_proj
        else:
            view.q, view.k = heads_of(attention.q_proj, n), heads_of(attention.k_proj, kv)
            view.v = heads_of(attention.v_proj, kv)
            view.out = attention.dense if self.type == "phi" else attention.o_proj
        if self.shared_norm:
            view.norm2 = layer.input_layernorm
        if self.type == "apertus":
            view.norm1, view.norm2 = layer.attention_layernorm, layer.feedforward_layernorm
        if self.type == "glm4":
            view.post1, view.post2 = layer.post_self_attn_layernorm, layer.post_mlp_layernorm
        if self.type in ("gemma2", "gemma3_text"):
            view.norm2, view.post1 = layer.pre_feedforward_layernorm, layer.post_attention_layernorm
            view.post2 = layer.post_feedforward_layernorm
        if self.type in BEHIND:
            view.norm2, view.post1, view.post2 = None, layer.post_attention_layernorm, layer.post_feedforward_layernorm
        return view

    def rotate(self, index, x):
        if self.type == "gpt2" or not self.rotated(index):
            return x
        rotary = self.decoder.rotary_emb
        kind = "inv_freq" if hasattr(rotary, "inv_freq") else f"{self.config.layer_types[index]}_inv_freq"
        angles = torch.arange(len(x), dtype=x.dtype)[:, None] * getattr(rotary, kind).to(x.dtype)
        longer = getattr(rotary, "attention_scaling", 1.0)
        cos, sin, width = angles.cos() * longer, angles.sin() * longer, angles.shape[1]
        if self.type in PAIRWISE:
            a, b, rest = x[:, : 2 * width : 2], x[:, 1 : 2 * width : 2], x[:, 2 * width :]
            return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1), rest], -1)
        a, b, rest = x[:, :width], x[:, width : 2 * width], x[:, 2 * width :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def rotated(self, index):
        if self.type in ("exaone4", "exaone_moe", "cohere2", "cohere2_moe"):
            return self.config.layer_types[index] == "sliding_attention"
        return bool(self.config.no_rope_layers[index]) if hasattr(self.config, "no_rope_layers") else True

    def attend(self, index, view, queries, keys, values):
        attention, length = view.attention, len(queries[0])
        if self.whole_width:  # over the whole width: heads meet here
            queries = attention.q_norm(torch.cat(queries, -1)).chunk(self.n_heads, -1)
            keys = attention.k_norm(torch.cat(keys, -1)).chunk(self.n_kv, -1)
        elif self.by_head:
            queries, keys = [attention.q_norm(x) for x in queries], [attention.k_norm(x) for x in keys]
        elif self.type == "phi" and self.config.qk_layernorm:
            queries, keys = [attention.q_layernorm(x) for x in queries], [attention.k_layernorm(x) for x in keys]
        queries, keys = ([self.rotate(index, x) for x in side] for side in (queries, keys))
        if self.type.startswith("hunyuan_v1"):
            queries, keys = [attention.query_layernorm(x) for x in queries], [attention.key_layernorm(x) for x in keys]
        elif self.type == "llama4_text" and self.rotated(index):
            queries, keys = ([attention.qk_norm(x) for x in side] for side in (queries, keys))
        scale = getattr(self.config, "attention_multiplier", queries[0].shape[-1] ** -0.5)
        if self.type in ("gemma2", "gemma3_text"):
            scale = self.config.query_pre_attn_scalar**-0.5
        window = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "layer_types", None) and self.config.layer_types[index] != "sliding_attention":
            window = None
        places = torch.arange(length)
        hidden = places[:, None] < places
        if window is not None:
            hidden = hidden | (places[:, None] - places >= window)
        results = []
        for head, query in enumerate(queries):
            group = head // (self.n_heads // self.n_kv)
            scores = query @ keys[group].T * scale
            if getattr(self.config, "attn_logit_softcapping", None):
                scores = (scores / self.config.attn_logit_softcapping).tanh() * self.config.attn_logit_softcapping
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.type == "gpt_oss":  # a place to attend to that holds nothing
                scores = torch.cat([scores, attention.sinks[head].expand(length, 1)], -1)
            results.append(scores.softmax(-1)[:, :length] @ values[group])
        return results

    def scale_behind(self, norm, total):
        """What a norm behind W_O multiplies every head's output with."""
        return gain(norm) * rms(norm, total) / total

    def run(self, embeddings, constants=None, circuit=None, corrupt=None):
        """`(source outputs, what each destination read, which sources it could read, logits)`, `embeddings [T, d]`.

        Args:
            constants: outputs that replace those computed, by source.
            circuit, corrupt: whether destination v reads u as it is, by `(u, v)`; else it reads `corrupt[u]`.
        """
        outputs, reads, reach = {"input": embeddings}, {}, {}
        bias = torch.zeros_like(embeddings)
        if self.type == "gpt2":
            bias = bias + self.decoder.wpe.weight[: len(embeddings)]

        def read(destination):
            total = bias
            for name, value in outputs.items():
                kept = circuit is None or circuit[name, destination]
                total = total + (value if kept else corrupt[name])
            reads[destination] = total + torch.zeros_like(total).requires_grad_()
            reads[destination].retain_grad()
            reach[destination] = list(outputs)
            return reads[destination]

        def write(name, value):
            outputs[name] = value if constants is None or name not in constants else constants[name]

        def identity(x):
            return x

        for index in range(len(self.layers)):
            view = self.view(index)
            norm1, norm2 = view.norm1 or identity, view.norm2 or identity
            sides = []
            for part, rows in (("q", view.q), ("k", view.k), ("v", view.v)):
                sides.append(
                    [
                        norm1(read(f"a{index}.h{head}.{part}")) @ weight.T + offset
                        for head, (weight, offset) in enumerate(rows)
                    ]
                )
            if self.parallel:
                x = norm2(read(f"m{index}"))
            mixed = self.attend(index, view, *sides)
            columns = view.out.weight.chunk(self.n_heads, 1)
            written = [z @ column.T for z, column in zip(mixed, columns, strict=True)]
            offset = 0 if view.out.bias is None else view.out.bias
            if view.post1 is not None:
                total = sum(written) + offset
                factor = self.scale_behind(view.post1, total)
                written, offset = [value * factor for value in written], offset * factor
            offset = offset * self.into
            for head, value in enumerate(written):
                write(f"a{index}.h{head}", value * self.into)
            if not self.parallel:
                bias = bias + offset
                x = norm2(read(f"m{index}"))
            else:
                bias = bias + offset
            value = view.mlp(x[None])
            value = (value[0] if isinstance(value, tuple) else value).view_as(x)
            write(f"m{index}", (value if view.post2 is None else view.post2(value)) * self.into)
        logits = self.final_norm(read("logits")) @ self.model.get_output_embeddings().weight.T
        head_bias = self.model.get_output_embeddings().bias
        logits = logits if head_bias is None else logits + head_bias
        logits = logits * getattr(self.config, "logit_scale", 1.0) / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return outputs, reads, reach, logits if cap is None else (logits / cap).tanh() * cap

    def embed(self, tokens):
        scale = self.config.hidden_size**0.5 if self.type.startswith("gemma") else 1.0
        if hasattr(self.config, "embedding_multiplier"):
            return (self.model.get_input_embeddings().weight[tokens] * self.config.embedding_multiplier).detach()
        if scale != 1.0:
            scale = float(torch.tensor(scale, dtype=torch.float32))  # the library keeps it in float32
        return (self.model.get_input_embeddings().weight[tokens] * scale).detach()

    def logits(self, tokens):
        return self.run(self.embed(tokens))[3].detach()

    def metric(self, logits, tokens, prompt, metric, counterfactual=None):
        logits, answer = logits[prompt - 1 : -1], tokens[prompt:, None]
        if metric == "logit_diff":
            return (logits.gather(-1, answer) - logits.gather(-1, counterfactual[prompt:, None])).mean()
        mean = logits.log_softmax(-1).gather(-1, answer).mean()
        return mean.exp() if metric == "prob" else mean

    def baseline_outputs(self, baseline, counterfactual=None, means=None):
        """Baseline output by source, or `None` for zero."""
        if baseline == "counterfactual":
            return {name: value.detach() for name, value in self.run(self.embed(counterfactual))[0].items()}
        return means if baseline == "mean" else None

    def scores(
        self,
        tokens,
        prompt,
        graph,
        *,
        method="eap",
        steps=1,
        baseline="zero",
        metric="prob",
        counterfactual=None,
        means=None,
        reference_quirk=False,
    ):
        embeddings = self.embed(tokens)
        clean = {name: value.detach() for name, value in self.run(embeddings)[0].items()}
        corrupt = self.baseline_outputs(baseline, counterfactual, means)
        deltas = {name: (0 if corrupt is None else corrupt[name]) - value for name, value in clean.items()}
        result = torch.zeros(len(graph.sources), len(graph.destinations), dtype=embeddings.dtype)
        runs = 0

        def add(inputs, constants=None, skip=()):
            _, reads, reach, logits = self.run(inputs, constants)
            self.metric(logits, tokens, prompt, metric, counterfactual).backward()
            for destination, value in reads.items():
                if value.grad is None or destination in skip:
                    continue
                for source in reach[destination]:
                    cell = graph.sources.index(source), graph.destinations.index(destination)
                    result[cell] += (deltas[source] * value.grad).sum()

        if method == "ig-activations":
            layers = range(len(self.layers))
            nodes = [["input"]]
            for layer in layers:
                nodes += [[f"a{layer}.h{head}" for head in range(self.n_heads)], [f"m{layer}"]]
            for node in nodes:
                for k in range(1, steps + 1):
                    runs += 1
                    moved = {name: clean[name] + (1 - k / steps) * deltas[name] for name in node}
                    if node == ["input"]:
                        only = [d for d in graph.destinations if d.startswith("a0.") or (self.parallel and d == "m0")]
                        add(moved["input"], skip=only if reference_quirk else ())
                    else:
                        add(embeddings, moved)
        else:
            runs = 1 if method == "eap" else steps
            for k in range(1, runs + 1):
                add(embeddings + (1 - k / runs) * deltas["input"])
        return result / runs

    def circuit_metric(self, tokens, prompt, graph, chosen, *, baseline="zero", metric="prob", counterfactual=None):
        """The metric when edges that are False in `chosen` `[S, D]` carry the baseline."""
        embeddings = self.embed(tokens)
        corrupt = self.baseline_outputs(baseline, counterfactual)
        if corrupt is None:
            corrupt = dict.fromkeys(graph.sources, torch.zeros_like(embeddings))
        circuit = {
            (source, destination): bool(chosen[i, j])
            for i, source in enumerate(graph.sources)
            for j, destination in enumerate(graph.destinations)
        }
        logits = self.run(embeddings, circuit=circuit, corrupt=corrupt)[3]
        return self.metric(logits, tokens, prompt, metric, counterfactual).detach()
