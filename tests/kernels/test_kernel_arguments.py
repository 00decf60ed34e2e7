"""Every tensor that an operation takes, given wrongly in every way, is refused by name; and what holds for all operations
alike: PyTorch's own checks of a custom operator, tracing, export, tensors that lie in memory in any order."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.embedding_lookup import build_tables, embedding_lookup
from kernels.l1_score import l1_score
from kernels.multitask_bce import multitask_bce
from kernels.sampled_softmax import sampled_softmax
from kernels.sequence_block import BlockWeights, sequence_block
from kernels.top_k import pack_excluded, top_k
from kernels.window_assembly import window_assembly


@dataclass(frozen=True)
class Operation:
    """tensors: valid ones, by name; named tuples are given by field. call: the wrapper, from tensors by name. schema: the
    operator's arguments, from the same."""

    name: str
    tensors: dict[str, Tensor]
    call: Callable[..., Any]
    schema: Callable[..., tuple[Any, ...]]


def _window_assembly() -> Operation:
    tensors = {
        "block_start": torch.tensor([0, 10, 20, 0, 30]), "prefix": torch.arange(10).view(5, 2),
        "run_offsets": torch.tensor([0, 3, 5]), "row": torch.tensor([1, 0, -1]),
        "lower": torch.tensor([[0, 5], [0, 5], [0, 5]]), "upper": torch.tensor([40, 20, 40]),
    }  # fmt: skip
    return Operation("window_assembly", tensors, window_assembly, lambda **given: tuple(given.values()))


def _l1_score() -> Operation:
    shapes = {
        "user": (2, 5), "item": (7, 6), "user_of_item": (7,), "first_user": (8, 5), "first_item": (8, 6), "first_bias": (8,),
        "second": (4, 8), "second_bias": (4,), "heads": (3, 4), "heads_bias": (3,), "mix": (3,),
    }  # fmt: skip
    tensors = _drawn(shapes) | {"user_of_item": torch.tensor([0, 1, 1, 0, 1, 0, 0])}
    return Operation("l1_score", tensors, l1_score, lambda **given: tuple(given.values()))


def _sequence_block() -> Operation:
    weights = {
        "in_weight": (24, 8), "in_bias": (24,), "out_weight": (8, 8), "out_bias": (8,),
        "norm1_weight": (8,), "norm1_bias": (8,), "ff1_weight": (16, 8), "ff1_bias": (16,),
        "ff2_weight": (8, 16), "ff2_bias": (8,), "norm2_weight": (8,), "norm2_bias": (8,),
    }  # fmt: skip
    tensors = _drawn({"tokens": (2, 5, 8), "candidates": (3, 8), **weights})
    tensors |= {"lengths": torch.tensor([5, 2]), "user_of_candidate": torch.tensor([1, 0, 1])}

    def call(**given: Tensor) -> Tensor:
        of_weights = BlockWeights(**{name: given.pop(name) for name in BlockWeights._fields})
        return sequence_block(given.pop("tokens"), given.pop("lengths"), of_weights, 2, **given, fusion="late")

    def schema(**given: Tensor) -> tuple[Any, ...]:
        names = ("tokens", "lengths", "candidates", "user_of_candidate", *BlockWeights._fields)
        return (*(given[name] for name in names), 2, "late", False, "softmax")

    return Operation("sequence_block", tensors, call, schema)


def _top_k() -> Operation:
    tensors = _drawn({"queries": (2, 8), "items": (40, 8), "scale": (40,)})
    tensors["excluded"] = pack_excluded(torch.arange(80).view(2, 40) % 3 == 0)
    return Operation(
        "top_k", tensors,
        lambda queries, items, **rest: top_k(queries, items, 5, **rest),
        lambda queries, items, scale, excluded: (queries, items, 5, scale, excluded),
    )  # fmt: skip


