"""Every op that the kernel benchmark times, by name. (Importing it loads csrc.)"""

from __future__ import annotations

import kernel_glue
import kernel_sampler
from kernel_ops import Op

OPS: dict[str, Op] = {**kernel_sampler.OPS, **kernel_glue.OPS}
