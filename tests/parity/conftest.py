"""The record of differences: `make parity` prints it at the end, as the table that the documentation shows."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from parity_tools import FORCED, difference

# The search for doctests would import the conftest.py of two folders under one name.
collect_ignore = ["conftest.py"]

_ROWS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_ROWS] = {}


@pytest.fixture
def agree(request):
    """agree(ours, theirs, library=, method=, net=, around=, tolerance=): asserts, and keeps the worst difference."""
    rows = request.config.stash[_ROWS]

    def check(ours, theirs, *, library, method, net, around, tolerance):
        found = difference(ours, theirs)
        key = (library, version(library), method, net, around)
        rows[key] = max(found, rows.get(key, 0.0))
        assert found < tolerance, f"{method} differs from {library} on {net}: {found:.1e} of the largest value"

    return check


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if not FORCED or not rows:
        return
    terminalreporter.section("parity: largest difference, as a share of the largest value")
    terminalreporter.write_line("| library | method | net | difference | how it is asked so that it is right |")
    terminalreporter.write_line("|---|---|---|---|---|")
    for (library, number, method, net, around), found in sorted(rows.items()):
        terminalreporter.write_line(f"| {library} {number} | {method} | {net} | {found:.0e} | {around} |")
