"""Shared weights by k-means."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._axes import Axes, Matrix
from .._bits import is_concrete, pack_codes, wide_dtype
from .._divided import on_outputs
from .._encoder import Encoder
from .._options import whole, width
from ._clustered import Clustered
from ._lloyd import assign, lloyd
from ._lloyd_divided import lloyd_divided


@dataclasses.dataclass(frozen=True)
class KMeans(Encoder):
    r"""Replaces weights by `2^bits` shared ones, chosen by k-means.

    .. math:: \min_{c, q} \sum_i (w_i - c_{q_i})^2, \qquad q_i \in \{0, \dots, 2^b - 1\}

    solved by Lloyd's iteration on the sorted weights. After pruning only the kept entries
    are clustered, and zero stays apart. The centroids are trained through
    :func:`jaxopt_models.partition`. Encoding again changes nothing: at most `2^b` distinct
    values are their own centroids.

    Args:
      bits: width of a code, 1 to 8.
      per: ``"leaf"``, one codebook; ``"channel"``, one for each output.
      start: first centroids: ``"linear"``, evenly over the range, which keeps the rare
        large weights; ``"density"``, evenly over the ranks; ``"random"``, weights drawn with
        ``key``.
      iterations: most iterations of Lloyd's algorithm.

    Raises:
      TypeError: for options that are no whole numbers.
      ValueError: for options outside these, or ``start="random"`` called without ``key``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import codebook
      >>> small = codebook.KMeans(bits=1)(jnp.array([[0.0, 2.0], [9.0, 11.0]]))
      >>> small.codebook
      Array([ 1., 10.], dtype=float32)
      >>> small.materialize()
      Array([[ 1.,  1.],
             [10., 10.]], dtype=float32)

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016
    """

    bits: int
    _: dataclasses.KW_ONLY
    per: Literal["leaf", "channel"] = "leaf"
    start: Literal["linear", "density", "random"] = "linear"
    iterations: int = 300

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", width(self.bits, "KMeans: bits", least=1))
        object.__setattr__(self, "iterations", whole(self.iterations, "KMeans: iterations"))
        if self.per not in ("leaf", "channel"):
            raise ValueError(f"KMeans: per={self.per!r} is neither 'leaf' nor 'channel'")
        if self.start not in ("linear", "density", "random"):
            raise ValueError(f"KMeans: start={self.start!r} is not linear, density or random")
        if self.iterations < 1:
            raise ValueError(f"KMeans: iterations={self.iterations} is not positive")

    def run(self, w: jax.Array, axes: Axes, keep: Any, stats: Any, key: Any) -> Clustered:
        """Encodes ``w``; one codebook of a tensor at hand on a CPU is sorted by NumPy."""
        if self.start == "random" and key is None:
            raise ValueError(
                "KMeans: start='random' draws weights; give key=jax.random.key(0), or --key 0 on "
                "the command line"
            )
        at_hand = is_concrete(w) and not isinstance(keep, jax.core.Tracer)
        if self.per == "channel" or axes.stack or not at_hand or not _on_one_cpu(w):
            return super().run(w, axes, keep, stats, key)
        # The same values in the same order as jnp.sort gives, several times faster.
        x = np.asarray(_canonical(w)).reshape(-1)
        x = x if keep is None else x[np.asarray(keep).reshape(-1)]
        n = x.size
        padded = np.full(w.size, np.inf, x.dtype)
        padded[:n] = x
        padded[:n].sort()
        centroids = self._centroids(jnp.asarray(padded), jnp.asarray(n, jnp.int32), key)
        return _clustered(self, w, keep, centroids)

    def partition(self, spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
        """Divides the outputs, where each has a codebook of its own."""
        return on_outputs(spec, shape, axes) if self.per == "channel" else spec

    def over(self, sharding: NamedSharding) -> KMeans:
        """Returns the encoder of one codebook that sorts weights where they lie."""
        if self.per == "channel" or type(self) is not KMeans:
            return self
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(KMeans)}
        return _OverMesh(**options, sharding=sharding)

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Clustered:
        """Encodes one core tensor; see :class:`KMeans`."""
        if self.per == "leaf" or not axes.out:
            x = _canonical(w)
            n = jnp.asarray(w.size, jnp.int32)
            if keep is not None:
                x, n = jnp.where(keep, x, jnp.inf), jnp.sum(keep, dtype=jnp.int32)
            return _clustered(self, w, keep, self.centroids(x, n, key))
        m = Matrix(tuple(w.shape), axes.out)
        x = m.view(_canonical(w)).T
        n = jnp.full((m.columns,), m.rows, jnp.int32)
        if keep is not None:
            kept = m.view(keep).T
            x, n = jnp.where(kept, x, jnp.inf), jnp.sum(kept, axis=1, dtype=jnp.int32)
        keys = None if key is None else jax.random.split(key, m.columns)
        centroids = jax.vmap(self._centroids)(jnp.sort(x, axis=1), n, keys)
        return _clustered(self, w, keep, centroids.reshape(*m.out_shape, -1), axes.out)

    def centroids(self, x: jax.Array, n: jax.Array, key: Any) -> jax.Array:
        """Returns those of ``n`` values in an array of any shape, all others of which are Inf."""
        return self._centroids(jnp.sort(x.reshape(-1)), n, key)

    def _centroids(self, x: jax.Array, n: jax.Array, key: Any) -> jax.Array:
        return lloyd(x, n, self._key(key), **self._options)

    def _key(self, key: Any) -> Any:
        return key if self.start == "random" else None

    @property
    def _options(self) -> dict[str, Any]:
        return {"k": 2**self.bits, "start": self.start, "iterations": self.iterations}


@dataclasses.dataclass(frozen=True)
class _OverMesh(KMeans):
    """The same, where tensors are divided."""

    sharding: NamedSharding = dataclasses.field(kw_only=True)

    def centroids(self, x: jax.Array, n: jax.Array, key: Any) -> jax.Array:
        """Finds them where the values lie; stack axes are mapped over."""
        core = self.sharding.spec[len(self.sharding.spec) - x.ndim :]
        found = None
        if any(entry is not None for entry in core):
            here = NamedSharding(self.sharding.mesh, PartitionSpec(*core))
            found = lloyd_divided(x, n, self._key(key), here, **self._options)
        return super().centroids(x, n, key) if found is None else found


def _canonical(w: jax.Array) -> jax.Array:
    """Widens to at least float32 and turns -0.0, which sorting may place anywhere, into 0.0."""
    x = w.astype(wide_dtype(w.dtype))
    return jnp.where(x == 0, jnp.zeros((), x.dtype), x)


def _on_one_cpu(w: jax.Array) -> bool:
    devices = w.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@functools.partial(jax.jit, static_argnums=(0, 4))
def _clustered(
    encoder: KMeans, w: jax.Array, keep: Any, centroids: jax.Array, out: tuple[int, ...] = ()
) -> Clustered:
    # Centroids are what the tensor's own type can hold, so that what is stored is what is used.
    centroids = _canonical(centroids.astype(w.dtype)).astype(centroids.dtype)
    x = _canonical(w)
    m = Matrix(tuple(w.shape), out)
    if out:
        table = centroids.reshape(m.columns, -1)
        codes = m.unview(jax.vmap(assign, in_axes=(1, 0), out_axes=1)(m.view(x), table))
    else:
        codes = assign(x, centroids)
    if keep is not None:
        codes = jnp.where(keep, codes, 0)
    return Clustered(
        pack_codes(jnp.atleast_1d(codes), bits=encoder.bits, signed=False),
        centroids,
        core=tuple(w.shape),
        out=out,
        bits=encoder.bits,
        dtype_name=str(w.dtype),
    )
