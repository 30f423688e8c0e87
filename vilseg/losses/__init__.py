"""One file a loss: tensors in, scalar out, nothing imported from the model.

Each loss is exact over any number of workers (see ``vilseg.distributed``) and computed in float32.
"""

from vilseg.losses.cross_modal import contrast, patch_contrast
from vilseg.losses.mutual_information import mutual_information_loss
from vilseg.losses.nouns import noun_contrast
from vilseg.losses.vision import VisionContrast

__all__ = ["VisionContrast", "contrast", "mutual_information_loss", "noun_contrast", "patch_contrast"]
