"""Kernels beside plain PyTorch and the machine's own ceilings.

    python -m bench.kernels --quick      under ten minutes on one GPU; seconds without one (small shapes on the CPU)

First the roofline of every case: the bytes and operations it cannot avoid, and the time they take at an H200's ceilings. Then
the ceilings of this machine, then each case, checked against plain PyTorch before it is timed: ours as a CUDA graph, plain
PyTorch as it comes ("eager"), as a CUDA graph ("graph"), and by torch.compile as a CUDA graph. The table comes last, JSON
beside it (rewritten after every case, so an interrupted run leaves what it measured).
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from kernels.embedding_lookup import build_tables, embedding_lookup
from kernels.feature_arena import FeatureArena
from kernels.l1_score import l1_score
from kernels.multitask_bce import multitask_bce, multitask_bce_reference
from kernels.sampled_softmax import sampled_softmax, sampled_softmax_reference
from kernels.sequence_block import BlockWeights, sequence_block, sequence_block_reference
from kernels.top_k import top_k
from kernels.window_assembly import window_assembly
from warehouse.home import Home

H200_BYTES_PER_S, H200_FLOP_PER_S = 4.3e12, 788e12
"""Ceilings reported for one H200: a device copy, and an 8192 x 8192 x 8192 product in bf16."""
L2_BYTES = 60e6
CASE_LIMIT_S = 60.0

Call = Callable[[], Any]


@dataclass
class Case:
    """One operation at one shape. `make(device, seed)` returns (ours, plain PyTorch), both ready to call."""

    operation: str
    shape: str
    bytes: float
    flop: float
    make: Callable[[torch.device, int], tuple[Call, Call]]
    tolerance: float = 1e-3
    peers: Callable[[torch.device, int], dict[str, Call]] = lambda device, seed: {}
    """Other libraries' calls on the same inputs, by name, of those that are installed; each waits for its result."""


@dataclass
class Row:
    """What came out, in microseconds; None where it was not measured."""

    operation: str
    shape: str
    ours_us: float | None = None
    eager_us: float | None = None
    eager_graph_us: float | None = None
    compiled_us: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    share_of_roofline: float | None = None
    note: str = ""


