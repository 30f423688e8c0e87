"""Content of ``export.json``: sizes, names, temperatures, and the formulas that classify regions."""

from __future__ import annotations

from typing import Any

from vilseg.export.onnx_file import OPSET
from vilseg.export.output_directory import IMAGE_TOWER, STATISTICS, TEXT_TOWER, TOKENIZER
from vilseg.model import ViLSeg
from vilseg.segmentation.dense_features import patch_size

FORMAT = 1
NAMING = (
    "texts: for every class name (tv_monitor is 'tv monitor'), synonym and background word the mean of its text_embedding "
    "over the prompts; minus caption_mean if center_text; scaled to unit length: t_c",
    "regions: r_k = unit(sum_n a_nk p_n) with patch_embeddings p_n and assignments a_nk; g = unit(mean_n p_n); with "
    "m = image_mix, r'_k = unit((1 - m) r_k + m g) and p'_n = unit((1 - m) p_n + m g)",
    "scores: s_nc = w sum_k a_nk <r'_k, t_c> + (1 - w) <p'_n, t_c> with w = region_weight",
    "calibration: s'_nc = (s_nc - q <patch_mean, t_c>) (mean_c'(sigma_c') / sigma_c)^q with q = calibration and "
    "sigma_c = sqrt(t_c^T patch_covariance t_c), the mean over all texts",
    "classes: the scores of a class's names become one by synonyms (max, mean, or logsumexp = temperature log mean exp(s / "
    "temperature)); background has the best of the background words (of its own name where there are none) plus "
    "background_bias, and of the negative words, which are no class where there is no background",
    "objectness: to the best of the background words is added objectness (1 - 2 sum_k a_nk exp(-c_k^2 / 2)) with c_k = "
    "sum_{n on the border} a_nk / sqrt(sum_n a_nk)",
    "gate: where set, only so many classes stay, those of the highest score anywhere in the picture",
    "pixels: scores enlarged bilinearly to the picture's size; label = arg max, its probability by soft-max of "
    "scores / temperature; below threshold it is background or no class",
)
"""Steps from ONNX outputs to labels, as in `vilseg.segmentation.class_scores`; the optional refinement is not included."""


def describe(model: ViLSeg, name: str, *, difference: float, fixed_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the content of ``export.json`` as a dictionary.

    Args:
        model: the model that is exported.
        name: name of the model.
        difference: largest absolute difference between the outputs of the ONNX files and of torch.
        fixed_size: (H, W) in pixels if the image tower accepts only this size; None if it accepts any size.
    """
    encoder, settings = model.text_encoder, model.segmentation
    size = {"height": fixed_size[0], "width": fixed_size[1]} if fixed_size else None
    bias = None if model.logit_bias is None else float(model.logit_bias)
    return {
        "format": FORMAT,
        "model": name,
        "opset": OPSET,
        "largest_difference_from_torch": difference,
        "embedding_dim": model.embedding_dim,
        "clusters": model.config.clusters,
        "image": {
            "file": IMAGE_TOWER,
            "input": {
                "name": "images",
                "type": "float32",
                "shape": ["B", 3, "H", "W"],
                "colours": "RGB",
                "range": [0, 1],
            },
            "input_size": settings.input_size,
            "multiple_of": patch_size(model),
            "max_aspect": settings.max_aspect,
            "fixed_size": size,
            "resize": "bicubic with antialias; shorter side input_size, longer side at most max_aspect times that, both "
            "rounded to multiple_of" + ("; or straight to fixed_size, which is all that it takes" if size else ""),
            "outputs": {
                "image_embedding": ["B", model.embedding_dim],
                "patch_embeddings": ["B", model.embedding_dim, "h", "w"],
                "assignments": ["B", model.config.clusters, "h", "w"],
            },
        },
        "text": {
            "file": TEXT_TOWER,
            "input": {"name": "tokens", "type": "int64", "shape": ["B", "T"]},
            "tokenizer": f"{TOKENIZER}/tokenizer.json",
            "max_tokens": encoder.max_tokens,
            "fixed_length": encoder.fixed_length,
            "pad_id": encoder.tokenizer.pad_token_id,
            "outputs": {"text_embedding": ["B", model.embedding_dim]},
        },
        "contrast": {"temperature": 1 / float(model.scale), "logit_bias": bias},
        "statistics": STATISTICS,
        "segmentation": settings.model_dump(mode="json"),
        "naming": list(NAMING),
    }
