"""Reading configs: YAML, dotted overrides, names and types, and what to say in one line when they are wrong.

Knows nothing of single options: every function is given the schema (qirl.config).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from qirl.errors import UserError, nearest

Schema = type[BaseModel]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; plain YAML silently takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for place, key in enumerate(keys):
            if key.value in [other.value for other in keys[:place]]:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises UserError for a missing file, bad YAML or something else than a mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{path} is not valid YAML ({reason}); mend that place") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; a config is a mapping of sections, such as `run:`")
    return values or {}


def override(schema: Schema, values: dict, text: str) -> None:
    """Puts `section.option=value` into `values`."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UserError(f"'{text}' is no override; write section.option=value")
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"override '{text}': '{section}' is an option, not a section; write section.option=value")
    values[last] = _value(value, _annotation(schema, name.split(".")))


def _value(text: str, kind: Any) -> Any:
    """An override's value: YAML, but an option that takes text gets what was typed (run.out=2024)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if kind in (str, str | None) and value is not None and not isinstance(value, str) else value


def _annotation(schema: Schema, path: list[str]) -> Any:
    """The type of the option at a dotted path, None where there is no such option."""
    names = list(path)
    while names:
        name = names.pop(0)
        if name not in schema.model_fields:
            return None
        found = schema.model_fields[name].annotation
        if entries := _entries(found):  # the next part of the path names an entry
            names = names[1:]
            found = next((e for e in entries if names and names[0] in e.model_fields), entries[0])
        elif not _is_section(found):
            return None if names else found
        schema = found
    return None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _entries(annotation: Any) -> list[Schema]:
    """The sections that an entry of a `dict[str, Section]` or of a dict of sections by their `kind` may be, else none."""
    args = get_args(annotation)
    if get_origin(annotation) is not dict:
        return []
    own = args[1] if _is_section(args[1]) else get_args(args[1])[0] if get_origin(args[1]) is Annotated else args[1]
    return [s for s in get_args(own) or (own,) if _is_section(s)]


def _entry(annotation: Any, value: Any, where: str) -> Schema:
    """Of `_entries` the one of the value's `kind`. Raises UserError for a kind that there is not."""
    entries = _entries(annotation)
    if len(entries) == 1:
        return entries[0]
    kinds = {kind_of(entry): entry for entry in entries}
    given = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if given not in kinds:
        named = nearest(given, kinds) if isinstance(given, str) else ""
        raise UserError(f"{where}.kind={given} is none of {', '.join(kinds)}{named}")
    return kinds[given]


def kind_of(entry: Schema) -> str:
    return get_args(entry.model_fields["kind"].annotation)[0]


def check_names(schema: Schema, values: dict, where: tuple[str, ...] = (), root: Schema | None = None) -> None:
    """Refuses unknown options at any depth, naming the nearest known one; an empty section means its defaults."""
    root = root or schema
    for name, value in values.items():
        if name not in schema.model_fields:
            raise UserError(_unknown(root, schema, where, str(name)))
        inner = schema.model_fields[name].annotation
        if _is_section(inner):
            values[name] = value = {} if value is None else value
            if isinstance(value, inner):
                continue
            if not isinstance(value, dict):
                raise UserError(f"'{'.'.join((*where, name))}' is a section; got {value!r}, write its options below it")
            check_names(inner, value, (*where, name), root)
        elif _entries(inner) and isinstance(value, dict):
            for key, own in value.items():
                full = ".".join((*where, name, str(key)))
                if own is not None and not isinstance(own, (dict, *_entries(inner))):
                    raise UserError(f"'{full}' is a section; got {own!r}, write its options below it")
                value[key] = own = {} if own is None else own
                entry = _entry(inner, own, full)
                if isinstance(own, dict):
                    check_names(entry, own, (*where, name, str(key)), root)


