"""How gradients travel: as 8-bit integers, or the largest of them alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._options import portion, whole


def _zeros(size: int) -> jax.Array:
    return jnp.zeros(size, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Int8:
    r"""Sends gradients as 8-bit integers with a scale for each block.

    .. math:: q_i = \mathrm{round}(g_i / s_b), \qquad s_b = \max_{i \in b} |g_i| / 127

    Every device gets one part of the gradients of all others (all-to-all), averages it, and sends
    the mean to all others, as integers again (all-gather). A sum of integers as ``psum`` makes it
    would travel in four bytes. On each device what both roundings lost is kept. Of `N` numbers a
    device sends `2 N (1 + 4 / block)` bytes where all-reduce sends `8 N`.

    Args:
      block: how many neighbours share a scale.

    Raises:
      ValueError: if ``block`` is not positive.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.Int8(block=128)
      Int8(block=128)

    References:
      Tang et al., `DoubleSqueeze <https://arxiv.org/abs/1905.05957>`_, 2019;
      Dettmers, `8-Bit Approximations for Parallelism in Deep Learning
      <https://arxiv.org/abs/1511.04561>`_, 2016
    """

    _: dataclasses.KW_ONLY
    block: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", whole(self.block, "Int8: block"))
        if self.block < 1:
            raise ValueError(f"Int8: block={self.block} is not positive")

    def lost(self, size: int, devices: int) -> dict[str, jax.Array]:
        """Returns what was not sent so far, nothing: of this device, and of its part of means."""
        padded = self._padded(size, devices)
        return {"device": _zeros(padded), "mean": _zeros(padded // devices)}

    def mean(self, x: jax.Array, lost: Any, axis: Any, devices: int) -> tuple[jax.Array, Any]:
        """Returns the mean over devices of `[size]`, and what was not sent."""
        size = x.shape[0]
        x = jnp.pad(x, (0, self._padded(size, devices) - size)) + lost["device"]
        sent, scale = self._round(x)
        parts = [a.reshape(devices, -1, a.shape[-1]) for a in (sent, scale)]
        mine = [lax.all_to_all(a, axis, 0, 0, tiled=True) for a in parts]
        mean = jnp.mean(self._values(*mine).reshape(devices, -1), axis=0) + lost["mean"]
        again = self._round(mean)
        found = [lax.all_gather(a, axis, tiled=True) for a in again]
        left = {
            "device": x - self._values(sent, scale).reshape(-1),
            "mean": mean - self._values(*again).reshape(-1),
        }
        return self._values(*found).reshape(-1)[:size], left

    def _padded(self, size: int, devices: int) -> int:
        step = self.block * devices
        return -(-size // step) * step

    def _round(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(-1, self.block)
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
        return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale

    def _values(self, q: jax.Array, scale: jax.Array) -> jax.Array:
        return q.astype(jnp.float32) * scale


@dataclasses.dataclass(frozen=True)
class TopK:
    r"""Sends the largest gradients alone, each with its place.

    .. math:: \frac{1}{n} \sum_d \mathrm{top}_k(g_d), \qquad k = \lceil \text{share} \cdot N \rceil

    What a device does not send it adds to its gradients of the next step. Each device sends
    `8 k (n - 1)` bytes (all-gather of numbers and places).

    Args:
      share: which part of the numbers is sent, in (0, 1].

    Raises:
      ValueError: if ``share`` is out of range.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.TopK(share=0.01)
      TopK(share=0.01)

    References:
      Lin et al., `Deep Gradient Compression <https://arxiv.org/abs/1712.01887>`_, 2018
    """

    _: dataclasses.KW_ONLY
    share: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", portion(self.share, "TopK: share", closed=True))
        if not self.share:
            raise ValueError("TopK: share=0 sends nothing")

    def lost(self, size: int, devices: int) -> dict[str, jax.Array]:
        """Returns what was not sent so far: nothing."""
        return {"device": _zeros(size)}

    def mean(self, x: jax.Array, lost: Any, axis: Any, devices: int) -> tuple[jax.Array, Any]:
        """Returns the mean over devices of `[size]`, and what was not sent."""
        x = x + lost["device"]
        _, place = lax.top_k(jnp.abs(x), math.ceil(self.share * x.shape[0]))
        values, places = (lax.all_gather(a, axis, tiled=True) for a in (x[place], place))
        mean = jnp.zeros_like(x).at[places].add(values) / devices
        return mean, {"device": x.at[place].set(0)}
