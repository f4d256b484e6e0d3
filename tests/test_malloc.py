"""Freed memory stays with the process after `keep`, and goes back to the system with `trim`."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sd import malloc

CODE = """
import json, resource, sys
from sd.malloc import keep, trim
import torch
if "keep" in sys.argv: keep()

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b = (torch.ones(1 << 24) for _ in "ab")  # 64 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

use()
faults, kept = use(), anonymous()
trim()
print(json.dumps({"faults": faults, "given back": kept - anonymous()}))
"""


def glibc():
    return sys.platform == "linux" and hasattr(malloc.ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not glibc(), reason="for glibc on Linux")
def test_freed_memory_is_kept_until_it_is_trimmed():
    def run(*args):
        done = subprocess.run([sys.executable, "-c", CODE, *args], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    without, with_ = run(), run("keep")
    assert with_["faults"] < without["faults"] / 10
    assert with_["given back"] > 120_000  # kB


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # what the user says stays
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: SimpleNamespace())
    with pytest.raises(AttributeError):
        malloc.ctypes.CDLL(None).mallopt  # noqa: B018
    malloc.keep()
    malloc.trim()
    assert malloc.os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
