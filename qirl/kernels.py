"""The ops: `qirl.kernels.<op>` is qirl/kernels/<op>.py once installed, and kernels/<op>.py in a checkout."""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _here.parent / "kernels")]
