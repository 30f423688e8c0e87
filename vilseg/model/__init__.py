"""Both towers, the clustering head, and how a model is saved and loaded.

Shape legend of the whole project; dense tensor code carries the letters as suffixes (``patches_BND``):

    B images    V views    N patches (= h x w)    h w patch grid    H W pixels
    D embedding (shared space)    F features of the image encoder    K clusters    C classes    P phrases    T tokens
"""

from vilseg.model.image_encoder import ImageFeatures
from vilseg.model.vilseg import ImageEmbeddings, ViLSeg

__all__ = ["ImageEmbeddings", "ImageFeatures", "ViLSeg"]
