"""The Ray Serve application: an ingress with the API and the page, replicas that hold models, workers for films.

``serve run serve.deployment:build`` and ``serve/config.yaml`` start it; so does ``vilseg serve``.
"""

import asyncio
import logging
import threading
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError

from serve.config import Replicas, ServeConfig
from serve.request_types import SegmentRequest, SegmentResponse
from serve.router import cancelling
from vilseg.errors import UserError

log = logging.getLogger("ray.serve")


class ModelReplica:
    """A process that holds models: see `serve.engine`.

    Args:
        config: how many models, and pictures a pass.
        max_pixels: what a picture's header may announce.
        preload: URIs of models to hold before the first request.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: Replicas, max_pixels: int, preload: list[str]
    ) -> None:
        from serve.engine import Engine, LoadedModel  # torch is wanted here, not where the application is built

        @serve.multiplexed(max_num_models_per_replica=config.models)
        async def load(uri: str) -> LoadedModel:
            return await asyncio.to_thread(LoadedModel, uri)

        self._load = load
        self._engine = Engine(batch=config.batch, max_pixels=max_pixels, threads=max(1, int(config.cpus)))
        for uri in reversed(preload[: config.models]):
            await self.load(uri)

    async def load(self, uri: str) -> str | None:
        """Hold a model; returns what is wrong with it, if anything is."""
        try:
            await self._load(uri)
        except UserError as error:
            return str(error)
        return None

    async def answer(self, question: SegmentRequest) -> SegmentResponse:
        """The answer of the model that the request was sent to by its multiplexed id, which is its URI."""
        try:
            model = await self._load(serve.get_multiplexed_model_id())
        except UserError:
            log.exception("the model '%s' cannot be loaded", question.model)
            sentence = f"The model '{question.model}' cannot be loaded at the moment."
            return SegmentResponse(status=503, code="model_unavailable", message=sentence)
        return await self._engine.answer(model, question)


class VideoReplica:
    """A process that segments films, one after the other."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._models: dict[str, Any] = {}

    async def work(self, job: Any) -> None:
        """See `serve.video_jobs.segment_video_job`; ends early when the call is cancelled."""
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
    """The HTTP API and the page. One process: pages keep their state in it.

    Args:
        config: the deployment.
        models: handle of the replicas.
        films: handle of the film workers.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: ServeConfig, models: Any, films: Any
    ) -> None:
        from serve.api_keys import ApiKeys
        from serve.metrics import Metrics
        from serve.router import Router
        from serve.video_uploads import VideoUploads

        self._config = config
        self._built_with = dict(config.models)
        self._replicas = models
        self._video_workers = films
        self._keys = await asyncio.to_thread(ApiKeys, config.keys) if config.keys else None
        self._metrics = Metrics()
        self._desk = VideoUploads(config, self._work_on_video)
        self._dispatcher = Router(models, config.models, self._metrics)
        wrong = await self._loaded(config.models[config.default_model])
        if wrong:
            raise UserError(f"the model '{config.default_model}' cannot be served: {wrong}")
        self._rollout: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from serve.fastapi_app import make_app

        return make_app(
            config=lambda: self._config,
            keys=self._keys,
            metrics=self._metrics,
            ask=self._dispatcher.ask,
            films=self._desk,
            is_full=self._dispatcher.is_full,
        )

    async def reconfigure(self, changes: dict[str, Any]) -> None:
        """Take other ``models``: each answers under its name once a replica holds it, and the one before it until then."""
        try:
            # Without any, those that the application was built with.
            wanted = ServeConfig(models=changes.get("models") or self._built_with)
        except ValidationError as error:
            raise ValueError(f"user_config of the ingress must hold 'models', as NAME: URI ({error})") from error
        if wanted.models == self._config.models:
            return
        if self._rollout is not None:
            self._rollout.cancel()
        # In the background: while this method runs, no request is let in.
        self._rollout = asyncio.create_task(self._roll_out(wanted.models))

    async def _roll_out(self, wanted: dict[str, str]) -> None:
        settled: dict[str, str] = {}
        for name, uri in wanted.items():
            wrong = None
            if self._config.models.get(name) != uri:
                try:
                    wrong = await self._loaded(uri)
                except Exception as error:
                    log.exception("loading the model '%s' failed", name)
                    wrong = type(error).__name__
            if wrong:
                log.error("the model '%s' is not rolled out: %s", name, wrong)
            if not wrong or name in self._config.models:
                settled[name] = self._config.models[name] if wrong else uri
        if not settled:
            return  # nothing of it works, so all stays as it is
        self._dispatcher.models = settled
        self._config = self._config.model_copy(update={"models": settled})
        log.info("models are now: %s", ", ".join(settled))

    async def _loaded(self, uri: str) -> str | None:
        """Have a replica hold a model; returns what is wrong with it, if anything is."""
        while True:
            try:
                return await self._replicas.options(multiplexed_model_id=uri).load.remote(uri)
            except (BackPressureError, RayActorError) as error:
                # Busy, or dead: neither says anything of the model.
                log.warning("a model has to wait to be loaded: %s", type(error).__name__)
                await asyncio.sleep(1)

    async def _work_on_video(self, job: Any) -> None:
        try:
            await cancelling(self._video_workers.work.remote(job))
        except RayActorError:
            log.warning("the process that worked on film %s died; once more", job.id)
            await cancelling(self._video_workers.work.remote(job))


def build(args: ServeConfig) -> Application:
    """The application as ``serve run`` and ``serve deploy`` want it; ``args`` are those of the configuration file.

    When they change, new processes are up before old ones stop, where the machines have room for both.
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
    films = serve.deployment(
        VideoReplica,
        name="films",
        num_replicas=videos.replicas,
        ray_actor_options={"num_cpus": videos.cpus, "num_gpus": videos.gpus},
        max_ongoing_requests=1,
    )
    # It waits most of the time, and what is too much for the replicas it refuses itself.
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        # Beside Ray's head, which all depends on, and the entrance there: another machine may be lost without it.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=grace,
    )
    preload = list(dict.fromkeys(args.models.values()))
    held = models.bind(replicas, args.limits.pixels, preload)  # type: ignore[attr-defined]
    return ingress.bind(args, held, films.bind(args))  # type: ignore[attr-defined]  # @serve.ingress hides the class
