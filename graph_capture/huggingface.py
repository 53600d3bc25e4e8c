"""Let a Hugging Face model take the same path while it is traced as in eager.

While it is traced (or run on fake tensors), ``transformers`` must not look at values: instead of leaving the attention
mask away where nothing is masked, it builds one. That needs memory that eager does not need, and selects another
attention kernel than the one that eager would run. Whether sequences are packed is such a question: in eager, a look
at the position ids answers it, nearly always with no. Here the answer is *no*, and an assertion in the graph verifies
it at every call; a packed batch then fails with one clear error instead of attending across its sequences in silence.

Written for transformers 5; where its functions have other names, nothing is changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

PACKED = (
    "the position ids hold several packed sequences, but the model was captured for one sequence per row; pass an "
    "attention_mask that separates them"
)


def not_packed(position_ids: torch.Tensor) -> None:
    """In the place of `find_packed_sequence_indices`: there is one sequence per row, which is asserted at run time."""
    steps = position_ids[:, 1:] - position_ids[:, :-1]
    torch._assert_async((steps == 1).all(), PACKED)  # pyright: ignore[reportPrivateImportUsage]


def not_exporting() -> bool:
    """In the place of `is_torchdynamo_exporting`: torch before 2.14 answers yes under `torch.compile`, too."""
    return False


_REPLACED: dict[str, Callable[..., Any]] = {
    "find_packed_sequence_indices": not_packed,
    "is_torchdynamo_exporting": not_exporting,
}


@contextlib.contextmanager
def as_in_eager() -> Iterator[None]:
    """Within this context `transformers` builds no mask that eager would leave away."""
    module = sys.modules.get("transformers.masking_utils")
    if module is None:
        yield
        return
    before = {name: getattr(module, name) for name in _REPLACED if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, _REPLACED[name])
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
