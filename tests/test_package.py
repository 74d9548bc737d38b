"""The package as it is laid out, imported and installed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import para_kernels

REPOSITORY = Path(__file__).resolve().parent.parent
LINKED = ("triton_kernels", "integrations")
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text()


def pinned(tool: str) -> str:
    """The exact version that the [dev] extra asks for."""
    match = re.search(rf'"{tool}(?:\[\w+\])?==([\d.]+)"', PYPROJECT)
    assert match, f"{tool} is not pinned in pyproject.toml"
    return match[1]


# --- names, versions, links -------------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    assert version("para-kernels") == para_kernels.__version__
    assert f'\nversion = "{para_kernels.__version__}"\n' in PYPROJECT


def test_the_console_script_is_there() -> None:
    (script,) = entry_points(group="console_scripts", name="para-kernels")
    assert script.value == "para_kernels.integrations.diffusers.cli:main"


def test_pre_commit_runs_the_pinned_ruff() -> None:
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n +rev: v([\d.]+)\n", hooks) == [pinned("ruff")]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    assert os.readlink(REPOSITORY / "para_kernels" / name) == f"../{name}"


@pytest.mark.parametrize("name", LINKED)
def test_the_top_level_name_is_refused(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert f"'para_kernels.{name}'" in result.stderr


# --- arrows only go down ----------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = list(path.relative_to(REPOSITORY).with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "para_kernels")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(folder: str) -> list[Path]:
    files = (REPOSITORY / folder).rglob("*.py")
    linked = [REPOSITORY / "para_kernels" / name for name in LINKED]
    return sorted(path for path in files if not any(link in path.parents for link in linked))


MODULES = {module_name(path): path for folder in ("para_kernels", *LINKED) for path in python_files(folder)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def walk(node: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not into_functions:
            continue
        if is_type_checking(child) and not into_functions:
            continue
        yield child
        yield from walk(child, into_functions)


def imports(name: str, path: Path, *, into_functions: bool) -> set[str]:
    """Absolute names that a module imports; `from package import module` counts as the module."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text()), into_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES or submodule == "para_kernels._C" else base)
    return found


def belongs(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


TRITON, INTEGRATIONS = "para_kernels.triton_kernels", "para_kernels.integrations"
STANDARD_LIBRARY = tuple(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in MODULES if belongs(name, (TRITON,))])
def test_triton_kernels_import_torch_and_triton_only(name: str) -> None:
    allowed = ("torch", "triton", TRITON, *STANDARD_LIBRARY)
    assert not {other for other in imports(name, MODULES[name], into_functions=True) if not belongs(other, allowed)}


# `python -m para_kernels` is the command line, which nothing imports.
ENTRY_POINT = "para_kernels.__main__"


@pytest.mark.parametrize("name", [name for name in MODULES if not belongs(name, (TRITON, INTEGRATIONS, ENTRY_POINT))])
def test_para_kernels_knows_no_integration(name: str) -> None:
    found = imports(name, MODULES[name], into_functions=True)
    allowed = ("torch", "triton", "para_kernels", *STANDARD_LIBRARY)
    assert not {other for other in found if belongs(other, (INTEGRATIONS,)) or not belongs(other, allowed)}


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name: imports(name, path, into_functions=False) & MODULES.keys() for name, path in MODULES.items()}
    assert graph["para_kernels"], "the package imports its own modules"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# --- what is installed ------------------------------------------------------------------------------------------------


def expected_in_wheel() -> set[str]:
    """Every module, the typing files, and the shipped pipeline, all below para_kernels/."""
    toy = REPOSITORY / "integrations/diffusers/toy"
    others = [REPOSITORY / "para_kernels/py.typed", REPOSITORY / "para_kernels/_C.pyi"]
    others += [path for path in (toy / "pipeline").rglob("*") if path.is_file()] + list(toy.glob("*.json"))
    files = (path.relative_to(REPOSITORY) for path in [*MODULES.values(), *others])
    return {str("para_kernels" / path if path.parts[0] in LINKED else path) for path in files}


def test_the_pure_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for folder in ("para_kernels", *LINKED):
        shutil.copytree(
            REPOSITORY / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / file, source)
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *command], env=os.environ | {"PARA_KERNELS_SKIP_EXT": "1"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"para_kernels-{para_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        metadata = f"para_kernels-{para_kernels.__version__}.dist-info/"
        files = {name for name in archive.namelist() if not name.startswith(metadata)}
    assert files == expected_in_wheel()
