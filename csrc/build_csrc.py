"""The commands of setup.py that compile csrc/, without importing torch.

Environment: QIRL_BUILD_CSRC=0 or 1 forces whether an install builds csrc, QIRL_CUDA_ARCHS ("90a" or "80;90a")
chooses the GPUs, CUDA_HOME the toolkit, CXX the compiler.
"""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Command
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
HOW = "`python setup.py build_ext --inplace` or `pip install --no-build-isolation .`"


def torch_folder():
    """Where torch is installed, without importing it; None where it is not."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec else None


def compiler():
    """The C++ compiler: CXX, or g++, or c++; None where there is none."""
    chosen = os.environ.get("CXX")
    return shutil.which(chosen) if chosen else shutil.which("g++") or shutil.which("c++")


def nvcc():
    """nvcc inside its toolkit (what is on PATH may be a wrapper script); None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    found = [Path(home) / "bin/nvcc" for home in homes if home]
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((str(path) for path in found if path.is_file()), None)


def archs():
    """CUDA architectures: QIRL_CUDA_ARCHS, or those of the GPUs here, or Hopper."""
    chosen = os.environ.get("QIRL_CUDA_ARCHS")
    if chosen:
        return chosen.replace(",", ";").split(";")
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    seen = subprocess.run(query, capture_output=True, text=True).stdout if smi else ""
    here = {major + minor for major, minor in re.findall(r"^(\d+)\.(\d+)\s*$", seen, re.M)}
    return sorted(arch + "a" if int(arch) >= 90 else arch for arch in here) or ["90a"]


def gencode(names):
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def run(command, fix):
    """Runs a compiler and returns what it printed; leaves with `fix` where it fails."""
    command = [str(part) for part in command]
    print(*command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"csrc: {Path(command[0]).name} failed (output above). {fix}")
    return done.stdout


def wants_csrc():
    """Whether this run of setup.py builds csrc."""
    forced = os.environ.get("QIRL_BUILD_CSRC", "")
    if forced not in ("", "0", "1"):
        sys.exit(f"QIRL_BUILD_CSRC={forced} is not 0 or 1")
    if "build_ext" in sys.argv or forced == "1":
        return True
    return forced == "" and sys.platform == "linux" and torch_folder() is not None and compiler() is not None


class BuildCsrc(build_ext):
    """csrc -> _native_cpu.so, and where nvcc is _native_cuda.so: shared libraries tied to no Python."""

    def target(self):
        in_place = self.inplace or self.editable_mode
        return ROOT / "kernels" if in_place else Path(self.build_lib) / "qirl/kernels"

    def run(self):
        torch, cxx, cuda = torch_folder(), compiler(), nvcc()
        if torch is None:
            sys.exit("csrc needs torch while it is built: install torch, then " + HOW)
        if cxx is None:
            sys.exit("csrc needs a C++20 compiler: install g++ 11 or newer (or set CXX to one), then " + HOW)
        self.target().mkdir(parents=True, exist_ok=True)
        flags = [*"-O3 -std=c++20 -fPIC -Wall -Wextra".split(), TORCH_TARGET, "-isystem", torch / "include"]
        libraries = ["-L", torch / "lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        fix = "It needs g++ 11 or newer and torch 2.11 or newer; QIRL_BUILD_CSRC=0 installs without csrc."
        cpu = self.target() / "_native_cpu.so"
        run([cxx, *flags, "-shared", *sorted(CSRC.glob("*.cpp")), "-o", cpu, *libraries], fix)
        if cuda is None:
            print("csrc: only the CPU part was built; the CUDA part needs nvcc (set CUDA_HOME to a toolkit)")
        else:
            self.build_cuda(cuda, cxx, flags, libraries)

    def build_cuda(self, cuda, cxx, flags, libraries):
        fix = "It needs a toolkit that knows QIRL_CUDA_ARCHS and this g++; CUDA_HOME chooses the toolkit."
        with tempfile.TemporaryDirectory() as folder:
            sources = sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
            objects = [Path(folder) / f"{source.name}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                nv = [cuda, "-ccbin", cxx, *CUDA_FLAGS, *gencode(archs())]
                run(
                    [
                        *(nv if source.suffix == ".cu" else [cxx, *flags, "-DQIRL_CUDA"]),
                        "-c",
                        source,
                        "-o",
                        target,
                    ],
                    fix,
                )
            # libtorch.so brings libtorch_cuda.so where torch has CUDA, whichever torch it is linked against
            link = [cuda, "-ccbin", cxx, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
            run([*link, *objects, "-o", self.target() / "_native_cuda.so", *libraries], fix)

    def get_outputs(self):
        return [str(path) for path in self.target().glob("_native_*.so")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in CSRC.iterdir() if path.is_file()]


class CheckCuda(Command):
    """Compile every csrc/*.cu for sm_80 and sm_90a, with no GPU needed: warnings and register spills fail."""

    description = "compile every .cu for sm_80 and sm_90a with warnings as errors and no register spills"
    user_options = []

    def initialize_options(self):
        pass

    finalize_options = initialize_options

    def run(self):
        cuda = nvcc()
        if cuda is None:
            sys.exit("check_cuda needs nvcc: install a CUDA toolkit or set CUDA_HOME")
        strict = "-Werror all-warnings -Xptxas -v -Xcompiler -Wall,-Wextra,-Werror".split()
        for source in sorted(CSRC.glob("*.cu")):
            fix = f"{source.name} must compile for sm_80 and sm_90a without a warning."
            out = run([cuda, *CUDA_FLAGS, *gencode(["80", "90a"]), *strict, "-c", source, "-o", os.devnull], fix)
            bad = [
                line.strip() for line in out.splitlines() if re.search(r"\b[1-9]\d* bytes spill|warning|ignored", line)
            ]
            if bad:
                sys.exit(f"{source.name} spills registers, or the compiler ignored something: {bad[0]}")
