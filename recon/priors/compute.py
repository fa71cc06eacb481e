r"""How a prior is computed: in bfloat16, compiled, in chunks of draws, with less memory for its vjp.

``accelerate(prior, Compute(...))`` is the same prior, computed otherwise.  What may change the answer is measured before it is
believed: on noisy probe images at several levels the root mean square difference ``d`` to the plain float32 denoiser is held
against the denoiser's error ``e``.  Rounding is not correlated with that error, so the squared errors add, and the loss

.. math::  10 \log_{10}(1 + d^2 / e^2)  \quad \text{decibel}

at the worst level must not exceed ``Compute.loss``.  0.05 dB is a difference of 0.11 times the error.

Recomputation (Chen et al. 2016) and chunks change no bit of what one call of the network returns; chunks change the size of
its batches, and with it the last bits that a library's kernels owe to that size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recon.draws import Draws
from recon.errors import InputError
from recon.priors.base import Card, Prior
from recon.priors.wrapped import Wrapped
from recon.schedules import Karras

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(z (n, ...), sigma (n,)) -> denoised (n, ...)."""


@dataclass(frozen=True)
class Compute:
    """How a prior is computed.

    precision: of convolutions and matrix products; everything else, and the answer, stays in float32.  loss: largest loss of
    accuracy in decibel.  otherwise: when it is exceeded in bfloat16, raise InputError or compute in float32 after all.
    compiled: back end of torch.compile ("inductor"), None to leave the network as it is.  recompute: what is forgotten after
    the forward pass and computed again by a vjp: nothing, what lies within the blocks of the network, or whole chunks.
    chunk: draws that are given to the network at once.  channels_last: lay the weights of convolutions out with the channels
    last; shipped priors are so already.

    Raises InputError for a chunk below 1, a loss that is not positive, or blocks of a compiled network.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    loss: float = 0.05
    otherwise: Literal["refuse", "float32"] = "refuse"
    compiled: str | None = None
    recompute: Literal["nothing", "blocks", "chunks"] = "nothing"
    chunk: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        require_chunk(self.chunk)
        if not self.loss > 0:
            raise InputError(f"the largest loss must be a positive number of decibel; got {self.loss}")
        if self.compiled and self.recompute == "blocks":
            raise InputError('a compiled network has no blocks left; use recompute="chunks" or leave compiled out')


@dataclass(frozen=True)
class Accuracy:
    """One measurement: at level ``sigma`` the answers differ by ``difference`` (RMS) where the denoiser errs by ``error``."""

    sigma: float
    error: float
    difference: float

    @property
    def loss(self) -> float:
        """``10 log10(1 + (difference / error)^2)`` in decibel; infinite where the difference is not a number."""
        ratio = self.difference / self.error
        return 10 * math.log10(1 + ratio**2) if math.isfinite(ratio) else math.inf


class Accelerated(Wrapped):
    """``prior`` computed as ``compute`` says; made by ``accelerate``.  accuracy: what was measured, empty if nothing had to be."""

    def __init__(self, prior: Prior, compute: Compute) -> None:
        facts = {**prior.card.facts, "compute": vars(compute)}
        blocks = compute.recompute == "blocks"
        super().__init__(
            _twin(prior, blocks, compute.channels_last) if blocks or compute.channels_last else prior,
            Card(prior.card.name, prior.card.summary, facts),
        )
        self.compute = compute
        self.accuracy: tuple[Accuracy, ...] = ()
        self._run: Denoiser | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # compiled code stays behind; the copy compiles again when it is called

    def predict(self, z: Tensor, sigma: Tensor) -> Tensor:
        """As the prior's, chunk by chunk; differentiable as the prior is."""
        return in_chunks(self._once, z, sigma, self.compute.chunk, self.compute.recompute == "chunks")

    def _once(self, z: Tensor, sigma: Tensor) -> Tensor:
        if self._run is None:
            self._run = _compiled(self.prior, self.compute.compiled) if self.compute.compiled else self.prior.predict
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.compute.precision == "bfloat16"):
            return self._run(z, sigma).to(z.dtype)


def accelerate(prior: Prior, compute: Compute, probe: Tensor | None = None) -> Accelerated:
    """``prior`` computed as ``compute`` says, checked against plain float32 where that could change its answers.

    probe: clean latent images (n, *latent.shape); two draws of the prior itself when left out.  The errors are the smallest of
    each level on the prior's card; without a card, those of the prior on the noisy probe at six levels.  The check holds
    for the device on which it was made.

    Raises InputError when the loss exceeds ``compute.loss``, the network cannot be compiled here or has no blocks.
    """
    made = Accelerated(prior, compute)
    if compute.precision == "float32" and not compute.compiled:
        return made
    images = own_images(prior) if probe is None else probe
    made.accuracy = measure(prior, made, images)
    worst = max(made.accuracy, key=lambda one: one.loss)
    if worst.loss <= compute.loss:
        return made
    if compute.precision == "bfloat16" and compute.otherwise == "float32":
        fallen = accelerate(prior, replace(compute, precision="float32"), images)
        fallen.accuracy = made.accuracy + fallen.accuracy
        return fallen
    how = " ".join([compute.precision, *([f"compiled by {compute.compiled}"] if compute.compiled else [])])
    raise InputError(
        f"prior {prior.card.name!r} computed in {how} differs by {worst.difference:.3g} at sigma {worst.sigma:g}, where its "
        f"error is {worst.error:.3g}: a loss of {worst.loss:.3g} dB, and {compute.loss:g} dB are allowed. Compute in float32, "
        'set otherwise="float32", or allow a larger loss'
    )


