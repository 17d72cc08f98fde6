"""What MLflow is to be told is written down first: training never waits for a server, and nothing is lost or doubled.

`<folder>/queue.jsonl` holds the entries in order, each with its time; `sent.json` how far each server has got and what
it answered; `refused.jsonl` the entries that a server will never take, with its reason. Sending an entry twice changes
nothing, so a crash between sending and noting it does no harm.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.files import write_whole

_BATCH = 900  # metric points in one request, of at most 1000
_PAUSES = (1.0, 2.0, 5.0, 10.0)  # seconds before trying again
_NEVER = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}

Entry = dict[str, Any]
Known = dict[str, Any]
"""What the server has answered so far: run_id, version, …"""
Handler = Callable[[Any, Known, Entry], Known | None]


class Spool:
    """The entries of one run. `handlers` maps a kind of entry to what sends it with the client of `connect`."""

    def __init__(
        self, folder: Path, uri: str, connect: Callable[[], Any], handlers: dict[str, Handler],
        tell: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self._folder, self._uri, self._connect, self._handlers, self._tell = folder, uri, connect, handlers, tell
        self._queue, self._sent, self._refused = (
            folder / name for name in ("queue.jsonl", "sent.json", "refused.jsonl")
        )
        self._client: Any = None
        self._lock = threading.Lock()
        self.failing_since: float | None = None
        self.error: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_half_line()
        servers = json.loads(self._sent.read_text()) if self._sent.exists() else {}
        self._servers: dict[str, Known] = {uri: {"offset": 0}, **servers}

    @property
    def known(self) -> Known:
        """What the server has answered."""
        return self._servers[self._uri]

    def put(self, kind: str, **entry: Any) -> None:
        """Write an entry down; it is sent while `sending`."""
        line = json.dumps({"kind": kind, "time": time.time(), "key": uuid.uuid4().hex, **entry}) + "\n"
        with self._lock, self._queue.open("a", encoding="utf-8") as stream:
            stream.write(line)

    def entries(self) -> list[Entry]:
        """All entries ever put, sent or not."""
        return [json.loads(line) for line in self._queue.read_text().splitlines()] if self._queue.exists() else []

    def unsent(self) -> int:
        """Entries that the server has not got yet."""
        return len(self._waiting())

    def refused(self) -> list[Entry]:
        """Entries that a server will never take, with its reason."""
        return [json.loads(line) for line in self._refused.read_text().splitlines()] if self._refused.exists() else []

    @contextmanager
    def sending(self, pause: float = 1.0) -> Iterator[None]:
        """Inside, entries are sent by a thread as they come. What cannot be sent stays."""
        done = threading.Event()

        def run() -> None:
            failures = 0
            while not done.is_set():
                failures = 0 if self.send() else failures + 1
                done.wait(_PAUSES[min(failures, len(_PAUSES)) - 1] if failures else pause)

        thread = threading.Thread(target=run, name="mlflow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def drain(self, patience: float) -> int:
        """Send until all is sent, or the server has failed to answer for `patience` seconds. Returns what is left."""
        while self.unsent():
            if not self.send() and self.failing_since and time.monotonic() - self.failing_since > patience:
                break
            if self.failing_since:
                time.sleep(0.5)
        return self.unsent()

    def send(self) -> bool:
        """Send what is waiting. Returns whether the server took or refused all of it; otherwise `error` says why."""
        try:
            while batch := _first_batch(self._waiting()):
                self._client = self._client or self._connect()
                self._send_batch(batch)
                self._answered()
        except Exception as error:  # whatever it is, training must not end for it
            self.error, self._client = error, None
            if not self.failing_since:
                self.failing_since = time.monotonic()
                self._tell(f"MLflow does not take what it is told: {_short(error)}. It is kept in {self._folder}.")
            return False
        self._answered()
        return True

    def _answered(self) -> None:
        if self.failing_since:
            self._tell("MLflow answers again")
        self.failing_since = self.error = None

    def _send_batch(self, batch: list[tuple[Entry, int]]) -> None:
        entry = {**batch[0][0]}
        if len(batch) > 1:
            entry["points"] = [point for member, _ in batch for point in member["points"]]
        try:
            answer = self._handlers[entry["kind"]](self._client, self.known, entry)
        except Exception as error:
            hopeless = isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _NEVER
            if not hopeless or entry["kind"] == "run":
                raise
            if len(batch) > 1:  # find the one
                for member in batch:
                    self._send_batch([member])
                return
            with self._refused.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**entry, "reason": str(error)[:500]}) + "\n")
            answer = None
        self.known.update(answer or {}, offset=batch[-1][1])
        write_whole(self._sent, json.dumps(self._servers, indent=2))

    def _waiting(self) -> list[tuple[Entry, int]]:
        """(entry, place in the file after it) of those not sent."""
        if not self._queue.exists():
            return []
        place, found = self.known["offset"], []
        with self._queue.open("rb") as stream:
            stream.seek(place)
            for line in stream:
                if not line.endswith(b"\n"):  # it is being written
                    break
                place += len(line)
                found.append((json.loads(line), place))
        return found

    def _drop_half_line(self) -> None:
        """What a process that was killed while writing left."""
        if self._queue.exists():
            content = self._queue.read_bytes()
            if not content.endswith(b"\n"):
                self._queue.write_bytes(content[: content.rfind(b"\n") + 1])


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _first_batch(waiting: list[tuple[Entry, int]]) -> list[tuple[Entry, int]]:
    """The first entry, or as many metric entries from there on as fit into a request."""
    batch, points = waiting[:1], len(waiting[0][0].get("points", ())) if waiting else 0
    for entry, place in waiting[1:]:
        points += len(entry.get("points", ()))
        if entry["kind"] != "metrics" or batch[0][0]["kind"] != "metrics" or points > _BATCH:
            break
        batch.append((entry, place))
    return batch
