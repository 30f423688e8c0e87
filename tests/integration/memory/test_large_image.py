"""Memory for an image of 12,000 x 12,000 pixels, encoded in windows and labelled in strips: little beside its own masks."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_WORK = """
import json, sys
import numpy as np, torch
from PIL import Image
import vilseg

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) / 1e6  # GB

torch.set_num_threads(1)
folder, path = sys.argv[1:]
model = vilseg.ViLSeg.from_pretrained(folder)
model.segmentation = model.segmentation.replace(input_size=1024, window=256, calibration=1)
patches = model.encode_image(torch.rand(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)).patches[0]
model.patch_mean, model.patch_covariance = patches.mean(0), torch.cov(patches.T)  # else one class is best everywhere
names = ["sky", "grass", "boat", *(f"thing {number}" for number in range(17))]
segmenter = vilseg.Segmenter(model, names, max_pixels=150_000_000)
segmenter(np.zeros((64, 64, 3), np.uint8))  # what the first call loads is not the image's
before = status("VmRSS")
result = segmenter(path)
print(json.dumps({
    "above": status("VmHWM") - before,
    "shape": [result.labels.shape, result.scores.shape, result.clusters.shape],
    "dtype": [str(result.labels.dtype), str(result.scores.dtype)],
    "classes": len(np.unique(result.labels[::16, ::16])),
}))
"""


def test_an_image_of_144_megapixels_takes_less_than_1500_megabytes(
    tmp_path: Path, save_tiny_model: Callable[[str, int], str]
) -> None:
    import numpy as np
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(colours).resize((12_000, 12_000), Image.Resampling.BILINEAR).save(path)
    arguments = [sys.executable, "-c", _WORK, save_tiny_model(str(tmp_path / "model"), 64), str(path)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["shape"] == [[12_000, 12_000]] * 3
    assert found["dtype"] == ["uint8", "float32"]
    assert found["classes"] > 1
    # The image itself (0.43 GB), its labels, scores and clusters (0.86 GB) are in it.
    assert found["above"] < 1.5
