"""The teachers: one frozen module on the device, the weights of all of them in host memory, the next one on its way.

What differs between teachers is swapped, nothing else: whole weights, or, where all teachers are adapters of the
student's base, their low-rank matrices alone (smaller ranks are filled up with zeros, which changes nothing).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qirl.config import DistillConfig
from qirl.errors import UserError
from qirl.flow.rollout import DTYPES
from qirl.models.adapter_files import is_adapter, read_adapter
from qirl.models.adapters import Adapter, add_slots, fill
from qirl.models.architecture import Transformer
from qirl.models.folders import find_model, world_facts
from qirl.models.lora import adapter_off
from qirl.models.weights import check_weights, load_config, new_model, read_weights
from qirl.parallel.data import Ranks, local, local_part, shard


@dataclass(frozen=True)
class Source:
    """Where a teacher's weights are: a checked model folder (its variant), or an adapter of the student's base (a folder or
    a file)."""

    folder: Path
    adapter: Adapter | None = None
    variant: str | None = None


def find_sources(config: DistillConfig) -> dict[str, Source]:
    """The teachers of a config, all checked, no whole weights read.

    Raises UserError for one that is missing, damaged, of another architecture or of another base than the student's,
    and for guidance that it was never trained for.
    """
    base = find_model(config.model.path)
    with torch.device("meta"):
        student = new_model(load_config(base))
    found = {}
    for name, teacher in config.distill.teachers.items():
        option = f"distill.teachers.{name}.path={teacher.path}"
        source = found[name] = _adapter_source(option, Path(teacher.path), base, student)
        if source is None:
            source = found[name] = _model_source(option, teacher.path, student)
        facts = world_facts(base) | world_facts(source.folder)
        if teacher.guidance != 1 and not facts.get("unconditional", True):
            raise UserError(
                f"distill.teachers.{name}.guidance={teacher.guidance:g} needs an unconditional embedding and {teacher.path} "
                "was trained without one (pretrain.drop_condition=0); set it to 1"
            )
    return found


def _adapter_source(option: str, folder: Path, base: Path, student: Transformer) -> Source | None:
    if not is_adapter(folder):
        return None
    adapter = read_adapter(folder)
    own = _model_at(adapter.base) if adapter.base else None  # the base may have moved: its shapes are checked anyway
    if own is not None and own.resolve() != base.resolve():
        raise UserError(f"{option} is an adapter of {own}, the student starts from {base}; use one base for both")
    return Source(folder, adapter.fitted(student, folder))


def _model_at(path: str) -> Path | None:
    try:
        return find_model(path)
    except UserError:
        return None


def _model_source(option: str, path: str, student: Transformer) -> Source:
    folder = _model_at(path)
    if folder is None:
        raise UserError(
            f"{option} holds no model (no config.json, no model/ of a finished run, no adapter); check the path"
        )
    own = load_config(folder)
    if type(own) is not type(student.config):
        raise UserError(
            f"{option} is of another class of transformers than the student; a teacher has its architecture"
        )
    for field in dataclasses.fields(own):
        mine, students = getattr(own, field.name), getattr(student.config, field.name)
        if mine != students:
            raise UserError(
                f"{option} has {field.name}={mine}, the student has {students}; a teacher has the student's architecture"
            )
    check_weights(student, folder)
    return Source(folder)


class Teachers:
    """`model` is the active teacher, sharded as the student is; `activate` changes it, `prefetch` prepares the next.

    sources: as `find_sources` returns them. base: the student's base folder, which adapters belong to; variant: of its
    weight files.
    """

    def __init__(
        self, sources: Mapping[str, Source], base: Path, dtype: torch.dtype, ranks: Ranks, variant: str | None = None
    ):
        adapters = [s.adapter for s in sources.values() if s.adapter is not None]
        self.model = frozen_model(base, adapters, dtype, ranks)
        self.device, self.active = ranks.device, None
        self.coming: tuple[str, dict[str, torch.Tensor]] | None = None
        self.side = torch.cuda.Stream() if self.device.type == "cuda" else None
        self._parameters = dict(self.model.named_parameters())
        self.only_adapters = len(adapters) == len(sources)
        shared = self._read(Source(base, variant=variant)) if adapters else {}
        if self.only_adapters:  # the base stays where it is
            self._write(shared)
            shared = {}
        self.host = {
            name: (self._read(s) if s.adapter is None else shared) | self._slots(s.adapter)
            for name, s in sources.items()
        }
        if len(sources) == 1:  # it stays on the device
            self.activate(*sources)
            self.host.clear()

    def prefetch(self, name: str) -> None:
        """Starts to bring a teacher's weights to the device, beside whatever runs there."""
        if name in (self.active, self.coming and self.coming[0]):
            return
        with torch.cuda.stream(self.side) if self.side else contextlib.nullcontext():
            self.coming = name, {k: v.to(self.device, non_blocking=True) for k, v in self.host[name].items()}

    def activate(self, name: str) -> None:
        """Makes `name` the active teacher; fetches it now if it was not prefetched."""
        if name == self.active:
            return
        self.prefetch(name)
        values = self.coming[1]
        if self.side:
            current = torch.cuda.current_stream()
            current.wait_stream(self.side)
            for value in values.values():  # made on the side stream, read on this one
                value.record_stream(current)
        self._write(values)
        self.active, self.coming = name, None

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        if hasattr(self.model, "reshard"):  # what a forward has gathered is of the teacher before
            for module in (*self.model.transformer_blocks, self.model):
                module.reshard()
        for name, value in values.items():
            local(self._parameters[name]).copy_(value)

    def _read(self, source: Source) -> dict[str, torch.Tensor]:
        """A model folder's tensors as this rank holds them, by the names of the (possibly adapted) module."""
        found = {}
        for name, value in read_weights(source.folder, source.variant):
            stem, _, kind = name.rpartition(".")
            name = name if name in self._parameters else f"{stem}.base_layer.{kind}"
            found[name] = self._keep(name, value)
        return found

    def _slots(self, adapter: Adapter | None) -> dict[str, torch.Tensor]:
        slots = {name: p for name, p in self._parameters.items() if ".lora_" in name}
        return {name: self._keep(name, value) for name, value in fill(slots, adapter).items()}

    def _keep(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters[name]
        part = local_part(parameter, whole.to(parameter.dtype)).cpu().clone()
        return part.pin_memory() if self.side else part


class Base:
    """The frozen base that `distill.anchor` pulls to: adapted modules with the adapter off, or a module of its own."""

    def __init__(self, model: Transformer, adapted: bool):
        self.model, self.adapted = model, adapted

    def __call__(self, *inputs):
        with adapter_off(self.model) if self.adapted else contextlib.nullcontext():
            return self.model(*inputs)


def find_base(config: DistillConfig, student: Transformer, teachers: Teachers, folder: Path, ranks: Ranks) -> Base:
    """The base of a run, in modules that are there anyway where possible."""
    if config.model.lora.rank:
        return Base(student, adapted=True)
    if teachers.only_adapters:
        return Base(teachers.model, adapted=True)
    own = Teachers({"base": Source(folder, variant=config.model.variant)}, folder, DTYPES[config.model.dtype], ranks)
    return Base(own.model, adapted=False)


def meta_teacher(base: str | Path, adapters: Sequence[Adapter]) -> Transformer:
    """A module of the base's architecture on the meta device, with places for adapters."""
    with torch.device("meta"):
        model = new_model(load_config(find_model(str(base))))
        if adapters:
            add_slots(model, adapters)
    return model


def frozen_model(base: Path, adapters: Sequence[Adapter], dtype: torch.dtype, ranks: Ranks) -> Transformer:
    """The same on the rank's device, without values, sharded over several ranks."""
    model = meta_teacher(base, adapters)
    model = model.to(dtype).to_empty(device=ranks.device).requires_grad_(False)
    return shard(model, ranks, dtype) if ranks.world > 1 else model
