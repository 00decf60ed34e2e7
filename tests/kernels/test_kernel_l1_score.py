import math

import pytest
import torch

from kernels import l1_score as module
from kernels.l1_score import l1_score, l1_score_reference

NAMES = (
    "user", "item", "user_of_item", "first_user", "first_item", "first_bias",
    "second", "second_bias", "heads", "heads_bias", "mix",
)  # fmt: skip


def problem(N, U=3, D=5, F=7, H=11, G=9, T=2, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=rng, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)

    user_of_item = torch.randint(0, U, (N,), generator=rng) if U else torch.zeros(0, dtype=torch.int64)
    weights = draw(H, D), draw(H, F), draw(H), draw(G, H), draw(G), draw(T, G), draw(T), draw(T)
    return (draw(U, D) * 2, draw(N, F) * 2, user_of_item, *weights)


def in_float64(arguments):
    return [a.double() if a.is_floating_point() else a for a in arguments]


def test_a_network_worked_out_by_hand():
    one = torch.ones
    user, item, user_of_item = torch.tensor([[2.0], [-5.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1])
    # hidden1 = relu(user + item + 0); hidden2 = relu(2 * hidden1 - 4); logit = hidden2; utility = 10 * sigmoid(logit)
    utility, logits = l1_score(
        user, item, user_of_item, one(1, 1), one(1, 1), torch.zeros(1), torch.tensor([[2.0]]), torch.tensor([-4.0]),
        one(1, 1), torch.zeros(1), torch.tensor([10.0]),
    )  # fmt: skip
    assert logits.tolist() == [[2.0], [0.0]]
    assert utility.tolist() == pytest.approx([10 / (1 + math.exp(-2)), 5.0])


@pytest.mark.parametrize("U", [1, 4])
def test_the_split_first_layer_equals_the_layer_on_both_vectors_together(U):
    arguments = problem(50, U=U, dtype=torch.float64)
    user, item, user_of_item, first_user, first_item, first_bias, second, second_bias, heads, heads_bias, mix = arguments
    both = torch.cat([user[user_of_item], item], dim=1)
    hidden = torch.relu(both @ torch.cat([first_user, first_item], dim=1).T + first_bias)
    logits = torch.relu(hidden @ second.T + second_bias) @ heads.T + heads_bias
    torch.testing.assert_close(l1_score(*arguments), ((torch.sigmoid(logits) * mix).sum(1), logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"N": 1, "U": 1, "D": 1, "F": 1, "H": 1, "G": 1, "T": 1},
        {"N": 65, "U": 3, "D": 5, "F": 7, "H": 11, "G": 9, "T": 2},
        {"N": 130, "U": 2, "D": 40, "F": 70, "H": 130, "G": 64, "T": 16},
        {"N": 63, "U": 1, "D": 8, "F": 33, "H": 64, "G": 128, "T": 5},
        {"N": 0, "U": 2},
    ],
    ids=str,
)
def test_kernel_is_as_accurate_as_torch(shape, dtype, triton_backend, guard, assert_as_accurate):
    arguments = problem(**shape, dtype=dtype)
    exact = l1_score_reference(*in_float64(arguments))
    plain = l1_score_reference(*arguments)
    on_device = [guard(a.to(triton_backend), float("nan") if a.is_floating_point() else 2**40) for a in arguments]
    for got, same, truth in zip(l1_score(*on_device), plain, exact, strict=True):
        assert got.dtype == torch.float32
        assert_as_accurate(got, same, truth, dtype)


def test_the_kernel_writes_its_outputs_and_nothing_else(device, guard):
    arguments = [guard(a.to(device), float("nan") if a.is_floating_point() else 2**40) for a in problem(70)]
    user, item, user_of_item, first_user, first_item, first_bias, *rest = arguments
    utility, logits = (guard(torch.full(shape, float("nan"), device=device), 77.0) for shape in ((70,), (70, 2)))
    user_part = torch.nn.functional.linear(user, first_user, first_bias)
    module.launch(item, user_part, user_of_item, first_item, *rest, utility, logits)
    torch.testing.assert_close((utility, logits), l1_score_reference(*arguments), rtol=1e-4, atol=1e-5)


def test_a_bad_user_index_reads_nothing_on_the_device(device, guard):
    arguments = [guard(a.to(device), float("nan") if a.is_floating_point() else 2**40) for a in problem(3, U=2)]
    user, item, _, first_user, first_item, first_bias, *rest = arguments
    utility, logits = torch.full((3,), float("nan"), device=device), torch.full((3, 2), float("nan"), device=device)
    user_part = torch.nn.functional.linear(user, first_user, first_bias)
    module.launch(item, user_part, torch.tensor([-1, 2, 10**9], device=device), first_item, *rest, utility, logits)
    assert torch.isfinite(logits).all()


def test_a_candidates_score_does_not_depend_on_the_others(triton_backend):
    arguments = [a.to(triton_backend) for a in problem(100)]
    alone = [a[40:41] if name in ("item", "user_of_item") else a for name, a in zip(NAMES, arguments, strict=True)]
    assert torch.equal(l1_score(*arguments)[1][40:41], l1_score(*alone)[1])


def test_gradients_through_the_operator_equal_those_of_the_reference(triton_backend):
    arguments = [a.to(triton_backend) for a in problem(20)]
    gradients = []
    for function in (l1_score, l1_score_reference):
        leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
        utility, logits = function(*leaves)
        (utility.sum() + (logits**2).sum()).backward()
        gradients.append([leaf.grad for leaf in leaves if leaf.is_floating_point()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_double_precision_gradients_pass_gradcheck():
    arguments = [a.requires_grad_() if a.is_floating_point() else a for a in problem(4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(torch.ops.headrace.l1_score, arguments)


def test_the_operator_compiles_exports_and_passes_opcheck():
    arguments = [a.requires_grad_() if a.is_floating_point() else a for a in problem(6)]
    torch.library.opcheck(torch.ops.headrace.l1_score.default, arguments)
    compiled = torch.compile(l1_score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), l1_score_reference(*arguments))

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return l1_score(*tensors)

    exported = torch.export.export(Model(), tuple(a.detach() for a in arguments))
    assert "headrace.l1_score" in exported.graph_module.code


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("item", lambda t: t.long(), TypeError, "item must be float32 or bfloat16 or float16 or float64, got int64"),
        ("user", lambda t: t.double(), TypeError, "user must be float32, got float64"),
        ("first_item", lambda t: t[:, 1:], ValueError, r"first_item must have shape \[11, 7\], got \[11, 6\]"),
        ("user_of_item", lambda t: t + 3, IndexError, r"user_of_item must lie in 0 \.\. 2, got"),
        ("user_of_item", lambda t: t.float(), TypeError, "user_of_item must be int64, got float32"),
        ("heads", lambda t: t.repeat(9, 1), ValueError, r"heads_bias must have shape \[18\], got \[2\]"),
        ("mix", lambda t: None, TypeError, r"mix must be a tensor \[2\], got NoneType"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(name, change, error, message):
    arguments = dict(zip(NAMES, problem(6), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        l1_score(**arguments)


def test_too_many_heads_are_refused():
    with pytest.raises(ValueError, match="heads must be at most 16 x 256, got 17 x 9"):
        l1_score(*problem(3, T=17))
