"""The two ONNX graphs as torch modules: image tower and text tower of a model."""

from __future__ import annotations

from torch import Tensor, nn

from vilseg.model import ViLSeg


class ImageTower(nn.Module):
    """Image encoder, projection and clustering head as one module with the outputs of ``image.onnx``.

    Shape: (B, 3, H, W) RGB in 0..1 -> global embedding (B, D), patch embeddings (B, D, h, w), assignments (B, K, h, w).
    """

    def __init__(self, model: ViLSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the global embedding, patch embeddings and soft cluster assignments."""
        features, patches_BNF = self.model.dense_features(images, self.model.segmentation.attention)
        patches_BND = self.model.embed_patches(features._replace(patches=patches_BNF))
        assignments_BNK = self.model.cluster_logits(features).softmax(-1)
        maps = (values.transpose(1, 2).unflatten(2, features.grid) for values in (patches_BND, assignments_BNK))
        return self.model.embed_pooled(features), *maps


class TextTower(nn.Module):
    """Text encoder with projection. Shape: (B, T) token ids -> (B, D), unit length."""

    def __init__(self, model: ViLSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embedding of each row of token ids; padding is recognised by its token id."""
        return self.model.embed_text(self.model.text_encoder(tokens))
