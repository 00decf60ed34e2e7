"""Raw 64-bit ids of many features to embedding rows, in one launch: hash, probe, gather, dequantise, pool.

    out[r] = pool over the ids of bag g = bag_of_row[r] of weights[row_base[f] + find(f, id)] * scale,   f = feature[g]

Each feature owns a range of rows, the first of which stands for every id it does not know, and an open-addressing hash table of
(id, row) pairs, side by side so that a probe is one memory sector. Probing is linear and stops after the longest probe that
building needed, so a full table ends too. Ids of a request stay where they are: rows of many candidates may name one bag.

Shape letters: n ids, G bags, R output rows, F features, D width, P slots, V rows of weights.
Bytes: n * (8 + 1.5 sectors of 32 + D * size) + R * D * size. At 4,096 x 200 ids, D = 64, bf16: 256 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.ahead_of_time import Case
from kernels.autograd import recompute_backward
from kernels.backend import Kernel, ceil_div, debug, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_indices, check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

EMPTY_ID = -(1 << 63)
"""Marks a free slot; the one id that no table can hold."""
POOLINGS = ("none", "sum", "mean")
WIDEST = 256
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class EmbeddingTables(NamedTuple):
    """Tables of all features in flat arrays; made by `build_tables`. Feature f owns slots slot_base[f] .. + slot_mask[f]."""

    slots: Tensor  # i64 [P, 2]: id, row within the feature
    slot_base: Tensor  # i64 [F]
    slot_mask: Tensor  # i64 [F]: number of slots - 1, slots being a power of two
    row_base: Tensor  # i64 [F]: the feature's row for unknown ids
    weights: Tensor  # [V, D]: fp32, bf16, fp16, fp64, or int8 with scale
    scale: Tensor | None  # [V]: step of an int8 row; its type is the output's
    longest_probe: int

    def to(self, device: torch.device | str) -> EmbeddingTables:
        """The same tables on another device."""
        return EmbeddingTables(
            self.slots.to(device), self.slot_base.to(device), self.slot_mask.to(device), self.row_base.to(device),
            self.weights.to(device), None if self.scale is None else self.scale.to(device), self.longest_probe,
        )  # fmt: skip


def build_tables(
    features: Sequence[tuple[Tensor, Tensor]], scales: Sequence[Tensor] | None = None, load: float = 0.5
) -> EmbeddingTables:
    """Tables from one (ids i64 [k], weights [k + 1, D]) per feature; row 0 of the weights is for unknown ids, on the CPU.

    scales: one [k + 1] per feature for int8 weights. load: the fullest a hash table may be; at 0.5 a known id takes 1.5 probes.
    Raises ValueError on an id given twice, the reserved id -2**63, or differing widths.
    """
    if not features:
        raise ValueError("features must hold at least one feature, got none")
    if not 0 < load <= 1:
        raise ValueError(f"load must lie in (0, 1], got {load}")
    width, dtype = features[0][1].shape[-1], features[0][1].dtype
    slots, slot_base, slot_mask, row_base = [], [], [], []
    num_slots = num_rows = longest = 0
    for f, (ids, weights) in enumerate(features):
        check_tensor(f"ids of feature {f}", ids, torch.int64, ("k",))
        check_tensor(f"weights of feature {f}", weights, dtype, (ids.shape[0] + 1, width))
        table, probe = _hash_table(f, ids, load)
        slots.append(table)
        slot_base.append(num_slots)
        slot_mask.append(table.shape[0] - 1)
        row_base.append(num_rows)
        num_slots, num_rows, longest = num_slots + table.shape[0], num_rows + weights.shape[0], max(longest, probe)
    return EmbeddingTables(
        torch.cat(slots), torch.tensor(slot_base), torch.tensor(slot_mask), torch.tensor(row_base),
        torch.cat([weights for _, weights in features]), None if scales is None else torch.cat(list(scales)), longest,
    )  # fmt: skip


def _hash_table(f: int, ids: Tensor, load: float) -> tuple[Tensor, int]:
    """Slots [capacity, 2] and the most probes an id takes. Of ids that meet at a free slot the first has it, the rest go on."""
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"ids of feature {f} must differ from each other, got {ids.numel() - ids.unique().numel()} twice")
    if bool((ids == EMPTY_ID).any()):
        raise ValueError(f"ids of feature {f} must not contain {EMPTY_ID}: it marks a free slot")
    capacity = next_power_of_2(max(1, ceil_div(ids.numel() * 1000, round(load * 1000))))
    table = torch.tensor([[EMPTY_ID, 0]]).repeat(capacity, 1)
    waiting, slot, probes = torch.arange(ids.numel()), _mix(ids) & (capacity - 1), 0
    while waiting.numel():
        probes += 1
        free = table[slot, 0] == EMPTY_ID
        first = torch.full((capacity,), ids.numel()).scatter_reduce(0, slot[free], waiting[free], "amin")
        placed = free & (first[slot] == waiting)
        table[slot[placed]] = torch.stack([ids[waiting[placed]], waiting[placed] + 1], dim=1)
        waiting, slot = waiting[~placed], (slot[~placed] + 1) & (capacity - 1)
    return table, probes


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finaliser (Appleby, public domain) in wrapping signed arithmetic."""
    low_31 = (1 << 31) - 1  # what a logical shift by 33 leaves of an arithmetic one
    x = (x ^ ((x >> 33) & low_31)) * -0xAE502812AA7333
    x = (x ^ ((x >> 33) & low_31)) * -0x3B314601E57A13AD
    return x ^ ((x >> 33) & low_31)


