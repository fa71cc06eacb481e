r"""The layers of deepinv's U-Nets (those of Karras et al. 2022), computed the short way.

They halve and double images by convolving every channel with a box, for which a processor has no fast path in bfloat16, and
add biases apart; the pull through their group norms is the costliest single thing in a vjp on a CPU.  ``shorten`` puts in
their place the same functions: means of 2 x 2 pixels, repeated pixels, biases added by the convolution, and a norm whose pull
is two sums and three products.  Parameters keep their names.

With ``x_hat = (x - m) r`` of a group of ``N`` values, weights ``w`` and a gradient ``g``,

.. math::  \frac{\partial}{\partial x} \langle g, w \hat x + b \rangle
           = r \left[w g - \frac1N \sum w g - \frac{\hat x}{N} \sum w g \hat x\right] .
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def shorten(network: nn.Module) -> None:
    """Replace the layers of ``network`` by those of this module, in place, where they are the same functions."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm and child.affine:
                child.__class__ = Norm
            elif type(child).__name__ == "UpDownConv2d" and _plain(child):
                setattr(module, name, Convolution(child))


def _plain(layer: Any) -> bool:  # noqa: ANN401  (a class of deepinv)
    """Whether a layer resamples with a box of two pixels, if at all, and before it convolves."""
    box = layer.resample_filter
    boxed = box is None or (box.shape[-2:] == (2, 2) and bool((box == 0.25).all()))
    return boxed and (box is None or layer.weight is None or not layer.fused_resample)


class Convolution(nn.Module):
    """``UpDownConv2d``: pixels doubled or halved, if asked, then convolved, if asked; with the parameters of ``layer``."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401  (a class of deepinv)
        super().__init__()
        self.weight, self.bias, self.up, self.down = layer.weight, layer.bias, layer.up, layer.down

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (n, channels, ny, nx)."""
        if self.up:
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = functional.avg_pool2d(x, 2)
        if self.weight is None:
            return x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.conv2d(x, self.weight.to(x.dtype), bias, padding=self.weight.shape[-1] // 2)


class Norm(nn.GroupNorm):
    """``GroupNorm`` with the pull of the module's text, on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (n, channels, ny, nx)."""
        if input.device.type != "cpu" or input.ndim != 4 or not torch.is_grad_enabled():
            return super().forward(input)
        made: Tensor = _Norm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return made


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:  # noqa: ANN401
        n, channels, ny, nx = x.shape
        out, mean, rate = torch.native_group_norm(x, weight, bias, n, channels, ny * nx, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, bias, mean, rate = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants derivatives of this: let torch have them
            wanted = [t for t in (x, weight, bias) if t.requires_grad]
            again = functional.group_norm(x, ctx.groups, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(again, wanted, g, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (x, weight, bias)), None, None
        n, channels, each = len(x), x.shape[1], x.shape[1] // ctx.groups
        kind = torch.promote_types(torch.float32, x.dtype)
        of_channel = (n, ctx.groups, each)
        summed = g.sum((2, 3), dtype=kind).reshape(of_channel)
        product = (g * x).sum((2, 3), dtype=kind).reshape(of_channel)
        w, m, r = weight.to(kind).reshape(ctx.groups, each), mean.to(kind)[..., None], rate.to(kind)[..., None]
        turned = (product - m * summed) * r  # sum of g x_hat over the pixels of a channel
        count = each * x[0, 0].numel()
        level, slope = ((w * part).sum(2, keepdim=True) / count for part in (summed, turned))
        on_x = (-r.square() * slope).expand(of_channel)
        constant = (r.square() * m * slope - r * level).expand(of_channel)

        def broad(t: Tensor) -> Tensor:
            return t.reshape(n, channels, 1, 1).to(x.dtype)

        pulled = None
        if ctx.needs_input_grad[0]:
            pulled = torch.addcmul(broad(constant), x, broad(on_x)).addcmul_(g, broad(r * w))
        to_weight = turned.sum(0).reshape(channels).to(weight.dtype) if ctx.needs_input_grad[1] else None
        to_bias = summed.sum(0).reshape(channels).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return pulled, to_weight, to_bias, None, None
