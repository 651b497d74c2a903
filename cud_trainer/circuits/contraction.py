"""From recorded passes to edge scores: gradients are summed in head space, pulled back once, contracted once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..logprobs import wide
from .graph import Graph
from .recording import LayerPass, Pass, Recorder, SourceOutputs

# Source outputs and gradients of this many bytes are held at a time while contracting.
CHUNK_BYTES = 256 * 2**20


@dataclass
class _LayerSum:
    """Summed gradients of one layer.

    Attributes:
        heads: at the outputs of the q/k/v projections, divided by the norm's scale, `[B, T, heads, head_dim]`.
        rank_one: the rest of the norm's Jacobian: pairs of coefficients `[B, T, heads]` and norm inputs `[B, T, d]`.
        folded: rank-one parts already added up, `[heads, B, T, d]`.
        mlp: at the MLP's copy of the residual stream, `[B, T, d]`.
    """

    heads: Tensor | None = None
    rank_one: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    folded: Tensor | None = None
    mlp: Tensor | None = None


class GradientSums:
    """Sum over passes of the gradients at every destination.

    With y = gain * c(x) * r + bias, r = 1/rms(c(x)), c = centring, the gradient g of a projection output W y pulls back
    to x as `r c(gain W^T g) - c(x) r^2 <g, W (y - bias)> / d`: linear in `r g`, plus one direction per pass.

    Args:
        constant_scale: r is a constant, as in `relevance.py`: without that direction.
    """

    def __init__(self, recorder: Recorder, constant_scale: bool = False) -> None:
        self.recorder, self.constant_scale = recorder, constant_scale
        self.layers = [_LayerSum() for _ in recorder.maps]
        self.final: Tensor | None = None

    @torch.no_grad()
    def add(self, record: Pass, share: Tensor, counts: list[tuple[int, int]] | None = None, final: int = 1) -> None:
        """Add the gradients that a pass has recorded, and drop them from its record.

        Args:
            share: weight of each sample, `[B]`, at least float32.
            counts: how often the attention's and the MLP's gradients of each layer count; by default once.
            final: the same for the logits.
        """
        for index, layer in enumerate(record.layers):
            attention, mlp = counts[index] if counts else (1, 1)
            if layer.gradients[0] is not None:
                if attention:
                    self._add_heads(index, layer, share * attention)
                layer.gradients = [None] * len(layer.gradients)
            if layer.mlp_gradient is not None:
                if mlp:
                    self._add_mlp(index, layer, share * mlp)
                layer.mlp_gradient = None
        if record.final_gradient is not None:
            if final:
                self.final = _add_scaled(self.final, record.final_gradient, share * final)
            record.final_gradient = None

    def _add_heads(self, index: int, layer: LayerPass, share: Tensor) -> None:
        maps, total = self.recorder.maps[index], self.layers[index]
        head_dim = self.recorder.parts.head_dim
        first = layer.gradients[0]
        assert first is not None
        scale = share.to(first.device).view(-1, 1, 1)
        coefficient = None
        if maps.norm is not None:
            assert layer.norm_input is not None
            inverse = maps.norm.inverse_scale(maps.norm.centre(wide(layer.norm_input)))
            scale = scale * inverse
            if not self.constant_scale:
                coefficient = scale * inverse / layer.norm_input.shape[-1]
        if total.heads is None:
            shape = (*first.shape[:2], maps.n_destinations, head_dim)
            total.heads = torch.zeros(shape, dtype=scale.dtype, device=first.device)
        products, start = [], 0
        for gradient, output, constant in zip(layer.gradients, layer.projections, maps.constants, strict=True):
            assert gradient is not None and output is not None
            gradient, output = wide(gradient).unflatten(-1, (-1, head_dim)), wide(output)
            if constant is not None:
                output = output - constant.to(output.device)
            stop = start + gradient.shape[2]
            total.heads[:, :, start:stop].addcmul_(gradient, scale.unsqueeze(-1))
            if coefficient is not None:
                products.append((gradient * output.unflatten(-1, (-1, head_dim))).sum(-1))
            start = stop
        if coefficient is not None:
            assert layer.norm_input is not None
            total.rank_one.append((torch.cat(products, -1) * coefficient, layer.norm_input))
            if len(total.rank_one) >= maps.n_destinations:  # by now the sum is smaller than the list
                self._fold(index, total)

    def _add_mlp(self, index: int, layer: LayerPass, share: Tensor) -> None:
        total = self.layers[index]
        gradient = layer.mlp_gradient
        assert gradient is not None
        if self.recorder.parts.layers[index].shared_norm:
            norm = self.recorder.maps[index].norm
            assert norm is not None and layer.norm_input is not None
            x = norm.centre(wide(layer.norm_input))
            inverse = norm.inverse_scale(x)
            x = x * inverse
            inner = wide(gradient) * norm.gain
            gradient = norm.centre(inner)
            if not self.constant_scale:
                gradient = gradient - x * (inner * x).mean(-1, keepdim=True)
            gradient = inverse * gradient
        total.mlp = _add_scaled(total.mlp, gradient, share)

    def _fold(self, index: int, total: _LayerSum) -> None:
        """Add up the list of rank-one parts."""
        norm = self.recorder.maps[index].norm
        for coefficient, x in total.rank_one:
            assert norm is not None
            x, factor = norm.centre(wide(x)), coefficient.permute(2, 0, 1).unsqueeze(-1)
            total.folded = factor * x if total.folded is None else total.folded.addcmul_(factor, x)
        total.rank_one = []

    def pulled_back(self, index: int, window: slice, out: Tensor) -> None:
        """Gradients at the residual stream of a layer's q/k/v destinations into `out` `[heads, B, P, d]`."""
        total = self.layers[index]
        if total.heads is None:
            out.zero_()
            return
        readers = self.recorder.maps[index].readers().to(out.device)
        heads = total.heads[:, window].to(out.device).permute(2, 0, 1, 3).flatten(1, 2)
        torch.bmm(heads, readers, out=out.flatten(1, 2))
        norm = self.recorder.maps[index].norm
        for coefficient, x in total.rank_one:
            assert norm is not None
            factor = coefficient[:, window].permute(2, 0, 1).unsqueeze(-1).to(out.device)
            out.addcmul_(factor, norm.centre(wide(x[:, window])).to(out.device), value=-1)
        if total.folded is not None:
            out.sub_(total.folded[:, :, window].to(out.device))


