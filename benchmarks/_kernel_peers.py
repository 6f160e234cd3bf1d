"""Products of rows with quantized weights as we and other libraries compute them.

Each function makes one from a :class:`Case`, in the process in which it will be timed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._contest import Run

THREADS = os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A product of normal numbers.

    Args:
      rows: of the input.
      inputs: of the weights.
      outputs: of the weights.
      bits: of the weights.
      group: inputs that share a scale; ``None`` for one scale for each output.
    """

    rows: int
    inputs: int
    outputs: int
    bits: int = 8
    group: int | None = None

    def x(self) -> np.ndarray:
        """Returns the input."""
        shape = (self.rows, self.inputs)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def w(self) -> np.ndarray:
        """Returns the weights."""
        shape = (self.inputs, self.outputs)
        return np.random.default_rng(1).standard_normal(shape, np.float32)

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns symmetric codes `int8[inputs, outputs]`, and scales `[groups, outputs]`."""
        w = self.w().reshape(-1, self.group or self.inputs, self.outputs)
        scale = np.abs(w).max(1, keepdims=True) / (2 ** (self.bits - 1) - 1)
        codes = np.round(w / scale).astype(np.int8)
        return codes.reshape(self.inputs, self.outputs), scale[:, 0]


def has(name: str) -> bool:
    """Says whether a peer is installed."""
    return importlib.util.find_spec(name) is not None


def ours(case: Case, rounded: bool = True) -> Run:
    """The kernels, as `accelerate` runs them; inputs are ``rounded`` by row to 8 bits, or not."""
    import jaxopt_models as jom
    from jaxopt_models import quant

    encoder = quant.Int(bits=case.bits, group=case.group)
    return _compressed(case, jom.chain(encoder, quant.Input(bits=8)) if rounded else encoder)


def ours_binary(case: Case) -> Run:
    """The kernels on signs, packing those of the input included."""
    from jaxopt_models import quant

    return _compressed(case, quant.XNOR())


def _compressed(case: Case, encoder: Any) -> Run:
    import jaxopt_models as jom

    small = jom.pack(encoder(jnp.asarray(case.w())), target="cpu")
    run, x = jax.jit(jom.accelerate(lambda w, x: x @ w)), jnp.asarray(case.x())
    return lambda: run(small, x).block_until_ready()


def dense(case: Case, dtype: str = "float32") -> Run:
    """JAX on dense weights of some type."""
    x, w = (jnp.asarray(a).astype(dtype) for a in (case.x(), case.w()))
    run = jax.jit(lambda x, w: x @ w)
    return lambda: run(x, w).block_until_ready()


def jax_int8(case: Case) -> Run:
    """JAX's own product of integers, inputs rounded by row."""
    x, (codes, scale) = jnp.asarray(case.x()), map(jnp.asarray, case.codes())

    @jax.jit
    def run(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
        q = jnp.round(x / step).astype(jnp.int8)
        y = jax.lax.dot(q, codes, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * step * scale

    return lambda: run(x, codes, scale).block_until_ready()


def qwix_int8(case: Case) -> Run:
    """Qwix: integers by row and by channel."""
    import qwix

    x = jnp.asarray(case.x())
    packed = qwix.quantize(jnp.asarray(case.w()), jnp.int8, channelwise_axes=(1,))

    @jax.jit
    def run(x: jax.Array, packed: Any) -> jax.Array:
        rows = qwix.quantize(x, jnp.int8, channelwise_axes=(0,))
        return qwix.dot_general(rows, packed, (((1,), (0,)), ((), ())))

    return lambda: run(x, packed).block_until_ready()


def _session(nodes: list[Any], weights: dict[str, np.ndarray], k: int, n: int) -> Any:
    import onnx
    import onnxruntime
    from onnx import helper

    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, n])],
        [onnx.numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def ort_int8(case: Case) -> Run:
    """ONNX Runtime: DynamicQuantizeLinear and MatMulInteger, which it fuses."""
    from onnx import helper

    x, (codes, scale) = case.x(), case.codes()
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=1),
        helper.make_node("Mul", ["step", "scale"], ["both"]),
        helper.make_node("Mul", ["floats", "both"], ["y"]),
    ]
    session = _session(nodes, {"w": codes, "scale": scale[0]}, *codes.shape)
    return lambda: session.run(None, {"x": x})


