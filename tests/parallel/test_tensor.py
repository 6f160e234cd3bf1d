import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parallel_layouts import mesh_of, transfers

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, models, parallel, quant

RNG = np.random.default_rng(0)
INT8 = [Rule(".*(kernel|embedding)", quant.Int(bits=8))]
INT4 = [
    Rule(".*attention/(query|key|value)/kernel", quant.Int(bits=4, group=8), axes=Axes((1, 2))),
    Rule(".*kernel", quant.Int(bits=4, group=8)),
]
TOKENS = jnp.asarray(RNG.integers(0, 11, (4, 8)), jnp.int32)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def linen(model, *args):
    """Returns a function and parameters that are drawn without compiling anything."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    draw = lambda x: 1.0 * (x.ndim == 1) + normal(*x.shape) / 8  # noqa: E731
    return jom.functional((model, jax.tree.map(draw, variables)))


def shapes(model, *args):
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    fn = lambda p, *a: model.apply(p if "batch_stats" in p else {"params": p}, *a)  # noqa: E731
    return fn, variables if "batch_stats" in variables else variables["params"]


def runs_divided(fn, params, args):
    """Compares a call on a mesh of two by four devices with one device, and counts transfers."""
    mesh = mesh_of((2, 4))
    rules = parallel.tensor(fn, params, *args, mesh=mesh, smallest=0)
    run = jom.accelerate(parallel.constrain(fn, rules.inside, mesh=mesh))
    there = parallel.shard(params, mesh, rules)
    inputs = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in args]
    step = jax.jit(run)
    compiled = step.lower(there, *inputs).compile()
    # JAX takes no int4 that was put on a mesh into a program compiled ahead.
    small = any(x.dtype == jnp.int4 for x in jax.tree.leaves(params))
    got, want = (step if small else compiled)(there, *inputs), jom.accelerate(fn)(params, *args)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    found = collections.Counter(kind for kind, _, _ in transfers(compiled))
    predicted = collections.Counter(row["kind"] for row in rules.collectives)
    assert found == predicted
    return rules


class Blocks(nn.Module):
    """A residual block and an inverted bottleneck with batch norms, in training or not."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        y = nn.Conv(16, (3, 3), strides=2, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(not self.train, name="bn1")(y))
        y = nn.BatchNorm(not self.train, name="bn2")(nn.Conv(8, (3, 3), name="conv2")(y))
        x = nn.relu(nn.avg_pool(x, (2, 2), (2, 2)) + y)
        y = nn.Conv(32, (1, 1), use_bias=False, name="expand")(x)
        y = nn.relu(nn.BatchNorm(not self.train, name="norm")(y))
        y = nn.Conv(32, (3, 3), feature_group_count=32, name="depthwise")(y)
        x = x + nn.Conv(8, (1, 1), name="project")(nn.relu(y))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(
    "recipe",
    [None, INT4, pytest.param(INT8, marks=pytest.mark.full)],
    ids=["dense", "int4", "int8"],
)
def test_a_transformer_layer_sums_twice(recipe):
    model = models.Transformer(vocab=11, width=32, heads=4, layers=1, length=8, hidden=64)
    fn, params = linen(model, TOKENS)
    params = params if recipe is None else jom.compress(params, recipe)
    rules = runs_divided(fn, params, (TOKENS,))
    layer = [r for r in rules.collectives if "layer1" in r["parameter"]]
    assert [(r["kind"], r["parameter"]) for r in layer] == [
        ("all-reduce", "layer1/attention/out/kernel"),
        ("all-reduce", "layer1/down/kernel"),
    ]
    assert rules.spec("layer1/attention/query/kernel") == P(None, "model", None)
    assert rules.spec("layer1/attention/query/bias") == P("model", None)
    assert rules.spec("layer1/attention/out/bias") == P()
    assert rules.spec("layer1/up/bias") == P("model")
    # 11 words do not divide by 4: features do.
    assert rules.spec("tokens/embedding") == P(None, "model")


