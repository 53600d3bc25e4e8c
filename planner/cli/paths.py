"""Whether a file can be written, asked before the work whose result it is for."""

from __future__ import annotations

import os
from pathlib import Path

from planner.errors import PlannerError


def check_output(path: str | None, what: str) -> None:
    """Raise :class:`~planner.errors.PlannerError` if `what` cannot be written to `path`; `None` is nothing to write."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise PlannerError(f"{what} cannot be written: there is no folder {str(folder)!r}")
    if Path(path).is_dir():
        raise PlannerError(f"{what} cannot be written: {path!r} is a folder")
    if not os.access(folder, os.W_OK):
        raise PlannerError(f"{what} cannot be written: no permission to write in {str(folder)!r}")
