"""qirl: reinforcement learning and on-policy distillation for image diffusion transformers.

`qirl.pretrain`, `categorise`, `curate`, `calibrate`, `train`, `distill`, `evaluate`, `sample`, `train_judge` and `load_config`
are loaded when they are first used, so that `import qirl` and `qirl --help` need no torch.
"""

__version__ = "0.1.0"

_API = (
    "calibrate",
    "categorise",
    "curate",
    "distill",
    "evaluate",
    "load_config",
    "pretrain",
    "sample",
    "train",
    "train_judge",
)

__all__ = ["__version__", *_API]


def __getattr__(name: str):
    if name in _API:
        from qirl import api

        return getattr(api, name)
    raise AttributeError(f"module 'qirl' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *_API])
