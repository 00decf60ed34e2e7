import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kernels import embedding_lookup as module
from kernels.embedding_lookup import EMPTY_ID, EmbeddingTables, build_tables, embedding_lookup, embedding_lookup_reference


def some_tables(sizes, D, dtype=torch.float32, load=0.5, seed=0):
    """(tables, ids of each feature, weights of each feature): ids anywhere in 64 bits."""
    rng = torch.Generator().manual_seed(seed)
    features, scales = [], []
    for size in sizes:
        ids = torch.randint(-(2**62), 2**62, (size,), generator=rng)
        if dtype == torch.int8:
            weights = torch.randint(-127, 128, (size + 1, D), generator=rng).to(dtype)
            scales.append(torch.rand(size + 1, generator=rng).half() / 50)
        else:
            weights = torch.randn(size + 1, D, generator=rng).to(dtype)
        features.append((ids, weights))
    tables = build_tables(features, scales or None, load)
    if scales:
        dequantised = [w.float() * s.float()[:, None] for (_, w), s in zip(features, scales, strict=True)]
        return tables, [ids for ids, _ in features], dequantised
    return tables, [ids for ids, _ in features], [w for _, w in features]


def plainly(tables, known, weights, ids, feature, offsets, bag_of_row, pooling):
    """A dictionary per feature and a loop, in float32."""
    rows = [{id: i + 1 for i, id in enumerate(of.tolist())} for of in known]
    bounds = range(len(feature) + 1) if offsets is None else offsets.tolist()
    bags = []
    for g, f in enumerate(feature.tolist()):
        pooled = torch.zeros(tables.weights.shape[1])
        for id in ids[bounds[g] : bounds[g + 1]].tolist():
            pooled = pooled + weights[f][rows[f].get(id, 0)].float()
        bags.append(pooled / max(bounds[g + 1] - bounds[g], 1) if pooling == "mean" else pooled)
    out = torch.stack(bags) if bags else torch.zeros(0, tables.weights.shape[1])
    out = out.to(tables.weights.dtype if tables.scale is None else tables.scale.dtype)
    return out if bag_of_row is None else out[bag_of_row]


def some_queries(known, G, longest_bag, unknown=0.3, seed=1):
    rng = torch.Generator().manual_seed(seed)
    feature = torch.randint(0, len(known), (G,), generator=rng)
    lengths = torch.randint(0, longest_bag + 1, (G,), generator=rng) if longest_bag else torch.ones(G, dtype=torch.int64)
    ids = []
    for f, length in zip(feature.tolist(), lengths.tolist(), strict=True):
        for _ in range(length):
            stranger = len(known[f]) == 0 or torch.rand((), generator=rng) < unknown
            pool = torch.randint(-(2**62), 2**62, (1,), generator=rng) if stranger else known[f]
            ids.append(pool[torch.randint(0, len(pool), (), generator=rng)].item())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]) if longest_bag else None
    return torch.tensor(ids, dtype=torch.int64), feature, offsets


def on(device, tables, guard):
    """Tables on the device between guard zones; an out-of-range read would find a huge row, or a NaN weight."""
    poison = {"weights": float("nan"), "scale": float("nan")}
    parts = {
        name: guard(part.to(device), 99 if part.dtype == torch.int8 else poison.get(name, 2**40))
        for name, part in tables._asdict().items()
        if isinstance(part, torch.Tensor)
    }
    return tables._replace(**parts)


