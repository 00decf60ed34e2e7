import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kernels import window_assembly as module
from kernels.window_assembly import window_assembly, window_assembly_reference

POISON = -(2**62) + 7


def i64(values, *shape, device="cpu"):
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    return tensor.view(*shape) if shape else tensor


def plainly(block_start, prefix, run_offsets, row, lower, upper):
    """The equation, block by block, in Python integers."""
    W, M = lower.shape[1], prefix.shape[1]
    out = []
    for n, run in enumerate(row.tolist()):
        blocks = range(run_offsets[run], run_offsets[run + 1]) if run >= 0 else ()
        line = []
        for m in range(M):
            for w in range(W):
                total = 0
                for b in blocks:
                    before = prefix[b - 1, m].item() if b > blocks[0] else 0
                    if lower[n, w] <= block_start[b] < upper[n]:
                        total += prefix[b, m].item() - before
                line.append(total)
        out.append(line)
    return torch.tensor(out, dtype=torch.int64).view(len(row), M * W)


def problem(run_lengths, N, M, W, seed=0, spread=3):
    """Random runs; bounds fall on blocks, between them, before the first and after the last; every fifth key is unknown."""
    rng = torch.Generator().manual_seed(seed)
    R, K = sum(run_lengths), len(run_lengths)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=rng)

    starts = [torch.randperm(spread * n + 1, generator=rng)[:n].sort().values * 5 for n in run_lengths]
    prefixes = [draw(-9, 100, n, M).cumsum(0) for n in run_lengths]
    row = draw(0, K, N) if K else draw(-1, 0, N)
    row[::5] = -1
    longest = max(run_lengths, default=0) * spread * 5
    upper = draw(-10, longest + 20, N)
    return (
        torch.cat(starts) if starts else i64([]),
        torch.cat(prefixes) if prefixes else torch.zeros(0, M, dtype=torch.int64),
        i64([0, *torch.tensor(run_lengths, dtype=torch.int64).cumsum(0).tolist()]),
        row,
        upper[:, None] - draw(-10, longest + 20, N, W),
        upper,
    ), R


def test_an_hour_and_a_day_of_clicks_worked_out_by_hand():
    # note 0 has 3, 4 and 5 clicks in blocks that start at minutes 0, 60 and 65; note 1 has 7 at minute 60
    block_start = i64([0, 60, 65, 60])
    prefix = i64([3, 7, 12, 7], 4, 1)
    run_offsets = i64([0, 3, 4])
    # read at minute 65: an hour back is [5, 65), a day back is everything before 65; -1 is a note never seen
    row, upper = i64([0, 1, -1]), i64([65, 65, 65])
    lower = i64([5, 65 - 1440] * 3, 3, 2)
    assert window_assembly(block_start, prefix, run_offsets, row, lower, upper).tolist() == [[4, 7], [7, 7], [0, 0]]


def test_windows_are_half_open_and_an_inverted_window_is_empty():
    block_start, prefix, run_offsets = i64([10, 20]), i64([1, 3], 2, 1), i64([0, 2])
    lower, upper = i64([10, 11, 20, 25], 1, 4), i64([20])
    assert window_assembly(block_start, prefix, run_offsets, i64([0]), lower, upper).tolist() == [[1, 0, 0, 0]]


def test_columns_are_measure_major():
    prefix = i64([[1, 100], [3, 300]])
    out = window_assembly(i64([0, 10]), prefix, i64([0, 2]), i64([0]), i64([[0, 10]]), i64([20]))
    assert out.tolist() == [[3, 2, 300, 200]]


