"""Freed memory stays with the process after `keep`, and goes back to the system with `trim`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd.speed import malloc

CODE = """
import json, resource, sys
from sd.speed.malloc import keep, large_pages, trim
import torch
if "keep" in sys.argv: keep()
if "large" in sys.argv: large_pages()

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b = (torch.ones(1 << 24) for _ in "ab")  # 64 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

for _ in range(8):  # glibc 2.36 finds holes again after some rounds
    use()
faults, kept = use(), anonymous()
trim()
print(json.dumps({"faults": faults, "given back": kept - anonymous()}))
"""


def glibc():
    return sys.platform == "linux" and hasattr(malloc.ctypes.CDLL(None), "mallopt")


@pytest.mark.slow
@pytest.mark.skipif(not glibc(), reason="for glibc on Linux")
def test_freed_memory_is_kept_until_it_is_trimmed():
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def run(*args):
        command = [sys.executable, "-c", CODE, *args]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout)

    without, kept = run(), run("keep")
    assert without["faults"] > 10_000
    assert kept["faults"] < 3000
    assert kept["given back"] > 120_000  # kB
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert run("large")["faults"] < 3000


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_another_c_library_is_left_alone(platform, monkeypatch):
    """One without mallopt and malloc_trim is asked for them, on Linux, and nothing else; elsewhere none is loaded."""
    asked = []

    class Other:
        def __getattr__(self, name):
            asked.append(name)
            raise AttributeError(name)

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Other())
    monkeypatch.setattr(malloc.sys, "platform", platform)
    malloc.keep()
    malloc.trim()
    assert asked == (["mallopt", "malloc_trim"] if platform == "linux" else [])


def test_an_older_glibc_gets_as_much_as_it_takes(monkeypatch):
    asked = []

    def mallopt(what, value):
        asked.append((what, value))
        return not (what == malloc.M_MMAP_THRESHOLD and value > 1 << 25)

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    malloc.keep()
    assert asked[:2] == [(malloc.M_MMAP_THRESHOLD, 2**31 - 1), (malloc.M_MMAP_THRESHOLD, 1 << 25)]
    assert len(asked) == 4


def test_what_the_user_says_of_pages_stays(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    malloc.large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
