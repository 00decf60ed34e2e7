"""Networks as ONNX graphs that onnxruntime runs in one call, for requests on a CPU.

Asked for operations one by one, PyTorch's way to each takes about as long as the numbers of a request do, and three times that
where its code is no longer in the processor's caches, as between requests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_OPSET = 20
"""The first with Gelu."""
_EPSILON = 1e-5
"""Of PyTorch's norms."""
_FAILURES_ONLY = 3
"""onnxruntime's level of severity for what it logs; it warns where there is no GPU."""

Call = Callable[[Mapping[str, np.ndarray]], np.ndarray]
Sizes = Mapping[str, Sequence[int | str]]
"""A tensor's name -> the size of each dimension, or its letter where that differs from call to call."""


class Linear(NamedTuple):
    """x @ weight_IO + bias_O; float32."""

    weight_IO: np.ndarray
    bias_O: np.ndarray


class Graph:
    """Nodes in the order of their making, each known by the name of its output. All numbers are float32."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, values: Any) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, operation: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """to: its name, if it is an output of the graph."""
        return self._node(operation, inputs, [to or f"node_{len(self._nodes)}"], attributes)[0]

    def split(self, values: str, sizes: Sequence[int], axis: int) -> list[str]:
        parts = [f"node_{len(self._nodes)}_{part}" for part in range(len(sizes))]
        return self._node("Split", (values, self.constant(list(sizes))), parts, {"axis": axis})

    def linear(self, values: str, layer: Linear) -> str:
        return self.node("Gemm", values, self.constant(layer.weight_IO), self.constant(layer.bias_O))

    def normalized(self, values: str, width: int) -> str:
        """Less their mean, by their spread."""
        one = self.constant(np.ones(width, np.float32))
        return self.node("LayerNormalization", values, one, axis=-1, epsilon=_EPSILON)

    def call(self, inputs: Sizes, outputs: Sizes) -> Call:
        """Inputs by name, contiguous -> the output. Safe for threads; each call uses one."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # one would be kept for each size of a request
        options.log_severity_level = _FAILURES_ONLY
        model = self._model(inputs, outputs).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda values: session.run(None, values)[0]

    def _model(self, inputs: Sizes, outputs: Sizes) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, "requests", _told(inputs), _told(outputs), self._constants)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]))

    def _node(self, operation: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]) -> list[str]:
        self._nodes.append(helper.make_node(operation, inputs, outputs, **attributes))
        return outputs


def _told(sizes: Sizes) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, of_one) for name, of_one in sizes.items()]
