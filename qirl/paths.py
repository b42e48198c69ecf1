"""Where the files that ship with qirl lie, in a checkout and once installed; how the hub is named."""

from __future__ import annotations

from pathlib import Path

from qirl.errors import UserError, nearest

HUB = "hf://"  # before OWNER/NAME of a model repository of the hub


def configs() -> Path:
    """The folder of the run configs: qirl/configs/ once installed, configs/ beside qirl/ in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def find_config(name: str | Path) -> Path:
    """A config by path, or by the name of one that ships with qirl, such as `digits/t2i`.

    Raises UserError, with the nearest shipped name, if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.relative_to(configs()).with_suffix("").as_posix(): p for p in configs().rglob("*.yaml")}
    wanted = str(name).removesuffix(".yaml")
    if wanted not in shipped:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"the config {name} {what}, nor is it one that ships with qirl{nearest(wanted, shipped)}")
    return shipped[wanted]
