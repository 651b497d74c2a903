"""Does a description fit its model? Checked on random tokens, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import wide
from ..models.layers import base_causal_lm, embedding_device
from ..models.modes import evaluation_without_gradients
from ..models.precision import can_be_exact, float32_products, nearly_exact
from .architectures import BUILT_IN, Architecture
from .contraction import GradientSums, contract
from .maps import linear_map
from .parts import DecoderParts, decoder_parts
from .recording import Pass, Recorder, embedded, scaled

# Largest error relative to the largest value: in float32 or wider, and where products are in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2

_verified: WeakKeyDictionary[nn.Module, Architecture] = WeakKeyDictionary()


def verify_architecture(model: PreTrainedModel, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Check that the registered description of `model` says how its residual stream is read and written.

    It checks on two random sequences that q, k and v read the layer's input through the norm that is named, that heads
    and their projection add up to what attention contributes, that the MLP reads the stream with or without
    attention's contribution (`parallel`), that all contributions add up to the final residual stream, that the edges
    out of the embedding, of every layer's attention and of every MLP add up to what autograd says of its output, and
    that query, key and value heads lie where the description puts them.

    Args:
        tolerance: largest error, relative to the largest value; by default 1e-3, and 0.2 with quantised weights and
            others that cannot be read in float32 (`exact`), where sums of gradients are rounded.

    Raises:
        ValueError: naming every part that does not fit and by how much, or as `edge_attributions` for one that is
            missing.
    """
    _tried(model, decoder_parts(model), seed, tolerance, thorough=True)


def verified_parts(model: PreTrainedModel) -> DecoderParts:
    """`model` taken apart; its description is verified when this model is first seen.

    One forward and backward pass; some more where the description is not one of ours, for the order of the heads.

    Raises:
        ValueError: as `decoder_parts` and `verify_architecture`.
    """
    parts, causal_lm = decoder_parts(model), base_causal_lm(model)
    if _verified.get(causal_lm) != parts.description:
        _tried(model, parts, 0, None, thorough=parts.registered is not BUILT_IN.get(parts.model_type))
        _verified[causal_lm] = parts.description
    return parts


def _tried(model: PreTrainedModel, parts: DecoderParts, seed: int, tolerance: float | None, *, thorough: bool) -> None:
    """`_verify`; what a model says against a description that takes its parts for others is a `ValueError`, too."""
    try:
        _verify(model, parts, seed, tolerance, thorough=thorough)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"the description of architecture {parts.model_type!r} does not fit the model: it cannot be tried on it: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _verify(model: PreTrainedModel, parts: DecoderParts, seed: int, tolerance: float | None, *, thorough: bool) -> None:
    vocabulary = base_causal_lm(model).config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(seed))
    if tolerance is None:
        tolerance = TOLERANCE if can_be_exact(model) else HALF_TOLERANCE
    problems: list[str] = []

    def check(what: str, actual: Tensor, expected: Tensor) -> None:
        error = (wide(actual) - wide(expected)).abs().max() / wide(expected).abs().max().clamp(min=1e-30)
        if not float(error) <= tolerance:
            problems.append(f"{what} (off by {float(error):.2g} of the largest value)")

    with (
        evaluation_without_gradients(model),
        nearly_exact(model),
        float32_products("highest"),
        Recorder(parts) as recorder,
    ):
        embeddings = embedded(model, tokens.to(embedding_device(model)))
        probe = _probe(model, recorder, embeddings)
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False), float32_products("highest"):
        for index in range(len(parts.layers)):
            _check_layer(check, recorder, probe, index)
        _check_stream(check, recorder, probe)
        _check_gradients(check, recorder, probe)
        if thorough:
            problems += _misplaced_heads(model, recorder, embeddings)
    if problems:
        shown = problems if len(problems) <= 6 else [*problems[:6], f"and {len(problems) - 6} more"]
        raise ValueError(
            f"the description of architecture {parts.model_type!r} does not fit the model: {'; '.join(shown)}"
        )


@dataclass
class _Probe:
    """One pass over random tokens: its record, what every MLP read, and autograd's gradients of one number.

    Attributes:
        embeddings, embedding_gradient: of the input, `[B, T, d]`.
        mlp_reads: by layer, `[B, T, d]`.
        attention_gradients, mlp_gradients: by layer, at what attention and MLP put out, `[B, T, d]`.
    """

    record: Pass
    embeddings: Tensor
    mlp_reads: list[Tensor]
    embedding_gradient: Tensor
    attention_gradients: list[Tensor]
    mlp_gradients: list[Tensor]


