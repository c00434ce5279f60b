"""What every HTML page of camtrain shares: its environment, its assets, and the hash that lets its script run."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@functools.cache
def environment() -> Environment:
    """Templates of the package; all text is escaped, a name that is missing is an error."""
    made = Environment(
        loader=PackageLoader("camtrain.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters["unbroken"] = lambda text: text.replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    made.filters["number"] = lambda value: "-" if value != value else f"{value:.2f}"
    return made


@functools.cache
def asset(name: str) -> Markup:
    """A style or script of the package, to be put into a page as it is."""
    path = Path(__file__).parent / "templates" / name
    return Markup(path.read_text(encoding="utf-8").strip())  # noqa: S704  (a file of the package)


def script_hash(script: str) -> str:
    """The SHA-256 that a Content-Security-Policy names, so that no other script runs on the page.

    Example:
        >>> script_hash("")
        '47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
