"""TensorBoard and Weights & Biases beside metrics.jsonl; imported only when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qirl.errors import UserError, nearest

Log = Callable[[int, Mapping[str, float]], None]
Close = Callable[[], None]


class Trackers:
    """Sends each step's numbers to every tracker in `names` ("tensorboard", "wandb"); no names, no work.

    folder: the run folder. config: shown by wandb. step: the step a run resumes from, 0 for a new one.
    Raises UserError for an unknown name, or naming the package to install.
    """

    def __init__(self, names: Sequence[str], folder: str | Path, config: Mapping[str, Any], step: int = 0):
        for name in names:
            if name not in _OPENERS:
                raise UserError(f"no tracker is called '{name}'{nearest(name, _OPENERS)}")
        self._open = [_OPENERS[name](Path(folder), config, step) for name in names]

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs the numbers among `values`; None (a failed value) is left out."""
        numbers = {k: v for k, v in values.items() if k != "step" and isinstance(v, (int, float))}
        for log, _ in self._open:
            log(step, numbers)

    def close(self) -> None:
        for _, close in self._open:
            close()
        self._open = []


def _tensorboard(folder: Path, config: Mapping[str, Any], step: int) -> tuple[Log, Close]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("the tracker 'tensorboard' needs a package; pip install tensorboard") from None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _wandb(folder: Path, config: Mapping[str, Any], step: int) -> tuple[Log, Close]:
    try:
        import wandb
    except ImportError:
        raise UserError("the tracker 'wandb' needs a package; pip install wandb") from None
    # By path, so that a resumed run goes on in its own plot.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    about = {"project": "qirl", "name": folder.name, "id": identity, "config": dict(config)}
    run = wandb.init(**about, resume="allow", dir=folder)
    return (lambda step, numbers: run.log(dict(numbers), step=step)), run.finish


_OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb}
