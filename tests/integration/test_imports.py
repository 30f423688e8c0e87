"""Modules that a fresh process really loads: no Ray with the library, no torch with modules that only read pairs.

The rules on who imports whom are import-linter's, in pyproject.toml.
"""

import json
import subprocess
import sys

_CODE = """
import importlib, json, pkgutil, sys
import vilseg, vilseg.data.batch_reader, vilseg.training.run_dir
heavy = sorted({"torch", "transformers", "ray", "kornia"} & sys.modules.keys())
for module in pkgutil.walk_packages(vilseg.__path__, "vilseg."):
    importlib.import_module(module.name)
public = [getattr(vilseg, name).__name__ for name in vilseg.__all__]
print(json.dumps({"heavy": heavy, "public": public, "all": vilseg.__all__, "ray": "ray" in sys.modules}))
"""


def test_the_library_loads_no_ray_and_modules_that_read_pairs_no_torch() -> None:
    # One process for both questions: it starts with the light modules, then imports everything.
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded["heavy"] == [], "vilseg.data.batch_reader and vilseg.training.run_dir must stay light"
    assert not loaded["ray"]
    assert loaded["public"] == loaded["all"]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import vilseg

    assert not hasattr(vilseg, "Segmentor")
