"""MiniLM as a graph of ONNX, written node by node, fused and quantized by ONNX Runtime's own tools.

The nodes are those that PyTorch's exporter writes for BERT, which the optimiser knows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from ._contest import Run
from ._kernel_peers import THREADS
from ._minilm import encoder

HEADS, EPSILON = 12, 1e-12


class _Graph:
    """Nodes and constants under names that count up."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def dense(self, x: str, p: Any) -> str:
        return self("Add", self.constant(p["bias"]), self("MatMul", x, self.constant(p["kernel"])))

    def norm(self, x: str, p: Any) -> str:
        sides = self.constant(p["scale"]), self.constant(p["bias"])
        return self("LayerNormalization", x, *sides, axis=-1, epsilon=EPSILON)

    def split(self, x: str, order: tuple[int, ...]) -> str:
        """Cuts vectors into heads."""
        shape = self.constant([0, 0, HEADS, -1], np.int64)
        return self("Transpose", self("Reshape", x, shape), perm=order)


def _graph(params: Any) -> Any:
    from onnx import TensorProto, helper

    g = _Graph()
    words = params["embeddings"]
    zero, one = g.constant([0], np.int64), g.constant([1], np.int64)
    x = g("Gather", g.constant(words["word"]["embedding"]), "ids")
    length = g("Gather", g("Shape", "ids"), g.constant(1, np.int64))
    lengths = g("Unsqueeze", length, zero)
    positions = g("Slice", g.constant(words["position"]["embedding"]), zero, lengths, zero)
    x = g("Add", x, g("Unsqueeze", positions, zero))
    x = g("Add", x, g.constant(words["token_type"]["embedding"][0]))
    x = g.norm(x, words["norm"])
    floats = g("Cast", "mask", to=TensorProto.FLOAT)
    wide = g("Unsqueeze", g("Unsqueeze", floats, one), g.constant([2], np.int64))
    away = g("Mul", g("Sub", g.constant(1.0), wide), g.constant(-10000.0))
    for i in range(sum(name.startswith("layers_") for name in params)):
        p = params[f"layers_{i}"]
        a = p["attention"]
        q = g.split(g.dense(x, a["query"]), (0, 2, 1, 3))
        k = g.split(g.dense(x, a["key"]), (0, 2, 3, 1))
        v = g.split(g.dense(x, a["value"]), (0, 2, 1, 3))
        root = np.sqrt(a["query"]["bias"].size / HEADS)
        scores = g("Div", g("MatMul", q, k), g.constant(root))
        shares = g("Softmax", g("Add", scores, away), axis=-1)
        y = g("Transpose", g("MatMul", shares, v), perm=(0, 2, 1, 3))
        y = g("Reshape", y, g.constant([0, 0, a["query"]["bias"].size], np.int64))
        x = g.norm(g("Add", g.dense(y, a["output"]), x), p["norm_1"])
        y = g.dense(x, p["mlp"]["up"])
        erf = g("Erf", g("Div", y, g.constant(np.sqrt(2))))
        y = g("Mul", g("Mul", y, g("Add", erf, g.constant(1.0))), g.constant(0.5))
        x = g.norm(g("Add", g.dense(y, p["mlp"]["down"]), x), p["norm_2"])
    weight = g("Unsqueeze", floats, g.constant([2], np.int64))
    total = g("ReduceSum", g("Mul", x, weight), one, keepdims=0)
    mean = g("Div", total, g("ReduceSum", weight, one, keepdims=0))
    square = g("ReduceSum", g("Mul", mean, mean), one, keepdims=1)
    g.nodes.append(helper.make_node("Div", [mean, g("Sqrt", square)], ["vectors"]))
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "t"]) for n in ("ids", "mask")
    ]
    output = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["b", "d"])
    graph = helper.make_graph(g.nodes, "minilm", inputs, [output], g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@functools.cache
def session(quantized: bool) -> Any:
    """Returns the fused model, its weights in integers of 8 bits by channel or in `float32`."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        plain, fused, small = (
            pathlib.Path(folder, f"{n}.onnx") for n in ("plain", "fused", "small")
        )
        onnx.save(_graph(encoder().params), plain)
        logging.disable(logging.INFO)
        with contextlib.redirect_stdout(quiet):
            model = optimize_model(
                str(plain), "bert", num_heads=HEADS, hidden_size=384, opt_level=1
            )
            model.save_model_to_file(str(fused))
            if quantized:
                # The types of what fused nodes return are not inferred.
                extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
                quantize_dynamic(
                    fused, small, per_channel=True, weight_type=QuantType.QInt8, extra_options=extra
                )
        logging.disable(logging.NOTSET)
        file = str(small if quantized else fused)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(ids: np.ndarray, mask: np.ndarray, *, quantized: bool) -> Run:
    """Returns what encodes a batch of sentences."""
    given = {"ids": ids.astype(np.int64), "mask": mask.astype(np.int64)}
    made = session(quantized)
    return lambda: made.run(None, given)
