"""Edge attribution patching, per sample and in batches, on the very model that will be trained.

For a metric M of a sample and an edge u -> v (Syed et al. 2023, arXiv 2310.10348):

    score(u -> v) = sum over positions p of (corrupt_u[p] - clean_u[p]) . dM/d(input_v)[p]

where `u` is what a component adds to the residual stream and `input_v` v's own copy of that stream *before* its norm.
EAP takes the gradient at the clean input; EAP-IG (Hanna et al. 2024, arXiv 2403.17806) its mean over m points between
the baseline and the clean embedding; node-wise interpolation (`ig-activations`, what the CUD authors ran) its mean over
m points for every component in turn (`interpolation.py`). RelP (arXiv 2508.21258) replaces derivatives of norms and
MLPs by the rules of relevance propagation, at the clean input (`relevance.py`).

How it is computed (the scores are exact, nothing is approximated): one backward pass per point of a whole batch gives
the gradients of the *outputs* of the q, k and v projections. Pulling a gradient back through projection and norm is
linear up to a rank-one term, so gradients are summed over the points in head space, pulled back once, and contracted
with the source outputs by one batched matrix product per layer, in chunks of positions that bound the memory
(`contraction.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data import BATCH_BYTES, COUNTERFACTUAL, Samples
from ..logprobs import AnswerScores, score_answers, wide
from ..models.layers import base_causal_lm, embedding_device, widest_float
from ..models.modes import evaluation_without_gradients
from ..models.positions import own_positions, position_ids
from ..models.precision import nearly_exact
from ..resumable import WorkDir, run_batches
from .contraction import GradientSums, contract
from .graph import Graph
from .interpolation import interpolate_nodes
from .parts import DecoderParts
from .recording import Pass, Recorder, SourceOutputs, embedded
from .relevance import relevance_rules
from .verification import verified_parts

METHODS = {  # name -> what it is, for `cud list attributions`
    "eap": "edge attribution patching: the gradient at the clean input (Syed et al. 2023)",
    "eap-ig": "its mean over `steps` points between baseline and clean embedding (Hanna et al. 2024)",
    "ig-activations": "its mean over `steps` points for every component in turn, as the CUD authors ran it",
    "relp": "relevance patching: rules of relevance propagation in place of derivatives, one pass (Rezaei Jafari 2025)",
}
BASELINES = ("zero", "mean", "counterfactual")
CIRCUIT_METRICS = ("prob", "logprob", "logit_diff")


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


MOST_STEPS = 10_000  # each is a backward pass over all samples


def check_options(method: str, steps: int, baseline: str, metric: str) -> None:
    """Raise `ValueError` naming the first option with an unknown value."""
    for option, value, choices in (
        ("method", method, METHODS),
        ("baseline", baseline, BASELINES),
        ("metric", metric, CIRCUIT_METRICS),
    ):
        if value not in choices:
            raise ValueError(f"unknown {option} {value!r} for edge attribution; choose one of {sorted(choices)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"edge attribution needs steps >= 1, got {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"edge attribution takes at most {MOST_STEPS} steps, got {steps!r}")


def needs_counterfactual(baseline: str, metric: str) -> bool:
    """Whether batches must hold `counterfactual_input_ids`."""
    return baseline == "counterfactual" or metric == "logit_diff"


@dataclass
class Point:
    """A metric at one point, ready to be differentiated.

    Attributes:
        objective: `[B]`, whose gradient times `factor` is the metric's; scaled so that half precision neither overflows
            nor underflows in the backward pass.
        factor: `[B]`.
        value: the metric, `[B]`.
        scores: of the answers.
    """

    objective: Tensor
    factor: Tensor
    value: Tensor
    scores: AnswerScores


def metric_point(metric: str, scores: AnswerScores, counterfactual: Tensor | None) -> Point:
    """The metric of a batch's answers.

    `prob` is exp(mean answer log-probability), `logprob` that mean, `logit_diff` the mean over answer tokens of the
    token's logit minus that of the counterfactual's token at the same place.
    """
    if metric == "logit_diff":
        assert counterfactual is not None
        logits = wide(scores.logits)
        rivals = counterfactual[:, scores.positions.to(counterfactual.device) + 1].to(logits.device)
        chosen = torch.stack([scores.targets, rivals], -1)
        pair = logits.gather(-1, chosen)
        value = ((pair[..., 0] - pair[..., 1]) * scores.mask).sum(-1) / scores.lengths
        sensitivity = 1.0 / scores.lengths
        return _scaled(value, torch.ones_like(value.detach()), sensitivity, value, scores)
    mean = scores.mean_logps
    # The largest derivative with respect to a logit: tiny for an answer that is known by heart.
    sensitivity = (-torch.expm1(scores.token_logps.detach()) * scores.mask).amax(-1) / scores.lengths
    if metric == "prob":
        # d prob = prob * d logprob: the small factor stays out of the backward pass
        return _scaled(mean, mean.detach().exp(), sensitivity, mean.exp(), scores)
    return _scaled(mean, torch.ones_like(mean.detach()), sensitivity, mean, scores)


def _scaled(objective: Tensor, factor: Tensor, sensitivity: Tensor, value: Tensor, scores: AnswerScores) -> Point:
    tiny = torch.finfo(torch.float32).eps
    scale = torch.exp2(-sensitivity.clamp(min=tiny).log2().round()).to(objective.dtype)  # a power of 2 rounds nothing
    return Point(objective * scale, factor / scale, value.detach(), scores)


def edge_attributions(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    *,
    method: str = "eap",
    steps: int = 5,
    baseline: str = "zero",
    metric: str = "prob",
    ungroup_kv: bool = False,
    means: SourceOutputs | None = None,
    reference_quirk: bool = False,
) -> EdgeAttributions:
    """Score every edge of the model's graph for every sample of `batch`.

    Args:
        model: a causal LM of an architecture in `ARCHITECTURES`; weights, mode, flags and hooks are left as they were.
        batch: `input_ids`, `attention_mask`, `labels` (-100 outside the answer), each `[B, T]`; any padding side. For
            `baseline="counterfactual"` and `metric="logit_diff"` also `counterfactual_input_ids` `[B, T]`, token by
            token beside `input_ids`.
        method: `"eap"` (gradient at the clean input), `"eap-ig"` (mean gradient over `steps` points),
            `"ig-activations"` (mean over `steps` points for each component in turn: costly, the CUD authors' choice) or
            `"relp"` (relevance in place of the gradient, at the clean input; not for experts).
        steps: points `baseline + (k/steps) * (clean - baseline)` for k = 1..steps. The baseline itself (k = 0) is left
            out: the Jacobian of an RMS norm at zero is 1/sqrt(eps) per layer and overflows. `"eap"` and `"relp"` have
            one point, the clean input.
        baseline: what sources write in `corrupt_u`: `"zero"`, nothing; `"mean"`, their mean over a dataset (`means`);
            `"counterfactual"`, what they write on the counterfactual tokens.
        metric: `"prob"`, `"logprob"` or `"logit_diff"`, see `metric_point`.
        ungroup_kv: score grouped key/value heads once per query head; they sum to the grouped scores.
        means: from `mean_outputs`, for `baseline="mean"`.
        reference_quirk: only for `"ig-activations"`: as in hannamw/EAP-IG, runs that interpolate the embedding give no
            gradient to what reads nothing but the embedding.

    Returns:
        `EdgeAttributions`. A sample's scores do not depend on the other samples, the padding side or the attention
        implementation (up to rounding).

    Raises:
        ValueError: for an unknown option, an unsupported architecture, a sample without an answer token, or when
            `means` or the counterfactual tokens are missing or do not fit; for `"relp"` on a model with experts.
    """
    check_options(method, steps, baseline, metric)
    parts = verified_parts(model)
    check_batch(batch, baseline, metric, means)
    graph = parts.graph(ungroup_kv)
    device = embedding_device(model)
    batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
    counterfactual = batch.get(COUNTERFACTUAL)
    with (
        evaluation_without_gradients(model),
        nearly_exact(model),
        relevance_rules(parts) if method == "relp" else nullcontext(),
        Recorder(parts, ungroup_kv) as recorder,
    ):
        embeddings = embedded(model, batch["input_ids"])
        corrupt = means
        if baseline == "counterfactual":
            corrupt = forward_outputs(model, recorder, batch, batch[COUNTERFACTUAL])

        def evaluate(inputs: Tensor) -> Point:
            return metric_point(metric, score_answers(model, batch, inputs_embeds=inputs), counterfactual)

        sums = GradientSums(recorder, constant_scale=method == "relp")
        with torch.enable_grad():
            if method == "ig-activations":
                point, record = interpolate_nodes(
                    recorder, sums, evaluate, embeddings, corrupt, steps=steps, reference_quirk=reference_quirk
                )
            else:
                points = steps if method == "eap-ig" else 1
                point, record = _interpolate_inputs(recorder, sums, evaluate, embeddings, corrupt, points)
        clean = recorder.outputs(record, embeddings)
    with torch.autocast(device.type, enabled=False):
        result = contract(sums, graph, clean, corrupt, batch["attention_mask"])
    return EdgeAttributions(
        result.cpu(), graph, point.value.cpu(), point.scores.mean_logps.detach().cpu(), point.scores.lengths.cpu()
    )


def _interpolate_inputs(
    recorder: Recorder,
    sums: GradientSums,
    evaluate: Callable[[Tensor], Point],
    embeddings: Tensor,
    corrupt: SourceOutputs | None,
    steps: int,
) -> tuple[Point, Pass]:
    """Add the gradients at `steps` points from baseline to clean input to `sums`; the clean point and its record."""
    start = torch.zeros_like(embeddings[:1, :1])
    if corrupt is not None:
        start = corrupt.embedding.to(embeddings) / recorder.parts.description.embedding_scale
    point = record = None
    for k in range(1, steps + 1):  # ends at the clean input, whose outputs are the clean ones
        point = record = None  # frees the last point's tensors before the next one's are made
        inputs = embeddings if k == steps else start + (k / steps) * (embeddings - start)
        inputs = inputs.detach().requires_grad_()
        record = recorder.start()
        point = evaluate(inputs)
        torch.autograd.grad(point.objective.sum(), inputs)
        sums.add(record, point.factor / steps)
    assert point is not None and record is not None
    return point, record


@torch.no_grad()
def mean_outputs(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> SourceOutputs:
    """Mean output of every source over all samples and positions: the `means` of `baseline="mean"`.

    Args:
        batches: as for `edge_attributions`; `labels` need not be there.

    Raises:
        ValueError: for an unsupported architecture or no batch at all.
    """
    parts = verified_parts(model)
    device = embedding_device(model)
    totals: list[Tensor] | None = None
    positions = 0
    with evaluation_without_gradients(model), nearly_exact(model), Recorder(parts) as recorder:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            outputs = forward_outputs(model, recorder, batch, batch["input_ids"])
            mask = batch["attention_mask"].unsqueeze(-1).bool()
            sums = [
                tensor.to(widest_float(tensor.device))
                .masked_fill(~mask.to(tensor.device), 0.0)
                .sum((0, 1), keepdim=True)
                for tensor in outputs.tensors()
            ]
            totals = sums if totals is None else [total + new for total, new in zip(totals, sums, strict=True)]
            positions += int(mask.sum())
    if totals is None or not positions:
        raise ValueError("mean_outputs needs at least one sample")
    dtype = wide(outputs.embedding).dtype
    means = [(total / positions).to(dtype) for total in totals]
    n_layers = len(parts.layers)
    return SourceOutputs(means[0], means[1 : 1 + n_layers], means[1 + n_layers :])


def forward_outputs(
    model: PreTrainedModel, recorder: Recorder, batch: dict[str, Tensor], tokens: Tensor
) -> SourceOutputs:
    """What sources write when the model reads `tokens` in place of the batch's."""
    embeddings = embedded(model, tokens)
    record = recorder.start()
    mask = batch["attention_mask"]
    with torch.no_grad(), own_positions(model):
        model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=1,
        )
    return recorder.outputs(record, embeddings)


