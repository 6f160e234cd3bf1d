# ruff: noqa: E402
"""What each of several processes does in tests and benchmarks: `python host_work.py` with JSON."""

import json
import os
import signal
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
ASKED = json.loads(sys.argv[1])
COUNT, ME = ASKED["count"], ASKED["process"]

import jax

jax.config.update("jax_num_cpu_devices", 4 // COUNT)
jax.config.update("jax_numpy_rank_promotion", "raise")
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_models as jom
from jaxopt_models import _spread, distill, parallel, quant
from jaxopt_models.parallel import _sections

RNG = np.random.default_rng(0)
WIDE, HIDDEN, ROWS, STEPS = ASKED.get("size", (64, 32, 16, 6))
PARAMS = {
    "a": {"kernel": RNG.standard_normal((WIDE, HIDDEN), np.float32)},
    "b": {"kernel": RNG.standard_normal((HIDDEN, 10), np.float32)},
}
XS = RNG.standard_normal((STEPS, ROWS, WIDE), np.float32)
YS = RNG.integers(0, 10, (STEPS, ROWS)).astype(np.int32)
SOLVED = [jom.Rule(".*/kernel", quant.GPTQ(quant.Int(bits=4, group=16)))]
STREAMED = [jom.Rule(".*", quant.Int(bits=4, group=32))]


def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def die(where):
    """Ends this process as the kernel would, if it was asked for."""
    if ASKED.get("kill") == where and ASKED.get("victim", COUNT - 1) == ME:
        os.kill(os.getpid(), signal.SIGKILL)


def calibrated(mesh):
    """Statistics of batches of which each process has its rows."""

    def batches():
        rows = len(XS[0]) // COUNT
        for i, x in enumerate(XS):
            if i == STEPS // 2:
                die("calibrate")
            mine = x[ME * rows : (ME + 1) * rows]
            sharding = NamedSharding(mesh, PartitionSpec("data"))
            yield (jax.make_array_from_process_local_data(sharding, mine),)

    return jom.calibrate(apply, PARAMS, batches(), SOLVED)


def distilled(mesh):
    """A student after one epoch, with checkpoints on the way."""
    loss = distill.classification()
    scheme = distill.teacher_student(apply, apply, loss, optax.adam(1e-2), mesh=mesh)
    state = scheme.init(jax.tree.map(lambda w: w / 2, PARAMS), PARAMS)

    def batch(i):
        if i == 4:
            die("distill")
        return XS[i], YS[i]

    return distill.fit(
        scheme.step, state, batch, steps=STEPS, every=3, save_every=2, progress=False,
        checkpoint=os.path.join(ASKED["folder"], "checkpoints"),
    )  # fmt: skip


def divided(mesh):
    """Codes of parameters that lie over the devices of all processes."""
    placed = parallel.shard(PARAMS, mesh, [("a/kernel", PartitionSpec(None, "data"))])
    small = jom.compress(placed, [jom.Rule("a/kernel", quant.Int(bits=2, group=16))])
    leaf = small["a"]["kernel"]
    assert len(leaf.codes.addressable_shards) == 4 // COUNT
    assert leaf.codes.sharding.shard_shape(leaf.codes.shape) == (WIDE, HIDDEN // 4)
    return [_spread.on_host(x) for x in (leaf.integers(), leaf.scale)]


def streamed():
    """A checkpoint compressed from file to file."""
    encode, seen = _sections._encode, []

    def dying(*args):
        seen.append(args)
        if len(seen) == 2:
            die("stream")
        return encode(*args)

    _sections._encode = dying
    recipe = STREAMED if ASKED.get("differ") != ME else STREAMED[:0]
    file = os.path.join(ASKED["folder"], "small.jom")
    parallel.compress_checkpoint(ASKED["source"], file, recipe, progress=False, coding=False)


def main():
    """Does what was asked for, and lets the first process write what came out."""
    if COUNT > 1:
        parallel.start(f"localhost:{ASKED['port']}", COUNT, ME)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    found = {}
    with parallel.guard("the work"):
        if ASKED.get("slow") == ME:
            time.sleep(35)  # longer than Gloo waits for processes that have not met yet
        if "calibrate" in ASKED["work"]:
            stats = calibrated(mesh)
            found["gram"] = np.asarray(stats["a/kernel"].gram)
        if "gptq" in ASKED["work"]:
            small = jom.compress(PARAMS, SOLVED, stats=stats)["a"]["kernel"]
            found |= {"codes": np.asarray(small.integers()), "scale": np.asarray(small.scale)}
        if "distill" in ASKED["work"]:
            done = distilled(mesh)
            found["student"] = np.asarray(done.state.student["a"]["kernel"])
            found["loss"] = np.asarray(done.history.column("loss"))
        if "shard" in ASKED["work"]:
            found["two_bits"], found["two_bits_scale"] = divided(mesh)
        if "stream" in ASKED["work"]:
            streamed()
        if "orbax" in ASKED["work"]:
            file = os.path.join(ASKED["folder"], "small")
            parallel.to_orbax(f"{file}.jom", f"{file}.orbax", progress=False)
    if ME == 0:
        np.savez(os.path.join(ASKED["folder"], "found.npz"), **found)


main()