def _add_scaled(total: Tensor | None, gradient: Tensor, share: Tensor) -> Tensor:
    gradient, share = wide(gradient), share.to(gradient.device).view(-1, 1, 1)
    return gradient * share if total is None else total.addcmul_(gradient, share)


@torch.no_grad()
def contract(
    sums: GradientSums,
    graph: Graph,
    clean: SourceOutputs,
    corrupt: SourceOutputs | None,
    attention_mask: Tensor,
) -> Tensor:
    """Edge scores `[B, n_sources, n_destinations]`: `(corrupt - clean)` outputs times summed gradients.

    Args:
        corrupt: `None` for zero.
        attention_mask: `[B, T]`; what sources write at padding does not count.
    """
    device = clean.embedding.device
    size, length, hidden = clean.embedding.shape
    dtype = torch.float64 if clean.embedding.dtype == torch.float64 else torch.float32
    n_sources, recorder = len(graph.sources), sums.recorder
    n_heads = [maps.n_destinations for maps in recorder.maps]
    result = torch.zeros(size, n_sources, len(graph.destinations), dtype=dtype, device=device)
    per_position = size * (n_sources + max(n_heads) + 1) * hidden * torch.finfo(dtype).bits // 8
    step = min(length, max(1, CHUNK_BYTES // per_position))
    padding = ~attention_mask.bool().unsqueeze(-1)
    written = torch.empty(n_sources * size * step * hidden, dtype=dtype, device=device)
    pulled = torch.empty((max(n_heads) + 1) * size * step * hidden, dtype=dtype, device=device)
    for start in range(0, length, step):
        window = slice(start, min(start + step, length))
        shape = (size, window.stop - window.start, hidden)
        deltas = written[: n_sources * size * shape[1] * hidden].view(n_sources, *shape)
        _write_deltas(recorder, graph, clean, corrupt, padding, window, deltas)
        by_sample = deltas.flatten(2).transpose(0, 1)
        for index in range(graph.n_layers + 1):
            # The MLP of a layer goes with q, k, v of the next one: they differ in one source, which the mask removes.
            count = 1 + (n_heads[index] if index < graph.n_layers else 0)
            gradients = pulled[: count * size * shape[1] * hidden].view(count, *shape)
            mlp = sums.layers[index - 1].mlp if index else None
            if mlp is None:
                gradients[0].zero_()
            else:
                gradients[0].copy_(mlp[:, window])
            last = index == graph.n_layers
            if not last:
                sums.pulled_back(index, window, gradients[1:])
            sources = graph.sources_before_attention(index)
            scores = by_sample[:, :sources] @ gradients.flatten(2).permute(1, 2, 0)
            column = index * graph.destinations_per_layer
            if index:
                result[:, :sources, column - 1] += scores[:, :, 0]
            if not last:
                heads = scores[:, :, 1:][:, :, recorder.maps[index].order.to(device)]
                result[:, :sources, column : column + n_heads[index]] += heads
        if sums.final is not None:
            final = sums.final[:, window].to(device, dtype).flatten(1).unsqueeze(-1)
            result[:, :, -1] += (by_sample @ final).squeeze(-1)
    return result * graph.mask.to(device)


def _write_deltas(
    recorder: Recorder,
    graph: Graph,
    clean: SourceOutputs,
    corrupt: SourceOutputs | None,
    padding: Tensor,
    window: slice,
    out: Tensor,
) -> None:
    """`corrupt - clean` output of every source into `out` `[n_sources, B, P, d]`; zero at padding."""
    device = out.device
    shape = (*padding.shape[:2], -1)
    hidden = padding[:, window]

    def delta(output: Tensor, baseline: Tensor | None) -> Tensor:
        output = wide(output[:, window]).to(device)
        change = -output if baseline is None else wide(baseline.expand(shape)[:, window]).to(device) - output
        return change.masked_fill_(hidden, 0.0)

    out[0] = delta(clean.embedding, None if corrupt is None else corrupt.embedding)
    for index, maps in enumerate(recorder.maps):
        first = graph.sources_before_attention(index)
        last = first + graph.n_heads
        heads = delta(clean.heads[index], None if corrupt is None else corrupt.heads[index])
        heads = heads.unflatten(-1, (graph.n_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
        torch.bmm(heads, maps.writers().to(device), out=out[first:last].flatten(1, 2))
        out[last] = delta(clean.mlps[index], None if corrupt is None else corrupt.mlps[index])
