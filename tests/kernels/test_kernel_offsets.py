"""No kernel computes the place of a row in 32 bits."""

import json
import os
import subprocess
import sys

import pytest

from kernels.offsets import offsets_of

pytestmark = pytest.mark.timeout(300)  # some 90 kernels to Triton's intermediate form, 10 s of one core

MUST_BE_WIDE = {
    "window_assembly": {"block_start", "prefix", "lower", "upper", "row"},
    "embedding_lookup": {"ids", "slots", "weights", "scale", "out"},
    "top_k": {"queries", "items", "scale", "excluded", "maxima", "groups", "buckets", "list"},
    "sampled_softmax": {"query", "positive", "negative", "of_query", "of_positive", "of_negative"},
    "l1_score": {"item", "user_part", "logits"},
    "multitask_bce": {"logits", "labels"},
    "sequence_block": {"tokens", "candidates", "out"},
}
"""Tables with rows times a width."""
MAY_BE_NARROW = {
    "window_assembly": {"out"},  # columns of one row, M * W; the row's own place is wide
    # positions within one sequence, or one tile of candidates, which begins wide
    "sequence_block": {"tokens", "candidates", "projected", "projected_candidates", "out"},
}

ROW_TIMES_WIDTH = """module {
  tt.func public @k(%x_ptr: !tt.ptr<f32>, %N: i32) attributes {noinline = false} {
    %width = arith.constant dense<64> : tensor<16xi32>
    %c16_i32 = arith.constant 16 : i32
    %program = tt.get_program_id x : i32
    %first = arith.muli %program, %c16_i32 : i32
    %in_tile = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32>
    %spread = tt.splat %first : i32 -> tensor<16xi32>
    %row = arith.addi %spread, %in_tile : tensor<16xi32>
    BODY
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
    %place = tt.addptr %x, %offset : tensor<16x!tt.ptr<f32>>, tensor<16xTYPE>
"""


@pytest.mark.parametrize(
    ("body", "width", "found"),
    [
        ("%offset = arith.muli %row, %width : tensor<16xi32>", "i32", "narrow"),
        ("%n = arith.muli %row, %width : tensor<16xi32>\n%offset = arith.extsi %n : tensor<16xi32> to tensor<16xi64>",
         "i64", "narrow"),
        ("%r = arith.extsi %row : tensor<16xi32> to tensor<16xi64>\n%w = arith.constant dense<64> : tensor<16xi64>\n"
         "%offset = arith.muli %r, %w : tensor<16xi64>", "i64", "wide"),
        ("%offset = arith.addi %row, %in_tile : tensor<16xi32>", "i32", None),
        ("%sizes = tt.splat %N : i32 -> tensor<16xi32>\n%offset = arith.muli %in_tile, %sizes : tensor<16xi32>",
         "i32", "narrow"),
    ],
)  # fmt: skip
def test_a_row_times_a_width_must_be_computed_in_64_bits(body, width, found):
    offsets = offsets_of(ROW_TIMES_WIDTH.replace("BODY", body).replace("TYPE", width))
    assert offsets.narrow == ({"%x_ptr"} if found == "narrow" else set())
    assert offsets.wide == ({"%x_ptr"} if found == "wide" else set())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "kernels.offsets"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_tables_are_reached_by_64_bit_offsets(shipped):
    assert {name: MUST_BE_WIDE[name] - set(found["wide"]) for name, found in shipped.items()} == {
        name: set() for name in shipped
    }


def test_no_offset_may_have_wrapped_but_those_within_a_row(shipped):
    for name, found in shipped.items():
        assert set(found["narrow"]) <= MAY_BE_NARROW.get(name, set()), name
