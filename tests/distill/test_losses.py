"""What holds for every loss: its oracle, masks and weights, degenerate points, vmap, bfloat16."""

import functools

import distill_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import distill

RNG = np.random.default_rng(0)
B, C = 5, 6
LABELS = jnp.asarray(oracles.LABELS)
# Not at its first call, when constants that count as such are estimated.
MEMORY = distill.contrast_memory(jax.random.key(1), B, C)._replace(log_z=jnp.array([2.0, 1.0]))


def kd(temperature, kind):
    return lambda s, t, **k: distill.kd(s, t, temperature=temperature, divergence=kind, **k)


def decoupled(s, t, **k):
    labels = LABELS[: len(s)]
    return distill.decoupled(s, t, labels, alpha=0.5, beta=3.0, temperature=2.0, **k)


def dist(s, t, **k):
    return distill.dist(s, t, beta=0.5, gamma=2.0, temperature=2.0, **k)


def cross_entropy(s, t, **k):
    return distill.cross_entropy(s, t, smoothing=0.2, **k)


def attention(s, t, **k):
    return distill.attention(s.reshape(-1, 3, 2), t.reshape(-1, 3, 2), power=3, **k)


def variational(s, t, **k):
    return distill.variational(s, t, jnp.asarray(oracles.SCALE, jnp.float32), **k)


def reconstruction(s, t, **k):
    outputs = [{"a": x[:, :2], "b": (x[:, 2:],)} for x in (s, t)]
    return distill.reconstruction(*outputs, **k)


def related(loss):
    """Of features of other widths; these losses take no weights."""

    def fn(s, t, where=None, weights=None):
        return loss(s, t[:, :4], where=where)

    return fn


def contrast(s, t, **k):
    place = jnp.arange(len(s))
    return distill.contrast(s, t, place, MEMORY, jax.random.key(0), negatives=7, **k)[0]


LOSSES = {
    "kd": (kd(3.0, "forward"), oracles.kd(3.0, "forward")),
    "kd_reverse": (kd(1.0, "reverse"), oracles.kd(1.0, "reverse")),
    "kd_js": (kd(0.5, "js"), oracles.kd(0.5, "js")),
    "logit_mse": (distill.logit_mse, oracles.logit_mse),
    "centred_mse": (functools.partial(distill.logit_mse, centred=True), oracles.centred_mse),
    "decoupled": (decoupled, oracles.decoupled),
    "dist": (dist, oracles.dist),
    "cross_entropy": (cross_entropy, oracles.cross_entropy),
    "hint": (distill.hint, oracles.logit_mse),
    "attention": (attention, oracles.attention),
    "factor_transfer": (distill.factor_transfer, oracles.factor_transfer),
    "variational": (variational, oracles.variational),
    "reconstruction": (reconstruction, oracles.reconstruction),
    "similarity": (related(distill.similarity), oracles.similarity),
    "relational_distance": (related(distill.relational_distance), oracles.relational_distance),
    "relational_angle": (related(distill.relational_angle), oracles.relational_angle),
    "pkt": (related(distill.pkt), oracles.pkt),
    "contrast": (contrast, None),
}
NOT_ZERO = {"cross_entropy", "variational", "contrast"}
EXACT = {"kd", "kd_reverse", "kd_js", "logit_mse", "decoupled", "hint", "reconstruction"}
RELATED = {"similarity", "relational_distance", "relational_angle", "pkt"}
every = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def compiled(name):
    fn = LOSSES[name][0]

    def value(s, t, where, weights):
        return fn(s, t, where=where, weights=weights)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def run(name, s, t, where=None, weights=None):
    s, t = jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32)
    where = np.ones(B, bool) if where is None else where
    weights = np.ones(B) if weights is None else weights
    value, grads = compiled(name)(s, t, jnp.asarray(where), jnp.asarray(weights, jnp.float32))
    assert value.shape == () and value.dtype == jnp.float32
    return float(value), [np.asarray(g) for g in grads]


def draw(*shape):
    return RNG.normal(size=shape or (B, C)) * 2


@pytest.mark.parametrize("name", [n for n, (_, oracle) in LOSSES.items() if oracle])
def test_equals_its_oracle_under_masks_and_weights(name):
    s, t = draw(), draw()
    where = np.array([True, False, True, True, True])
    weights = np.array([1.0, 5.0, 0.5, 2.0, 0.25])
    for m, w in ((np.ones(B, bool), np.ones(B)), (where, weights)):
        used = np.ones(B) if name in RELATED else w
        expected = LOSSES[name][1](s[m], t[m], used[m], oracles.LABELS[m])
        assert run(name, s, t, m, w)[0] == pytest.approx(expected, rel=2e-5)


@every
def test_derivatives_are_those_of_the_value(name):
    s, t, ds, dt = (draw() for _ in range(4))
    _, (gs, gt) = run(name, s, t)
    assert np.abs(gs).max() > 0
    step = 3e-3
    up, down = (run(name, s + h * ds, t + h * dt)[0] for h in (step, -step))
    slope = np.sum(gs * ds) + np.sum(gt * dt)
    assert slope == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=2e-3)


