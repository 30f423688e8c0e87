"""Benchmark datasets with masks, read in their published layouts: VOC, Context, COCO-Stuff, ADE20K.

Only the validation split is read, because published results are on this split. Class names are those of the built-in
vocabularies without synonyms. They are the published names, except that joined words of VOC and Context ("pottedplant")
are separated for the text encoder ("potted plant").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vilseg import storage
from vilseg.errors import DataError
from vilseg.evaluation.image_and_mask import ImageFiles, MaskedImage, read_image_and_mask, values_of
from vilseg.text.vocabulary import Vocabulary

_IGNORE = 255
_NO_CLASS = 256


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Directory layout of one benchmark dataset, and the meaning of its mask values.

    All folders and files are relative to the root folder of the dataset.
    """

    title: str
    """Published title, with the year if there are several editions."""
    kind: str
    """KIND in a dataset specification `KIND:URI`; also the name of the built-in vocabulary."""
    within: tuple[str, ...]
    """Possible root folders that unpacking the published archives creates; the URI may be one of them or their parent."""
    images: str
    """Folder of the JPEG images."""
    masks: str
    """Folder of the PNG masks, 8 bit."""
    names: str | None = None
    """Text file with the names of the images to evaluate on, one per line; if None, all images are used."""
    suffixes: Mapping[str, tuple[int, ...]]
    """Suffix of a mask file after the image name -> mask values of the classes, in class order. The first suffix with an
    existing file is used."""
    ignored: tuple[int, ...] = (_IGNORE,)
    """Mask values of ignored pixels."""
    remark: str = ""
    """Origin of files that are not part of the download; appended to error messages."""
    unseen: tuple[str, ...] = ()
    """Names of the unseen classes of the ViL-Seg paper (see `vilseg.evaluation.protocols`); empty if there are none."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of their ids."""
        return Vocabulary.built_in(self.kind).classes

    @property
    def expected(self) -> str:
        """Files that the dataset must have for one image, for error messages."""
        masks = " or ".join(f"{self.masks}/NAME{suffix}" for suffix in self.suffixes)
        listed = f", the names in {self.names}" if self.names else ""
        return f"{self.images}/NAME.jpg and {masks}{listed}{self.remark}"


