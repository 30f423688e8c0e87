"""Uploads of videos and queries of their state: the part of `serve.video_jobs` that runs in the ingress."""

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
_TOUCH_S = 30.0
"""Seconds between two updates of the time of a queued job."""
_CLEANUP_S = 600.0
"""Minimum seconds between two deletions of expired jobs."""

SegmentVideo = Callable[[VideoJob], Awaitable[None]]


class VideoUploads:
    """Receiver of videos: stores each video, queues its segmentation, and reports the state of that job.

    Args:
        config: Configuration with the storage directory and the queue of videos.
        segment_video: Function that segments one video; see `serve.video_jobs.segment_video_job`.
    """

    def __init__(self, config: ServeConfig, segment_video: SegmentVideo) -> None:
        self._config = config.videos
        self._jobs = VideoJobs(config.videos.storage, config.videos.keep_hours)
        self._segment_video = segment_video
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cleaned_at = -_CLEANUP_S
        self._uploading = 0

    async def add(self, video: IO[bytes], model_uri: str, vocabulary: Vocabulary, key_every: int) -> str:
        """Store a video, queue its segmentation, and return its id.

        Args:
            video: Binary file with the encoded video.
            model_uri: URI of the model.
            vocabulary: Class list.
            key_every: Interval in frames between key frames, which alone pass through the model.

        Raises:
            HttpError: The queue is full.
        """
        if len(self._tasks) + self._uploading >= self._config.queue + self._config.replicas:
            raise overloaded_error()
        self._uploading += 1
        try:
            await self._clean_up()
            video_id = await asyncio.to_thread(self._jobs.add, video)
        finally:
            self._uploading -= 1
        job = VideoJob(
            id=video_id,
            directory=self._jobs.directory(video_id),
            model_uri=model_uri,
            vocabulary=vocabulary,
            key_every=key_every,
        )
        task = asyncio.create_task(self._supervise(job))
        self._tasks[video_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(video_id, None))
        return video_id

    async def state(self, video_id: str) -> dict[str, Any] | None:
        """Return the state of a video; see `VideoJobs.state`."""
        return await asyncio.to_thread(self._jobs.state, video_id)

    async def delete(self, video_id: str) -> None:
        """Cancel the segmentation of a video and delete it.

        Raises:
            HttpError: There is no such video.
        """
        if await self.state(video_id) is None:
            raise unknown_video_error()
        task = self._tasks.get(video_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await asyncio.to_thread(self._jobs.delete, video_id)

    async def result(self, video_id: str, name: str) -> str:
        """Return the URI of a result file.

        Args:
            video_id: Id of the video.
            name: `serve.video_jobs.OVERLAY` or `serve.video_jobs.MASKS`.

        Raises:
            HttpError: There is no such video, or its segmentation is not done.
        """
        state = await self.state(video_id)
        if state is None:
            raise unknown_video_error()
        if state["status"] != "done":
            raise HttpError(404, "not_done", f"The video is {state['status']}; there is nothing to fetch.")
        return storage.join(self._jobs.directory(video_id), name)

    async def _supervise(self, job: VideoJob) -> None:
        segmentation = asyncio.ensure_future(self._segment_video(job))
        try:
            while not (await asyncio.wait([segmentation], timeout=_TOUCH_S))[0]:
                await asyncio.to_thread(self._jobs.touch, job.id)
            segmentation.result()
        except Exception:
            log.exception("video %s failed", job.id)
            sentence = "The segmentation of the video failed; the server's log says why."
            await asyncio.to_thread(write_state, job.directory, {"status": "failed", "frames": 0, "error": sentence})
        finally:
            segmentation.cancel()

    async def _clean_up(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._cleaned_at > _CLEANUP_S:
            self._cleaned_at = now
            await asyncio.to_thread(self._jobs.delete_old)
