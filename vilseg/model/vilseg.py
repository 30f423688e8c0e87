"""ViLSeg, the public model class: the network with methods to create, load and save it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vilseg.config import ModelConfig, SegmentationConfig
from vilseg.model import serialization
from vilseg.model.image_encoder import build_image_encoder
from vilseg.model.network import Network
from vilseg.model.text_encoder import build_text_encoder
from vilseg.text.tokenizer import train_tokenizer


class ViLSeg(Network):
    """The model of ViL-Seg (arXiv 2207.08455, section 3): two encoders, their projections, and the online clustering head.

    Create one with :meth:`from_config` or :meth:`from_pretrained`.

    Example:
        >>> import torch
        >>> from vilseg import ViLSeg
        >>> from vilseg.config import ModelConfig
        >>> sizes = {"image_encoder": {"sizes": {"width": 16}}, "text_encoder": {"sizes": {"num_hidden_layers": 1}}}
        >>> config = ModelConfig.model_validate({**sizes, "embedding_dim": 8, "clusters": 5})
        >>> model = ViLSeg.from_config(config, captions=["a dog on the grass", "two cats and a sofa"]).eval()
        >>> embeddings = model.encode_image(torch.rand(2, 3, 32, 32))
        >>> embeddings.pooled.shape, embeddings.patches.shape, embeddings.grid
        (torch.Size([2, 8]), torch.Size([2, 64, 8]), (8, 8))
        >>> model.encode_text(["a cat", "grass", "a sofa"]).shape
        torch.Size([3, 8])
    """

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        captions: Sequence[str] = (),
        *,
        segmentation: SegmentationConfig | None = None,
        temperature: float = 0.07,
    ) -> ViLSeg:
        """Create a new model: checkpoints that ``config`` names are loaded, all other weights are random (torch's global seed).

        Args:
            config: encoders and sizes.
            captions: texts to train a tokenizer on; used only if ``config`` has neither ``init`` nor a text checkpoint.
            segmentation: inference settings that are saved with the model; None takes the defaults.
            temperature: initial value of the learnt temperature; ignored with ``config.init``, whose model has its own.

        Raises:
            ConfigError: sizes are impossible or differ from those of ``config.init``, or an encoder cannot be built from its
                settings.
            ModelError: a checkpoint cannot be loaded.
        """
        if config.init:
            return serialization.load_initial(cls, config, segmentation=segmentation)
        tokenizer = None
        if not config.text_encoder.checkpoint:
            tokenizer = train_tokenizer(captions, config.text_encoder.vocabulary_size)
        image_encoder = build_image_encoder(config.image_encoder)
        text_encoder = build_text_encoder(config.text_encoder, tokenizer=tokenizer)
        return cls(config, image_encoder, text_encoder, segmentation=segmentation, temperature=temperature)

    @classmethod
    def from_pretrained(cls, source: str) -> ViLSeg:
        """Load a model folder from a path, an ``s3://`` URI or a Hugging Face hub id; only safetensors, nothing is unpickled.

        Folders of CLIP, SigLIP and SigLIP 2 (Hugging Face) can be loaded too. They get an untrained clustering head and
        inference settings that classify each patch separately (``region_weight`` 0). The settings for CLIP also replace the
        attention of the last block (``attention`` naclip). To get regions, train with ``model.init`` set to the folder.

        If the folder's configuration names a ``factory``, that function is imported and called with options from the folder,
        so load only folders that you trust.

        Raises:
            ConfigError: the model's factory cannot be imported, or is not a valid factory.
            ModelError: there is no model folder, or its weights do not fit its configuration.
            StorageError: the URI cannot be read.
        """
        return serialization.load(cls, source)

    def save_pretrained(
        self, uri: str, *, card: str | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the model folder: ``config.json``, ``model.safetensors``, tokenizer files, ``README.md`` (the card).

        Args:
            uri: path or URI of the folder.
            card: text of the model card; None writes a title only.
            weights: full tensors by name, written instead of the model's own weights; needed if this process holds only local
                shards of the weights. None writes the model's own.
        """
        serialization.save(self, uri, card=card, weights=weights)