_NEVER_ANNOTATED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Mask values in 0..181 of the classes that COCO lists but never annotated (nightrome/cocostuff, README, "Labels")."""

LAYOUTS = (
    # Object borders have the value 255 (development kit, section 7, "Segmentation").
    Layout(
        title="PASCAL VOC 2012",
        kind="voc",
        within=("VOC2012", "VOCdevkit/VOC2012"),
        images="JPEGImages",
        masks="SegmentationClass",
        names="ImageSets/Segmentation/val.txt",
        suffixes={".png": tuple(range(21))},
        unseen=("potted plant", "sheep", "sofa", "train", "tv monitor"),
    ),
    # The published masks are MATLAB files with 459 labels. The common benchmark uses PNGs that mmsegmentation converts
    # from them (docs, "Prepare datasets", Pascal Context): 59 classes in the order of the 459 labels (alphabetical), and
    # 0 = background for all other labels.
    Layout(
        title="PASCAL Context",
        kind="context",
        within=("VOC2010", "VOCdevkit/VOC2010"),
        images="JPEGImages",
        masks="SegmentationClassContext",
        names="ImageSets/SegmentationContext/val.txt",
        suffixes={".png": tuple(range(60))},
        remark=" (masks and names as mmsegmentation's tools/dataset_converters/pascal_context.py writes them)",
        unseen=("cow", "motorbike", "sofa", "cat"),
    ),
    # stuffthingmaps_trainval2017.zip has NAME.png with ids 0..181. mmsegmentation renumbers the 171 classes without gaps
    # and writes NAME_labelTrainIds.png into the same folder.
    Layout(
        title="COCO-Stuff 164k",
        kind="coco-stuff",
        within=("coco_stuff164k", "dataset"),
        images="images/val2017",
        masks="annotations/val2017",
        suffixes={
            ".png": tuple(value for value in range(182) if value not in _NEVER_ANNOTATED),
            "_labelTrainIds.png": tuple(range(171)),
        },
        unseen=(
            *("frisbee", "skateboard", "cardboard", "carrot", "scissors", "suitcase", "giraffe", "cow", "road"),
            *("wall-concrete", "tree", "grass", "river", "clouds", "playingfield"),
        ),
    ),
    # 0 = other objects, excluded from all metrics (SceneParsing benchmark, "Evaluation").
    Layout(
        title="ADE20K (SceneParse150)",
        kind="ade20k",
        within=("ADEChallengeData2016",),
        images="images/validation",
        masks="annotations/validation",
        suffixes={".png": tuple(range(1, 151))},
        ignored=(0, _IGNORE),
    ),
)


class PublishedDataset(ImageFiles):
    """Validation split of a benchmark dataset under a local folder or S3 prefix.

    Args:
        uri: root folder of the dataset, or the parent folder into which its archives were unpacked.
        layout: directory layout of the dataset, one of `LAYOUTS`.

    Raises:
        DataError: the folders are not there, or an image or mask is missing. Iterating raises it if a file cannot be
            decoded, a mask and its image differ in size, or a mask value is no class.
        StorageError: the folder cannot be read.
    """

    def __init__(self, uri: str, layout: Layout) -> None:
        self.layout = layout
        self.classes = layout.classes
        self.unseen = layout.unseen
        self._meanings = {suffix: _meanings(values, layout.ignored) for suffix, values in layout.suffixes.items()}
        self._root = _find_root(uri, layout)
        self._files = self._list()

    def __iter__(self) -> Iterator[MaskedImage]:
        for name, image_uri, mask_uri, suffix in self._files:
            image, values = read_image_and_mask(image_uri, mask_uri)
            mask = self._to_classes(values, mask_uri, suffix)
            yield MaskedImage(name=name, image=image, mask=mask, ignore=_IGNORE)

    def _list(self) -> list[tuple[str, ...]]:
        """Return (name, image URI, mask URI, mask suffix) of every image in the split."""
        layout = self.layout
        folders = [storage.join(self._root, layout.images), storage.join(self._root, layout.masks)]
        images, masks = ({entry.relative: entry.uri for entry in storage.list_files(folder)} for folder in folders)
        if layout.names is None:
            names = [image.removesuffix(".jpg") for image in images if image.endswith(".jpg")]
        else:
            text = storage.read_text(storage.join(self._root, layout.names))
            names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise DataError(f"{self._root} has no image of {layout.title}: there must be {layout.expected}")
        found: list[tuple[str, ...]] = []
        for name in names:
            suffix = next((suffix for suffix in layout.suffixes if f"{name}{suffix}" in masks), None)
            if f"{name}.jpg" not in images:
                raise DataError(
                    f"{storage.join(folders[0], name + '.jpg')} is missing, but {layout.names} of {layout.title} names "
                    "it: unpack the archive of images anew"
                )
            if suffix is None:
                raise DataError(
                    f"image {images[f'{name}.jpg']} has no mask in {folders[1]}: {layout.title} has {layout.expected}"
                )
            found.append((name, images[f"{name}.jpg"], masks[f"{name}{suffix}"], suffix))
        return found

    def _to_classes(self, values: np.ndarray, uri: str, suffix: str) -> np.ndarray:
        """Convert mask values to class indices or `_IGNORE`, (H, W) uint8."""
        meanings = self._meanings[suffix]
        present = values_of(values)
        wrong = present[np.append(meanings, _NO_CLASS)[np.minimum(present, 256)] == _NO_CLASS]
        if wrong.size:
            raise DataError(
                f"mask {uri} has the value {wrong[0]}, which is no class of {self.layout.title}: "
                f"are these masks those of another dataset or another numbering of its {len(self.classes)} classes?"
            )
        return meanings.astype(np.uint8)[values]


def _meanings(values: tuple[int, ...], ignored: tuple[int, ...]) -> np.ndarray:
    """Return a (256,) table from each value of an 8-bit mask to its class index, `_IGNORE` or `_NO_CLASS`."""
    meanings = np.full(256, _NO_CLASS, dtype=np.int64)
    meanings[list(ignored)] = _IGNORE
    meanings[list(values)] = np.arange(len(values))
    return meanings


def _find_root(uri: str, layout: Layout) -> str:
    """Return the URI of the root folder, which holds the folders of images and masks."""
    for root in (uri, *(storage.join(uri, folder) for folder in layout.within)):
        if all(storage.is_folder(storage.join(root, folder)) for folder in (layout.images, layout.masks)):
            if layout.names and not storage.exists(storage.join(root, layout.names)):
                raise DataError(f"{root} holds no {layout.names}: {layout.title} has {layout.expected}")
            return root
    raise DataError(f"{uri} does not hold {layout.title}: there must be {layout.expected}")
