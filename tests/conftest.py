import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else no process of the tests hears Ctrl-C

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import transformers  # noqa: F401  # now, or its log would go to the captured stream of the first test that needs it

import sd
from tests.layouts import make_model


@pytest.fixture(scope="session")
def tiny():
    """A small model with random weights; leave it as it is."""
    return make_model()


@pytest.fixture(scope="session")
def shapes():
    """The built-in model; leave it as it is."""
    return sd.load("shapes")


def pytest_make_parametrize_id(val):
    """Name bytes by their number: gzip writes the time into its own, and every process must find the same tests."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None
