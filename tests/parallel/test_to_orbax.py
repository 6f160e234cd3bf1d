"""Artifacts that become checkpoints of Orbax."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec
from parallel_programs import mesh
from test_stream import normal

import jaxopt_models as jom
from jaxopt_models import Rule, codebook, parallel, prune, quant
from jaxopt_models.parallel import _to_orbax

RECIPE = [
    Rule("a/kernel", quant.Int(bits=4, group=8)),
    Rule("a/scanned", quant.Int(bits=3, symmetric=False), jom.Axes(stack=1)),
    Rule("layers/0", jom.chain(prune.Magnitude(sparsity=0.5), codebook.KMeans(bits=2))),
]


def tree():
    return {
        "a": {"kernel": normal(32, 16), "scanned": normal(2, 16, 8), "bias": normal(16)},
        "layers": [normal(16, 8), (normal(3, dtype=ml_dtypes.bfloat16), np.array(3, np.int32))],
        "flags": np.array([True, False]),
        "none": None,
        "step": 7,
        "rate": 0.5,
    }


def restored(folder, abstract):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, abstract)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_holds_the_tree(tmp_path):
    small = jom.compress(tree(), RECIPE)
    jom.save(tmp_path / "m.jom", small | {"name": "a net"}, recipe=RECIPE)
    parallel.to_orbax(tmp_path / "m.jom", tmp_path / "m", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["m", "m.jom"]
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "m", item=small | {"name": ""})
    assert found.pop("name") == "a net"
    same(found, small)
    # Without the recipe, leaves are dicts of their parts.
    read = jom.read_checkpoint(tmp_path / "m")
    np.testing.assert_array_equal(read["a"]["kernel"]["codes"], small["a"]["kernel"].codes)
    assert (read["step"], read["rate"], read["name"]) == (7, 0.5, "a net")


def test_each_device_reads_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(_to_orbax, "_PIECE", 64)
    recipe, params = RECIPE[:1], {"a": {"kernel": normal(32, 16), "bias": normal(16)}}

    def encode(p):
        return jom.compress(p, recipe)

    jom.save(tmp_path / "m.jom", encode(params), coding=False)
    parallel.to_orbax(str(tmp_path / "m.jom"), str(tmp_path / "m"), progress=False)
    where = mesh(model=4)
    abstract = jax.eval_shape(encode, params)
    places = parallel.shardings(abstract, where, [("a/kernel", PartitionSpec(None, "model"))])
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places
    )
    found = restored(tmp_path / "m", abstract)
    assert found["a"]["kernel"].codes.sharding.shard_shape((32, 16)) == (32, 4)
    same(jax.device_get(found), jax.device_get(encode(params)))


def test_leaves_nothing_behind(tmp_path, monkeypatch):
    path, folder = tmp_path / "m.jom", tmp_path / "m"
    jom.save(path, {"w": normal(4, 4), "none": np.zeros((0, 4), np.float32)})
    with pytest.raises(ValueError, match="to_orbax: none: Orbax cannot hold arrays without"):
        parallel.to_orbax(path, folder, progress=False)
    jom.save(path, {"step": 3})
    with pytest.raises(ValueError, match="holds no tensor"):
        parallel.to_orbax(path, folder, progress=False)
    jom.save(path, {"w": normal(4, 4), "rng": jax.random.key(0)})
    with pytest.raises(ValueError, match="to_orbax: rng: Orbax cannot hold random keys"):
        parallel.to_orbax(path, folder, progress=False)
    jom.save(path, {"w": normal(4, 4)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(jom.artifact.ArtifactError):
        parallel.to_orbax(path, folder, progress=False)
    with pytest.raises(FileNotFoundError, match="make it first"):
        parallel.to_orbax(path, tmp_path / "no" / "m", progress=False)
    assert os.listdir(tmp_path) == ["m.jom"]
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="give another folder"):
        parallel.to_orbax(path, folder, progress=False)
    assert os.listdir(folder) == ["mine"] and sorted(os.listdir(tmp_path)) == ["m", "m.jom"]