def _probe(model: PreTrainedModel, recorder: Recorder, embeddings: Tensor) -> _Probe:
    """Run the model forward and backward; `ValueError` naming the parts that never ran."""
    mlp_reads: dict[int, Tensor] = {}

    def keep(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mlp_reads[index] = args[0].detach()

        return hook

    record = recorder.start(live=True)
    inputs = embeddings.detach().requires_grad_()
    with ExitStack() as stack, torch.enable_grad():
        for index, layer in enumerate(recorder.parts.layers):
            stack.callback(layer.mlp_input.register_forward_pre_hook(keep(index)).remove)
        logits = wide(model(inputs_embeds=inputs, use_cache=False).logits)
        silent = [
            f"layer {index} never ran its {name}"
            for index, layer in enumerate(record.layers)
            for name in ("residual", "heads", "attention_live", "mlp_live")
            if getattr(layer, name) is None
        ]
        if silent or record.final_residual is None:
            reason = "; ".join(silent) or "the final norm never ran"
            raise ValueError(
                f"the description of architecture {recorder.parts.model_type!r} does not fit the model: {reason}"
            )
        live = [tensor for layer in record.layers for tensor in (layer.attention_live, layer.mlp_live)]
        objective = logits.log_softmax(-1).diagonal(dim1=1, dim2=2).sum()  # of some token at every place
        gradients = torch.autograd.grad(objective, [inputs, *live], allow_unused=True)  # type: ignore[arg-type]
    lost = [
        index
        for index, layer in enumerate(record.layers)
        if layer.mlp_gradient is None or any(gradient is None for gradient in layer.gradients)
    ]
    if lost:
        raise ValueError(
            f"no gradient reaches what attention and MLP of layer {lost[0]} read ({len(lost)} of {len(record.layers)} "
            "layers): circuits are made of it. Quantised weights may pass no gradient on this device"
        )
    found = [
        torch.zeros_like(tensor) if gradient is None else gradient  # type: ignore[arg-type]
        for tensor, gradient in zip([inputs, *live], gradients, strict=True)
    ]
    reads = [mlp_reads[index] for index in range(len(record.layers))]
    return _Probe(record, inputs.detach(), reads, found[0], found[1::2], found[2::2])


def _check_stream(check: Callable[[str, Tensor, Tensor], None], recorder: Recorder, probe: _Probe) -> None:
    """Whether what attention and MLPs contribute adds up to the residual stream."""
    record, into = probe.record, recorder.parts.description.residual_scale
    device = probe.embeddings.device
    total = torch.zeros_like(probe.embeddings)
    for layer in record.layers:
        for live in (layer.attention_live, layer.mlp_live):
            total += scaled(wide(live), into).to(device)  # type: ignore[arg-type]
    change = wide(record.final_residual).to(device) - wide(record.layers[0].residual).to(device)  # type: ignore
    check("the contributions of attention and MLPs do not add up to the residual stream", total, change)


def _check_gradients(check: Callable[[str, Tensor, Tensor], None], recorder: Recorder, probe: _Probe) -> None:
    """Whether the edges out of a block add up to -<its output, autograd's gradient there>, for the zero baseline."""
    parts, record = recorder.parts, probe.record
    graph, into = parts.graph(), parts.description.residual_scale
    clean = recorder.outputs(record, probe.embeddings)
    sums = GradientSums(recorder)
    size, length = probe.embeddings.shape[:2]
    sums.add(record, torch.ones(size, device=probe.embeddings.device, dtype=wide(probe.embeddings).dtype))
    mask = torch.ones(size, length, dtype=torch.bool, device=probe.embeddings.device)
    rows = contract(sums, graph, clean, None, mask).sum(-1).cpu()  # [B, n_sources]

    def change(output: Tensor, gradient: Tensor) -> Tensor:
        return -(wide(output) * wide(gradient).to(output.device)).sum((1, 2)).cpu()

    found: dict[str, list[Tensor]] = {"embedding": [rows[:, 0]], "attention": [], "MLPs": []}
    expected = {"embedding": [change(probe.embeddings, probe.embedding_gradient)], "attention": [], "MLPs": []}
    for index, maps in enumerate(recorder.maps):
        first = graph.sources_before_attention(index)
        last = first + graph.n_heads
        found["attention"].append(rows[:, first:last].sum(1))
        found["MLPs"].append(rows[:, last])
        written = wide(clean.heads[index]) @ maps.writers().flatten(0, 1).to(clean.heads[index].device) / into
        expected["attention"].append(change(written, probe.attention_gradients[index]))
        expected["MLPs"].append(change(record.layers[index].mlp_live.detach(), probe.mlp_gradients[index]))  # type: ignore
    for name in found:
        check(
            f"the edges out of the {name} do not add up to what autograd says",
            torch.stack(found[name]),
            torch.stack(expected[name]),
        )


def _check_layer(check: Callable[[str, Tensor, Tensor], None], recorder: Recorder, probe: _Probe, index: int) -> None:
    """Whether a layer's projections and MLP read what the description says, and its heads add up to its attention."""
    parts, maps, seen = recorder.parts, recorder.maps[index], probe.record.layers[index]
    modules, parallel, into = parts.layers[index], parts.description.parallel, parts.description.residual_scale
    stream, attention = wide(seen.residual), wide(seen.attention_live)  # type: ignore[arg-type]
    normed = stream if maps.norm is None else maps.norm(stream)
    for number, projection in enumerate(seen.projections):
        weight, bias = linear_map(modules.qkv[number], parts.hidden_size)
        assert projection is not None
        check(
            f"layer {index}: projection {number} of qkv does not read attention_norm of the layer's input",
            projection,
            normed @ wide(weight).T + (0 if bias is None else wide(bias)),
        )
    _, bias = linear_map(modules.o, parts.n_heads * parts.head_dim)
    heads = seen.heads if seen.heads_scale is None else wide(seen.heads) * seen.heads_scale  # type: ignore[arg-type]
    written = wide(heads) @ maps.writers().flatten(0, 1) / into  # type: ignore[arg-type]
    if bias is not None:
        moved = wide(bias) if maps.output_norm is None else maps.output_norm.centre(wide(bias)) * maps.output_norm.gain
        written = written + moved * (1 if seen.heads_scale is None else seen.heads_scale)
    if maps.output_norm is not None:
        written = written + maps.output_norm.bias
    check(
        f"layer {index}: heads, o and attention_output_norm do not add up to what attention contributes",
        written,
        attention,
    )
    expected = stream if parallel else stream + scaled(attention, into)
    check(
        f"layer {index}: the MLP does not read the stream {'without' if parallel else 'with'} attention's contribution",
        probe.mlp_reads[index],
        normed if modules.shared_norm else expected,
    )


def _misplaced_heads(model: PreTrainedModel, recorder: Recorder, embeddings: Tensor) -> list[str]:
    """Whether the last q, k and v head of the first layer are what the description takes them for.

    Each is changed at the first position, and at all: only the heads that it belongs to may move. What the first
    position mixes is its own value alone, whatever its query and key (but for its length, where attention has sinks);
    its query has no say elsewhere.
    """
    parts, maps = recorder.parts, recorder.maps[0]
    groups = parts.n_heads // parts.n_kv_heads
    problems = []
    with evaluation_without_gradients(model), nearly_exact(model), float32_products("highest"), recorder:

        def heads(module: nn.Module | None = None, change: Callable | None = None) -> Tensor:
            handle = module.register_forward_hook(change) if module is not None and change is not None else None
            record = recorder.start()
            try:
                model(inputs_embeds=embeddings, use_cache=False)
            finally:
                if handle is not None:
                    handle.remove()
            assert record.layers[0].heads is not None
            return wide(record.layers[0].heads).unflatten(-1, (parts.n_heads, -1))

        before = heads()
        order, first = maps.order.tolist(), 0
        for name, count in (("query", parts.n_heads), ("key", parts.n_kv_heads), ("value", parts.n_kv_heads)):
            raw, number = order[first + count - 1], 0
            while raw >= len(maps.expansion[number]):
                raw, number = raw - len(maps.expansion[number]), number + 1
            columns = slice(raw * parts.head_dim, (raw + 1) * parts.head_dim)

            def changed(positions: slice, columns: slice = columns, number: int = number) -> Tensor:
                def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                    output = output.clone()
                    output[:, positions, columns] *= -3.0
                    return output

                return heads(parts.layers[0].qkv[number], change)

            def moved(after: Tensor) -> Tensor:
                return ((after - before).abs() > 1e-3 * before.abs().max()).any(-1).any(0)  # [T, heads]

            at_first = changed(slice(0, 1))
            early = bool(((at_first * before).sum(-1)[:, 0] < 0).any())  # turned around, not only longer or shorter
            late = bool(moved(at_first)[1:].any())
            right = {"query": not early and not late, "key": not early and late, "value": early}[name]
            touched = moved(changed(slice(None))).any(0)
            expected = torch.zeros_like(touched)
            expected[-1 if name == "query" else -groups :] = True
            if parts.description.separate_key_heads:  # else a joint norm carries every change to all heads
                right = right and torch.equal(touched, expected)
            if not right or not touched.any():
                problems.append(f"qkv: the last {name} head is not where the description puts it")
            first += count
    return problems
