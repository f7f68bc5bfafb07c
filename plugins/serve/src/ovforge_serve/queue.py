"""Who runs when: a bounded queue, one turn at a time for each pipeline, and an end for requests that nobody awaits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ovforge import Stop
from ovforge_serve.joining import Joinable, Waiting
from ovforge_serve.pipelines import Loadable, Pipelines, Served
from ovforge_serve.settings import CLIENT_GONE, HttpError, Settings

if TYPE_CHECKING:
    from starlette.requests import Request

    from ovforge import Pipeline, Result
    from ovforge_serve.metrics import Metrics

__all__ = ["Queue"]

T = TypeVar("T")


class Queue:
    """Runs calls of pipelines in their threads, in the order in which they came."""

    def __init__(self, pipelines: Pipelines, settings: Settings, metrics: Metrics) -> None:
        self._pipelines, self._settings, self._metrics = pipelines, settings, metrics
        self._turns = {served.name: asyncio.Semaphore(served.width) for served in pipelines.all()}
        self._joinable = {served.name: Waiting(settings.batch, metrics.joined.inc) for served in pipelines.all()}
        self._running: set[Stop] = set()
        self._waiting = 0
        self._seconds = 1.0
        """How long calls took, the last ones counting most."""

    async def run(
        self, request: Request, served: Loadable, call: Callable[[Any, Stop], T], stop: Stop | None = None
    ) -> T:
        """Return what `call` makes of the pipeline, or the model, and `stop`.

        Raises HttpError if too many wait, if the time is over, and if the client goes away; the run then ends at its
        next step.
        """
        stop = stop or Stop()
        return await self._awaited(request, stop, self._turn(served, stop, lambda content: call(content, stop)))

    async def join(
        self, request: Request, served: Served, given: Mapping[str, Any], answer: Callable[[Result], T]
    ) -> T:
        """Return what `answer` makes of a call's result, as `run` does; it may run as one with others that wait."""
        stop, waiting = Stop(), self._joinable[served.name]
        call = Joinable(given, stop, answer)
        waiting.add(call)

        def run(pipeline: Pipeline) -> T:
            waiting.run(pipeline, call)
            result: T = call.done.result()
            return result

        async def first() -> T:
            """Take a turn, unless another call's turn brings the answer."""
            done = asyncio.wrap_future(call.done)
            done.add_done_callback(_looked_at)  # the turn tells the same error, and a client that left needs none
            turn = asyncio.create_task(self._turn(served, stop, run, lambda: waiting.remove(call)))
            try:
                await asyncio.wait({turn, done}, return_when=asyncio.FIRST_COMPLETED)
                result: T = await (turn if turn.done() and not isinstance(turn.exception(), _Taken) else done)
                return result
            finally:
                turn.cancel()

        try:
            return await self._awaited(request, stop, first())
        finally:
            waiting.remove(call)

    async def _awaited(self, request: Request, stop: Stop, turn: Coroutine[Any, Any, T]) -> T:
        work = asyncio.create_task(turn)
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, timeout=self._settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise HttpError(CLIENT_GONE, "the client went away")
            raise HttpError(
                504,
                f"it took more than {self._settings.timeout:g} s",
                hint="Ask for less at a time, or raise --timeout.",
            )
        finally:
            stop.ask()
            for task in (work, gone):
                task.cancel()

    def stop_all(self) -> None:
        """Let all runs end at their next step."""
        for stop in tuple(self._running):
            stop.ask()

    async def _turn(
        self, served: Loadable, stop: Stop, call: Callable[[Any], T], begin: Callable[[], bool] = lambda: True
    ) -> T:
        """Call when it is its turn. Raises _Taken if `begin` says then that there is nothing to do any more."""
        turns = self._turns[served.name]
        with self._place(turns):
            began = time.perf_counter()
            await turns.acquire()
        if not begin():
            turns.release()
            raise _Taken
        self._metrics.waited.labels(served.name).observe(time.perf_counter() - began)
        self._running.add(stop)
        self._metrics.running.labels(served.name).inc()
        run = asyncio.get_running_loop().run_in_executor(served.threads, self._call, served, call)

        def end(done: asyncio.Future[T]) -> None:
            turns.release()
            self._running.discard(stop)
            self._metrics.running.labels(served.name).dec()
            _looked_at(done)

        # The turn lasts until the thread ends, whether or not somebody still waits for it.
        run.add_done_callback(end)
        return await asyncio.shield(run)

    def _call(self, served: Loadable, call: Callable[[Any], T]) -> T:
        with self._pipelines.use(served) as content:
            began = time.perf_counter()
            try:
                return call(content)
            finally:
                self._seconds += 0.1 * (time.perf_counter() - began - self._seconds)

    @contextlib.contextmanager
    def _place(self, turns: asyncio.Semaphore) -> Iterator[None]:
        """Hold a place among those that wait. Raises HttpError if there is none."""
        if self._waiting >= self._settings.queue and turns.locked():
            self._metrics.refused.inc()
            raise HttpError(
                429,
                f"{self._waiting} requests are waiting",
                hint="Try again later.",
                retry_after=self._seconds * self._waiting,
            )
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)


class _Taken(Exception):
    """Another call's thread runs this one, too."""


def _looked_at(done: asyncio.Future[Any]) -> None:
    """Look at the exception of what ended: nobody else may, and asyncio complains of those that nobody looked at."""
    if not done.cancelled():
        done.exception()


async def _disconnected(request: Request) -> None:
    """Return when the client has closed the connection; the request's body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
