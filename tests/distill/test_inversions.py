import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import traced

from jaxopt_models.distill import Inversions


@functools.partial(jax.jit, static_argnums=2)
def draw(memory, key, count):
    return memory.draw(key, count)


@jax.jit
def put(memory, images):
    return memory.put(images)


def numbered(start, count):
    return np.arange(start, start + count, dtype=np.float32)[:, None]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 5, 12]), max_size=8))
def test_it_holds_the_latest(batches):
    memory, all_of_them = Inversions.empty(5, (1,)), []
    for count in batches:
        memory = put(memory, numbered(len(all_of_them) + 1, count))
        all_of_them += range(len(all_of_them) + 1, len(all_of_them) + 1 + count)
    latest = all_of_them[-5:]
    assert memory.filled == len(latest)
    assert sorted(x for x in np.asarray(memory.images)[:, 0] if x) == latest
    drawn = np.asarray(draw(memory, jax.random.key(len(batches)), 200))[:, 0]
    assert set(drawn.tolist()) == set(latest or [0])


def test_all_that_is_in_it_is_drawn_alike():
    memory = put(Inversions.empty(5, (1,)), numbered(0, 3))
    drawn = np.asarray(draw(memory, jax.random.key(0), 3000))[:, 0].astype(int)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3), 1000, atol=100)
    again = draw(memory, jax.random.key(1), 3000)
    assert (np.asarray(again)[:, 0] != drawn).any()


def test_it_is_the_state_of_a_loop():
    def step(memory, start):
        memory = memory.put(start + jnp.arange(2.0)[:, None] * jnp.ones((2, 3)))
        return memory, memory.draw(jax.random.key(0), 4)

    memory, drawn = jax.jit(lambda m: jax.lax.scan(step, m, jnp.arange(0.0, 8.0, 2.0)))(
        Inversions.empty(3, (3,))
    )
    assert drawn.shape == (4, 4, 3)
    np.testing.assert_array_equal(memory.images[:, 0], [6, 7, 5])
    assert memory.place == 2


def test_its_dtype_stays():
    memory = Inversions.empty(3, (2,), dtype=jnp.bfloat16)
    assert memory.put(jnp.ones((2, 2))).images.dtype == jnp.bfloat16


@traced
def test_what_does_not_fit_is_named():
    memory = Inversions.empty(3, (2, 2))
    with pytest.raises(ValueError, match=r"images have shape \(4, 2\); give \(B, 2, 2\)"):
        memory.put(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"Inversions.empty: size=0 must be at least 1"):
        Inversions.empty(0, (2,))
    with pytest.raises(ValueError, match=r"Inversions.draw: count=0 must be at least 1"):
        memory.draw(jax.random.key(0), 0)
