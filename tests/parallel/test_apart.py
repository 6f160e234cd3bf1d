"""Functions that live apart beside the same functions one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parallel_programs import collectives, gap, mesh, parameters, same

import jaxopt_models as jom
from jaxopt_models import parallel, quant

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dense(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) + params["bias"][None]


def narrow(params, x):
    return {"sums": (x @ params["w"].astype(jnp.float32)).sum(-1)}


def encoded(params, encoder):
    return jom.compress(params, [jom.Rule("a/kernel", encoder)])


def trio():
    """Three functions and their parameters: dense, 4 bits, another structure."""
    params = {"a": {"kernel": normal(12, 8)}, "bias": normal(8)}
    other = {"w": normal(12, 5).astype(jnp.bfloat16), "step": jnp.int32(7)}
    return [dense, dense, narrow], [params, encoded(params, quant.Int(bits=4, group=4)), other]


def test_members_come_back_bit_for_bit_and_each_device_holds_one():
    params = {"a": {"kernel": normal(12, 8)}, "bias": normal(8), "none": None, "empty": normal(0)}
    four = encoded(params, quant.Int(bits=4))
    mask = jnp.packbits(jnp.ones((12, 8), bool), axis=-1)
    small = four | {"a": {"kernel": jom.Masked(mask, four["a"]["kernel"], (12, 8))}}
    model = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(3)))
    members = [
        small,
        encoded(params, quant.Int(bits=8)),
        optax.adam(1e-3).init(params),
        {"key": jax.random.key(3), "f8": normal(3).astype(jnp.float8_e4m3fn), "model": model},
    ]
    apart = parallel.Apart.of(members, mesh(member=4, data=2), axis="member")
    for member, back in zip(members, apart.members(), strict=True):
        assert same(member, back)
    for buffer in apart.buffers:
        assert [s.data.shape[0] for s in buffer.addressable_shards] == [1] * 8
    # No more than the longest member of each data type.
    assert apart.bytes_each <= 12 * 8 * 4 * 2 + 8 * 4 * 3 + 12 * 8 + 200
    fetched = jax.device_get(parallel.Apart.of(members[1:2], mesh(member=1), axis="member"))
    assert same(members[1], fetched.members()[0])
    trained, rest = apart.split()
    for member, half in zip(members, trained.members(), strict=True):
        assert same(jom.partition(member)[0], half)
    assert same(jom.combine(trained, rest), apart)


def test_members_of_one_structure_are_stored_as_they_are():
    members = [{"w": normal(3, 4)} for _ in range(2)]
    apart = parallel.Apart.of(members, mesh(member=2), axis="member")
    [buffer] = apart.buffers
    assert buffer.shape == (2, 3, 4)
    np.testing.assert_array_equal(buffer[1], members[1]["w"])


@pytest.mark.parametrize("data", ["data", pytest.param(None, marks=pytest.mark.full)])
def test_outputs_equal_the_functions_one_after_another(data):
    fns, members = trio()
    x, where = normal(4, 12), mesh(member=3, data=2)
    apart = parallel.Apart.of(members, where, axis="member")
    run = parallel.apart(fns, where, axis="member", data=data)
    expected = [jom.accelerate(fn)(p, x) for fn, p in zip(fns, members, strict=True)]
    assert gap(run(apart, x), expected) < 1e-6


def test_derivatives_flow_to_floats_and_arguments():
    fns, members = trio()
    x, where = normal(4, 12), mesh(member=3, data=2)
    run = parallel.apart(fns, where, axis="member", data="data", learn=True)
    trained, rest = parallel.Apart.of(members, where, axis="member").split()

    def loss(trained, x):
        outs = run(jom.combine(trained, rest), x)
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(outs))

    grads, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x)
    halves = [jom.partition(p) for p in members]

    def plain(trained, x):
        pairs = zip(fns, trained, halves, strict=True)
        outs = [jom.simulate(fn)(jom.combine(t, r), x) for fn, t, (_, r) in pairs]
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(outs))

    want, want_x = jax.jit(jax.grad(plain, argnums=(0, 1)))([t for t, _ in halves], x)
    found = grads.members()
    # Sums of large terms of both signs.
    assert gap(found[:2], want[:2]) < 1e-4 and gap(by_x, want_x) < 1e-4
    assert gap(found[2], want[2]) < 1e-2  # of bfloat16


def test_the_program_gives_each_device_one_member_and_moves_outputs_only():
    fns = [lambda p, x: x @ p["w"], lambda p, x: x @ p["u"] @ p["v"], dense]
    params = {"a": {"kernel": normal(16, 8)}, "bias": normal(8)}
    members = [{"w": normal(16, 8)}, {"u": normal(16, 64), "v": normal(64, 8)}, params]
    where, x = mesh(member=3), normal(2, 16)
    apart = parallel.Apart.of(members, where, axis="member")
    run = parallel.apart(fns, where, axis="member", combine=jnp.stack)
    program = jax.jit(run).lower(apart, x).compile().as_text()
    longest = 4 * (16 * 64 + 64 * 8)
    assert parameters(program) == [4 * 2 * 16, longest]
    assert collectives(program) == [("all-gather", 3 * 4 * 2 * 8)]
    assert "conditional" in program
    alike = parallel.Apart.of([members[0]] * 3, where, axis="member")
    program = jax.jit(parallel.apart(fns[0], where, axis="member")).lower(alike, x).compile()
    assert "conditional" not in program.as_text()


def test_each_member_may_have_its_own_inputs():
    where = mesh(member=2)
    fns = [lambda p, own, x: own["image"] * p + x, lambda p, own, x: own["text"].sum() * p + x]
    inputs = [{"image": normal(3)}, {"text": jnp.arange(4)}]
    apart, own = (
        parallel.Apart.of(t, where, axis="member") for t in ([normal(), normal()], inputs)
    )
    found = parallel.apart(fns, where, axis="member")(apart, own, jnp.float32(1))
    p, q = apart.members()
    assert gap(found, [inputs[0]["image"] * p + 1, 6 * q + 1]) < 1e-6


def test_outputs_are_combined_by_mean_weights_and_votes():
    outs = [normal(5, 3) for _ in range(3)]
    stack = np.stack(outs)
    np.testing.assert_allclose(parallel.mean(outs), stack.mean(0), rtol=1e-6)
    weights = [0.5, 0.25, 0.25]
    expected = np.einsum("n,nbc->bc", weights, stack)
    np.testing.assert_allclose(parallel.weighted(weights)(outs), expected, rtol=1e-5, atol=1e-6)
    counts = [np.bincount(row, minlength=3) / 3 for row in stack.argmax(-1).T]
    np.testing.assert_allclose(parallel.vote(outs), counts, rtol=1e-6)
    with pytest.raises(ValueError, match=r"output 1 has shapes \[\(2,\)\], output 0 \[\(5, 3\)\]"):
        parallel.mean([outs[0], jnp.ones(2)])
    with pytest.raises(ValueError, match="2 weights for 3 outputs"):
        parallel.weighted([1, 2])(outs)
    with pytest.raises(ValueError, match="no outputs"):
        parallel.vote([])
    with pytest.raises(ValueError, match="finite numbers"):
        parallel.weighted([[1.0]])


def test_what_is_wrong_is_named():
    where, fn = mesh(member=2, data=2), dense
    params = {"a": {"kernel": normal(12, 8)}, "bias": normal(8)}
    apart = parallel.Apart.of([params, params], where, axis="member")
    cases = [
        (TypeError, "mesh is int", lambda: parallel.apart(fn, 8, axis="member")),
        (ValueError, "axis='nope' is none of", lambda: parallel.apart(fn, where, axis="nope")),
        (
            ValueError,
            "axis and data are both 'data'",
            lambda: parallel.apart(fn, where, axis="data", data="data"),
        ),
        (
            ValueError,
            "3 functions for the 2 devices .* join neighbours",
            lambda: parallel.apart([fn] * 3, where, axis="member"),
        ),
        (
            ValueError,
            "1 members for the 2 devices .* give 2",
            lambda: parallel.Apart.of([params], where, axis="member"),
        ),
        (
            TypeError,
            "members is dict; give a list of 2",
            lambda: parallel.Apart.of(params, where, axis="member"),
        ),
        (
            TypeError,
            r"members\[1\]\['a'\] is str",
            lambda: parallel.Apart.of([params, {"a": "b"}], where, axis="member"),
        ),
        (
            TypeError,
            "function 1 is int",
            lambda: parallel.apart([fn, 3], where, axis="member"),
        ),
        (
            TypeError,
            "parameters are list; put them on their devices",
            lambda: parallel.apart(fn, where, axis="member")([params] * 2, normal(2, 12)),
        ),
        (
            ValueError,
            "whose 3 rows do not divide over the 2 devices of axis 'data'",
            lambda: parallel.apart(fn, where, axis="member", data="data")(apart, normal(3, 12)),
        ),
        (
            ValueError,
            "2 members for the 4 devices",
            lambda: parallel.apart(fn, mesh(member=4), axis="member")(apart, normal(2, 12)),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
