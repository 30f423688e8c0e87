"""Fixtures of the integration tests: one object store and one Ray cluster for all of them."""

import multiprocessing
from collections.abc import Iterator

import pytest

from cluster.object_store import ObjectStore
from cluster.ray_session import Session, ray_session
from serve.launch import RAY_SERVE_ENVIRONMENT


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server with the bucket "vilseg"; the AWS_* variables lead to it until the session ends."""
    store = ObjectStore.start(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
            patch.delenv(variable, raising=False)
        for variable, value in store.environment().items():
            patch.setenv(variable, value)
        yield store
    store.stop(timeout=0)  # its data ends with it, so there is nothing to wait for


@pytest.fixture(scope="session")
def ray_cluster(object_store: ObjectStore) -> Iterator[Session]:
    """A local cluster on all CPUs; after the object store, because workers take the AWS_* variables from its start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_SERVE_ENVIRONMENT.items():
            patch.setenv(name, value)
        with ray_session() as session:
            yield session


@pytest.fixture
def start_method() -> str:
    """Two workers are forked from a server of their own: this process may have Ray's threads, which do not survive a fork."""
    needed = ["tests.integration.test_sharding", "torch.distributed.fsdp"]
    needed += [f"transformers.models.{name}.modeling_{name}" for name in ("vit", "bert")]
    multiprocessing.get_context("forkserver").set_forkserver_preload(needed)
    return "forkserver"
