"""One transformer layer over users' sequences, in one operation: a product of projections, then one kernel
for attention, output, norms and feed-forward.

    attended = softmax(q @ k.T / sqrt(D / heads) + mask) @ v             (or, "silu": silu(q @ k.T / sqrt(...)) / length @ v)
    y        = norm1(x + attended @ out_weight.T + out_bias)
    out      = norm2(y + relu(y @ ff1_weight.T + ff1_bias) @ ff2_weight.T + ff2_bias)

which is nn.TransformerEncoderLayer (post-norm, relu, no dropout). With `norm_first` the norms stand before attention and
feed-forward instead; gelu may take the place of relu. Masks are computed from lengths, never read. Three forms:

    fusion none    tokens attend to the tokens of their own sequence                      -> [U, S, D]
    fusion early   each candidate gets its user's sequence, every token extended by it    -> [B, S, D], D = E + C
    fusion late    each candidate is one query over its user's sequence                   -> [B, D]

Neither the extended nor the broadcast sequences ever exist in memory: a candidate names its user by row.

Shape letters: U users, S positions, E token width, B candidates, C candidate width, D layer width, F feed-forward width.
FLOP: per query 2*D*D + 4*length*D + 4*D*F; projections 6*E*D per token of a user and 6*C*D per candidate, once (early fusion: a
layer's input is a token beside a candidate, so its projection is a sum, and of a key only the token's part matters to softmax).
Bytes: 3*D projected values per token, from L2 after the first tile; weights D*D + 2*D*F from L2; the output once.
Sources: TransAct V2 (the fused layer, weights kept on chip); HSTU (pointwise attention, here divided by the sequence's own
length, so that padding changes nothing); In-Kernel Broadcast Optimization (candidates name their user inside the kernel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from kernels.ahead_of_time import Case
from kernels.autograd import recompute_backward
from kernels.backend import Kernel, capability_of, ceil_div, debug, device_of, eager, next_power_of_2, use_triton
from kernels.checks import check_indices, check_same_device, check_tensor

if TYPE_CHECKING:
    import triton.language as tl

FUSIONS, ATTENTIONS, ACTIVATIONS = ("none", "early", "late"), ("softmax", "silu"), ("relu", "gelu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORM_EPSILON = 1e-5
LOG2_E = 1.4426950408889634
WIDEST_LAYER, WIDEST_HEAD = 128, 64


class BlockWeights(NamedTuple):
    """Weights of one layer as nn.TransformerEncoderLayer keeps them: [out, in], query, key and value stacked."""

    in_weight: Tensor  # [3D, D]
    in_bias: Tensor  # [3D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor  # [D]
    norm1_weight: Tensor  # [D]
    norm1_bias: Tensor  # [D]
    ff1_weight: Tensor  # [F, D]
    ff1_bias: Tensor  # [F]
    ff2_weight: Tensor  # [D, F]
    ff2_bias: Tensor  # [D]
    norm2_weight: Tensor  # [D]
    norm2_bias: Tensor  # [D]

    @classmethod
    def of(cls, layer: nn.TransformerEncoderLayer) -> BlockWeights:
        """The weights of a PyTorch layer, shared with it. Raises ValueError unless it is post-norm with relu and biases."""
        activation = getattr(layer.activation, "__name__", type(layer.activation).__name__).lower()
        if layer.norm_first or activation != "relu" or layer.linear1.bias is None:
            raise ValueError(f"layer must be post-norm with relu and biases, got norm_first={layer.norm_first}, {activation}")
        attention = layer.self_attn
        return cls(
            attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
            layer.norm1.weight, layer.norm1.bias, layer.linear1.weight, layer.linear1.bias,
            layer.linear2.weight, layer.linear2.bias, layer.norm2.weight, layer.norm2.bias,
        )  # fmt: skip


def sequence_block_reference(
    tokens: Tensor, lengths: Tensor, candidates: Tensor | None, user_of_candidate: Tensor | None,
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, norm1_weight: Tensor, norm1_bias: Tensor,
    ff1_weight: Tensor, ff1_bias: Tensor, ff2_weight: Tensor, ff2_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    num_heads: int, fusion: str, causal: bool, attention: str, norm_first: bool = False, activation: str = "relu",
) -> Tensor:  # fmt: skip
    """Plain PyTorch, any device and floating type."""
    D = in_weight.shape[1]
    one_user = tokens.shape[0] == 1
    if fusion == "early":
        assert candidates is not None
        assert user_of_candidate is not None
        spread = candidates[:, None, :].expand(-1, tokens.shape[1], -1)
        tokens, lengths = torch.cat([tokens[user_of_candidate], spread], dim=2), lengths[user_of_candidate]
    S = tokens.shape[1]

    def heads(x: Tensor) -> Tensor:  # [rows, positions, D] -> [rows, heads, positions, D / heads]
        return x.unflatten(2, (num_heads, D // num_heads)).transpose(1, 2)

    def norm1(x: Tensor) -> Tensor:
        return layer_norm(x, (D,), norm1_weight, norm1_bias, NORM_EPSILON)

    def norm2(x: Tensor) -> Tensor:
        return layer_norm(x, (D,), norm2_weight, norm2_bias, NORM_EPSILON)

    if fusion == "late":
        assert candidates is not None
        assert user_of_candidate is not None
        x = candidates[None] if one_user else candidates[:, None]
        query = linear(norm1(x) if norm_first else x, in_weight[:D], in_bias[:D])
        key, value = linear(norm1(tokens) if norm_first else tokens, in_weight[D:], in_bias[D:]).chunk(2, dim=2)
        if not one_user:
            key, value, lengths = key[user_of_candidate], value[user_of_candidate], lengths[user_of_candidate]
    else:
        x = tokens
        query, key, value = linear(norm1(x) if norm_first else x, in_weight, in_bias).chunk(3, dim=2)
    query, key, value = heads(query), heads(key), heads(value)

    position = torch.arange(S, device=tokens.device)
    inside = (position < lengths[:, None])[:, None, None, :]  # [rows, 1, 1, S]
    allowed = inside & (position <= position[:, None]) if causal else inside
    if attention == "silu":
        scores = silu(query @ key.transpose(2, 3) * (D // num_heads) ** -0.5) / lengths.clamp(min=1)[:, None, None, None].to(
            x.dtype
        )
        attended = scores.masked_fill(~allowed, 0) @ value
    else:
        # An empty sequence attends to nothing and gets zero; letting it see its padding first keeps the softmax finite.
        empty = (lengths <= 0)[:, None, None, None]
        attended = scaled_dot_product_attention(query, key, value, attn_mask=allowed | empty).masked_fill(empty, 0)
    attended = attended.transpose(1, 2).flatten(2)
    y = x + linear(attended, out_weight, out_bias)
    y = y if norm_first else norm1(y)
    hidden = linear(norm2(y) if norm_first else y, ff1_weight, ff1_bias)
    hidden = gelu(hidden) if activation == "gelu" else hidden.relu_()
    out = y + linear(hidden, ff2_weight, ff2_bias)
    out = out if norm_first else norm2(out)
    if fusion == "late":
        return out.reshape(-1, D)
    return out.masked_fill(~inside[:, 0, 0, :, None], 0)


@Kernel
def _layer_norm(x, weight_ptr, bias_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, EPSILON: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    mean = tl.sum(x, 1) / D
    centred = tl.where(in_d[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    weight = tl.load(weight_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    return centred * tl.rsqrt(variance + EPSILON)[:, None] * weight[None, :] + bias[None, :]


@Kernel
def _attend(
    q, of_candidate, attended, total, largest, keys_ptr, m, first_m, length, mine,
    D: tl.constexpr, STRIDE: tl.constexpr, HEAD: tl.constexpr,
    LATE: tl.constexpr, CAUSAL: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [BLOCK_M, BLOCK_H] over one user's keys and values: what they gathered so far and now."""
    h = tl.arange(0, BLOCK_H)
    in_h = h < HEAD
    past_n = length
    if CAUSAL:
        past_n = tl.minimum(length, first_m + BLOCK_M)
    for first_n in range(0, past_n, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        place = n[:, None] * STRIDE + h[None, :]
        there = (n < length)[:, None] & in_h[None, :]
        k = tl.load(keys_ptr + place, mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) + of_candidate[:, None]
        allowed = (n < length)[None, :]
        if CAUSAL:
            allowed = allowed & (n[None, :] <= m[:, None])
        if LATE:
            allowed = allowed & mine[:, None]
        if SOFTMAX:
            s = tl.where(allowed, s, -1e30)  # finite: a row with no key yet must not become NaN
            larger = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s - larger[:, None])
            if LATE:
                p = tl.where(allowed, p, 0.0)  # elsewhere key 0 is allowed to every row, so that `larger` is a score
            shrink = tl.exp2(largest - larger)
            total = total * shrink
            attended = attended * shrink[:, None]
            largest = larger
        else:
            p = tl.where(allowed, s / (1.0 + tl.exp(-s)), 0.0) / length.to(tl.float32)
        total += tl.sum(p, 1)
        v = tl.load(keys_ptr + D + place, mask=there, other=0.0)
        attended = tl.dot(p.to(v.dtype), v, attended, input_precision=PRECISION)
    return attended, total, largest


