"""How the modules depend on each other: no circles, and nothing below reaches up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports_of(package: str) -> dict[str, set[str]]:
    """The modules of a folder by dotted name, and which of them each imports, at its top or inside a function."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in (ROOT / package).rglob("*.py")}
    if package == "benchmarks":  # its files are run where they stand, and import each other by bare name
        files = {name.rpartition(".")[2]: file for name, file in files.items()}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found = {}
    for name, file in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found[name] |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] = {other for other in found[name] if other in files} - {name, package}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if found := walk(other, (*path, module)):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, ()))), [])


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and not circle({"a": {"b"}, "b": set()})


@pytest.mark.parametrize("package", ["qirl", "benchmarks"])
def test_modules_do_not_import_each_other_in_a_circle(package):
    assert circle(imports_of(package)) == []


def test_configs_and_data_know_nothing_of_what_is_built_on_them():
    below = ("qirl.config", "qirl.errors", "qirl.data.", "qirl.paths")
    allowed = {*below, "qirl.packing", "qirl.kernels", "qirl.data"}
    for module, others in imports_of("qirl").items():
        if module.startswith(below):
            assert {o for o in others if not o.startswith(tuple(allowed))} == set(), module
