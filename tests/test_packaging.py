"""pyproject.toml: what is imported is declared, what is declared is used, and the wheel tells that it is typed."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
OWN = {"tundish", "tests", "benchmarks", "recipes"}
IMPORTERS = {"import_module", "importorskip", "find_spec"}
NOT_DECLARED = {
    "IPython": "looked for where tundish already runs in a notebook",
    "_typeshed": "exists for type checkers only",
    "databricks": "the original client, compared with where it is installed",
}
"""Imported modules that nobody needs to install, and why."""
NOT_IMPORTED = {
    "setuptools": "Composer imports pkg_resources, which 81 removed",
    "starlette": "MLflow's model server uses a method that 1 removed",
}
"""Declared packages that tundish does not import, and why they are pinned."""


def _names(requirements: Iterable[str]) -> set[str]:
    """Normalized names of packages."""
    found = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in found if name}


def _imports(folder: str) -> Iterator[tuple[str, str]]:
    """Each top-level module that is imported from elsewhere, also inside functions, and the file that imports it."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=aliases):
                    modules = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case ast.Call(
                    func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(module)), *_]
                ) if name in IMPORTERS:
                    modules = [module]
                case _:
                    continue
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in OWN:
                    yield top, str(file.relative_to(ROOT))


def _undeclared(folder: str, declared: set[str], packages: Mapping[str, list[str]]) -> set[tuple[str, str]]:
    return {
        (module, file)
        for module, file in _imports(folder)
        if module not in NOT_DECLARED and not declared & _names(packages.get(module, [module]))
    }


@pytest.fixture(scope="module")
def packages() -> Mapping[str, list[str]]:
    """The installed packages that a module may come from."""
    return importlib.metadata.packages_distributions()


@pytest.fixture(scope="module")
def runtime() -> set[str]:
    """Declared packages that tundish itself may import, extras among them."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    return _names([*PROJECT["project"]["dependencies"], *(package for extra in extras for package in extra)])


def test_every_import_is_declared(packages: Mapping[str, list[str]], runtime: set[str]) -> None:
    """It would be there by another package's grace, until that one drops it."""
    assert len(set(_imports("src"))) > 100
    assert _undeclared("src", runtime, packages) == set()
    developers = runtime | _names(PROJECT["dependency-groups"]["dev"])
    for folder in ("recipes", "benchmarks", "tests"):
        assert _undeclared(folder, developers if folder != "recipes" else runtime, packages) == set()


def test_every_dependency_is_imported(packages: Mapping[str, list[str]]) -> None:
    """Everybody would install a package that nothing uses any more."""
    imported = {name for module, _ in _imports("src") for name in _names(packages.get(module, []))}
    # Modules that Azure's and Google's packages share are looked up by their whole names.
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    unused = _names(PROJECT["project"]["dependencies"]) - imported - NOT_IMPORTED.keys()
    assert {name for name in unused if name.replace("-", ".") not in source} == set()
    assert NOT_IMPORTED.keys() <= _names(PROJECT["project"]["dependencies"]), "a reason for a package that has left"


def test_the_wheel_is_typed(tmp_path: Path) -> None:
    """Type checkers take every name of a package without `py.typed` for unknown."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tundish/py.typed" in names and "tundish/foundation_model.py" in names and "tundish/yamls/base.yaml" in names
