"""File types by name: bulk segmentation decodes every file as an image unless its name identifies another type."""

from __future__ import annotations

from posixpath import splitext


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})
_IMAGE_SUFFIXES = _words(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .heif .jp2 .j2k .jpx",
    ".tga .dds .ico .pcx .sgi .qoi",
)
"""Suffixes of images, used for hidden files only: those with another suffix are skipped."""
_OTHER_SUFFIXES = _words(
    # text, records and image metadata
    ".txt .lst .json .jsonl .ndjson .geojson .csv .tsv .xml .html .htm .css .md .rst .yaml .yml .toml .ini .cfg .conf",
    ".log .tex .rtf .srt .vtt .cls .xmp .thm .aae .url .lnk",
    # documents
    ".pdf .doc .docx .xls .xlsx .ppt .pptx .odt .ods .odp .epub .eps .ps",
    # archives and installers
    ".zip .gz .tgz .bz2 .tbz2 .xz .txz .zst .lz4 .7z .rar .jar .whl .iso .dmg .exe .dll .so .dylib",
    # arrays, tables, models
    ".npy .npz .pt .pth .ckpt .safetensors .onnx .pkl .pickle .h5 .hdf5 .mat .arrow .feather .orc .avro .tfrecord",
    ".db .sqlite .sqlite3 .lmdb .mdb .index .idx",
    # geographic data and files that accompany maps
    ".tfw .jgw .pgw .wld .prj .ovr .shp .shx .dbf .cpg .gpkg .kml .kmz",
    # programs
    ".py .pyc .ipynb .js .ts .sh .bat .c .cc .cpp .h .hpp .java .go .rs .rb .php .pl .m .r .sql",
    # sound
    ".mp3 .wav .flac .ogg .m4a .aac .opus .wma",
    # incomplete files, checksums and locks
    ".partial .part .tmp .temp .crdownload .swp .bak .lock .crc .md5 .sha1 .sha256 .sig .torrent",
)
_OTHER_NAMES = frozenset({"thumbs.db", "desktop.ini", ".ds_store", "_success", "_metadata", "_common_metadata"})


def suffix_of(name: str) -> str:
    """Return the suffix in lower case with its dot, such as ``.jpg`` for ``a/b.JPG``; "" if there is none."""
    return splitext(name)[1].lower()


def is_video(name: str) -> bool:
    """Return True if the suffix is that of a video."""
    return suffix_of(name) in VIDEO_SUFFIXES


def is_hidden_folder(path: str) -> bool:
    """Return True if a component of the folder path is hidden or temporary, such as ``.git``, ``.thumbnails``, ``_temporary``."""
    # "." and ".." are not hidden; keys on S3 may contain them as components.
    return any(part.startswith("_temporary") or (part[:1] == "." and part.strip(".")) for part in path.split("/"))


def is_tried(path: str) -> bool:
    """Return True if the file at the relative path is to be segmented or opened as a container, judged by its name."""
    folder, _, name = path.rpartition("/")
    suffix = suffix_of(name)
    if suffix in _OTHER_SUFFIXES or name.lower() in _OTHER_NAMES or (folder and is_hidden_folder(folder)):
        return False
    if name.startswith("."):
        return not name.startswith("._") and (suffix in _IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES)
    return bool(name)
