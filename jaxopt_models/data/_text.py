"""Sentences that people rated, read from where a package manager put them."""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

VARIABLE = "JAXOPT_MODELS_VADER"
SDIST = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
COMMAND = (
    "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2 -d FOLDER "
    f"(then give FOLDER/{SDIST})"
)
# More than any of the files has; nothing larger is taken out of an archive.
_LARGEST = 1 << 24


class Domain(NamedTuple):
    """One of the four files: its name, the sha256 of its bytes, and what its ids are made of."""

    file: str
    sha256: str
    documents: bool


DOMAINS = {
    "movie": Domain(
        "movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        False,
    ),
    "amazon": Domain(
        "amazonReviewSnippets_GroundTruth.txt",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        True,
    ),
    "nyt": Domain(
        "nytEditorialSnippets_GroundTruth.txt",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        True,
    ),
    "tweets": Domain(
        "tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        False,
    ),
}


class Sentences(NamedTuple):
    """Texts, `N` of them, and their mean ratings, `float32[N]`."""

    texts: tuple[str, ...]
    ratings: np.ndarray


class TextSplit(NamedTuple):
    """Three disjoint sets of sentences: fit on `train`, choose on `validation`, report `test`."""

    train: Sentences
    validation: Sentences
    test: Sentences


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Texts:
    """Rated sentences as they were published, and the tenth of the data that each is in.

    Attributes:
      texts: `N` texts.
      ratings: `float32[N]`, means over the raters, from -4 (most negative) to 4.
      ids: `N` ids of the file; `12_3` is the third sentence of document 12.
      folds: `uint8[N]`, the md5 of the id modulo ten; that of the document where ids name
        one, so that no document is in two folds.
    """

    texts: tuple[str, ...]
    ratings: np.ndarray
    ids: tuple[str, ...]
    folds: np.ndarray

    def split(self) -> TextSplit:
        """Gives folds 2 to 9 for training, fold 1 for validation, and fold 0 for the test.

        Returns:
          :class:`TextSplit`, each part in the order of the file.

        Example:
          >>> ratings, folds = np.float32([1, -2, 3]), np.uint8([7, 0, 1])
          >>> data = Texts(("good", "bad", "best"), ratings, ("1", "2", "3"), folds)
          >>> data.split().test
          Sentences(texts=('bad',), ratings=array([-2.], dtype=float32))
        """
        return TextSplit(*map(self._part, (self.folds > 1, self.folds == 1, self.folds == 0)))

    def _part(self, chosen: np.ndarray) -> Sentences:
        texts = tuple(self.texts[i] for i in np.flatnonzero(chosen))
        ratings = self.ratings[chosen]
        ratings.flags.writeable = False
        return Sentences(texts, ratings)

    def __repr__(self) -> str:
        return f"Texts({len(self.texts)} texts, rated {self.ratings.mean():.2f} on average)"


def vader(domain: str = "movie", *, path: str | os.PathLike[str] | None = None) -> Texts:
    """Reads sentences that people rated from -4 to 4, the ground truth of VADER.

    Looked for at `path` alone when it is given, otherwise where the environment variable
    `JAXOPT_MODELS_VADER` says. Both name the folder of the four files, or the archive they are
    published in (`vaderSentiment-3.3.2.tar.gz`, or `hutto_ICWSM_2014.tar.gz` inside it), or a
    folder with one of these; archives are read in memory. Each file must have the pinned
    sha256. The texts are under the licence MIT.

    Args:
      domain: `"movie"`, 10,605 sentences of reviews; `"amazon"`, 3,708 of reviews;
        `"nyt"`, 5,190 of editorials; `"tweets"`, 4,200.
      path: the folder or the archive.

    Returns:
      :class:`Texts`.

    Raises:
      FileNotFoundError: if the file is at no such place; the message lists the places and the
        command that gets it.
      ValueError: if there is no such domain, or the file is damaged or is not the published one.

    Example:
      >>> vader("tweets", path="/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: vader: tweets_GroundTruth.txt is in none of these places:
        /nowhere (path): no such file or folder
      To get it: pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2 \
-d FOLDER (then give FOLDER/vaderSentiment-3.3.2.tar.gz)

    References:
      Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
      Media Text, ICWSM 2014
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r} is none of {', '.join(map(repr, DOMAINS))}")
    return read_domain(DOMAINS[domain], path)


def read_domain(domain: Domain, path: str | os.PathLike[str] | None) -> Texts:
    """Finds, reads and checks one file."""
    content, place = _find(domain.file, path)
    found = hashlib.sha256(content).hexdigest()
    if found != domain.sha256:
        raise ValueError(
            f"{place}: not the published {domain.file}: its sha256 is {found}, expected "
            f"{domain.sha256}. Get it again: {COMMAND}"
        )
    rows = [line.split("\t", 2) for line in content.decode("utf-8").split("\r\n") if line]
    ids, ratings, texts = zip(*rows, strict=True)
    folds = np.array([_fold(name, domain.documents) for name in ids], np.uint8)
    values = np.array(ratings, np.float32)
    for array in (values, folds):
        array.flags.writeable = False
    return Texts(texts, values, ids, folds)


def _fold(name: str, documents: bool) -> int:
    key = name.rsplit("_", 1)[0] if documents else name
    return int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % 10


def _find(file: str, path: str | os.PathLike[str] | None) -> tuple[bytes, Path]:
    """Gives the bytes of a file, and the place they were found in."""
    named = os.environ.get(VARIABLE) if path is None else path
    if not named:
        looked = f"(the environment variable {VARIABLE} is not set)"
    else:
        place, origin = Path(named), VARIABLE if path is None else "path"
        for found in (place / file, place / ARCHIVE, place / SDIST, place):
            if found.is_file():
                with open(found, "rb") as opened:
                    # A stream, so that a large file of something else is not read whole.
                    content = _unpack(opened, file, found) if found.name != file else opened.read()
                return content, found
        lack = f"no {file}, {ARCHIVE} or {SDIST}" if place.is_dir() else "no such file or folder"
        looked = f"{place} ({origin}): {lack}"
    raise FileNotFoundError(
        f"vader: {file} is in none of these places:\n  {looked}\nTo get it: {COMMAND}"
    )


def _unpack(packed: io.BufferedIOBase, file: str, place: Path) -> bytes:
    """Gives a file of a gzipped tar, or of one in it, by the end of its name."""
    try:
        with tarfile.open(fileobj=packed, mode="r|gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in (file, ARCHIVE):
                    if member.size > _LARGEST:
                        raise ValueError(f"{place}: {name} has {member.size} bytes, too many")
                    content = archive.extractfile(member).read()
                    return content if name == file else _unpack(io.BytesIO(content), file, place)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{place}: no archive, or a damaged one ({error})") from None
    raise ValueError(f"{place}: holds no {file} and no {ARCHIVE}; get it again: {COMMAND}")
