"""Reading pairs epoch after epoch takes no more memory than the first time."""

from pathlib import Path

import pytest

from benchmarks.data_memory import measure, write


@pytest.mark.parametrize("mixed", [1, 3])
def test_memory_is_flat_over_epochs(tmp_path: Path, mixed: int) -> None:
    megabytes = measure(write(tmp_path / "pairs", shards=6, pairs=150), mixed=mixed)
    assert len(megabytes) == 3
    assert megabytes[-1] <= 1.07 * megabytes[0]
