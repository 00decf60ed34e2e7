import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kernels import top_k as module
from kernels.top_k import pack_excluded, top_k, top_k_reference


def plainly(queries, items, k, scale=None, excluded=None):
    """Sort everything in float64 by (score, row), in Python."""
    scores = queries.double() @ items.double().T
    if scale is not None:
        scores = scores * scale.double()
    best_scores, best_rows = [], []
    for b, row in enumerate(scores.tolist()):
        gone = [False] * len(row) if excluded is None else excluded[b if len(excluded) > 1 else 0].tolist()
        kept = sorted((-score, n) for n, score in enumerate(row) if not gone[n] and score == score)[:k]
        best_scores.append([-score for score, _ in kept] + [-float("inf")] * (k - len(kept)))
        best_rows.append([n for _, n in kept] + [-1] * (k - len(kept)))
    shape = (len(queries), k)
    return torch.tensor(best_scores).view(shape), torch.tensor(best_rows, dtype=torch.int64).view(shape)


def small_integers(B, N, D, dtype, seed=0, largest=2):
    """Vectors whose products add up exactly in every type and order, with many ties."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(-largest, largest + 1, (rows, D), generator=rng).to(dtype) for rows in (B, N)]


def test_the_two_best_of_three_worked_out_by_hand():
    items = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    scores, rows = top_k(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), items, 2)
    assert rows.tolist() == [[1, 2], [0, 2]]  # 2 and 2: the lower row first
    assert scores.tolist() == [[2.0, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("B", "N", "D", "k"),
    [
        (1, 1, 1, 1),
        (3, 31, 8, 5),
        (2, 1000, 16, 50),
        (5, 513, 24, 7),
        (1, 128, 33, 128),
        (2, 40, 8, 100),
        (2, 70, 4, 1),
        (2, 5000, 8, 2),
    ],
)
def test_kernel_and_reference_find_the_same_items_in_the_same_order(B, N, D, k, dtype, triton_backend, guard):
    queries, items = small_integers(B, N, D, dtype, seed=N)
    expected = plainly(queries, items, k)
    poison = 100 if dtype == torch.int8 else float("nan")
    on_device = [guard(t.to(triton_backend), poison) for t in (queries, items)]
    for scores, rows in (top_k(*on_device, k), top_k_reference(queries, items, k)):
        assert torch.equal(rows.cpu(), expected[1])
        assert torch.equal(scores.cpu(), expected[0])


def test_all_scores_equal_gives_the_lowest_rows(triton_backend):
    queries, items = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(300, 4, dtype=torch.bfloat16)
    assert top_k(queries.to(triton_backend), items.to(triton_backend), 70)[1].tolist() == [list(range(70))] * 2
    assert top_k_reference(queries, items, 70)[1].tolist() == [list(range(70))] * 2


@pytest.mark.parametrize("largest", [0, 1, 40])
def test_lists_longer_than_a_tile_are_cut_to_the_best(largest, triton_backend, monkeypatch):
    monkeypatch.setattr(module, "TRIMMING", {**module.TRIMMING, "BLOCK": 16})
    monkeypatch.setattr(module, "RANKING", {**module.RANKING, "CHUNK": 16})
    queries, items = small_integers(2, 3000, 4, torch.bfloat16, 5, largest)
    expected = plainly(queries, items, 20)
    scores, rows = top_k(queries.to(triton_backend), items.to(triton_backend), 20)
    assert torch.equal(rows.cpu(), expected[1])
    assert torch.equal(scores.cpu(), expected[0])


def test_groups_too_many_for_one_program_are_selected_by_pytorch(triton_backend, monkeypatch):
    monkeypatch.setattr(module, "MOST_GROUPS", 2)
    queries, items = small_integers(2, 5000, 4, torch.bfloat16)
    assert torch.equal(top_k(queries.to(triton_backend), items.to(triton_backend), 3)[1].cpu(), plainly(queries, items, 3)[1])


@pytest.mark.parametrize(("N", "k", "share"), [(200, 60, 0.8), (640, 3, 0.97)], ids=["runs out", "buckets are chosen"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_excluded_and_scaled_items(N, k, share, rows, dtype, triton_backend, guard):
    queries, items = small_integers(3, N, 8, dtype)
    rng = torch.Generator().manual_seed(1)
    excluded = torch.rand(rows, N, generator=rng) < share
    scale = torch.randint(1, 9, (N,), generator=rng).float() / 8
    expected = plainly(queries, items, k, scale, excluded)
    words = pack_excluded(excluded)
    poison = 100 if dtype == torch.int8 else float("nan")
    given = [guard(t.to(triton_backend), p) for t, p in ((queries, poison), (items, poison), (scale, 1e9), (words, 0))]
    for scores, found in (
        top_k(given[0], given[1], k, scale=given[2], excluded=given[3]),
        top_k_reference(queries, items, k, scale, words),
    ):
        assert torch.equal(found.cpu(), expected[1])
        assert torch.equal(scores.cpu(), expected[0])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 3), N=st.integers(1, 150), D=st.integers(1, 9), k=st.integers(1, 40), seed=st.integers(0, 99),
    largest=st.integers(0, 3),
)  # fmt: skip
def test_generated_ties_are_broken_by_row(B, N, D, k, seed, largest, triton_backend):
    queries, items = small_integers(B, N, D, torch.float16, seed, largest)
    expected = plainly(queries, items, k)
    for scores, rows in (top_k(queries.to(triton_backend), items.to(triton_backend), k), top_k_reference(queries, items, k)):
        assert torch.equal(rows.cpu(), expected[1])
        assert torch.equal(scores.cpu(), expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_valued_scores_are_those_of_the_rows_and_no_better_row_is_missed(dtype, triton_backend):
    rng = torch.Generator().manual_seed(3)
    queries, items = (torch.randn(rows, 32, generator=rng).to(dtype) for rows in (4, 1000))
    exact = queries.double() @ items.double().T
    scores, rows = (t.cpu() for t in top_k(queries.to(triton_backend), items.to(triton_backend), 20))
    torch.testing.assert_close(scores.double(), exact.gather(1, rows), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 20 for row in rows.tolist())
    rest = exact.scatter(1, rows, -torch.inf).amax(1)
    assert (rest <= scores[:, -1] + 1e-5).all()
    assert (scores[:, 1:] <= scores[:, :-1]).all()


def test_a_nan_score_is_never_found(triton_backend):
    queries, items = small_integers(2, 70, 8, torch.bfloat16)
    items[[0, 33, 69]] = float("nan")
    expected = plainly(queries, items, 70)
    for _, rows in (top_k(queries.to(triton_backend), items.to(triton_backend), 70), top_k_reference(queries, items, 70)):
        assert torch.equal(rows.cpu(), expected[1])


@pytest.mark.parametrize(("B", "N", "k"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_asked_or_nothing_there(B, N, k, triton_backend):
    queries, items = small_integers(B, N, 4, torch.bfloat16)
    scores, rows = top_k(queries.to(triton_backend), items.to(triton_backend), k)
    assert scores.shape == rows.shape == (B, k)
    assert (rows == -1).all()


def test_excluded_bits_are_packed_least_first():
    excluded = torch.zeros(1, 40, dtype=torch.bool)
    excluded[0, [0, 5, 31, 33]] = True
    assert pack_excluded(excluded).tolist() == [[1 + 32 - 2**31, 2]]


def test_a_small_problem_takes_one_matrix_product(monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", "auto")
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    monkeypatch.setattr(module, "launch", lambda *arguments: pytest.fail("launched"))
    assert top_k(*small_integers(1, 9, 4, torch.bfloat16), 3)[1].shape == (1, 3)
    monkeypatch.setattr(module, "SMALLEST_PROBLEM", 1)
    assert top_k(*small_integers(1, 600, 4, torch.bfloat16), 5)[1].shape == (1, 5)  # most buckets would be scored again


def test_the_operator_compiles_exports_and_passes_opcheck():
    queries, items = small_integers(2, 50, 4, torch.float32)
    words = pack_excluded(torch.zeros(2, 50, dtype=torch.bool))
    torch.library.opcheck(torch.ops.headrace.top_k.default, (queries, items, 5, None, words))
    compiled = torch.compile(top_k, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, items, 5)[1], plainly(queries, items, 5)[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"items": torch.zeros(5, 4, dtype=torch.int32)}, TypeError, "items must be float32 or bfloat16 or float16 or int8"),
        ({"queries": torch.zeros(2, 3)}, ValueError, r"queries must have shape \[B, 4\], got \[2, 3\]"),
        ({"queries": torch.zeros(2, 4).half()}, TypeError, "queries must be float32, got float16"),
        ({"k": -1}, ValueError, "k must not be negative, got -1"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must have shape \[5\], got \[4\]"),
        ({"excluded": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, "excluded must be int32, got bool"),
        ({"excluded": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, r"excluded must have shape \[2, 1\], got \[3, 1\]"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(change, error, message):
    with pytest.raises(error, match=message):
        top_k(**{"queries": torch.zeros(2, 4), "items": torch.zeros(5, 4), "k": 2, **change})
