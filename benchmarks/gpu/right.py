"""Part `right`: what CUDA computes in float32 and bfloat16 against the CPU in float64.

Per sample: edge scores (EAP) and log-probabilities of the answer tokens; and NPO's loss of all pairs with its gradient.
The models are SmolLM2 and the tiny models of the tests' oracle, one or more for every architecture that is described.
bfloat16: scored with weights in bfloat16, trained as `bf16` does it, float32 weights under autocast.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cud_trainer.circuits import edge_attributions
from cud_trainer.data import pad_batch
from cud_trainer.logprobs import score_answers
from cud_trainer.objectives import Reference, UnlearningLoss

from .record import Record
from .setting import Setting

BUDGET_S = 110.0
SAMPLES = 8  # half of them are forgotten, half retained
BATCHES = (8, 2)
DTYPES = (torch.float32, torch.bfloat16)
ATTENTION = ("sdpa", "eager")
# What a value may be at most (`edges_rank` and `gradient_cosine`: at least). bfloat16 has 8 bits: it must rank alike.
LIMITS = {
    torch.float32: {"edges": 1e-3, "logps": 1e-3, "loss": 1e-4, "gradient": 1e-3},
    torch.bfloat16: {"edges_rank": 0.95, "logps": 0.5, "loss": 0.05, "gradient_cosine": 0.98},
}


def oracle() -> ModuleType:
    """The tests' oracle: the tiny models, and the library's norms in float64."""
    path = next((Path(__file__).parents[2] / "tests").rglob("oracle.py"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Found:
    """Edge scores `[N, n_edges]` and token log-probabilities by sample, NPO's loss, its gradient by parameter."""

    edges: Tensor
    logps: list[Tensor]
    loss: float
    gradient: dict[str, Tensor]


