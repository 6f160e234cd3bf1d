"""What each parameter costs in quality in each of many formats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._axes import Axes
from .._call import check_function
from .._compress import encode, fold, named
from .._encoded import rebuilt
from .._encoder import Encoder, check_tensor
from .._options import pattern, whole
from .._paths import Parameter, flatten
from .._progress import bar
from .._recipe import Decision, Rule
from .._tracked import readers
from ._choices import Candidate, Choices, Sensitivity, stored_bits
from ._curvature import Gram, Hessian
from ._scores import Model, Outputs, Scorer, as_batches

Metric = Literal["loss", "mse", "kl", "hessian", "gram"]
_METRICS = ("loss", "mse", "kl", "hessian", "gram")
Candidates = Sequence[Encoder | None]


def sensitivity(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Iterable[tuple[Any, ...]] | None,
    candidates: Candidates | Mapping[str, Candidates],
    *,
    only: str = ".*",
    metric: Metric = "mse",
    loss: Callable[..., Any] | None = None,
    axes: Axes | None = None,
    stats: Any = None,
    key: jax.Array | None = None,
    probes: int = 32,
    vectorize: bool = False,
    progress: bool = False,
) -> Sensitivity:
    r"""Scores formats for each parameter alone, all others left as they are.

    With :math:`\hat W` the parameter in a format, :math:`y` what ``fn`` gives and :math:`\hat y`
    what it gives with :math:`\hat W`, the score is, by ``metric``:

    - ``"loss"``, the rise of the loss, :math:`\ell(\hat W) - \ell(W)`, averaged over the batches;
    - ``"mse"``, the relative error of the outputs, :math:`\|\hat y - y\|^2 / \|y\|^2`;
    - ``"kl"``, the divergence of the softmax of the outputs, :math:`\sum_c p_c \log p_c /
      \hat p_c`, averaged over all rows of logits `[..., classes]`;
    - ``"hessian"``, the rise of the loss that its mean curvature predicts for errors in random
      directions, :math:`\frac{\mathrm{tr} H}{2 n} \|\hat W - W\|^2`, where `H` is the block of
      the Hessian for the `n` entries of :math:`W` and its trace is estimated with random signs
      `v`, :math:`\mathrm{tr} H = E[v^\top H v]`;
    - ``"gram"``, the relative error of the product of this layer alone, :math:`\mathrm{tr}
      (\hat W - W)^\top G (\hat W - W) / \mathrm{tr}\, W^\top G W` with the calibrated
      :math:`G = X^\top X`; no model is run.

    The first three run the model once for each batch, parameter and candidate. The fourth costs
    ``probes`` products with the Hessian (about five runs each) for each batch, however many
    candidates there are; the noise of its traces is in the note of the result. The last is the
    cheapest, but blind to what the layers after do with an error: it ranks the formats of one
    layer, and layers against each other only where all matter alike. (MiniLM with the kernels of
    its layers at the bytes of 4 bits: the loss was 0.105 uniformly, 0.089 to 0.090 by
    ``"loss"``, ``"mse"`` and ``"hessian"``, and 0.205 by ``"gram"``.)

    One program is compiled, in which every parameter is an argument, and each candidate passes
    through it. With ``vectorize=True`` all candidates of a parameter pass at once, by `vmap`;
    layers before the parameter are then run once, but each parameter needs a program of its own,
    and candidates times the memory. The 39 matrices of MiniLM with 4 candidates and a batch of 32
    sentences took 34 s the first way on two CPU cores, and 60 s the second, 28 s of it compiling;
    it pays where products are too small to keep a device busy and batches are many.

    Args:
      fn: function of `(params, ...)`, such as :func:`jaxopt_models.functional` makes. For
        ``"loss"`` and ``"hessian"`` it gives the loss, a scalar, unless ``loss`` does; for
        ``"gram"`` it is not called and may be ``None``.
      params: its parameters, dense or compressed; a mask of pruning stays.
      batches: tuples of the arguments after ``params``. They are kept, with the outputs for them.
      candidates: encoders for each parameter, ``None`` among them for dense; or ``{expression on
        whole paths: encoders}``, of which the first that matches decides.
      only: regular expression on whole paths of the parameters that take part; matrices and
        larger ones only, biases and norms (one axis beside the stack) stay dense.
      metric: what the scores are.
      loss: function of `(params, ...)` that ``"loss"`` and ``"hessian"`` look at instead.
      axes: roles of the axes of these parameters; default: from the statistics, or else last is
        out and no stack.
      stats: statistics by path from calibration, for encoders with ``needs`` and for ``"gram"``.
      key: random key, for encoders that draw, as in :func:`jaxopt_models.compress`, and for
        ``"hessian"``.
      probes: number of random vectors of ``"hessian"``.
      vectorize: run all candidates of a parameter at once.
      progress: show a bar, a step for each parameter.

    Returns:
      :class:`Sensitivity`, for :func:`allocate_bits` and :func:`guard`.

    Raises:
      TypeError: for arguments of another type, or a candidate that rounds inputs.
      ValueError: if nothing is selected, an expression decides no parameter, a candidate does not
        fit one (the message names it), statistics or the key are missing, or the outputs are not
        what the metric needs.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[0.1, 1.0], [-0.7, 0.2]]), "b": jnp.array([[2.0], [-0.3]])}
      >>> formats = [jom.quant.Int(bits=b) for b in (2, 8)]
      >>> found = jom.quant.sensitivity(fn, params, [(jnp.eye(2),)], formats)
      >>> [k.bits for k in found["a"].candidates]     # codes, and a float32 scale a column
      [72, 96]
      >>> bool(found["a"].candidates[0].score > found["a"].candidates[1].score)
      True

    References:
      Dong et al., `HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks
      <https://arxiv.org/abs/1911.03852>`_, 2020
    """
    if metric not in _METRICS:
        raise ValueError(f"sensitivity: metric={metric!r} is none of {', '.join(_METRICS)}")
    if readers(params):
        raise TypeError(
            "sensitivity: params round inputs, which is not measured; score the parameters first, "
            "and chain Input to the recipe afterwards"
        )
    leaves, unflatten = flatten(params)
    chosen = _chosen(leaves, candidates, only, axes, stats)
    values = [rebuilt(p.value) for p in leaves]
    for i in chosen:
        with named(f"sensitivity: {leaves[i].path}"):
            check_tensor(values[i])
        values[i] = jnp.asarray(values[i])
    score, note = None, ""
    if metric == "gram":
        score = _gram(leaves, values, chosen, stats)
    else:
        used = loss if loss is not None and metric in ("loss", "hessian") else fn
        check_function(used, "sensitivity")
        model = Model(used, unflatten, values, as_batches(batches, "sensitivity"))
        if metric == "hessian":
            score, note = _hessian(model, chosen, leaves, probes, key)
        else:
            score = Outputs(model, metric, vectorize=vectorize)
    found = []
    with bar("sensitivity", len(chosen), show=progress) as advance:
        for i, (encoders, roles) in chosen.items():
            found.append(_measure(leaves[i], values, i, encoders, roles, score, stats, key))
            advance(leaves[i].path)
    others = sum(stored_bits(p.value) for i, p in enumerate(leaves) if i not in chosen)
    return Sensitivity(metric, tuple(found), others, note)


def _measure(
    p: Parameter,
    values: Sequence[Any],
    at: int,
    encoders: Candidates,
    axes: Axes | None,
    score: Scorer,
    stats: Any,
    key: jax.Array | None,
) -> Choices:
    """Encodes one parameter in each format, and scores what comes of it."""
    tensors, bits = [], []
    for encoder in encoders:
        if encoder is None:
            bits.append(stored_bits(p.value))
            continue
        rule = Rule(re.escape(p.path), encoder, axes)
        leaf = encode(Decision(p, rule, 0), stats=stats, key=key, who=f"sensitivity: {encoder}")
        if readers(leaf):
            raise TypeError(
                f"sensitivity: {p.path}: {encoder} rounds inputs, too, which is not measured; "
                "leave that out of the candidates and chain it to the recipe afterwards, or "
                "compare whole recipes by guard, whose evaluate runs simulate(fn)"
            )
        tensors.append(leaf.materialize())
        bits.append(leaf.storage_bits())
    measured = iter(np.asarray(score(at, tensors), np.float64).tolist() if tensors else [])
    scores = [0.0 if encoder is None else next(measured) for encoder in encoders]
    scores = [s if math.isfinite(s) else math.inf for s in scores]
    found = tuple(map(Candidate, encoders, bits, scores))
    shape = tuple(p.value.shape)
    plain = axes is None or axes.resolve(len(shape)) == Axes().resolve(len(shape))
    return Choices(p.path, shape, stored_bits(p.value), None if plain else axes, found)


def _chosen(
    leaves: Sequence[Parameter], candidates: Any, only: str, axes: Axes | None, stats: Any
) -> dict[int, tuple[Candidates, Axes | None]]:
    """Returns the encoders and roles of each parameter that takes part, by position."""
    by_path = candidates if isinstance(candidates, Mapping) else {".*": candidates}
    rules = [
        (pattern(path, "sensitivity: candidates"), _formats(encoders))
        for path, encoders in by_path.items()
    ]
    selected = pattern(only, "sensitivity: only")
    chosen, used = {}, set()
    for i, p in enumerate(leaves):
        roles = axes or getattr((stats or {}).get(p.path), "axes", None)
        least = 1 if roles is None else 1 + roles.stack
        if p.reason or not selected.fullmatch(p.path) or len(p.value.shape) <= least:
            continue
        hits = [k for k, (path, _) in enumerate(rules) if path.fullmatch(p.path)]
        if hits:
            chosen[i] = (rules[hits[0]][1], roles)
            used.add(hits[0])
    idle = [path for k, path in enumerate(by_path) if k not in used]
    if idle or not chosen:
        what = f"candidates for {idle}" if chosen else f"only={only!r} with these candidates"
        raise ValueError(
            f"sensitivity: {what}: no parameter of two or more axes is decided by it. Paths are: "
            + ", ".join(p.path for p in leaves if not p.reason)
        )
    return chosen


def _formats(encoders: Any) -> Candidates:
    if isinstance(encoders, Encoder | str) or not isinstance(encoders, Iterable):
        raise TypeError(
            f"sensitivity: candidates={encoders!r:.80}; give a list of encoders, such as "
            "[quant.Int(bits=b) for b in (2, 3, 4, 8)]"
        )
    found = tuple(encoders)
    for encoder in found:
        if encoder is not None and not isinstance(encoder, Encoder):
            raise TypeError(f"sensitivity: candidate {encoder!r:.80} is no encoder, and not None")
    if not found or len(set(found)) < len(found):
        raise ValueError(
            f"sensitivity: candidates {list(found)}: give at least one, and none twice"
        )
    return found


def _gram(
    leaves: Sequence[Parameter], values: Sequence[Any], chosen: Iterable[int], stats: Any
) -> Gram:
    paths = [leaves[i].path for i in chosen]
    lacking = [p for p in paths if stats is None or p not in stats or "gram" not in stats[p].states]
    if lacking:
        raise ValueError(
            f"sensitivity: metric='gram' needs the statistic gram of {', '.join(lacking)}: pass "
            "stats=calibrate(fn, params, batches, ['gram']) (for more than 8,192 inputs with "
            "gram_rows=), or leave them out by only="
        )
    return Gram(leaves, values, stats)


def _hessian(
    model: Model,
    chosen: Mapping[int, tuple[Candidates, Axes | None]],
    leaves: Sequence[Parameter],
    probes: int,
    key: jax.Array | None,
) -> tuple[Hessian, str]:
    probes = whole(probes, "sensitivity: probes", least=2)
    if key is None:
        raise ValueError("sensitivity: metric='hessian' draws random vectors; pass key=")
    stacks = [0 if roles is None else roles.stack for _, roles in chosen.values()]
    found = Hessian(model, list(chosen), stacks, probes, fold(key, "hessian"))
    traces = {i: float(t.sum()) for i, t in found.traces.items()}
    worst = max(traces, key=lambda i: found.errors[i] / max(abs(traces[i]), 1e-300))
    error = 100 * found.errors[worst] / max(abs(traces[worst]), 1e-300)
    return found, (
        f"traces from {probes} probes; the least certain, of {leaves[worst].path}, has a standard "
        f"error of {error:.2g} %"
    )
