"""qirl.kernels, the configs and a light import, in the three ways qirl can be on a machine."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import importlib.util, json, sys
import qirl, qirl.kernels.dispatch
from qirl.paths import configs
sys.path.append(sys.argv[1])  # a regular package `kernels`, last on the path
import kernels
print(json.dumps({
    "qirl": qirl.__file__,
    "dispatch": qirl.kernels.dispatch.__file__,
    "configs": sorted(p.relative_to(configs()).as_posix() for p in configs().rglob("*.*")),
    "kernels": getattr(kernels, "OWNER", f"ours: {kernels!r}"),
}))
"""

NOTE_IMPORTS = """
import atexit, os, sys
def note():
    with open(os.environ["IMPORTS_NOTE"], "a") as file:
        file.write(f"{int('setuptools' in sys.modules)}{int('torch' in sys.modules)} ")
atexit.register(note)
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that builds leave nothing in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("qirl", "kernels", "configs", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "configs/packaging_probe").mkdir()
    (copy / "configs/packaging_probe/run.yaml").write_text("a: 1\n")
    return copy


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Stands for the package of that name that transformers and diffusers look for."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text("OWNER = 'someone else'\n")
    return folder


def build_wheel(checkout, folder, **env):
    """Builds a wheel and returns it, having checked that the build did not import torch."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOTE_IMPORTS)
    note = folder / "imports"
    environment = {**os.environ, "PYTHONPATH": str(folder), "IMPORTS_NOTE": str(note), **env}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, checkout, env=environment)
    assert any(seen.startswith("1") for seen in note.read_text().split()), "the build was not watched"
    assert not any(seen.endswith("1") for seen in note.read_text().split()), "building imported torch"
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel of a machine without a compiler."""
    nothing = tmp_path_factory.mktemp("path")
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel") / "pure", PATH=str(nothing), CXX="")


def environment_with(requirement, folder):
    """A new environment that sees the packages of this one by path, with qirl installed in it."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", *requirement, env={**os.environ, "QIRL_BUILD_CSRC": "0"})
    return python


def look(python, foreign, cwd, **env):
    bare = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return json.loads(run(python, "-c", CHECK, foreign, cwd=cwd, env={**bare, **env}))


def assert_whole(seen, home, kernels):
    assert seen["qirl"].startswith(str(home)), seen
    assert seen["dispatch"] == str(kernels / "dispatch.py")
    assert {"packaging_probe/run.yaml", "rubrics/portrait.txt"} <= set(seen["configs"])
    assert seen["kernels"] == "someone else"


def test_a_bare_checkout_is_whole(checkout, foreign, tmp_path):
    seen = look(sys.executable, foreign, tmp_path, PYTHONPATH=str(checkout))
    assert_whole(seen, checkout, checkout / "kernels")


def test_an_editable_install_is_whole(checkout, foreign, tmp_path):
    python = environment_with(["--editable", checkout], tmp_path / "editable")
    assert_whole(look(python, foreign, tmp_path), checkout, checkout / "kernels")


def test_an_installed_wheel_is_whole(wheel, foreign, tmp_path):
    python = environment_with([wheel], tmp_path / "installed")
    seen = look(python, foreign, tmp_path)
    assert_whole(seen, tmp_path / "installed", Path(seen["qirl"]).parent / "kernels")


def test_a_wheel_without_csrc_fits_every_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"qirl/py.typed", "qirl/kernels.py", "qirl/kernels/dispatch.py"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "configs/")) or name.endswith(".so")]
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qirl"}


def test_every_python_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qirl").rglob("*.py")}
    wanted |= {f"qirl/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert wanted - names == set(), "a folder without __init__.py is left out of the wheel"


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_a_wheel_with_csrc_carries_it_and_is_tied_to_no_python(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "native", QIRL_BUILD_CSRC="1", QIRL_CUDA_ARCHS="90a")
    assert "-py3-none-linux_" in wheel.name
    assert "qirl/kernels/_native_cpu.so" in zipfile.ZipFile(wheel).namelist()


def test_kernels_is_no_regular_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_import_is_light():
    code = (
        "import sys, time; t = time.process_time(); import qirl; t = time.process_time() - t\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'triton'} & set(sys.modules)\n"
        "print(t, sorted(heavy))"
    )
    outputs = [run(sys.executable, "-c", code, cwd=ROOT).split(maxsplit=1) for _ in range(5)]
    assert all(heavy.strip() == "[]" for _, heavy in outputs), outputs
    assert min(float(seconds) for seconds, _ in outputs) < 0.3


def test_version_is_the_one_of_the_metadata(wheel):
    import qirl

    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"qirl-{qirl.__version__}.dist-info/")).metadata
    assert (metadata["Name"], metadata["Version"]) == ("qirl", qirl.__version__)
