"""What a norm or a projection computes, read off the module itself: gain and bias, effective weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.layers import device_and_dtype


@dataclass
class NormMap:
    """What a norm computes: `gain * c(x) / sqrt(mean(c(x)^2) + epsilon) + bias`, c = centring for a LayerNorm.

    Attributes:
        gain, bias: `[d]`, at least float32.
        epsilon, centred: see above.
    """

    gain: Tensor
    bias: Tensor
    epsilon: float
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = self.centre(x)
        return self.gain * x * self.inverse_scale(x) + self.bias

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse_scale(self, x: Tensor) -> Tensor:
        """`1 / sqrt(mean(x^2) + epsilon)` of a centred `x` `[..., d]`, keeping the last axis."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return square.div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


@torch.no_grad()
def norm_map(module: nn.Module, width: int) -> NormMap:
    """Find out what a norm over `width` channels computes, by asking it.

    Raises:
        ValueError: when it is neither an RMSNorm nor a LayerNorm.
    """
    epsilons = [
        getattr(part, name) for part in module.modules() for name in ("variance_epsilon", "eps") if hasattr(part, name)
    ]
    if not epsilons:
        raise ValueError(
            f"{type(module).__name__} has no epsilon that could be found: circuits need RMSNorm or LayerNorm"
        )
    epsilon = float(epsilons[0] or 0.0)
    device, dtype = device_and_dtype(module)
    wide = torch.promote_types(dtype, torch.float32)
    signs = torch.ones(width, device=device, dtype=wide)
    signs[1::2] = -1.0  # mean 0, mean square 1
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(width, generator=generator, dtype=torch.float64).to(wide).to(device) + 1.0
    # A LayerNorm takes inputs of its own dtype only; others give the full precision of their gain to wide inputs.
    answer = module.forward(
        torch.stack([signs, -signs, probe]).to(dtype if isinstance(module, nn.LayerNorm) else wide)
    ).to(wide)
    gain = (answer[0] - answer[1]) / 2 * signs * (1 + epsilon) ** 0.5
    bias = (answer[0] + answer[1]) / 2
    if type(module) is nn.LayerNorm and not any(p.is_meta for p in module.parameters()):  # not rounded
        gain = gain if module.weight is None else module.weight.to(gain)
        bias = bias if module.bias is None else module.bias.to(bias)
    for centred in (False, True):
        candidate = NormMap(gain, bias, epsilon, centred)
        error = (candidate(probe) - answer[2]).abs().max()
        if error <= 0.02 * answer[2].abs().max():
            return candidate
    raise ValueError(
        f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm: circuits are not available through it"
    )


@torch.no_grad()
def linear_map(module: nn.Module, n_inputs: int) -> tuple[Tensor, Tensor | None]:
    """`(weight [n_outputs, n_inputs], bias [n_outputs] | None)` of an affine module.

    Plain weights are read; anything else (LoRA, quantised or offloaded weights) is applied to the identity, which gives
    the map that is really in effect.
    """
    if type(module) in (nn.Linear, Conv1D) and module.weight.device.type != "meta":
        weight: Tensor = module.weight  # type: ignore[assignment]
        return (weight.T if type(module) is Conv1D else weight), module.bias  # type: ignore[return-value]
    device, dtype = device_and_dtype(module)
    eye = torch.eye(n_inputs, device=device, dtype=dtype)
    # `forward`, not the module: whoever has hooked it wants to see the model's passes, not ours
    bias = module.forward(torch.zeros_like(eye[:1]))[0]
    return (module.forward(eye) - bias).T, bias if bool(bias.abs().max() > 0) else None
