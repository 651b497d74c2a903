"""Does a circuit do the work? The model is run with every edge outside the circuit replaced by the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import BATCH_BYTES, COUNTERFACTUAL, Samples
from ..logprobs import score_answers, wide
from ..models.layers import embedding_device
from ..models.modes import evaluation_without_gradients, ungrouped
from ..models.precision import nearly_exact
from ..resumable import run_parts
from .attribution import (
    bytes_per_token,
    check_batch,
    check_options,
    forward_outputs,
    mean_outputs,
    metric_point,
)
from .graph import Graph
from .parts import DecoderParts
from .recording import LayerMaps, Recorder, SourceOutputs, embedded, hidden_states_of, scaled
from .verification import verified_parts


@dataclass
class Faithfulness:
    """What circuits keep of the metric.

    Attributes:
        clean: metric of the whole model, `[B]`.
        baseline: metric with every edge replaced, `[B]`.
        circuit: metric with the edges outside the circuit replaced, `[B]`.
        random: the same for random circuits with as many edges, `[n_random, B]`.
        sizes: edges per circuit, `[B]`.
    """

    clean: Tensor
    baseline: Tensor
    circuit: Tensor
    random: Tensor
    sizes: Tensor

    @property
    def share(self) -> Tensor:
        """Share of the metric that the circuit keeps, `(circuit - baseline) / (clean - baseline)`, `[B]`.

        1: the circuit does what the model does; 0: no more than the baseline; outside [0, 1] where what is missing
        worked against the answer. NaN where the model does no more than the baseline.
        """
        return self._share(self.circuit)

    @property
    def random_share(self) -> Tensor:
        """The same for the random circuits, `[n_random, B]`."""
        return self._share(self.random)

    def _share(self, metric: Tensor) -> Tensor:
        whole = self.clean - self.baseline
        return (metric - self.baseline) / whole.where(whole != 0, torch.full_like(whole, torch.nan))


def faithfulness(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    circuits: Tensor,
    *,
    n_random: int = 5,
    seed: int = 0,
    **options: Any,
) -> Faithfulness:
    """Share of the metric that circuits keep, beside random circuits of the same size.

    Args:
        model: as for `edge_attributions`.
        batch: the same.
        circuits: True on each sample's edges, bool `[B, n_edges]` (as `select_circuits` returns).
        n_random: random circuits per sample, edges drawn uniformly.
        seed: of these.
        **options: `baseline`, `metric`, `means`, `ungroup_kv` of `edge_attributions`.

    Raises:
        ValueError: as `edge_attributions`, and for circuits that do not fit the batch or the graph.
    """
    graph = verified_parts(model).graph(options.get("ungroup_kv", False))
    check_circuits(circuits, batch["input_ids"], graph)
    generator = torch.Generator().manual_seed(seed)
    sizes = circuits.sum(1)

    def run(chosen: Tensor) -> Tensor:
        return circuit_metric(model, batch, chosen, **options)

    def draw() -> Tensor:
        ranks = torch.rand(circuits.shape, generator=generator).argsort(1).argsort(1)
        return ranks < sizes.unsqueeze(1)

    random = [run(draw()) for _ in range(n_random)]
    return Faithfulness(
        clean=run(torch.ones_like(circuits)),
        baseline=run(torch.zeros_like(circuits)),
        circuit=run(circuits),
        random=torch.stack(random) if random else torch.empty(0, len(circuits)),
        sizes=sizes,
    )


def dataset_faithfulness(
    model: PreTrainedModel,
    samples: Samples,
    circuits: Tensor,
    *,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Faithfulness:
    """`faithfulness` of every sample of some, rows in dataset order; under `torchrun` by all processes together.

    Args:
        circuits: bool `[N, n_edges]`.
        batch_size: samples of a batch at most.
        batch_bytes: memory of a batch at most, see `cud_trainer.data.plan_batches`.
        **options: of `faithfulness`; `baseline="mean"` takes the means over `samples`.

    Raises:
        ValueError: as `faithfulness`.
    """
    parts, samples = verified_parts(model), samples.measured
    check_circuits(circuits, samples, parts.graph(options.get("ungroup_kv", False)))
    # one copy of the residual stream for every destination, beside what a pass takes
    per_token = bytes_per_token(model, parts) + 12.0 * parts.n_heads * parts.hidden_size
    plan = samples.plan(bytes_per_token=per_token, batch_size=batch_size, batch_bytes=batch_bytes)
    if options.get("baseline") == "mean" and "means" not in options:
        options["means"] = mean_outputs(model, (samples.pad(rows) for rows in plan))

    def part(rows: list[int]) -> dict[str, Tensor]:
        found = faithfulness(model, samples.pad(rows), circuits[rows], seed=seed + rows[0], **options)
        return {name: values.movedim(-1, 0) for name, values in vars(found).items()}

    found = run_parts("faithfulness", part, plan, progress=progress)
    return Faithfulness(**{name: values.movedim(0, -1) for name, values in found.items()})


@torch.no_grad()
def circuit_metric(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    circuits: Tensor,
    *,
    baseline: str = "zero",
    metric: str = "prob",
    means: SourceOutputs | None = None,
    ungroup_kv: bool = False,
) -> Tensor:
    """The metric of each sample, `[B]`, when every destination reads the baseline over edges outside its circuit.

    Sources keep writing what they compute in this very run, so an edge left out early changes all that follows.

    Args and errors: see `faithfulness`.
    """
    check_options("eap", 1, baseline, metric)
    parts = verified_parts(model)
    graph = parts.graph(ungroup_kv)
    check_batch(batch, baseline, metric, means)
    check_circuits(circuits, batch["input_ids"], graph)
    device = embedding_device(model)
    batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
    corrupt = means
    with evaluation_without_gradients(model), nearly_exact(model):
        if baseline == "counterfactual":
            with Recorder(parts) as recorder:
                corrupt = forward_outputs(model, recorder, batch, batch[COUNTERFACTUAL])
        embeddings = embedded(model, batch["input_ids"])
        missing = torch.zeros(len(circuits), *graph.mask.shape, dtype=torch.bool)
        missing[:, graph.mask] = ~circuits.cpu()
        with _EdgePatching(parts, graph, missing.to(device), embeddings, corrupt, ungroup_kv):
            scores = score_answers(model, batch, inputs_embeds=embeddings)
            return metric_point(metric, scores, batch.get(COUNTERFACTUAL)).value.cpu()


def check_circuits(circuits: Tensor, samples: Sized, graph: Graph) -> None:
    """Raise `ValueError` unless `circuits` is a bool `[B, n_edges]` for these samples and graph."""
    expected = (len(samples), graph.n_edges)
    if circuits.dtype != torch.bool or circuits.shape != expected:
        raise ValueError(
            f"circuits must be bool {list(expected)} for this batch and model, got {circuits.dtype} "
            f"{list(circuits.shape)}"
        )


class _EdgePatching:
    """Hooks that give every destination its own residual stream, without the edges that are missing.

    The model's own residual stream holds the sum of all sources (and biases), so destination v reads
    `stream - sum over missing edges u -> v of (what u writes - its baseline)`.
    """

    def __init__(
        self,
        parts: DecoderParts,
        graph: Graph,
        missing: Tensor,
        embeddings: Tensor,
        corrupt: SourceOutputs | None,
        ungroup_kv: bool,
    ) -> None:
        self.parts, self.graph, self.corrupt = parts, graph, corrupt
        self.maps = [LayerMaps(parts, layer, ungroup_kv) for layer in parts.layers]
        self.missing = missing.to(wide(embeddings).dtype)
        # what each source writes beyond its baseline, `[B, n_sources, T, d]`, filled as the run goes
        self.beyond = torch.zeros(
            len(embeddings),
            len(graph.sources),
            *embeddings.shape[1:],
            dtype=self.missing.dtype,
            device=embeddings.device,
        )
        written = scaled(embeddings, parts.description.embedding_scale)
        self.beyond[:, 0] = self._difference(written, None if corrupt is None else corrupt.embedding)

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for index in range(len(self.parts.layers)):
            self._hook_layer(index)
        self._hook(self.parts.final_norm.register_forward_pre_hook(self._final))

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    @staticmethod
    def _difference(output: Tensor, baseline: Tensor | None) -> Tensor:
        return wide(output) if baseline is None else wide(output) - wide(baseline).to(output.device)

    def _read(self, stream: Tensor, columns: slice | Tensor, sources: int) -> Tensor:
        """What destinations read, `[B, V, T, d]`, given the model's own stream `[B, T, d]`."""
        missing = self.missing[:, :sources, columns].mT
        removed = (missing @ self.beyond[:, :sources].flatten(2)).unflatten(-1, stream.shape[1:])
        return (wide(stream).unsqueeze(1) - removed.to(stream.device)).to(stream.dtype)

    def _final(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._read(args[0], slice(-1, None), len(self.graph.sources)).squeeze(1), *args[1:])

    def _hook_layer(self, index: int) -> None:
        layer, maps, graph = self.parts.layers[index], self.maps[index], self.graph
        before_attention, before_mlp = graph.sources_before_attention(index), graph.sources_before_mlp(index)
        first_column = index * graph.destinations_per_layer
        mlp_column = first_column + graph.destinations_per_layer - 1
        mlp_source = before_attention + graph.n_heads
        seen: dict[str, Tensor] = {}

        def keep_stream(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
            seen["stream"] = args[0] if args else kwargs["hidden_states"]

        def keep_heads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["heads"] = wide(args[0])

        def keep_scale(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert maps.output_norm is not None
            seen["heads"] = seen["heads"] * maps.output_norm.inverse_scale(maps.output_norm.centre(wide(args[0])))

        def write_heads(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            corrupt = None if self.corrupt is None else self.corrupt.heads[index]
            heads = self._difference(seen.pop("heads"), corrupt).unflatten(-1, (graph.n_heads, -1))
            written = torch.einsum("bthc,hcd->bhtd", heads, maps.writers())
            self.beyond[:, before_attention:mlp_source] = written.to(self.beyond.device)

        def write_mlp(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            corrupt = None if self.corrupt is None else self.corrupt.mlps[index]
            written = scaled(hidden_states_of(output, args[0]), self.parts.description.residual_scale)
            self.beyond[:, mlp_source] = self._difference(written, corrupt).to(self.beyond.device)

        def read_mlp(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            stream = seen["stream"] if layer.shared_norm else args[0]
            read = self._read(stream, slice(mlp_column, mlp_column + 1), before_mlp).squeeze(1)
            return (layer.mlp_norm(read) if layer.shared_norm and layer.mlp_norm is not None else read, *args[1:])

        def read_heads(number: int) -> Callable:
            start = sum(len(heads) for heads in maps.expansion[:number])
            raw = torch.arange(start, start + len(maps.expansion[number]))
            columns = first_column + torch.argsort(maps.order)[raw]

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                read = self._read(seen["stream"], columns.to(self.missing.device), before_attention)
                if layer.attention_norm is not None:
                    read = layer.attention_norm(read)
                weight, bias = maps.projection(number)
                # by head, in the precision of the product that this replaces
                heads = torch.einsum("bvtd,vcd->btvc", read.to(weight.dtype), weight)
                return (heads if bias is None else heads + bias).flatten(2).to(output.dtype)

            return hook

        self._hook(layer.module.register_forward_pre_hook(keep_stream, with_kwargs=True))
        for number, module in enumerate(layer.qkv):
            self._hook(module.register_forward_hook(read_heads(number)))
        self._hook(layer.o.register_forward_pre_hook(keep_heads))
        if layer.attention_output_norm is not None:
            self._hook(layer.attention_output_norm.register_forward_pre_hook(keep_scale))
        self._hook(layer.attention_output.register_forward_hook(write_heads))
        self._hook(layer.mlp_input.register_forward_pre_hook(read_mlp))
        self._hook(layer.mlp_output.register_forward_hook(write_mlp))
        if maps.expands:
            self._stack.enter_context(ungrouped(layer.attention, self.parts.n_heads))
