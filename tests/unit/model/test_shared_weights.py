"""A model taken apart and put together again says the same and holds no copy of the weights."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vilseg.model import ViLSeg
from vilseg.model.shared_weights import SplitObject, join_weights, split_weights

TEXTS = ["a dog", "two cats"]


def through_shared_memory(parts: SplitObject) -> SplitObject:
    """As Ray's object store hands it out: pickled, its arrays views of a read-only buffer."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(parts, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 20_000 + len(parts.skeleton), "weights travel beside the pickle"
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_on_read_only_weights(make_model: Callable[..., ViLSeg], dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    model.image_encoder.to(memory_format=torch.channels_last)
    parts = through_shared_memory(split_weights(model))
    assert not any(array.flags.writeable for array in parts.arrays if array.size)
    again = join_weights(parts)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for one, other in (
            (model.encode_image(pictures).patches, again.encode_image(pictures).patches),
            (model.encode_text(TEXTS), again.encode_text(TEXTS)),
        ):
            torch.testing.assert_close(one, other)
    assert not again.training
    assert again.segmentation == model.segmentation
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items() if min(tensor.shape, default=2) > 1}
    assert strides == {name: again.state_dict()[name].stride() for name in strides}
    assert any(len(stride) == 4 and stride[1] == 1 for stride in strides.values())
    places = {array.__array_interface__["data"][0] for array in parts.arrays}
    assert {tensor.data_ptr() for tensor in again.state_dict().values() if tensor.numel()} <= places
    assert sum(array.nbytes for array in parts.arrays) >= sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(isinstance(array, np.ndarray) for array in parts.arrays)
