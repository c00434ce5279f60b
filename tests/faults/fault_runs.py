"""One process that has imported everything, and a child of it for each run: `python fault_runs.py FILE.json`.

The file lists runs: words of the command line each. Beside it stands then what they gave: exit status and stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import camtrain.callbacks.attention_monitor
import camtrain.cli.lightning_cli  # noqa: F401
import fault_parts  # noqa: F401
from camtrain.cli.main import main


def child(words: list[str], log: Path) -> int:
    """The exit status of a run, negative for a signal."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            sys.argv = ["camtrain", *words]
            code = main(words)
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    order = Path(sys.argv[1])
    results = []
    for number, words in enumerate(json.loads(order.read_text())):
        log = order.with_name(f"log_{number}.txt")
        results.append([child(words, log), log.read_text(errors="replace")])
    order.with_suffix(".done").write_text(json.dumps(results))
