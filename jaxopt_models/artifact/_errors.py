"""The one error for files that cannot be trusted."""

from __future__ import annotations


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
