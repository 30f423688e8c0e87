"""The Ray Serve application: an ingress with API and page, replicas that segment images, and replicas that segment videos.

``vilseg serve`` starts it; so does ``serve run`` or ``serve deploy`` with ``serve/config.yaml``, whose import path is
``serve.deployment:build``.
"""

import asyncio
import logging
import threading
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application

from serve.config import Replicas, ServeConfig
from serve.request_types import SegmentRequest, SegmentResponse
from serve.rollout import load_model, roll_out
from serve.router import await_or_cancel
from vilseg.errors import UserError

log = logging.getLogger("ray.serve")


class ModelReplica:
    """Replica that loads models and segments images; an adapter of `serve.engine` to Ray Serve.

    Args:
        config: Configuration of the replicas.
        max_pixels: Maximum width x height of an image, checked by its header.
        preload: URIs of models to load before the first request.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: Replicas, max_pixels: int, preload: list[str]
    ) -> None:
        from serve.engine import (
            Engine,
            LoadedModel,
        )  # imports torch, which is not needed where the application is built

        @serve.multiplexed(max_num_models_per_replica=config.models)
        async def load(uri: str) -> LoadedModel:
            return await asyncio.to_thread(LoadedModel, uri)

        self._load = load
        self._engine = Engine(batch=config.batch, max_pixels=max_pixels, threads=max(1, int(config.cpus)))
        for uri in reversed(preload[: config.models]):
            await self.load(uri)

    async def load(self, uri: str) -> str | None:
        """Load a model; return None if it is loaded, otherwise an error message."""
        try:
            await self._load(uri)
        except UserError as error:
            return str(error)
        return None

    async def segment(self, request: SegmentRequest) -> SegmentResponse:
        """Segment an image with the model whose URI is the multiplexed model id of the call."""
        try:
            model = await self._load(serve.get_multiplexed_model_id())
        except UserError:
            log.exception("the model '%s' cannot be loaded", request.model)
            sentence = f"The model '{request.model}' cannot be loaded at the moment."
            return SegmentResponse(status=503, code="model_unavailable", message=sentence)
        return await self._engine.segment(model, request)


class VideoReplica:
    """Replica that segments videos one after the other."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._models: dict[str, Any] = {}

    async def segment(self, job: Any) -> None:
        """Run a `serve.video_jobs.VideoJob`; end early if the call is cancelled."""
        from serve.engine import LoadedModel
        from serve.video_jobs import segment_video_job

        def segmenter() -> Any:
            if job.model_uri not in self._models:
                self._models = {job.model_uri: LoadedModel(job.model_uri)}
            return self._models[job.model_uri].segmenter(job.vocabulary)

        cancelled = threading.Event()
        try:
            await asyncio.to_thread(segment_video_job, job, segmenter, self._config.limits, cancelled)
        finally:
            cancelled.set()


@serve.ingress()
class Ingress:
    """Ingress with the HTTP API and the page. It is a single process, because it holds the state of open pages.

    Args:
        config: Configuration of the deployment.
        models: Handle of the deployment of `ModelReplica`.
        videos: Handle of the deployment of `VideoReplica`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: ServeConfig, models: Any, videos: Any
    ) -> None:
        from serve.api_keys import ApiKeys
        from serve.metrics import Metrics
        from serve.router import Router
        from serve.video_uploads import VideoUploads

        self._config = config
        self._built_with = dict(config.models)
        self._model_handle = models
        self._video_handle = videos
        self._keys = await asyncio.to_thread(ApiKeys, config.keys) if config.keys else None
        self._metrics = Metrics()
        self._uploads = VideoUploads(config, self._segment_video)
        self._router = Router(models, config.models, self._metrics)
        reason = await load_model(models, config.models[config.default_model])
        if reason:
            raise UserError(f"the model '{config.default_model}' cannot be served: {reason}")
        self._rollout: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from serve.fastapi_app import make_app

        return make_app(
            config=lambda: self._config,
            keys=self._keys,
            metrics=self._metrics,
            segment=self._router.segment,
            uploads=self._uploads,
            is_overloaded=self._router.is_overloaded,
        )

    async def reconfigure(self, changes: dict[str, Any]) -> None:
        """Change ``models`` without interruption: an old model is served until a replica has loaded its replacement."""
        try:
            # An empty user_config means the models that the application was built with.
            wanted = ServeConfig(models=changes.get("models") or self._built_with)
        except ValidationError as error:
            raise ValueError(f"user_config of the ingress must hold 'models', as NAME: URI ({error})") from error
        if wanted.models == self._config.models:
            return
        if self._rollout is not None:
            self._rollout.cancel()
        # In the background, because Ray Serve admits no request while this method runs.
        self._rollout = asyncio.create_task(self._roll_out(wanted.models))

    async def _roll_out(self, wanted: dict[str, str]) -> None:
        settled = await roll_out(self._model_handle, self._config.models, wanted)
        if settled == self._config.models:
            return
        self._router.models = settled
        self._config = self._config.replace(models=settled)
        log.info("models are now: %s", ", ".join(settled))

    async def _segment_video(self, job: Any) -> None:
        try:
            await await_or_cancel(self._video_handle.segment.remote(job))
        except RayActorError:
            log.warning("the process that worked on video %s died; once more", job.id)
            await await_or_cancel(self._video_handle.segment.remote(job))


def build(args: ServeConfig) -> Application:
    """Build the Ray Serve application.

    When ``args`` of a running application change, new processes are started before old ones stop, if the cluster has
    resources for both.

    Args:
        args: Configuration of the deployment: ``args`` in ``serve/config.yaml``.
    """
    if not args.models:
        raise ValueError("there is no model to serve: args.models must hold NAME: URI")
    replicas, videos, grace = args.replicas, args.videos, args.limits.seconds
    models = serve.deployment(
        ModelReplica,
        name="models",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=replicas.ongoing,
        max_queued_requests=replicas.queue,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=grace,
        autoscaling_config={
            "min_replicas": replicas.minimum,
            "max_replicas": max(replicas.minimum, replicas.maximum),
            "target_ongoing_requests": replicas.target_ongoing,
            "upscale_delay_s": replicas.upscale_delay,
            "downscale_delay_s": replicas.downscale_delay,
        },
    )
    video_workers = serve.deployment(
        VideoReplica,
        name="videos",
        num_replicas=videos.replicas,
        ray_actor_options={"num_cpus": videos.cpus, "num_gpus": videos.gpus},
        max_ongoing_requests=1,
    )
    # max_ongoing_requests is high, because the ingress mostly waits, and the router refuses requests under overload.
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        # Placed on Ray's head node, like the HTTP proxy, so that the ingress survives the loss of any other machine.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=grace,
    )
    preload = list(dict.fromkeys(args.models.values()))
    held = models.bind(replicas, args.limits.pixels, preload)  # type: ignore[attr-defined]
    return ingress.bind(args, held, video_workers.bind(args))  # type: ignore[attr-defined]  # @serve.ingress hides the class
