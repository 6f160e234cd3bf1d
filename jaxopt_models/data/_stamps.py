"""Captioned drawings and photos, the stamps of Tux Paint, read from where Debian puts them."""

import dataclasses
import hashlib
import operator
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

VARIABLE = "JAXOPT_MODELS_TUX_PAINT"
FOLDER = "/usr/share/tuxpaint/stamps"
COMMAND = "apt-get install tuxpaint-stamps-default"
# Letters and digits, one caption for each: they would be a fifth of the set.
_LETTERS = "symbols/alphabets/"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Stamps:
    """Captioned images, which are read when they are asked for; needs Pillow for that.

    Attributes:
      folder: where the files lie.
      paths: `N` paths of images in it, such as `animals/birds/blackbird.png`, sorted.
      captions: `N` texts, one sentence or a few; some are those of several images.
      categories: `N` names, the first folder of each path.
      folds: `uint8[N]`, the md5 of the path without `.png` modulo five.
    """

    folder: Path
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    categories: tuple[str, ...]
    folds: np.ndarray

    def split(self) -> "StampSplit":
        """Gives folds 2 to 4 for training, fold 1 for validation, and fold 0 for the test.

        Which method, rate or size is best is decided on `validation`; `test` is looked at once,
        at the end. Pictures of one thing, and equal captions, may be in several parts, so a
        caption is found when its text is equal.

        Returns:
          :class:`StampSplit`, each part in the order of the paths.

        Example:
          >>> paths, folds = ("food/egg.png", "town/bus.png"), np.uint8([0, 4])
          >>> stamps = Stamps(Path("/"), paths, ("An egg.", "A bus."), ("food", "town"), folds)
          >>> stamps.split().train.captions
          ('A bus.',)
        """
        return StampSplit(*map(self._part, (self.folds > 1, self.folds == 1, self.folds == 0)))

    def image(self, index: int, *, size: int = 64) -> np.ndarray:
        """Reads one image, on white, in the middle of a square.

        Args:
          index: which, from 0.
          size: pixels of each side, to which the whole square is scaled.

        Returns:
          `uint8[size, size, 3]`.

        Raises:
          ImportError: if Pillow is missing; names the command that gets it.
          IndexError: if there is no such image.
          ValueError: if `size` is not positive, or the file is damaged; names it.
        """
        try:
            from PIL import Image
        except ImportError:
            raise ImportError(
                "tux_paint: images need the library Pillow: pip install pillow"
            ) from None
        index, size = operator.index(index), operator.index(size)
        if not 0 <= index < len(self.paths):
            raise IndexError(f"image: index={index} of {len(self.paths)} images, counted from 0")
        if size < 1:
            raise ValueError(f"image: size={size}; give a number of pixels of at least 1")
        path = self.folder / self.paths[index]
        try:
            with Image.open(path) as opened:
                drawn = opened.convert("RGBA")
        except Exception as error:  # the library raises many kinds, SyntaxError among them
            raise ValueError(f"{path}: no image, or a damaged one ({error!s:.200})") from None
        side = max(drawn.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        scaled = square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return np.array(scaled, np.uint8)

    def images(self, *, size: int = 64) -> np.ndarray:
        """Reads all images; those of the whole set in a few seconds.

        Args:
          size: as for :meth:`image`.

        Returns:
          `uint8[N, size, size, 3]`.

        Raises:
          ImportError: as :meth:`image`.
          ValueError: as :meth:`image`.
        """
        found = [self.image(i, size=size) for i in range(len(self.paths))]
        return np.stack(found) if found else np.zeros((0, size, size, 3), np.uint8)

    def _part(self, chosen: np.ndarray) -> "Stamps":
        rows = np.flatnonzero(chosen)
        texts = ([t[i] for i in rows] for t in (self.paths, self.captions, self.categories))
        folds = self.folds[chosen]
        folds.flags.writeable = False
        return Stamps(self.folder, *map(tuple, texts), folds)

    def __repr__(self) -> str:
        kinds = len(set(self.categories))
        return f"Stamps({len(self.paths)} captioned images, {kinds} categories)"


class StampSplit(NamedTuple):
    """Three disjoint sets of stamps: fit on `train`, choose on `validation`, report `test`."""

    train: Stamps
    validation: Stamps
    test: Stamps


def tux_paint(folder: str | os.PathLike[str] | None = None) -> Stamps:
    """Reads the stamps of Tux Paint: drawings and cut-out photos with English captions.

    Looked for in `folder` alone when it is given; otherwise in the folder that the environment
    variable `JAXOPT_MODELS_TUX_PAINT` names, then in `/usr/share/tuxpaint/stamps`, where Debian's
    and Ubuntu's `tuxpaint-stamps-default` puts them. A stamp counts if it is a PNG file with a
    text file of its name beside it, whose first line is the caption and is not empty; the letters
    and digits of `symbols/alphabets` are left out. Version 2022.06.04-1 of the package has 627,
    of 16 categories: 392 for training, 122 for validation, 113 for the test. Other versions, and
    folders of your own in this form, are read as they are. The images are under the licence GPL-2.

    Args:
      folder: the folder of the categories.

    Returns:
      :class:`Stamps`.

    Raises:
      FileNotFoundError: if no place holds a stamp; the message lists the places and the command
        that gets the set.
      ValueError: if a caption is no UTF-8; names the file.

    Example:
      >>> tux_paint("/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: tux_paint: there are stamps in none of these places:
        /nowhere (folder): no such folder
      To get them: apt-get install tuxpaint-stamps-default

    References:
      `Tux Paint <https://tuxpaint.org/>`_, a drawing program for children
    """
    if folder is not None:
        places = [(Path(folder), "folder")]
    else:
        named = os.environ.get(VARIABLE)
        places = [(Path(named), VARIABLE)] if named else []
        places.append((Path(FOLDER), "system folder"))
    looked = []
    for place, origin in places:
        if found := _captions(place):
            return _stamps(place, found)
        lack = "no PNG file with a caption" if place.is_dir() else "no such folder"
        looked.append(f"  {place} ({origin}): {lack}")
    if folder is None and len(places) == 1:
        looked.append(f"  (the environment variable {VARIABLE} is not set)")
    raise FileNotFoundError(
        "tux_paint: there are stamps in none of these places:\n"
        + "\n".join(looked)
        + f"\nTo get them: {COMMAND}"
    )


def _captions(place: Path) -> dict[str, str]:
    """Gives the captions of a folder by the paths of their images, in the order of these."""
    found = {}
    for text in place.rglob("*.txt"):
        image = text.with_suffix(".png")
        name = image.relative_to(place).as_posix()
        if not image.is_file() or name.startswith(_LETTERS):
            continue
        try:
            caption = text.read_text("utf-8").partition("\n")[0].strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text}: the caption is no UTF-8 ({error})") from None
        if caption:
            found[name] = caption
    return dict(sorted(found.items()))


def _stamps(place: Path, captions: dict[str, str]) -> Stamps:
    folds = np.array([_fold(path) for path in captions], np.uint8)
    folds.flags.writeable = False
    categories = tuple(path.partition("/")[0] for path in captions)
    return Stamps(place, tuple(captions), tuple(captions.values()), categories, folds)


def _fold(path: str) -> int:
    name = path.removesuffix(".png").encode()
    return int(hashlib.md5(name, usedforsecurity=False).hexdigest(), 16) % 5
