"""The one exception that means "the input is wrong": the command line prints it as one line and exits with 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message names the file or key, what was found, what is allowed and the mend.

    Everything that is not an :class:`InputError` is a defect of this project and exits with 1.
    """


class GateError(Exception):
    """Everything was done as asked, and an artifact failed its gate: the command line prints it and exits with 3."""


def one_line(error: BaseException) -> str:
    """A library's message on one line of at most 200 characters, for quoting inside an :class:`InputError`."""
    return " ".join(str(error).split())[:200] or type(error).__name__
