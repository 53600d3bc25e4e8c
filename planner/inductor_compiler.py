"""Whether Inductor can compile here; found out before a step needs it."""

from __future__ import annotations

from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from planner.errors import RewriteError


def check_compiler(device_type: str) -> None:
    """Raise :class:`~planner.errors.RewriteError` where Inductor has no C++ compiler to work with."""
    try:
        if device_type == "cpu":
            cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RewriteError(
            "compiler='inductor' needs a C++ compiler on this machine, and none was found: install g++, or set CXX to "
            "the path of one"
        ) from error
