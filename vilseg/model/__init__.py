"""Image and text encoders, their projections, the clustering head, and loading and saving of models.

Shape legend of the whole project. These letters name the axes of a tensor, in the suffix of its variable name (``patches_BND``)
and in the annotations of public functions (``Float[Tensor, "B N D"]``). A digit stands for an axis of that size.

    A  candidate classes: those with the highest score at some position
    B  images in the batch of one worker, or their texts
    C  classes
    D  dimensions of an embedding in the space that images and texts share
    E  entries of a vocabulary: classes, synonyms, negative words, background words
    F  dimensions of an encoder's feature vector
    G  global views of an image
    H  rows of pixels
    K  clusters, or prototypes of the DINO head
    L  local views of an image
    N  patches of an image: N = h x w, in row-major order
    O  offsets on a grid: displacements, or neighbours of a position
    P  noun phrases
    Q  images in the batches of all workers together, or their texts
    R  elements selected, sampled or flattened from other axes
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
