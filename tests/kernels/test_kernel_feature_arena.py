import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.feature_arena import ALIGNMENT_BYTES, FeatureArena

LAYOUT = {
    "user": (torch.float32, (1, 3)),
    "row": (torch.int64, (5,)),
    "nothing": (torch.int64, (0, 4)),
    "flag": (torch.bool, (7,)),
    "notes": (torch.float64, (5, 2)),
}


class CopiesBetweenBuffers(TorchDispatchMode):
    """Counts what PyTorch really does, beside the arena's own counter."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += "copy" in str(function)
        return function(*arguments, **(named or {}))


def fill(views, seed):
    rng = torch.Generator().manual_seed(seed)
    values = {name: torch.randint(0, 2, shape, generator=rng).to(dtype) for name, (dtype, shape) in LAYOUT.items()}
    for name, value in values.items():
        views[name].copy_(value)
    return values


def test_a_whole_request_is_exactly_one_copy(device):
    arena = FeatureArena(4096, device)
    values = fill(arena.reserve(LAYOUT), 0)
    with CopiesBetweenBuffers() as seen:
        sent = arena.send()
    assert (arena.copies, seen.count) == (1, 1)
    for name, value in values.items():
        assert sent[name].device.type == device.type
        assert torch.equal(sent[name].cpu(), value)


def test_the_next_request_may_be_written_while_the_last_is_read(device):
    arena = FeatureArena(4096, device)
    first = fill(arena.reserve(LAYOUT), 1)
    sent = arena.send()
    fill(arena.reserve(LAYOUT), 2)
    assert torch.equal(sent["notes"].cpu(), first["notes"])


def test_the_same_layout_has_the_same_aligned_addresses(device):
    arena = FeatureArena(4096, device)
    addresses = []
    for _ in range(3):
        arena.reserve(LAYOUT)
        sent = arena.send()
        addresses.append([sent[name].data_ptr() for name in ("user", "row", "flag", "notes")])
    assert addresses[0] == addresses[1] == addresses[2]
    assert {(a - addresses[0][0]) % ALIGNMENT_BYTES for a in addresses[0]} == {0}


def test_an_empty_request_copies_nothing(device):
    arena = FeatureArena(16, device)
    arena.reserve({"notes": (torch.float32, (0, 8))})
    assert arena.send()["notes"].shape == (0, 8)
    assert arena.copies == 0


def test_too_much_is_refused_with_both_sizes_and_leaves_the_arena_usable():
    arena = FeatureArena(512, "cpu")
    with pytest.raises(ValueError, match="layout must fit into 512 bytes, got 768 in 1 tensors"):
        arena.reserve({"notes": (torch.float32, (129,))})
    arena.reserve({"notes": (torch.float32, (128,))})
    assert arena.send()["notes"].shape == (128,)


def test_send_without_reserve_is_refused():
    arena = FeatureArena(512, "cpu")
    with pytest.raises(RuntimeError, match="send needs a reserve before it"):
        arena.send()
