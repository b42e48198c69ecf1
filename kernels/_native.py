"""Loads what `python setup.py build_ext --inplace` made of csrc/, if it was built.

Its ops (`qirl::flow_step`, ...) then exist in torch for the CPU, and for CUDA where torch sees a GPU and nvcc was there.
Nothing here falls back: op files ask `on(...)` and choose. csrc throws nothing: an op that refuses its input keeps the
reason, and `op_of` raises it. So ops are called through `op_of` alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_errors: list[Callable] = []  # of the loaded libraries
_CALLS: dict[str, Callable] = {}
_text = ctypes.create_string_buffer(2048)


@functools.cache
def load() -> bool:
    """True if the CPU part of csrc is built and loaded; loads the CUDA part too where it can run.

    Raises OSError if a library is there but cannot be loaded (built for another torch: build it again).
    """
    cpu, cuda = library("cpu"), library("cuda")
    if not cpu.is_file():
        return False
    for path in (cpu, cuda) if cuda.is_file() and torch.cuda.is_available() else (cpu,):
        torch.ops.load_library(path)
        _errors.append(ctypes.CDLL(str(path)).qirl_take_error)
    return True


def library(part: str) -> Path:
    """Where the library of `part` ("cpu" or "cuda") lies once it is built."""
    return _FOLDER / f"_native_{part}.so"


def register(op: str, fake: Callable, backward: Callable | None = None, keep: Callable | None = None) -> None:
    """Gives csrc's `op`, if csrc is built, the fake that torch.compile needs, and its gradients.

    Raises OSError where what was built does not have it.
    """
    if load():
        if not hasattr(torch.ops.qirl, op):
            raise OSError(
                f"{library('cpu')} lacks {op}: it was built from other sources; run `python setup.py build_ext --inplace`"
            )
        torch.library.register_fake(f"qirl::{op}", fake)
        if backward is not None:
            torch.library.register_autograd(f"qirl::{op}", backward, setup_context=keep)


def op_of(name: str) -> Callable:
    """csrc's op, without the search for an overload at every call.

    It raises RuntimeError with what the op says of an input that it refuses. A compiled graph calls the op itself; the
    next call outside raises what one inside refused.
    """
    if name not in _CALLS:
        _CALLS[name] = Checked(getattr(torch.ops.qirl, name).default)
    return _CALLS[name]


class Checked:
    """csrc's `op` (a torch.ops overload), called so that what it refuses is raised."""

    def __init__(self, op):
        self.op = op

    def __call__(self, *arguments):
        result = self.op(*arguments)
        if not torch.compiler.is_compiling():
            raise_refusal()
        return result


def raise_refusal() -> None:
    """Raises RuntimeError if csrc refused an input on this thread since the last call."""
    for take in _errors:
        if take(_text, len(_text)):
            raise RuntimeError(_text.value.decode())


def on(op: str, *tensors: torch.Tensor | None) -> dict[str, Callable]:
    """{"native": op} or {"cuda": op} where csrc serves these tensors, for `dispatch.choose`: all on one device."""
    devices = {t.device for t in tensors if t is not None}
    device = devices.pop()
    if devices or device.type not in _SERVED:
        return {}
    return {_SERVED[device.type]: op_of(op)}


def same(*tensors: torch.Tensor | None) -> bool:
    """Whether csrc takes these together: all float32 or all bfloat16."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}


def signed(seed: int) -> int:
    """The 64 bits of `seed` as the signed integer that a torch op takes."""
    return seed - (1 << 64) if seed >> 63 else seed


_SERVED = {"cpu": "native"} if load() else {}  # read once, for torch.compile cannot look at files
if _SERVED and library("cuda").is_file():
    _SERVED["cuda"] = "cuda"
