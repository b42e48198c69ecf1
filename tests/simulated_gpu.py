"""A device called "sim": its tensors lie in the host's memory, but may meet tensors of the host only as on a GPU.

An op on tensors of both raises. Counted are copies to the device and what makes a GPU's host wait: reading values, a shape
that depends on them, a copy that is not told to be non_blocking. Kernels, streams and rounding are not simulated. It stands
on torch's backends in Python, which can be set up once a process: the tests start one (test_placement.py).
"""

import collections
import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "sim"
DEVICE = f"{NAME}:0"
HERE = Path(__file__).resolve()
ROOT = str(HERE.parents[1])
# by line of qirl or kernels: what the host waits for, and what it copies to the device
waits, copies = collections.Counter(), collections.Counter()

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
# the index list of these may lie on the host
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_READS = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten._unique2.default, _aten.unique_consecutive.default, _aten.unique_dim.default,
}  # fmt: skip
# what held tensors would do lazily where torch no longer looks at their conjugate and negative bits
_AT_ONCE = {_aten._conj.default: _aten._conj_physical.default, _aten._neg_view.default: _aten.neg.default}


class OnDevice(torch.Tensor):
    """A tensor of the device; held: its values, on the host."""

    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **like)
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.held!r})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.held = other.held

    def tolist(self):
        _count(waits, "tolist")
        return self.held.tolist()


def _run(op, args, kwargs):
    """The op on the values, its results on the device its arguments say."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, OnDevice)]
    host = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]  # numbers may lie anywhere
    indexing = op in _INDEXED and isinstance(args[0], OnDevice)
    if here and host and op not in _COPIES and not (indexing and all(any(t is i for i in args[1]) for t in host)):
        shapes = [[tuple(t.shape) for t in side] for side in (host, here)]
        raise RuntimeError(f"{op}: tensors of shapes {shapes[0]} are on the host, of {shapes[1]} on the device")
    target, onto = kwargs.get("device"), bool(here)
    if target is not None:
        onto, kwargs = target.type == NAME, kwargs | {"device": torch.device("cpu")}
    if op is _aten.copy_.default:
        onto = isinstance(args[0], OnDevice)
    masks = indexing and any(i is not None and i.dtype == torch.bool for i in args[1])
    if (here and op in _READS) or masks:
        _count(waits, op)
    if op in _COPIES and isinstance(args[op is _aten.copy_.default], OnDevice) != onto:
        blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        for counter in [copies] * onto + [waits] * (blocking or not onto):
            _count(counter, op)
    if indexing and host:
        _count(copies, op)
    given, named = tree_map_only(OnDevice, lambda t: t.held, (args, kwargs))
    out = _AT_ONCE.get(op, op)(*given, **named)
    # what was changed in place comes back as the tensor it was
    pairs = zip(tree_leaves((given, named)), tree_leaves((args, kwargs)), strict=True)
    wrapped = {id(bare): own for bare, own in pairs if isinstance(own, OnDevice)}
    return tree_map_only(torch.Tensor, lambda t: wrapped.get(id(t), OnDevice(t)) if onto else t, out)


def _count(counter: collections.Counter, what) -> None:
    stack = [f for f in traceback.extract_stack() if ROOT in f.filename and "site-packages" not in f.filename]
    line = next(f for f in reversed(stack) if f.filename != str(HERE))
    counter[f"{what} at {Path(line.filename).relative_to(ROOT)}:{line.lineno}: {line.line}"] += 1


class _Stream:
    def wait_stream(self, other) -> None: ...
    def synchronize(self) -> None: ...


class _Module(backend_registration._DummyBackendModule):
    """What torch calls torch.cuda for a GPU."""

    def current_stream(self, device=None):
        return _Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self, device=None) -> None: ...

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None) -> None: ...


def install() -> torch.device:
    """Makes the device known to torch, and to csrc's ops as if it were CUDA. Once a process."""
    from qirl.kernels import _native

    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    install.library = torch.library.Library("_", "IMPL")  # kept, for with it goes what it registered
    install.library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    for name in ("tensor", "as_tensor", "arange", "linspace"):  # these do not reach a backend in Python
        setattr(torch, name, _factory(getattr(torch, name), copied=name.endswith("tensor")))
    _native._SERVED[NAME] = "cuda"
    return torch.device(DEVICE)


def _factory(real, copied: bool):
    def make(*args, device=None, **kwargs):
        if device is None or torch.device(device).type != NAME:
            return real(*args, device=device, **kwargs)
        for counter in (copies, waits) if copied else ():
            _count(counter, real.__name__)
        return OnDevice(real(*args, **kwargs))

    return make
