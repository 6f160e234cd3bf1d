"""One file for a compressed tree: save and load."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from .._encoded import Encoded
from .._options import flag, pattern
from .._paths import flatten
from .._recipe import Rule, recipe_from_json, recipe_to_json
from .._version import __version__
from ._container import check_plain
from ._describe import check
from ._errors import ArtifactError
from ._leaves import SectionWriter
from ._open import MOST_ENTRIES_PER_BYTE, Opened, check_meta, known_classes
from ._reader import Reader
from ._skeleton import flatten_tree, unflatten_tree
from ._writer import Writer


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    recipe: Sequence[Rule] | None = None,
    dense: str | None = None,
    coding: bool = True,
) -> int:
    """Writes a tree to one self-describing file: entropy-coded, checksummed, no pickle.

    Masks become coded index gaps, a model of rows or bitmaps, codes Huffman or range-coded
    streams, each time what is smallest; everything else is stored as raw bytes. The file is
    written under a temporary name, synced and renamed: whatever happens, the old file or
    the new one is there, whole.

    Args:
      path: the file to write.
      tree: compressed or dense; boxes are opened, their arrays stored.
      recipe: kept in the file for the reader.
      dense: ``"bfloat16"`` or ``"float16"`` stores dense `float32` arrays, and values under
        a mask, in that type; they are read as `float32` again. Codebooks and scales stay.
      coding: ``False`` leaves out entropy coding: codes take the width they have, masks a bit an
        entry. Much faster to write, and a few per cent to several times larger.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: for a leaf that cannot be stored, naming its path, or a ``coding`` that is no bool.
      ValueError: for an unknown ``dense``, or values beyond its range.
      OSError: if the file cannot be written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.zeros(8)}
      >>> small = jom.compress(params, [jom.Rule("kernel", jom.codebook.KMeans(bits=4))])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     size = jom.save(path, small)
      ...     again = jom.load(path)
      >>> bool((again["kernel"].materialize() == small["kernel"].materialize()).all())
      True
    """
    check_stored_as(dense, coding, "save")
    flatten(tree)  # two tensors of one path could not be told apart
    skeleton, tensors = flatten_tree(tree)
    text = None if recipe is None else recipe_text(recipe)
    entries, written = 0, 0
    with Writer(path) as writer:
        for name, x in tensors:
            section = SectionWriter(dense, coding=coding)
            description, count = describe(section, x, f"save: {name}")
            entries += count
            written += sum(map(len, section.chunks))
            writer.add(description, section.chunks)
        if fill := padding(entries, written):
            writer.add([], [fill])
        return writer.close([__version__, text, skeleton, entries])


def check_stored_as(dense: Any, coding: Any, who: str) -> None:
    """Raises unless the options of how tensors are stored are known."""
    if dense not in (None, "bfloat16", "float16"):
        raise ValueError(f"{who}: dense={dense!r}; use 'bfloat16', 'float16' or None")
    flag(coding, f"{who}: coding")


def describe(section: SectionWriter, x: Any, where: str) -> tuple[list[Any], int]:
    """Writes a tensor into a section; returns its description and the entries it will take."""
    if any(c.laid_out for c in _classes(x)):
        raise ValueError(
            f"{where}: it is laid out for the kernels of a machine; save the tree as it was before "
            "jaxopt_models.pack"
        )
    try:
        description = section.tensor(x)
        check_plain(description)
        return description, check(description, known_classes(list(_classes(x)))).entries
    except (TypeError, AttributeError) as e:
        raise TypeError(f"{where}: {e}") from e
    except (ValueError, RuntimeError) as e:
        raise ValueError(f"{where}: {e}") from e


def padding(entries: int, written: int) -> bytes:
    """Returns what an honest file of so many entries still lacks; see :class:`Opened`."""
    return bytes(max(0, -(-entries // MOST_ENTRIES_PER_BYTE) - written))


def recipe_text(recipe: Sequence[Rule]) -> str:
    """Returns a recipe as a file keeps it."""
    return json.dumps(json.loads(recipe_to_json(recipe)), separators=(",", ":"))


def _classes(x: Any) -> Iterator[type[Encoded]]:
    if isinstance(x, Encoded):
        yield type(x)
        for part in x.parts().values():
            yield from _classes(part)


def load(
    path: str | os.PathLike[str],
    *,
    only: str | None = None,
    like: Any = None,
    types: Sequence[type[Encoded]] = (),
) -> Any:
    """Reads a tree back, bit for bit; needs neither the model class nor the recipe.

    Args:
      path: the file.
      only: regular expression on whole paths; just these tensors are read and returned.
      like: a tree, for instance ``nnx.state(model)``, whose containers and boxes the result
        gets; default: dicts, lists and tuples.
      types: your own leaf classes that the file may name. No other code is ever run.

    Returns:
      The tree, compressed parameters as they were saved.

    Raises:
      ArtifactError: for a file that is damaged, hostile, of another version, or no artifact.
      ValueError: if ``only`` matches nothing, or ``like`` has other paths.
      OSError: if the file cannot be read.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxopt_models as jom
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     _ = jom.save(path, {"a": {"kernel": jnp.ones(2), "bias": jnp.zeros(1)}})
      ...     jom.load(path, only="a/bias")
      {'a': {'bias': Array([0.], dtype=float32)}}
    """
    with Reader(path) as reader:
        opened = Opened(reader, types)
        wanted = _wanted(opened.paths, only)
        order = iter(range(len(opened.paths)))
        dropped = object()

        def tensor(_: str) -> Any:
            i = next(order)
            return opened.tensor(i) if opened.paths[i] in wanted else dropped

        tree = unflatten_tree(opened.skeleton, tensor, dropped=dropped)
    return tree if like is None else _pour(tree, like)


def _wanted(paths: Sequence[str], only: str | None) -> set[str]:
    if only is None:
        return set(paths)
    selected = pattern(only, "load: only")
    wanted = {p for p in paths if selected.fullmatch(p)}
    if not wanted:
        raise ValueError(f"load: only={only!r} matches no tensor; paths are: {', '.join(paths)}")
    return wanted


def _pour(tree: Any, like: Any) -> Any:
    found = {p.path: p.value for p in flatten(tree)[0]}
    slots, unflatten = flatten(like)
    want = [p.path for p in slots]
    if set(want) != set(found):
        missing, extra = sorted(set(want) - set(found)), sorted(set(found) - set(want))
        raise ValueError(f"load: like= does not fit: not in the file {missing}, only there {extra}")
    return unflatten([found[p] for p in want])


def load_recipe(
    path: str | os.PathLike[str], *, encoders: Sequence[type] = ()
) -> list[Rule] | None:
    """Reads the recipe that a file was made with, or ``None`` if it holds none.

    Args:
      path: the file.
      encoders: your own encoder classes that the recipe may name.

    Returns:
      The rules that were given to :func:`save`.

    Raises:
      ArtifactError: if the file is damaged, or its recipe names an unknown encoder.

    Example:
      >>> import numpy as np, jaxopt_models as jom
      >>> recipe = [jom.Rule("w", jom.quant.Int(bits=8))]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/w.jom"
      ...     small = jom.compress({"w": np.eye(8, dtype=np.float32)}, recipe)
      ...     _ = jom.save(path, small, recipe=recipe)
      ...     load_recipe(path) == recipe
      True
    """
    with Reader(path) as reader:
        _, text, _, _ = check_meta(reader.meta)
    try:
        return None if text is None else recipe_from_json(text, encoders=encoders)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"the recipe of the file cannot be read: {e!s:.200}") from e


def size(tree: Any, *, recipe: Sequence[Rule] | None = None) -> int:
    """Returns the bytes that :func:`save` would write for a tree.

    Args:
      tree: as for :func:`save`.
      recipe: as for :func:`save`.

    Returns:
      The size of the file, all of it.

    Raises:
      ValueError: as for :func:`save`.

    Example:
      >>> import numpy as np
      >>> 400 < size({"w": np.zeros(100, np.float32)}) < 700
      True
    """
    with tempfile.TemporaryDirectory() as folder:
        return save(os.path.join(folder, "size.jom"), tree, recipe=recipe)
