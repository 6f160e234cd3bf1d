"""The table of Deep Compression: what each layer of a file costs, weight by weight."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from . import artifact
from ._encoded import Encoded, Masked, is_encoded
from ._paths import flatten
from ._table import Table


def layers(path: str | os.PathLike[str], *, types: Sequence[type[Encoded]] = ()) -> Table:
    """Says of each tensor of an artifact how many weights it keeps and what they cost.

    Args:
      path: the file.
      types: your own leaf classes that the file may name.

    Returns:
      A table like those of the paper: path, weights, share kept, bits of a code as held in
      memory and as coded in the file, bits of the index for each kept weight, bytes with
      every table of that tensor, and their share of `float32`. The last row is the whole
      file, its container included.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxopt_models as jom
      >>> encoder = jom.chain(jom.prune.Magnitude(sparsity=0.75), jom.codebook.KMeans(bits=2))
      >>> small = jom.compress({"w": jnp.arange(64.0).reshape(8, 8)}, [jom.Rule("w", encoder)])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     size = jom.save(path, small)
      ...     table = jom.layers(path)
      >>> table[0]["kept %"], table[0]["code bits"]
      (25.0, 2)

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016, tables 2-5
    """
    found = artifact.inspect(path, types=types)
    rows = []
    weights = kept_in_all = 0
    for p in flatten(artifact.load(path, types=types))[0]:
        if not hasattr(p.value, "dtype"):
            continue
        size = math.prod(p.value.shape)
        kept = int(jnp.sum(p.value.keep())) if isinstance(p.value, Masked) else size
        spent = {"index": 0, "codes": 0, "all": 0}
        for row in found:
            if row["path"] == p.path:
                spent["all"] += row["bytes"]
                if row["part"] in spent:
                    spent[row["part"]] += row["bytes"]
        weights, kept_in_all = weights + size, kept_in_all + kept
        rows.append(
            (
                p.path,
                size,
                100 * kept / max(size, 1),
                _code_bits(p.value),
                8 * spent["codes"] / max(kept, 1) or None,
                8 * spent["index"] / max(kept, 1) or None,
                spent["all"],
                100 * spent["all"] / max(4 * size, 1),
            )
        )
    total = found.data["file_bytes"]
    weights = max(weights, 1)
    share = 100 * kept_in_all / weights
    rows.append(("file", weights, share, None, None, None, total, 100 * total / (4 * weights)))
    columns = (
        "path",
        "weights",
        "kept %",
        "code bits",
        "coded to",
        "index bits",
        "bytes",
        "of float32 %",
    )
    return Table(columns, rows, title="layers", notes=[f"{found.data['ratio']:.2f}x"])


def _code_bits(x: Any) -> int | None:
    while is_encoded(x):
        if hasattr(x, "bits"):
            return int(x.bits)
        x = getattr(x, "values", None)
    return None
