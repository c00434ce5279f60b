"""A stand-in for the W&B server on 127.0.0.1: what the client needs for online runs, and ways in which it fails.

It answers the few GraphQL operations that wandb asks for, keeps what the file stream brings, and takes uploads.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40
SLOW = 0.4


class WandbServer:
    """Serves until `close`.

    Args:
        how: `ok`; `500` answers every request with an error of the server; `hang` accepts and never answers; `slow`
            answers after `SLOW` seconds.

    Attributes:
        how: The same; may be changed while it serves.
        runs: Run id -> what is known of it: `config`, `summary`, `history` (lines), `files` (names).
        alerts: What `run.alert` sent.
        artifacts: Inputs of the artifacts that were made.
        asked: How often each operation was asked for.
    """

    def __init__(self, how: str = "ok") -> None:
        self.how = how
        self.runs: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.connections: set[Any] = set()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Gone: nobody listens any more, and open connections break off."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def history(self, run: str) -> list[dict[str, Any]]:
        """What the run has logged, line by line."""
        return [json.loads(line) for _, line in sorted(self.runs[run]["history"].items())]

    # What GraphQL asks for --------------------------------------------------------------------------------------------

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL operation; an empty one for what is not known."""
        self.asked[operation] += 1
        return getattr(self, f"_{operation}", lambda **_: {})(**given.get("input", given))

    def _Viewer(self, **_: Any) -> dict[str, Any]:
        me = {"id": "me", "entity": "me", "username": "me", "email": "me@localhost", "flags": "{}"}
        return {"viewer": {**me, "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, **_: Any) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, name: str, project: str, config: str | None = None, **more: Any) -> dict[str, Any]:
        fresh = name not in self.runs
        run = self.runs.setdefault(name, {"config": {}, "summary": {}, "history": {}, "files": [], "project": project})
        run["config"].update(json.loads(config or "{}"))
        bucket = {"id": f"id-{name}", "name": name, "displayName": name, "description": "", "sweepName": None}
        bucket |= {"config": json.dumps(run["config"]), "historyLineCount": len(run["history"])}
        bucket["project"] = {"id": "p", "name": project, "entity": {"id": "me", "name": "me"}}
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def _RunResumeStatus(self, project: str, name: str, **_: Any) -> dict[str, Any]:
        model = {"id": "p", "name": project, "entity": {"id": "me", "name": "me"}}
        if (run := self.runs.get(name)) is None:
            return {"model": {**model, "bucket": None}}
        last = [line for _, line in sorted(run["history"].items())][-1:]
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "config": json.dumps(run["config"]),
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        bucket |= {"summaryMetrics": json.dumps(run["summary"]), "displayName": name}
        bucket |= {"historyLineCount": len(run["history"]), "historyTail": json.dumps(last)}
        bucket |= {"eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0}
        return {"model": {**model, "bucket": bucket}}

    def _CreateRunFiles(self, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        listed = [{"name": name, "uploadUrl": f"{self.url}/store/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": listed}}

    def _NotifyScriptableRunAlert(self, **alert: Any) -> dict[str, Any]:
        self.alerts.append(alert)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, **_: Any) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, **given: Any) -> dict[str, Any]:
        self.artifacts.append(given)
        made = {"id": f"a{len(self.artifacts)}", "state": "PENDING"}
        made["artifactSequence"] = {"id": "s", "latestArtifact": None}
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, **given: Any) -> dict[str, Any]:
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json"}
        file |= {"uploadUrl": f"{self.url}/store/manifest", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _UpdateArtifactManifest(self, **given: Any) -> dict[str, Any]:
        return {"updateArtifactManifest": self._CreateArtifactManifest()["createArtifactManifest"]}

    def _CreateArtifactFiles(self, artifactFiles: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        edges = []
        for number, file in enumerate(artifactFiles):
            url = f"{self.url}/store/artifact/{number}"
            node = {"id": str(number), "name": file["name"], "displayName": file["name"], "uploadUrl": url}
            node |= {"uploadHeaders": [], "storagePath": url, "uploadMultipartUrls": None, "artifact": {"id": "a"}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, **_: Any) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """What the file stream brings: history and summary."""
        kept = self.runs.setdefault(run, {"config": {}, "summary": {}, "history": {}, "files": []})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"]):
            kept["history"][history["offset"] + number] = line
        for line in files.get("wandb-summary.json", {}).get("content", ())[-1:]:
            kept["summary"] = json.loads(line)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, content: Any, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _serve(self) -> None:
        body = self._body()
        if self.owner.how == "hang":
            self.owner.asked["hang"] += 1
            self.owner.closing.wait()
            return
        if self.owner.how == "slow":
            time.sleep(SLOW)
        if self.owner.how == "500":
            self.owner.asked["500"] += 1
            self._send({"errors": [{"message": "out of order"}]}, 500)
            return
        parts = self.path.strip("/").split("/")
        if parts == ["graphql"]:
            query = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]
            self._send({"data": self.owner.answer(operation, query.get("variables") or {})})
            return
        if parts[-1] == "file_stream":
            self.owner.stream(parts[-2], json.loads(body).get("files") or {})
        elif parts[0] == "store" and parts[1] in self.owner.runs:
            self.owner.runs[parts[1]]["files"].append("/".join(parts[2:]))
        self.owner.asked[parts[0]] += 1
        self._send({})

    do_POST = do_PUT = do_GET = _serve  # noqa: N815
