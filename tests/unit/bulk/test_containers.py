"""Tars and Parquet files of pictures: what they hold, safe names, what is left of a damaged one."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vilseg.bulk.containers import Container, Hashes, Input, safe_name
from vilseg.config.data import ColumnsConfig
from vilseg.errors import DataError


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def container(path: Path, columns: ColumnsConfig | None = None) -> Container:
    return Container(path.name, str(path), columns=columns or ColumnsConfig())


def test_members_of_a_tar(tmp_path: Path) -> None:
    members = [
        ("./0.jpg", b"0"),
        ("0.json", b"{}"),
        ("0.txt", b"a"),
        ("a/é\n.png", b"1"),
        ("._0.jpg", b""),
        ("noext", b"2"),
    ]
    path = make_tar(tmp_path / "x.tar", [*members, ("clip.mp4", b"3"), ("inner.tar", b""), ("0.jpg", b"again")])
    tar = Container("deep/x.tar", str(path))
    found = list(tar.inputs())
    assert [(one.name, one.read()) for one in found] == [
        ("deep/x.tar/0.jpg", b"0"),
        ("deep/x.tar/a/é\n.png", b"1"),
        ("deep/x.tar/noext", b"2"),
        ("deep/x.tar/clip.mp4", b"3"),
        ("deep/x.tar/0-00000004.jpg", b"again"),
    ]
    assert [one.kind for one in found] == ["image", "image", "image", "video", "image"]
    assert all(one.uri == tar.uri and one.size == len(one.read()) for one in found)


def test_no_name_leads_out_of_the_output_folder(tmp_path: Path) -> None:
    evil = ["../../x.jpg", "/etc/x.jpg", "a/../../b.jpg", "a//b.jpg", "a/./b.jpg", "..", "a/.."]
    tar = container(make_tar(tmp_path / "x.tar", [(name, b"x") for name in evil]))
    pq.write_table(pa.table({"key": [*evil, "", "/", "a\0b"], "image": [b"x"] * 10}), tmp_path / "x.parquet")
    rows = container(tmp_path / "x.parquet")
    for holder, count in ((tar, 5), (rows, 10)):  # no file of a tar is called ".."
        found = [one.name for one in holder.inputs()]
        assert len(set(found)) == count
        for name in found:
            out = tmp_path / "masks"
            assert Path(os.path.normpath(out / f"{name}.png")) == out / f"{name}.png"
            assert name.startswith(f"{holder.name}/")
            assert "\0" not in name
    assert safe_name("...") == "..."
    assert safe_name("a/..b/c..") == "a/..b/c.."


def test_rows_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/p.jpg").write_bytes(b"3")
    table = {
        "key": ["one", "one", None, "four", "five"],
        "image": [
            {"bytes": b"1", "path": None},
            {"bytes": b"2", "path": None},
            {"bytes": None, "path": "pictures/p.jpg"},
            {"bytes": None, "path": "s3://bucket/v.mp4"},
            None,
        ],
        "caption": ["not wanted"] * 5,
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    found = list(container(tmp_path / "x.parquet").inputs())
    assert [found.name.removeprefix("x.parquet/") for found in found] == [
        "one",
        "one-00000001",
        "00000002",
        "four",
        "five",
    ]
    assert [found.read() for found in found[:3]] == [b"1", b"2", b"3"]
    assert (found[3].uri, found[3].kind) == ("s3://bucket/v.mp4", "video")
    with pytest.raises(DataError, match=r"row 4 of .*x\.parquet has no picture"):
        found[4].read()


def test_columns_of_parquet_can_be_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": [b"1"], "name": ["n"], "file": [b"other"]}), tmp_path / "x.parquet")
    columns = ColumnsConfig(image="pixels", key="name")
    (found,) = container(tmp_path / "x.parquet", columns).inputs()
    assert (found.name, found.read()) == ("x.parquet/n", b"1")
    pq.write_table(pa.table({"caption": ["a"], "url": ["u"]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y\.parquet has no column of pictures or of their paths, only caption, url"):
        list(container(tmp_path / "y.parquet").inputs())


def until_damage(damaged: Container) -> tuple[list[Input], str]:
    """Items before the DataError, and its message."""
    found: list[Input] = []
    try:
        for picture in damaged.inputs():
            found.append(picture)  # not by extend: the list has to survive the error
    except DataError as error:
        return found, str(error)
    pytest.fail(f"{damaged.uri} passes for whole")


MEMBERS = [(f"{number}.jpg", bytes([number]) * 700) for number in range(5)]


@pytest.mark.parametrize("cut", [100, 700, 2 * 1536 + 300, 2 * 1536 + 600, 3 * 1536, 5 * 1536])
def test_of_a_tar_that_is_cut_off_the_whole_members_come(tmp_path: Path, cut: int) -> None:
    path = make_tar(tmp_path / "x.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[:cut])
    found, error = until_damage(container(path))
    assert error.startswith(f"{path} is damaged and cannot be read")
    assert "\n" not in error
    assert [(one.name, one.read()) for one in found] == [
        (f"x.tar/{name}", data) for name, data in MEMBERS[: cut // 1536]
    ]


def test_a_tar_with_a_broken_header_in_its_middle(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    data[2 * 1536 + 10 : 2 * 1536 + 300] = b"?" * 290
    path.write_bytes(data)
    members = container(path).inputs()
    assert [next(members).name for _ in range(2)] == ["x.tar/0.jpg", "x.tar/1.jpg"]
    with pytest.raises(DataError, match=r"is damaged and cannot be read after 1\.jpg"):
        next(members)


def test_a_parquet_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match=rf"^{path} is damaged and cannot be read from row 0 on"):
        next(container(path).inputs())
    rows = [bytes([number]) * 5000 for number in range(40)]
    pq.write_table(pa.table({"image": rows}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"?" * 40
    path.write_bytes(data)
    found, error = until_damage(container(path))
    read = [picture.read() for picture in found]
    assert f"is damaged and cannot be read from row {len(read)} on" in error
    assert read == rows[: len(read)]
    assert len(read) >= 16


# --------------------------------------------------------------------------------------------------------- memory


def test_hashes_tell_what_is_new() -> None:
    values = [hash((number * 7919) % 5000 - 2500) for number in range(20_000)]
    known: set[int] = set()
    hashes = Hashes()
    for value in values:
        assert hashes.add(value) == (value not in known)
        known.add(value)
    assert not hashes.add(values[0] + (1 << 64))


# Not ru_maxrss, which a process takes over from the one that starts it.
_PEAK = "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def peak(code: str, *arguments: str) -> int:
    """Peak memory in MB of a fresh process that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{_PEAK}", *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def test_a_container_is_read_in_little_memory(tmp_path: Path) -> None:
    pictures = [os.urandom(1 << 20) for _ in range(2)] * 50
    tar = make_tar(tmp_path / "x.tar", [(f"{number}.jpg", data) for number, data in enumerate(pictures)])
    table = pa.table({"image": pictures})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_batch_size=4)
    imports = "from vilseg.bulk.containers import Container"
    code = "assert sum(len(i.read()) for i in Container('x', sys.argv[1]).inputs()) == 100 << 20"
    base = peak(imports)
    assert peak(f"{imports}\n{code}", str(tar)) < base + 40
    assert peak(f"{imports}\n{code}", str(tmp_path / "x.parquet")) < base + 70
