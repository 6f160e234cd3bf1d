"""An artifact whose index was checked: tensors by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._encoded import Encoded
from .._paths import is_variables
from ._describe import BUILT_IN, check, class_name
from ._errors import ArtifactError, brief
from ._leaves import SectionReader
from ._reader import Reader
from ._skeleton import unflatten_tree

# A stream of equal codes needs no bytes, so a short file could claim a tensor of any size.
# An honest file is padded to a byte for every so many entries; others are refused.
MOST_ENTRIES_PER_BYTE = 4096


def known_classes(types: Sequence[type[Encoded]]) -> dict[str, type[Encoded]]:
    """Returns the leaf classes that a file may name, by name."""
    for cls in types:
        if not (isinstance(cls, type) and issubclass(cls, Encoded)):
            raise TypeError(f"types: {cls!r} is no leaf class; give subclasses of jom.Encoded")
    return BUILT_IN | {class_name(cls): cls for cls in types}


class Opened:
    """The checked index of an artifact.

    Args:
      reader: the container.
      types: leaf classes beside ours that the file may name.

    Raises:
      ArtifactError: if anything that can be known without reading a tensor is wrong.
    """

    def __init__(self, reader: Reader, types: Sequence[type[Encoded]]) -> None:
        self.reader = reader
        self.types = known_classes(types)
        self.version, self.recipe, self.skeleton, claimed = check_meta(reader.meta)
        self.paths: list[str] = []
        unflatten_tree(self.skeleton, self.paths.append, dropped=self)
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
        room = MOST_ENTRIES_PER_BYTE * sum(s.length for s in found)
        if entries != claimed or entries > room:
            raise ArtifactError(
                f"the tensors have {entries} entries, the file says {claimed} and has bytes for "
                f"at most {room}"
            )
        for path, d, s in zip(self.paths, self.described, found, strict=False):
            if (known := sum(p.bytes for p in d.pieces)) != s.length:
                raise ArtifactError(
                    f"{path}: a section of {s.length} bytes says that it holds {known}"
                )

    def tensor(self, i: int) -> Any:
        """Reads one section."""
        data = self.reader.read(i)
        try:
            return SectionReader(data, self.types).tensor(self.reader.sections[i].description)
        except ArtifactError as e:
            raise ArtifactError(f"{self.paths[i]}: {e}") from e
        except Exception as e:
            # What hostile numbers make NumPy, JAX or the class of a stranger raise.
            raise ArtifactError(
                f"{self.paths[i]}: the section is malformed: {type(e).__name__}: {e!s:.120}"
            ) from e


def check_meta(meta: Any) -> list[Any]:
    """Checks what the index says of the whole file: version, recipe, tree, entries."""
    if (
        type(meta) is not list
        or len(meta) != 4
        or type(meta[0]) is not str
        or type(meta[1]) not in (str, type(None))
        or type(meta[3]) is not int
    ):
        raise ArtifactError(f"the index does not say what the file is: {brief(meta)}")
    return meta
