"""The installed command in a folder of the user's own: modules there are found, and a cluster elsewhere is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vilseg.config import ModelConfig
from vilseg.model import ViLSeg

FACTORY = """
import torch
from vilseg.model.image_encoder import ImageFeatures

class Blocks(torch.nn.Module):
    num_features, patch_size = 12, 2

    def forward(self, images):
        patches = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
        return ImageFeatures(patches, None, (images.shape[2] // 2, images.shape[3] // 2))

def make():
    return Blocks()
"""


def vilseg(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("vilseg"), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_factory_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoder.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig.model_validate(
        {
            "image_encoder": {"factory": "own_encoder:make"},
            "text_encoder": {"sizes": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
            "embedding_dim": 8,
        }
    )
    ViLSeg.from_config(config, ["a dog", "a cat"]).save_pretrained(str(tmp_path / "model"))
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new(mode, (8, 8)).save(tmp_path / "data" / name / "a.png")
    (tmp_path / "data" / "classes.txt").write_text("dog\ncat\n")
    done = vilseg(tmp_path, "evaluate", "--model", "model", "--dataset", "folder:data", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 1


def test_columns_by_name_and_a_cluster_of_its_own(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("photo,words\na.png,a dog on the grass\n")
    columns = ("data.columns.path=photo", "data.columns.caption=words")
    done = vilseg(tmp_path, "ingest", "table.csv", "pairs", *columns, "--json", RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 1
