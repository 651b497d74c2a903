"""Is RelP nearer to exact activation patching than the gradients that it replaces, and what does it cost?

    python benchmarks/relp.py --output benchmarks/results/relp.json
    python benchmarks/relp.py --types --model smollm2-memorised --dataset facts.jsonl --output relp-smollm2.json

Models: tiny ones of several architectures, in float64, that know made-up facts by heart; with `--model` one from
the disk. What is exact: one edge alone, or all edges out of one node, carry the baseline, and the model is run. Per
sample: Pearson and Spearman correlation of the scores with that, Spearman of their absolute values, overlap of the
strongest tenth; mean over samples with a 95% bootstrap interval. Over samples: Spearman of the sum of absolute values
(the circuit mass). `relp+ah` is RelP with the attention pattern as a constant (AH-rule): edges into queries
and keys score 0. CPU seconds, all samples in one batch.
"""

import argparse
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cud_trainer.circuits import circuit_metric, edge_attributions
from cud_trainer.circuits.parts import DecoderParts
from cud_trainer.circuits.verification import verified_parts
from cud_trainer.data import prepare_samples
from cud_trainer.files import write_json
from cud_trainer.logprobs import score_answers
from cud_trainer.models.fingerprint import versions
from evaluation.statistics import bootstrap_mean

METHODS = {
    "eap": {"method": "eap"},
    "eap-ig, 5 steps": {"method": "eap-ig", "steps": 5},
    "ig-activations, 5 steps": {"method": "ig-activations", "steps": 5},
    "relp": {"method": "relp"},
    "relp+ah": {"method": "relp", "constant_patterns": True},
}
SETTINGS = (("zero", "prob"), ("zero", "logprob"), ("counterfactual", "prob"), ("counterfactual", "logit_diff"))
TINY = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gpt_neox": {},
}


