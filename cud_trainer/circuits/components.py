"""Which modules a forget circuit runs through and a retain circuit does not: where `trainable="circuit"` trains.

To train only the components that what is to be forgotten uses is the proposal of Guo et al. 2024 (arXiv 2410.12949),
who choose them by hand-found mechanisms. Here a component c of a layer (its q, k and v projection, its o projection,
its MLP) has the share of the circuit that runs through it, of a sample with edge scores s:

    mass_c = sum of |s(e)| over the edges e that c reads (q, k, v) or writes (o)   /   sum of |s(e)| over all edges

and of an MLP, which does both, the mean of the two. With F_c and R_c, the means of mass_c over forget and over retain
samples, components are ranked by

    specificity_c = F_c / (F_c + R_c + 0.1 F),    F the mean of F_c over the candidates

which is high where forget circuits carry much and retain circuits little; the last term keeps back components that
carry next to nothing of either. The difference F_c - R_c found a planted layer less often (`tests/circuits/`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import BATCH_BYTES, Samples
from ..models.layers import base_causal_lm, embedding_device
from ..resumable import process_state, run_batches
from .attribution import bytes_per_token, edge_attributions, mean_outputs, needs_counterfactual
from .graph import Graph
from .parts import DecoderParts
from .verification import verified_parts

MOST_SAMPLES = 256  # of each set that are looked at
FLOOR = 0.1
KINDS = ("q", "k", "v", "o", "mlp")


@dataclass(frozen=True)
class CircuitChoice:
    """The components that are trained.

    Attributes:
        names: of the components, `{layer}.{q,k,v,qkv,o,mlp}`, those with the highest specificity first.
        modules: full names of their modules in the base model, in the order of `names`.
        specificity: of all candidates by name, in [0, 1).
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    specificity: dict[str, float]


def component_masses(scores: Tensor, graph: Graph) -> Tensor:
    """Share of each sample's circuit that runs through each component, float64 `[B, n_layers, 5]` in [0, 1].

    Args:
        scores: edge scores, `[B, n_sources, n_destinations]`.

    Returns:
        in the order of `KINDS`; 0 for a sample whose edges all score 0.
    """
    sizes = scores.cpu().double().abs()
    into, out = sizes.sum(1), sizes.sum(2)
    total = into.sum(1)
    masses = sizes.new_zeros(len(sizes), graph.n_layers, len(KINDS))
    for layer in range(graph.n_layers):
        start, source = layer * graph.destinations_per_layer, graph.sources_before_attention(layer)
        ends = [start, *(start + graph.n_heads + number * graph.n_kv_heads for number in range(3))]
        for kind in range(3):
            masses[:, layer, kind] = into[:, ends[kind] : ends[kind + 1]].sum(1)
        masses[:, layer, 3] = out[:, source : source + graph.n_heads].sum(1)
        masses[:, layer, 4] = (into[:, ends[3]] + out[:, source + graph.n_heads]) / 2
    return masses / total.where(total > 0, torch.ones_like(total)).view(-1, 1, 1)


def components(model: PreTrainedModel, parts: DecoderParts) -> dict[str, tuple[str, ...]]:
    """Names of the modules of every component that has a weight, by the component's name, in depth order."""
    names = {id(module): name for name, module in base_causal_lm(model).named_modules()}
    found: dict[str, tuple[str, ...]] = {}
    for layer, part in enumerate(parts.layers):
        kinds = ("qkv",) if len(part.qkv) == 1 else ("q", "k", "v")
        attention = {id(module) for module in part.attention.modules()}
        mlp = [part.mlp, *_maps(module for module in part.module.modules() if id(module) not in attention)]
        inside = {id(module) for module in part.mlp.modules()} - {id(part.mlp)}
        mlp = [module for module in dict.fromkeys(mlp) if id(module) not in inside]
        of_kind = {**{kind: [module] for kind, module in zip(kinds, part.qkv, strict=True)}, "o": [part.o], "mlp": mlp}
        for kind, modules in of_kind.items():
            kept = tuple(names[id(module)] for module in modules if any(True for _ in module.parameters()))
            if kept:
                found[f"{layer}.{kind}"] = kept
    return found