def test_known_and_unknown_ids_worked_out_by_hand():
    tables = build_tables(
        [
            (torch.tensor([7, -3]), torch.tensor([[0.5], [1.0], [2.0]])),
            (torch.tensor([7]), torch.tensor([[-1.0], [10.0]])),
        ]
    )
    ids, feature = torch.tensor([7, 7, -3, -3, 8]), torch.tensor([0, 1, 0, 1, 0])
    assert embedding_lookup(ids, feature, tables).flatten().tolist() == [1.0, 10.0, 2.0, -1.0, 0.5]
    offsets, bags = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 0])
    pooled = embedding_lookup(torch.tensor([7, -3, 7, 7, 9]), bags, tables, offsets=offsets, pooling="sum")
    assert pooled.flatten().tolist() == [3.0, 0.0, 2.5]
    mean = embedding_lookup(torch.tensor([7, -3, 7, 7, 9]), bags, tables, offsets=offsets, pooling="mean")
    assert mean.flatten().tolist() == pytest.approx([1.5, 0.0, 2.5 / 3])
    shared = embedding_lookup(ids, feature, tables, bag_of_row=torch.tensor([1, 1, 4]))
    assert shared.flatten().tolist() == [10.0, 10.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("sizes", "D", "load", "G"),
    [([5, 0, 300], 8, 0.5, 150), ([1], 1, 1.0, 3), ([64, 128], 20, 1.0, 90), ([31, 2], 64, 0.25, 40), ([4], 16, 0.5, 0)],
)
def test_gathered_rows_are_exact(sizes, D, load, G, dtype, triton_backend, guard):
    tables, known, weights = some_tables(sizes, D, dtype, load)
    ids, feature, _ = some_queries(known, G, 0)
    expected = plainly(tables, known, weights, ids, feature, None, None, "none")
    assert torch.equal(embedding_lookup_reference(ids, feature, None, None, *tables, "none"), expected)
    given = [guard(t.to(triton_backend), 2**40) for t in (ids, feature)]
    assert torch.equal(embedding_lookup(*given, on(triton_backend, tables, guard)).cpu(), expected)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_pooled_bags_agree_and_one_bag_serves_many_rows(dtype, pooling, triton_backend, guard):
    tables, known, weights = some_tables([20, 3, 50], 12, dtype)
    ids, feature, offsets = some_queries(known, 30, 7)
    rows = torch.randint(0, 30, (75,), generator=torch.Generator().manual_seed(2))
    expected = plainly(tables, known, weights, ids, feature, offsets, rows, pooling)
    given = [guard(t.to(triton_backend), 2**40) for t in (ids, feature, offsets, rows)]
    got = embedding_lookup(
        given[0], given[1], on(triton_backend, tables, guard), offsets=given[2], bag_of_row=given[3], pooling=pooling
    )
    same = embedding_lookup_reference(ids, feature, offsets, rows, *tables, pooling)
    for out in (got.cpu(), same):
        assert out.dtype == expected.dtype
        # one rounding (the interpreter truncates bf16) of an fp32 sum in the same order
        torch.testing.assert_close(out.float(), expected.float(), rtol=torch.finfo(out.dtype).eps, atol=1e-6)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_generated_ids_find_their_rows_in_tables_of_any_fullness(data, triton_backend):
    id64 = st.one_of(st.integers(EMPTY_ID + 1, 2**63 - 1), st.integers(-4, 4))
    sets = data.draw(st.lists(st.lists(id64, unique=True, max_size=40), min_size=1, max_size=3))
    load = data.draw(st.sampled_from([0.3, 0.5, 1.0]))
    weights = [torch.arange(len(s) + 1, dtype=torch.float32)[:, None] + 1000 * f for f, s in enumerate(sets)]
    known = [torch.tensor(s, dtype=torch.int64) for s in sets]
    tables = build_tables(list(zip(known, weights, strict=True)), load=load)
    asked = data.draw(st.lists(st.one_of(id64, st.just(EMPTY_ID), *(st.sampled_from(s) for s in sets if s)), max_size=12))
    ids = torch.tensor(asked, dtype=torch.int64)
    feature = torch.tensor([data.draw(st.integers(0, len(sets) - 1)) for _ in asked], dtype=torch.int64)
    expected = plainly(tables, known, weights, ids, feature, None, None, "none")
    assert torch.equal(embedding_lookup_reference(ids, feature, None, None, *tables, "none"), expected)
    got = embedding_lookup(ids.to(triton_backend), feature.to(triton_backend), tables.to(triton_backend))
    assert torch.equal(got.cpu(), expected)


def test_every_id_unknown_gets_the_first_row_even_from_a_full_table(triton_backend):
    tables, known, weights = some_tables([64], 4, load=1.0)
    assert tables.slots.shape[0] == 64
    strangers = torch.arange(200) + 5
    assert not set(strangers.tolist()) & set(known[0].tolist())
    out = embedding_lookup(
        strangers.to(triton_backend), torch.zeros(200, dtype=torch.int64, device=triton_backend), tables.to(triton_backend)
    )
    assert torch.equal(out.cpu(), weights[0][:1].expand(200, -1))


