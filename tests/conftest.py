"""One thread per worker: workers with as many threads as cores wait for one another, and take three times as long."""

from __future__ import annotations

import os

# The search for doctests would import the conftest.py of two folders under one name.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
