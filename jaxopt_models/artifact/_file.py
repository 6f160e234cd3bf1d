"""One file for a compressed tree: save, load, inspect."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from .._encoded import Encoded
from .._paths import flatten, is_variables
from .._recipe import Rule, recipe_from_json, recipe_to_json
from .._table import Table
from .._version import __version__
from ._describe import BUILT_IN, Described, check, class_name, sized
from ._errors import ArtifactError
from ._leaves import SectionReader, SectionWriter
from ._reader import Reader
from ._skeleton import flatten_tree, unflatten_tree
from ._writer import Writer

# A stream of equal codes needs no bytes, so a short file could claim a tensor of any size.
# An honest file is padded to a byte for every so many entries; others are refused.
_MOST_ENTRIES_PER_BYTE = 4096


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    recipe: Sequence[Rule] | None = None,
    dense: str | None = None,
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

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: for a leaf that cannot be stored, naming its path.
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
    if dense not in (None, "bfloat16", "float16"):
        raise ValueError(f"save: dense={dense!r}; use 'bfloat16', 'float16' or None")
    flatten(tree)  # two tensors of one path could not be told apart
    skeleton, tensors = flatten_tree(tree)
    text = None if recipe is None else _compact(recipe_to_json(recipe))
    entries, written = 0, 0
    with Writer(path) as writer:
        for name, x in tensors:
            section = SectionWriter(dense)
            try:
                description = section.leaf(x)
                types = BUILT_IN | {class_name(c): c for c in _classes(x)}
            except (TypeError, ValueError) as e:
                raise type(e)(f"save: {name}: {e}") from e
            entries += check(description, types).entries
            written += sum(map(len, section.chunks))
            writer.add(description, section.chunks)
        padding = -(-entries // _MOST_ENTRIES_PER_BYTE) - written
        if padding > 0:
            writer.add([], [bytes(padding)])
        return writer.close([__version__, text, skeleton, entries])


def _compact(text: str) -> str:
    return json.dumps(json.loads(text), separators=(",", ":"))


def _classes(x: Any) -> Iterator[type[Encoded]]:
    if isinstance(x, Encoded):
        yield type(x)
        for part in x.parts().values():
            yield from _classes(part)


class _Open:
    """An artifact whose index was checked: sections by path."""

    def __init__(self, reader: Reader, types: Sequence[type[Encoded]]) -> None:
        self.reader = reader
        self.types = BUILT_IN | {class_name(c): c for c in types}
        meta = reader.meta
        if (
            type(meta) is not list
            or len(meta) != 4
            or type(meta[0]) is not str
            or type(meta[1]) not in (str, type(None))
            or type(meta[3]) is not int
        ):
            raise ArtifactError(f"the index does not say what the file is: {meta!r:.80}")
        self.version, self.recipe, self.skeleton, claimed = meta
        self.paths: list[str] = []
        try:
            unflatten_tree(self.skeleton, self.paths.append, dropped=self)
        except RecursionError as e:
            raise ArtifactError("the tree of the file is too deep") from e
        if is_variables(self.skeleton):
            self.paths = [p.removeprefix("params/") for p in self.paths]
        found = reader.sections
        self.padded = len(found) == len(self.paths) + 1 and found[-1].description == []
        if len(found) != len(self.paths) + self.padded:
            raise ArtifactError(f"{len(found)} sections for a tree of {len(self.paths)} tensors")
        if len(set(self.paths)) != len(self.paths):
            raise ArtifactError("two tensors of the file have the same path")
        self.described = [check(s.description, self.types) for s in found[: len(self.paths)]]
        entries = sum(d.entries for d in self.described)
        room = _MOST_ENTRIES_PER_BYTE * sum(s.length for s in found)
        if entries != claimed or entries > room:
            raise ArtifactError(
                f"the tensors have {entries} entries, the file says {claimed} and has bytes for "
                f"at most {room}"
            )
        for d, s in zip(self.described, found, strict=False):
            known = sum(p.bytes for p in d.pieces if p.bytes is not None)
            if known > s.length or (
                known < s.length and all(p.bytes is not None for p in d.pieces)
            ):
                raise ArtifactError(f"a section of {s.length} bytes says it holds {known}")

    def tensor(self, i: int) -> Any:
        """Reads one section."""
        section = self.reader.sections[i]
        reader = SectionReader(self.reader.read(i), self.types)
        try:
            return reader.tensor(section.description)
        except ArtifactError as e:
            raise ArtifactError(f"{self.paths[i]}: {e}") from e
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as e:
            raise ArtifactError(f"{self.paths[i]}: the section is malformed: {e!s:.120}") from e


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
        opened = _Open(reader, types)
        wanted = _wanted(opened.paths, only)
        order = iter(range(len(opened.paths)))
        dropped = object()

        def tensor(_: str) -> Any:
            i = next(order)
            return opened.tensor(i) if opened.paths[i] in wanted else dropped

        tree = unflatten_tree(opened.skeleton, tensor, dropped=dropped)
    return tree if like is None else _pour(tree, like)


def _wanted(paths: Sequence[str], only: str | None) -> set[str]:
    wanted = {p for p in paths if only is None or re.fullmatch(only, p)}
    if only is not None and not wanted:
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
    """
    with Reader(path) as reader:
        meta = reader.meta
    text = meta[1] if type(meta) is list and len(meta) == 4 else None
    if type(text) not in (str, type(None)):
        raise ArtifactError("the recipe of the file is no text")
    return None if text is None else recipe_from_json(text, encoders=encoders)


def inspect(path: str | os.PathLike[str], *, types: Sequence[type[Encoded]] = ()) -> Table:
    """Says what a file holds, in bytes that add up to its length; decodes nothing.

    Args:
      path: the file.
      types: your own leaf classes that the file may name.

    Returns:
      A table: path, kind, shape, part, coder, bytes. Its ``data`` has ``file_bytes``,
      ``parameters``, ``ratio`` (four bytes for each parameter, over the length of the
      file), ``bytes_by_part``, ``container_bytes``, ``recipe`` and ``version``.

    Raises:
      ArtifactError: for what is no sound artifact.
    """
    with Reader(path) as reader:
        opened = _Open(reader, types)
        rows: list[tuple] = []
        parameters = 0
        for name, d, s in zip(opened.paths, opened.described, reader.sections, strict=False):
            parameters += _size(d)
            for p in sized(d.pieces, s.length):
                if p.bytes:
                    rows.append((name, d.kind, list(d.shape), p.part, p.coder, p.bytes))
        if opened.padded:
            rows.append(("", "", None, "padding", "", reader.sections[-1].length))
        container = {k: v for k, v in reader.parts().items() if k != "sections"}
        rows += [("", "", None, "container", k, v) for k, v in container.items()]
        by_part: dict[str, int] = {}
        for row in rows:
            by_part[row[3]] = by_part.get(row[3], 0) + row[5]
        size = reader.size
    if sum(by_part.values()) != size:
        raise ArtifactError(f"the parts have {sum(by_part.values())} bytes, the file {size}")
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


def _size(d: Described) -> int:
    size = 1
    for n in d.shape:
        size *= n
    return size


def size(tree: Any, *, recipe: Sequence[Rule] | None = None) -> int:
    """Returns the bytes that :func:`save` would write for a tree."""
    with tempfile.TemporaryDirectory() as folder:
        return save(os.path.join(folder, "size.jom"), tree, recipe=recipe)
