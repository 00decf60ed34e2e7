import os
import subprocess
import sys

import pytest
import torch

from kernels import backend


def fresh_python(code, **environment):
    """Standard output of a new interpreter without this process's settings."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HEADRACE_KERNELS", "HEADRACE_KERNELS_DEBUG")}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


ASSEMBLE_ON_CPU = """
import sys, torch
from kernels.window_assembly import window_assembly
i = lambda *v: torch.tensor(v)
print(window_assembly(i(0), i(7)[:, None], i(0, 1), i(0), i(0)[:, None], i(1)).tolist())
print([name for name in ("triton", "torch._dynamo") if name in sys.modules])
"""


def test_the_plain_path_imports_neither_triton_nor_dynamo():
    assert fresh_python(ASSEMBLE_ON_CPU).splitlines() == ["[[7]]", "[]"]


def test_auto_never_takes_the_interpreter():
    assert fresh_python(ASSEMBLE_ON_CPU, TRITON_INTERPRET="1").splitlines() == ["[[7]]", "[]"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_triton_on_request_runs_in_the_interpreter_without_a_gpu():
    code = ASSEMBLE_ON_CPU.replace('("triton", "torch._dynamo")', '("triton",)')
    assert fresh_python(code, TRITON_INTERPRET="1", HEADRACE_KERNELS="triton").splitlines() == ["[[7]]", "['triton']"]


def test_triton_without_a_gpu_or_interpreter_says_what_it_needs():
    code = """
import torch
from kernels import backend
try:
    backend.use_triton(torch.ones(1))
except RuntimeError as error:
    print(error)
"""
    message = "HEADRACE_KERNELS=triton needs CUDA tensors (or TRITON_INTERPRET=1), got a tensor on cpu"
    assert fresh_python(code, HEADRACE_KERNELS="triton") == message


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="HEADRACE_KERNELS must be one of auto, triton, torch, got 'cuda'"):
        backend.use_triton(torch.ones(1))


@pytest.mark.parametrize("setting", ["", "auto", "torch"])
def test_a_cpu_tensor_takes_the_reference(setting, monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", setting)
    assert backend.use_triton(torch.ones(1)) is False


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_next_power_of_2(n, power):
    assert backend.next_power_of_2(n) == power