@pytest.mark.parametrize(
    ("run_lengths", "N", "M", "W"),
    [
        ([1], 1, 1, 1),
        ([3, 0, 1], 7, 2, 3),
        ([0, 0, 5, 0], 16, 1, 1),
        ([64, 63, 65, 1], 33, 8, 6),
        ([129], 17, 9, 5),
        ([2, 300, 7], 40, 3, 7),
        ([20, 30], 19, 17, 9),
        ([], 6, 2, 2),
        ([0, 0], 6, 2, 2),
        ([4, 4], 0, 2, 2),
        ([4, 4], 3, 0, 2),
        ([4, 4], 3, 2, 0),
    ],
)
def test_kernel_matches_reference_and_the_equation_to_the_bit(run_lengths, N, M, W, triton_backend, guard):
    arguments, _ = problem(run_lengths, N, M, W, seed=N + M)
    expected = plainly(*arguments)
    assert torch.equal(window_assembly_reference(*arguments), expected)

    on_device = [guard(argument.to(triton_backend), POISON) for argument in arguments]
    assert torch.equal(window_assembly(*on_device).cpu(), expected)
    out = guard(torch.full((N, M * W), POISON, dtype=torch.int64, device=triton_backend), POISON)
    module.launch(*on_device, out)
    assert torch.equal(out.cpu(), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_generated_blocks_and_bounds_agree_to_the_bit(data, triton_backend):
    instants = st.integers(-(2**63), 2**63 - 1)
    runs = data.draw(st.lists(st.lists(instants, max_size=9, unique=True).map(sorted), max_size=4))
    M, W, N = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    bounds = st.one_of(instants, st.sampled_from([start for run in runs for start in run] or [0]))
    block_start = i64([start for run in runs for start in run])
    R = len(block_start)
    prefix = i64(data.draw(st.lists(st.integers(-(2**40), 2**40), min_size=R * M, max_size=R * M)), R, M)
    run_offsets = i64([0, *torch.tensor([len(run) for run in runs], dtype=torch.int64).cumsum(0).tolist()])
    row = i64(data.draw(st.lists(st.integers(-1, len(runs) - 1), min_size=N, max_size=N)))
    lower = i64(data.draw(st.lists(bounds, min_size=N * W, max_size=N * W)), N, W)
    upper = i64(data.draw(st.lists(bounds, min_size=N, max_size=N)))
    arguments = (block_start, prefix, run_offsets, row, lower, upper)
    expected = plainly(*arguments)
    assert torch.equal(window_assembly_reference(*arguments), expected)
    assert torch.equal(window_assembly(*(argument.to(triton_backend) for argument in arguments)).cpu(), expected)


def test_a_row_or_offset_out_of_range_reads_nothing_outside_the_inputs(guard, device):
    (block_start, prefix, _, row, lower, upper), R = problem([5, 6], 4, 2, 2)
    run_offsets, row = i64([-3, 5, R + 9]), i64([0, 1, 2, -7])
    arguments = [guard(t.to(device), POISON) for t in (block_start, prefix, run_offsets, row, lower, upper)]
    out = torch.full((4, 4), POISON, device=device)
    module.launch(*arguments, out)
    sound = plainly(block_start, prefix, i64([0, 5, R]), i64([0, 1, -1, -1]), lower, upper)
    assert torch.equal(out.cpu(), sound)
    assert torch.equal(window_assembly_reference(*(a.cpu() for a in arguments)), sound)


def test_arguments_that_are_not_contiguous_are_accepted(triton_backend):
    arguments, _ = problem([9, 8], 5, 3, 2)
    strided = [torch.stack([t, t], dim=-1).to(triton_backend)[..., 0] for t in arguments]
    assert not strided[1].is_contiguous()
    assert torch.equal(window_assembly(*strided).cpu(), plainly(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row": lambda t: t.int()}, TypeError, "row must be int64, got int32"),
        ({"block_start": lambda t: t.tolist()}, TypeError, r"block_start must be a tensor \[R\], got list"),
        ({"prefix": lambda t: t[1:]}, ValueError, r"prefix must have shape \[11, M\], got \[10, 2\]"),
        ({"upper": lambda t: t[:, None]}, ValueError, r"upper must have shape \[4\], got \[4, 1\]"),
        ({"lower": lambda t: t.repeat(1, 40)}, ValueError, "lower must have at most 64 windows, got 80"),
        ({"run_offsets": lambda t: t[:0]}, ValueError, "run_offsets must hold at least one offset"),
        ({"row": lambda t: t + 9}, IndexError, r"row must lie in -1 \.\. 1, got 8 \.\. 10"),
        ({"run_offsets": lambda t: t + 1}, IndexError, r"run_offsets must lie in 0 \.\. 11, got 1 \.\. 12"),
        ({"upper": lambda t: t.to("meta")}, ValueError, "all tensors must be on one device, got .*upper on meta"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(change, error, message):
    names = ("block_start", "prefix", "run_offsets", "row", "lower", "upper")
    arguments = dict(zip(names, problem([5, 6], 4, 2, 2)[0], strict=True))
    for name, spoil in change.items():
        arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=message):
        window_assembly(**arguments)


@pytest.mark.parametrize(
    ("block_start", "run_offsets", "message"),
    [
        ([0, 5, 5], [0, 3], "block_start must rise strictly within each run"),
        ([9, 0, 5], [0, 3], "block_start must rise strictly within each run"),
        ([0, 1, 2], [0, 2], "run_offsets must rise from 0 to 3"),
        ([0, 1, 2], [0, 2, 1, 3], "run_offsets must rise from 0 to 3"),
    ],
)
def test_debug_mode_checks_what_is_inside(block_start, run_offsets, message, monkeypatch, device):
    monkeypatch.setenv("HEADRACE_KERNELS_DEBUG", "1")
    arguments = [i64(block_start), i64([1, 2, 3], 3, 1), i64(run_offsets), i64([0]), i64([[0]]), i64([1])]
    with pytest.raises(ValueError, match=message):
        window_assembly(*(t.to(device) for t in arguments))


def test_debug_mode_accepts_runs_that_start_over(monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS_DEBUG", "1")
    arguments, _ = problem([5, 0, 0, 6, 1, 0], 9, 2, 2)
    assert torch.equal(window_assembly(*arguments), plainly(*arguments))


def test_the_operator_compiles_exports_and_passes_opcheck():
    arguments, _ = problem([5, 6], 4, 2, 2)
    torch.library.opcheck(torch.ops.headrace.window_assembly.default, arguments)
    compiled = torch.compile(window_assembly, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), plainly(*arguments))

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return window_assembly(*tensors) * 2

    exported = torch.export.export(Model(), arguments, dynamic_shapes=None)
    assert "headrace.window_assembly" in exported.graph_module.code
    assert torch.equal(exported.module()(*arguments), plainly(*arguments) * 2)
