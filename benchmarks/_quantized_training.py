"""Networks that are trained while quantized, on Fashion-MNIST, beside float ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_models as jom
from jaxopt_models import Rule, chain, data, quant

from ._lenet import accuracy
from ._rows import Row, mean_row

logger = logging.getLogger(__name__)
BATCH = 256


class Mlp(nn.Module):
    """784-512-512-512-10 with BatchNorm before each inner layer, as XNOR-Net orders them.

    Args:
      relu: whether inner layers see what is positive; else signs are all that they see.
    """

    relu: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps bytes `[B, 28, 28]` to logits `[B, 10]`."""

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.95, name=name)(x)

        x = images.reshape(-1, 784).astype(jnp.float32) / 255
        x = nn.Dense(512, name="first")(x)
        for i in range(2):
            x = norm(x, f"norm{i}")
            x = nn.Dense(512, name=f"inner{i}")(nn.relu(x) if self.relu else x)
        x = norm(x, "norm_last")
        return nn.Dense(10, name="last")(nn.relu(x) if self.relu else jnp.clip(x, -1, 1))


class Task:
    """Images, and the training of functions on them.

    Args:
      quick: the bundled images and few epochs.
      seed: of the order of the images.
    """

    def __init__(self, *, quick: bool, seed: int):
        images = data.fashion_mnist_small() if quick else data.fashion_mnist()
        self.x, self.y = jnp.asarray(images.train_images), jnp.asarray(images.train_labels)
        self.images, self.seed, self.epochs = images, seed, 2 if quick else 20

    def train(
        self,
        fn: Callable[..., Any],
        params: Any,
        *,
        rate: float = 1e-3,
        stateful: bool = False,
        tail: optax.GradientTransformation | None = None,
    ) -> Any:
        """Trains what may be trained; ``stateful`` functions return new parameters, too."""
        steps = len(self.x) // BATCH
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, self.epochs * steps))
        optimizer = optimizer if tail is None else optax.chain(optimizer, tail)

        def loss(trainable: Any, rest: Any, x: jax.Array, y: jax.Array) -> Any:
            out = fn(jom.combine(trainable, rest), x)
            out, new = out if stateful else (out, None)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y)), new

        def step(carry: Any, rows: jax.Array) -> Any:
            trainable, rest, state = carry
            grad = jax.grad(loss, has_aux=True)
            grads, new = grad(trainable, rest, self.x[rows], self.y[rows])
            updates, state = optimizer.update(grads, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            if stateful:
                whole = {**jom.combine(trainable, rest), "batch_stats": new["batch_stats"]}
                trainable, rest = jom.partition(whole)
            return (trainable, rest, state), None

        @jax.jit
        def epoch(carry: Any, key: jax.Array) -> Any:
            order = jax.random.permutation(key, len(self.x))[: steps * BATCH]
            return jax.lax.scan(step, carry, order.reshape(-1, BATCH))[0]

        trainable, rest = jom.partition(params)
        carry = trainable, rest, optimizer.init(trainable)
        for i in range(self.epochs):
            carry = epoch(carry, jax.random.fold_in(jax.random.key(self.seed), i))
        return jom.combine(carry[0], carry[1])


def shipped(task: Task, run: Callable[..., Any], latents: Any, recipe: list[Rule]) -> float:
    """Returns the accuracy of what is shipped, after checking that it is what was trained."""
    small = jom.compress(latents, recipe)
    pairs = zip(*map(jax.tree.leaves, map(jom.materialize, (small, latents))), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise AssertionError("what is shipped differs from what was trained")
    # Inputs are rounded by what was learned of them, which is no part of a tensor.
    logits = [np.asarray(jax.jit(run)(tree, task.x[:BATCH])) for tree in (small, latents)]
    if not np.array_equal(*logits):
        raise AssertionError("what is shipped computes other logits than what was trained")
    return accuracy(task.images, run, small)


def lenet_gaps(task: Task) -> dict[str, float]:
    """Trains LeNet-300-100 in float, goes on in LSQ, and in binary weights."""
    model = jom.models.LeNet300()
    fn, params = jom.functional((model, model.init(jax.random.key(task.seed), task.x[:1])))
    dense = task.train(fn, params)
    found, run = {"float": accuracy(task.images, fn, dense)}, jom.simulate(fn)
    # What is quantized below goes on from here, so it is trained twice as long.
    found["longer"] = accuracy(task.images, fn, task.train(fn, dense)) - found["float"]
    for bits in (4, 2):
        # Every layer's input is an image or behind a ReLU, so never negative.
        both = chain(quant.LSQ(bits=bits), quant.LearnedInput(bits=bits, signed=False))
        recipe = [Rule(".*/kernel", both)]
        stats = jom.calibrate(fn, dense, [(task.x[:2048],)], recipe)
        latents = task.train(run, jom.prepare(dense, recipe, stats=stats))
        found[f"lsq{bits}"] = shipped(task, run, latents, recipe) - found["float"]
    recipe = [Rule(".*/kernel", quant.BWN())]
    latents = task.train(run, jom.prepare(dense, recipe), tail=quant.clip_latents())
    found["bwn"] = shipped(task, run, latents, recipe) - found["float"]
    return found


def xnor_gaps(task: Task) -> dict[str, float]:
    """Trains the float network with ReLU, and the one with signs in its place."""
    found, share = {}, {}
    for name, model in {"float": Mlp(), "xnor": Mlp(relu=False)}.items():
        variables = model.init(jax.random.key(task.seed), task.x[:1])
        step, params = jom.functional((model, variables), mutable=True)
        fn = jom.functional((model, variables))[0]
        recipe = [] if name == "float" else [Rule("inner./kernel", quant.XNOR())]
        latents = task.train(
            jom.simulate(lambda p, x, step=step: step(p, x, train=True)),
            jom.prepare(params, recipe) if recipe else params,
            stateful=True,
            tail=quant.clip_latents() if recipe else None,
        )
        run = jom.simulate(fn)
        if recipe:
            share[name] = shipped(task, run, latents, recipe)
            found |= packed(model, jom.compress(latents, recipe), task.images.test_images)
        else:
            share[name] = accuracy(task.images, fn, latents)
    return {**found, "xnor": share["xnor"] - share["float"]}


def packed_layer(leaf: Any, bias: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Returns a layer of XNOR-Net on words of signs: `K alpha (sign(x) . sign(w)) + b`."""
    codes, alpha = leaf.values.integers(), leaf.values.scale[:, 0]
    words = quant.pack_signs(2.0 * codes.T - 1)

    def run(x: jax.Array) -> jax.Array:
        whole = quant.binary_dot(quant.pack_signs(x), words, len(codes))
        return whole * alpha * jnp.mean(jnp.abs(x), axis=1, keepdims=True) + bias

    return run


def whole_parts(leaf: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the products of signs of a layer: of packed words, and of the simulation."""
    codes = leaf.values.integers()
    words = quant.pack_signs(2.0 * codes.T - 1)
    # The same leaf, its scales one and the scale of the input left out.
    signs = dataclasses.replace(leaf.values, scale=jnp.ones_like(leaf.values.scale))
    plain = dataclasses.replace(leaf, values=signs, scaled=False)
    float_ = jom.simulate(lambda p, x: x @ p["w"])({"w": plain}, x)
    return quant.binary_dot(quant.pack_signs(x), words, len(codes)), float_


def packed(model: Mlp, small: Any, images: np.ndarray) -> dict[str, float]:
    """Runs the trained network with packed inner layers, beside the simulation, on test images.

    Each inner layer's whole numbers are compared on the input that it has in the network.
    """
    dense = jom.materialize(small)
    inner = {k: v for k, v in small["params"].items() if k.startswith("inner")}
    layers = {k: packed_layer(v["kernel"], v["bias"]) for k, v in inner.items()}

    def run(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs = {}

        def call(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            name = context.module.name
            if name not in layers:
                return following(*args, **kwargs)
            inputs[name] = args[0]
            return layers[name](*args)

        with nn.intercept_methods(call):
            return model.apply(dense, x), inputs

    simulated = jax.jit(jom.simulate(lambda p, x: model.apply(p, x)))
    run, parts = jax.jit(run), jax.jit(whole_parts)
    whole, gap, other = 0, 0.0, 0
    for start in range(0, len(images), 1000):
        x = jnp.asarray(images[start : start + 1000])
        got, inputs = run(x)
        want = simulated(small, x)
        for name, value in inputs.items():
            a, b = parts(inner[name]["kernel"], value)
            whole += int(jnp.sum(a != b))
        miss = jnp.max(jnp.abs(got - want), axis=1) / jnp.max(jnp.abs(want), axis=1)
        gap = max(gap, float(jnp.max(miss)))
        other += int(jnp.sum(got.argmax(1) != want.argmax(1)))
    return {"whole": whole, "logits": gap, "classes": other}


def rows(*, quick: bool) -> list[Row]:
    """Trains with three seeds."""
    seeds = []
    for seed in (0,) if quick else (0, 1, 2):
        task = Task(quick=quick, seed=seed)
        seeds.append({**lenet_gaps(task), **xnor_gaps(task)})
        logger.info("training, seed %s: %s", seed, {k: round(v, 3) for k, v in seeds[-1].items()})

    def row(claim: str, name: str, bar: str) -> Row:
        return mean_row(claim, [s[name] for s in seeds], bar)

    claim = "XNOR-Net on packed signs beside its simulation"
    return [
        row("float, trained as long again as LSQ and BWN are: points above float", "longer", ""),
        row("LSQ W4A4, points above float", "lsq4", ">= -0.5"),
        row("LSQ W2A2, points above float", "lsq2", ">= -2"),
        row("binary weights (BWN), points above float", "bwn", ">= -0.7"),
        row("XNOR-Net, 784-3x512-10, points above float", "xnor", ">= -3"),
        row(f"{claim}: products of signs that differ, inner layers, test images", "whole", "<= 0"),
        row(f"{claim}: largest difference of logits over an image's largest", "logits", "<= 1e-6"),
        row(f"{claim}: test images of another class", "classes", "<= 0"),
    ]
