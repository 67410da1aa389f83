"""The engine behind asyncio: one thread owns it and steps while there is work; coroutines read what comes out.

    coroutine   request() checks and may refuse at once -> the thread's mailbox -> deltas through an asyncio.Queue
    thread      mailbox -> submit or cancel -> step -> all deltas of the step in ONE call_soon_threadsafe

The native step runs without the GIL, so the loop answers while it computes. Without work the thread sleeps on a condition
variable and costs nothing. Closing a stream's iterator, or cancelling its task, cancels the request: its blocks are free
before the next step. A step that breaks off ends the answers that ran in it with "error" and the engine goes on.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from lilliput.base.errors import UserError
from lilliput.serve.beams import Beam
from lilliput.serve.request import Delta, Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from lilliput.serve.engine import Engine
    from lilliput.serve.stats import Stats


class AsyncEngine:
    """An engine that coroutines of one event loop share. Nobody else may step it between start() and stop()."""

    def __init__(self, engine: Engine) -> None:
        """`engine`: handed over whole."""
        self.engine = engine
        self._wake = threading.Condition()
        self._mail: deque[Callable[[], object]] = deque()  # for the thread, guarded by _wake
        self._ending = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[int, asyncio.Queue[Delta]] = {}  # touched by the loop alone
        self._quiet: asyncio.Event | None = None  # set while no stream is open

    def start(self) -> None:
        """Start the thread; call it within the event loop whose coroutines will read."""
        assert self._thread is None, "the engine has been started"
        self._loop, self._quiet = asyncio.get_running_loop(), asyncio.Event()
        self._quiet.set()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests, with `drain` let the open ones end (for `timeout` seconds, None = for ever), cancel the rest, end the thread."""
        assert self._thread is not None and self._quiet is not None, "the engine has not been started"
        self._ending = True
        try:
            if drain:
                await asyncio.wait_for(self._quiet.wait(), timeout)
        except TimeoutError:
            pass
        for id in list(self._readers):
            self._post(partial(self.engine.cancel, id))
        thread, self._thread = self._thread, None
        with self._wake:
            self._wake.notify()
        await asyncio.to_thread(thread.join)

    @property
    def ending(self) -> bool:
        """Whether stop() has been called."""
        return self._ending

    def stats(self) -> Stats:
        """What the engine holds and has done, now. Between what a step counts one by one it may be a sequence off; nobody waits for the step."""
        return self.engine.stats()

    async def stream(self, prompt_ids: Sequence[int], sampling: Sampling | Beam | None = None) -> AsyncIterator[Delta]:
        """The deltas of one request, all its answers, as they come. UserError at once for a request that can never run, or while stopping.
        An answer that fails ends with finish_reason "error" and a message; the others go on."""
        assert self._loop is not None and self._quiet is not None, "start() comes first"
        if self._ending:
            raise UserError("the engine is stopping", "it lets the open answers end and takes no new ones", "ask again when it has been restarted")
        request = self.engine.request(prompt_ids, sampling)
        inbox: asyncio.Queue[Delta] = asyncio.Queue()
        self._readers[request.id] = inbox
        self._quiet.clear()
        left = request.sampling.n
        try:
            self._post(lambda: self.engine.submit(request))
            while left:
                delta = await inbox.get()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            del self._readers[request.id]
            if left:
                self._post(lambda: self.engine.cancel(request.id))
            if not self._readers:
                self._quiet.set()

    async def load(self, name: str, folder: Path, replace: bool = False) -> None:
        """Read an adapter beside the engine, then make it known between two steps. UserError where it does not fit, or its name is taken."""
        adapter = await asyncio.to_thread(self.engine.adapters.read, name, folder)
        await self._ask(lambda: self.engine.load(adapter, replace))

    async def unload(self, name: str) -> None:
        """Take no more requests for an adapter; those that run end with it. UserError where it is not loaded."""
        await self._ask(lambda: self.engine.unload(name))

    async def forget_prefixes(self) -> None:
        """Prompts find nothing any more of what was computed before now."""
        await self._ask(lambda: self.engine.pool.forget(None))

    async def _ask(self, act: Callable[[], None]) -> None:
        """Run it on the engine's thread; what it raises is raised here."""
        loop = self._loop
        assert loop is not None, "start() comes first"
        if self._ending:
            raise UserError("the engine is stopping", "it lets the open answers end and takes no new ones", "ask again when it has been restarted")
        done: asyncio.Future[None] = loop.create_future()

        def run() -> None:
            fault: Exception | None = None
            try:
                act()
            except Exception as error:  # the caller's, not the thread's
                fault = error
            with suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(_settle, done, fault)

        self._post(run)
        await done

    def _post(self, act: Callable[[], object]) -> None:
        with self._wake:
            self._mail.append(act)
            self._wake.notify()

    def _run(self) -> None:
        engine, me = self.engine, threading.current_thread()
        while True:
            with self._wake:
                while not self._mail and not engine.busy and self._thread is me:
                    self._wake.wait()
                mail, self._mail = self._mail, deque()
            for act in mail:
                act()
            if not mail and not engine.busy:
                return
            try:
                deltas = engine.step()
            except Exception as fault:  # what the step's answers share broke; those that wait have not been touched
                engine.fail(f"the step broke off: {type(fault).__name__}: {fault}")
                deltas = []
            if deltas and self._loop is not None:
                with suppress(RuntimeError):  # the loop was closed with streams open: nobody reads them
                    self._loop.call_soon_threadsafe(self._hand_out, deltas)

    def _hand_out(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            reader = self._readers.get(delta.id)
            if reader is not None:
                reader.put_nowait(delta)


def _settle(done: asyncio.Future[None], fault: Exception | None) -> None:
    if done.done():  # nobody waits any more
        return
    if fault is None:
        done.set_result(None)
    else:
        done.set_exception(fault)
