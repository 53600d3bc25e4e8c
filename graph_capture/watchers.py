"""What watches a run from outside, as `FlopCounterMode` does: it must see the program, and must not be traced into it.

Such a watcher is a dispatch mode, under which TorchDynamo traces nothing, often with a tracker of modules, whose global
hooks would be traced as if they were part of the model.

Written for torch 2.11 to 2.13: the flag of ``torch.utils._python_dispatch`` is private.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

_TRACKERS = ("ModuleTracker", "ModTracker")
_FLAG = "_is_in_any_mode_without_ignore_compile_internals"
_aside = threading.local()


def watched() -> bool:
    """Whether a dispatch mode of the user's is active."""
    return _python_dispatch.is_in_any_mode_without_ignore_compile_internals()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For tracing, guarding and planning, which a watcher should not see. Without a watcher nothing changes."""
    with without_trackers():
        if not watched():
            yield
            return
        with _disable_current_modes() as modes, _flag(False):
            outer, _aside.modes = getattr(_aside, "modes", ()), tuple(modes)
            try:
                yield
            finally:
                _aside.modes = outer


@contextlib.contextmanager
def watched_again() -> Iterator[None]:
    """For the program that runs inside of :func:`unwatched`: the watchers see it."""
    modes = getattr(_aside, "modes", ())
    if not modes:
        yield
        return
    _aside.modes = ()
    for mode in reversed(modes):
        _push_mode(mode)
    try:
        with _flag(True):
            yield
    finally:
        for _ in modes:
            _pop_mode()
        _aside.modes = modes


@contextlib.contextmanager
def _flag(value: bool) -> Iterator[None]:
    before = getattr(_python_dispatch, _FLAG)
    setattr(_python_dispatch, _FLAG, value)
    try:
        yield
    finally:
        setattr(_python_dispatch, _FLAG, before)


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """Put aside the global hooks of torch's trackers of modules: they know no module inside of a planned one."""
    tables = [getattr(nn.modules.module, name) for name in ("_global_forward_pre_hooks", "_global_forward_hooks")]
    before = [list(table.items()) for table in tables]
    if not any(is_tracker(hook) for items in before for _, hook in items):
        yield
        return
    try:
        for table, items in zip(tables, before, strict=True):
            for key, hook in items:
                if is_tracker(hook):
                    del table[key]
        yield
    finally:
        for table, items in zip(tables, before, strict=True):
            table.clear()
            table.update(items)


def is_tracker(hook: Any) -> bool:
    """Whether a global hook is one of torch's trackers."""
    owner = type(getattr(hook, "__self__", None))
    return owner.__name__ in _TRACKERS and owner.__module__.startswith("torch.")
