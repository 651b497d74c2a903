"""Edge attribution patching, per sample and in batches, on the very model that will be trained.

For a metric M of a sample and an edge u -> v (Syed et al. 2023, arXiv 2310.10348):

    score(u -> v) = sum over positions p of (corrupt_u[p] - clean_u[p]) . dM/d(input_v)[p]

where `input_v` is v's own copy of the residual stream *before* its norm. EAP takes the gradient at the clean input,
EAP-IG (Hanna et al. 2024, arXiv 2403.17806) its mean over m points between the baseline and the clean embedding.

How it is computed (the scores are exact, nothing is approximated): one backward pass per point of a whole batch gives
the gradients of the *outputs* of the q, k and v projections. Pulling a gradient back through projection and norm is
linear up to a rank-one term, so gradients are summed over the points in head space, pulled back once, and contracted
with the source outputs by one batched matrix product per layer, in chunks of positions that bound the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import length_sorted_batches
from ..logprobs import AnswerScores, score_answers
from .architectures import DecoderParts, LayerParts, decoder_parts, linear_map
from .graph import Graph

METHODS = ("eap", "eap-ig")
BASELINES = ("zero",)
METRICS = {
    "prob": lambda scores: scores.mean_logps.exp(),
    "logprob": lambda scores: scores.mean_logps,
}
# Source outputs of this many bytes are held at a time while contracting.
CHUNK_BYTES = 256 * 2**20


@dataclass
class EdgeAttributions:
    """Edge scores of a batch.

    Attributes:
        scores: `[batch, n_sources, n_destinations]`, float32 (float64 for a float64 model), on the CPU; exactly 0 where
            there is no edge. Negative: taking the edge away lowers the metric, the edge helps the answer.
        graph: names and mask of the nodes and edges.
        metric: M on the clean input, `[batch]`.
        mean_logps: mean answer log-probability on the clean input, `[batch]`.
        lengths: answer tokens, `[batch]`.
    """

    scores: Tensor
    graph: Graph
    metric: Tensor
    mean_logps: Tensor
    lengths: Tensor

    @property
    def edges(self) -> Tensor:
        """Scores of the existing edges only, `[batch, n_edges]`, in row-major order of `graph.mask`."""
        return self.scores[:, self.graph.mask]


def check_options(method: str, steps: int, baseline: str, metric: str) -> None:
    """Raise `ValueError` naming the first option with an unknown value."""
    for option, value, known in (
        ("method", method, METHODS),
        ("baseline", baseline, BASELINES),
        ("metric", metric, METRICS),
    ):
        if value not in known:
            raise ValueError(f"unknown {option} {value!r} for edge attribution; choose one of {sorted(known)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"edge attribution needs steps >= 1, got {steps!r}")


def edge_attributions(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    *,
    method: str = "eap",
    steps: int = 5,
    baseline: str = "zero",
    metric: str = "prob",
    ungroup_kv: bool = False,
) -> EdgeAttributions:
    """Score every edge of the model's graph for every sample of `batch`.

    Args:
        model: a causal LM of a supported architecture; weights, mode, flags and hooks are left as they were.
        batch: `input_ids`, `attention_mask`, `labels` (-100 outside the answer), each `[B, T]`; any padding side.
        method: `"eap"` (gradient at the clean input) or `"eap-ig"` (mean gradient over `steps` points).
        steps: points of EAP-IG, `(k/steps) * embedding` for k = 1..steps. The baseline itself (k = 0) is left out: the
            Jacobian of an RMS norm at zero is 1/sqrt(eps) per layer and overflows. Ignored by `"eap"`.
        baseline: `"zero"`: corrupt outputs are 0.
        metric: `"prob"`, exp(mean answer log-prob), or `"logprob"`, the mean answer log-prob.
        ungroup_kv: score grouped key/value heads once per query head; they sum to the grouped scores.

    Returns:
        `EdgeAttributions`. A sample's scores do not depend on the other samples, the padding side or the attention
        implementation (up to rounding).

    Raises:
        ValueError: for an unknown option, an unsupported architecture or a sample without an answer token.
    """
    check_options(method, steps, baseline, metric)
    parts = decoder_parts(model)
    empty = (batch["labels"][:, 1:] == -100).all(1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sample {empty[0]} of the batch has no answer token")
    graph = Graph(len(parts.layers), parts.n_heads, parts.n_heads if ungroup_kv else parts.n_kv_heads)

    embed = model.get_input_embeddings()
    batch = {key: value.to(embed.weight.device) for key, value in batch.items() if isinstance(value, Tensor)}
    with _frozen(model), _Recorder(parts, ungroup_kv) as recorder, torch.enable_grad():
        with torch.no_grad():
            embeddings = embed(batch["input_ids"])
        points = [1.0] if method == "eap" else [k / steps for k in range(1, steps + 1)]
        for alpha in points:  # ends at the clean input, whose activations are the clean ones
            inputs = (alpha * embeddings).requires_grad_()
            scores = score_answers(model, batch, inputs_embeds=inputs)
            value = METRICS[metric](scores)
            torch.autograd.grad(value.sum(), inputs)
            recorder.accumulate(1.0 / len(points))
    answer = _detached(scores)
    attention_mask = batch["attention_mask"].bool()
    result = _contract(recorder, graph, embeddings, attention_mask)
    return EdgeAttributions(result.cpu(), graph, value.detach().cpu(), answer.mean_logps.cpu(), answer.lengths.cpu())


def attribute_dataset(
    model: PreTrainedModel,
    prepared: Dataset,
    *,
    pad_token_id: int,
    batch_size: int = 8,
    desc: str | None = "circuits",
    **options,
) -> tuple[Tensor, Tensor, Tensor, Graph]:
    """Edge scores of every sample of a prepared dataset.

    Returns:
        `(edges [N, n_edges] float32, mean answer log-probs [N], answer lengths [N], graph)`, rows in dataset order.

    Raises:
        ValueError: as `edge_attributions`, and when a sample's scores are not finite (named by id).
    """
    device = model.get_input_embeddings().weight.device
    edges: Tensor | None = None
    mean_logps, lengths = torch.zeros(len(prepared)), torch.zeros(len(prepared), dtype=torch.long)
    graph: Graph | None = None
    for rows, batch in length_sorted_batches(prepared, batch_size, pad_token_id, device=device, desc=desc):
        result = edge_attributions(model, batch, **options)
        graph = result.graph
        if edges is None:
            edges = torch.empty(len(prepared), graph.n_edges)
        edges[rows] = result.edges.float()
        mean_logps[rows], lengths[rows] = result.mean_logps.float(), result.lengths
    assert edges is not None and graph is not None
    broken = (~edges.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"edge scores of sample {prepared['sample_id'][broken[0]]!r} are not finite")
    return edges, mean_logps, lengths, graph


@dataclass
class _LayerRecord:
    """What one layer contributes, per point and summed over points."""

    # of the current point
    norm_input: Tensor | None = None
    heads_out: Tensor | None = None
    mlp_out: Tensor | None = None
    projections: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    mlp_gradient: Tensor | None = None
    # summed over the points: gradients in head space, `[B, T, heads, head_dim]`, and at the MLP's residual input
    head_gradient: Tensor | None = None
    mlp_total: Tensor | None = None
    # the rank-one part of the norm's Jacobian, one pair per point: direction `[B, T, d]`, per head `[B, T, heads]`
    rank_one: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Recorder:
    """Hooks on the decoder's parts while in its context; turns each backward pass into sums."""

    def __init__(self, parts: DecoderParts, ungroup_kv: bool) -> None:
        self.parts = parts
        self.ungroup_kv = ungroup_kv
        self.layers = [_LayerRecord() for _ in parts.layers]
        self.final_gradient: Tensor | None = None
        self.final_total: Tensor | None = None
        hidden = parts.layers[0].attention_norm.weight.shape[0]
        n_heads, head_dim = parts.n_heads, parts.head_dim
        self.biases: list[dict[str, Tensor | None]] = []
        self.readers: list[Tensor] = []  # q, k, v heads onto the residual stream, `[heads, head_dim, d]`
        self.writers: list[Tensor] = []  # W_O by head, `[heads, head_dim, d]`
        for layer in parts.layers:
            weights, biases = [], {}
            for name in "qkv":
                weight, bias = linear_map(getattr(layer, name), hidden)
                weights.append(self._per_head(_wide(weight), name))
                biases[name] = None if bias is None else self._per_head(_wide(bias), name).flatten()
            gain = _wide(layer.attention_norm.weight.detach())
            self.readers.append(torch.cat(weights) * gain)
            self.biases.append(biases)
            weight, _ = linear_map(layer.o, n_heads * head_dim)
            self.writers.append(_wide(weight).T.reshape(n_heads, head_dim, hidden))

    def _per_head(self, rows: Tensor, name: str) -> Tensor:
        """Split the output rows of a projection by head; repeat key/value heads when they are ungrouped."""
        rows = rows.detach().reshape(-1, self.parts.head_dim, *rows.shape[1:])
        if self.ungroup_kv and name != "q":
            rows = rows.repeat_interleave(self.parts.n_heads // self.parts.n_kv_heads, dim=0)
        return rows

    # -- hooks ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> _Recorder:
        self._stack = ExitStack()
        for record, layer in zip(self.layers, self.parts.layers, strict=True):
            self._hook_layer(record, layer)
        self._hook(self.parts.final_norm.register_forward_pre_hook(self._tap(self._set_final)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _set_final(self, gradient: Tensor) -> None:
        self.final_gradient = gradient

    @staticmethod
    def _tap(store):
        """A pre-hook that gives a norm its own view of the residual stream and stores the gradient of that view.

        The skip connection keeps the original tensor, so the gradient is that of the branch alone.
        """

        def pre_hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            view = args[0].view_as(args[0])
            view.register_hook(lambda gradient: store(gradient.detach()))
            return (view, *args[1:])

        return pre_hook

    def _hook_layer(self, record: _LayerRecord, layer: LayerParts) -> None:
        def keep_norm_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            record.norm_input = args[0].detach()

        def keep_heads(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            record.heads_out = args[0].detach()

        def keep_mlp(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            record.mlp_out = output.detach()

        def store_mlp_gradient(gradient: Tensor) -> None:
            record.mlp_gradient = gradient

        def keep_projection(name: str):
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if self.ungroup_kv and name != "q":
                    heads = output.unflatten(-1, (self.parts.n_kv_heads, self.parts.head_dim))
                    repeats = self.parts.n_heads // self.parts.n_kv_heads
                    output = heads.repeat_interleave(repeats, dim=-2).flatten(-2)
                record.projections[name] = output.detach()
                output.register_hook(lambda gradient: record.gradients.update({name: gradient.detach()}))
                return output

            return hook

        self._hook(layer.attention_norm.register_forward_pre_hook(keep_norm_input))
        self._hook(layer.o.register_forward_pre_hook(keep_heads))
        self._hook(layer.mlp.register_forward_hook(keep_mlp))
        self._hook(layer.mlp_norm.register_forward_pre_hook(self._tap(store_mlp_gradient)))
        for name in "qkv":
            self._hook(getattr(layer, name).register_forward_hook(keep_projection(name)))
        if self.ungroup_kv:
            # The projections already return one key/value head per query head.
            groups = layer.attention.num_key_value_groups
            layer.attention.num_key_value_groups = 1
            self._stack.callback(setattr, layer.attention, "num_key_value_groups", groups)

    # -- sums over the points ------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self, share: float) -> None:
        """Add the point whose backward pass has just run, with weight `share`.

        With y = gain * x * r, r = 1/rms(x), the gradient g of a projection output pulls back to the norm's input as
        `r (gain * W^T g) - (x r) r <g, W y> / d`: linear in `r g`, plus one direction per point.
        """
        for record, biases in zip(self.layers, self.biases, strict=True):
            assert record.norm_input is not None
            x = _wide(record.norm_input)
            inverse_rms = (x.square().mean(-1, keepdim=True) + self.parts.epsilon).rsqrt()
            gradients, products = [], []
            for name in "qkv":
                gradient, output = _wide(record.gradients[name]), _wide(record.projections[name])
                bias = biases[name]
                without_bias = output if bias is None else output - bias.to(output.device)
                shape = (*gradient.shape[:-1], -1, self.parts.head_dim)
                gradients.append(gradient.view(shape))
                products.append((gradient * without_bias).view(shape).sum(-1))
            scale = inverse_rms * share
            total = torch.cat(gradients, -2) * scale.unsqueeze(-1)
            record.rank_one.append((x * inverse_rms, torch.cat(products, -1) * scale / x.shape[-1]))
            record.head_gradient = total if record.head_gradient is None else record.head_gradient.add_(total)
            assert record.mlp_gradient is not None
            mlp = _wide(record.mlp_gradient) * share
            record.mlp_total = mlp if record.mlp_total is None else record.mlp_total.add_(mlp)
            record.norm_input = record.mlp_gradient = None
            record.projections.clear()
            record.gradients.clear()
        assert self.final_gradient is not None
        final = _wide(self.final_gradient) * share
        self.final_total = final if self.final_total is None else self.final_total.add_(final)
        self.final_gradient = None


@torch.no_grad()
def _contract(recorder: _Recorder, graph: Graph, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Edge scores `[B, n_sources, n_destinations]` from the recorded outputs and gradients."""
    device = embeddings.device
    size, length, hidden = embeddings.shape
    n_sources = len(graph.sources)
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    result = torch.zeros(size, n_sources, len(graph.destinations), dtype=dtype, device=device)
    per_position = size * n_sources * hidden * torch.finfo(dtype).bits // 8
    step = max(1, CHUNK_BYTES // per_position)
    for start in range(0, length, step):
        window = slice(start, start + step)
        deltas = _source_deltas(recorder, graph, embeddings, attention_mask, window, dtype)
        for first, sources, gradients in _destination_gradients(recorder, graph, window, dtype, device):
            columns = slice(first, first + gradients.shape[1])
            result[:, :sources, columns] += deltas[:, :sources].flatten(2) @ gradients.flatten(2).mT
    return result * graph.mask.to(device)


def _source_deltas(
    recorder: _Recorder,
    graph: Graph,
    embeddings: Tensor,
    attention_mask: Tensor,
    window: slice,
    dtype: torch.dtype,
) -> Tensor:
    """`corrupt - clean` output of every source, `[B, n_sources, positions, d]`; zero at padding."""
    device = embeddings.device
    mask = attention_mask[:, window]
    size, positions = mask.shape
    deltas = torch.empty(size, len(graph.sources), positions, embeddings.shape[-1], dtype=dtype, device=device)
    deltas[:, 0] = -embeddings[:, window].to(dtype)
    for layer, record in enumerate(recorder.layers):
        assert record.heads_out is not None and record.mlp_out is not None
        writer = recorder.writers[layer]
        heads = record.heads_out[:, window].to(writer.dtype)
        heads = heads.unflatten(-1, (graph.n_heads, -1)).permute(2, 0, 1, 3)  # [heads, B, positions, head_dim]
        first = graph.sources_before_attention(layer)
        written = heads.flatten(1, 2) @ writer
        deltas[:, first : first + graph.n_heads] = (
            -written.view(graph.n_heads, size, positions, -1).transpose(0, 1).to(device)
        )
        deltas[:, first + graph.n_heads] = -record.mlp_out[:, window].to(device, dtype)
    return deltas.masked_fill_(~mask[:, None, :, None], 0.0)


def _destination_gradients(
    recorder: _Recorder, graph: Graph, window: slice, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(first destination, number of sources, gradients [B, destinations, positions, d])` by depth.

    The MLP of a layer goes with q, k and v of the next one: they differ in one source, which the mask removes.
    """
    pending: list[Tensor] = []
    for layer, record in enumerate(recorder.layers):
        assert record.head_gradient is not None and record.mlp_total is not None
        reader = recorder.readers[layer]
        heads = record.head_gradient[:, window].permute(2, 0, 1, 3)  # [heads, B, positions, head_dim]
        n_heads, size, positions, _ = heads.shape
        pulled = (heads.flatten(1, 2) @ reader).view(n_heads, size, positions, -1).transpose(0, 1)
        for direction, product in record.rank_one:
            pulled = pulled - product[:, window].permute(0, 2, 1).unsqueeze(-1) * direction[:, None, window]
        blocks = [*pending, pulled.to(device, dtype)]
        first = layer * graph.destinations_per_layer - len(pending)
        yield first, graph.sources_before_attention(layer), torch.cat(blocks, 1)
        pending = [record.mlp_total[:, None, window].to(device, dtype)]
    assert recorder.final_total is not None
    blocks = [*pending, recorder.final_total[:, None, window].to(device, dtype)]
    yield len(graph.destinations) - 2, len(graph.sources), torch.cat(blocks, 1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; both restored afterwards."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: sums over positions and layers lose too much in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _detached(scores: AnswerScores) -> AnswerScores:
    return AnswerScores(scores.token_logps.detach(), scores.mask, scores.targets, scores.logits.detach())
