"""Forget losses on log-probabilities. Each is pure and returns one loss per sample, `[B]`.

Notation: `l` is the log-probability of the whole answer (sum over its tokens), `n` its number of tokens, `l̄ = l / n`,
`p_t` the probability of token t; subscript r marks the frozen model before unlearning, superscript + an alternative
answer. Minimising any of them lowers the answer's probability, or raises that of the alternative.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .registry import BY, not_negative, positive, register_objective


@register_objective("ga", retain_loss="none", token_mean=True)
def gradient_ascent(mean_logps: Tensor) -> Tensor:
    """Gradient ascent on the negative log-likelihood: `l̄` (Jang et al. 2023, arXiv 2210.01504)."""
    return mean_logps


@register_objective("graddiff", requires_retain=True, token_mean=True)
def gradient_difference(mean_logps: Tensor) -> Tensor:
    """Gradient ascent beside a retain term: `l̄` (Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024, TOFU)."""
    return mean_logps


@register_objective("kl_min", retain_loss="kl", requires_retain=True, token_mean=True)
def kl_minimisation(mean_logps: Tensor) -> Tensor:
    """Gradient ascent beside `KL(p_r ‖ p)` on the retain set: `l̄` (Maini et al. 2024, arXiv 2401.06121)."""
    return mean_logps


@register_objective("npo", by_sample={"beta": BY}, check=positive("beta"))
def negative_preference(logps: Tensor, reference_logps: Tensor, *, beta: float | Tensor = 0.1) -> Tensor:
    """Negative preference optimisation: `-(2/β) log σ(-β (l - l_r))` (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Its gradient is that of gradient ascent on `l`, weighted by `2 p^β / (p^β + p_r^β)`; the limit β -> 0 is gradient
    ascent. It saturates by the whole answer, `β (l - l_r)`: the longer of two answers keeps more of each token. With
    `beta_by="length"`, `β_i = β mean(n) / n_i`, it saturates by `β mean(n) (l̄ - l̄_r)`, all lengths alike.
    """
    return -(2 / beta) * logsigmoid(-beta * (logps - reference_logps))


@register_objective("simnpo", by_sample={"beta": ("difficulty",)}, check=positive("beta"))
def simple_negative_preference(mean_logps: Tensor, *, beta: float | Tensor = 4.5, gamma: float = 0.0) -> Tensor:
    """NPO without a reference: `-(2/β) log σ(-β l̄ - γ)` (Fan et al. 2024, arXiv 2410.07163, eq. 4)."""
    return -(2 / beta) * logsigmoid(-beta * mean_logps - gamma)


def preference(
    logps: Tensor,
    reference_logps: Tensor,
    alternative_logps: Tensor,
    alternative_reference_logps: Tensor,
    *,
    beta: float | Tensor = 0.1,
) -> Tensor:
    """Direct preference for an alternative answer: `-(2/β) log σ(β [(l⁺ - l⁺_r) - (l - l_r)])`.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7, scaled like NPO, which it equals where the alternative's
    log-probability has not moved. `dpo`: the alternative is given with the data (Zhang et al. 2024); `idk_dpo`: a
    refusal (Maini et al. 2024); `alt_po`: written by the model itself (Mekala et al. 2024, arXiv 2409.13474).
    """
    margin = (alternative_logps - alternative_reference_logps) - (logps - reference_logps)
    return -(2 / beta) * logsigmoid(beta * margin)


register_objective("dpo", alternative="given", by_sample={"beta": BY}, check=positive("beta"))(preference)
register_objective("idk_dpo", alternative="refusal", by_sample={"beta": BY}, check=positive("beta"))(preference)
register_objective("alt_po", alternative="model", by_sample={"beta": BY}, check=positive("beta"))(preference)


@register_objective("idk_nll", alternative="refusal")
def refusal_likelihood(alternative_mean_logps: Tensor) -> Tensor:
    """Negative log-likelihood of a refusal: `-l̄⁺` (Maini et al. 2024, arXiv 2401.06121, "IDK")."""
    return -alternative_mean_logps


@register_objective("wga", token_mean=True, by_sample={"beta": ("difficulty",)}, check=not_negative("beta"))
def weighted_gradient_ascent(token_logps: Tensor, lengths: Tensor, *, beta: float | Tensor = 1.0) -> Tensor:
    """Gradient ascent with tokens weighted by their confidence: `mean_t sg(p_t^β) log p_t`, sg = no gradient.

    Wang et al. 2025, arXiv 2502.19301 (G-effect). β = 0 is gradient ascent.
    """
    if isinstance(beta, Tensor):
        beta = beta.unsqueeze(-1)
    return ((beta * token_logps.detach()).exp() * token_logps).sum(-1) / lengths


@register_objective("satimp", token_mean=True, check=not_negative("beta1", "beta2"))
def saturation_importance(
    token_logps: Tensor, mask: Tensor, lengths: Tensor, *, beta1: float = 5.0, beta2: float = 1.0
) -> Tensor:
    """Tokens weighted by saturation and importance: `mean_t sg(p_t^β1 (1 - p_t)^β2) log p_t`, sg = no gradient.

    Yang et al. 2025, arXiv 2505.11953. β1 = β2 = 0 is gradient ascent.
    """
    p = token_logps.detach().exp()
    return ((p**beta1 * (1 - p) ** beta2 * token_logps) * mask).sum(-1) / lengths
