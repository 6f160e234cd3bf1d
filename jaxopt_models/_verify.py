"""Checks of a compressed tree or file against every law that it can be held to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import Encoded, is_encoded
from ._paths import flatten, match_paths


class VerifyError(ValueError):
    """A compressed tree or file breaks a law; the message lists every place."""


def verify(small: Any, params: Any = None, *, types: Sequence[type[Encoded]] = ()) -> None:
    """Raises unless a compressed tree or file is sound.

    Each leaf: its parts fit together, codes are in range, scales finite, masks padded with
    zeros, dense values zero where the mask drops them; ``materialize`` gives ``shape`` and
    ``dtype``, abstractly as for real, and finite values. A file: every checksum, every
    section, and then all of this for the tree it holds.

    Args:
      small: a compressed tree, or the path of an artifact.
      params: the dense tree it came from, to compare paths, shapes and types with.
      types: your own leaf classes that a file may name.

    Raises:
      VerifyError: listing what is wrong, path by path.
      ArtifactError: if the file cannot be read at all.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.eye(4)}
      >>> small = jom.compress(params, [jom.Rule("kernel", jom.quant.Int(bits=8))])
      >>> jom.verify(small, params)
    """
    if isinstance(small, (str, os.PathLike)):
        from . import artifact

        small = artifact.load(small, types=types)
    leaves, _ = flatten(small)
    wrong = [f"{p.path}: {line}" for p in leaves if is_encoded(p.value) for line in _leaf(p.value)]
    if params is not None:
        try:
            dense = match_paths(params, leaves, who="verify")
            for p in leaves:
                if not is_encoded(p.value):
                    continue
                want = jax.dtypes.canonicalize_dtype(dense[p.path].dtype)
                if p.value.dtype != want:
                    wrong.append(f"{p.path}: {p.value.dtype}, dense {want}")
        except ValueError as e:
            wrong.append(str(e))
    if wrong:
        raise VerifyError("verify: " + "\n  ".join([f"{len(wrong)} problems:", *wrong]))


def _half(x: Any) -> bool:
    """Says whether a part is missing that is always there: a trained or a coded one."""
    parts = x.parts()
    inner = (part for part in parts.values() if is_encoded(part))
    return any(n not in parts for n in (*x.trainable[:1], *x.coded)) or any(map(_half, inner))


def _leaf(x: Any) -> list[str]:
    if _half(x):
        return ["half of it is missing; combine the halves of partition first"]
    try:
        return x.check() or _rebuilt(x)
    except (TypeError, AttributeError, ValueError, IndexError) as e:
        return [f"its parts do not fit together: {e}"]


def _rebuilt(x: Any) -> list[str]:
    wrong = []
    seen = jax.eval_shape(lambda leaf: leaf.materialize(), x)
    if (tuple(seen.shape), seen.dtype) != (tuple(x.shape), x.dtype):
        wrong.append(f"says {x.dtype}{list(x.shape)}, rebuilds {seen.dtype}{list(seen.shape)}")
    value = x.materialize()
    if not bool(jnp.all(jnp.isfinite(value))):
        wrong.append("rebuilds NaN or Inf")
    if x.storage_bits() <= 0:
        wrong.append(f"claims {x.storage_bits()} bits")
    return wrong
