"""Back ends that other packages bring: one clear error where one is missing, broken, or has not what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

WITHOUT_BACKEND = ("heterogeneous-chain", "revolve", "chen-greedy", "chen-sqrt", "store-all")
"""Solvers that need neither OR-Tools nor compiled code."""


class BackendError(RuntimeError):
    """A back end cannot be imported or started, or refused a program; the message says what to do."""


@contextlib.contextmanager
def backend(package: str) -> Generator[None, None, None]:
    """Around late imports of `package`, as pip calls it; raises :class:`BackendError` where they fail."""
    try:
        yield
    except ImportError as error:
        raise BackendError(
            f"this solver needs {package}, which cannot be imported ({error}): pip install {package}, "
            f"or take a solver that works without it: {', '.join(WITHOUT_BACKEND)}"
        ) from error
