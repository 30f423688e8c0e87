"""Prometheus metrics of the ingress; ``GET /metrics`` returns them."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Metrics of one ingress process. Their names are a public interface, because dashboards refer to them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vilseg_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.latency = Histogram(
            "vilseg_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.stages = Histogram(
            "vilseg_stage_seconds",
            "Stages of one image: decode, wait (for the model), model, encode.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "vilseg_batch_pictures",
            "Images that shared a pass through the model, counted for each of them.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.waiting = Gauge("vilseg_pictures_in_work", "Images received and not yet answered.", registry=self.registry)
        self.rejected = Counter(
            "vilseg_rejected", "Images and requests refused, by reason.", ["code"], registry=self.registry
        )
        self.retries = Counter(
            "vilseg_retries", "Images sent again because a replica was lost.", registry=self.registry
        )

    def count_image(self, seconds: Mapping[str, float], batch: int) -> None:
        """Record one image that a replica segmented.

        Args:
            seconds: Duration of each stage; see `SegmentResponse.seconds`.
            batch: Number of images in the same forward pass; 0 if unknown.
        """
        for stage, taken in seconds.items():
            self.stages.labels(stage).observe(taken)
        if batch:
            self.batches.observe(batch)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
