"""The errors a user can cause, and how the command line ends on each."""

from __future__ import annotations

from typing import Any


class ReconError(Exception):
    """Any failure that recon foresaw; its text says what was expected, what came, and the way out."""


class InputError(ReconError, ValueError):
    """Something given to recon does not fit: a file, a key, a shape, a unit, a combination (exit code 2)."""


class CheckFailed(ReconError, AssertionError):
    """A property that was claimed does not hold; the text carries the measured figure."""


class Diverged(ReconError):
    """Draws stopped being finite numbers; the text says which, where and what to change.

    ensemble: the draws that did not, as a ``recon.Ensemble``; None when there are none.
    """

    def __init__(self, message: str, ensemble: Any = None) -> None:  # noqa: ANN401  (a class of a layer above)
        super().__init__(message)
        self.ensemble = ensemble


class Stopped(ReconError):
    """The run stopped at a checkpoint because it was asked to (exit code 75: resume it)."""


def need(module: str, extra: str) -> object:
    """Import an optional library, or say which extra of recon brings it.

    Raises InputError with the install command when the library is absent.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this needs the Python package {module!r}, which could not be imported ({error}); "
            f"install it with: pip install 'recon[{extra}]'"
        ) from error
