"""Where films are handed in and asked after: the ingress' side of `serve.video_jobs`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import IO, Any

from serve.config import ServeConfig
from serve.http_errors import HttpError, overloaded_error, unknown_video_error
from serve.video_jobs import VideoJob, VideoJobs, write_state
from vilseg import storage
from vilseg.text.vocabulary import Vocabulary

log = logging.getLogger("ray.serve")
_TOUCH_EVERY = 30.0
_TIDY_EVERY = 600.0

Work = Callable[[VideoJob], Awaitable[None]]


class VideoUploads:
    """Keeps films, has them worked on, and says how far they are.

    Args:
        config: where films are kept, how long, and how many may wait.
        work: segments one film; see `serve.video_jobs.segment_video_job`.
    """

    def __init__(self, config: ServeConfig, work: Work) -> None:
        self._config = config.videos
        self._films = VideoJobs(config.videos.storage, config.videos.keep_hours)
        self._work = work
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tidied = -_TIDY_EVERY
        self._coming = 0

    async def add(self, film: IO[bytes], model_uri: str, vocabulary: Vocabulary, key_every: int) -> str:
        """Take a film in; returns its id.

        Raises:
            HttpError: enough others wait.
        """
        if len(self._tasks) + self._coming >= self._config.queue + self._config.replicas:
            raise overloaded_error()
        self._coming += 1
        try:
            await self._tidy()
            video_id = await asyncio.to_thread(self._films.add, film)
        finally:
            self._coming -= 1
        job = VideoJob(
            id=video_id,
            folder=self._films.folder(video_id),
            model_uri=model_uri,
            vocabulary=vocabulary,
            key_every=key_every,
        )
        task = asyncio.create_task(self._see_through(job))
        self._tasks[video_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(video_id, None))
        return video_id

    async def state(self, video_id: str) -> dict[str, Any] | None:
        """See `VideoJobs.state`."""
        return await asyncio.to_thread(self._films.state, video_id)

    async def delete(self, video_id: str) -> None:
        """End the work on a film and forget it.

        Raises:
            HttpError: there is no such film.
        """
        if await self.state(video_id) is None:
            raise unknown_video_error()
        task = self._tasks.get(video_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await asyncio.to_thread(self._films.delete, video_id)

    async def result(self, video_id: str, name: str) -> str:
        """URI of a result.

        Raises:
            HttpError: there is no such film, or it is not done.
        """
        state = await self.state(video_id)
        if state is None:
            raise unknown_video_error()
        if state["status"] != "done":
            raise HttpError(404, "not_done", f"The film is {state['status']}; there is nothing to fetch.")
        return storage.join(self._films.folder(video_id), name)

    async def _see_through(self, job: VideoJob) -> None:
        work = asyncio.ensure_future(self._work(job))
        try:
            while not (await asyncio.wait([work], timeout=_TOUCH_EVERY))[0]:
                await asyncio.to_thread(self._films.touch, job.id)
            work.result()
        except Exception:
            log.exception("film %s failed", job.id)
            sentence = "The work on the film failed; the server's log says why."
            await asyncio.to_thread(write_state, job.folder, {"status": "failed", "frames": 0, "error": sentence})
        finally:
            work.cancel()

    async def _tidy(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._tidied > _TIDY_EVERY:
            self._tidied = now
            await asyncio.to_thread(self._films.delete_old)
