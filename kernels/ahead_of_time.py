"""Compiles every shipped kernel configuration for GPUs that need not be there, and says what each takes of one.

    python -m kernels.ahead_of_time            a table: registers, stack, shared memory, tensor-core instructions
    python -m kernels.ahead_of_time --json     the same, for the tests

Runs in a process of its own: a process that interprets kernels cannot also compile them.
"""

import argparse
import importlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.backend import Kernel

OPERATIONS = ("window_assembly", "l1_score", "sequence_block", "top_k", "embedding_lookup", "multitask_bce", "sampled_softmax")
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory of one block, by compute capability (CUDA C++ programming guide, table of technical specifications)."""

_TENSOR_CORE = {80: ("HMMA", "IMMA"), 90: ("HGMMA", "IGMMA")}
"""Machine instructions that multiply floats, and int8; on sm_90 those of a whole warp group."""
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", re.MULTILINE)
_INSTRUCTION_BYTES = 16
_EXECUTABLE = 4
"""SHF_EXECINSTR of the ELF specification."""


@dataclass(frozen=True)
class Case:
    """One configuration that is launched somewhere: pointer types (`*bf16`) by parameter, then what is compiled in.

    Sizes are int32, or as `types` says. `uses_tensor_cores`: whether it holds a `tl.dot`.
    """

    label: str
    kernel: Kernel
    types: dict[str, str]
    configuration: dict[str, Any]
    uses_tensor_cores: bool = False


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes of shared memory and stack, registers a thread; and how many of its machine
    instructions multiply on tensor cores, or move registers to the stack and back."""

    operation: str
    label: str
    capability: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    tensor_core_instructions: int
    spill_instructions: int
    uses_tensor_cores: bool


def source_of(case: Case) -> tuple[Any, dict[str, Any]]:
    """(what Triton compiles, options of the compiler). Pointers are aligned to 16 bytes, as PyTorch's allocations are."""
    from triton.compiler import ASTSource

    options = {name: value for name, value in case.configuration.items() if name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in case.configuration.items() if name not in options}
    kinds = case.kernel.parameters
    signature = {name: "constexpr" if kind == "constexpr" else case.types.get(name, "i32") for name, kind in kinds.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind == "pointer"}
    return ASTSource(fn=case.kernel.jit, signature=signature, constexprs=constants, attrs=aligned), options


def compile_cases(cases: list[tuple[str, Case]], capability: int) -> list[Resources]:
    """(operation, case) down to machine code with the assembler in Triton's wheel, and what it says of each."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    compiled = [triton.compile(source, target=target, options=options) for source, options in (source_of(c) for _, c in cases)]
    counted = _instructions([one.asm["cubin"] for one in compiled], capability)
    results = []
    for (operation, case), one, instructions in zip(cases, compiled, counted, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(one.asm["cubin"])
            cubin.flush()
            usage = _printed("cuobjdump", "-res-usage", cubin.name)
        if "EXIT" not in instructions:
            raise RuntimeError(f"nvdisasm printed no machine code of {operation} {case.label}: {dict(instructions)}")
        results.append(
            Resources(
                operation=operation,
                label=case.label,
                capability=capability,
                shared_bytes=one.metadata.shared,
                registers=_number(usage, "REG"),
                stack_bytes=_number(usage, "STACK") + _number(usage, "LOCAL"),
                tensor_core_instructions=sum(instructions[name] for name in _TENSOR_CORE[capability]),
                spill_instructions=instructions["STL"] + instructions["LDL"],
                uses_tensor_cores=case.uses_tensor_cores,
            )
        )
    return results


def _instructions(cubins: list[bytes], capability: int) -> list[Counter[str]]:
    """How often each machine instruction stands in each cubin, by one run of the disassembler: its start costs the most."""
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as together:
        together.write(b"".join(codes))
        together.flush()
        shown = _printed("nvdisasm", "--binary", {80: "SM80", 90: "SM90a"}[capability], together.name)
    named = _INSTRUCTION.findall(shown)
    ends = list(itertools.accumulate(len(code) for code in codes))
    if [int(place, 16) for place, _ in named] != list(range(0, ends[-1], _INSTRUCTION_BYTES)):
        raise RuntimeError(f"nvdisasm printed {len(named)} instructions of {ends[-1]} bytes: {shown[-200:]!r}")
    names = [name for _, name in named]
    return [
        Counter(names[start // _INSTRUCTION_BYTES : end // _INSTRUCTION_BYTES]) for start, end in itertools.pairwise((0, *ends))
    ]


def _machine_code(cubin: bytes) -> bytes:
    """The executable sections of a 64-bit ELF file, one after the other."""
    (start,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + number * size) for number in range(count)]
    return b"".join(cubin[offset : offset + length] for _, _, flags, _, offset, length in sections if flags & _EXECUTABLE)


def _printed(tool: str, *words: str) -> str:
    """What one of the tools in Triton's wheel prints."""
    import triton

    command = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([command, *words], capture_output=True, text=True, check=True).stdout


def _number(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no {name}: {usage[-200:]!r}")
    return int(found[1])


def _shipped(operations: list[str], capability: int) -> list[tuple[str, Case]]:
    modules = {operation: importlib.import_module(f"kernels.{operation}") for operation in operations}
    return [(operation, case) for operation, module in modules.items() for case in module.shipped(capability)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.ahead_of_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--only", choices=OPERATIONS, help="one operation")
    options = parser.parse_args(arguments)
    operations = [operation for operation in OPERATIONS if options.only in (None, operation)]
    compiled = (compile_cases(_shipped(operations, capability), capability) for capability in SHARED_MEMORY_BYTES)
    results = sorted(itertools.chain(*compiled), key=lambda result: OPERATIONS.index(result.operation))
    if options.json:
        json.dump([asdict(result) for result in results], sys.stdout)
        return 0
    print(f"{'operation':<18} {'case':<46} {'sm':>3} {'registers':>9} {'stack B':>8} {'shared B':>9} {'tensor core':>11}")
    for r in results:
        print(
            f"{r.operation:<18} {r.label:<46} {r.capability:>3} {r.registers:>9} {r.stack_bytes:>8} {r.shared_bytes:>9} "
            f"{r.tensor_core_instructions:>11}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
