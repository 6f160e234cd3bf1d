"""Leaf classes that are not ours: named in the file, given by the caller, or refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from artifact_trees import (
    Scaled,
    assert_same,
    quantized,
    stranger,
)

import jaxopt_models as jom
from jaxopt_models.artifact import ArtifactError, inspect
from jaxopt_models.quant._quantized import Quantized


def test_the_leaf_of_a_stranger(tmp_path):
    tree = stranger()
    path = tmp_path / "a.jom"
    jom.save(path, tree)
    assert_same(jom.load(path, types=[Scaled]), tree)
    assert inspect(path, types=[Scaled]).data["parameters"] == 2 * 96 + 2
    jom.verify(path, types=[Scaled])
    found = [r["path"] for r in jom.report(None, str(path), types=[Scaled])]
    assert set(found) >= {r["path"] for r in jom.report(None, tree)}
    jom.layers(path, types=[Scaled])
    words = r"leaf of class 'artifact_trees:Scaled'; if you trust it, pass types="
    for call in (jom.load, inspect, jom.verify, jom.layers, lambda p: jom.report(None, p)):
        with pytest.raises(ArtifactError, match=words):
            call(path)
    with pytest.raises(TypeError, match="is no leaf class"):
        jom.load(path, types=[dict])


@jom.leaf
class Derived(Quantized):
    """The coded fields of a class that is derived from ours."""


def test_a_leaf_derived_from_ours(tmp_path):
    q = quantized(np.random.default_rng(0), (16, 8), 4, stack=(2,))
    leaf = Derived(q.codes, q.scale, None, q.core, q.out, q.bits, q.dtype_name)
    path = tmp_path / "a.jom"
    n = jom.save(path, {"w": leaf})
    assert_same(jom.load(path, types=[Derived]), {"w": leaf})
    assert inspect(path, types=[Derived]).rows[0]["kind"] == "Derived" and n < 400


def test_a_stranger_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, {"w": Scaled(jnp.ones((8, 4)), jnp.float32(2), (8, 3))})
    with pytest.raises(ArtifactError, match=r"w: .*do not fit together"):
        jom.load(path, types=[Scaled])
