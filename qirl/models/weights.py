"""Reading and writing model folders in diffusers' format: config.json and safetensors, one file or a sharded index."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qirl.errors import UserError
from qirl.models.architecture import Transformer
from qirl.models.quantised import FrozenLinear, quantise
from qirl.models.qwen_image import QwenImage, QwenImageConfig
from qirl.models.qwen_image_21 import MakeLinear, QwenImage21, QwenImage21Config
from qirl.models.weight_files import NAME, entry_file, is_index, saved_files, weight_files
from qirl.parallel.sharding import Sharding

CONFIG = "config.json"
# the transformers that can be trained, by the classes that diffusers saves
CLASSES = {
    "QwenImage21Transformer2DModel": (QwenImage21Config, QwenImage21),
    "QwenImageTransformer2DModel": (QwenImageConfig, QwenImage),
}
Config = QwenImage21Config | QwenImageConfig


def new_model(config: Config, make_linear: MakeLinear | None = None) -> Transformer:
    """A transformer of this config with weights as torch draws them; make_linear(inputs, outputs): of its blocks."""
    own = next(model for kind, model in CLASSES.values() if isinstance(config, kind))
    return own(config, make_linear) if make_linear else own(config)


def load_config(folder: str | Path) -> Config:
    """The model config of a folder, one of 2.1 where it names no class. Raises UserError if it is missing, unreadable or of another class."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a folder saved by diffusers or by `qirl export`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__} and no model config; copy it again")
    name = values.get("_class_name", next(iter(CLASSES)))
    if name not in CLASSES:
        raise UserError(f"{path} describes a {name}; qirl trains {' and '.join(CLASSES)}")
    try:
        return CLASSES[name][0].from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    make_linear: MakeLinear | None = None,
    variant: str | None = None,
    base: str | None = None,
    sharding: Sharding | None = None,
) -> Transformer:
    """A model with the weights of a diffusers folder. variant: see `weight_files`. base: "int8" or "fp8" for blocks that are
    never trained (`quantised`). sharding: this rank's parts, and it reads no others.

    Raises UserError for missing, truncated or misfit files and for weights that are not finite.
    """
    with torch.device("meta"):
        model = new_model(load_config(folder), make_linear)
    check_weights(model, folder, variant)
    model = model.to(dtype)
    if sharding:
        sharding.cut(model)
    if base:
        quantise(model, base)
    model = model.to_empty(device=device)
    wanted = model.state_dict()
    fills = {f"{name}.weight": m.fill for name, m in model.named_modules() if isinstance(m, FrozenLinear)}
    for name, value in read_weights(folder, variant, sharding):
        with torch.no_grad():
            fills.get(name, wanted[name].copy_)(value)
    return model


def read_weights(
    folder: str | Path, variant: str | None = None, sharding: Sharding | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a diffusers folder by name, one in memory at a time: whole, or a rank's parts and no others.

    Raises the UserErrors of `load_model`.
    """
    for path in weight_files(folder, variant):
        for name, value in _tensors(path, sharding):
            check_values(path, name, value)
            yield name, value


def _tensors(path: Path, sharding: Sharding | None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = sharding.part(name, tuple(file.get_slice(name).get_shape())) if sharding else ()
                if part is not None:
                    yield name, file.get_slice(name)[part] if part else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from None


def check_values(path: str | Path, name: str, value: torch.Tensor) -> None:
    """Raises UserError for a weight that is no floating-point tensor or holds a NaN or an infinity."""
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{path}: '{name}' is {kind}, not floating point; take the model's weights before quantisation")
    finite = (value.float() if value.element_size() == 1 else value).isfinite()  # isfinite knows no float8
    if not finite.all():
        raise UserError(
            f"{path}: '{name}' holds {int((~finite).sum())} of {value.numel()} values that are NaN or infinite; "
            "take weights from before the training diverged, or copy them again"
        )


def check_weights(model: torch.nn.Module, folder: str | Path, variant: str | None = None) -> None:
    """Compares the files' headers with `model` (which may be on the meta device); reads no weights.

    Raises UserError for a missing or truncated file, a tensor that is missing or too many, or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = set(wanted)
    for path in weight_files(folder, variant):
        for name, shape in tensor_shapes(path).items():
            if name not in wanted:
                raise UserError(
                    f"{path.name} holds '{name}', which the model does not have; is config.json from another model?"
                )
            if shape != wanted[name]:
                raise UserError(
                    f"{path.name}: '{name}' has shape {shape}, config.json asks for {wanted[name]}; take both from one model"
                )
            if name not in missing:
                raise UserError(f"{path.name} holds '{name}', which another shard holds too; copy the folder again")
            missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors, first '{min(missing)}'; copy the folder again")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that a safetensors file's header states. Raises UserError for a file that is truncated or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from None


def save_model(config: Config, state: dict[str, torch.Tensor], folder: str | Path, max_shard: str = "5GB") -> None:
    """Writes a folder that diffusers' `from_pretrained` and `load_model` read unchanged, in place of a model there.

    Everything is written beside the old model first. Then config.json goes, the old weights and indices go, the new
    ones come, and config.json last: a save that is cut off leaves the old model, none, or the new one, never a mixture.
    Raises UserError where the folder cannot be written.
    """
    folder = Path(folder)
    new = folder / "saving.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write_files(config, state, new, max_shard)
        (folder / CONFIG).unlink(missing_ok=True)
        for path in saved_files(folder):
            path.unlink()
        for path in sorted(new.iterdir(), key=lambda p: (p.name == CONFIG, is_index(p))):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model {folder} ({reason}); free disk space or use another folder") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_files(config: Config, state: dict[str, torch.Tensor], folder: Path, max_shard: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    save_config(config, folder)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=NAME + "{suffix}.safetensors", max_shard_size=max_shard
    )
    for filename, names in split.filename_to_tensors.items():
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_config(config: Config, folder: str | Path) -> None:
    """Writes config.json as diffusers does."""
    name = next(name for name, (kind, _) in CLASSES.items() if isinstance(config, kind))
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    (Path(folder) / CONFIG).write_text(json.dumps({"_class_name": name, **fields}, indent=2) + "\n")


def copy_model(source: str | Path, target: str | Path) -> Path:
    """Copies a complete model folder to `target`, whole or not at all.

    Raises UserError for a model that is not complete and a target that exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; name a new folder")
    with torch.device("meta"):
        check_weights(new_model(load_config(source)), source)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        files = weight_files(source)
        entry = entry_file(source)
        texts = [p for p in source.glob("*.json") if not is_index(p) or p == entry]
        for path in (*texts, *files):
            shutil.copyfile(path, temporary / path.name)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
