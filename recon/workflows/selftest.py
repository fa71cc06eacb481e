"""Samplers on problems whose posterior is known: built-in ones, or the Gaussian twin of a workflow file's own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from recon.errors import CheckFailed, Diverged, InputError
from recon.posterior import Posterior
from recon.priors.stationary import StationaryPrior, spectrum_of
from recon.samplers import METHODS, Sampler, unconditional
from recon.selftest import check_sampler
from recon.twin import check_twin
from recon.workflows.problem import prepare
from recon.workflows.schema import load_workflow

log = logging.getLogger("recon.selftest")

SPECTRUM_DRAWS, SPECTRUM_STEPS = 16, 16


@dataclasses.dataclass(frozen=True)
class Line:
    """One sampler: its verdict and, where it ran, bias of the mean (posterior sd), variance ratio, coverage, cost.

    verdict: as in ``selftest.SamplerFigures``, "refused" or "diverged".  why: of the two latter, or of a failed claim.
    """

    method: str
    verdict: str
    bias: float | None = None
    variance: float | None = None
    coverage: tuple[float, float] | None = None
    cost: Mapping[str, float] | None = None
    why: str = ""


def selftest(
    path: str | Path | None = None,
    methods: Sequence[str] = (),
    draws: int | None = None,
    overrides: Sequence[str] = (),
    workspace: str | Path | None = None,
) -> list[Line]:
    """Run samplers where the exact posterior is known.

    Without a file: a random 3 x 8 matrix and a white Gaussian prior, all methods at their defaults, 500 draws.  With one: its
    operator and noise with a Gaussian prior of the spectrum of 16 draws of its own prior, its own sampler (or ``methods``),
    as many draws as it asks for (at least 8).  Raises InputError for a file that does not fit or an unknown method.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if path is None:
        return [_builtin(METHODS[name](), draws or 500) for name in methods or METHODS]
    workflow = load_workflow(path, overrides, workspace)
    job = prepare(workflow)
    prior = matched(job.posterior)
    samplers = [METHODS[name]() for name in methods] or [job.sampler]
    return [_own(job.posterior, prior, sampler, draws or max(8, workflow.draws)) for sampler in samplers]


def matched(posterior: Posterior, seed: int = 0) -> StationaryPrior:
    """The Gaussian with mean and spectrum of a few draws of the posterior's prior, over its latents."""
    prior = posterior.prior
    drawn = unconditional(prior, SPECTRUM_DRAWS, SPECTRUM_STEPS, seed).x
    return spectrum_of(prior.encode(drawn.to(prior.device)), prior.latent)


def _builtin(sampler: Sampler, draws: int) -> Line:
    name = _name(sampler)
    log.info("%s", name)
    try:
        figures = check_sampler(sampler, draws=draws)
    except CheckFailed as error:
        return Line(name, "wrong", why=str(error))
    except Diverged as error:
        return Line(name, "diverged", why=str(error))
    except InputError as error:
        return Line(name, "refused", why=str(error))
    return Line(name, figures.verdict, figures.bias, figures.variance_ratio, figures.coverage, figures.cost)


def _own(posterior: Posterior, prior: StationaryPrior, sampler: Sampler, draws: int) -> Line:
    name = _name(sampler)
    log.info("%s: %d draws", name, draws)
    try:
        figures = check_twin(posterior, prior, sampler, draws)
    except Diverged as error:
        return Line(name, "diverged", why=str(error))
    except InputError as error:
        return Line(name, "refused", why=str(error))
    bias = max(figures.bias, figures.bias_data)
    why = "" if figures.verdict != "wrong" else f"outside the limits of exact draws; what may help: {sampler.advice}"
    return Line(name, figures.verdict, bias, figures.variance_ratio, figures.coverage, figures.cost, why)


def _name(sampler: Sampler) -> str:
    return type(sampler).__name__.lower()


def table(lines: Sequence[Line]) -> str:
    """The lines as text, one row each and the reasons below."""
    head = ("method", "verdict", "bias/sd", "variance", "50 %", "90 %", "denoiser", "vjp", "seconds")
    rows = [head, *(_cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*text, *(f"{line.method}: {line.why}" for line in lines if line.why)])


def _cells(line: Line) -> tuple[str, ...]:
    if line.bias is None or line.variance is None or line.coverage is None or line.cost is None:
        return (line.method, line.verdict, *["-"] * 7)
    return (
        line.method,
        line.verdict,
        f"{line.bias:.3f}",
        f"{line.variance:.3f}",
        *(f"{100 * value:.1f}" for value in line.coverage),
        *(f"{line.cost[name]:.0f}" for name in ("denoiser", "vjp")),
        f"{line.cost['seconds']:.1f}",
    )
