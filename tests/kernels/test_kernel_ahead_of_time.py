"""Every shipped configuration compiles for A100 and H100/H200 class GPUs, fits their shared memory and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

from kernels.ahead_of_time import OPERATIONS, SHARED_MEMORY_BYTES

pytestmark = pytest.mark.timeout(900)  # some 90 compilations, 40 s of one core, before the first test


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "kernels.ahead_of_time", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_every_operation_ships_at_least_one_case_for_each_architecture(compiled):
    assert {(r["operation"], r["capability"]) for r in compiled} == {(o, c) for o in OPERATIONS for c in SHARED_MEMORY_BYTES}


def test_no_configuration_needs_more_shared_memory_than_there_is(compiled):
    assert [r for r in compiled if r["shared_bytes"] > SHARED_MEMORY_BYTES[r["capability"]]] == []


def test_no_configuration_spills_registers(compiled):
    assert [r for r in compiled if r["stack_bytes"] or r["spill_instructions"]] == []


def test_every_dot_runs_on_tensor_cores(compiled):
    assert [r for r in compiled if r["uses_tensor_cores"] and not r["tensor_core_instructions"]] == []
