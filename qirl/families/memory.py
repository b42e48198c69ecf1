"""What an autoencoder needs while it runs, found on the meta device: no weights are read and nothing is computed."""

from __future__ import annotations

import json
import weakref
from functools import lru_cache

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """In the block, `most` is the largest sum of bytes that the tensors made in it held at once, views not counted."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key)


class Fused(TorchFunctionMode):
    """In the block, attention holds no scores, as on a CPU or a GPU; the meta device has no other form of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


@lru_cache(64)
@torch.no_grad()
def autoencoder_bytes(kind: str, config: str, dtype: torch.dtype, given: tuple[int, ...], encoding: bool) -> int:
    """Bytes of an autoencoder of diffusers and of what it holds at most while it decodes, or encodes, one tensor.

    kind: its class; config: its config.json; given: shape of latents [1, channels, 1, h, w], or of images.
    """
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config(json.loads(config)).eval()
        torch.nn.Module.to(model, dtype)
        inputs = torch.empty(given, dtype=dtype)
    weights = sum(p.nbytes for p in model.parameters())
    with Fused(), Peak() as peak:
        model.encode(inputs).latent_dist.mode() if encoding else model.decode(inputs, return_dict=False)
    return weights + peak.most
