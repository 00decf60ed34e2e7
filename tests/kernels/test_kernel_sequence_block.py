import math

import pytest
import torch
from torch import nn

from kernels import sequence_block as module
from kernels.sequence_block import BlockWeights, sequence_block, sequence_block_reference


def problem(U, S, D, F, B=None, C=0, fusion="none", dtype=torch.float32, lengths=None, seed=0):
    """Keyword arguments of `sequence_block` but for heads and attention."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, around=0.0):
        return (torch.randn(shape, generator=rng, dtype=torch.float64) / math.sqrt(shape[-1]) + around).to(dtype)

    def vector(size, around=0.0):
        return (torch.randn(size, generator=rng, dtype=torch.float64) / 4 + around).to(dtype)

    weights = BlockWeights(
        draw(3 * D, D), vector(3 * D), draw(D, D), vector(D), vector(D, 1.0), vector(D),
        draw(F, D), vector(F), draw(D, F), vector(D), vector(D, 1.0), vector(D),
    )  # fmt: skip
    E = D - C if fusion == "early" else D
    tokens = draw(U, S, E) * math.sqrt(E)
    lengths = torch.tensor(lengths) if lengths else torch.randint(0, S + 1, (U,), generator=rng)
    arguments = {"tokens": tokens, "lengths": lengths, "weights": weights, "fusion": fusion}
    if fusion != "none":
        width = D if fusion == "late" else C
        arguments["candidates"] = draw(B, width) * math.sqrt(width)
        arguments["user_of_candidate"] = torch.randint(0, U, (B,), generator=rng).sort().values
    return arguments


def mapped(arguments, change):
    """The same arguments with every tensor changed."""
    out = {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    out["weights"] = BlockWeights(*map(change, arguments["weights"]))
    return out


def reference(arguments, num_heads, causal, attention, form=(False, "relu")):
    return sequence_block_reference(
        arguments["tokens"], arguments["lengths"], arguments.get("candidates"), arguments.get("user_of_candidate"),
        *arguments["weights"], num_heads, arguments["fusion"], causal, attention, *form,
    )  # fmt: skip


def in_float64(arguments):
    return mapped(arguments, lambda t: t.double() if t.is_floating_point() else t)


@pytest.mark.parametrize("causal", [False, True])
def test_without_fusion_it_is_pytorchs_own_encoder_layer(causal):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens, lengths = torch.randn(3, 7, 16, dtype=torch.float64), torch.tensor([7, 3, 1])
    padded = torch.arange(7) >= lengths[:, None]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    mask = mask if mask is None else mask.isneginf()
    expected = layer(tokens, src_mask=mask, src_key_padding_mask=padded).masked_fill(padded[:, :, None], 0)
    ours = sequence_block(tokens, lengths, BlockWeights.of(layer), 4, causal=causal)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norm_first_is_pytorchs_own_encoder_layer_too(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, batch_first=True, dtype=torch.float64, norm_first=True, activation=activation
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens, lengths = torch.randn(3, 7, 16, dtype=torch.float64), torch.tensor([7, 3, 1])
    padded = torch.arange(7) >= lengths[:, None]
    expected = layer(tokens, src_key_padding_mask=padded).masked_fill(padded[:, :, None], 0)
    layer.norm_first, layer.activation = False, torch.relu  # the weights are the same whichever way they are used
    weights = BlockWeights.of(layer)
    torch.testing.assert_close(sequence_block(tokens, lengths, weights, 4, norm_first=True, activation=activation), expected)


def test_early_fusion_equals_sequences_extended_by_hand():
    arguments = problem(2, 5, 12, 8, B=4, C=4, fusion="early", dtype=torch.float64)
    rows = []
    for b, user in enumerate(arguments["user_of_candidate"].tolist()):
        extended = torch.cat([arguments["tokens"][user], arguments["candidates"][b].repeat(5, 1)], dim=1)
        rows.append(sequence_block(extended[None], arguments["lengths"][user : user + 1], arguments["weights"], 3)[0])
    torch.testing.assert_close(sequence_block(**arguments, num_heads=3), torch.stack(rows))


@pytest.mark.parametrize("U", [1, 3])
def test_late_fusion_equals_a_cross_attention_layer(U):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = problem(U, 5, 8, 16, B=6, fusion="late", dtype=torch.float64, lengths=[5, 2, 1][:U])
    cross, user = layer.multihead_attn, arguments["user_of_candidate"]
    weights = BlockWeights(
        cross.in_proj_weight, cross.in_proj_bias, cross.out_proj.weight, cross.out_proj.bias,
        layer.norm2.weight, layer.norm2.bias, layer.linear1.weight, layer.linear1.bias,
        layer.linear2.weight, layer.linear2.bias, layer.norm3.weight, layer.norm3.bias,
    )  # fmt: skip
    query, keys = arguments["candidates"][:, None], arguments["tokens"][user]
    padded = torch.arange(5) >= arguments["lengths"][user, None]
    y = layer.norm2(query + cross(query, keys, keys, key_padding_mask=padded)[0])
    expected = layer.norm3(y + layer.linear2(torch.relu(layer.linear1(y))))[:, 0]
    torch.testing.assert_close(sequence_block(**{**arguments, "weights": weights}, num_heads=2), expected)


def test_silu_attention_worked_out_by_hand():
    identity, zero, one = torch.eye(2), torch.zeros(2), torch.ones(2)
    weights = BlockWeights(
        torch.cat([identity] * 3), torch.zeros(6), identity, zero, one, zero,
        torch.zeros(1, 2), torch.zeros(1), torch.zeros(2, 1), zero, one, zero,
    )  # fmt: skip
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [9.0, 9.0]]])
    out = sequence_block(tokens, torch.tensor([2]), weights, 1, attention="silu")
    # token 0 scores itself 1 / sqrt(2) and token 1 zero; silu(s) = s * sigmoid(s); two tokens
    s = 1 / math.sqrt(2)
    x = torch.tensor([1 + s / (1 + math.exp(-s)) / 2, 0.0])
    expected = torch.nn.functional.layer_norm(torch.nn.functional.layer_norm(x, (2,)), (2,))
    torch.testing.assert_close(out[0, 0], expected)
    assert out[0, 2].tolist() == [0.0, 0.0]


SHAPES = [
    ({"U": 1, "S": 1, "D": 4, "F": 1, "lengths": [1]}, 1, False),
    ({"U": 3, "S": 37, "D": 24, "F": 20, "lengths": [37, 5, 0]}, 3, True),
    ({"U": 2, "S": 33, "D": 16, "F": 70, "lengths": [33, 32]}, 2, False),
    ({"U": 2, "S": 0, "D": 8, "F": 8, "lengths": [0, 0]}, 2, False),
    ({"U": 2, "S": 19, "D": 24, "F": 16, "B": 3, "C": 8, "fusion": "early", "lengths": [19, 7]}, 2, True),
    ({"U": 1, "S": 40, "D": 12, "F": 9, "B": 2, "C": 5, "fusion": "early", "lengths": [40]}, 1, False),
    ({"U": 3, "S": 35, "D": 16, "F": 24, "B": 70, "fusion": "late", "lengths": [35, 0, 12]}, 2, False),
    ({"U": 1, "S": 5, "D": 64, "F": 128, "B": 33, "fusion": "late", "lengths": [4]}, 1, False),
    ({"U": 2, "S": 5, "D": 16, "F": 8, "B": 0, "fusion": "late"}, 1, False),
]


@pytest.mark.parametrize("attention", ["softmax", "silu"])
@pytest.mark.parametrize(("shape", "num_heads", "causal"), SHAPES, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_is_as_accurate_as_torch(shape, num_heads, causal, attention, dtype, triton_backend, guard, assert_as_accurate):
    arguments = problem(**shape, dtype=dtype)
    exact = reference(in_float64(arguments), num_heads, causal, attention)
    plain = reference(arguments, num_heads, causal, attention)
    on_device = mapped(arguments, lambda t: guard(t.to(triton_backend), float("nan") if t.is_floating_point() else 2**40))
    out = sequence_block(**on_device, num_heads=num_heads, causal=causal, attention=attention)
    assert out.dtype == dtype
    assert_as_accurate(out, plain, exact, dtype)


@pytest.mark.parametrize("form", [(True, "gelu"), (True, "relu"), (False, "gelu")])
@pytest.mark.parametrize(("shape", "num_heads", "causal"), [SHAPES[1], SHAPES[4], SHAPES[6]], ids=lambda value: str(value))
def test_kernel_with_norms_first_or_gelu_is_as_accurate_as_torch(
    shape, num_heads, causal, form, triton_backend, guard, assert_as_accurate
):
    arguments = problem(**shape, dtype=torch.bfloat16)
    exact = reference(in_float64(arguments), num_heads, causal, "softmax", form)
    plain = reference(arguments, num_heads, causal, "softmax", form)
    on_device = mapped(arguments, lambda t: guard(t.to(triton_backend), float("nan") if t.is_floating_point() else 2**40))
    out = sequence_block(**on_device, num_heads=num_heads, causal=causal, norm_first=form[0], activation=form[1])
    assert_as_accurate(out, plain, exact, torch.bfloat16)


def test_early_fusion_with_norms_first_takes_the_reference(triton_backend, monkeypatch):
    monkeypatch.setattr(module, "launch", lambda *arguments: pytest.fail("launched"))
    arguments = mapped(problem(**SHAPES[4][0], dtype=torch.bfloat16), lambda t: t.to(triton_backend))
    out = sequence_block(**arguments, num_heads=2, norm_first=True)
    assert torch.equal(out, reference(arguments, 2, False, "softmax", (True, "relu")))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("shape", "num_heads", "causal"), [SHAPES[1], SHAPES[4], SHAPES[6]], ids=lambda value: str(value))
def test_kernel_in_full_precision_writes_its_output_and_nothing_else(
    shape, num_heads, causal, capability, device, guard, assert_as_accurate
):
    arguments = problem(**shape)
    exact = reference(in_float64(arguments), num_heads, causal, "softmax")
    plain = reference(arguments, num_heads, causal, "softmax")
    given = mapped(arguments, lambda t: guard(t.to(device), float("nan") if t.is_floating_point() else 2**40))
    out = guard(torch.full(exact.shape, float("nan"), device=device), 77.0)
    module.launch(
        given["tokens"], given["lengths"], given.get("candidates"), given.get("user_of_candidate"), given["weights"],
        num_heads, given["fusion"], causal, "softmax", out, capability,
    )  # fmt: skip
    assert_as_accurate(out, plain, exact, torch.float32, factor=4)


def test_candidates_of_users_in_any_order_get_their_own_users_answer(triton_backend):
    arguments = problem(4, 9, 16, 8, B=20, fusion="late", dtype=torch.float16, lengths=[9, 4, 0, 7])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    mixed = {
        **arguments,
        "candidates": arguments["candidates"][order],
        "user_of_candidate": arguments["user_of_candidate"][order],
    }
    outs = [sequence_block(**mapped(a, lambda t: t.to(triton_backend)), num_heads=2) for a in (arguments, mixed)]
    torch.testing.assert_close(outs[0][order.to(triton_backend)], outs[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_bad_indices_read_nothing_on_the_device(fusion, device, guard):
    arguments = problem(2, 5, 16, 8, B=3, C=8, fusion=fusion, lengths=[99, -4])
    arguments["user_of_candidate"] = torch.tensor([-1, 2, 10**9])
    given = mapped(arguments, lambda t: guard(t.to(device), float("nan") if t.is_floating_point() else 1))
    out = torch.full((3, 16) if fusion == "late" else (3, 5, 16), float("nan"), device=device)
    module.launch(
        given["tokens"], given["lengths"], given["candidates"], given["user_of_candidate"], given["weights"],
        2, fusion, False, "softmax", out, 80,
    )  # fmt: skip
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("fusion", ["none", "early", "late"])
def test_gradients_through_the_operator_equal_those_of_the_reference(fusion, triton_backend):
    arguments = mapped(problem(2, 5, 16, 8, B=3, C=8, fusion=fusion, lengths=[5, 2]), lambda t: t.to(triton_backend))
    gradients = []
    for through_operator in (True, False):
        leaves = mapped(arguments, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
        given = (
            leaves["tokens"],
            leaves["lengths"],
            leaves.get("candidates"),
            leaves.get("user_of_candidate"),
            *leaves["weights"],
        )
        call = torch.ops.headrace.sequence_block if through_operator else sequence_block_reference
        call(*given, 2, fusion, False, "softmax").square().sum().backward()
        gradients.append([t.grad for t in given if t is not None and t.is_floating_point()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_the_operator_compiles_exports_and_passes_opcheck():
    arguments = problem(2, 5, 8, 8, B=3, fusion="late", lengths=[5, 2])
    given = (arguments["tokens"], arguments["lengths"], arguments["candidates"], arguments["user_of_candidate"])
    weights = [w.requires_grad_() for w in arguments["weights"]]
    torch.library.opcheck(torch.ops.headrace.sequence_block.default, (*given, *weights, 2, "late", False, "softmax"))
    compiled = torch.compile(sequence_block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments, num_heads=2), sequence_block(**arguments, num_heads=2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

        def forward(self, tokens, lengths):
            return sequence_block(tokens, lengths, BlockWeights.of(self.layer), 2)

    exported = torch.export.export(Model(), given[:2])
    assert "headrace.sequence_block" in exported.graph_module.code


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fusion": "middle"}, ValueError, "fusion must be one of none, early, late, got 'middle'"),
        ({"attention": "relu"}, ValueError, "attention must be one of softmax, silu, got 'relu'"),
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, gelu, got 'tanh'"),
        ({"causal": True}, ValueError, "causal has no meaning with late fusion"),
        ({"num_heads": 3}, ValueError, "num_heads must divide the layer's width 8, got 3"),
        ({"lengths": torch.tensor([9, 1])}, IndexError, r"lengths must lie in 0 \.\. 5, got 1 \.\. 9"),
        ({"user_of_candidate": torch.tensor([0, 1, 2])}, IndexError, r"user_of_candidate must lie in 0 \.\. 1, got 0 \.\. 2"),
        ({"candidates": None}, ValueError, "candidates and user_of_candidate are needed for late fusion"),
        ({"candidates": torch.zeros(3, 7)}, ValueError, r"candidates must have shape \[B, 8\], got \[3, 7\]"),
        ({"fusion": "none"}, ValueError, "candidates and user_of_candidate must be None without fusion"),
        ({"tokens": torch.zeros(2, 5, 8).half()}, TypeError, "out_bias must be float16, got float32"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(change, error, message):
    arguments = {"num_heads": 2, **problem(2, 5, 8, 8, B=3, fusion="late", lengths=[5, 2]), **change}
    with pytest.raises(error, match=message):
        sequence_block(**arguments)


def test_a_pre_norm_layer_is_refused():
    with pytest.raises(ValueError, match="layer must be post-norm with relu and biases, got norm_first=True"):
        BlockWeights.of(nn.TransformerEncoderLayer(8, 2, norm_first=True, batch_first=True))