def test_residual_blocks_and_inverted_bottlenecks():
    fn, variables = linen(Blocks(), x := normal(2, 8, 8, 3))
    recipe = [Rule("(expand|project)/kernel", quant.Int(bits=4, group=4))]
    rules = runs_divided(fn, jom.compress(variables, recipe), (x,))
    assert [r["parameter"] for r in rules.collectives] == ["conv2/kernel", "project/kernel"]
    assert rules.spec("depthwise/kernel") == P(None, None, None, "model")
    for norm in ("bn1", "norm"):
        for path in ("scale", "bias"):
            assert rules.spec(f"{norm}/{path}") == P("model")
        for path in ("mean", "var"):
            assert rules.spec(f"batch_stats/{norm}/{path}") == P("model")
    assert rules.spec("batch_stats/bn2/var") == P()
    assert "the other axis of 16" in str(rules.table)  # the stream, as conv1 is divided within


def test_an_lstm_gathers_its_state_once_a_step():
    fn, params = linen(models.LSTM(features=8, width=32, classes=5), x := normal(4, 3, 8))
    params = jom.compress(params, [Rule("rnn/.*kernel", quant.Int(bits=4, group=8))])
    rules = runs_divided(fn, params, (x,))
    assert [(r["kind"], r["times"]) for r in rules.collectives] == [
        ("all-gather", 3),
        ("all-reduce", 1),
    ]
    assert rules.spec("rnn/cell/hi/kernel") == P(None, "model")


@pytest.mark.full
@pytest.mark.parametrize("recipe", [None, INT8], ids=["dense", "int8"])
def test_small_minilm_and_scanned_layers(recipe):
    model = models.MiniLM(vocab=11, width=32, heads=4, layers=2, hidden=64, length=8)
    fn, params = linen(model, TOKENS, jnp.ones_like(TOKENS))
    params = params if recipe is None else jom.compress(params, recipe)
    runs_divided(fn, params, (TOKENS, jnp.ones_like(TOKENS)))
    stack = models.Transformer(vocab=8, width=32, heads=4, layers=2, length=8, scan=True)
    fn, params = linen(stack, TOKENS % 8)
    runs_divided(fn, params, (TOKENS % 8,))


@pytest.mark.full
def test_lite0_on_a_mesh():
    fn, variables = linen(models.EfficientNetLite0(), x := normal(2, 32, 32, 3))
    rules = runs_divided(fn, jom.compress(variables, INT8), (x,))
    assert len(rules.collectives) == 17  # 16 projections and the classifier


# ------------------------------------------------------------- rules alone, nothing compiled


def test_minilm_by_its_published_sizes():
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    fn, params = shapes(models.MiniLM(layers=2), tokens, tokens)
    rules = parallel.tensor(fn, params, tokens, tokens, size=4)
    kinds = [r["kind"] for r in rules.collectives if "layers" in r["parameter"]]
    assert kinds == ["all-reduce"] * 4
    assert rules.spec("embeddings/word/embedding") == P(None, "model")  # 30,522 rows
    assert rules.spec("embeddings/position/embedding") == P(None, "model")
    names = [f"path:embeddings/{name}/embedding" for name in ("position", "word")]
    assert list(rules.inside) == names
    row = next(r for r in rules.table if r["path"] == "embeddings/token_type/embedding")
    assert not row["divided"] and "reduced by reduce_sum" in row["note"]
    divided = sum(r["bytes"] for r in rules.table if r["divided"])
    assert rules.table.data["total"] - rules.table.data["each"] == divided * 3 // 4
    assert len(rules) == 13, rules  # one rule for both layers


@pytest.mark.full
def test_lite0_divides_every_block():
    fn, variables = shapes(
        models.EfficientNetLite0(), x := jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    )
    rules = parallel.tensor(fn, variables, x, size=4, smallest=0)
    assert [r["kind"] for r in rules.collectives] == ["all-reduce"] * 17
    whole = {r["path"] for r in rules.table if not r["divided"] and r["path"].endswith("kernel")}
    assert whole == set()
    assert rules.table.data["each"] < 0.26 * rules.table.data["total"]


def test_tables_whose_features_do_not_divide_are_divided_by_rows():
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["w"]  # noqa: E731
    params, ids = {"table": jnp.ones((12, 6)), "w": jnp.ones((6, 3))}, jnp.zeros(5, jnp.int32)
    rules = parallel.tensor(fn, params, ids, size=4, smallest=0)
    assert list(rules) == [("table", P("model", None)), (".*", P())]
    assert rules.collectives[0]["kind"] == "all-reduce" and not rules.inside
    rules = parallel.tensor(fn, params, ids, size=3, smallest=0)
    # Nothing between the lookup and the product needs all features.
    assert dict(rules) == {"table": P(None, "model"), "w": P("model", None), ".*": P()}


