"""One thread per worker: workers with as many threads as cores wait for one another, and take three times as long."""

from __future__ import annotations

import gc
import logging
import os

import pytest

# The search for doctests would import the conftest.py of two folders under one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "camtrain")


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """A recipe that ran in this process has silenced Lightning: the next file of the same worker must hear it again."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def pytest_collection_finish():
    """What is there by now stays: the garbage collector need not look through it in each of thousands of tests."""
    gc.collect()
    gc.freeze()
