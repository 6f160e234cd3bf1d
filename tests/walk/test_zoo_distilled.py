"""Students of the zoo, compressed, learn from dense teachers."""

import jax
import jax.numpy as jnp
import optax
import pytest
import zoo
from test_zoo import KINDS, compressed

import jaxopt_models as jom
from jaxopt_models import distill
from jaxopt_models._paths import flatten

# JAX has no reverse mode for it.
NAMES = [name for name in zoo.names() if name != "dict while loop"]
# One of each kind of layer that peers get wrong; all with --full.
WANTED = ("depthwise", "grouped", "scan", "tied", "nnx lstm")
SOME = {
    next((n for n in NAMES if wanted.lower() in n.lower()), NAMES[i]): list(KINDS)[i % len(KINDS)]
    for i, wanted in enumerate(WANTED)
}


def learns(name, kind):
    case = zoo.case(name)
    small = compressed(case, kind)
    net = distill.Network(case.fn, inputs=lambda batch: tuple(batch))

    def loss(student, teacher, batch):
        pairs = zip(jax.tree.leaves(student.out), jax.tree.leaves(teacher.out), strict=True)
        return sum(
            jnp.mean((a - b) ** 2) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)
        )

    scheme = distill.teacher_student(net, net, loss, optax.adam(1e-3))
    leaves, unflatten = flatten(case.params)
    louder = unflatten([p.value if p.reason else 1.3 * p.value for p in leaves])
    state = scheme.init(small, louder)
    state, first = scheme.step(state, case.args)
    for _ in range(9):
        state, last = scheme.step(state, case.args)
    assert first["loss"] > 0 and last["loss"] < first["loss"]
    fixed = [jax.tree.leaves(jom.partition(t)[1]) for t in (small, state.student)]
    assert all((a == b).all() for a, b in zip(*fixed, strict=True) if jnp.size(a))


@pytest.mark.parametrize(("name", "kind"), SOME.items())
def test_a_compressed_student_learns(name, kind):
    learns(name, kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_compressed_student_learns(name, kind):
    learns(name, kind)
