"""Pipelines beside the same stages one after another."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parallel_programs import gap, mesh, same

import jaxopt_models as jom
from jaxopt_models import parallel, quant

RNG = np.random.default_rng(0)
SCHEDULES = ("gpipe", "1f1b")


def normal(*shape, scale=0.3):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


# Structures, shapes and data types all differ, and a row of zeros, which no row of data is near
# to, has an infinite derivative.
def first(params, x):
    return jnp.tanh(x @ params["w"]), x.sum(-1).astype(jnp.int32)


def second(params, x):
    x, count = x
    length = jnp.sqrt((x**2).sum(-1, keepdims=True))
    return length * (x @ params["a"]["kernel"]) + params["b"][None], count


def third(params, x):
    x, count = x
    return (x @ params["w"] + 0.01 * count[:, None]).astype(jnp.bfloat16)


def fourth(params, x):
    return x.astype(jnp.float32) @ params["w"] + params["v"][None]


STAGES = [first, second, third, fourth]


def parts():
    small = {"a": {"kernel": normal(8, 10)}, "b": jnp.ones(10)}
    small = jom.compress(small, [jom.Rule("a/kernel", quant.Int(bits=4))])
    last = {"w": normal(9, 3), "v": normal(3)}
    return [{"w": normal(6, 8)}, small, {"w": normal(10, 9)}, last]


def mean_square(out, target):
    return jnp.mean((out - target) ** 2)


def one_after_another(stages, rest):
    def loss(trained, x, target):
        for stage, t, r in zip(stages, trained, rest, strict=True):
            x = jom.simulate(stage)(jom.combine(t, r), x)
        return mean_square(x, target)

    return loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 1), (4, 8), (5, 2), (3, 3)])
def test_the_timetable_can_be_kept(stages, microbatches, schedule):
    table = parallel.Timetable(stages, microbatches, schedule=schedule)
    forward, backward = table.table()
    when = {}
    for name, found in (("f", forward), ("b", backward)):
        for (tick, stage), m in np.ndenumerate(found):
            if m >= 0:
                assert (name, m, stage) not in when
                when[name, m, stage] = tick
    assert len(when) == 2 * stages * microbatches
    for (name, m, stage), tick in when.items():
        if stage:
            before, after = ("f", m, stage - 1), ("f", m, stage)
            assert when[before] < when[after]
            assert when["b", m, stage] < when["b", m, stage - 1]
        if name == "b":
            assert when["f", m, stage] <= tick
    slots = sum(p.ticks * (p.forward + p.backward) for p in table.phases) * stages
    assert np.isclose(table.bubble, 1 - len(when) / slots)
    assert np.isclose(table.bubble, (stages - 1) / (microbatches + stages - 1))
    if schedule == "1f1b":  # the inputs that a stage keeps at once; the first reads its again
        kept = collections.Counter()
        for (name, m, stage), tick in when.items():
            if name == "f" and stage:
                kept.update((t, stage) for t in range(tick, when["b", m, stage] + 1))
        assert max(kept.values(), default=1) <= table.stash <= max(1, 2 * stages - 3)


@pytest.mark.parametrize(("schedule", "data"), [("gpipe", None), ("1f1b", "data")])
def test_loss_gradients_and_outputs_equal_the_sequence(schedule, data):
    members = parts()
    where = mesh(stage=4, data=2) if data else mesh(stage=4)
    pipe = parallel.pipeline(STAGES, where, microbatches=4, data=data, schedule=schedule)
    x, target = normal(16, 6, scale=1), normal(16, 3)
    apart = pipe.place(members)
    value, grads = pipe.value_and_grad(mean_square)(apart, x, target)
    trained, rest = zip(*map(jom.partition, members), strict=True)
    loss = one_after_another(STAGES, rest)
    want, by_hand = jax.jit(jax.value_and_grad(loss))(list(trained), x, target)
    assert gap(value, want) < 1e-5
    for found, expected in zip(grads.members(), by_hand, strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert gap(found, expected) < 1e-5
    expected = x
    for stage, params in zip(STAGES, members, strict=True):
        expected = jom.accelerate(stage)(params, expected)
    assert gap(pipe.forward(apart, x), expected) < 1e-5


@pytest.mark.parametrize(
    ("schedule", "make", "max_norm"),
    [
        ("1f1b", optax.lamb, 0.05),
        pytest.param("gpipe", optax.adafactor, None, marks=pytest.mark.full),
        pytest.param("gpipe", optax.adamw, 0.05, marks=pytest.mark.full),
    ],
)
def test_parameters_after_steps_equal_the_sequence(schedule, make, max_norm):
    # These optimizers look at the shapes of parameters, and the norm is that of all stages.
    members, optimizer = parts(), make(1e-2)
    pipe = parallel.pipeline(STAGES, mesh(stage=4), microbatches=2, schedule=schedule)
    init, step = pipe.training(mean_square, optimizer, max_norm=max_norm)
    x, target = normal(8, 6, scale=1), normal(8, 3)
    trained, rest = map(list, zip(*map(jom.partition, members), strict=True))
    clip = optax.clip_by_global_norm(max_norm or 1e9)

    @jax.jit
    def by_hand(trained, opt):
        grads = jax.grad(one_after_another(STAGES, rest))(trained, x, target)
        grads, _ = clip.update(grads, clip.init(trained))
        found = [optimizer.update(*three) for three in zip(grads, opt, trained, strict=True)]
        new = [optax.apply_updates(t, u) for t, (u, _) in zip(trained, found, strict=True)]
        return new, [o for _, o in found]

    opt = [optimizer.init(t) for t in trained]
    state = init(members)
    for _ in range(3):
        state, metrics = step(state, x, target)
        trained, opt = by_hand(trained, opt)
    assert gap(state.trained.members(), trained) < 1e-5
    assert step.program._cache_size() == 1
    assert set(metrics) == {"loss"} and int(state.step) == 3
    for member, before in zip(state.members(), members, strict=True):
        assert jax.tree.structure(member) == jax.tree.structure(before)
        assert same(jom.partition(member)[1], jom.partition(before)[1])
    spent = init(members)
    step(spent, x, target)
    with pytest.raises(ValueError, match="given up to an earlier step"):
        step(spent, x, target)


def layer(params, x):
    return x + jnp.tanh(x @ params["w"]) @ params["v"]


def compiled(schedule, microbatches, rows=16, width=32):
    """A pipeline of equal stages, as XLA compiled it."""
    pipe = parallel.pipeline(layer, mesh(stage=4), microbatches=microbatches, schedule=schedule)
    apart = pipe.place([{"w": normal(width, width), "v": normal(width, width)} for _ in range(4)])
    x = normal(rows * microbatches, width)
    step = jax.jit(pipe.value_and_grad(mean_square))
    return pipe, (apart, x, x), step.lower(apart, x, x).compile()


def test_the_program_keeps_the_bubble_and_1f1b_keeps_less():
    memory = {}
    for schedule in SCHEDULES:
        for microbatches in (8, 32):
            pipe, args, program = compiled(schedule, microbatches)
            ticks = parallel.ticks(program)
            assert ticks == [phase.ticks for phase in pipe.timetable.phases]
            memory[schedule, microbatches] = program.memory_analysis().temp_size_in_bytes
            if microbatches == 8:
                works = [phase.forward + phase.backward for phase in pipe.timetable.phases]
                bubble = 1 - 2 * 8 / sum(t * w for t, w in zip(ticks, works, strict=True))
                assert np.isclose(bubble, 3 / 11) and np.isclose(bubble, pipe.timetable.bubble)
                value, grads = program(*args)
                trained = args[0].members()
                loss = one_after_another([layer] * 4, [jom.partition(t)[1] for t in trained])
                want = jax.jit(jax.value_and_grad(loss))(jax.device_get(trained), *args[1:])
                assert gap((value, grads.members()), want) < 1e-5
    assert memory["1f1b", 8] < memory["gpipe", 8]
    assert memory["1f1b", 32] < memory["gpipe", 32] / 2
    assert memory["1f1b", 32] < memory["1f1b", 8] * 1.05


@pytest.mark.full
def test_gpipe_keeps_all_without_remat():
    members = [{"w": normal(4, 4)} for _ in range(2)]
    x = normal(4, 4)
    found = []
    for remat in (True, False):
        stage = lambda params, x: jnp.tanh(x @ params["w"])  # noqa: E731
        pipe = parallel.pipeline([stage] * 2, mesh(stage=2), microbatches=2, remat=remat)
        found.append(pipe.value_and_grad(mean_square)(pipe.place(members), x, x))
    assert gap(*found) < 1e-6


def test_a_stage_without_parameters():
    stages = [lambda p, x: x @ p["w"], lambda p, x: jax.nn.relu(x)]
    pipe = parallel.pipeline(stages, mesh(stage=2), microbatches=2)
    init, step = pipe.training(mean_square, optax.sgd(0.1))
    w, x = normal(4, 4), normal(4, 4)
    state, _ = step(init([{"w": w}, {}]), x, x)
    by_hand = jax.grad(lambda w: mean_square(jax.nn.relu(x @ w), x))(w)
    assert gap(state.members()[0]["w"], w - 0.1 * by_hand) < 1e-6
    assert state.members()[1] == {}


def test_what_is_wrong_is_named():
    where, stage = mesh(stage=2, data=2), layer
    make = parallel.pipeline
    pipe = make(stage, where, microbatches=2, data="data")
    apart = pipe.place([{"w": normal(4, 4), "v": normal(4, 4)}] * 2)
    x = normal(4, 4)

    def uneven(params, x):
        return x[:, :3]

    cases = [
        (ValueError, "3 stages for the 2", lambda: make([stage] * 3, where, microbatches=2)),
        (ValueError, "1 stages for the 2", lambda: make([stage], where, microbatches=2)),
        (TypeError, "stage 1 is None", lambda: make([stage, None], where, microbatches=2)),
        (ValueError, "microbatches=0", lambda: make(stage, where, microbatches=0)),
        (ValueError, "'zigzag'", lambda: make(stage, where, microbatches=2, schedule="zigzag")),
        (
            ValueError,
            "remat=False with schedule='1f1b'",
            lambda: make(stage, where, microbatches=2, schedule="1f1b", remat=False),
        ),
        (TypeError, "loss is int", lambda: pipe.value_and_grad(3)),
        (
            ValueError,
            r"x has shape \[6, 4\], whose rows do not divide into 2 .* on each of 2 parts",
            lambda: pipe.forward(apart, normal(6, 4)),
        ),
        (
            ValueError,
            r"target\['y'\] has shape \[\]",
            lambda: pipe.value_and_grad(mean_square)(apart, x, {"y": jnp.float32(1)}),
        ),
        (
            TypeError,
            r"loss returned float32\[[12],4\]",
            lambda: pipe.value_and_grad(lambda out, target: out - target)(apart, x, x),
        ),
        (
            TypeError,
            "loss returned tuple",
            lambda: pipe.value_and_grad(lambda out, _: (out.mean(), {}))(apart, x, x),
        ),
        (
            ValueError,
            "x has 4 rows, target 8",
            lambda: pipe.value_and_grad(mean_square)(apart, x, normal(8, 4)),
        ),
        (
            ValueError,
            r"arrays of x have rows \[4, 8\]",
            lambda: pipe.forward(apart, (x, normal(8, 4))),
        ),
        (TypeError, "parameters are list", lambda: pipe.forward([1, 2], x)),
        (
            TypeError,
            "optimizer is int",
            lambda: pipe.training(mean_square, 3),
        ),
        (
            ValueError,
            "max_norm=-1",
            lambda: pipe.training(mean_square, optax.sgd(1), max_norm=-1),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    turned = make([stage, lambda params, x: (x @ params["w"]).T], where, microbatches=2)
    with pytest.raises(ValueError, match=r"array of shape \[4, 2\] for 2 rows"):
        turned.forward(apart, x)
    wrong = make([uneven, stage], where, microbatches=2)
    with pytest.raises(TypeError) as error:
        wrong.forward(apart, x)
    assert "in stage 1 of 2, whose input is float32[2, 3]" in error.value.__notes__[0]


def test_ticks_are_read_where_the_compiler_only_gives_a_bound():
    text = """HloModule pipeline
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sent = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
  ROOT %both = (s32[], f32[4]{0}) tuple(%next, %sent)
}

%test.1 (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[]{:T(128)} constant(11)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%test.1, body=%body.1
  ROOT %end = f32[4]{0} get-tuple-element(%loop), index=1
}
"""
    assert parallel.ticks(text) == [11]
    with pytest.raises(ValueError, match="how often loop runs"):
        parallel.ticks(text.replace("constant(11)", "parameter(1)"))
