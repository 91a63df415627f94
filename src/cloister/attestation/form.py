"""Reading bytes of a fixed layout: what every `format` and log parser here begins with.

`Reader` never reads past the end and never allocates by a length that it has not checked; `FormError` says what was found
and what was wanted. Callers turn it into `evidence-malformed` with their own step: nothing here knows a kind of evidence.
"""

from __future__ import annotations

import struct


class FormError(ValueError):
    """Bytes of another form, before they become an `EvidenceError`."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(f"{found}, wanted {wanted}")
        self.found = found
        self.wanted = wanted


class Reader:
    """One walk over `data`, from its beginning."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at(self) -> int:
        """How many bytes were taken."""
        return self._at

    @property
    def rest(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        """Return the next `size` bytes.

        Raises:
            FormError: there are fewer.
        """
        if size > self.rest:
            raise FormError(f"{self.rest} bytes left", f"{size} bytes of {what}")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, code: str, what: str) -> int:
        """Return the next number, in the form `code` of `struct`."""
        value: int = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value