def check_batch(batch: dict[str, Tensor], baseline: str, metric: str, means: SourceOutputs | None) -> None:
    """Raise `ValueError` for a sample without an answer, or when what the baseline or metric needs is missing."""
    if (baseline == "mean") != (means is not None):
        raise ValueError("baseline='mean' and means=mean_outputs(...) go together: one of the two was given alone")
    empty = (batch["labels"][:, 1:] == -100).all(1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sample {empty[0]} of the batch has no answer token")
    if needs_counterfactual(baseline, metric):
        reason = "baseline='counterfactual'" if baseline == "counterfactual" else "metric='logit_diff'"
        if COUNTERFACTUAL not in batch:
            raise ValueError(f"{reason} needs {COUNTERFACTUAL} in the batch, token by token beside input_ids")
        if batch[COUNTERFACTUAL].shape != batch["input_ids"].shape:
            shapes = [list(batch[key].shape) for key in (COUNTERFACTUAL, "input_ids")]
            raise ValueError(f"{COUNTERFACTUAL} has shape {shapes[0]}, input_ids {shapes[1]}")


def bytes_per_token(model: PreTrainedModel, parts: DecoderParts) -> float:
    """Memory that attribution takes per token of a batch, an estimate: activations and logits."""
    config = base_causal_lm(model).config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * parts.hidden_size
    per_layer = 16 * parts.hidden_size + 4 * inner + 6 * parts.n_heads * parts.head_dim
    return 4.0 * (len(parts.layers) * per_layer + 4 * config.vocab_size)


def attribute_dataset(
    model: PreTrainedModel,
    samples: Samples,
    *,
    batch_size: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    work: WorkDir | None = None,
    progress: bool = True,
    name: str = "circuits",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Graph]:
    """Edge scores of every sample of some samples, computed by all processes together.

    Args:
        batch_size: samples of a batch at most.
        batch_bytes: memory of a batch at most, see `cud_trainer.data.plan_batches`.
        work: keeps finished batches.
        name: of the pass in `work`: another one for other options.
        **options: of `edge_attributions`; `baseline="mean"` takes the means over `samples`.

    Returns:
        `(edges [N, n_edges] float32, mean answer log-probs [N], answer lengths [N], graph)`, rows in dataset order.

    Raises:
        ValueError: as `edge_attributions`, and when a sample's scores are not finite (named by id).
    """
    parts, samples = verified_parts(model), samples.measured
    graph = parts.graph(options.get("ungroup_kv", False))
    plan = samples.plan(bytes_per_token=bytes_per_token(model, parts), batch_size=batch_size, batch_bytes=batch_bytes)
    device = embedding_device(model)
    if options.get("baseline") == "mean" and "means" not in options:
        # every process by itself: a sum over processes would depend on their number
        options["means"] = mean_outputs(model, (samples.pad(rows) for rows in plan))

    def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        result = edge_attributions(model, batch, **options)
        return {
            "edges": result.edges.float(),
            "mean_logps": result.mean_logps.float(),
            "lengths": result.lengths,
        }

    scored = run_batches(name, samples, compute, plan, device=device, work=work, progress=progress)
    broken = (~scored["edges"].isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"edge scores of sample {samples.ids[broken[0]]!r} are not finite")
    return scored["edges"], scored["mean_logps"], scored["lengths"], graph
