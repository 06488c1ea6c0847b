"""The engine in a thread of its own, for a server whose event loop must stay free."""

import threading
from concurrent.futures import Future

from serving.engine.engine import Engine
from serving.engine.rows import Drawing, OnPreview, Request


class EngineStopped(RuntimeError):
    """The engine was stopped before the picture was finished."""


class EngineThread:
    """Steps an engine for as long as there is something to do.

    Futures and previews may be handed to an event loop: `await asyncio.wrap_future(thread.submit(request))`,
    where cancelling the task cancels the picture, and `on_preview` with `loop.call_soon_threadsafe`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # no request may slip in behind the last look at the queue
        self._stopping = False

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def submit(self, request: Request, on_preview: OnPreview | None = None) -> Future[Drawing]:
        """As `Engine.submit`.

        Raises:
            ValueError: naming the field that this model cannot do.
            QueueFull: as many requests wait as may.
            EngineStopped: after `stop`.
        """
        with self._lock:
            if self._stopping:
                raise EngineStopped("the engine is stopped")
            return self.engine.submit(request, on_preview)

    def stop(self) -> None:
        """End after the step that is being made; what is unfinished fails with EngineStopped."""
        with self._lock:
            self._stopping = True
        self.engine.work.set()
        self._thread.join()
        self.engine.fail_all(EngineStopped("the engine was stopped"))
        self.engine.close()

    def _run(self) -> None:
        self.engine.workers.take()
        while True:
            self.engine.work.clear()
            if self._stopping:  # asked after clearing, so that being woken to stop is not forgotten
                return
            try:
                if not self.engine.step():
                    self.engine.work.wait()
            except Exception as error:  # a thread that died would leave every request without an answer
                self.engine.fail_all(error)