class Case:
    """A model with its samples, and what the CPU says in float64."""

    def __init__(self, model: torch.nn.Module, rows: list[dict[str, Any]], pad: int, exact: Any) -> None:
        self.model, self.rows, self.pad = model, rows, pad
        with exact():
            # The answers are e^2 times likelier than they were: the log-ratio is not 0.
            self.reference_logps = [values.sum() - 2.0 for values in self._logps(model, SAMPLES)]
            self.expected = self.compute(model, model, SAMPLES, torch.float64)

    def batches(self, size: int, device: torch.device) -> list[dict[str, Tensor]]:
        chunks = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        return [{key: value.to(device) for key, value in pad_batch(chunk, self.pad).items()} for chunk in chunks]

    @torch.no_grad()
    def _logps(self, model: torch.nn.Module, size: int) -> list[Tensor]:
        found: list[Tensor] = []
        for batch in self.batches(size, next(model.parameters()).device):
            scores = score_answers(model, batch)
            found += [row[mask].double().cpu() for row, mask in zip(scores.token_logps, scores.mask, strict=True)]
        return found

    def compute(self, scored: torch.nn.Module, trained: torch.nn.Module, size: int, autocast: torch.dtype) -> Found:
        device = next(scored.parameters()).device
        edges = [edge_attributions(scored, batch).edges.double() for batch in self.batches(size, device)]
        loss, gradient = self.npo(trained, size, autocast)
        return Found(torch.cat(edges), self._logps(scored, size), loss, gradient)

    def npo(self, model: torch.nn.Module, size: int, autocast: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        """Mean loss of the pairs and its gradient, `size` sequences at a time."""
        device, half = next(model.parameters()).device, SAMPLES // 2
        objective = UnlearningLoss("npo")
        reference = Reference(forget_logps=torch.stack(self.reference_logps[:half]).to(device))
        total = 0.0
        model.requires_grad_(True).zero_grad()
        for start in range(0, half, size // 2):
            index = torch.arange(start, start + size // 2)
            rows = [self.rows[i] for i in index] + [self.rows[half + i] for i in index]
            batch = {key: value.to(device) for key, value in pad_batch(rows, self.pad).items()}
            mixed = torch.autocast(device.type, autocast) if autocast is torch.bfloat16 else nullcontext()
            with mixed:
                terms = objective(model, {**batch, "forget_index": index, "retain_index": index}, reference)
            loss = (terms.forget + terms.retain).sum() / half
            loss.backward()
            total += float(loss.detach())
        gradient = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.requires_grad_(False)
        return total, gradient


def errors(found: Found, expected: Found) -> dict[str, float]:
    """Largest over samples, or of the whole gradient; `edges_rank`: Spearman of the absolute scores, lowest sample."""
    edges = (found.edges - expected.edges).norm(dim=1) / expected.edges.norm(dim=1)
    ranks = [rank_correlation(a.abs(), b.abs()) for a, b in zip(found.edges, expected.edges, strict=True)]
    logps = [(a - b).abs().max() for a, b in zip(found.logps, expected.logps, strict=True)]
    names = list(expected.gradient)
    squared = sum((found.gradient[n] - expected.gradient[n]).square().sum() for n in names)
    product = sum((found.gradient[n] * expected.gradient[n]).sum() for n in names)
    norms = [sum(g[n].square().sum() for n in names) ** 0.5 for g in (found.gradient, expected.gradient)]
    return {
        "edges": float(edges.max()),
        "edges_rank": min(ranks),
        "logps": float(max(logps)),
        "loss": abs(found.loss - expected.loss) / abs(expected.loss),
        "gradient": float(squared**0.5 / norms[1]),
        "gradient_cosine": float(product / norms[0] / norms[1]),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, for values without ties."""
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


def judged(values: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """The errors, and which of them are beyond their limit (what is not finite is)."""
    beyond = [
        name
        for name, limit in LIMITS[dtype].items()
        if not (values[name] >= limit if name in ("edges_rank", "gradient_cosine") else values[name] <= limit)
    ]
    return {**values, "beyond_limit": ", ".join(beyond)}


def cast(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A copy in `dtype`; buffers (rotary frequencies) in float32, as a model is loaded."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            wanted = torch.float32 if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, buffer.to(device, wanted))
    return model


def check(case: Case, setting: Setting, dtype: torch.dtype, attention: str, size: int) -> dict[str, Any]:
    scored = cast(case.model, dtype, setting.device)
    trained = cast(case.model, torch.float32, setting.device)
    for model in (scored, trained):
        model.set_attn_implementation(attention)  # type: ignore[operator]
    return judged(errors(case.compute(scored, trained, size, dtype), case.expected), dtype)


def check_case(case: Callable[[str], Case], name: str, *options: Any) -> dict[str, Any]:
    """`check`, with a reference that is only computed if it is needed."""
    return check(case(name), *options)


def attention_of(options: dict[str, Any]) -> tuple[str, ...]:
    """The implementations that a case can do: Gemma 2 caps its scores, which sdpa cannot."""
    only = options.get("attn_implementation")
    return (only,) if only else ATTENTION


def tiny_rows(vocabulary: int = 250) -> list[dict[str, Any]]:
    """Random samples of 9 to 16 tokens, the first four of which are the prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in range(9, 9 + SAMPLES):
        tokens = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * 4 + tokens[4:]})
    return rows


def text_case(setting: Setting, exact: Any) -> Case:
    """SmolLM2 in float64 on samples of the forget set."""
    prepared = setting.prepared(setting.samples.forget.select(range(SAMPLES)))
    batch = prepared.pad(range(SAMPLES))
    sizes = batch["attention_mask"].sum(1).tolist()
    rows = [{key: batch[key][row, :size].tolist() for key in ("input_ids", "labels")} for row, size in enumerate(sizes)]
    return Case(setting.text_model(torch.float64), rows, prepared.pad_token_id, exact)


def tiny_case(source: ModuleType, name: str) -> Case:
    """One of the tiny models of the oracle."""
    return Case(source.make_case(name), tiny_rows(), 0, source.double_precision)


def run(record: Record, setting: Setting) -> None:
    """All configurations of SmolLM2 first, then one configuration of all architectures after the other."""
    source = oracle()
    makers: dict[str, Callable[[], Case]] = {"smollm2": partial(text_case, setting, source.double_precision)}
    for name in source.CASES:
        makers[name] = partial(tiny_case, source, name)
    kept: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in kept:
            kept[name] = makers[name]()
        return kept[name]

    grid = list(itertools.product(DTYPES, ATTENTION, BATCHES))
    rest = grid if not setting.tiny else [grid[0], grid[-1]]
    jobs = [("smollm2", *options) for options in (rest if setting.tiny else grid)]
    jobs += [(n, *options) for options in rest for n in source.CASES if options[1] in attention_of(source.CASES[n][1])]
    for name, dtype, attention, size in jobs:
        key = f"{name} {str(dtype).removeprefix('torch.')} {attention} batch {size}"
        record.figure(key, partial(check_case, case, name, setting, dtype, attention, size))


def table(figures: dict[str, Any]) -> list[str]:
    """The worst over configurations, by model type and precision."""
    lines = ["right: worst of all configurations (relative error; rank, cosine: correlation)"]
    for name, dtype in itertools.product(("smollm2", "tiny models"), ("float32", "bfloat16")):
        of_model = lambda key, name=name: (key.split()[0] == "smollm2") == (name == "smollm2")  # noqa: E731
        found = [f for key, f in figures.items() if of_model(key) and key.split()[1] == dtype and "edges" in f]
        if not found:
            continue
        worst = {
            key: (min if key in ("edges_rank", "gradient_cosine") else max)(float(f[key]) for f in found)
            for key in ("edges", "edges_rank", "logps", "loss", "gradient", "gradient_cosine")
        }
        shown = ", ".join(f"{key} {value:.3g}" for key, value in worst.items())
        lines.append(f"  {name} {dtype} ({len(found)}): {shown}")
    beyond = [f"{key} ({f['beyond_limit']})" for key, f in figures.items() if f.get("beyond_limit")]
    return [*lines, f"  beyond a limit: {'; '.join(beyond) if beyond else 'none'}"]
