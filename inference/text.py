"""Text as it comes: token by token, whole characters only, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from quantize.errors import InputError


class TextStream:
    """The text of one sequence's new tokens.

    Attributes:
        stopped: a stop string has come; what comes after it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """``stop``: texts that end the text, themselves left out.

        Raises:
            InputError: an empty stop string.
        """
        if "" in stop:
            raise InputError("stop='' would end every text before it starts; leave it out")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""  # what may yet become a stop string

    def add(self, token: int) -> str:
        """The text that is certain now that ``token`` has come; empty within a character or a possible stop string."""
        piece = None if self.stopped else self._decoder.step(self._tokenizer, token)
        if not piece:
            return ""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The rest, once no token follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