@Kernel
def _sequence_block_kernel(
    tokens_ptr, lengths_ptr, candidates_ptr, user_of_candidate_ptr, projected_ptr, projected_candidates_ptr,
    out_weight_ptr, out_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    ff1_weight_ptr, ff1_bias_ptr, ff2_weight_ptr, ff2_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, out_ptr,
    U, S, B, scale,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    EARLY: tl.constexpr, LATE: tl.constexpr, CAUSAL: tl.constexpr, SOFTMAX: tl.constexpr,
    NORM_FIRST: tl.constexpr, GELU: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    in_d, in_h = d < D, h < HEAD
    dtype = tokens_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    first_m = tl.program_id(1) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)

    # Rows of a sequence need the keys of one user, a tile of candidates those of the users it names.
    if LATE:
        left = (B - b * BLOCK_M).to(tl.int32)  # candidates from this tile on
        in_m = m < left
        user_of_m = tl.load(user_of_candidate_ptr + b * BLOCK_M + m, mask=in_m, other=-1)
        known = (user_of_m >= 0) & (user_of_m < U)
        first_user = tl.min(tl.where(known, user_of_m, U), 0)
        past_user = tl.max(tl.where(known, user_of_m + 1, 0), 0)
        x = tl.load(
            candidates_ptr + b * BLOCK_M * D + m[:, None] * D + d[None, :], mask=in_m[:, None] & in_d[None, :], other=0.0
        )
        queries_ptr = projected_candidates_ptr + b * BLOCK_M * D
        keys_ptr = projected_ptr
    else:
        user = b
        if EARLY:
            user = tl.load(user_of_candidate_ptr + b)
        length = tl.zeros((), tl.int32)
        if (user >= 0) & (user < U):
            length = tl.minimum(tl.load(lengths_ptr + user), S).to(tl.int32)
        user_of_m = m.to(tl.int64)  # nobody reads it
        in_m = m < length
        # int64 here, so that the many offsets within a sequence may be int32
        x = tl.load(
            tokens_ptr + user * S * E + m[:, None] * E + d[None, :], mask=in_m[:, None] & (d < E)[None, :], other=0.0
        )  # fmt: skip
        if EARLY:
            c = tl.load(candidates_ptr + b * (D - E) + (d - E), mask=(d >= E) & in_d, other=0.0)
            x = tl.where((d < E)[None, :], x, c[None, :])
        queries_ptr = projected_ptr + user * S * (3 * D)
        keys_ptr = queries_ptr + D

    y = x.to(tl.float32) + tl.load(out_bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    for head in range(HEADS):
        column = head * HEAD + h
        in_mh = in_m[:, None] & in_h[None, :]
        of_candidate = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        attended = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        if LATE:
            q = tl.load(queries_ptr + m[:, None] * D + column[None, :], mask=in_mh, other=0.0).to(tl.float32)
            q = (q * scale).to(dtype)
            for u in range(first_user, past_user):
                length = tl.minimum(tl.load(lengths_ptr + u), S).to(tl.int32)
                attended, total, largest = _attend(
                    q, of_candidate, attended, total, largest, keys_ptr + u * S * (2 * D) + head * HEAD,
                    m, first_m, length, user_of_m == u,
                    D, 2 * D, HEAD, LATE, CAUSAL, SOFTMAX, BLOCK_M, BLOCK_N, BLOCK_H, PRECISION,
                )  # fmt: skip
        else:
            q = tl.load(queries_ptr + m[:, None] * (3 * D) + column[None, :], mask=in_mh, other=0.0).to(tl.float32)
            if EARLY:
                candidate_ptr = projected_candidates_ptr + b * (3 * D) + column
                q += tl.load(candidate_ptr, mask=in_h, other=0.0).to(tl.float32)[None, :]
            q = (q * scale).to(dtype)
            if EARLY and not SOFTMAX:
                # The candidate's share of every key adds the same to a row's scores: softmax does not see it, silu does.
                key = tl.load(candidate_ptr + D, mask=in_h, other=0.0).to(tl.float32)
                of_candidate = tl.sum(q.to(tl.float32) * key[None, :], 1)
            attended, total, largest = _attend(
                q, of_candidate, attended, total, largest, keys_ptr + head * HEAD, m, first_m, length, in_m,
                D, 3 * D, HEAD, LATE, CAUSAL, SOFTMAX, BLOCK_M, BLOCK_N, BLOCK_H, PRECISION,
            )  # fmt: skip
        if SOFTMAX:
            attended = attended / tl.where(total > 0.0, total, 1.0)[:, None]
        if EARLY:  # and its share of every value comes out once, times the weights' sum
            value = tl.load(candidate_ptr + 2 * D, mask=in_h, other=0.0).to(tl.float32)
            weights_sum = total
            if SOFTMAX:
                weights_sum = tl.where(total > 0.0, 1.0, 0.0)
            attended += weights_sum[:, None] * value[None, :]
        weight = tl.load(out_weight_ptr + d[None, :] * D + column[:, None], mask=in_d[None, :] & in_h[:, None], other=0.0)
        y = tl.dot(attended.to(dtype), weight, y, input_precision=PRECISION)

    if NORM_FIRST:
        narrow = _layer_norm(y, norm2_weight_ptr, norm2_bias_ptr, D, BLOCK_D, EPSILON).to(dtype)
    else:
        y = _layer_norm(y, norm1_weight_ptr, norm1_bias_ptr, D, BLOCK_D, EPSILON)
        narrow = y.to(dtype)
    y += tl.load(ff2_bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    for first_f in range(0, F, BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        in_f = f < F
        weight = tl.load(ff1_weight_ptr + f[None, :] * D + d[:, None], mask=in_f[None, :] & in_d[:, None], other=0.0)
        hidden = tl.dot(narrow, weight, input_precision=PRECISION)
        hidden += tl.load(ff1_bias_ptr + f, mask=in_f, other=0.0).to(tl.float32)[None, :]
        if GELU:
            hidden = (hidden * (0.5 + 0.5 * tl.erf(hidden * 0.7071067811865476))).to(dtype)
        else:
            hidden = tl.maximum(hidden, 0.0).to(dtype)
        weight = tl.load(ff2_weight_ptr + d[None, :] * F + f[:, None], mask=in_d[None, :] & in_f[:, None], other=0.0)
        y = tl.dot(hidden, weight, y, input_precision=PRECISION)
    if not NORM_FIRST:
        y = _layer_norm(y, norm2_weight_ptr, norm2_bias_ptr, D, BLOCK_D, EPSILON)

    if LATE:
        tile_ptr = out_ptr + b * BLOCK_M * D
        tl.store(tile_ptr + m[:, None] * D + d[None, :], y, mask=in_m[:, None] & in_d[None, :])
    else:
        y = tl.where(in_m[:, None], y, 0.0)
        tile_ptr = out_ptr + b * S * D
        tl.store(tile_ptr + m[:, None] * D + d[None, :], y, mask=(m < S)[:, None] & in_d[None, :])


def configuration(
    E: int, D: int, F: int, num_heads: int, fusion: str, causal: bool, attention: str, capability: int,
    norm_first: bool = False, activation: str = "relu",
) -> dict[str, object]:  # fmt: skip
    """Tiles for one layer: 64 rows, one warp group, as Hopper's tensor cores want them; before it their operands sit in
    registers, which takes smaller tiles and more warps."""
    hopper = capability >= 90
    block_n, widest_f, stages = (64, 64, 3) if hopper else (32, 32, 1)
    if hopper and fusion == "late":  # few programs: the fewer steps each takes, the better
        block_n, stages = (128, 2) if D <= 64 else (64, 1)
    return {
        "E": E, "D": D, "F": F, "HEADS": num_heads, "HEAD": D // num_heads, "EPSILON": NORM_EPSILON,
        "EARLY": fusion == "early", "LATE": fusion == "late", "CAUSAL": causal, "SOFTMAX": attention == "softmax",
        "NORM_FIRST": norm_first, "GELU": activation == "gelu",
        "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_D": max(16, next_power_of_2(D)),
        "BLOCK_H": max(16, next_power_of_2(D // num_heads)), "BLOCK_F": max(16, min(widest_f, next_power_of_2(F))),
        "PRECISION": "ieee", "num_warps": 4 if hopper else 8, "num_stages": stages,
    }  # fmt: skip


def kernel_fits(dtype: torch.dtype, D: int, num_heads: int, fusion: str = "none", norm_first: bool = False) -> bool:
    """Whether there is a configuration that spills nothing. A norm over token and candidate together cannot be split in two."""
    narrow = dtype in (torch.bfloat16, torch.float16) and D <= WIDEST_LAYER and D // num_heads <= WIDEST_HEAD
    return narrow and not (fusion == "early" and norm_first)


def shipped(capability: int) -> list[Case]:
    """Configurations to compile ahead of time: small layers, and the widest of each fusion and attention."""
    types = {name: "*bf16" for name, kind in _sequence_block_kernel.parameters.items() if kind == "pointer"}
    types |= {"lengths_ptr": "*i64", "user_of_candidate_ptr": "*i64", "scale": "fp32"}
    post_norm, pre_norm = (False, "relu"), (True, "gelu")
    return [
        Case(
            f"{fusion} E{E} D{D} F{F} heads {heads} {attention}{' causal' if causal else ''}{' pre-norm' if form[0] else ''}",
            _sequence_block_kernel, types,
            configuration(E, D, F, heads, fusion, causal, attention, capability, *form), uses_tensor_cores=True,
        )
        for E, D, F, heads, fusion, causal, attention, form in (
            (64, 64, 128, 2, "none", True, "softmax", post_norm),
            (64, 64, 128, 2, "late", False, "softmax", post_norm),
            (32, 64, 32, 1, "early", False, "softmax", post_norm),
            (128, 128, 512, 2, "none", False, "softmax", post_norm),
            (128, 128, 512, 4, "none", True, "silu", post_norm),
            (64, 128, 512, 2, "early", True, "softmax", post_norm),
            (128, 128, 512, 2, "late", False, "silu", post_norm),
            (24, 24, 48, 2, "none", False, "softmax", pre_norm),
            (128, 128, 512, 2, "none", False, "softmax", pre_norm),
        )
    ]  # fmt: skip


def launch(
    tokens: Tensor, lengths: Tensor, candidates: Tensor | None, user_of_candidate: Tensor | None, weights: BlockWeights,
    num_heads: int, fusion: str, causal: bool, attention: str, out: Tensor, capability: int,
    norm_first: bool = False, activation: str = "relu",
) -> None:  # fmt: skip
    """Projections, then the Triton kernel into `out`. Contiguous tensors; nothing is checked here."""
    U, S, E = tokens.shape
    D, F = weights.out_bias.shape[0], weights.ff1_bias.shape[0]
    B = 0 if candidates is None else candidates.shape[0]
    if out.numel() == 0:
        return
    config = configuration(E, D, F, num_heads, fusion, causal, attention, capability, norm_first, activation)
    tile = config["BLOCK_M"]
    assert isinstance(tile, int)
    grid = (ceil_div(B, tile), 1) if fusion == "late" else (out.shape[0], ceil_div(S, tile))
    scale = (D // num_heads) ** -0.5 * (LOG2_E if attention == "softmax" else 1.0)
    with device_of(tokens):
        projected, projected_candidates = _project(tokens, candidates, weights, fusion, norm_first)
        nothing = tokens  # a pointer that is never read
        _sequence_block_kernel[grid](
            tokens, lengths, nothing if candidates is None else candidates,
            lengths if user_of_candidate is None else user_of_candidate,
            projected, nothing if projected_candidates is None else projected_candidates, *weights[2:], out,
            U, S, B, scale, **config,
        )  # fmt: skip


def _project(
    tokens: Tensor, candidates: Tensor | None, weights: BlockWeights, fusion: str, norm_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Queries, keys and values of every token [U, S, 3D] (late: keys and values [U, S, 2D]) and of every candidate [B, 3D]
    (late: the query [B, D]). In early fusion a layer's input is a token beside a candidate, so its projection is a sum of two.
    """
    D, E = weights.out_bias.shape[0], tokens.shape[2]

    def norm(x: Tensor) -> Tensor:
        return layer_norm(x, (D,), weights.norm1_weight, weights.norm1_bias, NORM_EPSILON) if norm_first else x

    if fusion == "late":
        assert candidates is not None
        return (
            linear(norm(tokens), weights.in_weight[D:], weights.in_bias[D:]),
            linear(norm(candidates), weights.in_weight[:D], weights.in_bias[:D]),
        )
    if fusion == "early":
        assert candidates is not None
        return linear(tokens, weights.in_weight[:, :E], weights.in_bias), linear(candidates, weights.in_weight[:, E:])
    return linear(norm(tokens), weights.in_weight, weights.in_bias), None


def _run(
    tokens: Tensor, lengths: Tensor, candidates: Tensor | None, user_of_candidate: Tensor | None,
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, norm1_weight: Tensor, norm1_bias: Tensor,
    ff1_weight: Tensor, ff1_bias: Tensor, ff2_weight: Tensor, ff2_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    num_heads: int, fusion: str, causal: bool, attention: str, norm_first: bool = False, activation: str = "relu",
) -> Tensor:  # fmt: skip
    if debug() or not tokens.is_cuda:
        check_indices("lengths", lengths, 0, tokens.shape[1] + 1)
        if user_of_candidate is not None:
            check_indices("user_of_candidate", user_of_candidate, 0, tokens.shape[0])
    weights = BlockWeights(
        in_weight, in_bias, out_weight, out_bias, norm1_weight, norm1_bias,
        ff1_weight, ff1_bias, ff2_weight, ff2_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    form = norm_first, activation
    if not kernel_fits(tokens.dtype, out_bias.shape[0], num_heads, fusion, norm_first) or not use_triton(tokens):
        return sequence_block_reference(
            tokens, lengths, candidates, user_of_candidate, *weights, num_heads, fusion, causal, attention, *form
        )
    out = tokens.new_empty(_out_shape(tokens, candidates, in_weight, fusion))
    launch(
        tokens.contiguous(), lengths.contiguous(), None if candidates is None else candidates.contiguous(),
        None if user_of_candidate is None else user_of_candidate.contiguous(), BlockWeights(*(w.contiguous() for w in weights)),
        num_heads, fusion, causal, attention, out, capability_of(tokens), *form,
    )  # fmt: skip
    return out


def _out_shape(tokens: Tensor, candidates: Tensor | None, in_weight: Tensor, fusion: str) -> tuple[int, ...]:
    D = in_weight.shape[1]
    if candidates is None:
        return (tokens.shape[0], tokens.shape[1], D)
    return (candidates.shape[0], D) if fusion == "late" else (candidates.shape[0], tokens.shape[1], D)


_operator = torch.library.custom_op("headrace::sequence_block", _run, mutates_args=(), device_types=("cpu", "cuda"))
recompute_backward(_operator, sequence_block_reference)


@_operator.register_fake
def _(
    tokens: Tensor, lengths: Tensor, candidates: Tensor | None, user_of_candidate: Tensor | None,
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, norm1_weight: Tensor, norm1_bias: Tensor,
    ff1_weight: Tensor, ff1_bias: Tensor, ff2_weight: Tensor, ff2_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    num_heads: int, fusion: str, causal: bool, attention: str, norm_first: bool = False, activation: str = "relu",
) -> Tensor:  # fmt: skip
    return tokens.new_empty(_out_shape(tokens, candidates, in_weight, fusion))


def sequence_block(
    tokens: Tensor, lengths: Tensor, weights: BlockWeights, num_heads: int, *, candidates: Tensor | None = None,
    user_of_candidate: Tensor | None = None, fusion: str = "none", causal: bool = False, attention: str = "softmax",
    norm_first: bool = False, activation: str = "relu",
) -> Tensor:  # fmt: skip
    """One layer over U sequences, or over the sequences of B candidates' users; the module's text has the three shapes.

    tokens [U, S, E], lengths i64 [U] in 0 .. S: positions from a sequence's length on are never attended to, and zero in the
    result. candidates [B, C] with user_of_candidate i64 [B], rows of `tokens`, for early (E + C = D) and late (E = C = D)
    fusion; on a GPU late fusion is fast when candidates of one user stand together. `causal`: a position attends to itself and
    to those before it; not with late fusion. attention "softmax" or "silu". norm_first: the norms stand before attention (of
    candidates and tokens alike) and feed-forward. activation "relu" or "gelu" (exact). An empty sequence contributes nothing.

    All floating tensors share one type: fp32, bf16, fp16 or fp64. The kernel takes bf16 and fp16 up to D = 128 with heads of at
    most 64; all else takes the reference. Differentiable; a gradient through the kernel computes the reference again.

    Raises TypeError, ValueError or IndexError, naming the argument. On a GPU the insides of lengths and user_of_candidate are
    checked in debug mode only; otherwise a bad one reads nothing outside the inputs.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if causal and fusion == "late":
        raise ValueError("causal has no meaning with late fusion: a candidate has no position")
    check_tensor("tokens", tokens, FLOATS, ("U", "S", "E"))
    check_tensor("lengths", lengths, torch.int64, (tokens.shape[0],))
    check_tensor("out_bias", weights.out_bias, tokens.dtype, ("D",))
    check_tensor("ff1_bias", weights.ff1_bias, tokens.dtype, ("F",))
    E, D, F = tokens.shape[2], weights.out_bias.shape[0], weights.ff1_bias.shape[0]
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"num_heads must divide the layer's width {D}, got {num_heads}")
    shapes = {
        "in_weight": (3 * D, D), "in_bias": (3 * D,), "out_weight": (D, D), "ff1_weight": (F, D), "ff2_weight": (D, F),
    }  # fmt: skip
    for name, weight in weights._asdict().items():
        check_tensor(name, weight, tokens.dtype, shapes.get(name, (F,) if name == "ff1_bias" else (D,)))
    if fusion == "none":
        if candidates is not None or user_of_candidate is not None:
            raise ValueError("candidates and user_of_candidate must be None without fusion")
        if E != D:
            raise ValueError(f"tokens must be as wide as the layer, {D}, got {E}")
    else:
        if candidates is None or user_of_candidate is None:
            raise ValueError(f"candidates and user_of_candidate are needed for {fusion} fusion")
        check_tensor("candidates", candidates, tokens.dtype, ("B", D if fusion == "late" else D - E))
        check_tensor("user_of_candidate", user_of_candidate, torch.int64, (candidates.shape[0],))
        if fusion == "late" and E != D:
            raise ValueError(f"tokens must be as wide as the layer, {D}, got {E}")
    check_same_device(
        tokens=tokens, lengths=lengths, candidates=candidates, user_of_candidate=user_of_candidate, **weights._asdict()
    )
    form = causal, attention, norm_first, activation
    arguments = (tokens, lengths, candidates, user_of_candidate, *weights, num_heads, fusion, *form)
    return (_run if eager(*arguments) else _operator)(*arguments)
