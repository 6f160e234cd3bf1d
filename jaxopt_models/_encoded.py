"""Compressed parameters: pytree nodes that stand where an array stood."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ._bits import array_bits, pack_bits, packed_length, unpack_bits

T = TypeVar("T")


class Encoded:
    """A tensor stored otherwise: a pytree node that knows how to rebuild it.

    Subclasses are frozen dataclasses decorated with :func:`leaf`. Static fields describe
    the *core* tensor the encoder saw; all array fields carry the same leading *stack*
    axes, so ``shape = stack + core`` is computed and stays true when ``vmap``, ``scan``,
    slicing or sharding takes the leaf apart.

    A subclass gives four things: the field ``core`` (shape of the core tensor), the
    property ``dtype``, the property ``stack``, and :meth:`rebuild` of one core tensor.
    """

    core: tuple[int, ...]
    #: Fields that :func:`partition` hands to an optimizer.
    trainable: ClassVar[tuple[str, ...]] = ()
    #: Fields that a file entropy-codes: ``"mask"``, booleans packed by :func:`pack_bits`, or
    #: ``"codes"``, integers of the shape of the core packed by :func:`pack_codes`. Codes need
    #: the static field ``bits``, 1 to 8, and an attribute or property ``signed``, which may
    #: hang on which parts are ``None`` but on no values.
    #: Other integer arrays of at most 8 bits are coded as they are.
    coded: ClassVar[dict[str, str]] = {}

    #: Whether this only stands around ``values``, which other encoders may encode in its place.
    around: ClassVar[bool] = False

    #: Whether this is in the order of a machine's kernels, which no file keeps.
    laid_out: ClassVar[bool] = False

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor this leaf stands for."""
        raise NotImplementedError

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes shared by all parts."""
        raise NotImplementedError

    def rebuild(self) -> jax.Array:
        """Rebuilds one core tensor, shape ``core``; every part is without stack axes."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor this leaf stands for."""
        return tuple(self.stack) + tuple(self.core)

    @property
    def ndim(self) -> int:
        """Number of axes of the tensor this leaf stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the tensor this leaf stands for."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    def materialize(self) -> jax.Array:
        """Rebuilds the tensor: `shape`, `dtype`; compiled once for each shape."""
        return _rebuild(self)

    def parts(self) -> dict[str, Any]:
        """Returns the array fields by name; a field may be another :class:`Encoded`."""
        values = {name: getattr(self, name) for name in type(self).part_names}
        return {name: value for name, value in values.items() if value is not None}

    def read(self, x: jax.Array, row: tuple[int, ...], over: tuple[str, ...]) -> jax.Array:
        """Returns what becomes of an input before it is multiplied with this parameter.

        Args:
          x: the input.
          row: axes of it that one sample extends over.
          over: mesh axes along which ``shard_map`` divides a sample.

        Returns:
          An array of the shape and type of ``x``.
        """
        return x

    def result(self, y: jax.Array, x: jax.Array, product: Any, over: tuple[str, ...]) -> jax.Array:
        """Returns what becomes of a product with this parameter.

        Args:
          y: the product with what :meth:`read` returned.
          x: the input that :meth:`read` was given.
          product: how they were multiplied, a :class:`jaxopt_models._products.Product`.
          over: as for :meth:`read`.

        Returns:
          An array of the shape and type of ``y``.
        """
        return y

    def storage_bits(self) -> int:
        """Returns the bits really stored: count times width, side data included."""
        return sum(self.bits_by_part().values())

    def bits_by_part(self) -> dict[str, int]:
        """Returns :meth:`storage_bits` by the role of each part."""
        bits: dict[str, int] = {}
        for name, part in self.parts().items():
            inner = part.bits_by_part() if isinstance(part, Encoded) else {name: array_bits(part)}
            for key, n in inner.items():
                bits[key] = bits.get(key, 0) + n
        return bits

    def lost(self) -> str:
        """Says what of a tensor just encoded its parts cannot hold, as far as that can be seen."""
        inner = (p.lost() for p in self.parts().values() if isinstance(p, Encoded))
        return next(filter(None, inner), "")

    def kind(self) -> str:
        """Returns the nesting in words, for instance ``"Masked(Clustered)"``."""
        inner = [p.kind() for p in self.parts().values() if isinstance(p, Encoded)]
        return type(self).__name__ + (f"({', '.join(inner)})" if inner else "")

    def _no_array(self) -> TypeError:
        return TypeError(
            f"a compressed parameter ({self.kind()} of shape {list(self.shape)}) was used as an "
            "array. Call jaxopt_models.accelerate(fn)(params, ...), where fn takes the parameters "
            "as its first argument (fn, params = jaxopt_models.functional(model)), or rebuild them "
            "first: jaxopt_models.materialize(params)"
        )

    def __jax_array__(self, *_: Any, **__: Any) -> Any:
        raise self._no_array()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}"
            + (": " + str(self._no_array()) if hasattr(np.ndarray, name) or name == "at" else "")
        )

    # Arithmetic with a leaf, or indexing one, says the same.
    __array__ = __getitem__ = __jax_array__
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __neg__ = __pow__ = __jax_array__
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __rpow__ = __jax_array__
    __abs__ = __mod__ = __lt__ = __le__ = __gt__ = __ge__ = __jax_array__

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Returns how the parts are divided when the tensor is, or ``None`` if they cannot be.

        Args:
          spec: partition of the dense tensor, an axis each.
          local: shape of one shard of the dense tensor.

        Returns:
          This leaf with a partition spec for each part.
        """
        return None

    def resized(self, shape: tuple[int, ...]) -> Encoded:
        """Returns the leaf of a shard of the given shape, of which this holds the parts."""
        core = tuple(shape[len(shape) - len(self.core) :])
        inner = {n: p.resized(shape) for n, p in self.parts().items() if isinstance(p, Encoded)}
        return dataclasses.replace(self, core=core, **inner)

    def trained(self) -> tuple[str, ...]:
        """Returns the fields that :func:`partition` hands to an optimizer."""
        return type(self).trainable

    def hidden(self, keep: jax.Array) -> Encoded:
        """Returns this leaf of one core tensor with its codes 0 where a mask hides them.

        So a file, which keeps none of these, gives back every bit.
        """
        inner = {
            n: p.hidden(keep) for n, p in self.parts().items() if n == "values" and is_encoded(p)
        }
        return dataclasses.replace(self, **inner)

    def check(self) -> list[str]:
        """Returns what is wrong with the contents of this leaf, a line each; none if sound."""
        return []

    def __repr__(self) -> str:
        options = ", ".join(f"{n}={getattr(self, n)!r}" for n in type(self).static_names)
        parts = ", ".join(f"{n}: {_brief(p)}" for n, p in self.parts().items())
        return f"{type(self).__name__}({options}; {parts})"

    part_names: ClassVar[tuple[str, ...]] = ()
    static_names: ClassVar[tuple[str, ...]] = ()