def _find(ids: Tensor, base: Tensor, mask: Tensor, slots: Tensor, longest_probe: int) -> Tensor:
    """Row within its feature of every id; 0 where it is unknown."""
    row, waiting, slot = torch.zeros_like(ids), ids != EMPTY_ID, _mix(ids) & mask
    for _ in range(longest_probe):
        key, value = slots[base + slot].unbind(1)
        row = torch.where(waiting & (key == ids), value, row)
        waiting = waiting & (key != ids) & (key != EMPTY_ID)
        slot = (slot + 1) & mask
    return row


def embedding_lookup_reference(
    ids: Tensor, feature: Tensor, offsets: Tensor | None, bag_of_row: Tensor | None, slots: Tensor, slot_base: Tensor,
    slot_mask: Tensor, row_base: Tensor, weights: Tensor, scale: Tensor | None, longest_probe: int, pooling: str,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, any device."""
    G = feature.shape[0]
    bag = torch.arange(G, device=ids.device)
    count = torch.ones_like(bag) if offsets is None else offsets.diff()
    bag = bag.repeat_interleave(count, output_size=ids.shape[0])
    of = feature[bag]
    place = row_base[of] + _find(ids, slot_base[of], slot_mask[of], slots, longest_probe)
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    value = weights[place].to(wide)
    if scale is not None:
        value = value * scale[place].to(wide)[:, None]
    if pooling != "none":
        value = value.new_zeros(G, weights.shape[1]).index_add(0, bag, value)
    if pooling == "mean":
        value = value / count.clamp(min=1)[:, None]
    value = value.to(weights.dtype if scale is None else scale.dtype)
    return value if bag_of_row is None else value[bag_of_row]


@Kernel
def _mix_bits(x):
    x = x.to(tl.uint64)
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


@Kernel
def _embedding_lookup_kernel(
    ids_ptr, feature_ptr, offsets_ptr, bag_of_row_ptr, slots_ptr, slot_base_ptr, slot_mask_ptr, row_base_ptr,
    weights_ptr, scale_ptr, out_ptr, NUM_IDS, G, R, F, P, V, LONGEST,
    D: tl.constexpr, BAGS: tl.constexpr, NAMED: tl.constexpr, SCALED: tl.constexpr, MEAN: tl.constexpr,
    EMPTY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    in_r, in_d = r < R, d < D

    bag = r
    if NAMED:
        bag = tl.load(bag_of_row_ptr + r, mask=in_r, other=-1)
    usable = in_r & (bag >= 0) & (bag < G)
    f = tl.load(feature_ptr + bag, mask=usable, other=-1)
    usable = usable & (f >= 0) & (f < F)
    if BAGS:
        begin = tl.load(offsets_ptr + bag, mask=usable, other=0)
        end = tl.load(offsets_ptr + bag + 1, mask=usable, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), NUM_IDS)
        count = tl.where(usable, tl.minimum(tl.maximum(end, begin), NUM_IDS) - begin, 0)
    else:
        begin = bag
        count = usable.to(tl.int64)
    base = tl.load(slot_base_ptr + f, mask=usable, other=0)
    mask = tl.load(slot_mask_ptr + f, mask=usable, other=0)
    row_base = tl.load(row_base_ptr + f, mask=usable, other=0)

    pooled = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i in range(0, tl.max(count, 0)):
        active = i < count
        id = tl.load(ids_ptr + begin + i, mask=active, other=EMPTY)
        slot = _mix_bits(id).to(tl.int64) & mask
        row = tl.zeros((BLOCK_R,), tl.int64)
        waiting = active & (id != EMPTY)
        probe = 0
        while (tl.max(waiting.to(tl.int32), 0) > 0) & (probe < LONGEST):
            place = base + slot
            key = tl.load(slots_ptr + 2 * place, mask=waiting & (place >= 0) & (place < P), other=EMPTY)
            hit = waiting & (key == id)
            row = tl.where(hit, tl.load(slots_ptr + 2 * place + 1, mask=hit, other=0), row)
            waiting = waiting & (key != id) & (key != EMPTY)
            slot = (slot + 1) & mask
            probe += 1
        place = row_base + row
        active = active & (place >= 0) & (place < V)
        value = tl.load(weights_ptr + place[:, None] * D + d[None, :], mask=active[:, None] & in_d[None, :], other=0)
        value = value.to(tl.float32)
        if SCALED:
            value = value * tl.load(scale_ptr + place, mask=active, other=0.0).to(tl.float32)[:, None]
        pooled += value
    if MEAN:
        pooled = pooled / tl.maximum(count, 1).to(tl.float32)[:, None]
    tl.store(out_ptr + r[:, None] * D + d[None, :], pooled, mask=in_r[:, None] & in_d[None, :])


def configuration(D: int) -> dict[str, int]:
    """Tiles: about 2,048 values in flight per program, which is one warp: what waits is many programs, not one."""
    block_d = next_power_of_2(D)
    return {"D": D, "BLOCK_R": max(8, min(64, 2048 // block_d)), "BLOCK_D": block_d, "num_warps": 1, "num_stages": 1}


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: one id a row and bags, plain and quantised, narrow and wide."""
    cases = []
    whole = ("ids", "feature", "offsets", "bag_of_row", "slots", "slot_base", "slot_mask", "row_base")
    for weights, out, D, pooling in (
        ("bf16", "bf16", 64, "none"), ("fp32", "fp32", 128, "mean"), ("i8", "fp16", 64, "sum"), ("bf16", "bf16", 256, "sum"),
    ):  # fmt: skip
        types = {f"{name}_ptr": "*i64" for name in whole}
        types |= {"weights_ptr": f"*{weights}", "scale_ptr": f"*{out}", "out_ptr": f"*{out}"}
        switches = {
            "BAGS": pooling != "none", "NAMED": pooling != "none", "SCALED": weights == "i8", "MEAN": pooling == "mean",
            "EMPTY": EMPTY_ID,
        }  # fmt: skip
        cases.append(Case(f"{weights} D{D} {pooling}", _embedding_lookup_kernel, types, {**configuration(D), **switches}))
    return cases


def launch(
    ids: Tensor, feature: Tensor, offsets: Tensor | None, bag_of_row: Tensor | None, tables: EmbeddingTables, pooling: str,
    out: Tensor,
) -> None:  # fmt: skip
    """The Triton kernel into `out` [R, D]. Contiguous tensors; nothing is checked here."""
    R = out.shape[0]
    if out.numel() == 0:
        return
    config = configuration(out.shape[1])
    with device_of(out):
        _embedding_lookup_kernel[(ceil_div(R, config["BLOCK_R"]),)](
            ids, feature, ids if offsets is None else offsets, ids if bag_of_row is None else bag_of_row,
            tables.slots, tables.slot_base, tables.slot_mask, tables.row_base,
            tables.weights, tables.weights if tables.scale is None else tables.scale, out,
            ids.shape[0], feature.shape[0], R, tables.slot_base.shape[0], tables.slots.shape[0], tables.weights.shape[0],
            tables.longest_probe, **config, BAGS=offsets is not None, NAMED=bag_of_row is not None,
            SCALED=tables.scale is not None, MEAN=pooling == "mean", EMPTY=EMPTY_ID,
        )  # fmt: skip


def _check_contents(ids: Tensor, feature: Tensor, offsets: Tensor | None, bag_of_row: Tensor | None, num_features: int) -> None:
    check_indices("feature", feature, 0, num_features)
    if bag_of_row is not None:
        check_indices("bag_of_row", bag_of_row, 0, feature.shape[0])
    if offsets is not None:
        n = ids.shape[0]
        if int(offsets[0]) != 0 or int(offsets[-1]) != n or bool((offsets[1:] < offsets[:-1]).any()):
            raise ValueError(f"offsets must rise from 0 to {n}, the number of ids, got {int(offsets[0])} .. {int(offsets[-1])}")


def _check_tables(slots: Tensor, slot_base: Tensor, slot_mask: Tensor, row_base: Tensor, weights: Tensor) -> None:
    check_indices("slot_base", slot_base, 0, slots.shape[0])
    check_indices("slot_mask", slot_mask, 0, slots.shape[0])
    check_indices("slot_base + slot_mask", slot_base + slot_mask, 0, slots.shape[0])
    check_indices("row_base", row_base, 0, weights.shape[0])
    check_indices("rows in slots", slots[:, 1], 0, weights.shape[0])


def _run(
    ids: Tensor, feature: Tensor, offsets: Tensor | None, bag_of_row: Tensor | None, slots: Tensor, slot_base: Tensor,
    slot_mask: Tensor, row_base: Tensor, weights: Tensor, scale: Tensor | None, longest_probe: int, pooling: str,
) -> Tensor:  # fmt: skip
    if debug() or not ids.is_cuda:
        _check_contents(ids, feature, offsets, bag_of_row, slot_base.shape[0])
    if debug():
        _check_tables(slots, slot_base, slot_mask, row_base, weights)
    if weights.dtype not in KERNEL_TYPES or weights.shape[1] > WIDEST or not use_triton(ids):
        return embedding_lookup_reference(
            ids, feature, offsets, bag_of_row, slots, slot_base, slot_mask, row_base, weights, scale, longest_probe, pooling
        )
    tables = EmbeddingTables(
        slots.contiguous(), slot_base.contiguous(), slot_mask.contiguous(), row_base.contiguous(), weights.contiguous(),
        None if scale is None else scale.contiguous(), longest_probe,
    )  # fmt: skip
    out = _empty(feature, bag_of_row, weights, scale)
    launch(
        ids.contiguous(), feature.contiguous(), None if offsets is None else offsets.contiguous(),
        None if bag_of_row is None else bag_of_row.contiguous(), tables, pooling, out,
    )  # fmt: skip
    return out


def _empty(feature: Tensor, bag_of_row: Tensor | None, weights: Tensor, scale: Tensor | None) -> Tensor:
    rows = feature.shape[0] if bag_of_row is None else bag_of_row.shape[0]
    return weights.new_empty(rows, weights.shape[1], dtype=weights.dtype if scale is None else scale.dtype)


_operator = torch.library.custom_op("headrace::embedding_lookup", _run, mutates_args=(), device_types=("cpu", "cuda"))
recompute_backward(_operator, embedding_lookup_reference)


@_operator.register_fake
def _(
    ids: Tensor, feature: Tensor, offsets: Tensor | None, bag_of_row: Tensor | None, slots: Tensor, slot_base: Tensor,
    slot_mask: Tensor, row_base: Tensor, weights: Tensor, scale: Tensor | None, longest_probe: int, pooling: str,
) -> Tensor:  # fmt: skip
    return _empty(feature, bag_of_row, weights, scale)


def embedding_lookup(
    ids: Tensor, feature: Tensor, tables: EmbeddingTables, *, offsets: Tensor | None = None, bag_of_row: Tensor | None = None,
    pooling: str = "none",
) -> Tensor:  # fmt: skip
    """Embeddings [R, D] of R output rows, in the weights' type (the scale's, for int8 tables).

    ids i64 [n]. With pooling "none", feature i64 [n] names each id's feature. With "sum" or "mean", offsets i64 [G + 1] cuts
    the ids into G bags and feature i64 [G] is each bag's; an empty bag gives zeros. bag_of_row i64 [R]: the bag (or id) of each
    output row, so that one user's bags serve all candidates; left out, every bag is one row. An unknown id gets its feature's
    first row.

    Sums are fp32. Differentiable in weights and scale. Raises TypeError, ValueError or IndexError, naming the argument; on a
    GPU the insides of feature, offsets and bag_of_row are checked in debug mode only, and a bad one then reads as zeros.
    Tables wider than 256 take the reference.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    check_tensor("ids", ids, torch.int64, ("n",))
    check_tensor("feature", feature, torch.int64, ("G",) if pooling != "none" else (ids.shape[0],))
    if (offsets is None) != (pooling == "none"):
        raise ValueError(f"offsets must be {'None' if pooling == 'none' else 'given'} with pooling {pooling!r}")
    if offsets is not None:
        check_tensor("offsets", offsets, torch.int64, (feature.shape[0] + 1,))
    if bag_of_row is not None:
        check_tensor("bag_of_row", bag_of_row, torch.int64, ("R",))
    check_tensor("weights", tables.weights, (*KERNEL_TYPES, torch.float64), ("V", "D"))
    if (tables.scale is None) == (tables.weights.dtype == torch.int8):
        raise ValueError(f"scale must be given with int8 weights and with no others, got weights of {tables.weights.dtype}")
    if tables.scale is not None:
        check_tensor("scale", tables.scale, (torch.float32, torch.bfloat16, torch.float16), (tables.weights.shape[0],))
    check_tensor("slots", tables.slots, torch.int64, ("P", 2))
    check_tensor("slot_base", tables.slot_base, torch.int64, ("F",))
    for name in ("slot_mask", "row_base"):
        check_tensor(name, getattr(tables, name), torch.int64, (tables.slot_base.shape[0],))
    tensors = {name: value for name, value in tables._asdict().items() if name != "longest_probe"}
    check_same_device(ids=ids, feature=feature, offsets=offsets, bag_of_row=bag_of_row, **tensors)
    arguments = (ids, feature, offsets, bag_of_row, *tables, pooling)
    return (_run if eager(*arguments) else _operator)(*arguments)
