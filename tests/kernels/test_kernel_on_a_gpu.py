"""What only a GPU can show: addresses beyond 2**31 values, and graphs that replay to the same bits."""

import pytest
import torch

from kernels.embedding_lookup import EmbeddingTables, build_tables, embedding_lookup
from kernels.l1_score import l1_score, l1_score_reference
from kernels.multitask_bce import multitask_bce
from kernels.sampled_softmax import sampled_softmax
from kernels.sequence_block import BlockWeights, sequence_block
from kernels.top_k import pack_excluded, top_k
from kernels.window_assembly import window_assembly

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, with 40 GiB for the large inputs")

BEYOND = 1 << 31
FAR_ROWS = 5


@pytest.fixture
def draw():
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape: (torch.randn(shape, generator=generator, device="cuda") / shape[-1] ** 0.5).bfloat16()


@pytest.fixture(autouse=True)
def _room():
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of the GPU's memory, {free / 2**30:.0f} GiB are free")


def block_weights(draw, D, F):
    return BlockWeights(
        draw(3 * D, D), draw(3 * D), draw(D, D), draw(D), draw(D) + 1, draw(D),
        draw(F, D), draw(F), draw(D, F), draw(D), draw(D) + 1, draw(D),
    )  # fmt: skip


def test_top_k_finds_items_beyond_2_31_values(draw):
    D = 128
    items = torch.zeros(BEYOND // D + 1000, D, dtype=torch.bfloat16, device="cuda")
    items[-FAR_ROWS:] = draw(FAR_ROWS, D)
    query = items[-FAR_ROWS:].sum(0, keepdim=True)
    scores, rows = top_k(query, items, FAR_ROWS + 1)
    expected = torch.cat([(query.float() @ items[-FAR_ROWS:].float().T)[0], torch.zeros(1, device="cuda")])
    torch.testing.assert_close(scores[0], expected.sort(descending=True).values, rtol=1e-4, atol=1e-4)
    assert set(rows[0, scores[0] > 0].tolist()) <= set(range(len(items) - FAR_ROWS, len(items)))


def test_embedding_rows_beyond_2_31_values(draw):
    D = 64
    weights = torch.zeros(BEYOND // D + 1000, D, dtype=torch.bfloat16, device="cuda")
    weights[-1] = draw(D)
    slots, base = torch.tensor([[7, len(weights) - 1]]), torch.tensor([0])
    tables = EmbeddingTables(slots, base, base, base, base, None, 1).to("cuda")._replace(weights=weights)
    ids = torch.tensor([7, 8, 7], device="cuda")
    out = embedding_lookup(ids, torch.zeros_like(ids), tables)
    assert torch.equal(out[[0, 2]], weights[[-1, -1]])
    assert not out[1].any()


def test_l1_scores_items_beyond_2_31_values(draw):
    F, H, G, T = 128, 32, 16, 2
    item = torch.zeros(BEYOND // F + 1000, F, dtype=torch.bfloat16, device="cuda")
    item[-FAR_ROWS:] = draw(FAR_ROWS, F) * 5
    of = torch.zeros(len(item), dtype=torch.int64, device="cuda")
    weights = draw(H, 8), draw(H, F), draw(H), draw(G, H), draw(G), draw(T, G), draw(T), draw(T)
    user = draw(1, 8)
    utility, logits = l1_score(user, item, of, *weights)
    expected = l1_score_reference(user, item[-FAR_ROWS:], of[-FAR_ROWS:], *weights)
    torch.testing.assert_close(utility[-FAR_ROWS:], expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logits[-FAR_ROWS:], expected[1], rtol=2e-2, atol=2e-2)


def test_early_fusion_writes_beyond_2_31_values(draw):
    S, D, C = 256, 64, 32
    B = BEYOND // (S * D) + 100
    weights = block_weights(draw, D, 32)
    tokens, candidates = draw(1, S, D - C) * 5, draw(B, C) * 5
    lengths, of = torch.tensor([S - 3], device="cuda"), torch.zeros(B, dtype=torch.int64, device="cuda")
    arguments = {"num_heads": 2, "fusion": "early"}
    out = sequence_block(tokens, lengths, weights, candidates=candidates, user_of_candidate=of, **arguments)
    few = sequence_block(tokens, lengths, weights, candidates=candidates[-2:], user_of_candidate=of[-2:], **arguments)
    assert torch.equal(out[-2:], few)


def test_window_sums_written_beyond_2_31_values(draw):
    R, M, W = 50, 16, 64
    N = BEYOND // (M * W) + 100
    block_start = torch.arange(R, device="cuda")
    prefix = torch.arange(R, device="cuda")[:, None].expand(-1, M).cumsum(0).contiguous()
    row = torch.zeros(N, dtype=torch.int64, device="cuda")
    lower = (torch.arange(W, device="cuda") % R).expand(N, -1)
    upper = torch.full((N,), R, device="cuda")
    offsets = torch.tensor([0, R], device="cuda")
    out = window_assembly(block_start, prefix, offsets, row, lower, upper)
    few = window_assembly(block_start, prefix, offsets, row[-3:], lower[-3:], upper[-3:])
    assert torch.equal(out[-3:], few)
    assert few[0, :3].tolist() == [sum(range(R)), sum(range(1, R)), sum(range(2, R))]


def test_the_losses_read_beyond_2_31_values(draw):
    T = 8
    logits = torch.zeros(BEYOND // T + 1000, T, dtype=torch.bfloat16, device="cuda")
    logits[-FAR_ROWS:] = 40.0
    labels = torch.full(logits.shape, float("nan"), device="cuda")
    labels[-FAR_ROWS:] = 0.0
    loss = multitask_bce(logits, labels, torch.ones(T, device="cuda"))
    torch.testing.assert_close(loss * len(logits), torch.tensor(40.0 * T * FAR_ROWS, device="cuda"), rtol=1e-4, atol=0)
    del logits, labels

    D, N = 128, 64
    query = torch.zeros(BEYOND // D + 1000, D, dtype=torch.bfloat16, device="cuda")
    query[-FAR_ROWS:] = draw(FAR_ROWS, D) * 8
    negative = draw(N, D) * 8
    ids = torch.arange(len(query), device="cuda")
    log_q = torch.zeros(len(query), device="cuda")
    other = (negative, log_q[:N], torch.full((N,), -1, device="cuda"))
    loss = sampled_softmax(query, query, other[0], log_q, other[1], ids, other[2], 1.0)
    far, far_log_q, far_ids = query[-FAR_ROWS:].clone(), log_q[-FAR_ROWS:].clone(), ids[-FAR_ROWS:].clone()
    few = sampled_softmax(far, far, other[0], far_log_q, other[1], far_ids, other[2], 1.0)
    assert torch.equal(loss[-FAR_ROWS:], few)


def operations(draw):
    """(name, changing input, call) of every operation that a graph may hold."""
    D, N = 64, 100_000
    items = draw(N, D)
    excluded = pack_excluded(torch.arange(N, device="cuda")[None] % 3 == 0)
    tables = build_tables([(torch.arange(1, 1000), torch.randn(1000, D).bfloat16())]).to("cuda")
    ids = torch.randint(0, 1200, (5000,)).cuda()  # a capture that failed in another test leaves the GPU's generator unusable
    weights, lengths = block_weights(draw, D, 128), torch.tensor([90], device="cuda")
    of = torch.zeros(500, dtype=torch.int64, device="cuda")
    layers = draw(64, 32), draw(64, D), draw(64), draw(32, 64), draw(32), draw(4, 32), draw(4), draw(4)
    start = torch.arange(4096, device="cuda")
    prefix = torch.arange(4096, device="cuda")[:, None].expand(-1, 4).cumsum(0).contiguous()
    lower = torch.randint(0, 2000, (500, 6)).cuda()
    upper = torch.randint(2000, 4096, (500,)).cuda()
    runs = torch.tensor([0, 4096], device="cuda")
    labels, unit = (draw(500, 8) > 0).float(), torch.ones(8, device="cuda")
    user = draw(1, 32)
    return [
        ("top_k", draw(64, D), lambda query: top_k(query, items, 100, excluded=excluded)),
        ("embedding_lookup", ids, lambda ids: embedding_lookup(ids, torch.zeros_like(ids), tables)),
        ("sequence_block", draw(1, 100, D), lambda tokens: sequence_block(tokens, lengths, weights, 2)),
        (
            "late fusion",
            draw(500, D),
            lambda candidates: sequence_block(
                candidates[None, :100], lengths, weights, 2, candidates=candidates, user_of_candidate=of, fusion="late"
            ),
        ),
        ("l1_score", draw(500, D), lambda item: l1_score(user, item, of, *layers)),
        ("window_assembly", lower, lambda lower: window_assembly(start, prefix, runs, of, lower, upper)),
        ("multitask_bce", draw(500, 8), lambda logits: multitask_bce(logits, labels, unit)),
    ]


def test_a_replayed_graph_gives_the_same_bits(draw):
    for name, argument, call in operations(draw):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            call(argument)
        torch.cuda.current_stream().wait_stream(stream)
        graph, static = torch.cuda.CUDAGraph(), argument.clone()
        with torch.cuda.graph(graph), torch.no_grad():
            recorded = call(static)
        for changed in (argument, argument.flip(0), argument.roll(1, 0)):
            static.copy_(changed)
            graph.replay()
            with torch.no_grad():
                expected = call(changed.clone())
            for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (recorded, expected)), strict=True):
                assert torch.equal(got, want), name