@dataclass
class Report:
    """Everything that is written as JSON."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(asdict(self), indent=1))
        os.replace(unfinished, path)


def window_case(N: int, M: int, W: int, K: int, R: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.bincount(torch.randint(0, K, (R,), generator=rng), minlength=K)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        block_start = torch.cat([torch.randperm(4096, generator=rng)[:n].sort().values for n in lengths.tolist()])
        counts = torch.randint(0, 100, (R, M), generator=rng)
        prefix = torch.cat([run.cumsum(0) for run in counts.split(lengths.tolist())])
        row = torch.randint(0, K, (N,), generator=rng)
        upper = torch.randint(2048, 4096, (N,), generator=rng)
        lower = upper[:, None] - torch.randint(1, 2048, (N, W), generator=rng)
        inputs = [t.to(device) for t in (block_start, prefix, offsets, row, lower, upper)]
        counts, longest = counts.to(device), int(lengths.max())

        def plain() -> Tensor:  # every block of every candidate's run, compared with every window
            block_start, _, offsets, row, lower, upper = inputs
            place = offsets[row, None] + torch.arange(longest, device=device)
            inside = place < offsets[row + 1, None]
            place = place.clamp(max=R - 1)
            start = block_start[place]
            in_window = (inside & (start < upper[:, None]))[:, :, None] & (start[:, :, None] >= lower[:, None, :])
            return torch.einsum("nbm,nbw->nmw", counts[place].double(), in_window.double()).long().flatten(1)

        return lambda: window_assembly(*inputs), plain

    touched = N * (8 + 8 * (1 + W)) + N * (1 + W) * (8 * 8 + 8 * M) + 8 * N * M * W
    return Case("window_assembly", f"{N} x {M * W} of {R} blocks", touched, 0, make, tolerance=0)


def l1_case(N: int, D: int, F: int, H: int, G: int, T: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        draw = _draw(device, seed)
        user, item = draw(1, D), draw(N, F)
        of = torch.zeros(N, dtype=torch.int64, device=device)
        weights = draw(H, D), draw(H, F), draw(H), draw(G, H), draw(G), draw(T, G), draw(T), draw(T)

        def plain() -> Tensor:  # the user copied to every item
            first_user, first_item, first_bias, second, second_bias, heads, heads_bias, mix = weights
            x = torch.cat([user[of], item], dim=1)
            x = torch.relu(linear(x, torch.cat([first_user, first_item], dim=1), first_bias))
            x = torch.relu(linear(x, second, second_bias))
            return torch.sigmoid(linear(x, heads, heads_bias).float()) @ mix.float()

        return lambda: l1_score(user, item, of, *weights)[0], plain

    flop = 2 * N * (F * H + H * G + G * T)
    return Case("l1_score", f"{N} x ({D}+{F})-{H}-{G}-{T}", 2 * (N * F + F * H + H * G) + 4 * N * (1 + T), flop, make, 3e-2)


def block_case(fusion: str, B: int, S: int, D: int, F: int, heads: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        draw = _draw(device, seed)
        E = D if fusion == "late" else D // 2
        tokens, candidates = draw(1, S, E) * E**0.5, draw(B, D if fusion == "late" else D - E) * E**0.5
        lengths = torch.tensor([S], device=device)
        of, each = torch.zeros(B, dtype=torch.int64, device=device), torch.arange(B, device=device)
        weights = BlockWeights(
            draw(3 * D, D), draw(3 * D), draw(D, D), draw(D), draw(D) + 1, draw(D),
            draw(F, D), draw(F), draw(D, F), draw(D), draw(D) + 1, draw(D),
        )  # fmt: skip

        def ours() -> Tensor:
            return sequence_block(tokens, lengths, weights, heads, candidates=candidates, user_of_candidate=of, fusion=fusion)

        def plain() -> Tensor:  # the sequence copied to every candidate
            copied = tokens.expand(B, -1, -1).contiguous()
            return sequence_block_reference(
                copied, lengths.expand(B), candidates, each, *weights, heads, fusion, False, "softmax"
            )

        return ours, plain

    queries = B if fusion == "late" else B * S
    keys = S if fusion == "late" else B * S
    flop = queries * (4 * D * D + 4 * S * D + 4 * D * F) + keys * 4 * D * D
    return Case(
        "sequence_block",
        f"{fusion} {B} x {S} x d{D} ff{F}",
        2 * (S * D + queries * D + 4 * D * D + 2 * D * F),
        flop,
        make,
        6e-2,
    )


def top_k_case(B: int, N: int, D: int, k: int) -> Case:
    def drawn(device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(torch.randn(rows, D, generator=generator, device=device, dtype=_dtype(device)) for rows in (B, N))

    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        queries, items = drawn(device, seed)
        return lambda: top_k(queries, items, k)[0], lambda: (queries @ items.T).float().topk(k, dim=1).values

    def peers(device: torch.device, seed: int) -> dict[str, Call]:
        queries, items = drawn(device, seed)
        return {**_jax_top_k(queries, items, k), **_faiss_top_k(queries, items, k)}

    least = 2 * N * D + 8 * B * N / 32
    return Case("top_k", f"{B} queries, {N} x d{D}, k {k}", least, 2 * B * N * D, make, 2e-2, peers)


def _jax_top_k(queries: Tensor, items: Tensor, k: int) -> dict[str, Call]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the GPU's memory
    try:
        import jax
    except ImportError:
        return {}
    q, x = (jax.dlpack.from_dlpack(tensor) for tensor in (queries, items))
    exact = jax.jit(lambda q, x: jax.lax.top_k(q @ x.T, k))
    return {"JAX": lambda: jax.block_until_ready(exact(q, x))}


def _faiss_top_k(queries: Tensor, items: Tensor, k: int) -> dict[str, Call]:
    try:
        import faiss
    except ImportError:
        return {}
    index = faiss.IndexFlatIP(items.shape[1])
    if items.is_cuda:
        if not hasattr(faiss, "StandardGpuResources"):
            return {}
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), items.device.index or 0, index)
    q, x = (tensor.float().cpu().numpy() for tensor in (queries, items))
    index.add(x)
    return {"FAISS": lambda: index.search(q, k)}


def embedding_case(B: int, F: int, D: int, rows: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        rng = torch.Generator().manual_seed(seed)
        weights = [torch.randn(rows + 1, D, generator=rng).to(_dtype(device)) for _ in range(F)]
        keys = [torch.randint(1, 2**62, (rows,), generator=rng).unique() for _ in range(F)]
        tables = build_tables([(k, w[: len(k) + 1]) for k, w in zip(keys, weights, strict=True)]).to(device)
        place = torch.stack([torch.randint(0, len(k), (B,), generator=rng) for k in keys], dim=1)
        ids = torch.stack([k[place[:, f]] for f, k in enumerate(keys)], dim=1).flatten().to(device)
        feature = torch.arange(F).repeat(B).to(device)
        by_feature = [(*k.to(device).sort(), w.to(device)) for k, w in zip(keys, weights, strict=True)]

        def plain() -> Tensor:  # feature by feature: a binary search among its sorted ids, then the rows
            out = []
            for f, (known, order, weight) in enumerate(by_feature):
                asked = ids.view(B, F)[:, f].contiguous()
                place = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
                out.append(embedding(torch.where(known[place] == asked, order[place] + 1, 0), weight))
            return torch.stack(out, dim=1).flatten(0, 1)

        return lambda: embedding_lookup(ids, feature, tables), plain

    n = B * F
    return Case("embedding_lookup", f"{B} x {F} ids, d{D}", n * (8 + 8 + 48 + 4 * D), 0, make, tolerance=0)


def arena_case(tensors: int, rows: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        rng = torch.Generator().manual_seed(seed)
        values = {f"column_{i}": torch.randn(rows, generator=rng) for i in range(tensors)}
        layout = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
        arena = FeatureArena(tensors * (4 * rows + 256), device)

        def ours() -> Tensor:
            views = arena.reserve(layout)
            for name, value in values.items():
                views[name].copy_(value)
            return arena.send()["column_0"]

        def plain() -> Tensor:
            sent = [value.to(device, copy=True) for value in values.values()]
            return sent[0]

        return ours, plain

    return Case("feature_arena", f"{tensors} tensors of {rows}", 2 * 4 * tensors * rows, 0, make, tolerance=0)


def bce_case(B: int, T: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        draw = _draw(device, seed)
        logits, labels = draw(B, T).float() * 9, (draw(B, T) > 0).float()
        weight = torch.ones(T, device=device)
        return lambda: multitask_bce(logits, labels, weight), lambda: multitask_bce_reference(logits, labels, weight)

    return Case("multitask_bce", f"{B} x {T}", 8 * B * T, 0, make)


def softmax_case(B: int, N: int, D: int) -> Case:
    def make(device: torch.device, seed: int) -> tuple[Call, Call]:
        draw = _draw(device, seed)
        vectors = [draw(rows, D).requires_grad_() for rows in (B, B, N)]
        query, positive, negative = vectors
        log_q_B, log_q_N = torch.zeros(B, device=device), torch.zeros(N, device=device)
        positive_id, negative_id = torch.arange(B, device=device), torch.arange(N, device=device) + B // 2
        arguments = (query, positive, negative, log_q_B, log_q_N, positive_id, negative_id, 0.1)

        def with_gradients(loss: Tensor) -> Tensor:
            return torch.autograd.grad(loss.sum(), vectors)[0]

        def plain() -> Tensor:
            return with_gradients(sampled_softmax_reference(*arguments)[0])

        return lambda: with_gradients(sampled_softmax(*arguments)), plain

    return Case("sampled_softmax", f"{B} x {N} x d{D}, with gradients", 2 * D * (4 * B + 2 * N), 10 * B * N * D, make, 6e-2)


GPU_CASES = (
    window_case(2000, 8, 6, 2000, 150_000),
    l1_case(2000, 64, 64, 128, 64, 4),
    l1_case(100_000, 1024, 256, 512, 256, 8),
    block_case("late", 500, 100, 64, 128, 2),
    block_case("early", 256, 192, 64, 32, 1),
    block_case("early", 512, 256, 128, 128, 2),
    top_k_case(64, 10_000_000, 128, 1000),
    embedding_case(4096, 200, 64, 10_000),
    arena_case(40, 4096),
    bce_case(65_536, 8),
    softmax_case(8192, 8192, 128),
)
CPU_CASES = (  # where the reference does something else than plain PyTorch would
    window_case(2000, 8, 6, 2000, 150_000),
    l1_case(2000, 64, 48, 64, 32, 2),
    block_case("late", 500, 100, 64, 128, 2),
    top_k_case(1, 50_000, 64, 500),
    embedding_case(64, 50, 32, 200),
)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _draw(device: torch.device, seed: int) -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: (torch.randn(shape, generator=rng) / shape[-1] ** 0.5).to(device, _dtype(device))


def microseconds(groups: list[list[Call]], device: torch.device) -> list[float]:
    """Time of one call of each group, the groups taking turns, so that what disturbs one disturbs the other: on a GPU the
    median, on a CPU, where noise only ever adds, the fastest tenth. Calls of a group have inputs of their own.
    """
    for call in itertools.chain(*groups, *groups):
        call()
    times: list[list[float]] = [[] for _ in groups]
    started = time.perf_counter()
    while (len(times[0]) < 20 or time.perf_counter() - started < 1) and time.perf_counter() - started < CASE_LIMIT_S / 4:
        for calls, of_group in zip(groups, times, strict=True):
            of_group.append(_once(calls, device) / len(calls))
    if device.type == "cuda":
        return [statistics.median(of_group) for of_group in times]
    return [sorted(of_group)[len(of_group) // 10] for of_group in times]


def _once(calls: list[Call], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3
    begin_s = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin_s) * 1e6


def _on_the_clock(call: Call) -> float:
    """Median microseconds of a call that waits for its result: other libraries do not run on PyTorch's stream."""
    call()
    times = []
    while len(times) < 5 or (len(times) < 50 and sum(times) < 1e6):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def replayed(calls: list[Call], device: torch.device) -> list[Call]:
    """The calls as one CUDA graph, so that what is timed is the GPU; as they are where that cannot be (or on the CPU)."""
    if device.type != "cuda":
        return calls
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return calls
    return [graph.replay]


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes per second of a copy, FLOP per second of a square product) on this machine."""
    elements, side = (2**29, 8192) if device.type == "cuda" else (2**24, 1024)
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device, dtype=_dtype(device))
    copy_us, product_us = microseconds([[lambda: target.copy_(source)], [lambda: square @ square]], device)
    return 2 * 2 * elements / copy_us * 1e6, 2 * side**3 / product_us * 1e6


def measure(case: Case, device: torch.device, roof: tuple[float, float], quick: bool) -> Row:
    row = Row(case.operation, case.shape)
    sets = max(1, min(8, round(2 * L2_BYTES / case.bytes))) if device.type == "cuda" else 1
    made = [case.make(device, seed) for seed in range(sets)]
    got, expected = made[0][0]().detach().double(), made[0][1]().detach().double()
    scale = expected.abs().max().item() or 1.0
    error = (got - expected).abs().max().item() / scale
    if not error <= case.tolerance:
        row.note = f"WRONG: off by {error:.1e} of the largest value, {case.tolerance:.0e} allowed"
        return row
    ours = replayed([pair[0] for pair in made], device)
    ours_us, row.eager_us = microseconds([ours, [pair[1] for pair in made]], device)
    row.ours_us = ours_us * len(ours) / sets  # a graph is one call for all sets
    if device.type == "cuda" and case.operation != "feature_arena":
        row.eager_graph_us = microseconds([replayed([made[0][1]], device)], device)[0]
        row.compiled_us = _compiled(made[0][1], device, quick)
    for name, call in case.peers(device, 0).items():
        row.peers_us[name] = _on_the_clock(call)
    row.gb_per_s = case.bytes / row.ours_us / 1e3
    row.tflop_per_s = case.flop / row.ours_us / 1e6
    row.share_of_roofline = max(case.bytes / roof[0], case.flop / roof[1]) * 1e6 / row.ours_us
    return row


def _compiled(plain: Call, device: torch.device, quick: bool) -> float | None:
    """Replayed like ours, so that it is not the launches that are compared."""
    try:
        call = torch.compile(plain, mode="default" if quick else "max-autotune-no-cudagraphs")
        call()
        return microseconds([replayed([call], device)], device)[0]
    except Exception as error:  # a compiler's failure is a result, whatever its kind
        print(f"  torch.compile: {type(error).__name__}", file=sys.stderr)
        return None


def print_rooflines(cases: tuple[Case, ...]) -> None:
    print("Rooflines: what each case cannot avoid, and its least time at an H200's ceilings (4.3 TB/s, 788 TFLOP/s bf16)")
    print(f"{'operation':<17} {'shape':<36} {'MB':>9} {'GFLOP':>9} {'least us':>9}  bound")
    for case in cases:
        memory, compute = case.bytes / H200_BYTES_PER_S * 1e6, case.flop / H200_FLOP_PER_S * 1e6
        bound = "launch" if max(memory, compute) < 5 else "memory" if memory >= compute else "compute"
        print(
            f"{case.operation:<17} {case.shape:<36} {case.bytes / 1e6:>9.2f} {case.flop / 1e9:>9.2f} "
            f"{max(memory, compute):>9.2f}  {bound}"
        )


def print_table(rows: list[Row]) -> None:
    def number(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    print(
        f"{'operation':<17} {'shape':<36} {'ours us':>9} {'eager us':>9} {'ratio':>6} {'graph us':>9} {'compile us':>10} "
        f"{'GB/s':>7} {'TFLOP/s':>8} {'of roof':>7}  others, us"
    )
    for row in rows:
        ratio = row.eager_us / row.ours_us if row.eager_us and row.ours_us else None
        print(
            f"{row.operation:<17} {row.shape:<36} {number(row.ours_us):>9} {number(row.eager_us):>9} {number(ratio):>6} "
            f"{number(row.eager_graph_us):>9} {number(row.compiled_us):>10} "
            f"{number(row.gb_per_s):>7} {number(row.tflop_per_s, '.3f'):>8} "
            f"{number(row.share_of_roofline and 100 * row.share_of_roofline, '.0f'):>6}%  "
            + ", ".join(f"{name} {us:.0f}" for name, us in row.peers_us.items())
            + row.note
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="torch.compile as it comes, not tuned to each shape (which takes minutes)"
    )
    parser.add_argument("--only", metavar="OPERATION", help="cases of one operation")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the JSON (default: <home>/bench/kernels.json)"
    )
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {case.operation for case in GPU_CASES}
    if options.only and options.only not in known:
        parser.error(f"--only must be one of {', '.join(sorted(known))}, got {options.only!r}")
    print_rooflines(tuple(case for case in GPU_CASES if options.only in (None, case.operation)))
    if device.type == "cpu":
        print("\nNo GPU here: none of the above is measured. The plain references on this CPU follow, at smaller shapes.")

    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    roof = ceilings(device)
    print(f"\nThis machine: {name}, torch {torch.__version__}")
    print(f"Its ceilings: {roof[0] / 1e9:.0f} GB/s copy, {roof[1] / 1e12:.2f} TFLOP/s product\n")
    report = Report({"device": name, "torch": torch.__version__, "bytes_per_s": roof[0], "flop_per_s": roof[1]})
    path = options.json or Home.from_env().path / "bench" / "kernels.json"
    for case in GPU_CASES if device.type == "cuda" else CPU_CASES:
        if options.only in (None, case.operation):
            report.rows.append(measure(case, device, roof, options.quick))
            report.write(path)
    print_table(report.rows)
    print(f"\nalso in {path}")
    return 1 if any(row.note for row in report.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
