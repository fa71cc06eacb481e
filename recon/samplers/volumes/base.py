"""What the samplers of volumes share: the data step's problem of a posterior, its checks, and their random numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from recon.draws import Draws
from recon.operators.cg import CG
from recon.posterior import Posterior
from recon.priors.base import Prior
from recon.priors.lifting import SlicesPrior
from recon.samplers.base import LevelSampler, State
from recon.samplers.requirements import require_affine, require_gaussian
from recon.samplers.volumes.ztv import Coupling, DataTerm, Volume, slab_of


@dataclass(frozen=True)
class VolumeSampler(LevelSampler):
    """A walk down the levels with a data step that couples slices; its memory, Z and U, is kept in ``aux``.

    coupling: of neighbouring slices.  cg: of the data step, per outer iteration of ADMM.
    """

    coupling: Coupling = field(default_factory=Coupling)
    cg: CG = field(default_factory=CG)

    def check(self, posterior: Posterior) -> None:
        super().check(posterior)
        user = type(self).__name__
        require_gaussian(posterior, user).linear(user)
        require_affine(posterior, user)
        self.problem(posterior)

    def problem(self, posterior: Posterior) -> Volume:
        """The data step's problem.  Raises InputError where the coupling does not fit the volumes."""
        user, prior, likelihood = type(self).__name__, posterior.prior, posterior.likelihood.gaussian()
        operator = likelihood.linear(user)
        weight, slab = self.coupling.on(posterior.space, user), slab_of(operator, self.coupling, posterior.space)
        decoders, told = (prior.decode, prior.decode_linear), posterior.count_normal
        return Volume(
            DataTerm(operator, likelihood.y, 1 / likelihood.sigma**2, *decoders, told), self.coupling, weight, slab
        )

    def init(self, posterior: Posterior, draws: Draws) -> State:
        volume = self.problem(posterior)
        start = super().init(posterior, own(volume, draws))
        return State(start.z, start.log_w, volume.memory(start.z))

    def fitted(self, posterior: Posterior, v: Tensor, pull: float, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The data step from ``v`` with the memory of ``state``: the next latent, and the memory after it."""
        prior = posterior.prior
        scale = float(prior.scale) if prior.scale.ndim == 0 else None
        return self.problem(posterior).solve(v, pull, state.aux, self.cg, scale)


def own(volume: Volume, draws: Draws) -> Draws:
    """The random numbers of this rank's part of the volume."""
    return draws if volume.slab is None else volume.slab.draws(draws)


def one_slice(prior: Prior) -> Prior:
    """What a prior of independent slices is made of, whose values are spread alike; any other prior itself."""
    return one_slice(prior.prior) if isinstance(prior, SlicesPrior) else prior
