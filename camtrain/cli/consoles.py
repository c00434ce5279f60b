"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Stdout: a terminal keeps its own width, a file or pipe gets lines wide enough for all columns."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))