def constant_pattern(parts: DecoderParts, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
    """The gradient of queries and keys is 0, as if the pattern that they make were a constant."""
    if not output.requires_grad:
        return
    keep = torch.ones_like(output, requires_grad=False)
    if len(parts.layers[0].qkv) == 3:
        keep *= float(number == 2)
    elif parts.description.qkv_layout == "interleaved":
        keep.unflatten(-1, (parts.n_heads, 3, parts.head_dim))[..., :2, :] = 0.0
    else:
        keep[..., : -parts.n_kv_heads * parts.head_dim] = 0.0
    output.register_hook(lambda gradient: gradient * keep)


def scores(model: PreTrainedModel, batch: dict[str, Tensor], constant_patterns: bool = False, **options: Any) -> Tensor:
    """Edge scores `[B, n_edges]`."""
    parts = verified_parts(model)
    with ExitStack() as stack:
        for layer in parts.layers if constant_patterns else []:
            for number, module in enumerate(layer.qkv):
                stack.callback(module.register_forward_hook(partial(constant_pattern, parts, number)).remove)
        return edge_attributions(model, batch, **options).edges


def exact_edges(model: PreTrainedModel, batch: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """What the metric changes by when one edge, or all edges of one node, are patched, `[B, edges]`, `[B, nodes]`."""
    graph = verified_parts(model).graph()
    sources = graph.mask.nonzero()[:, 0]
    single = ~torch.eye(graph.n_edges, dtype=torch.bool)
    whole = sources.unsqueeze(0) != torch.arange(len(graph.sources)).unsqueeze(1)
    chosen = torch.cat([torch.ones(1, graph.n_edges, dtype=torch.bool), single, whole])
    rows = []
    for row in range(len(batch["input_ids"])):
        repeated = {key: value[row : row + 1].expand(len(chosen), -1) for key, value in batch.items()}
        rows.append(circuit_metric(model, repeated, chosen, **options))
    metric = torch.stack(rows)
    change = metric[:, 1:] - metric[:, :1]
    return change[:, : graph.n_edges], change[:, graph.n_edges :]


def some_nodes(parts: DecoderParts, every: int) -> Tensor:
    """Places among the sources of the embedding, all MLPs, and the heads of every so-many-th layer."""
    graph = parts.graph()
    places = [0]
    for index in range(len(parts.layers)):
        first = graph.sources_before_attention(index)
        heads = range(first, first + graph.n_heads) if index % every == 0 else ()
        places += [*heads, first + graph.n_heads]
    return torch.tensor(places)


@torch.no_grad()
def zeroed_nodes(
    model: PreTrainedModel, batch: dict[str, Tensor], nodes: Tensor, at_once: int = 16
) -> dict[str, Tensor]:
    """What each metric changes by when one of the nodes writes nothing, `[B, nodes]` each: for many edges."""
    parts = verified_parts(model)
    graph = parts.graph()
    found: dict[str, list[Tensor]] = {"prob": [], "logprob": []}
    keep = torch.cat([torch.ones(1, len(graph.sources)), 1 - torch.eye(len(graph.sources))[nodes]])
    for row in range(len(batch["input_ids"])):
        logps = []
        for some in keep.split(at_once):
            repeated = {key: value[row : row + 1].expand(len(some), -1) for key, value in batch.items()}
            embeddings = model.get_input_embeddings()(repeated["input_ids"]) * some[:, 0].view(-1, 1, 1)
            with ExitStack() as stack:
                for index, layer in enumerate(parts.layers):
                    first = graph.sources_before_attention(index)
                    heads = some[:, first : first + graph.n_heads].repeat_interleave(parts.head_dim, 1).unsqueeze(1)
                    stack.callback(layer.o.register_forward_pre_hook(partial(times_input, heads)).remove)
                    mlp = some[:, first + graph.n_heads].view(-1, 1, 1)
                    stack.callback(layer.mlp_output.register_forward_hook(partial(times_output, mlp)).remove)
                logps.append(score_answers(model, repeated, inputs_embeds=embeddings).mean_logps)
        value = torch.cat(logps)
        for metric, changed in (("prob", value.exp()), ("logprob", value)):
            found[metric].append(changed[1:] - changed[0])
    return {metric: torch.stack(rows) for metric, rows in found.items()}


def times_input(factor: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * factor, *args[1:])


def times_output(factor: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * factor


def by_node(model: PreTrainedModel, edges: Tensor) -> Tensor:
    """Sum over the edges out of each node, `[B, nodes]`."""
    graph = verified_parts(model).graph()
    sources = graph.mask.nonzero()[:, 0]
    return torch.zeros(len(edges), len(graph.sources), dtype=edges.dtype).index_add_(1, sources, edges)


def agreement(found: Tensor, exact: Tensor) -> dict:
    """How well scores agree with exact effects, both `[B, n]`."""
    k = max(1, round(found.shape[1] / 10))
    columns = {"pearson": [], "spearman": [], "spearman_absolute": [], "top_tenth_overlap": []}
    for a, b in zip(found, exact, strict=True):
        columns["pearson"].append(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
        columns["spearman"].append(float(spearmanr(a, b).statistic))
        columns["spearman_absolute"].append(float(spearmanr(a.abs(), b.abs()).statistic))
        top = [set(x.abs().topk(k).indices.tolist()) for x in (a, b)]
        columns["top_tenth_overlap"].append(len(top[0] & top[1]) / k)
    row: dict[str, Any] = {
        name: {**bootstrap_mean(np.array(values), seed=0).as_dict(), "min": min(values)}
        for name, values in columns.items()
    }
    if len(found) > 4:
        row["mass_over_samples"] = float(spearmanr(*(x.abs().sum(1) for x in (found, exact))).statistic)
    return row


def facts(count: int, seed: int) -> dict[str, Tensor]:
    """Made-up facts: `<s> first-name last-name relation ?` and four random tokens; beside each another of its kind."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(12 * 12, generator=generator)[: count // 2]
    first, last = 2 + pairs // 12, 14 + pairs % 12
    rows = []
    for relation in (26, 27):
        start, ask = torch.full_like(first, 1), torch.full_like(first, 28)
        prompt = torch.stack([start, first, last, torch.full_like(first, relation), ask], 1)
        rows.append(torch.cat([prompt, torch.randint(30, 62, (len(pairs), 4), generator=generator)], 1))
    tokens = torch.cat(rows)
    labels = tokens.clone()
    labels[:, :5] = -100
    other = torch.cat([half.roll(1, 0) for half in rows])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "counterfactual_input_ids": other,
    }


def learned(model_type: str, batch: dict[str, Tensor], layers: int, until: float) -> PreTrainedModel:
    """A tiny model that knows the facts by heart, in float64."""
    settings = dict(TINY[model_type])
    attention = settings.pop("attn_implementation", "sdpa")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        **{**sizes, **settings},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    plain = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    for _ in range(2000):
        loss = model(**plain, use_cache=False).loss
        if float(torch.exp(-loss.detach())) >= until:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval().requires_grad_(False)


def compare(model: PreTrainedModel, batch: dict[str, Tensor], name: str) -> list[dict]:
    rows = []
    for baseline, metric in SETTINGS:
        options = {"baseline": baseline, "metric": metric}
        edges, nodes = exact_edges(model, batch, **options)
        for method, how in METHODS.items():
            start = time.process_time()
            found = scores(model, batch, **how, **options)
            row = {"model": name, **options, "method": method, "seconds": time.process_time() - start}
            rows.append({**row, "edges": agreement(found, edges), "nodes": agreement(by_node(model, found), nodes)})
            say(rows[-1])
    return rows


def compare_nodes(model: PreTrainedModel, batch: dict[str, Tensor], name: str, methods: list[str]) -> list[dict]:
    """As `compare`, some nodes and the zero baseline only."""
    nodes = some_nodes(verified_parts(model), 3)
    exact, rows = zeroed_nodes(model, batch, nodes), []
    for method in methods:
        for metric in exact:
            start = time.process_time()
            found = scores(model, batch, **METHODS[method], metric=metric)
            row = {"model": name, "baseline": "zero", "metric": metric, "method": method}
            row["seconds"] = time.process_time() - start
            rows.append({**row, "nodes": agreement(by_node(model, found)[:, nodes], exact[metric])})
            say(rows[-1])
    return rows


def say(row: dict) -> None:
    for kind in ("edges", "nodes"):
        if kind in row:
            shown = ", ".join(f"{name} {row[kind][name]['value']:.3f}" for name in ("pearson", "spearman"))
            print(row["model"], row["baseline"], row["metric"], row["method"], kind, shown, flush=True)


def summary(rows: list[dict]) -> list[dict]:
    """Means over models and metrics, by baseline and method."""
    found = []
    for baseline in ("zero", "counterfactual"):
        for method in METHODS:
            chosen = [row for row in rows if row["baseline"] == baseline and row["method"] == method and "edges" in row]
            if not chosen:
                continue
            line: dict[str, Any] = {"baseline": baseline, "method": method, "cells": len(chosen)}
            for kind in ("edges", "nodes"):
                for name in ("pearson", "spearman", "spearman_absolute", "top_tenth_overlap"):
                    line[f"{kind}_{name}"] = float(np.mean([row[kind][name]["value"] for row in chosen]))
                line[f"{kind}_mass_over_samples"] = float(np.mean([row[kind]["mass_over_samples"] for row in chosen]))
            found.append({**line, "seconds": sum(row["seconds"] for row in chosen)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=list(TINY))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--facts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--until", type=float, default=0.95, help="probability of the answers to train to")
    parser.add_argument("--model", help="folder of a model that knows the answers of --dataset; nodes only")
    parser.add_argument("--dataset", help="its questions and answers, JSON Lines")
    parser.add_argument("--model_samples", type=int, default=2)
    parser.add_argument("--model_methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, facts_known = [], facts(args.facts, 0)
    some = {key: value[:: max(1, args.facts // args.samples)][: args.samples] for key, value in facts_known.items()}
    for model_type in args.types:
        rows += compare(learned(model_type, facts_known, args.layers, args.until), some, model_type)
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        prepared = prepare_samples(load_dataset("json", data_files=args.dataset, split="train"), tokenizer)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
        batch = {
            key: value for key, value in prepared.pad(range(args.model_samples)).items() if isinstance(value, Tensor)
        }
        rows += compare_nodes(model, batch, Path(args.model).name, args.model_methods)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "model", "dataset")}
        write_json(args.output, {"settings": settings, "versions": versions(), "summary": summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
