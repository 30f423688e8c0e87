"""Image and text encoders, their projections, the clustering head, and loading and saving of models.

Shape legend of the whole project. Tensors carry these letters as suffix of their name (``patches_BND``), and the public
signatures of model, losses and segmentation as annotation (``Float[Tensor, "B N D"]``). A digit is that size itself.

    A  candidate classes: those that are best at some pixel
    B  images of the batch of one worker, or their texts
    C  classes
    D  numbers of an embedding in the space that images and texts share
    E  entries of a vocabulary: classes, synonyms, negative words, background words
    F  numbers of a feature of an encoder
    G  global views of an image
    H  rows of pixels
    K  clusters, or prototypes of the DINO head
    L  local views of an image
    N  patches of an image, h x w of them, row by row
    O  offsets on a grid: displacements, or neighbours of a pixel
    P  noun phrases
    Q  images of the batches of all workers, or their texts
    R  rows selected, sampled or flattened from other axes
    S  synonyms
    T  tokens of a transformer, of a text or of an image
    V  views of an image, the global ones first
    W  columns of pixels
    X  pixels or points in a list
    h  rows of the patch grid, or of another grid coarser than the pixels
    w  columns of that grid
"""

from vilseg.model.image_encoder import ImageFeatures
from vilseg.model.network import ImageEmbeddings
from vilseg.model.vilseg import ViLSeg

__all__ = ["ImageEmbeddings", "ImageFeatures", "ViLSeg"]
