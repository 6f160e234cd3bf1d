"""A teacher's outputs, computed once, kept in a file, few numbers an example."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import artifact
from .._loop import check_batches
from .._options import whole
from .._progress import bar
from ._divergence import log_probabilities
from ._network import as_network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    r"""The `k` largest log-probabilities of each row; the rest is spread evenly.

    Args:
      values: log-probabilities `[..., k]`, largest first.
      indices: their classes `[..., k]`.
      classes: number `C` of all classes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> top = distill.top_k(jnp.log(jnp.array([[0.7, 0.1, 0.1, 0.1]])), 1)
      >>> [f"{p:.2f}" for p in jax.nn.softmax(top.logits())[0]]
      ['0.70', '0.10', '0.10', '0.10']
    """

    values: Any
    indices: Any
    classes: int = dataclasses.field(metadata={"static": True})

    def logits(self) -> jax.Array:
        """Returns log-probabilities `[..., C]`, which are logits, for :func:`kd`."""
        values = jnp.asarray(self.values, jnp.float32)
        k = values.shape[-1]
        if k == self.classes:
            rest = jnp.zeros(values.shape[:-1])
        else:
            mass = 1 - jnp.sum(jnp.exp(values), axis=-1)
            # Rounding may leave nothing, or less; no class is quite impossible.
            rest = jnp.log(jnp.maximum(mass, 1e-7) / (self.classes - k))
        full = jnp.broadcast_to(rest[..., None], (*values.shape[:-1], self.classes))
        at = jnp.asarray(self.indices, jnp.int32)
        return jnp.put_along_axis(full, at, values, axis=-1, inplace=False)

    def __getitem__(self, rows: Any) -> TopK:
        """Returns the rows of some examples."""
        return TopK(self.values[rows], self.indices[rows], self.classes)

    def __len__(self) -> int:
        return len(self.values)


def top_k(logits: Any, k: int) -> TopK:
    """Keeps the `k` largest log-probabilities of each row.

    Args:
      logits: `[..., C]`; classes of minus infinity come last, as about -1e30.
      k: from 1 to `C`.

    Returns:
      :class:`TopK`.

    Raises:
      ValueError: for a `k` out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> distill.top_k(jnp.array([[0.0, 3.0, 1.0]]), 2).indices.tolist()
      [[1, 2]]
    """
    k = whole(k, "top_k: k", least=1)
    classes = jnp.shape(logits)[-1]
    if k > classes:
        raise ValueError(f"top_k: k={k} of {classes} classes")
    values, at = jax.lax.top_k(log_probabilities(jnp.asarray(logits, jnp.float32)), k)
    return TopK(values, at, classes)


def store(
    path: str | os.PathLike[str],
    teacher: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    top: int | None = None,
    dtype: Any = np.float16,
    progress: bool = True,
) -> int:
    """Runs a teacher over batches, in order, and keeps its outputs in one file.

    The file is an artifact, entropy-coded and checked like all of them, and is written to a
    temporary name first. All outputs are in memory at once: of many classes keep a few with
    ``top``.

    Args:
      path: where to write.
      teacher: function `(params, x) -> out`, or a :class:`Network`; its output is one array
        `[B, ...]`.
      params: its parameters.
      batches: what it reads; the last batch may be smaller.
      top: how many of the largest log-probabilities to keep; ``None`` for the output as it is.
      dtype: of the stored numbers, a type of floats that JAX has.
      progress: show a bar.

    Returns:
      Length of the file in bytes.

    Raises:
      ValueError: for no batches, outputs without a batch axis, that are not finite or too large
        for the type, or `top` out of range.
      TypeError: for an output that is no array of floats, another ``dtype``, or one batch in the
        place of batches.

    Example:
      >>> import os, tempfile, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = os.path.join(folder.name, "teacher.jom")
      >>> batches = [jnp.ones((4, 2)), jnp.zeros((3, 2))]
      >>> size = distill.store(path, lambda p, x: x @ p, jnp.eye(2), batches, progress=False)
      >>> distill.load_stored(path)[jnp.array([0, 6])].tolist()
      [[1.0, 1.0], [0.0, 0.0]]
      >>> folder.cleanup()
    """
    dtype = _floating(dtype)
    check_batches(batches, "store")
    if top is not None:
        top = whole(top, "store: top", least=1)
    network = as_network(teacher, "store", "teacher")
    run = jax.jit(lambda params, batch: network.look(params, batch).out)
    parts = []
    with bar("teacher", None, show=progress) as advance:
        for batch in batches:
            out = run(params, batch)
            if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
                raise TypeError(
                    f"store: the teacher returned {type(out).__name__}; its output must be one "
                    "array of floats"
                )
            least = 1 if top is None else 2
            if out.ndim < least:
                raise ValueError(
                    f"store: the teacher returned shape {out.shape}; give "
                    + ("[B, ...]" if top is None else "[B, ..., C] for top=")
                )
            if top is not None and top > out.shape[-1]:
                raise ValueError(f"store: top={top} of {out.shape[-1]} classes")
            kept = out if top is None else top_k(out, top)
            parts.append(jax.tree.map(np.asarray, kept))
            advance()
    if not parts:
        raise ValueError("store: no batches; give an iterable of what the teacher reads")
    outputs = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    values = outputs if top is None else outputs.values
    with np.errstate(over="ignore"):
        small = values.astype(dtype)
    # Types without infinity give NaN for what is too large, or their largest number.
    large = np.abs(values.astype(np.float64)) > float(jnp.finfo(dtype).max)
    wrong = large | ~np.isfinite(small.astype(np.float64))
    if wrong.any():
        raise ValueError(f"store: {_unfit(values[wrong], dtype, top)}")
    tree: dict[str, Any] = {"values": jnp.asarray(small)}
    if top is not None:
        least = np.uint8 if outputs.classes <= 256 else np.uint16
        least = least if outputs.classes <= 65_536 else np.uint32
        tree["indices"] = jnp.asarray(outputs.indices.astype(least))
        tree["classes"] = jnp.int32(outputs.classes)
    return artifact.save(path, tree)


def _floating(dtype: Any) -> np.dtype:
    """Returns a type of floats that JAX keeps."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"store: dtype={dtype!r} is no type; give for instance np.float16"
        ) from None
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"store: dtype={found} is no type of floats; give for instance np.float16")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise TypeError(f"store: JAX has no {found} unless jax_enable_x64 is set; give np.float32")
    return found


