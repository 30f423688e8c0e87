"""Published datasets on S3: found below a prefix, read as they are on a disk."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit import benchmark_dataset_trees as trees
from vilseg import storage
from vilseg.errors import DataError
from vilseg.evaluation.datasets import open_dataset

pytestmark = pytest.mark.usefixtures("object_store")


def test_a_dataset_on_s3_is_that_on_disk(tmp_path: Path) -> None:
    trees.voc(tmp_path / "VOCdevkit" / "VOC2012")
    trees.coco_stuff(tmp_path)
    uri = "s3://vilseg/tests/published"
    storage.upload_folder(tmp_path, uri)
    for kind in ("voc", "coco-stuff"):
        here, there = list(open_dataset(f"{kind}:{tmp_path}")), list(open_dataset(f"{kind}:{uri}/"))
        assert [item.name for item in here] == [item.name for item in there]
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(one.mask, other.mask)
            np.testing.assert_array_equal(one.image, other.image)
    with pytest.raises(DataError, match=f"{uri} does not hold ADE20K"):
        open_dataset(f"ade20k:{uri}")
