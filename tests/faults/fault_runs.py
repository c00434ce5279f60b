"""One process that has imported everything, and children of it for each run: `python fault_runs.py FILE.json`.

The file lists runs: how many processes, as torchrun would start them, and the words of the command line. Beside it
stands then what each gave: the exit status of every process (negative for a signal), all output, and whether any
process that a run started was still there when it had ended. Each process leads a group of its own, which gets SIGTERM
from here when a run asks for it by SIGUSR1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import fault_parts  # noqa: F401

import camtrain.callbacks.attention_monitor
import camtrain.cli.lightning_cli  # noqa: F401
from camtrain.cli.main import main


def start(words: list[str], log: Path, environment: dict[str, str]) -> int:
    """The process id of a child that runs a command line."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    code = 1
    try:
        sys.argv = ["camtrain", *words]
        code = main(words)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" not in environment:
        sys.exit(code)  # as a user's process does: Python waits for its workers
    os._exit(code)


def ranks(number: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"TORCHELASTIC_RUN_ID": "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0",
              "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def run(number: int, words: list[str], log: Path) -> tuple[list[int], bool]:
    """The exit statuses of a run's processes, and: is anybody left of their groups?"""
    started = [start(words, log, environment) for environment in ranks(number)]
    signal.signal(signal.SIGUSR1, lambda *_: [os.killpg(pid, signal.SIGTERM) for pid in started])
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    return statuses, any(map(alive, started))


def alive(group: int) -> bool:
    """Is there a process in this group?"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    order = Path(sys.argv[1])
    results = []
    for place, (number, words) in enumerate(json.loads(order.read_text())):
        log = order.with_name(f"log_{place}.txt")
        statuses, left = run(number, words, log)
        results.append([statuses, log.read_text(errors="replace"), left])
    order.with_suffix(".done").write_text(json.dumps(results))
