"""Orbax keeps encoded trees bit for bit, with a template of the tree and without."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from artifact_trees import assert_same, bits, clustered, masked, quantized
from flax import nnx

import jaxopt_models as jom
from jaxopt_models._encoded import is_encoded


def encoded():
    """Every kind of packed part: int2 and int4, bit planes, masks, groups, stacks, nesting."""
    rng = np.random.default_rng(0)
    keep = rng.random((20, 9)) < 0.5
    return {
        **{f"int{w}": {"kernel": quantized(rng, (12, 10), w)} for w in range(1, 9)},
        **{f"uint{w}": quantized(rng, (12, 10), w, groups=3, zero_point=True) for w in (2, 3, 4)},
        "stacked": quantized(rng, (6, 4), 4, stack=(2, 3)),
        "clustered": clustered(rng, (30, 11), 0.3, 5),
        "masked": masked(keep, jnp.asarray(rng.normal(size=keep.shape) * keep, jnp.bfloat16)),
        "masked_codes": masked(keep, quantized(rng, (20, 9), 3)),
        "dense": jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        "list": [jnp.arange(3), {"step": jnp.int32(7)}],
    }


def trip(folder, tree, *args):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "tree", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "tree", *args)


def template(tree):
    """Shapes and types only, with a place to put them."""
    shape = jax.eval_shape(lambda: tree)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shape)


def test_with_a_template(tmp_path):
    tree = {"params": encoded(), "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}
    back = trip(tmp_path, tree, template(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert_same(back, tree)
    assert_same(jom.materialize(back), jom.materialize(tree))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.hidden(x)))


def test_nnx_state(tmp_path):
    graph, state = nnx.split(Model(nnx.Rngs(0)))
    encoder = jom.chain(jom.prune.Magnitude(sparsity=0.5), jom.codebook.KMeans(bits=2))
    small = jom.compress(state, [jom.Rule(".*/kernel", encoder)])
    back = trip(tmp_path, small, template(small))
    assert jax.tree.structure(back) == jax.tree.structure(small)
    assert [bits(x) for x in jax.tree.leaves(back)] == [bits(x) for x in jax.tree.leaves(small)]
    x = jnp.ones((2, 8))
    want = nnx.merge(graph, jom.materialize(small))(x)
    assert (nnx.merge(graph, jom.materialize(back))(x) == want).all()


def plain(x):
    """A tree as nested dicts of arrays, leaves by the names of their parts."""
    if is_encoded(x):
        return {name: plain(getattr(x, name)) for name in type(x).part_names}
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list) else x


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_without_a_template_the_parts_come_back(tmp_path):
    tree = encoded()
    assert_same(trip(tmp_path, tree), plain(tree))
