"""The networks of score_sde: NCSN++ and DDPM++ (``ncsnpp``), DDPM (``ddpm``), with the names of their published tensors.

The published network is one list ``all_modules`` that is walked through in order; so is this one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.priors.checkpoints.layers import attend, downsample, fourier, sinusoid, square_kernel, upsample

if TYPE_CHECKING:
    from recon.priors.checkpoints.score_sde import Data, Model

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "elu": functional.elu,
    "relu": functional.relu,
    "lrelu": functools.partial(functional.leaky_relu, negative_slope=0.2),
}


class Shape:
    """What all layers of one network share.  taps: of the resampling filter, None for plain averages and copies."""

    def __init__(self, model: Model) -> None:
        plain = model.name == "ddpm"
        self.act = _ACTIVATIONS[model.nonlinearity]
        self.gain = 1.0 if plain or not model.skip_rescale else math.sqrt(0.5)
        self.taps = tuple(model.fir_kernel or ()) if model.fir and not plain else None
        self.width = 4 * model.nf if model.conditional or plain else None
        self.plain = plain

    def norm(self, channels: int) -> nn.GroupNorm:
        """32 groups in ddpm; else at most 32, of four channels or more."""
        return nn.GroupNorm(32 if self.plain else min(channels // 4, 32), channels, eps=1e-6)


def _resampled(x: Tensor, how: str, taps: tuple[float, ...] | None) -> Tensor:
    if not how:
        return x
    if taps is None:
        return (
            functional.avg_pool2d(x, 2) if how == "down" else functional.interpolate(x, scale_factor=2, mode="nearest")
        )
    return (downsample if how == "down" else upsample)(x, square_kernel(taps).to(x))


class Mixed(nn.Module):
    """A linear map of the channels (a 1 x 1 convolution stored as ``W`` (in, out) and ``b``)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(inside, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.W.T[:, :, None, None], self.b)


