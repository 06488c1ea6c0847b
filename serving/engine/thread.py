"""Run the engine in its own thread, for a server whose event loop must stay free."""

import threading
from concurrent.futures import Future

from serving.engine.engine import Engine
from serving.engine.rows import Drawing, OnPreview, Request


class EngineStopped(RuntimeError):
    """The engine was stopped before the image was finished."""


class EngineThread:
    """Step an engine while it has work.

    In an event loop, `await asyncio.wrap_future(thread.submit(request))`, where cancelling the task cancels
    the request; let `on_preview` use `loop.call_soon_threadsafe`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # no request may be queued after `stop` has begun
        self._stopping = False

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def submit(self, request: Request, on_preview: OnPreview | None = None) -> Future[Drawing]:
        """Queue a request, see `Engine.submit`.

        Raises:
            RequestError: the model does not support a field.
            QueueFull: the queue is full.
            EngineStopped: `stop` was called.
        """
        with self._lock:
            if self._stopping:
                raise EngineStopped("the engine is stopped")
            return self.engine.submit(request, on_preview)

    def stop(self) -> None:
        """Stop after the current step; unfinished requests fail with EngineStopped."""
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
            if self._stopping:  # checked after clearing, so that the wake-up of `stop` is not lost
                return
            try:
                if not self.engine.step():
                    self.engine.work.wait()
            except Exception as error:  # a dead thread would leave every request unanswered
                self.engine.fail_all(error)
