"""What a labelled image set is, and its batches as a function of the step."""

import dataclasses
import operator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax

ArrayT = TypeVar("ArrayT", np.ndarray, "jax.Array")


class Examples(NamedTuple):
    """Images `[N, 28, 28]` and their labels `[N]`, both `uint8`."""

    images: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """Three disjoint sets of examples: fit on `train`, choose on `validation`, report `test`."""

    train: Examples
    validation: Examples
    test: Examples


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Images:
    """A labelled image set as it was published: a training and a test part.

    The arrays are read-only and stay bytes; the reference models divide by 255 inside, and
    :func:`normalize` does it for others.

    Attributes:
      train_images: `uint8[N, 28, 28]`.
      train_labels: `uint8[N]`, indices into `classes`.
      test_images: `uint8[M, 28, 28]`.
      test_labels: `uint8[M]`.
      classes: the names of the classes.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]

    def split(self, *, validation: int | None = None) -> Split:
        """Sets the last training examples aside for validation.

        Which method, rate or width is best is decided on `validation`; `test` is looked at
        once, at the end.

        Args:
          validation: how many examples, at least one and fewer than there are in training.
            Default: 10,000, but never more than a fifth of the training part (so 10,000 of the
            60,000 of the full sets, and 2,000 of the 10,000 of the bundled one).

        Returns:
          :class:`Split` of views, in the order of the files.

        Raises:
          ValueError: if `validation` would leave no example on one of the two sides.

        Example:
          >>> images, labels = np.zeros((50, 28, 28), np.uint8), np.zeros(50, np.uint8)
          >>> data = Images(images, labels, images[:5], labels[:5], ("nothing",))
          >>> [part.images.shape[0] for part in data.split()]
          [40, 10, 5]
        """
        total = len(self.train_labels)
        held = min(10_000, total // 5) if validation is None else operator.index(validation)
        if not 0 < held < total:
            raise ValueError(
                f"split: validation={held} of {total} training examples; "
                f"give a number from 1 to {total - 1}."
            )
        cut = total - held
        return Split(
            Examples(self.train_images[:cut], self.train_labels[:cut]),
            Examples(self.train_images[cut:], self.train_labels[cut:]),
            Examples(self.test_images, self.test_labels),
        )

    def __repr__(self) -> str:
        return (
            f"Images({len(self.train_labels)} train, {len(self.test_labels)} test, "
            f"{len(self.classes)} classes)"
        )


class Shuffled:
    """Batches as a pure function of the step; made by :func:`shuffled`.

    Attributes:
      steps_per_epoch: number of batches an epoch, `N // size`.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, size: int, seed: int):
        size, seed = operator.index(size), operator.index(seed)
        if len(images) != len(labels):
            raise ValueError(
                f"shuffled: {len(images)} images but {len(labels)} labels; "
                "they must have the same leading axis."
            )
        if not 0 < size <= len(labels):
            raise ValueError(
                f"shuffled: size={size}; give a batch size from 1 to the {len(labels)} examples."
            )
        if seed < 0:
            raise ValueError(f"shuffled: seed={seed}; give a seed of at least 0.")
        self._images, self._labels = images, labels
        self._size, self._seed = size, seed
        self._current: tuple[int, np.ndarray] | None = None
        self.steps_per_epoch = len(labels) // size

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives the images `[size, ...]` and labels `[size]` of a step counted from 0."""
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"shuffled: step={step}; steps are counted from 0.")
        epoch, batch = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[batch * self._size : (batch + 1) * self._size]
        return self._images[chosen], self._labels[chosen]

    def _order(self, epoch: int) -> np.ndarray:
        # Only a cache: one pair, replaced at once, so that threads may share the object.
        current = self._current
        if current is None or current[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            current = self._current = epoch, generator.permutation(len(self._labels))
        return current[1]


def shuffled(images: np.ndarray, labels: np.ndarray, *, size: int, seed: int) -> Shuffled:
    """Makes `batch_at(step)`, the batch of any step of an endless shuffled pass over the data.

    Epoch `e` is the permutation that NumPy's generator seeded by `(seed, e)` draws, cut into
    `N // size` batches; the remainder of that epoch is dropped. The batch depends on the step
    and the seed only, so a run that resumes at a step sees exactly what it would have seen.

    Args:
      images: `[N, ...]`, any NumPy array.
      labels: `[N, ...]`.
      size: examples a batch, from 1 to `N`.
      seed: at least 0.

    Returns:
      A callable from a step (counted from 0) to copies `(images[size, ...], labels[size, ...])`;
      its `steps_per_epoch` is `N // size`.

    Raises:
      ValueError: if the lengths differ, or `size`, `seed` or a step is out of range.

    Example:
      >>> batch_at = shuffled(np.arange(6), np.arange(6) % 2, size=3, seed=0)
      >>> batch_at.steps_per_epoch
      2
      >>> sorted(np.concatenate([batch_at(0)[0], batch_at(1)[0]]).tolist())
      [0, 1, 2, 3, 4, 5]
      >>> bool((batch_at(7)[0] == shuffled(np.arange(6), np.arange(6), size=3, seed=0)(7)[0]).all())
      True
    """
    return Shuffled(images, labels, size=size, seed=seed)


def normalize(images: ArrayT) -> ArrayT:
    """Maps bytes to `float32` in [0, 1]: `x / 255`.

    Computed as a product with the nearest `float32` to `1 / 255`, which NumPy and XLA round
    alike (XLA turns a division by a constant into this product, so dividing would give other
    last bits compiled than not). 0 gives 0 and 255 gives exactly 1.

    Args:
      images: `uint8[...]`, a NumPy or JAX array.

    Returns:
      `float32[...]` of the same kind of array.

    Raises:
      TypeError: if the images are not `uint8`; floats are taken to be scaled already.

    Example:
      >>> normalize(np.array([0, 255], np.uint8))
      array([0., 1.], dtype=float32)
    """
    if images.dtype != np.uint8:
        raise TypeError(f"normalize: images have dtype {images.dtype}; give uint8 pixels 0 to 255.")
    return images.astype(np.float32) * np.float32(1 / 255)
