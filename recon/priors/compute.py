r"""How a prior is computed: in bfloat16, compiled, in chunks of draws, with less memory for its vjp.

``accelerate(prior, Compute(...))`` is the same prior, computed otherwise.  What may change its answers (bfloat16, a compiler)
is measured against plain float32 before it is believed (``recon.priors.accuracy``) and refused above a stated loss.

Recomputation (Chen et al. 2016) and chunks change no bit of what one call of the network returns; chunks change the size of
its batches, and with it the last bits that a library's kernels owe to that size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recon.errors import InputError
from recon.priors.accuracy import Accuracy, measure, own_images
from recon.priors.base import Card, Prior
from recon.priors.wrapped import Wrapped

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


class Accelerated(Wrapped):
    """``prior`` computed as ``compute`` says; made by ``accelerate``.

    accuracy: what was measured, empty where nothing had to be.
    """

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
        if self.compute.compiled and self._run is None:
            self._run = torch.compile(self.prior.predict, backend=self.compute.compiled)
        run = self._run or self.prior.predict
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.compute.precision == "bfloat16"):
            return run(z, sigma).to(z.dtype)


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


def in_chunks(denoise: Denoiser, z: Tensor, sigma: Tensor, chunk: int | None, recompute: bool = False) -> Tensor:
    """``denoise(z, sigma)`` for ``chunk`` rows at a time.

    recompute: keep nothing of a chunk for the vjp but its input and compute it once more there, so that the memory of a vjp is
    that of one chunk; the same bits.
    """
    forget = recompute and z.requires_grad and torch.is_grad_enabled()
    once = functools.partial(checkpoint, denoise, **_PLAIN_CHECKPOINT) if forget else denoise
    if chunk is None or len(z) <= chunk:
        return once(z, sigma)
    return torch.cat([once(*part) for part in zip(z.split(chunk), sigma.split(chunk), strict=True)])


def require_chunk(chunk: int | None) -> None:
    """Raises InputError when ``chunk`` is neither None nor at least 1."""
    if chunk is not None and chunk < 1:
        raise InputError(f"a chunk holds at least one draw; got {chunk}")


# Networks of priors draw no random numbers, so their state need not be kept.
_PLAIN_CHECKPOINT: Mapping[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


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
        block.forward = functools.partial(
            checkpoint, functools.partial(type(block).forward, block), **_PLAIN_CHECKPOINT
        )
    return twin


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules that are more than one layer, and no lists or priors themselves."""
    for child in module.children():
        if not isinstance(child, _LISTS):
            yield from _blocks(child)
            continue
        for member in child.children():
            if isinstance(member, _LISTS):
                yield from _blocks(nn.ModuleList([member]))
            elif isinstance(member, Prior):
                yield from _blocks(member)
            elif any(True for _ in member.children()):
                yield member


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