def test_streams_are_divided_where_nothing_else_is():
    fn = lambda p, x: jnp.tanh(x @ p["a"] + x @ p["b"]) @ p["c"]  # noqa: E731
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((3, 8)), "c": jnp.ones((8, 3))}
    rules = parallel.tensor(fn, params, jnp.ones((2, 3)), size=4, smallest=0)
    assert dict(rules) == {
        "a": P(None, "model"),
        "b": P(None, "model"),
        "c": P("model", None),
        ".*": P(),
    }


def test_the_set_with_the_most_bytes_is_divided():
    def fn(p, x):
        for name in "abcd":
            x = jnp.tanh(x @ p[name])
        return x

    sides = [(4, 8), (8, 64), (64, 8), (8, 4)]
    params = {n: jnp.ones(s) for n, s in zip("abcd", sides, strict=True)}
    rules = parallel.tensor(fn, params, jnp.ones((2, 4)), size=4, smallest=0)
    # The two spaces of 8 hold all four kernels, that of 64 two of them and nothing more.
    assert dict(rules) == {
        "a": P(None, "model"),
        "b": P("model", None),
        "c": P(None, "model"),
        "d": P("model", None),
        ".*": P(),
    }
    # Of two that meet, the one with more.
    three = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 64)), "c": jnp.ones((64, 4))}

    def ends(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    rules = parallel.tensor(ends, three, jnp.ones((2, 4)), size=4, smallest=0)
    assert [r for r, _ in rules] == ["b", "c", ".*"]
    assert "the other axis of 64" in rules.table[0]["note"]


@pytest.mark.parametrize(
    ("fn", "params", "why"),
    [
        (lambda p, x: x @ p["w"], (4, 8), "what the function returns"),
        (lambda p, x: jax.nn.softmax(x @ p["w"]).sum(0) @ jnp.ones((8, 1)), (4, 8), "reduced by"),
        (lambda p, x: jnp.sum(x @ p["w"][:, :6], -1), (4, 8), "mixed by slice"),
        (lambda p, x: jnp.fft.fft(x @ p["w"]).real, (4, 8), "not followed through fft"),
    ],
)
def test_reasons(fn, params, why):
    rules = parallel.tensor(fn, {"w": jnp.ones(params)}, jnp.ones((2, 4)), size=4, smallest=0)
    assert list(rules) == [(".*", P())]
    assert why in rules.table[0]["note"]


def attention(cut):
    def fn(p, x):
        b, t, d = x.shape
        q, k, v = cut(x @ p["qkv"])
        y = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(y), v).reshape(b, t, d)
        x = x + y @ p["out"]
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    params = {"qkv": jnp.ones((8, 24)), "out": jnp.ones((8, 8))}
    return parallel.tensor(fn, params, jnp.ones((2, 3, 8)), size=4, smallest=0)


def test_fused_projections_are_divided_if_heads_come_first():
    by_head = attention(lambda z: jnp.moveaxis(z.reshape(2, 3, 4, 3, 2), 3, 0))
    assert by_head.spec("qkv") == P(None, "model")
    by_part = attention(lambda z: jnp.moveaxis(z.reshape(2, 3, 3, 4, 2), 2, 0))
    assert by_part.spec("qkv") == P()
    assert "not the outermost part" in by_part.table[1]["note"]


def test_shared_heads_of_keys():
    def fn(p, x):
        q = (x @ p["q"]).reshape(2, 3, 8, 2)
        k, v = ((x @ p[n]).reshape(2, 3, 4, 2).repeat(2, axis=2) for n in "kv")
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(2, 3, 16) @ p["o"]
        return y / jnp.sqrt((y * y).mean(-1, keepdims=True))

    params = {
        "q": jnp.ones((8, 16)),
        "k": jnp.ones((8, 8)),
        "v": jnp.ones((8, 8)),
        "o": jnp.ones((16, 8)),
    }
    rules = parallel.tensor(fn, params, jnp.ones((2, 3, 8)), size=4, smallest=0)
    columns = P(None, "model")
    assert dict(rules) == {
        "k": columns,
        "v": columns,
        "q": columns,
        "o": P("model", None),
        ".*": P(),
    }
    rules = parallel.tensor(fn, params, jnp.ones((2, 3, 8)), size=8, smallest=0)
    assert list(rules) == [(".*", P())]
    assert "4 does not divide by 8" in str(rules.table)


