"""Cost of importing the library: never Ray, and no torch where pairs are only read."""

import json
import subprocess
import sys

_CODE = """
import importlib, json, pkgutil, sys
import vilseg, vilseg.data.batch_reader, vilseg.training.run_dir
heavy = sorted({"torch", "transformers", "ray", "kornia"} & sys.modules.keys())
names = [module.name for module in pkgutil.walk_packages(vilseg.__path__, "vilseg.")]
for name in names:
    importlib.import_module(name)
public = [getattr(vilseg, name).__name__ for name in vilseg.__all__]
apps = sorted(name for name in sys.modules if name.split(".")[0] in ("ray", "jobs", "serve", "tune", "cluster", "cli"))
print(json.dumps({"heavy": heavy, "names": names, "public": public, "all": vilseg.__all__, "apps": apps}))
"""


def test_the_library_knows_nothing_of_ray_and_reading_pairs_nothing_of_torch() -> None:
    # One process for both questions: it starts with the light modules, then imports everything.
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [], "vilseg.data.batch_reader and vilseg.training.run_dir must stay light"
    assert found["apps"] == []
    assert found["public"] == found["all"]
    assert {"vilseg.losses.dino_loss", "vilseg.segmentation.segmenter", "vilseg.evaluation.evaluate"} <= set(
        found["names"]
    )


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import vilseg

    assert not hasattr(vilseg, "Segmentor")
