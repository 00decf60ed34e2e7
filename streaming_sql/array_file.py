"""Named arrays in one immutable file that other processes map into memory: a JSON head, then the arrays, each aligned.

Written under another name and renamed when it is on disk, so a file under its own name is whole. Knows nothing of what the
arrays mean.
"""

import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from warehouse.durable import replace_file

_MAGIC = b"HRARRAY1"
_ALIGNMENT = 64


def write_whole(path: Path, *parts: bytes | memoryview) -> int:
    """Writes a file that is there whole or not at all, also after a power cut; returns its CRC-32. OSError if it cannot."""
    replace_file(path, *parts)
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Writes numeric arrays of any shape under their names; returns the file's CRC-32."""
    head, parts, offset = {}, [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        head[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offset}
        padding = -len(data) % _ALIGNMENT
        parts += [data, bytes(padding)]
        offset += len(data) + padding
    told = orjson.dumps(head)
    told += b" " * (-(len(_MAGIC) + 8 + len(told)) % _ALIGNMENT)
    return write_whole(path, _MAGIC, len(told).to_bytes(8, "little"), told, *parts)


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, mapped: pages are read when they are used and shared with every process that maps them. They stay
    valid when the file is removed. Raises ValueError if it is no such file or is cut short, OSError if it cannot be read."""
    with open(path, "rb") as file:
        # private, so that the arrays count as writable for torch; nothing writes them
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.fstat(file.fileno()).st_size else b""
    start = len(_MAGIC) + 8
    if held[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is not a file of arrays")
    end = start + int.from_bytes(held[len(_MAGIC) : start], "little")
    arrays = {}
    for name, told in orjson.loads(held[start:end]).items():
        dtype, shape = np.dtype(told["dtype"]), told["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(held, dtype, count, end + told["offset"]).reshape(shape)
    return arrays


def checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def text_arrays(name: str, texts: pa.Array) -> dict[str, np.ndarray]:
    """Texts (string, no nulls) as two arrays."""
    if texts.null_count:
        raise ValueError(f"{name} holds {texts.null_count} nulls, and texts of a store are never null")
    whole = pa.concat_arrays([texts, texts.slice(0, 0)])  # of a slice only what it shows
    _, offsets, data = whole.buffers()
    ends = np.frombuffer(offsets, np.int32, len(whole) + 1) if offsets and len(whole) else np.zeros(1, np.int32)
    first, last = int(ends[0]), int(ends[-1])
    held = np.frombuffer(data, np.uint8)[first:last] if data is not None and data.size else np.zeros(0, np.uint8)
    return {f"{name}.ends": ends - np.int32(first), f"{name}.utf8": held}


def texts_of(name: str, arrays: Mapping[str, np.ndarray]) -> pa.Array:
    """The texts of `text_arrays`, without copying."""
    ends, data = arrays[f"{name}.ends"], arrays[f"{name}.utf8"]
    return pa.StringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data))
