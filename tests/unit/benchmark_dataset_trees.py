"""Small trees in the layouts of the published datasets, as their archives unpack."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 16)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, format="JPEG")
    return buffer.getvalue()


def png(values: np.ndarray, *, palette: bool = False) -> bytes:
    picture = Image.fromarray(values)
    if palette:
        picture = Image.frombytes("P", picture.size, values.tobytes())
        picture.putpalette(bytes(range(256)) * 3)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def stripes(*values: int) -> np.ndarray:
    """A mask with one vertical stripe for each value."""
    return np.tile(np.repeat(np.array(values, np.uint8), -(-SIZE[1] // len(values)))[: SIZE[1]], (SIZE[0], 1))


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def voc(root: Path) -> None:
    """`root` = VOCdevkit/VOC2012: two images to evaluate on, a third one without a mask of classes."""
    write(
        root,
        {
            **{f"JPEGImages/{name}.jpg": jpeg() for name in ("2007_000033", "2007_000042", "2008_000001")},
            "SegmentationClass/2007_000033.png": png(stripes(0, 255, 15, 255), palette=True),
            "SegmentationClass/2007_000042.png": png(stripes(0, 19, 16, 20), palette=True),
            "SegmentationObject/2007_000033.png": png(stripes(0, 255, 1, 255), palette=True),
            "ImageSets/Segmentation/val.txt": b"2007_000033\n2007_000042\n",
            "ImageSets/Segmentation/train.txt": b"2008_000001\n",
        },
    )


def context(root: Path) -> None:
    """`root` = VOCdevkit/VOC2010 after mmsegmentation's converter."""
    write(
        root,
        {
            **{f"JPEGImages/{name}.jpg": jpeg() for name in ("2008_000002", "2008_000003")},
            "SegmentationClassContext/2008_000002.png": png(stripes(0, 55, 58, 20)),
            "SegmentationClassContext/2008_000003.png": png(stripes(1, 59)),
            "ImageSets/SegmentationContext/val.txt": b"2008_000002\n",
            "ImageSets/SegmentationContext/train.txt": b"2008_000003\n",
        },
    )


def coco_stuff(root: Path, *, renumbered: bool = False) -> None:
    """`root` holds images and annotations: the published masks, or those that mmsegmentation writes."""
    values = stripes(0, 70, 170, 255) if renumbered else stripes(0, 79, 181, 255)
    suffix = "_labelTrainIds.png" if renumbered else ".png"
    write(
        root,
        {
            "images/val2017/000000000139.jpg": jpeg(),
            "images/train2017/000000000009.jpg": jpeg(),
            f"annotations/val2017/000000000139{suffix}": png(values),
        },
    )


def ade20k(root: Path) -> None:
    """`root` = ADEChallengeData2016."""
    write(
        root,
        {
            "images/validation/ADE_val_00000001.jpg": jpeg(),
            "images/training/ADE_train_00000001.jpg": jpeg(),
            "annotations/validation/ADE_val_00000001.png": png(stripes(0, 1, 13, 150)),
            "annotations/training/ADE_train_00000001.png": png(stripes(1)),
            "objectInfo150.txt": b"Idx\tRatio\tTrain\tVal\tStuff\tName\n",
        },
    )
