"""Memory that is put into huge pages keeps its bytes."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

IN_A_PROCESS_OF_ITS_OWN = """
import mmap, re
import numpy as np
from serving.huge_pages import HUGE_PAGE, collapse

memory = mmap.mmap(-1, 8 * HUGE_PAGE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
numbers = np.frombuffer(memory, np.int64)
numbers[::512] = np.arange(len(numbers[::512]))
memory.madvise(mmap.MADV_NORMAL)
lists = [[place] for place in range(200_000)]
before = numbers.copy()
print(collapse())
assert (numbers == before).all()
assert lists == [[place] for place in range(200_000)]
print(1024 * sum(map(int, re.findall("AnonHugePages: *([0-9]+)", open("/proc/self/smaps").read()))))
"""


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_RELEASE = re.match(r"(\d+)\.(\d+)", platform.release())
HAS_COLLAPSE = (
    sys.platform == "linux"
    and _RELEASE is not None
    and tuple(map(int, _RELEASE.groups())) >= (6, 1)
    and SETTING.exists()
    and "[never]" not in SETTING.read_text()
)


@pytest.mark.skipif(not HAS_COLLAPSE, reason="needs Linux 6.1 with huge pages")
def test_what_is_in_huge_pages_is_what_it_was():
    ended = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, check=True)
    said, are = map(int, ended.stdout.split())
    assert are >= said > 0
