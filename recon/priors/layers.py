r"""The layers of deepinv's U-Nets (those of Karras et al. 2022), computed the short way.

They halve and double images by convolving every channel with a box, for which a processor has no fast path in bfloat16, and
add biases apart; the pull through their group norms is the costliest single thing in a vjp on a CPU.  ``shorten`` puts in
their place the same functions: means of 2 x 2 pixels, repeated pixels, biases added by the convolution, and a norm whose pull
is two sums and three products.  In half precision torch's own norm takes seven times as long as in float32 on channels-last
images below 1024 pixels (its other kernel): those go through float32.  Parameters keep their names.

With ``x_hat = (x - m) r`` of a group of ``N`` values, weights ``w`` and a gradient ``g``,

.. math::  \frac{\partial}{\partial x} \langle g, w \hat x + b \rangle
           = r \left[w g - \frac1N \sum w g - \frac{\hat x}{N} \sum w g \hat x\right] .
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_FEW = 1024  # pixels, below which torch takes the kernel that is slow in half precision


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
    """``GroupNorm`` with the pull of the module's text, on CPUs; torch's own where a compiler reads it, which has better."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (n, channels, ny, nx)."""
        if input.device.type != "cpu" or input.ndim != 4 or torch.compiler.is_compiling():
            return super().forward(input)
        norm = _Norm.apply if torch.is_grad_enabled() else _norm
        out: Tensor = norm(input, self.weight, self.bias, self.num_groups, self.eps)[0]
        return out


class _Norm(torch.autograd.Function):
    """The function and its derivatives of every order and mode; mean and rate of the groups come out beside it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _norm(x, weight, bias, groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
        x, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, rate = output
        ctx.mark_non_differentiable(mean, rate)
        ctx.save_for_backward(x, weight, mean, rate)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, mean, rate = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants derivatives of this, and these depend on x
            mean, rate = _of_groups(x, ctx.groups, ctx.eps)
        n, channels, each = len(x), x.shape[1], x.shape[1] // ctx.groups
        kind = torch.promote_types(torch.float32, x.dtype)
        of_channel = (n, ctx.groups, each)
        summed = g.sum((2, 3), dtype=kind).reshape(of_channel)
        product = (g * x).sum((2, 3), dtype=kind).reshape(of_channel)
        w, m, r = weight.to(kind).reshape(ctx.groups, each), mean.to(kind)[..., None], rate.to(kind)[..., None]
        turned = (product - m * summed) * r  # sum of g x_hat over the pixels of a channel
        count = each * x.shape[2] * x.shape[3]
        level, slope = ((w * part).sum(2, keepdim=True) / count for part in (summed, turned))
        on_x = (-r.square() * slope).expand(of_channel)
        constant = (r.square() * m * slope - r * level).expand(of_channel)

        def broad(t: Tensor) -> Tensor:
            return t.reshape(n, channels, 1, 1).to(x.dtype)

        pulled = torch.addcmul(torch.addcmul(broad(constant), x, broad(on_x)), g, broad(r * w))
        to_weight, to_bias = (part.sum(0).reshape(channels).to(weight.dtype) for part in (turned, summed))
        return pulled, to_weight, to_bias, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        each, found = x.shape[1] // ctx.groups, _of_groups(x, ctx.groups, ctx.eps)
        mean, rate = (t.repeat_interleave(each, 1)[..., None, None] for t in found)
        hat, moved = (x - mean) * rate, torch.zeros_like(x)
        if dx is not None:
            parts = [t.reshape(len(x), ctx.groups, -1) for t in (dx, hat)]
            along = (parts[0] * parts[1]).mean(2, keepdim=True)
            turned = (parts[0] - parts[0].mean(2, keepdim=True) - parts[1] * along).reshape(x.shape)
            moved = moved + weight[:, None, None] * rate * turned
        if dw is not None:
            moved = moved + dw[:, None, None] * hat
        if db is not None:
            moved = moved + db[:, None, None]
        return moved.to(x.dtype), None, None


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's norm, the mean and the rate of its groups: (n, channels, ny, nx), (n, groups), (n, groups)."""
    n, channels, ny, nx = x.shape
    if ny * nx >= _FEW or x.dtype not in (torch.bfloat16, torch.float16):
        made: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(
            x, weight, bias, n, channels, ny * nx, groups, eps
        )
        return made
    out, mean, rate = _norm(x.float(), weight.float(), bias.float(), groups, eps)
    return out.to(x.dtype), mean, rate


def _of_groups(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and one over the standard deviation of each group, in float32 at least: (n, groups)."""
    values = x.to(torch.promote_types(torch.float32, x.dtype)).reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(values, 2, correction=0)
    return mean, (variance + eps).rsqrt()
