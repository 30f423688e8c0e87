"""Check shapes and types of tensor code in the unit tests; see "Shapes" in CONTRIBUTING.md."""

import jaxtyping

# Modules whose functions take what users give (segmenter, video, result) check it by themselves, and are tested with wrong types.
CHECKED = [
    "vilseg.model",
    "vilseg.losses",
    *(
        f"vilseg.segmentation.{name}"
        for name in (
            "class_embeddings",
            "class_scores",
            "dense_features",
            "guided_filter",
            "refinement",
            "sliding_window",
            "video_propagation",
        )
    ),
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