def test_bad_indices_read_as_zeros_on_the_device(device, guard):
    tables, known, _ = some_tables([5, 6], 4)
    given = [
        guard(torch.tensor(values, device=device), 2**40)
        for values in (known[0].tolist(), [0, -1, 2, 1], [-5, 1, 2, 3, 99], [0, 1, 2, -1, 4, 3])
    ]
    out = torch.full((6, 4), float("nan"), device=device)
    module.launch(*given, on(device, tables, guard), "sum", out)
    assert torch.isfinite(out).all()
    assert out[1:5].abs().sum() == 0


def test_gradients_reach_the_rows_that_were_read(triton_backend):
    tables, known, _ = some_tables([6, 4], 3)
    ids, feature, offsets = some_queries(known, 8, 3)
    gradients = []
    for call in (embedding_lookup, None):
        weights = tables.weights.clone().to(triton_backend).requires_grad_()
        moved = tables.to(triton_backend)._replace(weights=weights)
        given = [t.to(triton_backend) for t in (ids, feature, offsets)]
        if call is None:
            out = embedding_lookup_reference(*given, None, *moved, "mean")
        else:
            out = call(given[0], given[1], moved, offsets=given[2], pooling="mean")
        out.square().sum().backward()
        gradients.append(weights.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_the_operator_compiles_forward_and_backward_and_passes_opcheck():
    tables, known, _ = some_tables([6, 4], 3)
    ids, feature, offsets = some_queries(known, 8, 3)
    tables = tables._replace(weights=tables.weights.requires_grad_())
    torch.library.opcheck(torch.ops.headrace.embedding_lookup.default, (ids, feature, offsets, None, *tables, "sum"))
    compiled = torch.compile(embedding_lookup, fullgraph=True, backend="aot_eager")
    out = compiled(ids, feature, tables, offsets=offsets, pooling="sum")
    torch.testing.assert_close(out, embedding_lookup_reference(ids, feature, offsets, None, *tables, "sum"))
    out.sum().backward()
    assert tables.weights.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pooling": "max"}, ValueError, "pooling must be one of none, sum, mean, got 'max'"),
        ({"offsets": None}, ValueError, "offsets must be given with pooling 'sum'"),
        ({"pooling": "none", "feature": torch.tensor([0, 0, 1])}, ValueError, "offsets must be None with pooling 'none'"),
        ({"feature": torch.tensor([0, 2])}, IndexError, r"feature must lie in 0 \.\. 1, got 0 \.\. 2"),
        ({"offsets": torch.tensor([0, 1])}, ValueError, r"offsets must have shape \[3\], got \[2\]"),
        ({"offsets": torch.tensor([0, 1, 2])}, ValueError, r"offsets must rise from 0 to 3, the number of ids, got 0 \.\. 2"),
        ({"bag_of_row": torch.tensor([2])}, IndexError, r"bag_of_row must lie in 0 \.\. 1, got 2 \.\. 2"),
        ({"ids": torch.tensor([1.0])}, TypeError, "ids must be int64, got float32"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(change, error, message):
    tables, known, _ = some_tables([3, 2], 2)
    arguments = {
        "ids": known[0], "feature": torch.tensor([0, 1]), "tables": tables,
        "offsets": torch.tensor([0, 1, 3]), "pooling": "sum",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        embedding_lookup(**{**arguments, **change})


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2, 1], 4, "ids of feature 0 must differ from each other, got 1 twice"),
        ([1, EMPTY_ID], 3, "ids of feature 0 must not contain -9223372036854775808: it marks a free slot"),
        ([1, 2], 2, r"weights of feature 0 must have shape \[3, 2\], got \[2, 2\]"),
    ],
)
def test_tables_refuse_ids_they_cannot_hold(ids, rows, message):
    with pytest.raises(ValueError, match=message):
        build_tables([(torch.tensor(ids), torch.zeros(rows, 2))])


def test_int8_weights_need_a_scale():
    tables = EmbeddingTables(*some_tables([3], 2, torch.int8)[0])._replace(scale=None)
    with pytest.raises(ValueError, match="scale must be given with int8 weights and with no others"):
        embedding_lookup(torch.tensor([1]), torch.tensor([0]), tables)
