"""A server for tests: the shipped tiny model with a longer context, on loopback, in a thread of its own."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lilliput.base.job import Job
from lilliput.models import hub

KEY = "test-key"


def longer(folder: Path, context: int = 2048) -> Path:
    """A copy of lilliput-tiny whose positions go on (RoPE has no table of its own)."""
    shutil.copytree(hub.SHIPPED / "lilliput-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


class Running:
    """A server that runs: its address, what it serves, and how to stop it."""

    def __init__(self, overrides: list[str], keys: tuple[str, ...] = (KEY,), page: Path | None = None, models: int = 1) -> None:
        from lilliput.cli.serve import served
        from lilliput.serve import http
        from lilliput.serve.metrics import Board
        from lilliput.serve.openai.house import House

        board = Board()
        names = ["tiny", *(f"tiny-{at}" for at in range(2, models + 1))]
        self.house = House([served(Job.load(None, ["http.port=0", f"http.name={name}", *overrides]), board)[0] for name in names], board)
        self.served = self.house.first
        self.server = http.Server(http.application(self.house, keys, page), self.served.options, self.house.stop, self._ready)
        self.port, self._up = 0, threading.Event()
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        assert self._up.wait(30), "the server did not come up"

    def _ready(self, port: int) -> None:
        self.port = port
        self._up.set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options):
        """OpenAI's own client; it does not try again by itself."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60, **options)

    def blocks_used(self) -> int:
        """Blocks of the cache that running requests hold."""
        return self.served.engine.stats().blocks_used

    def stop(self) -> None:
        """Drain and end."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def running(folder: Path, *overrides: str, **options) -> Iterator[Running]:
    """A server over a copy of the tiny model in `folder`."""
    server = Running([f"model={longer(folder / 'tiny')}", *overrides], **options)
    try:
        yield server
    finally:
        server.stop()
