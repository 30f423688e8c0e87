"""The frozen encoder of the photo benchmark against the network of the package that it comes from."""

import torch
from efficientnet_lite_pytorch import EfficientNet

from benchmarks.encoders import EfficientNetLite


def test_features_and_answer_are_those_of_the_package() -> None:
    torch.manual_seed(0)
    network = EfficientNet.from_name("efficientnet-lite2").eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training, so that folding it matters
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 260, 260)  # its own size, which its padding is fixed for
    with torch.no_grad():
        expected = network.extract_features((images * 255 - 127) / 128)
        answers = network._fc(expected.permute(0, 2, 3, 1)).softmax(-1)
        encoder = EfficientNetLite(network, answer_scale=20.0)
        found = encoder(images)
    assert found.grid == tuple(expected.shape[2:]) == (9, 9)
    assert found.patches.shape == (2, 81, encoder.num_features)
    features, answer = found.patches.split([1280, 1000], dim=2)
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(answer, 20 * answers.flatten(1, 2), atol=1e-4, rtol=1e-3)