def _embedding_lookup() -> Operation:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randint(-9, 9, (rows, 4), generator=generator).to(torch.int8) for rows in (4, 3)]
    tables = build_tables(
        [(torch.tensor([7, 8, 9]), weights[0]), (torch.tensor([7, -1]), weights[1])], [torch.ones(4), torch.full((3,), 0.5)]
    )
    fields = tables._asdict()
    longest = fields.pop("longest_probe")
    tensors = {
        "ids": torch.tensor([7, 8, 5, -1]), "feature": torch.tensor([0, 1, 0]), "offsets": torch.tensor([0, 2, 4, 4]),
        "bag_of_row": torch.tensor([2, 0, 1, 1]), **fields,
    }  # fmt: skip

    def call(ids: Tensor, feature: Tensor, offsets: Tensor, bag_of_row: Tensor, **of_tables: Tensor) -> Tensor:
        given = tables._replace(**of_tables)
        return embedding_lookup(ids, feature, given, offsets=offsets, bag_of_row=bag_of_row, pooling="sum")

    return Operation("embedding_lookup", tensors, call, lambda **given: (*given.values(), longest, "sum"))


def _multitask_bce() -> Operation:
    tensors = _drawn({"logits": (6, 2), "labels": (6, 2), "weight": (2,)})
    tensors["labels"] = tensors["labels"].sigmoid()
    return Operation("multitask_bce", tensors, multitask_bce, lambda **given: tuple(given.values()))


def _sampled_softmax() -> Operation:
    tensors = _drawn({"query": (4, 8), "positive": (4, 8), "negative": (6, 8), "log_q_positive": (4,), "log_q_negative": (6,)})
    tensors |= {"positive_id": torch.arange(4), "negative_id": torch.arange(6)}
    return Operation(
        "sampled_softmax", tensors,
        lambda **given: sampled_softmax(**given, temperature=0.5), lambda **given: (*given.values(), 0.5),
    )  # fmt: skip


def _drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


OPERATIONS = {
    operation.name: operation
    for operation in (
        _window_assembly(), _l1_score(), _sequence_block(), _top_k(), _embedding_lookup(), _multitask_bce(), _sampled_softmax()
    )
}  # fmt: skip
ARGUMENTS = [(name, argument) for name, operation in OPERATIONS.items() for argument in operation.tensors]


@pytest.fixture(params=OPERATIONS)
def operation(request) -> Operation:
    return OPERATIONS[request.param]


def _wrong(value: Tensor) -> Iterator[tuple[type[Exception], str, Any]]:
    """(error, what its message says came, the value)."""
    yield TypeError, "got list", value.tolist()
    other = torch.int16 if value.is_floating_point() else torch.bool
    yield TypeError, f"got {str(other).removeprefix('torch.')}", value.to(other)
    yield TypeError, "got one of layout sparse_coo", value.to_sparse()
    yield ValueError, r"got \[1, " + ", ".join(map(str, value.shape)), value[None]
    yield ValueError, "one device, got .* on meta", value.to("meta")


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_wrong_type_layout_rank_or_device_is_refused_by_name(name, argument):
    operation = OPERATIONS[name]
    for error, came, value in _wrong(operation.tensors[argument]):
        with pytest.raises(error, match=came) as raised:
            operation.call(**{**operation.tensors, argument: value})
        assert argument in str(raised.value)


ANY_SIZE = {
    ("user", 0), ("prefix", 1), ("lower", 1), ("run_offsets", 0),
    ("slots", 0), ("bag_of_row", 0), ("tokens", 1), ("weights", 1),
}  # fmt: skip
SIZES = [
    (name, argument, dim)
    for name, argument in ARGUMENTS
    for dim in range(OPERATIONS[name].tensors[argument].ndim)
    if (argument, dim) not in ANY_SIZE
]


@pytest.mark.parametrize(("name", "argument", "dim"), SIZES)
def test_a_size_that_does_not_fit_the_others_is_refused(name, argument, dim):
    operation = OPERATIONS[name]
    value = operation.tensors[argument]
    larger = torch.cat([value, value.narrow(dim, 0, 1)], dim=dim)
    with pytest.raises(ValueError, match=r"must have shape|must divide|must be as wide|must rise") as raised:
        operation.call(**{**operation.tensors, argument: larger})
    assert any(named in str(raised.value) for named in (*operation.tensors, "num_heads"))