def ort_int4(case: Case, level: int) -> Run:
    """ONNX Runtime: MatMulNBits; level 0 computes with float inputs, 4 may round them to 8 bits."""
    from onnx import helper

    k, n, group = case.inputs, case.outputs, case.group
    x, rng = case.x(), np.random.default_rng(0)
    weights = {
        "w": rng.integers(0, 256, (n, k // group, group // 2), np.uint8),
        "scale": rng.random(n * (k // group), np.float32),
    }
    options = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": level}
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **options
    )
    session = _session([node], weights, k, n)
    return lambda: session.run(None, {"x": x})


def openvino(case: Case) -> Run:
    """OpenVINO: compressed weights, inputs rounded in groups where it chooses to."""
    import openvino as ov
    import openvino.opset13 as ops

    k, n, group = case.inputs, case.outputs, case.group
    codes, scale = case.codes()
    given, nibbles = ops.parameter([-1, k], np.float32, "x"), None
    if group is None:
        w = ops.convert(ops.constant(codes.T.copy()), np.float32)
        w = ops.multiply(w, ops.constant(scale.reshape(n, 1)))
    else:
        shaped = codes.T.reshape(n, k // group, group).copy()
        nibbles = _nibbles(shaped)  # the tensor is a view of them, and the model reads it later
        packed = ov.Tensor(nibbles, shaped.shape, ov.Type.i4)
        w = ops.convert(ops.constant(packed), np.float32)
        w = ops.multiply(w, ops.constant(scale.T.reshape(n, k // group, 1).copy()))
        w = ops.reshape(w, np.array([n, k]), False)
    model = ov.Model([ops.matmul(given, w, False, True)], [given])
    options = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if group is None else str(group),
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(case.x()))
    return lambda: (request.infer(), nibbles)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    flat = codes.reshape(-1).astype(np.uint8) & 15
    return flat[0::2] | (flat[1::2] << 4)


def _linear(case: Case) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(THREADS)
    layer = torch.nn.Linear(case.inputs, case.outputs, bias=False)
    layer.weight.data = torch.from_numpy(case.w().T.copy())
    return layer, torch.from_numpy(case.x())


def _inferred(layer: Any, given: Any) -> Run:
    import torch

    def run() -> object:
        with torch.inference_mode():
            return layer(given)

    return run


def torch_float(case: Case) -> Run:
    """PyTorch on float32."""
    return _inferred(*_linear(case))


def torch_int8(case: Case) -> Run:
    """PyTorch's dynamic quantization of a linear layer."""
    import warnings

    import torch

    layer, given = _linear(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
        )
    return _inferred(quantized, given)


def torchao_int8(case: Case) -> Run:
    """The package torchao: integers by row and by channel."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer, given = _linear(case)
    model = torch.nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _inferred(model, given)


PEERS = {
    "JAX float32": dense,
    "JAX bfloat16": functools.partial(dense, dtype="bfloat16"),
    "JAX int8": jax_int8,
    "Qwix": qwix_int8,
    "ONNX Runtime": ort_int8,
    "OpenVINO": openvino,
    "PyTorch float32": torch_float,
    "PyTorch int8": torch_int8,
    "torchao": torchao_int8,
}
PEERS4 = {
    "JAX float32": dense,
    "ONNX Runtime": functools.partial(ort_int4, level=0),
    "ONNX Runtime, inputs of 8 bits": functools.partial(ort_int4, level=4),
    "OpenVINO": openvino,
}
