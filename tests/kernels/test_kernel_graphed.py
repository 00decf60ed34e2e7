"""Padding, cutting and falling back run everywhere, with a recording that repeats the function; real graphs need a GPU."""

from itertools import pairwise

import pytest
import torch

from kernels.graphed import BUCKETS, Graphed, Recording

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Repeating:
    """A recording without a GPU: the function again, from the same tensors into the same tensors."""

    def __init__(self):
        self.captured = []

    def __call__(self, function, inputs, pool):
        self.captured.append(tuple(tuple(tensor.shape) for tensor in inputs))
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)

        def replay():
            again = function(*inputs)
            for output, fresh in zip(outputs, again if isinstance(again, tuple) else (again,), strict=True):
                output.copy_(fresh)

        return Recording(inputs, outputs, replay)


def score(user, notes):
    return torch.sigmoid(notes @ user[0]), notes.sum(dim=1, keepdim=True)


def request(rows, seed=0, device="cpu"):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, generator=rng).to(device), torch.randn(rows, 4, generator=rng).to(device)


def test_every_size_is_padded_to_its_bucket_and_cut_again():
    record = Repeating()
    graphed = Graphed(score, (False, True), buckets=(4, 8), record=record)
    for rows in (3, 1, 4, 5, 8, 2):
        torch.testing.assert_close(graphed(*request(rows, seed=rows)), score(*request(rows, seed=rows)))
    assert record.captured == [((1, 4), (4, 4)), ((1, 4), (8, 4))]


def test_a_result_survives_the_next_call():
    graphed = Graphed(score, (False, True), buckets=(4,), record=Repeating())
    first = graphed(*request(3, seed=1))
    graphed(*request(3, seed=2))
    torch.testing.assert_close(first, score(*request(3, seed=1)))


def test_other_types_and_widths_get_captures_of_their_own():
    record = Repeating()
    graphed = Graphed(score, (False, True), buckets=(4,), record=record)
    for change in (lambda t: t, torch.Tensor.double, lambda t: t[:, :2]):
        arguments = tuple(map(change, request(3)))
        torch.testing.assert_close(graphed(*arguments), score(*arguments))
    assert len(record.captured) == 3


def test_warm_up_captures_every_bucket():
    record = Repeating()
    graphed = Graphed(score, (False, True), buckets=(2, 4, 8), record=record)
    graphed.warm_up(*request(3))
    assert [shapes[1][0] for shapes in record.captured] == [2, 4, 8]


@pytest.mark.parametrize("rows", [0, 9])
def test_an_empty_or_too_large_batch_is_called_plainly(rows):
    record = Repeating()
    torch.testing.assert_close(Graphed(score, (False, True), (4, 8), record)(*request(rows)), score(*request(rows)))
    assert record.captured == []


def test_gradients_are_called_plainly():
    graphed = Graphed(score, (False, True), buckets=(4,), record=Repeating())
    user, notes = request(3)
    graphed(user, notes.requires_grad_())[0].sum().backward()
    assert notes.grad is not None


def test_tensors_on_the_cpu_are_called_plainly():
    torch.testing.assert_close(Graphed(score, (False, True))(*request(3)), score(*request(3)))


def test_a_failed_capture_is_logged_once_and_the_function_still_answers(caplog):
    def cannot(function, inputs, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = Graphed(score, (False, True), buckets=(4,), record=cannot)
    for _ in range(2):
        torch.testing.assert_close(graphed(*request(3)), score(*request(3)))
    assert graphed.failure == "RuntimeError: operation not permitted when stream is capturing"
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "capture failed at 4 rows, calling the function plainly from now on"
    ]


def test_from_64_rows_on_padding_adds_less_than_half():
    assert all(upper <= 1.5 * lower or upper <= 64 for lower, upper in pairwise(BUCKETS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batched": (False, False)}, "batched must be True for at least one argument"),
        ({"batched": (True,), "buckets": (4, 2)}, "buckets must be positive and rising"),
        ({"batched": (True,), "buckets": ()}, "buckets must be positive and rising"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Graphed(score, **arguments)


def test_batched_arguments_of_different_sizes_are_refused():
    graphed = Graphed(score, (True, True), buckets=(4,), record=Repeating())
    with pytest.raises(ValueError, match=r"batched arguments must have the same number of rows, got \[1, 3\]"):
        graphed(*request(3))


@needs_gpu
def test_replays_on_a_gpu_equal_the_function():
    graphed = Graphed(score, (False, True), buckets=(4, 8))
    graphed.warm_up(*request(3, device="cuda"))
    assert graphed.failure == ""
    for rows in (1, 4, 7, 8, 3):
        torch.testing.assert_close(graphed(*request(rows, rows, "cuda")), score(*request(rows, rows, "cuda")))


@needs_gpu
def test_a_function_that_reads_back_to_the_host_falls_back_on_a_gpu():
    graphed = Graphed(lambda user, notes: notes * notes.sum().item(), (False, True), buckets=(4,))
    user, notes = request(3, device="cuda")
    torch.testing.assert_close(graphed(user, notes), notes * notes.sum())
    assert graphed.failure