@every
def test_degenerate_points_have_finite_derivatives(name):
    s, t = draw(), draw()
    huge = 1e4 * np.sign(s)
    one = np.repeat(s[:1], B, axis=0)
    hot, zero = np.eye(B, C), np.zeros((B, C))
    points = {
        "equal": (s, s),
        "zeros": (zero, zero),
        "zero student": (zero, t),
        "zero teacher": (s, zero),
        "huge": (huge, -huge),
        "huge and equal": (huge, huge),
        "half huge": (s, huge),
        "one row, again and again": (one, t),
        "of both": (one, one),
        "constant rows": (zero + 3, zero - 2),
        "two equal rows": (np.concatenate([s[:1], s[:-1]]), t),
        "one-hot": (hot, hot[::-1]),
        "tiny": (1e-9 * s, 1e-9 * t),
    }
    for at, (a, b) in points.items():
        value, grads = run(name, a, b)
        assert np.isfinite(value), at
        assert all(np.all(np.isfinite(g)) for g in grads), at
        # Others see two widths of the same features.
        alike = a is b and (name not in RELATED or at in ("zeros", "of both"))
        if alike and name not in NOT_ZERO:
            # Others divide by lengths, and round twice; the first power has a slope at once.
            least, slope = (0, 0) if name in EXACT else (1e-12, 1e-6)
            least, slope = (1e-7, 1) if name == "factor_transfer" else (least, slope)
            assert 0 <= value <= least, at
            assert max(np.abs(g).max() for g in grads) <= slope, at


@every
def test_what_is_masked_is_never_seen(name):
    s, t = draw(), draw()
    where = np.array([True, True, False, True, False])
    value, grads = run(name, s, t, where)
    bad_s, bad_t = (np.where(where[:, None], x, np.nan) for x in (s, t))
    again, others = run(name, bad_s, bad_t, where)
    assert again == value
    for g, other in zip(grads, others, strict=True):
        np.testing.assert_array_equal(g, other)
        assert not np.any(g[~where])
    value, grads = run(name, s, t, np.zeros(B, bool))
    assert value == 0
    assert not any(map(np.any, grads))


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in RELATED])
def test_zero_weights_are_a_mask(name):
    s, t = draw(), draw()
    where = np.array([True, True, False, True, False])
    masked, zeros = run(name, s, t, where)[0], run(name, s, t, None, where)[0]
    assert zeros == pytest.approx(masked, rel=1e-6)


@every
def test_batches_of_one_under_vmap_in_bfloat16(name):
    s, t = (jnp.asarray(draw(), jnp.bfloat16) for _ in range(2))
    loss = LOSSES[name][0]
    if name in RELATED | {"dist", "contrast"}:
        # Derivatives of others are those of a row, one of a batch or not.
        values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(s[:, None], t[:, None])
        assert all(g.dtype == jnp.bfloat16 and np.all(np.isfinite(g)) for g in grads)
    else:
        values = jax.jit(jax.vmap(loss))(s[:, None], t[:, None])
    assert values.dtype == jnp.float32
    if name == "contrast":  # Which draws others.
        return
    # All examples are the first of their batch, and have its label.
    for i in range(1 if name == "decoupled" else B):
        expected, _ = run(name, s, t, np.arange(B) == i)
        assert float(values[i]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        assert (abs(float(values[i])) < 1e-12) == (name in RELATED)


@pytest.mark.parametrize("name", ["kd", "kd_reverse", "kd_js", "decoupled", "cross_entropy"])
@pytest.mark.parametrize("of", ["both", "teacher", "student", "all but one"])
def test_impossible_classes_are_finite(name, of):
    s, t = draw(), draw()
    hard = name == "cross_entropy"
    if hard:
        t = np.eye(C)[oracles.LABELS]
    if of == "all but one":
        s[0, 1:] = -np.inf
    if of in ("both", "student"):
        s[:, 4] = -np.inf
    if of in ("both", "teacher") and not hard:
        t[:, 4] = -np.inf
    value, grads = run(name, s, t)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in grads)
    if of == "both" and not hard:
        assert not any(np.any(g[:, 4]) for g in grads)
        if name != "decoupled":  # Whose labels would be others.
            there = np.arange(C) != 4
            expected = LOSSES[name][0](*(jnp.float32(x[:, there]) for x in (s, t)))
            assert value == pytest.approx(float(expected), rel=1e-5)


@every
def test_arrays_are_checked(name):
    loss, x = LOSSES[name][0], jnp.ones((B, C))

    def call(s, t, **k):
        jax.eval_shape(functools.partial(loss, **k), s, t)

    with pytest.raises(ValueError, match=r"has shape \(5.*\(3.* (equal|same|floats)"):
        call(x, x[:3])
    if name != "decoupled":
        with pytest.raises(TypeError, match="int32; give an array of floats"):
            call(x.astype(int), x)
    with pytest.raises(ValueError, match=r"where= has shape \(3,\); give one of the leading"):
        call(x, x, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="where= is float32; give booleans, or 0 and 1"):
        call(x, x, where=jnp.ones(B))
    if name not in RELATED:
        with pytest.raises(ValueError, match="weights= has entries down to -2; give none below 0"):
            call(x, x, weights=jnp.array([1.0, 0, -2, 1, 1]))


@every
def test_what_is_not_finite_is_heard(name):
    for row, column in ((1, slice(None)), (slice(None), slice(None))):
        s, t = draw(), draw()
        s[row, column] = np.nan
        assert np.isnan(run(name, s, t)[0])
        assert name in ("cross_entropy", "contrast") or np.isnan(run(name, t, s)[0])


@every
def test_a_batch_of_none_costs_nothing(name):
    empty = jnp.zeros((0, C))
    if name in ("decoupled", "cross_entropy", "contrast"):
        return  # Whose labels here are those of five examples.
    value, slope = jax.jit(jax.value_and_grad(LOSSES[name][0]))(empty, empty)
    assert value == 0 and slope.shape == (0, C)
