"""Difficulty metrics that need no circuits. Each returns one value per forget sample; higher = harder."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsRegressor, NearestNeighbors

from ..data.groups import group_labels
from ..models.fingerprint import model_fingerprint
from ..models.loading import load_causal_lm
from ..models.matrices import weight_matrices
from ..registry import check_numbers
from .context import DifficultyContext
from .registry import register_metric


@register_metric("loss")
def loss(context: DifficultyContext) -> np.ndarray:
    """Mean answer log-probability (minus the loss) on the original model: what is known best is hardest to lose."""
    return context.answers[0]


@register_metric("length")
def length(context: DifficultyContext) -> np.ndarray:
    """Number of answer tokens: the other trivial baseline."""
    return context.answers[1]


def _check_confidence(owner: str, *, kind: str) -> None:
    if kind not in ("margin", "entropy"):
        raise ValueError(f"unknown kind {kind!r} of {owner}; choose 'margin' or 'entropy'")


@register_metric("self_confidence", check=_check_confidence)
def self_confidence(context: DifficultyContext, *, kind: str = "margin") -> np.ndarray:
    """How sure the original model is of the answer, mean over its tokens: what it is surest of is hardest to lose.

    `"margin"`: p(token) minus the largest p of another token, in [-1, 1]; `"entropy"`: minus the entropy of the
    prediction, in nats (difficulty from the pretrained model's own probabilities: "Your Pretrained Model Tells the
    Difficulty Itself", 2025).
    """
    values = context.forget_outputs[kind].cpu().double().numpy()
    return values if kind == "margin" else -values


def _check_reference(owner: str, *, reference_model: str | None, **options: Any) -> None:
    if not reference_model or not isinstance(reference_model, str):
        raise ValueError(
            f"{owner} needs a reference model: give its option reference_model (a folder or "
            "hub id of the model before it saw the forget set, or trained without it)"
        )


@register_metric("memorization", check=_check_reference)
def memorization(
    context: DifficultyContext, *, reference_model: str | None = None, revision: str | None = None
) -> np.ndarray:
    """Mean answer log-probability under the model minus under a model that never saw the sample, in nats per token.

    What the model owes to having seen the sample, not what anyone would guess (counterfactual memorisation, Zhang et
    al. 2023, arXiv 2112.12938; a factor of unlearning difficulty in Zhao et al. 2024, arXiv 2406.01257, RUM).

    Args:
        reference_model: folder or hub id of the pretrained or retain-only model, with the same tokens.

    Raises:
        ValueError: without `reference_model`, or when it has another vocabulary.
    """
    _check_reference("difficulty metric 'memorization'", reference_model=reference_model)
    model = context.model
    assert reference_model is not None
    try:
        reference: Any = load_causal_lm(reference_model, revision=revision, dtype=model.dtype)
    except ValueError as error:
        raise ValueError(f"cannot load the reference model {reference_model!r}: {error}") from None
    sizes = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference model {reference_model!r} has another vocabulary ({sizes[1]} tokens, the model {sizes[0]})"
        )
    reference = reference.to(context.device).eval()
    reference_logps, _ = context.score_answers(reference, f"reference-{model_fingerprint(reference)}")
    return context.answers[0] - reference_logps.cpu().double().numpy()


@register_metric("grad_norm")
def grad_norm(context: DifficultyContext, *, matrices: str = ".*") -> np.ndarray:
    """`-log |g|`, with g the gradient of the sample's mean answer loss: a saturated answer gives no pull, and stays.

    Over weight matrices; gains and biases are left out ("Instance-Level Difficulty: A Missing Perspective in Machine
    Unlearning", 2024).

    Args:
        matrices: regular expression; only weight matrices whose name it matches count (by default all).

    Raises:
        ValueError: when no matrix matches, or a sample's gradient is 0.
    """
    names = [matrix.name for matrix in weight_matrices(context.model)]
    chosen = [index for index, name in enumerate(names) if re.search(matrices, name)]
    if not chosen:
        raise ValueError(
            f"option matrices={matrices!r} of difficulty metric 'grad_norm' matches none, e.g. {names[0]!r}"
        )
    squares = context.gradients["squares"][:, chosen].cpu().double().sum(1).numpy()
    empty = np.flatnonzero(squares == 0)
    if empty.size:
        raise ValueError(f"the gradient of sample {context.forget.ids[empty[0]]!r} is 0: grad_norm is undefined")
    return -0.5 * np.log(squares)


@register_metric("grad_alignment", needs_retain=True)
def grad_alignment(context: DifficultyContext) -> np.ndarray:
    """Cosine of the sample's gradient with the mean gradient of the retain set, in [-1, 1].

    Where they point the same way, every step that removes the sample takes from what is to be kept, and the retain term
    brings the sample back ("Instance-Level Difficulty: A Missing Perspective in Machine Unlearning", 2024). The mean is
    over at most 256 retain samples.
    """
    return context.gradients["cosines"].numpy()


def _check_noise(owner: str, *, sigma: float, draws: int, relative: bool = False) -> None:
    check_numbers("parameter noise", {"sigma": sigma, "draws": draws})
    if not sigma > 0:
        raise ValueError(f"option 'sigma' of parameter noise must be positive, got {sigma!r}")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"option 'draws' of parameter noise must be a positive integer, got {draws!r}")
    if not isinstance(relative, bool):
        raise ValueError(f"option 'relative' of {owner} must be true or false, got {relative!r}")


@register_metric("mrd", check=_check_noise)
def mrd(context: DifficultyContext, *, sigma: float = 0.05, draws: int = 10, relative: bool = False) -> np.ndarray:
    """Memory Removal Difficulty (arXiv 2504.06658): minus the expected drop of the answer's log-probability in noise.

    Published: `|E[(log p(θ) - log p(θ + δ)) / log p(θ)]|`, small = hard to remove (`relative=True`). The ratio blows up
    where the model is sure of the answer (log p -> 0), so that the default is the drop itself, in nats per token.

    Args:
        sigma: standard deviation of δ as a share of that of each weight matrix.
        draws: noise samples.
    """
    effects = context.noise(float(sigma), draws)
    if relative:
        return -effects["relative_drop"].cpu().double().abs().numpy()
    return -effects["drop"].cpu().double().numpy()


@register_metric("noise_stability", check=_check_noise)
def noise_stability(context: DifficultyContext, *, sigma: float = 0.05, draws: int = 10) -> np.ndarray:
    """Minus the expected relative deviation of the last hidden state under noise on the weights: stable = hard.

    (Li et al. 2022, Deep Active Learning with Noise Stability, arXiv 2205.13340.) Options as for `mrd`, and with the
    same ones no further pass.
    """
    return -context.noise(float(sigma), draws)["deviation"].cpu().double().numpy()


def _check_neighbours(owner: str, *, k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"option 'k' (neighbours) must be a positive integer, got {k!r}")


@register_metric("atypicality", needs_retain=True, check=_check_neighbours)
def atypicality(context: DifficultyContext, *, k: int = 5) -> np.ndarray:
    """Mean cosine distance to the `k` nearest retain samples in hidden space, in [0, 2]: what is unlike all else is
    known by heart, not inferred ("Instance-Level Difficulty: A Missing Perspective in Machine Unlearning", 2024)."""
    forget, retain = _hidden(context), context.retain_outputs["hidden"].cpu().double().numpy()
    nearest = NearestNeighbors(n_neighbors=min(k, len(retain)), metric="cosine").fit(retain)
    return nearest.kneighbors(forget)[0].mean(1)


@register_metric("retain_similarity", needs_retain=True, check=_check_neighbours)
def retain_similarity(context: DifficultyContext, *, k: int = 20) -> np.ndarray:
    """Share of retain samples among the `k` nearest others in hidden space, in [0, 1]: entangled = hard.

    (Entanglement of forget and retain set: Zhao et al. 2024, What makes unlearning hard and what to do about it, arXiv
    2406.01257.)
    """
    forget, retain = _hidden(context), context.retain_outputs["hidden"].cpu().double().numpy()
    k = min(k, len(forget) + len(retain) - 1)
    nearest = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(np.concatenate([forget, retain]))
    neighbours = nearest.kneighbors(forget, return_distance=False)
    others = neighbours != np.arange(len(forget))[:, None]
    others[others.all(1), -1] = False  # a twin took the sample's own place
    return ((neighbours >= len(forget)) & others).sum(1) / k


@register_metric("hidden_neighbours", cross_fitted=True, check=_check_neighbours)
def hidden_neighbours(context: DifficultyContext, *, k: int = 5) -> np.ndarray:
    """Residual memorisation that the calibration run left of the `k` nearest forget samples of other folds, in [0, 1].

    A baseline that any claim about circuits must beat: what is forgotten together lies together.
    """
    hidden, residual = _hidden(context), context.residual
    scores = np.empty(len(hidden))
    for fold in np.unique(context.fold):
        test = context.fold == fold
        model = KNeighborsRegressor(min(k, int((~test).sum())), weights="distance", metric="cosine")
        scores[test] = model.fit(hidden[~test], residual[~test]).predict(hidden[test])
    return scores


@register_metric("group_mean", needs_groups=True, cross_fitted=True)
def group_mean(context: DifficultyContext) -> np.ndarray:
    """Mean residual memorisation that the calibration run left of the other samples of the same group, in [0, 1].

    A baseline that any claim about circuits must beat: author or topic, and nothing else. Groups are the signal here,
    so that only the sample itself is left out, not its fold. A sample alone in its group gets the mean over all others.
    """
    assert context.groups is not None
    residual = context.residual
    _, group = np.unique(group_labels(context.groups), return_inverse=True)
    others = np.bincount(group)[group] - 1
    total = np.bincount(group, residual)[group]
    alone = others == 0
    total[alone], others[alone] = residual.sum(), len(residual) - 1
    return (total - residual) / others


@register_metric("calibration")
def calibration(context: DifficultyContext) -> np.ndarray:
    """What the calibration run itself left of the sample, in [0, 1]. No prediction: a short run before the long one.

    The mark for everything that is calibrated: it costs the same, but says nothing about samples of a later request.
    """
    return context.residual


@register_metric("random")
def random(context: DifficultyContext) -> np.ndarray:
    """Uniform numbers in [0, 1) from the seed, higher = harder by name only: a placebo.

    Whatever a schedule gains with it, it does not owe to difficulty.
    """
    return np.random.default_rng([context.seed, len(context.forget)]).random(len(context.forget))


def _hidden(context: DifficultyContext) -> np.ndarray:
    return context.forget_outputs["hidden"].cpu().double().numpy()
