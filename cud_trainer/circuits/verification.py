"""Does a description fit its model? Checked on random tokens, for descriptions that users register."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprobs import wide
from ..models.layers import base_causal_lm, embedding_device
from ..models.modes import evaluation_without_gradients
from .attribution import embedded
from .maps import linear_map
from .parts import decoder_parts
from .recording import Pass, Recorder


@torch.no_grad()
def verify_architecture(model: PreTrainedModel, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Check that the registered description of `model` says how its residual stream is read and written.

    One forward pass of two random sequences. It checks that q, k and v read the layer's input through the norm that is
    named, that heads and their projection add up to what attention contributes, that the MLP reads the stream with or
    without attention's contribution (`parallel`), and that all contributions add up to the final residual stream.

    Args:
        tolerance: largest error, relative to the largest value; by default 1e-3, and 0.05 in half precision.

    Raises:
        ValueError: naming every part that does not fit, or as `edge_attributions` for one that is missing.
    """
    parts = decoder_parts(model)
    vocabulary = base_causal_lm(model).config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(seed))
    embeddings, precision = embedded(model, tokens.to(embedding_device(model)))
    if tolerance is None:
        half = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()).itemsize < 4
        tolerance = 0.05 if half else 1e-3
    problems: list[str] = []

    def check(what: str, actual: Tensor, expected: Tensor) -> None:
        error = (wide(actual) - wide(expected)).abs().max() / wide(expected).abs().max().clamp(min=1e-30)
        if not float(error) <= tolerance:
            problems.append(f"{what} (off by {float(error):.2g} of the largest value)")

    with evaluation_without_gradients(model), Recorder(parts) as recorder:
        record, mlp_reads = _record(model, recorder, embeddings, precision)
    outputs = recorder.outputs(record, embeddings)
    for index, mlp_read in enumerate(mlp_reads):
        _check_layer(check, recorder, record, index, outputs.heads[index], mlp_read)
    contributions = [wide(layer.attention_live) + wide(layer.mlp_live) for layer in record.layers]  # type: ignore[arg-type]
    change = wide(record.final_residual) - wide(record.layers[0].residual)  # type: ignore[arg-type]
    check(
        "the contributions of attention and MLPs do not add up to the residual stream",
        torch.stack(contributions).sum(0),
        change,
    )
    problems += _misplaced_heads(model, recorder, embeddings, precision)
    if problems:
        raise ValueError(f"the description does not fit the model: {'; '.join(problems)}")


def _record(
    model: PreTrainedModel, recorder: Recorder, embeddings: Tensor, precision: Callable[[], AbstractContextManager]
) -> tuple[Pass, list[Tensor]]:
    """One forward pass, and what every MLP read in it; `ValueError` naming the parts that never ran."""
    mlp_reads: dict[int, Tensor] = {}

    def keep(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mlp_reads[index] = args[0]

        return hook

    record = recorder.start(live=True)
    with ExitStack() as stack:
        for index, layer in enumerate(recorder.parts.layers):
            stack.callback(layer.mlp_input.register_forward_pre_hook(keep(index)).remove)
        with precision():
            model(inputs_embeds=embeddings, use_cache=False)
    silent = [
        f"layer {index} never ran its {name}"
        for index, layer in enumerate(record.layers)
        for name in ("residual", "heads", "attention_live", "mlp_live")
        if getattr(layer, name) is None
    ]
    if silent or record.final_residual is None:
        raise ValueError(f"the description does not fit the model: {'; '.join(silent) or 'the final norm never ran'}")
    return record, [mlp_reads[index] for index in range(len(record.layers))]


def _check_layer(
    check: Callable[[str, Tensor, Tensor], None],
    recorder: Recorder,
    record: Pass,
    index: int,
    heads: Tensor,
    mlp_read: Tensor,
) -> None:
    """Whether a layer's projections and MLP read what the description says, and its heads add up to its attention."""
    parts, maps, seen = recorder.parts, recorder.maps[index], record.layers[index]
    modules, parallel = parts.layers[index], parts.description.parallel
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
    written = wide(heads) @ maps.writers().flatten(0, 1)
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
    expected = stream if parallel else stream + attention
    check(
        f"layer {index}: the MLP does not read the stream {'without' if parallel else 'with'} attention's contribution",
        mlp_read,
        normed if modules.shared_norm else expected,
    )


def _misplaced_heads(
    model: PreTrainedModel, recorder: Recorder, embeddings: Tensor, precision: Callable[[], AbstractContextManager]
) -> list[str]:
    """Whether the last q, k and v head of the first layer are what the description takes them for.

    Each is changed at the first position, and at all: only the heads that it belongs to may move. What the first
    position mixes is its own value alone, whatever its query and key; its query has no say elsewhere.
    """
    parts, maps = recorder.parts, recorder.maps[0]
    groups = parts.n_heads // parts.n_kv_heads
    problems = []
    with evaluation_without_gradients(model), recorder:

        def heads(module: nn.Module | None = None, change: Callable | None = None) -> Tensor:
            handle = module.register_forward_hook(change) if module is not None and change is not None else None
            record = recorder.start()
            try:
                with precision():
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

            def moved(positions: slice, columns: slice = columns, number: int = number) -> Tensor:
                def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                    output = output.clone()
                    output[:, positions, columns] *= -3.0
                    return output

                after = heads(parts.layers[0].qkv[number], change)
                return ((after - before).abs() > 1e-3 * before.abs().max()).any(-1).any(0)  # [T, heads]

            at_first = moved(slice(0, 1))
            early, late = bool(at_first[0].any()), bool(at_first[1:].any())
            right = {"query": not early and not late, "key": not early and late, "value": early}[name]
            touched = moved(slice(None)).any(0)
            expected = torch.zeros_like(touched)
            expected[-1 if name == "query" else -groups :] = True
            if parts.description.separate_key_heads:  # else a joint norm carries every change to all heads
                right = right and torch.equal(touched, expected)
            if not right or not touched.any():
                problems.append(f"qkv: the last {name} head is not where the description puts it")
            first += count
    return problems
