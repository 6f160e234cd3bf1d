"""Reading Orbax checkpoints, and what reading any checkpoint costs in memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxopt_models._checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Orbax checkpoints of one tree in every layout, and that tree."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("orbax")
    tree = {
        "params": {
            "d": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3, "bfloat16")}
        },
        "blocks": [jnp.arange(2, dtype=jnp.int8), jnp.ones((2, 2))],
        "step": 3,
    }
    with ocp.StandardCheckpointer() as c:
        c.save(folder / "standard", tree)
    with ocp.PyTreeCheckpointer() as c:
        c.save(folder / "pytree", tree)
    with ocp.CheckpointManager(folder / "manager") as m:
        m.save(5, args=ocp.args.StandardSave(tree))
        m.save(10, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(folder / "items") as m:
        save = ocp.args.StandardSave
        m.save(1, args=ocp.args.Composite(params=save(tree), opt=save({"mu": jnp.ones(2)})))
        m.save(2, args=ocp.args.Composite(ema=save(tree), meta=ocp.args.JsonSave({"a": 1})))
        m.save(3, args=ocp.args.Composite(ema=save(tree), opt=save({"mu": jnp.ones(2)})))
    return folder, tree


@pytest.mark.parametrize("where", ["standard", "pytree", "manager/5", "manager/10/default"])
def test_orbax_trees_come_to_the_host(orbax, where):
    folder, tree = orbax
    got = read_checkpoint(folder / where)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    assert got["params"]["d"]["bias"].dtype == ml_dtypes.bfloat16


def test_orbax_items(orbax):
    folder, _ = orbax
    for step in (1, 2):
        assert set(read_checkpoint(folder / "items" / str(step))) == {"params", "blocks", "step"}
    with pytest.raises(ValueError, match="several trees; name one of ema, opt"):
        read_checkpoint(folder / "items" / "3")
    with pytest.raises(ValueError, match="several steps; name one of the folders 5, 10"):
        read_checkpoint(folder / "manager")


def test_a_damaged_orbax_folder_is_a_value_error(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as c:
        c.save(tmp_path / "c", {"w": jnp.ones(4)})
    (tmp_path / "c" / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="Orbax cannot read it"):
        read_checkpoint(tmp_path / "c")


# Runs the command on two files whose leaves have the same shape; the second has many more.
# Anonymous memory only: mapped pages of the checkpoint belong to the system, which drops
# them when it needs room.
PEAK = """
import json, os, sys, threading, time
from jaxopt_models.cli import main

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) << 10

def peak(path):
    most, on = [0], [True]
    def watch():
        while on[0]:
            most[0] = max(most[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    code = main(["compress", path, sys.argv[3], path + ".jom", "--quiet"])
    on[0] = False
    thread.join()
    assert code == 0
    return most[0]

sys.stdout = open(os.devnull, "w")
few = peak(sys.argv[1])
many = peak(sys.argv[2])
print(json.dumps([few, many]), file=sys.__stdout__)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "megabytes, leaf", [(20, 0.25), pytest.param(200, 2, marks=pytest.mark.full)]
)
def test_compress_holds_the_small_tree_and_a_few_leaves(tmp_path, megabytes, leaf):
    columns = int(leaf * (1 << 20)) // (4 * 256)

    def model(path, leaves):
        rng = np.random.default_rng(0)
        x = {
            f"block.{i}.{kind}": rng.standard_normal((256, columns), np.float32)
            for i in range(leaves // 2)
            for kind in ("weight", "dense")
        }
        save_file(x, path)

    model(tmp_path / "few.safetensors", 4)
    model(tmp_path / "many.safetensors", int(megabytes / leaf))
    (tmp_path / "recipe.json").write_text(
        '[{"path": ".*/weight", "encoder": {"quant.Int": {"bits": 8}}}]'
    )
    args = [tmp_path / "few.safetensors", tmp_path / "many.safetensors", tmp_path / "recipe.json"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, args)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    few, many = json.loads(done.stdout)
    # Half of the file is stored dense and stays mapped, half becomes a quarter: 1/8 of it.
    # Copying all of it when it is read gives more than the whole file.
    assert many - few < (megabytes / 8 + 3 * leaf + 6) * (1 << 20), (few, many)
