"""Resources of training workers on a cluster, without Ray."""

import pytest

from cluster.ray_session import Session
from vilseg.errors import ConfigError


def test_every_worker_takes_a_gpu_where_there_are_any() -> None:
    assert Session(cpus=16, gpus=2).worker_resources(2) == {"CPU": 1.0, "GPU": 1.0}
    assert Session(cpus=16, gpus=0).worker_resources(4) == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("session", "words"),
    [
        (Session(cpus=16, gpus=2), r"trainer\.workers is 4, but there are 2 GPUs .* set trainer\.workers=2"),
        (Session(cpus=16, gpus=1), r"there is 1 GPU .* set trainer\.workers=1"),
        (Session(cpus=3, gpus=8), r"there are 3 CPUs"),
    ],
)
def test_workers_that_would_silently_train_on_cpus_are_refused(session: Session, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        session.worker_resources(4)


@pytest.mark.parametrize(("workers", "nodes", "most"), [(4, 1, 4), (4, 2, 2), (5, 2, 3), (1, 4, 1)])
def test_workers_are_spread_evenly(workers: int, nodes: int, most: int) -> None:
    assert Session(cpus=32, gpus=0, nodes=nodes).workers_per_node(workers) == most
