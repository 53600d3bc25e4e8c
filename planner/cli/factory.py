"""Loads `FILE_OR_MODULE:FACTORY`: a function of the user's that returns a model and its example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from planner.errors import FactoryError

_FORMS = "(model, example_inputs), (model, args, kwargs) or (model, args, kwargs, loss_fn)"


@dataclass(frozen=True)
class Made:
    """What a factory returned, in one form."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=lambda: {})
    loss_fn: Callable[..., Any] | None = None


@dataclass(frozen=True)
class MadeForBatches:
    """A model, and a function that takes a batch size and returns what the model is called with."""

    model: Any
    make_inputs: Callable[[int], Any]
    loss_fn: Callable[..., Any] | None = None


def make(target: str) -> Made:
    """Load `target` and call it; raises :class:`~planner.errors.FactoryError` with the reason if that fails."""
    return _normalise(target, _called(target))


def make_for_batches(target: str) -> MadeForBatches:
    """Load and call a factory that returns `(model, make_inputs)` or `(model, make_inputs, loss_fn)`."""
    made = _called(target)
    parts = cast(tuple[Any, ...], made) if isinstance(made, tuple) else ()
    if len(parts) not in (2, 3) or not all(callable(part) for part in parts[1:]):
        raise FactoryError(
            f"{target} must return (model, make_inputs) or (model, make_inputs, loss_fn), where make_inputs(batch) "
            "returns what the model is called with"
        )
    return MadeForBatches(*parts)


def _called(target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise FactoryError(f"{target!r} has no factory; write FILE:FACTORY, such as train.py:make_model")
    module = _load(place)
    factory = getattr(module, name, None)
    if factory is None:
        known = sorted(
            k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        )
        raise FactoryError(f"{place} has no {name!r}; it has {', '.join(known) or 'no functions'}")
    if not callable(factory):
        raise FactoryError(f"{target} is a {type(factory).__name__}; it must be a function that returns {_FORMS}")
    try:
        return factory()
    except Exception as error:
        raise FactoryError(f"{target} failed with {type(error).__name__}: {error}") from error


def _normalise(target: str, made: Any) -> Made:
    """Bring the forms that a factory may return into one. A dict of example inputs is keyword arguments."""
    if not isinstance(made, tuple):
        return Made(made)  # a model that knows its own inputs; the planner says so if it does not
    parts = cast(tuple[Any, ...], made)
    if len(parts) == 2:
        return Made(parts[0], *_inputs(parts[1]))
    if len(parts) not in (3, 4):
        raise FactoryError(f"{target} returned {len(parts)} things; it must return {_FORMS}")
    model, args, kwargs = parts[:3]
    kwargs = cast(dict[str, Any], {}) if kwargs is None else kwargs
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        found = f"args of type {type(parts[1]).__name__} and kwargs of type {type(parts[2]).__name__}"
        raise FactoryError(f"{target} returned {found}; it must return {_FORMS}")
    loss_fn = parts[3] if len(parts) == 4 else None
    if loss_fn is not None and not callable(loss_fn):
        raise FactoryError(f"{target} returned a loss_fn of type {type(loss_fn).__name__}, which cannot be called")
    return Made(model, tuple(cast(Sequence[Any], args)), dict(cast(Mapping[str, Any], kwargs)), loss_fn)


def _inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs that were given as one thing."""
    if isinstance(inputs, Mapping):
        return (), dict(cast(Mapping[str, Any], inputs))
    return (tuple(cast(Sequence[Any], inputs)) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _load(place: str) -> ModuleType:
    is_file = place.endswith(".py") or os.sep in place
    if is_file and not Path(place).is_file():
        raise FactoryError(f"there is no file {place!r}")
    try:
        return _load_file(Path(place)) if is_file else _load_module(place)
    except Exception as error:
        raise FactoryError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    # As `python path` does: the file's folder comes first, so that it can import its neighbours.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("this is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered, because dataclasses and pickling look a class's module up by its name.
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)
