"""What of qirl is usable on this machine, and what a missing part costs. `qirl doctor` prints it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    part: str
    usable: bool
    state: str  # a version, device names, or why it is not usable
    cost: str  # what is lost without it


class Missing(Exception):
    """Raised by a probe: the part is not usable, and why."""


def report() -> list[Row]:
    """One row per part. Never raises: a part whose probe fails is a row that says why."""
    return [Row(part, *_state(probe), cost) for part, probe, cost in _PARTS]


def print_report() -> None:
    """The report as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    import qirl

    table = Table(title=f"qirl {qirl.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for column in ("part", "state", "without it"):
        table.add_column(column, overflow="fold")
    for row in report():
        table.add_row(row.part, f"[{'green' if row.usable else 'yellow'}]{_escape(row.state)}[/]", row.cost)
    Console().print(table)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _state(probe: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, probe()
    except Missing as reason:
        return False, str(reason)
    except Exception as error:  # a broken optional package may raise anything while it is imported
        lines = str(error).strip().splitlines() or [""]
        return False, f"broken: {type(error).__name__}: {lines[0][:120]}"


def _found(module: str, package: str, install: str) -> str:
    """The version of `package`, without importing it."""
    parent, _, _ = module.rpartition(".")
    if (parent and importlib.util.find_spec(parent) is None) or importlib.util.find_spec(module) is None:
        raise Missing(f"not installed: {install}")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _torch() -> str:
    import torch

    return torch.__version__


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise Missing("this torch is a CPU build")
    if not torch.cuda.is_available():
        raise Missing("torch has CUDA, but no GPU or driver answers")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names)) + f" (CUDA {torch.version.cuda})"


def _triton() -> str:
    version = _found("triton", "triton", "pip install triton (Linux)")
    import torch

    return version if torch.cuda.is_available() else f"{version} (no GPU: interpreter only)"


def _csrc_cpu() -> str:
    from qirl.kernels import _native

    if not _native.load():
        raise Missing("not built: python setup.py build_ext --inplace (needs g++)")
    return "loaded"


def _csrc_cuda() -> str:
    from qirl.kernels import _native

    if not _native.library("cuda").is_file():
        raise Missing("not built: python setup.py build_ext --inplace (needs nvcc)")
    import torch

    if not torch.cuda.is_available():
        raise Missing("built, but there is no GPU to run it")
    _native.load()
    return "loaded"


def _attention() -> str:
    import torch

    from qirl.models.attention_backends import automatic

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ", ".join(f"{automatic(device, getattr(torch, name), 128)} in {name}" for name in ("bfloat16", "float32"))


def _fp8() -> str:
    import torch

    from qirl.errors import UserError
    from qirl.models.fp8 import check_device

    if not torch.cuda.is_available():
        raise Missing("no GPU: a CPU computes it for tests")
    try:
        check_device(torch.device("cuda"), torch.bfloat16)
    except UserError as error:
        raise Missing(str(error)) from None
    return "model.fp8=torch"


def _transformer_engine() -> str:
    version = _found("transformer_engine", "transformer-engine", "pip install qirl[te]")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError without cuDNN
        raise Missing(f"{version} cannot be imported: {str(error).strip().splitlines()[0][:120]}") from error
    return version


def _flash_attention() -> str:
    return _found("flash_attn", "flash-attn", "pip install qirl[flash]")


def _apex() -> str:
    if importlib.util.find_spec("apex") is None:
        raise Missing("not installed: build NVIDIA's apex from source")
    if importlib.util.find_spec("amp_C") is None:
        raise Missing("another package named apex, or one without its CUDA extensions: build NVIDIA's from source")
    return "installed"


def _dali() -> str:
    return _found("nvidia.dali", "nvidia-dali-cuda130", "pip install qirl[dali]")


def _collectives() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        raise Missing("this torch has no torch.distributed")
    return ", ".join(n for n, here in (("NCCL", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if here)


def _peft() -> str:
    return _found("peft", "peft", "pip install qirl[rewards]")


def _diffusers() -> str:
    return _found("diffusers", "diffusers", "pip install diffusers")


def _torchao() -> str:
    return _found("torchao", "torchao", "pip install qirl[torchao]")


def _judges() -> str:
    return _found("transformers", "transformers", "pip install qirl[rewards]")


def _server() -> str:
    _found("starlette", "starlette", "pip install qirl[rewards]")
    return _found("uvicorn", "uvicorn", "pip install qirl[rewards]")


def _ocr() -> str:
    return _found("rapidocr", "rapidocr", "pip install qirl[rewards]")


def _faces() -> str:
    return _found("cv2", "opencv-python-headless", "pip install qirl[rewards]")


_PARTS = (
    ("torch", _torch, "nothing runs"),
    ("CUDA", _cuda, "CPU only: the digits world and tests run, Qwen-Image sizes do not"),
    ("Triton", _triton, "on a GPU the glue between matrix products from PyTorch: several passes over memory"),
    (
        "csrc, CPU",
        _csrc_cpu,
        "sampler step, losses, advantages and noise from PyTorch: slower, the noise several times",
    ),
    ("csrc, CUDA", _csrc_cuda, "sampler step, losses, advantages and noise from Triton"),
    ("attention", _attention, "nothing runs"),
    ("products in 8 bits", _fp8, "no model.fp8; model.base=fp8 saves memory on any GPU"),
    ("Transformer Engine", _transformer_engine, "no model.fp8=te; model.fp8=torch does without"),
    ("flash-attn", _flash_attention, "no model.attention=flash_attn; cuDNN's and torch's kernels are there"),
    ("apex", _apex, "no optimizer.impl=apex; torch's fused AdamW gives the same numbers"),
    ("DALI", _dali, "nothing: Pillow decodes to the same pixels, about as fast"),
    ("NCCL, gloo", _collectives, "one process only; NCCL is what several GPUs need"),
    ("peft", _peft, "no LoRA judges; a transformer's adapters need no peft"),
    ("torchao", _torchao, "no AdamW in 8 bits"),
    ("transformers", _judges, "no judges of your own, no CLIP rewards; judges behind a server work"),
    ("scorer server", _server, "no `qirl reward serve`"),
    ("rapidocr", _ocr, "no OCR reward"),
    ("OpenCV", _faces, "no face identity by YuNet and SFace"),
    ("diffusers", _diffusers, "no training on pipelines; the miniature and checkpoints do without it"),
)
