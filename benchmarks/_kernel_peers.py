"""Products of rows with quantized weights as other libraries compute them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

THREADS = os.cpu_count() or 1
Run = Callable[[], object]


def has(name: str) -> bool:
    """Says whether a peer is installed."""
    return importlib.util.find_spec(name) is not None


def dense(x: jax.Array, w: jax.Array, dtype: Any = jnp.float32) -> Run:
    """JAX on dense weights of some type."""
    x, w = x.astype(dtype), w.astype(dtype)
    run = jax.jit(lambda x, w: x @ w)
    return lambda: run(x, w).block_until_ready()


def jax_int8(x: jax.Array, codes: jax.Array, scale: jax.Array) -> Run:
    """JAX's own product of integers, inputs rounded by row."""

    @jax.jit
    def run(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
        q = jnp.round(x / step).astype(jnp.int8)
        y = jax.lax.dot(q, codes, preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * step * scale.reshape(1, -1)

    return lambda: run(x, codes, scale).block_until_ready()


def qwix_int8(x: jax.Array, w: jax.Array) -> Run:
    """Qwix: integers by row and by channel."""
    import qwix

    packed = qwix.quantize(w, jnp.int8, channelwise_axes=(1,))

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


def ort_int8(x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> Run:
    """ONNX Runtime: DynamicQuantizeLinear and MatMulInteger, which it fuses."""
    from onnx import helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=1),
        helper.make_node("Mul", ["step", "scale"], ["both"]),
        helper.make_node("Mul", ["floats", "both"], ["y"]),
    ]
    session = _session(nodes, {"w": codes, "scale": scale}, *codes.shape)
    return lambda: session.run(None, {"x": x})


def ort_int4(x: np.ndarray, n: int, group: int, level: int) -> Run:
    """ONNX Runtime: MatMulNBits; level 0 computes with float inputs, 4 may round them to 8 bits."""
    from onnx import helper

    k, rng = x.shape[1], np.random.default_rng(0)
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


def openvino(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, group: int | None = None) -> Run:
    """OpenVINO: compressed weights, inputs rounded in groups where it chooses to."""
    import openvino as ov
    import openvino.opset13 as ops

    k, n = codes.shape
    given = ops.parameter([-1, k], np.float32, "x")
    if group is None:
        w = ops.convert(ops.constant(codes.T.copy()), np.float32)
        w = ops.multiply(w, ops.constant(scale.reshape(n, 1)))
    else:
        shaped = codes.T.reshape(n, k // group, group).copy()
        packed = ov.Tensor(_nibbles(shaped), shaped.shape, ov.Type.i4)
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
    request.set_input_tensor(ov.Tensor(x))
    return request.infer


def _nibbles(codes: np.ndarray) -> np.ndarray:
    flat = codes.reshape(-1).astype(np.uint8) & 15
    return flat[0::2] | (flat[1::2] << 4)


def torch_float(x: np.ndarray, w: np.ndarray) -> Run:
    """PyTorch on float32."""
    import torch

    torch.set_num_threads(THREADS)
    layer, given = torch.nn.Linear(*w.shape, bias=False), torch.from_numpy(x)
    layer.weight.data = torch.from_numpy(w.T.copy())

    def run() -> object:
        with torch.inference_mode():
            return layer(given)

    return run


def torch_int8(x: np.ndarray, w: np.ndarray) -> Run:
    """PyTorch's dynamic quantization of a linear layer."""
    import warnings

    import torch

    torch.set_num_threads(THREADS)
    layer, given = torch.nn.Linear(*w.shape, bias=False), torch.from_numpy(x)
    layer.weight.data = torch.from_numpy(w.T.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
        )

    def run() -> object:
        with torch.inference_mode():
            return quantized(given)

    return run
