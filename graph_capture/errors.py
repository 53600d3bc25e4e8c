"""Errors of this package.

CaptureError (RuntimeError)    the model, its inputs or its code cannot be captured
└── InputsUnknownError         nobody said which inputs the model is called with
"""

from __future__ import annotations


class CaptureError(RuntimeError):
    """A model cannot be captured; the message names what stopped it and what to do."""


class InputsUnknownError(CaptureError):
    """The inputs of a model are not known and cannot be guessed; the message shows the ways to say them."""
