"""Layout of the repository: allowed imports, and maximum lengths of packages, classes and functions."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("common", "mindmerger", "regmean", "tools")
SCRIPTS = ("run_training", "run_evaluation", "compute_gram", "merge_model")
# Packages that the modules of a package may import.
ALLOWED = {
    "common": {"common"},
    "mindmerger": {"common", "mindmerger"},
    "regmean": {"common", "regmean"},
    "tools": set(PACKAGES),
}
LONGEST_FUNCTION, LONGEST_CLASS = 45, 220
# Current lines of the packages, rounded. An increase needs a reason.
LINES = {("mindmerger",): 7081, ("regmean",): 8598, ("common",): 1343, PACKAGES: 19797}


def path_of(module: str) -> Path | None:
    """File of a module of the packages or of a script; None for any other module."""
    path = REPOSITORY.joinpath(*module.split("."))
    if module.partition(".")[0] not in (*PACKAGES, *SCRIPTS):
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def modules() -> dict[str, Path]:
    """Modules of the packages, with their files."""
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


class Imports(ast.NodeVisitor):
    """Modules of the repository that a file imports, anywhere except under `if TYPE_CHECKING`."""

    def __init__(self, file: Path):
        self.modules: set[str] = set()
        self.visit(ast.parse(file.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.modules |= {alias.name for alias in node.names if path_of(alias.name)}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        if path_of(node.module) is None:
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self.modules.add(name if path_of(name) else node.module)


@cache
def imports() -> dict[str, set[str]]:
    """Modules of the packages and scripts that each module of the packages imports."""
    return {name: Imports(file).modules - {name} for name, file in modules().items()}


def loaded_by(module: str) -> set[str]:
    """Modules loaded after an import of `module` in a process of its own."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["mindmerger.config", "regmean.config"])
def test_flags_load_no_torch(module: str) -> None:
    assert not loaded_by(module) & {"torch", "transformers", "datasets", "numpy"}


def test_the_model_loads_at_most_ten_modules_of_the_project() -> None:
    loaded = sorted(loaded_by("mindmerger.modeling") & modules().keys())
    assert len(loaded) <= 10, f"mindmerger.modeling loads {len(loaded)} modules: {', '.join(loaded)}"


def test_no_modules_import_each_other() -> None:
    """Depth first, over top-level imports and those in functions."""
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in finished:
            for other in sorted(imports().get(name, ())):
                visit(other, (*path, name))
            finished.add(name)

    for name in modules():
        visit(name, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if name.partition(".")[0] == package and other.partition(".")[0] not in ALLOWED[package]
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_and_classes_fit_a_screen_or_a_few(package: str) -> None:
    too_long = []
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            limit = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if name.partition(".")[0] == package and lines > limit:
                    too_long.append(f"{name}.{node.name}: {lines} lines, at most {limit}")
    assert not too_long, "; ".join(too_long)


@pytest.mark.parametrize("packages", LINES, ids="+".join)
def test_the_code_stays_small(packages: tuple[str, ...]) -> None:
    lines = {
        name: len(file.read_text(encoding="utf-8").splitlines())
        for name, file in modules().items()
        if name.partition(".")[0] in packages
    }
    total, limit = sum(lines.values()), LINES[packages]
    longest = sorted(lines, key=lines.get, reverse=True)[:5]
    listed = ", ".join(f"{name} {lines[name]}" for name in longest)
    assert total <= limit, f"{total} lines of {' and '.join(packages)}, at most {limit}; the longest: {listed}"
