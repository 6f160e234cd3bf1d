"""The part of Fashion-MNIST that comes with the package."""

import hashlib
import importlib.resources
import lzma

import numpy as np

from ._images import Images
from ._sets import CLOTHES

FILE = "fashion_mnist_small.xz"
TRAIN, TEST = 1_000, 500
# Of the decompressed bytes, so that a rebuild with another release of liblzma still passes.
SHA256 = "10cd55eb59c83600f872466214efb14294fdd5fdcf99972af940df08ae44533d"


def fashion_mnist_small() -> Images:
    """Loads the part of Fashion-MNIST that comes with this package; needs no other file.

    It is the first 1,000 training and the first 500 test images of each class, in turn: image
    `i` of a part is the `(i // 10)`-th of class `i % 10` in the full file, so every slice
    whose ends are multiples of ten has all classes equally often. 10,000 and 5,000 real
    images; accuracies on them are not those of the full set. They are under the MIT licence of
    Zalando SE (`LICENSE.fashion-mnist` beside them).

    Returns:
      :class:`Images` with `uint8[10000, 28, 28]` and `uint8[5000, 28, 28]`.

    Raises:
      ValueError: if the file in the package is damaged.

    Example:
      >>> fashion_mnist_small()
      Images(10000 train, 5000 test, 10 classes)

    References:
      Xiao, Rasul and Vollgraf, `Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
      Learning Algorithms <https://arxiv.org/abs/1708.07747>`_, 2017
    """
    return unpack(importlib.resources.files(__package__).joinpath(FILE).read_bytes())


def unpack(packed: bytes) -> Images:
    """Inverts `_bundle.pack`: `uint8[10, 1500, 28, 28]`, each image transposed, under xz."""
    try:
        raw = lzma.decompress(packed, lzma.FORMAT_XZ)
    except lzma.LZMAError as error:
        raise ValueError(f"{FILE}: damaged ({error}); install the package again.") from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{FILE}: the sha256 of its content is {digest}, expected {SHA256}; "
            "install the package again."
        )
    stored = np.frombuffer(raw, np.uint8).reshape(len(CLOTHES), TRAIN + TEST, 28, 28)
    in_turn = stored.transpose(1, 0, 3, 2)
    parts = []
    for part in (in_turn[:TRAIN], in_turn[TRAIN:]):
        parts.append(np.ascontiguousarray(part).reshape(-1, 28, 28))
        parts.append(np.tile(np.arange(len(CLOTHES), dtype=np.uint8), len(part)))
    for array in parts:
        array.flags.writeable = False
    return Images(*parts, classes=CLOTHES)
