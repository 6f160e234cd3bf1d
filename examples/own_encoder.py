"""An encoder of your own in 50 lines: weights rounded to powers of two.

Run it: ``python examples/own_encoder.py``.
"""

import dataclasses

import jax
import jax.numpy as jnp

import jaxopt_models as jom


@jom.leaf
class PowerOfTwo(jom.Encoded):
    """Sign and exponent of each entry: one byte instead of four."""

    exponents: jax.Array  # int8, sign in the lowest bit; -128 for zero
    core: tuple[int, ...] = jom.static()
    dtype_name: str = jom.static()

    dtype = property(lambda self: jnp.dtype(self.dtype_name))
    stack = property(lambda self: self.exponents.shape[: self.exponents.ndim - len(self.core)])

    def rebuild(self):
        """Rebuilds one core tensor."""
        e = self.exponents.astype(jnp.int32)
        sign = 1 - 2 * (e & 1)
        value = sign * jnp.exp2((e >> 1).astype(jnp.float32))
        return jnp.where(e == -128, 0.0, value).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Exponents(jom.Encoder):
    """Rounds to the nearest power of two, at least ``2 ** low``; smaller entries become zero."""

    low: int = -60

    def encode(self, w, *, axes, keep, stats, key):
        """Encodes one core tensor."""
        x = w.astype(jnp.float32)
        e = jnp.clip(jnp.round(jnp.log2(jnp.abs(x))), -61, 62)
        code = 2 * e.astype(jnp.int32) + (x < 0)
        code = jnp.where((x == 0) | (e < self.low), -128, code).astype(jnp.int8)
        return PowerOfTwo(code, core=tuple(w.shape), dtype_name=str(w.dtype))


if __name__ == "__main__":
    jom.testing.check_encoder(Exponents())
    small = jom.compress({"w": jnp.array([0.9, -0.3, 0.0])}, [jom.Rule("w", Exponents())])
    print(small["w"].materialize(), small["w"].storage_bits(), "bits")