def _maps(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Linear maps: modules with a matrix `weight` and nothing inside."""
    return [
        module
        for module in modules
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not any(True for _ in module.children())
    ]


def specificities(forget: Tensor, retain: Tensor, names: Iterable[str]) -> dict[str, float]:
    """Specificity by component, in [0, 1), from masses `[N, n_layers, 5]`; it does not depend on the order of rows."""
    means: dict[str, list[float]] = {}
    for name in names:
        layer, _, kind = name.partition(".")
        columns = [KINDS.index(part) for part in (kind if kind == "qkv" else [kind])]
        means[name] = [
            math.fsum(masses[:, int(layer), columns].flatten().tolist()) / len(masses) for masses in (forget, retain)
        ]
    floor = FLOOR * math.fsum(mass for mass, _ in means.values()) / len(means)
    return {name: mass / (mass + other + floor) if mass > 0 else 0.0 for name, (mass, other) in means.items()}


def choose_components(specificity: dict[str, float], share: float) -> tuple[str, ...]:
    """The `share` of the components with the highest specificity, at least one; of equal ones those that come first."""
    count = max(1, round(share * len(specificity)))
    return tuple(sorted(specificity, key=lambda name: -specificity[name])[:count])


def check_trainable(trainable: str | None, layers: str | None, options: dict[str, Any]) -> None:
    """Raise `ValueError` for another value than `"circuit"`, or named layers or options that do not fit it."""
    if trainable is None:
        return
    if trainable != "circuit":
        raise ValueError(f"trainable must be 'circuit' or 'none', got {trainable!r}")
    if layers is not None:
        raise ValueError("trainable 'circuit' and trainable_layers both say what is trained: give one of the two")
    check_circuit_options(options)


def check_circuit_options(options: dict[str, Any]) -> None:
    """Raise `ValueError` for attribution options that retain samples cannot serve, and for several processes."""
    if process_state().num_processes > 1:
        raise ValueError("trainable 'circuit' is chosen in one process: several are not supported")
    if needs_counterfactual(options.get("baseline", "zero"), options.get("metric", "prob")):
        raise ValueError(
            "trainable 'circuit' attributes retain samples, which have no counterfactual: choose another baseline and "
            "metric in circuit_args"
        )


def choose_by_circuit(
    model: PreTrainedModel,
    forget: Samples,
    retain: Samples,
    *,
    share: float = 0.25,
    within: Any = None,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    progress: bool = True,
    **options: Any,
) -> CircuitChoice:
    """The components that forget circuits use most beyond what retain circuits do.

    One attribution pass over at most 256 samples of each set, those with the smallest hash of their id: the choice does
    not depend on the order of the rows.

    Args:
        model: as it is before unlearning.
        share: of the components, in (0, 1].
        within: an adapter's configuration: only modules that it would adapt are candidates.
        **options: of `edge_attributions`.

    Raises:
        ValueError: for an architecture without a description, several processes, or no candidate.
    """
    check_circuit_options(options)
    parts = verified_parts(model)
    candidates = components(model, parts)
    if within is not None:
        linear = {name for name, module in base_causal_lm(model).named_modules() if _maps([module])}
        candidates = {
            name: adapted
            for name, modules in candidates.items()
            if (adapted := tuple(inner for module in modules for inner in _adapted(linear, module, within)))
        }
    if not candidates:
        raise ValueError("trainable 'circuit' has nothing to choose from: no module of a circuit is in target_modules")
    masses = [
        _masses(model, samples, parts, batch_size=batch_size, batch_bytes=batch_bytes, progress=progress, **options)
        for samples in (forget, retain)
    ]
    specificity = specificities(masses[0], masses[1], candidates)
    names = choose_components(specificity, share)
    return CircuitChoice(names, tuple(module for name in names for module in candidates[name]), specificity)


def _masses(
    model: PreTrainedModel,
    samples: Samples,
    parts: DecoderParts,
    *,
    batch_size: int | None,
    batch_bytes: int,
    progress: bool,
    **options: Any,
) -> Tensor:
    """Masses of at most `MOST_SAMPLES` samples, `[N, n_layers, 5]`."""
    samples = samples.measured
    ranks = sorted(range(len(samples)), key=lambda row: hashlib.sha256(samples.ids[row].encode()).digest())
    samples = samples.select(ranks[:MOST_SAMPLES])
    plan = samples.plan(bytes_per_token=bytes_per_token(model, parts), batch_size=batch_size, batch_bytes=batch_bytes)
    if options.get("baseline") == "mean":
        options["means"] = mean_outputs(model, (samples.pad(rows) for rows in plan))

    def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        result = edge_attributions(model, batch, **options)
        return {"masses": component_masses(result.scores, result.graph)}

    device = embedding_device(model)
    masses = run_batches("circuit components", samples, compute, plan, device=device, progress=progress)["masses"]
    broken = (~masses.isfinite().all(2).all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"edge scores of sample {samples.ids[broken[0]]!r} are not finite")
    return masses


def _adapted(linear: set[str], module: str, config: Any) -> list[str]:
    """Linear maps of `module` that an adapter with this configuration would go on."""
    inside = sorted(name for name in linear if name == module or name.startswith(f"{module}."))
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return inside
    if isinstance(targets, str):
        return [name for name in inside if re.fullmatch(targets, name)]
    return [name for name in inside if any(name == target or name.endswith(f".{target}") for target in targets)]


def train_components(model: nn.Module, choice: CircuitChoice) -> list[str]:
    """Freeze everything but the chosen modules; returns the names of what is trained."""
    prefixes = tuple(f"{name}." for name in choice.modules)
    trained = []
    for name, parameter in base_causal_lm(model).named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def adapter_on_components(peft_config: Any, choice: CircuitChoice) -> Any:
    """A copy of an adapter's configuration that puts it on the chosen modules only."""
    config = deepcopy(peft_config)
    config.target_modules = set(choice.modules)
    return config


def check_adapter_can_follow(peft_config: Any) -> None:
    """Raise `ValueError` for an adapter that cannot be put on chosen modules, or says itself which layers it is on."""
    if not hasattr(peft_config, "target_modules"):
        kind = str(peft_config.peft_type).rpartition(".")[2]
        raise ValueError(f"trainable 'circuit' chooses target_modules, which adapters of type {kind} do not have")
    for name in ("layers_to_transform", "target_parameters", "modules_to_save", "exclude_modules"):
        if getattr(peft_config, name, None):
            raise ValueError(f"trainable 'circuit' chooses where the adapter goes: leave out its {name}")


def train_by_circuit(
    model: PreTrainedModel, forget: Samples, retain: Samples, peft_config: Any = None, **options: Any
) -> tuple[CircuitChoice, Any]:
    """Choose, and have nothing else trained: the choice, and the adapter's configuration that follows it (or `None`).

    Args:
        **options: of `choose_by_circuit`.
    """
    choice = choose_by_circuit(model, forget, retain, within=peft_config, **options)
    if peft_config is not None:
        return choice, adapter_on_components(peft_config, choice)
    train_components(model, choice)
    return choice, None
