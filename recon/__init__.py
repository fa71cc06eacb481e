"""recon: posterior sampling for indirect measurements with diffusion priors.

A *sampler* draws an *ensemble* from a *posterior*, which is a *prior* and a *likelihood*; a likelihood is an
*operator*, a measurement and its noise.  A *run* does that from a workflow file and leaves an ensemble and a report.

Names are imported on first use, so ``import recon`` loads neither torch nor any scientific library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Space": "recon.space",
    "Draws": "recon.draws",
    "Pairs": "recon.draws",
    "Posterior": "recon.posterior",
    "Ensemble": "recon.ensemble",
    "sample": "recon.samplers",
    "run": "recon.workflows",
    "checks": "recon.checks",
    "plot": "recon.plot",
    "ReconError": "recon.errors",
    "InputError": "recon.errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: the type is that of the name asked for)
    if name not in _HOME:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if name in ("checks", "plot") else getattr(module, name)
