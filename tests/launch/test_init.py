"""launch/__init__.py: launchers keep one contract, and nothing else in the package knows one by name."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import tundish
from tundish import launch
from tundish.launch.contract import Launcher

SRC = Path(tundish.__file__).parent
ALLOWED = ("launch/", "doctor/", "plan/compute.py")
"""Launchers themselves, what looks at the machine, and the argument that names the launcher."""


def _mentions(source: str) -> Iterator[str]:
    """Names, and texts that a program compares or looks up; what people read may mention Slurm."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.alias(name=text):
                pass
            case ast.Constant(value=str(text)) if " " not in text:
                pass
            case _:
                continue
        if "slurm" in text.lower():
            yield text


def test_no_scheduler_is_named_outside_of_launch() -> None:
    """A new launcher would need changes all over the package."""
    files = [file for file in SRC.rglob("*.py") if not str(file.relative_to(SRC)).startswith(ALLOWED)]
    assert len(files) > 50
    assert {str(file.relative_to(SRC)): list(_mentions(file.read_text())) for file in files} == {
        str(file.relative_to(SRC)): [] for file in files
    }
    assert list(_mentions((SRC / "launch" / "slurm.py").read_text())), "the check finds what is there"


@pytest.mark.parametrize("name", launch.LAUNCHERS)
def test_each_launcher_has_what_the_contract_asks_for(name: str) -> None:
    """A hook that is missing, or takes other arguments, would show when a run of that launcher needs it."""
    launcher = launch.LAUNCHERS[name]
    hooks = [hook for hook in vars(Launcher) if not hook.startswith("_") and callable(getattr(Launcher, hook))]
    assert len(hooks) > 8
    for hook in hooks:
        expected = list(inspect.signature(getattr(Launcher, hook)).parameters)[1:]
        assert list(inspect.signature(getattr(launcher, hook)).parameters) == expected, hook