def _unknown(root: Schema, schema: Schema, where: tuple[str, ...], name: str) -> str:
    """Names the option that was meant: the same name in another section, or the nearest one here or elsewhere."""
    full = ".".join((*where, name))
    here = {option: ".".join((*where, option)) for option in schema.model_fields}
    anywhere = {dotted.rpartition(".")[2]: dotted for dotted, *_ in reversed(describe(root))}
    for options, cutoff in ((anywhere, 1.0), (here, 0.75), (anywhere, 0.75), (here, 0.5)):
        if close := difflib.get_close_matches(name, options, n=1, cutoff=cutoff):
            return f"unknown option '{full}'; did you mean '{options[close[0]]}'?"
    return f"unknown option '{full}'{nearest(name, here)}"


_WANTED = {
    "int_type": "should be a whole number", "float_type": "should be a number", "bool_type": "should be true or false",
    "string_type": "should be text", "tuple_type": "should be a list", "dict_type": "should be a mapping of names",
}  # fmt: skip


def one_line(schema: Schema, error: ValidationError) -> str:
    """The first error: option, value, what it should be, the nearest choice or the default."""
    first = error.errors()[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "value_error":  # ours: names the option and the fix
        return first["msg"].removeprefix("Value error, ") + more
    where = [str(part) for part in first["loc"] if part != "[key]"]
    given = json.dumps(first["input"], default=str)
    given = given if len(given) <= 60 else given[:57] + "..."
    wanted = first["msg"].removeprefix("Input ")
    wanted = _WANTED.get(first["type"], wanted[0].lower() + wanted[1:])
    return f"{'.'.join(where)}={given}: {wanted}{_hint(schema, where, first)}{more}"


def _hint(schema: Schema, where: list[str], error: Any) -> str:
    given = error["input"]
    if error["type"] == "string_type" and given is not None:
        return "; put it in quotes"
    if error["type"] == "literal_error" and isinstance(given, str):
        known = get_args(_annotation(schema, where))
        return nearest(given, known) if difflib.get_close_matches(given, known, cutoff=0.5) else ""
    names = list(where)
    while names:
        name = names.pop(0)
        if name not in schema.model_fields:
            return ""
        field = schema.model_fields[name]
        entries = _entries(field.annotation)
        if not _is_section(field.annotation) and not (entries and names):
            return f"; the default is {_shown(field.default)}"
        if len(entries) > 1:  # an error behind a union names the kind too
            entries = [e for e in entries if len(names) > 1 and kind_of(e) == names[1]] or entries
            names = names[1:]
        names, schema = (names[1:], entries[0]) if entries else (names, field.annotation)
    return ""


def _shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def describe(schema: Schema) -> list[tuple[str, str, str, str]]:
    """(dotted name, type, default, text) of every option, in order."""
    rows: list[tuple[str, str, str, str]] = []

    def walk(schema: Schema, where: tuple[str, ...]) -> None:
        for name, field in schema.model_fields.items():
            if _is_section(field.annotation):
                walk(field.annotation, (*where, name))
            elif entries := _entries(field.annotation):
                for entry in entries:
                    walk(entry, (*where, name, "NAME" if len(entries) == 1 else f"NAME({kind_of(entry)})"))
            else:
                own = _type_name(field.annotation) + _limits(field.metadata)
                rows.append((".".join((*where, name)), own, _shown(field.default), field.description or ""))

    walk(schema, ())
    return rows


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    names = {int: "int", float: "float", str: "text", bool: "true | false"}
    if annotation in names:
        return names[annotation]
    if type(None) in get_args(annotation):  # "x | None"
        return f"{_type_name(get_args(annotation)[0])} | null"
    args = [_type_name(a) for a in get_args(annotation) if a is not ...]
    if get_origin(annotation) is tuple:
        return f"list of {args[0]}" if ... in get_args(annotation) else f"{len(args)} x {args[0]}"
    return f"name: {args[1]}" if "name" not in args[1] else "name: {" + args[1] + "}"


def _limits(metadata: list) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    found = [f"{sign} {_power(getattr(m, name))}" for m in metadata for name, sign in signs if hasattr(m, name)]
    return f" {', '.join(found)}" if found else ""


def _power(limit: float) -> str:
    exponent = int(limit).bit_length() - 1
    return f"2^{exponent}" if limit == 2**exponent and limit > 2**16 else str(limit)