def _unfit(values: np.ndarray, dtype: np.dtype, top: int | None) -> str:
    """Says why values are not finite as ``dtype``, and what to do."""
    worst = values[np.argmax(np.abs(values.astype(np.float64)))]
    least = worst == -np.inf or (top is not None and worst < -1e29)
    if least and top is not None:
        return (
            f"top={top} keeps impossible classes, of minus infinity, which {dtype} cannot hold; "
            "give a smaller top="
        )
    if least:
        return (
            "outputs hold minus infinity, of impossible classes; give top=, without them, or let "
            "the teacher return jnp.maximum(logits, -1e4)"
        )
    return (
        f"outputs of {worst:.3g} are not finite in {dtype}; give dtype=np.float32, and look at the "
        "teacher if they are not finite there"
    )


def load_stored(path: str | os.PathLike[str]) -> np.ndarray | TopK:
    """Reads what :func:`store` wrote: outputs `[N, ...]`, to be indexed by example.

    Args:
      path: the file.

    Returns:
      An array, or :class:`TopK`. Put ``found[rows]`` last into the batch of these examples and
      take :func:`stored` for the teacher.

    Raises:
      ValueError: for a file that holds something else.

    Example:
      >>> import os, tempfile, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = os.path.join(folder.name, "teacher.jom")
      >>> x = [jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])]
      >>> size = distill.store(path, lambda p, x: x, None, x, top=1, progress=False)
      >>> found = distill.load_stored(path)
      >>> len(found), found.classes, found.indices.tolist()
      (2, 3, [[0], [2]])
      >>> folder.cleanup()
    """
    tree = artifact.load(path)
    if not isinstance(tree, dict) or set(tree) not in (
        {"values"},
        {"values", "indices", "classes"},
    ):
        raise ValueError(f"{os.fspath(path)}: holds no outputs of a teacher; distill.store does")
    values = np.asarray(tree["values"])
    if "indices" not in tree:
        return values
    classes, at = int(tree["classes"]), np.asarray(tree["indices"])
    if at.shape != values.shape or (math.prod(at.shape) and int(at.max()) >= classes):
        raise ValueError(f"{os.fspath(path)}: classes and indices do not fit")
    return TopK(values, at, classes)