@jax.jit
def _rebuild(leaf: Encoded) -> jax.Array:
    rebuild = type(leaf).rebuild
    for _ in leaf.stack:
        rebuild = jax.vmap(rebuild)
    return rebuild(leaf)


def _brief(x: Any) -> str:
    if is_encoded(x) or not hasattr(x, "dtype"):
        return repr(x)
    return f"{x.dtype}{list(x.shape)}"


def static(**kwargs: Any) -> Any:
    """Declares a static field of a leaf: hashable, part of the tree structure.

    Args:
      **kwargs: as for `dataclasses.field`.

    Returns:
      What stands after the annotation in the class; see :func:`leaf`.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


def leaf(cls: type[T]) -> type[T]:
    """Makes a subclass of :class:`Encoded` a frozen dataclass and a pytree node.

    Fields declared with :func:`static` are part of the tree structure, all others are
    arrays, further leaves or ``None``.

    Args:
      cls: the class to register.

    Returns:
      The same class.

    Raises:
      TypeError: if it is no :class:`Encoded`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> @jom.leaf
      ... class Halved(jom.Encoded):
      ...     half: jax.Array
      ...     core: tuple[int, ...] = jom.static()
      ...     dtype = property(lambda self: jnp.dtype("float32"))
      ...     stack = property(lambda self: self.half.shape[: self.half.ndim - len(self.core)])
      ...     def rebuild(self):
      ...         return self.half.astype(jnp.float32)
      >>> Halved(jnp.ones(3, jnp.bfloat16), core=(3,)).storage_bits()
      48
    """
    if not issubclass(cls, Encoded):
        raise TypeError(f"leaf: {cls.__name__} must derive from jaxopt_models.Encoded")
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    has = {*dir(cls), *meta, *data}
    missing = [name for name in ("bits", "signed") if name not in has]
    if "codes" in cls.coded.values() and missing:
        raise TypeError(
            f"leaf: {cls.__name__} has coded fields but no {' and no '.join(missing)}; a file "
            "needs both to read them"
        )
    cls.part_names, cls.static_names = tuple(data), tuple(meta)
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def is_encoded(x: Any) -> bool:
    """Says whether ``x`` is a compressed parameter; made for ``is_leaf=``."""
    return isinstance(x, Encoded)


def innermost(leaf: Any) -> Any:
    """Returns the values at the bottom of a leaf."""
    while is_encoded(getattr(leaf, "values", None)):
        leaf = leaf.values
    return leaf


def rebuilt(part: Any) -> Any:
    """Returns the array of a part of a leaf, which may be a leaf."""
    return part.materialize() if is_encoded(part) else part


def divided(part: Any, spec: Any, local: tuple[int, ...]) -> Any:
    """Returns :meth:`Encoded.specs` of a part that is divided as its tensor."""
    return part.specs(spec, local) if is_encoded(part) else spec


def faults(part: Any) -> list[str]:
    """Returns :meth:`Encoded.check` of a part that may be a leaf."""
    return part.check() if is_encoded(part) else []


def materialize(tree: Any) -> Any:
    """Rebuilds every compressed parameter of a tree: the meaning of that tree.

    Args:
      tree: any pytree, for instance the result of :func:`compress`.

    Returns:
      The tree with each :class:`Encoded` replaced by its array, all else untouched.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> small = jom.compress({"kernel": jnp.eye(2)}, [jom.Rule("kernel", jom.quant.Int(bits=8))])
      >>> jom.materialize(small)["kernel"]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    return jax.tree.map(rebuilt, tree, is_leaf=is_encoded)


