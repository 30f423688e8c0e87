"""Reading pairs epoch after epoch does not take more and more memory."""

from pathlib import Path

import pytest

from benchmarks.data_memory import measure, write

_EPOCHS = 12


@pytest.mark.parametrize("mixed", [1, 3])
def test_memory_is_flat_over_epochs(tmp_path: Path, mixed: int) -> None:
    megabytes = measure(write(tmp_path / "pairs", shards=6, pairs=150), mixed=mixed, epochs=_EPOCHS)
    assert len(megabytes) == _EPOCHS
    # An epoch takes more or less than another, as its order puts shards side by side, and the first the least: some 10 MB of
    # 110 here. An epoch reads 11 MB, so a reader that kept a quarter of it would be seen.
    assert max(megabytes[_EPOCHS // 2 :]) <= 1.07 * max(megabytes[: _EPOCHS // 2]), megabytes
