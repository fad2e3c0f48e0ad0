"""A pool of threads, each with its own decoding process; results come in the order of the jobs."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from avs_dist.shards.workers import MediaWorker

Job = TypeVar("Job")
Result = TypeVar("Result")


class DecodePool:
    """Threads suffice around the processes: PNG, FFT and file reading let go of the interpreter lock."""

    def __init__(self, workers: int, deadline_s: float) -> None:
        if workers < 1:
            raise ValueError(f"need at least 1 worker, got {workers}")
        self._workers = [MediaWorker(deadline_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[MediaWorker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="clip")
        # a hanging clip holds back the results after it; so many jobs go on meanwhile
        self._ahead = 16 + 4 * workers

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def map(self, function: Callable[[Job, MediaWorker], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`function(job, worker)` of each job, in parallel, in order."""
        pending: deque[Future[Result]] = deque()
        for job in jobs:
            pending.append(self._threads.submit(self._run, function, job))
            if len(pending) > self._ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(self, function: Callable[[Job, MediaWorker], Result], job: Job) -> Result:
        worker = self._idle.get()
        try:
            return function(job, worker)
        finally:
            self._idle.put(worker)