@leaf
class Masked(Encoded):
    r"""A pruned tensor: a packed mask and the values it keeps.

    .. math:: w_i = m_i \, v_i

    ``values`` always has the dense core shape. Entries that the mask drops are zero, and
    the mask is applied again by :meth:`materialize`, whatever an optimizer did to them.

    Args:
      mask: `uint8` `[*stack, *core[:-1], ceil(core[-1] / 8)]`, a set bit keeps the entry.
      values: array `[*stack, *core]`, or a leaf of that shape.
      core: shape of the core tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    coded: ClassVar[dict[str, str]] = {"mask": "mask"}
    mask: jax.Array
    values: Any
    core: tuple[int, ...] = static()

    @classmethod
    def of(cls, keep: jax.Array, values: Any) -> Masked:
        """Packs booleans ``keep`` of the shape of one core tensor."""
        return cls(pack_bits(jnp.atleast_1d(keep)), values, tuple(keep.shape))

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the values."""
        return self.values.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the mask."""
        return tuple(self.mask.shape[: self.mask.ndim - max(1, len(self.core))])

    def specs(self, spec: Any, local: tuple[int, ...]) -> Any:
        """Divides mask and values as the tensor, where a shard has whole bytes of the mask."""
        axes = [*spec, *[None] * (self.ndim - len(spec))]
        if axes and axes[-1] is not None and local[-1] % 8:
            return None
        values = divided(self.values, spec, local)
        mask = PartitionSpec(*axes)
        return None if values is None else dataclasses.replace(self, mask=mask, values=values)

    def keep(self) -> jax.Array:
        """Unpacks the mask: booleans of the shape of the tensor."""
        n = self.core[-1] if self.core else 1
        return unpack_bits(self.mask, n).reshape(self.shape)

    def rebuild(self) -> jax.Array:
        """Applies the mask to the values of one core tensor."""
        values = rebuilt(self.values)
        return jnp.where(self.keep(), values, jnp.zeros((), values.dtype))

    def _drops_values(self) -> bool:
        return bool(jnp.any(jnp.where(self.keep(), 0, self.values) != 0))

    def check(self) -> list[str]:
        """Checks the shape of the parts, the padding of the mask and what it drops."""
        n = self.core[-1] if self.core else 1
        want = self.stack + self.core[:-1] + (packed_length(n),)
        wrong = []
        if self.mask.dtype != jnp.uint8 or tuple(self.mask.shape) != want:
            wrong.append(f"mask is {self.mask.dtype}{list(self.mask.shape)}, not uint8{list(want)}")
        elif n % 8 and bool(jnp.any(self.mask[..., -1] >> (n % 8))):
            wrong.append("mask has bits set beyond the last entry")
        if tuple(self.values.shape) != self.shape:
            wrong.append(f"values have shape {self.values.shape}, the mask says {self.shape}")
        elif not wrong and not is_encoded(self.values) and self._drops_values():
            wrong.append("values are not zero where the mask drops them")
        return wrong + faults(self.values)
