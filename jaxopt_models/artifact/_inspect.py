"""What a file holds, in bytes that add up to its length."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .._encoded import Encoded
from .._table import Table
from ._open import Opened
from ._reader import Reader


def inspect(path: str | os.PathLike[str], *, types: Sequence[type[Encoded]] = ()) -> Table:
    """Says what a file holds, in bytes that add up to its length; decodes nothing.

    Args:
      path: the file.
      types: your own leaf classes that the file may name.

    Returns:
      A table: path, kind, shape, part, coder, bytes. Its ``data`` has ``file_bytes``,
      ``parameters`` (the floating values that the tensors stand for), ``ratio`` (four bytes
      for each parameter, over the length of the file), ``bytes_by_part``,
      ``container_bytes``, ``recipe`` and ``version``.

    Raises:
      ArtifactError: for what is no sound artifact.
      OSError: if the file cannot be read.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxopt_models as jom
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     size = jom.save(path, {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)})
      ...     table = jom.artifact.inspect(path)
      >>> table[0]["path"], table[0]["coder"], table[0]["bytes"]
      ('bias', 'float32', 32)
      >>> sum(table.data["bytes_by_part"].values()) == size
      True
    """
    with Reader(path) as reader:
        opened = Opened(reader, types)
        size = reader.size
    rows: list[tuple] = []
    for name, d in zip(opened.paths, opened.described, strict=True):
        rows += [
            (name, d.kind, list(d.shape), p.part, p.coder, p.bytes) for p in d.pieces if p.bytes
        ]
    if opened.padded:
        rows.append(("", "", None, "padding", "", reader.sections[-1].length))
    container = {k: v for k, v in reader.parts().items() if k != "sections"}
    rows += [("", "", None, "container", k, v) for k, v in container.items()]
    by_part: dict[str, int] = {}
    for row in rows:
        by_part[row[3]] = by_part.get(row[3], 0) + row[5]
    assert sum(by_part.values()) == size
    parameters = sum(d.parameters for d in opened.described)
    ratio = 4 * parameters / size
    summary = ", ".join(f"{k} {v:,}" for k, v in by_part.items())
    notes = [
        f"bytes by part: {summary}",
        f"{parameters:,} parameters in {size:,} bytes: {ratio:.2f}x smaller than float32",
    ]
    data = {
        "file_bytes": size,
        "parameters": parameters,
        "ratio": ratio,
        "bytes_by_part": by_part,
        "container_bytes": sum(container.values()),
        "recipe": opened.recipe,
        "version": opened.version,
    }
    columns = ("path", "kind", "shape", "part", "coder", "bytes")
    return Table(columns, rows, title=os.fspath(path), notes=notes, data=data)
