"""The one error for files that cannot be trusted."""

from __future__ import annotations

import reprlib
from typing import Any


class _Brief(reprlib.Repr):
    """Writes the beginning of a value, in time and memory that do not grow with it."""

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= 24 else f"{x[:24]!r}..."


def brief(value: Any, most: int = 80) -> str:
    """Returns the beginning of the `repr` of a value that a file holds."""
    text = _Brief().repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


class ArtifactError(ValueError):
    """A file or stream is damaged, truncated, hostile or of another format.

    Nothing of such a file is used. An intact file that cannot be opened (missing, a
    directory, no permission) raises :class:`OSError` as usual.

    Example:
      >>> from jaxopt_models.artifact import ArtifactError, Reader
      >>> try:
      ...     Reader(b"not an artifact")
      ... except ArtifactError as error:
      ...     print(error)
      no jaxopt_models artifact: it starts with b'not ', expected b'jom'
    """
