"""Which kernels compute the place of a row in 32 bits: past 2**31 values it would come out negative. Needs no GPU.

    python -m kernels.offsets     per operation: the pointers reached by 64-bit offsets, and by offsets that may have wrapped

Reads each shipped kernel in Triton's own intermediate form. A number there is `small` (a constant, a position in a tile), a
`count` (a size, a row, the number of a program or of a round of a loop: below 2**31, but no telling how far), or `wide` (64
bits). A count times a count, or a row times the width of one, must be wide, else it is `narrow`; the number of a program times
a tile's height is a row.
A process that interprets kernels cannot run this.
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass, field

from kernels.ahead_of_time import OPERATIONS, SHARED_MEMORY_BYTES, Case, source_of

_RESULT = re.compile(r"^(?:(%[\w#:]+) = )?([a-z_]+\.[a-z_]+|scf\.for)\s*(.*)$")
_NAME = re.compile(r"%[\w]+(?:#\d+)?")
_FOR = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)")
_CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
SMALL, PROGRAM, COUNT, WIDE, NARROW = "small", "program", "count", "wide", "narrow"


@dataclass
class Offsets:
    """Pointer parameters, as `%items_ptr`, that some offset in 64 bits is added to; that one is which may have wrapped."""

    wide: set[str] = field(default_factory=set)
    narrow: set[str] = field(default_factory=set)


def intermediate_form(case: Case, capability: int) -> str:
    """Triton's IR of a kernel, functions inlined, without places in the source."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    source, options = source_of(case)
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generated = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = backend.make_ttir(source.make_ir(target, parsed, *generated, context), {}, parsed, capability)
    return re.sub(r" loc\(.*?\)", "", re.sub(r"^#loc.*$", "", str(module), flags=re.MULTILINE))


def offsets_of(text: str) -> Offsets:
    """Follows numbers and pointers line by line."""
    found = Offsets()
    kind, root = _parameters(text)
    for line in map(str.strip, text.splitlines()):
        if loop := _FOR.search(line):
            variable, *bounds = loop.groups()
            kind[variable] = SMALL if all(kind.get(bound) == SMALL for bound in bounds) else PROGRAM
            for inner, outer in _CARRIED.findall(line.split("iter_args", 1)[1]) if "iter_args" in line else ():
                kind[inner] = kind.get(outer, COUNT)
                if outer in root:
                    root[inner] = root[outer]
            continue
        match = _RESULT.match(line)
        if not match or not match[1]:
            continue
        result, operation, rest = match[1].split(":")[0], match[2], match[3]
        names = _NAME.findall(rest.split(" : ")[0])
        if operation == "tt.addptr":
            pointer, offset = names
            root[result] = root.get(pointer, pointer)
            if kind.get(offset) == NARROW:
                found.narrow.add(root[result])
            elif _bits(line) == 64:
                found.wide.add(root[result])
        elif names and names[0] in root and operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            root[result] = root[names[0]]
        else:
            kind[result] = _kind_of(operation, [kind.get(name, COUNT) for name in names], _bits(line))
    return found


def _parameters(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Kinds of the numbers, and the pointers, that the kernel is given."""
    kind, root = {}, {}
    for name, is_pointer in re.findall(r"(%\w+): (!tt\.ptr)?", text.split(") attributes", 1)[0]):
        if is_pointer:
            root[name] = name
        else:
            kind[name] = COUNT
    return kind, root


def _bits(line: str) -> int:
    """Of the last integer type on the line."""
    widths = re.findall(r"(?<![\w.])(?:tensor<[\dx]*x)?i(\d+)\b", line.rsplit(" : ", 1)[-1])
    return int(widths[-1]) if widths else 0


def _kind_of(operation: str, operands: list[str], bits: int) -> str:
    if operation in ("arith.constant", "tt.make_range"):
        return SMALL
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        return PROGRAM
    if NARROW in operands:
        return NARROW
    if bits == 64:
        return WIDE if any(kind != SMALL for kind in operands) else SMALL
    if operands and all(kind == SMALL for kind in operands):
        return SMALL
    if operation == "arith.muli":
        return COUNT if sorted(operands) == [PROGRAM, SMALL] else NARROW
    if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") and operands == [PROGRAM]:
        return PROGRAM
    return COUNT


def main() -> int:
    """operation -> {"wide": its kernels' parameters without `_ptr`, "narrow": likewise}."""
    report: dict[str, dict[str, set[str]]] = {}
    for operation in OPERATIONS:
        of_operation = report.setdefault(operation, {"wide": set(), "narrow": set()})
        for capability in SHARED_MEMORY_BYTES:
            for case in importlib.import_module(f"kernels.{operation}").shipped(capability):
                found = offsets_of(intermediate_form(case, capability))
                for width, pointers in (("wide", found.wide), ("narrow", found.narrow)):
                    of_operation[width] |= {pointer.removeprefix("%").removesuffix("_ptr") for pointer in pointers}
    json.dump(report, sys.stdout, default=sorted, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
