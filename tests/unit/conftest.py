"""Check shapes and types of tensor code in the unit tests; see "Shapes" in CONTRIBUTING.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest

if TYPE_CHECKING:
    from tests.unit.flaky_store import FlakyStore

# Modules whose functions take what users give (segmenter, video, result) check it by themselves, and are tested with wrong types.
CHECKED = [
    "vilseg.model",
    "vilseg.losses",
    *(
        f"vilseg.segmentation.{name}"
        for name in (
            "class_embeddings",
            "class_scores",
            "dense_features",
            "guided_filter",
            "pixel_labeling",
            "refinement",
            "sliding_window",
            "video_propagation",
        )
    ),
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture
def flaky_store(tmp_path: Path, no_server: str, monkeypatch: pytest.MonkeyPatch) -> FlakyStore:
    """``s3://`` URIs lead to a folder; ``away(n)`` lets the next n requests fail. Pauses between tries are short."""
    from tests.unit.flaky_store import FlakyStore
    from vilseg.storage import retry, s3

    store = FlakyStore(tmp_path / "flaky-store")
    (tmp_path / "flaky-store").mkdir()
    monkeypatch.setattr(s3, "connect", lambda settings, *, for_upload=False: store)
    monkeypatch.setattr(s3, "boto_client", lambda settings, *, timeout_s=0.0: store)
    monkeypatch.setattr(retry, "_PAUSES_S", (0.01, 0.01))
    return store
