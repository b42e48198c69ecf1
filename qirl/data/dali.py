"""JPEG by NVIDIA DALI: several at a time on its threads, the pixels of Pillow bit for bit.

It is DALI's CPU backend on every machine, which needs no driver: both take libjpeg-turbo's exact inverse DCT and smooth
chroma upsampling, while nvJPEG, the backend on GPUs, rounds otherwise. Whoever computes on a GPU sends the pixels there.
A file goes to Pillow where the two could differ: another format than JPEG, other modes than RGB and grey, and content
that is cut off or damaged, of which DALI decodes more than Pillow does. Checked against DALI 2.4.0.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qirl.errors import UserError

BATCH = 32  # files that are decoded at a time
ONE = threading.Lock()  # a pipeline runs on one thread at a time
# after the first scan begins (SCAN): what a marker of an intact file may be
SCAN, END = b"\xff\xda", b"\xff\xd9"
ODD = re.compile(rb"\xff[^\x00\xc0-\xc2\xc4\xd0-\xdd\xe0-\xef\xfe\xff]")


def installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def check_installed() -> None:
    """Raises UserError where DALI is not installed."""
    if not installed():
        raise UserError(
            "world.decoder=dali needs nvidia-dali-cuda130, which is not installed: pip install 'qirl[dali]', or set "
            "world.decoder=auto"
        )


def intact(data: bytes) -> bool:
    """Whether a JPEG ends as it should and has no marker that it cannot have. One that a picture or text in its header
    resembles is taken for damaged."""
    return data.endswith(END) and ODD.search(data, max(0, data.find(SCAN))) is None


def decode(files: Sequence[bytes]) -> list[np.ndarray] | None:
    """uint8 [H, W, 3] of at most BATCH JPEG files, not turned; None where DALI refuses any of them."""
    with ONE:
        pipeline = _pipeline(os.getpid())
        try:
            pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in files])
            (images,) = pipeline.run()
        except RuntimeError:  # of one file; it ends the pipeline
            _pipeline.cache_clear()
            return None
        return [np.array(images.at(place)) for place in range(len(files))]


@lru_cache(1)
def _pipeline(process: int):
    from nvidia import dali

    pipeline = dali.Pipeline(
        batch_size=BATCH, num_threads=min(BATCH, os.cpu_count() or 1), device_id=None, prefetch_queue_depth=1, exec_pipelined=False,
        exec_async=False,
    )  # fmt: skip
    with pipeline:
        files = dali.fn.external_source(name="files", dtype=dali.types.UINT8, ndim=1)
        decoded = dali.fn.decoders.image(files, device="cpu", output_type=dali.types.RGB, adjust_orientation=False)
        pipeline.set_outputs(decoded)
    pipeline.build()
    return pipeline