INDICES = {
    "l1_score": {"user_of_item": (0, 2)}, "sequence_block": {"lengths": (0, 6), "user_of_candidate": (0, 2)},
    "embedding_lookup": {"feature": (0, 2), "bag_of_row": (0, 3)}, "window_assembly": {"row": (-1, 2)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [(name, index) for name, indices in INDICES.items() for index in indices])
def test_an_index_out_of_range_is_refused_with_the_range(name, argument):
    operation, (low, high) = OPERATIONS[name], INDICES[name][argument]
    for bad in (low - 1, high, 2**62, -(2**62)):
        value = operation.tensors[argument].clone()
        value[-1] = bad
        with pytest.raises(IndexError, match=rf"{argument} must lie in {low} .. {high - 1}, got .*{bad}"):
            operation.call(**{**operation.tensors, argument: value})


def test_every_index_argument_is_in_the_table_of_ranges():
    """int64 arguments that are not indices: times and values, raw ids, tables' own arrays, and offsets, which have a rule of
    their own."""
    not_indices = {"block_start", "prefix", "lower", "upper", "ids", "slots", "positive_id", "negative_id"}
    with_a_rule = {"offsets", "run_offsets", "slot_base", "slot_mask", "row_base"}
    for name, operation in OPERATIONS.items():
        whole = {argument for argument, value in operation.tensors.items() if value.dtype == torch.int64}
        assert whole - not_indices - with_a_rule == set(INDICES.get(name, {}))


@pytest.mark.parametrize("argument", ["slot_base", "slot_mask", "row_base", "slots"])
def test_debug_mode_checks_the_inside_of_embedding_tables(monkeypatch, argument):
    operation = OPERATIONS["embedding_lookup"]
    monkeypatch.setenv("HEADRACE_KERNELS_DEBUG", "1")
    operation.call(**operation.tensors)
    for bad in (-9, 1 << 40):
        with pytest.raises(IndexError, match=f"{argument}.* must lie in 0 .. .*got .*{bad}"):
            operation.call(**{**operation.tensors, argument: torch.full_like(operation.tensors[argument], bad)})


def _results(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_a_tensor_may_lie_in_memory_in_any_order(operation):
    """Every second element of a larger tensor, and the axes the other way round."""
    expected = _results(operation.call(**operation.tensors))
    for place in (_every_second, _axes_turned):
        strided = {name: place(value) for name, value in operation.tensors.items()}
        for found, wanted in zip(_results(operation.call(**strided)), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def _every_second(value: Tensor) -> Tensor:
    spread = value.repeat_interleave(2, dim=-1)[..., ::2]
    assert value.shape[-1] == 1 or not spread.is_contiguous()
    return spread


def _axes_turned(value: Tensor) -> Tensor:
    axes = tuple(reversed(range(value.ndim)))
    return value.permute(axes).contiguous().permute(axes)


def test_the_operator_passes_opcheck(operation):
    torch.library.opcheck(getattr(torch.ops.headrace, operation.name).default, operation.schema(**operation.tensors))


class _Module(nn.Module):
    def __init__(self, operation: Operation):
        super().__init__()
        self.operation, self.names = operation, tuple(operation.tensors)

    def forward(self, *values: Tensor) -> Any:
        return self.operation.call(**dict(zip(self.names, values, strict=True)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own, on import
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_operation_compiles_whole(operation, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler for torch.compile")
    torch.compiler.reset()
    module, values = _Module(operation), tuple(operation.tensors.values())
    for found, wanted in zip(
        _results(torch.compile(module, fullgraph=True, backend=backend)(*values)), _results(module(*values)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_the_operation_exports_as_one_node(operation):
    module, values = _Module(operation), tuple(operation.tensors.values())
    exported = torch.export.export(module, values)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"headrace.{operation.name}.default" in called
    for found, wanted in zip(_results(exported.module()(*values)), _results(module(*values)), strict=True):
        torch.testing.assert_close(found, wanted)