def measure(plain: Prior, other: Prior, images: Tensor) -> tuple[Accuracy, ...]:
    """The difference of two denoisers on noisy ``images`` (n, *latent.shape) at every level whose error is known.

    Raises InputError when ``other`` cannot be computed here.
    """
    known = _card_errors(plain)
    found = []
    for step, sigma in enumerate(known or _levels(plain)):
        noise = Draws(0, range(len(images))).normal(step, plain.latent.shape, "probe", dtype=plain.dtype)
        noisy = images + sigma * noise.to(images.device)
        with torch.no_grad():
            expected = plain.denoise(noisy, sigma)
            try:
                got = other.denoise(noisy, sigma)
            except Exception as error:
                # A missing compiler, a device without bfloat16: each back end has its own class of errors.
                reason = (str(error).strip().splitlines() or [""])[0]
                raise InputError(
                    f"prior {plain.card.name!r} cannot be computed this way here ({type(error).__name__}: {reason}); "
                    "leave compiled out, or compute in float32"
                ) from error
        error = known.get(sigma) or _rms(expected - images)
        found.append(Accuracy(sigma, error, _rms(got - expected)))
    return tuple(found)


def own_images(prior: Prior, count: int = 2, steps: int = 12) -> Tensor:
    """Draws of the prior itself, (count, *latent.shape): Euler steps of the probability flow down its whole schedule."""
    sigmas = Karras().sigmas(prior.schedule, steps).tolist()
    z = Draws(0, range(count)).normal(0, prior.latent.shape, "init", dtype=prior.dtype).to(prior.device) * sigmas[0]
    with torch.no_grad():
        for sigma, lower in zip(sigmas, sigmas[1:], strict=False):
            denoised = prior.denoise(z, sigma)
            z = denoised + lower / sigma * (z - denoised)
    return z


def in_chunks(denoise: Denoiser, z: Tensor, sigma: Tensor, chunk: int | None, recompute: bool = False) -> Tensor:
    """``denoise(z, sigma)`` for ``chunk`` rows at a time.

    recompute: keep nothing of a chunk for the vjp but its input and compute it once more there, so that the memory of a vjp is
    that of one chunk; the same bits.
    """
    size = chunk or len(z)
    once = functools.partial(checkpoint, denoise, **_PLAIN_CHECKPOINT) if recompute else denoise
    parts = [once(z[i : i + size], sigma[i : i + size]) for i in range(0, len(z), size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def require_chunk(chunk: int | None) -> None:
    """Raises InputError when ``chunk`` is neither None nor at least 1."""
    if chunk is not None and chunk < 1:
        raise InputError(f"a chunk holds at least one draw; got {chunk}")


# Networks of priors draw no random numbers, so their state need not be kept.
_PLAIN_CHECKPOINT: Mapping[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _card_errors(prior: Prior) -> dict[float, float]:
    """Level -> smallest held-out RMSE of the card, within the schedule."""
    errors: dict[float, float] = {}
    for row in prior.card.facts.get("denoising", ()):
        if prior.schedule.sigma_min <= row["sigma"] <= prior.schedule.sigma_max:
            errors[row["sigma"]] = min(row["prior"], errors.get(row["sigma"], math.inf))
    return errors


def _levels(prior: Prior) -> list[float]:
    low, high = math.log(prior.schedule.sigma_min), math.log(prior.schedule.sigma_max)
    return [math.exp(low + (high - low) * i / 5) for i in range(6)]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _compiled(prior: Prior, backend: str) -> Denoiser:
    def kept(graph: Any, inputs: Any) -> Any:  # noqa: ANN401  (torch's own types)
        # By default a compiled backward pass overwrites the buffers of the forward pass and can then run only once; a
        # sampler takes several vjps of one evaluation.  Compilation holds a lock, so no thread sees another's setting.
        with torch._functorch.config.patch(donated_buffer=False):
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(prior.predict, backend=kept)


def _twin(prior: Prior, blocks: bool, channels_last: bool) -> Prior:
    """A copy that shares its tensors with ``prior``, with blocks that recompute and convolutions laid out channels last."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*prior.parameters(), *prior.buffers())}
    if channels_last:
        for p in prior.parameters():
            if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last):
                laid = p.detach().contiguous(memory_format=torch.channels_last)
                shared[id(p)] = nn.Parameter(laid, requires_grad=False)
    twin = copy.deepcopy(prior, shared)
    found = list(_blocks(twin)) if blocks else []
    if blocks and not found:
        raise InputError(f'prior {prior.card.name!r} has no list of blocks; use recompute="chunks"')
    for block in found:
        # Set on the instance: its class, by which networks tell their blocks apart, stays what it was.
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, functools.partial(type(block).forward, block), **_PLAIN_CHECKPOINT
        )
    return twin


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules that are more than one layer."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _blocks(child)
            continue
        for member in child.children():
            if isinstance(member, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                yield from _blocks(nn.ModuleList([member]))
            elif any(True for _ in member.children()):
                yield member
