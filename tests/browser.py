"""A real browser for tests: the client of `recipes/_browser.py`, and the rule for machines without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from _browser import Browser, find_browser

sys.path.pop(0)

__all__ = ["Browser", "needs_browser"]

# CI installs a browser: a test that skipped there would hide that it is gone, so it fails instead.
needs_browser = pytest.mark.skipif(
    find_browser() is None and not os.environ.get("CI"), reason="Chromium and chromedriver are not installed"
)