def test_groups_of_codes_are_not_cut():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": normal(8, 32), "b": normal(32, 8)}
    small = jom.compress(params, [Rule("b", quant.Int(bits=4, group=16))])
    rules = parallel.tensor(fn, small, jnp.ones((2, 8)), size=4, smallest=0)
    assert list(rules) == [("a", P(None, "model")), (".*", P())]
    assert "groups" in rules.table[1]["note"]
    assert dict(parallel.tensor(fn, small, jnp.ones((2, 8)), size=2, smallest=0))["b"] == P(
        "model", None
    )


def test_group_norm_divides_whole_groups():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.GroupNorm(num_groups=4, name="norm")(nn.Dense(16, name="up")(x))
            return nn.Dense(3, name="down")(nn.relu(y))

    fn, params = shapes(Net(), x := jax.ShapeDtypeStruct((2, 5), "float32"))
    rules = parallel.tensor(fn, params, x, size=4, smallest=0)
    assert rules.spec("norm/scale") == P("model")
    assert list(parallel.tensor(fn, params, x, size=8, smallest=0)) == [(".*", P())]


def test_experts_are_divided_where_they_are_a_batch():
    def fn(p, x):
        gate = jax.nn.softmax(x @ p["gate"])
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("etf,efd,te->td", h, p["down"], gate)

    params = {"gate": jnp.ones((6, 4)), "up": jnp.ones((4, 6, 8)), "down": jnp.ones((4, 8, 6))}
    rules = parallel.tensor(fn, params, jnp.ones((3, 6)), size=8, smallest=0)
    assert dict(rules)["up"] == P(None, None, "model")  # 4 experts do not divide by 8


def test_new_statistics_may_stay_divided():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
    model = Blocks(train=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    fn = lambda p, x: model.apply(p, x, mutable=["batch_stats"])  # noqa: E731
    rules = parallel.tensor(fn, variables, x, size=4, smallest=0)
    assert rules.spec("batch_stats/bn1/mean") == P("model")
    assert rules.spec("conv1/kernel") == P(None, None, None, "model")


def test_nnx_and_linen_get_the_same_rules():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs, use_running_average=True)
            self.down = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    fn, state = jom.functional(Net(nnx.Rngs(0)))
    rules = parallel.tensor(fn, state, jnp.ones((2, 4)), size=4, smallest=0)
    for path in ("up/bias", "norm/scale", "norm/mean", "norm/var"):
        assert rules.spec(path) == P("model"), path
    assert rules.spec("down/kernel") == P("model", None)
    assert rules.spec("down/bias") == P()


def test_a_sequence_that_no_activation_has():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    find = lambda x, **more: parallel.tensor(fn, params, x, size=2, **more)  # noqa: E731
    for axis in (1, 9):
        with pytest.raises(ValueError, match=f"tensor: sequence={axis} divides nothing"):
            find(jnp.ones((4, 4)), smallest=0, sequence=axis)
    with pytest.raises(ValueError, match="a smallest= that lets parameters be divided"):
        find(jnp.ones((4, 6, 4)), sequence=1)
    rules = find(jnp.ones((4, 6, 4)), smallest=0, sequence=1)
    assert sorted(rules.inside) == ["input:up", "path:down"]


def test_mistakes():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params, x, mesh = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)), mesh_of((2, 4))
    with pytest.raises(ValueError, match="give either size="):
        parallel.tensor(fn, params, x)
    with pytest.raises(ValueError, match="axis='tp' is none of the mesh's"):
        parallel.tensor(fn, params, x, mesh=mesh, axis="tp")
    with pytest.raises(TypeError, match="fn is dict"):
        parallel.tensor(params, params, x, size=2)
    with pytest.raises(ValueError, match="no parameter reached the program"):
        parallel.tensor(lambda p, x: x, params, x, size=2)
