import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from kernels import multitask_bce as bce_module
from kernels.multitask_bce import multitask_bce, multitask_bce_reference
from kernels.sampled_softmax import sampled_softmax, sampled_softmax_reference

# ---- multi-task binary cross entropy


def heads(B, T, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, generator=rng) * 4).to(dtype)
    labels = torch.randint(0, 2, (B, T), generator=rng).float()
    labels[torch.rand(B, T, generator=rng) < 0.2] = float("nan")
    return logits, labels, torch.rand(T, generator=rng) + 0.1


def test_an_unobserved_label_costs_nothing_and_an_even_guess_costs_log_two():
    loss = multitask_bce(
        torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([[1.0, math.nan], [0.0, math.nan]]), torch.ones(2)
    )
    assert loss.item() == pytest.approx(math.log(2))


def test_fully_observed_it_is_pytorchs_loss_per_head():
    logits, labels, weight = heads(40, 3)
    labels = labels.nan_to_num(1.0)
    expected = sum(weight[t] * binary_cross_entropy_with_logits(logits[:, t], labels[:, t]) for t in range(3))
    torch.testing.assert_close(multitask_bce(logits, labels, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (7, 3), (1000, 7), (0, 3), (3, 0)])
def test_bce_kernel_is_as_accurate_as_torch(B, T, dtype, triton_backend, guard, assert_as_accurate):
    arguments = heads(B, T, dtype)
    exact = multitask_bce_reference(*(t.double() for t in arguments))
    on_device = [guard(t.to(triton_backend), 1e30) for t in arguments]
    assert_as_accurate(multitask_bce(*on_device), multitask_bce_reference(*arguments), exact, torch.float32)


def test_bce_kernel_writes_one_number_per_tile(device, guard):
    arguments = [t.to(device) for t in heads(1000, 3)]
    partial = guard(torch.full((3,), math.nan, device=device), 77.0)
    bce_module.launch(*arguments, partial)
    torch.testing.assert_close(partial.sum() / 1000, multitask_bce_reference(*arguments))


def test_extreme_logits_neither_overflow_nor_lose_the_loss(triton_backend):
    logits, labels = torch.tensor([[200.0, -200.0]]), torch.tensor([[0.0, 0.0]])
    loss = multitask_bce(*(t.to(triton_backend) for t in (logits, labels, torch.ones(2))))
    assert loss.item() == pytest.approx(200.0)


def test_bce_gradients_and_operator(triton_backend):
    logits, labels, weight = heads(5, 3)
    grads = []
    for call in (torch.ops.headrace.multitask_bce, multitask_bce_reference):
        leaf = logits.clone().to(triton_backend).requires_grad_()
        call(leaf, labels.to(triton_backend), weight.to(triton_backend)).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert torch.isfinite(grads[0]).all()
    torch.library.opcheck(
        torch.ops.headrace.multitask_bce.default,
        (logits.to(triton_backend).requires_grad_(), labels.to(triton_backend), weight.to(triton_backend)),
    )


# ---- sampled softmax


def retrieval(B, N, D, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    vectors = [torch.nn.functional.normalize(torch.randn(rows, D, generator=rng), dim=1).to(dtype) for rows in (B, B, N)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_q = [-5 * torch.rand(rows, generator=rng).to(wide) for rows in (B, N)]
    ids = [torch.randint(0, 9, (rows,), generator=rng) for rows in (B, N)]
    return (*vectors, *log_q, *ids)


def test_an_accidental_hit_does_not_count_as_a_negative():
    one, zero = torch.ones(1, 1), torch.zeros(1)
    negative, log_q = torch.tensor([[1.0], [0.0]]), torch.zeros(2)
    loss = sampled_softmax(one, one, negative, zero, log_q, torch.tensor([7]), torch.tensor([7, 8]), 1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 1) - 1)


def test_with_the_correction_a_common_negative_weighs_less():
    one, zero = torch.ones(1, 1), torch.zeros(1)
    loss = sampled_softmax(one, one, one, zero, torch.tensor([math.log(2.0)]), torch.tensor([1]), torch.tensor([2]), 1.0)
    assert loss.item() == pytest.approx(math.log(1 + 0.5))


def test_without_correction_and_hits_it_is_cross_entropy_over_all():
    query, positive, negative, log_q_positive, log_q_negative, positive_id, negative_id = retrieval(6, 20, 8)
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negative.T], dim=1) / 0.2
    expected = cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="none")
    ours = sampled_softmax(
        query, positive, negative, log_q_positive * 0, log_q_negative * 0, positive_id, negative_id + 99, 0.2
    )
    torch.testing.assert_close(ours, expected)


SHAPES = [(1, 2, 3), (65, 70, 12), (3, 130, 40), (70, 5, 128), (4, 0, 8), (0, 4, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "N", "D"), SHAPES)
def test_softmax_kernels_are_as_accurate_as_torch_forward_and_backward(
    B, N, D, dtype, triton_backend, guard, assert_as_accurate
):
    arguments = retrieval(B, N, D, dtype)
    results = []
    for kind in ("exact", "plain", "kernel"):
        given = [t.double() if kind == "exact" and t.is_floating_point() else t for t in arguments]
        if kind == "kernel":
            given = [guard(t.to(triton_backend), math.nan if t.is_floating_point() else 2**40) for t in given]
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        if kind == "kernel":
            loss = sampled_softmax(*leaves, *given[3:], 0.1)
        else:
            loss = sampled_softmax_reference(*leaves, *given[3:], 0.1)[0]
        (loss * torch.linspace(0.5, 2, B, dtype=loss.dtype, device=loss.device)).sum().backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for name, exact, plain, kernel in zip(("loss", "query", "positive", "negative"), *results, strict=True):
        assert_as_accurate(kernel, plain, exact, dtype, factor=2 if name == "loss" else 3)


def test_softmax_double_precision_gradients_pass_gradcheck_and_opcheck():
    arguments = retrieval(4, 5, 3, torch.float64)
    leaves = [t.requires_grad_() for t in arguments[:3]]
    operator = torch.ops.headrace.sampled_softmax
    assert torch.autograd.gradcheck(lambda *v: operator(*v, *arguments[3:], 0.5)[0], leaves)
    torch.library.opcheck(operator.default, (*leaves, *arguments[3:], 0.5))
    compiled = torch.compile(sampled_softmax, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves, *arguments[3:], 0.5), sampled_softmax(*leaves, *arguments[3:], 0.5))


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (1, torch.zeros(3, 4), ValueError, r"positive must have shape \[4, 3\], got \[3, 4\]"),
        (3, torch.zeros(4).half(), TypeError, "log_q_positive must be float32, got float16"),
        (6, torch.zeros(5), TypeError, "negative_id must be int64, got float32"),
        (7, 0.0, ValueError, "temperature must be positive, got 0.0"),
    ],
)
def test_a_bad_argument_is_named_with_the_rule_and_what_came(place, value, error, message):
    arguments = [*retrieval(4, 5, 3), 0.5]
    arguments[place] = value
    with pytest.raises(error, match=message):
        sampled_softmax(*arguments)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \[3, 2\], got \[2, 3\]"):
        multitask_bce(torch.zeros(3, 2), torch.zeros(2, 3), torch.ones(2))
