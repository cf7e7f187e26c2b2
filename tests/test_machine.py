"""What a process settles before torch is loaded."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource
import numpy as np
from esol.base.machine import keep_memory
if KEEP:
    keep_memory()
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages()
print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")
def test_freed_memory_is_kept_for_the_next_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 MiB that were freed before the system hands out no page again, unless the user has set malloc himself."""

    def pages(keep: bool) -> int:
        code = PAGES.replace("KEEP", str(keep))
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    few = 16  # where the kernel has huge pages at hand the 64 MiB are 32 of them
    assert pages(True) < few < pages(False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert pages(True) > few