class Residual(nn.Module):
    """The DDPM block, or with ``biggan`` the one that changes size inside and has a convolution as shortcut."""

    def __init__(self, shape: Shape, inside: int, out: int, *, biggan: bool, resample: str = "") -> None:
        super().__init__()
        self.shape, self.resample = shape, resample
        self.GroupNorm_0 = shape.norm(inside)
        self.Conv_0 = nn.Conv2d(inside, out, 3, padding=1)
        if shape.width is not None:
            self.Dense_0 = nn.Linear(shape.width, out)
        self.GroupNorm_1 = shape.norm(out)
        self.Conv_1 = nn.Conv2d(out, out, 3, padding=1)
        if biggan and (inside != out or resample):
            self.Conv_2 = nn.Conv2d(inside, out, 1)
        elif inside != out:
            self.NIN_0 = Mixed(inside, out)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        act = self.shape.act
        h = _resampled(act(self.GroupNorm_0(x)), self.resample, self.shape.taps)
        h = self.Conv_0(h)
        if emb is not None:
            h = h + self.Dense_0(act(emb))[:, :, None, None]
        h = self.Conv_1(act(self.GroupNorm_1(h)))
        x = _resampled(x, self.resample, self.shape.taps)
        for name in ("Conv_2", "NIN_0"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return (x + h) * self.shape.gain


class Attention(nn.Module):
    """Self-attention over pixels with one head."""

    def __init__(self, shape: Shape, channels: int) -> None:
        super().__init__()
        self.gain = shape.gain
        self.GroupNorm_0 = shape.norm(channels)
        for k in range(4):
            self.add_module(f"NIN_{k}", Mixed(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (self.get_submodule(f"NIN_{i}")(h).flatten(2)[:, None] for i in range(3))
        return (x + self.get_submodule("NIN_3")(attend(q, k, v).reshape(x.shape))) * self.gain


class Filtered(nn.Module):
    """Weight and bias of a convolution that follows a filter, with one padding for both, and keeps every second pixel."""

    def __init__(self, inside: int, out: int, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.taps = (
            nn.Parameter(torch.empty(out, inside, 3, 3)),
            nn.Parameter(torch.empty(out)),
            taps,
        )

    def forward(self, x: Tensor) -> Tensor:
        p = len(self.taps)
        kernel = square_kernel(self.taps).to(x).expand(x.shape[1], 1, -1, -1)
        x = functional.pad(x, ((p + 1) // 2, p // 2, (p + 1) // 2, p // 2))
        return functional.conv2d(functional.conv2d(x, kernel, groups=x.shape[1]), self.weight, self.bias, stride=2)


class Resize(nn.Module):
    """A change of size outside residual blocks, with a convolution (``out``) or without (None)."""

    def __init__(self, shape: Shape, how: str, inside: int, out: int | None) -> None:
        super().__init__()
        self.how, self.taps = how, shape.taps
        if out is None:
            return
        if self.taps is not None:
            if how == "up":
                raise ValueError("growing by a filtered convolution is in no published network")
            self.Conv2d_0 = Filtered(inside, out, self.taps)
        else:
            self.Conv_0 = nn.Conv2d(inside, out, 3, stride=2 if how == "down" else 1, padding=0 if how == "down" else 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "Conv2d_0"):
            return self.Conv2d_0(x)
        if hasattr(self, "Conv_0"):
            return self.Conv_0(functional.pad(x, (0, 1, 0, 1)) if self.how == "down" else _resampled(x, "up", None))
        return _resampled(x, self.how, self.taps)


class Combine(nn.Module):
    """Adds to ``h``, or puts before it, a linear map of the shrunk input."""

    def __init__(self, inside: int, out: int, method: str) -> None:
        super().__init__()
        self.method, self.Conv_0 = method, nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.Conv_0(x) + h if self.method == "sum" else torch.cat([self.Conv_0(x), h], dim=1)


class Frequencies(nn.Module):
    """Random Fourier features of ``log sigma``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(count))

    def forward(self, sigma: Tensor) -> Tensor:
        return fourier(sigma.log(), self.W.to(sigma.dtype))


class NcsnPP(nn.Module):
    """``forward``: (n, c, ny, nx) and labels (n,) to (n, c, ny, nx); never divided by sigma (see ``score_noise``).

    Raises ValueError for a configuration that describes no network.
    """

    def __init__(self, model: Model, data: Data) -> None:
        super().__init__()
        self.model, self.centered = model, data.centered
        self.share = shape = Shape(model)
        self.input = "none" if shape.plain else model.progressive_input
        self.output = "none" if shape.plain else model.progressive
        self.biggan = model.resblock_type == "biggan" and not shape.plain
        self.fourier = model.embedding_type == "fourier" and not shape.plain
        self.attends = [data.image_size >> level in model.attn_resolutions for level in range(len(model.ch_mult))]
        layers: list[nn.Module] = [Frequencies(model.nf)] if self.fourier else []
        if shape.width is not None:
            features = 2 * model.nf if self.fourier else model.nf
            layers += [nn.Linear(features, shape.width), nn.Linear(shape.width, shape.width)]
        layers.append(nn.Conv2d(data.num_channels, model.nf, 3, padding=1))
        kept = self._encoder(layers, data.num_channels)
        self._decoder(layers, data.num_channels, kept)
        self.all_modules = nn.ModuleList(layers)

    def _residual(self, inside: int, out: int, resample: str = "") -> nn.Module:
        return Residual(self.share, inside, out, biggan=self.biggan, resample=resample)

    def _resize(self, how: str, channels: int) -> nn.Module:
        if self.biggan:
            return self._residual(channels, channels, how)
        return Resize(self.share, how, channels, channels if self.model.resamp_with_conv else None)

    def _encoder(self, layers: list[nn.Module], channels: int) -> list[int]:
        """Append the encoder and return the channels of what the decoder gets from it."""
        model, shape = self.model, self.share
        kept, width, side = [model.nf], model.nf, channels
        for level, factor in enumerate(model.ch_mult):
            for _ in range(model.num_res_blocks):
                layers.append(self._residual(width, model.nf * factor))
                width = model.nf * factor
                layers += [Attention(shape, width)] if self.attends[level] else []
                kept.append(width)
            if level == len(model.ch_mult) - 1:
                break
            layers.append(self._resize("down", width))
            if self.input == "input_skip":
                method = model.progressive_combine or "sum"
                layers += [Resize(shape, "down", side, None), Combine(side, width, method)]
                width *= 2 if method == "cat" else 1
            elif self.input == "residual":
                layers.append(Resize(shape, "down", side, width))
                side = width
            kept.append(width)
        return kept

    def _decoder(self, layers: list[nn.Module], channels: int, kept: list[int]) -> None:
        """Append what lies between encoder and decoder, the decoder, and the last layers."""
        model, shape = self.model, self.share
        width = kept[-1]
        layers += [self._residual(width, width), Attention(shape, width), self._residual(width, width)]
        for level in reversed(range(len(model.ch_mult))):
            for _ in range(model.num_res_blocks + 1):
                layers.append(self._residual(width + kept.pop(), model.nf * model.ch_mult[level]))
                width = model.nf * model.ch_mult[level]
            layers += [Attention(shape, width)] if self.attends[level] else []
            if self.output == "output_skip":
                layers += [Resize(shape, "up", channels, None)] if level < len(model.ch_mult) - 1 else []
                layers += [shape.norm(width), nn.Conv2d(width, channels, 3, padding=1)]
            if level:
                layers.append(self._resize("up", width))
        if self.output != "output_skip":
            layers += [shape.norm(width), nn.Conv2d(width, channels, 3, padding=1)]

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        layers = iter(self.all_modules)
        emb = self._embed(layers, label, x.dtype)
        kept = self._encode(layers, x if self.centered else 2 * x - 1, emb)
        first, attention, second = next(layers), next(layers), next(layers)
        h = second(attention(first(kept[-1], emb)), emb)
        return self._decode(layers, h, kept, emb)

    def _embed(self, layers: Iterator[nn.Module], label: Tensor, dtype: torch.dtype) -> Tensor | None:
        features = (
            next(layers)(label) if self.fourier else sinusoid(label, self.model.nf, endpoint=True, sine_first=True)
        )
        if self.share.width is None:
            return None
        emb = next(layers)(features.to(dtype))
        return next(layers)(self.share.act(emb))

    def _encode(self, layers: Iterator[nn.Module], x: Tensor, emb: Tensor | None) -> list[Tensor]:
        side, kept = x, [next(layers)(x)]
        for level, attends in enumerate(self.attends):
            for _ in range(self.model.num_res_blocks):
                h = next(layers)(kept[-1], emb)
                kept.append(next(layers)(h) if attends else h)
            if level == len(self.attends) - 1:
                break
            layer = next(layers)
            h = layer(kept[-1], emb) if self.biggan else layer(kept[-1])
            if self.input != "none":
                side = next(layers)(side)
            if self.input == "input_skip":
                h = next(layers)(side, h)
            elif self.input == "residual":
                h = side = (side + h) * self.share.gain
            kept.append(h)
        return kept

    def _decode(self, layers: Iterator[nn.Module], h: Tensor, kept: list[Tensor], emb: Tensor | None) -> Tensor:
        answer = None
        for level in reversed(range(len(self.attends))):
            for _ in range(self.model.num_res_blocks + 1):
                h = next(layers)(torch.cat([h, kept.pop()], dim=1), emb)
            h = next(layers)(h) if self.attends[level] else h
            if self.output == "output_skip":
                grown = None if answer is None else next(layers)(answer)
                part = self._finish(layers, h)
                answer = part if grown is None else grown + part
            if level:
                layer = next(layers)
                h = layer(h, emb) if self.biggan else layer(h)
        return self._finish(layers, h) if answer is None else answer

    def _finish(self, layers: Iterator[nn.Module], h: Tensor) -> Tensor:
        norm, conv = next(layers), next(layers)
        return conv(self.share.act(norm(h)))
