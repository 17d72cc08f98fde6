"""What MLflow is to be told is written down first: training never waits for a server, and nothing is lost or doubled.

`<folder>/queue.jsonl` holds the entries in order, each with its time; `sent.json` how far each server has got and what
it answered; `refused.jsonl` what a server will never take, with its reason. Sending an entry twice changes nothing, so
a crash between sending and noting it does no harm.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.files import append_line, lines_after, read_lines, write_whole, writing
from components.process import in_background
from components.urls import shown_url, without_secrets

_BATCH = 900  # metric points in one request, of at most 1000
_PAUSES = (1.0, 2.0, 5.0, 10.0)  # seconds before trying again
_SHOWN = 600  # characters of an error
_NEVER = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}

Entry = dict[str, Any]
Known = dict[str, Any]
"""What the server has answered so far: run_id, version, …"""
Handler = Callable[[Any, Known, Entry], Known | None]


class Gone(Exception):
    """What an entry wants to send is not there any more."""


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
        self._writing = threading.Lock()
        self._sending = threading.Lock()
        self._failing_since: float | None = None
        self.error: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        servers = json.loads(self._sent.read_text(encoding="utf-8")) if self._sent.exists() else {}
        self._servers: dict[str, Known] = {shown_url(uri): {"offset": 0}, **servers}
        self._read_to = self.known["offset"]
        self._waiting: deque[tuple[Entry, int]] = deque()

    @property
    def known(self) -> Known:
        """What the server has answered."""
        return self._servers[shown_url(self._uri)]

    def put(self, kind: str, **entry: Any) -> None:
        """Write an entry down; it is sent while `sending`.

        Raises:
            StorageError: when it cannot be written.
        """
        with self._writing, writing("What MLflow is to be told", self._queue):
            append_line(self._queue, {"kind": kind, "time": time.time(), "key": uuid.uuid4().hex, **entry})

    def entries(self) -> list[Entry]:
        """All entries ever put, sent or not."""
        return read_lines(self._queue)

    def unsent(self) -> int:
        """Entries that the server has not got yet."""
        with self._sending:
            self._read()
            return len(self._waiting)

    def refused(self) -> list[Entry]:
        """What a server will never take, with its reason."""
        return read_lines(self._refused)

    @contextmanager
    def sending(self, pause: float = 1.0) -> Iterator[None]:
        """Inside, entries are sent by a thread as they come. What is not sent yet on leaving stays."""

        def run(done: threading.Event) -> None:
            failures = 0
            while not done.is_set():
                failures = 0 if self.send(done.is_set) else failures + 1
                done.wait(_PAUSES[min(failures, len(_PAUSES)) - 1] if failures else pause)

        with in_background(run, "mlflow"):
            yield

    def drain(self, patience: float, limit: float = float("inf")) -> int:
        """Send until all is sent, the server has failed to answer for `patience` seconds, or `limit` seconds are over.

        Returns how many entries are left.
        """
        started = time.monotonic()
        while self.unsent() and time.monotonic() - started < limit:
            if self.send(lambda: time.monotonic() - started >= limit):
                continue
            if time.monotonic() - (self._failing_since or started) > patience:
                break
            time.sleep(0.5)
        return self.unsent()

    def send(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """Send what is waiting, until `enough`. Returns False when the server does not take it; `error` says why."""
        with self._sending:
            try:
                while not enough() and (batch := self._next_batch()):
                    self._client = self._client or self._connect()
                    self._send_batch(batch)
                    if self._failing_since:
                        self._tell("MLflow answers again")
                    self._failing_since = self.error = None
            except Exception as error:  # whatever it is, training must not end for it
                self.error, self._client = error, None
                if not self._failing_since:
                    self._failing_since = time.monotonic()
                    said = " ".join(without_secrets(str(error), self._uri).split())[:_SHOWN].rstrip(".")
                    self._tell(f"MLflow does not take what it is told: {said}. It is kept in {self._folder}.")
                return False
        return True

    def _send_batch(self, batch: list[tuple[Entry, int]]) -> None:
        entry = {**batch[0][0]}
        if len(batch) > 1:
            entry["points"] = [point for member, _ in batch for point in member["points"]]
        answer = self._send_or_refuse(entry)
        self.known.update(answer or {}, offset=batch[-1][1])
        write_whole(self._sent, json.dumps(self._servers, indent=2))
        for _ in batch:
            self._waiting.popleft()

    def _send_or_refuse(self, entry: Entry) -> Known | None:
        """Send it; of metrics that are refused, each point by itself."""
        try:
            return self._handlers[entry["kind"]](self._client, self.known, entry)
        except Exception as error:
            hopeless = isinstance(error, Gone) or getattr(error, "error_code", None) in _NEVER
            if not hopeless or entry["kind"] == "run":
                raise
            if len(entry.get("points", ())) > 1:
                for point in entry["points"]:
                    self._send_or_refuse({**entry, "points": [point]})
                return None
            append_line(self._refused, {**entry, "reason": without_secrets(str(error), self._uri)[:500]})
            return None

    def _next_batch(self) -> list[tuple[Entry, int]]:
        """The first entry that waits, or as many metric entries from there on as fit into a request."""
        self._read()
        batch: list[tuple[Entry, int]] = []
        points = 0
        for entry, place in self._waiting:
            points += len(entry.get("points", ()))
            if batch and ({entry["kind"], batch[0][0]["kind"]} != {"metrics"} or points > _BATCH):
                break
            batch.append((entry, place))
        return batch

    def _read(self) -> None:
        """Put what was written since into `_waiting`, as (entry, place in the file after it)."""
        if not self._queue.exists():
            return
        with self._queue.open("rb") as stream:
            new = list(lines_after(stream, self._read_to))
        self._waiting += new
        self._read_to = new[-1][1] if new else self._read_to
