"""Packaging of qirl.

    pip install .                          pure Python: needs no compiler, never imports torch
    python setup.py build_ext --inplace    builds csrc into kernels/ (g++; with nvcc the CUDA part too)
    python setup.py check_cuda             compiles every csrc/*.cu for sm_80 and sm_90a; warnings and spills fail

`pip install --no-build-isolation .` builds csrc as well where torch and a compiler are; csrc/build_csrc.py
lists the environment variables that steer it.
"""

import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from build_csrc import BuildCsrc, CheckCuda, wants_csrc  # noqa: E402


def version():
    return re.search(r'^__version__ = "(.+)"', (ROOT / "qirl/__init__.py").read_text(), re.M).group(1)


class StableWheel(bdist_wheel):
    """A wheel with csrc fits every Python 3: its libraries use torch's stable ABI and no Python API."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return "py3", "none", platform


TEST = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "hypothesis",
    "build",
    "setuptools>=70.1",
    "diffusers>=0.42",
    "transformers",
    "accelerate",
    "peft",
    "httpx2",
    "onnxruntime",
    "opencv-python-headless",
    "prometheus_client",
    "rapidocr",
    "starlette",
    "tensorboard",
    "torchao>=0.18",
    "torchmetrics",
    "uvicorn",
]

setup(
    name="qirl",
    version=version(),
    description="Reinforcement learning and on-policy distillation for image diffusion transformers",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "rich",
        "safetensors",
        "huggingface_hub",
        "pillow",
        "scikit-learn",
        "matplotlib",
        "jinja2",
        'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "pipelines": ["diffusers>=0.42", "transformers", "accelerate", "peft"],
        "torchao": ["torchao>=0.18"],
        "rewards": [
            "transformers",
            "accelerate",
            "peft",
            "httpx2",
            "starlette",
            "uvicorn",
            "prometheus_client",
            "rapidocr",
            "onnxruntime",
            "torchmetrics",
            "opencv-python-headless",
        ],
        "flash": ["flash-attn"],
        "te": ["transformer-engine[pytorch]"],
        "dali": ["nvidia-dali-cuda130>=2.4,<3"],
        "benchmarks": ["diffusers>=0.42", "liger-kernel"],
        "test": TEST,
    },
    # kernels/ and configs/ stand beside qirl/ in the checkout and inside it once installed
    packages=[*find_packages(include=["qirl", "qirl.*"]), "qirl.kernels", "qirl.configs"],
    package_dir={"qirl.kernels": "kernels", "qirl.configs": "configs"},
    package_data={
        "qirl": ["py.typed", "**/*.html", "**/*.j2", "**/*.css"],
        "qirl.configs": ["**/*.yaml", "rubrics/*.txt"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["qirl = qirl.cli:main"]},
    ext_modules=[Extension("qirl.kernels._native_cpu", sources=[])] if wants_csrc() else [],
    cmdclass={"build_ext": BuildCsrc, "bdist_wheel": StableWheel, "check_cuda": CheckCuda},
)
