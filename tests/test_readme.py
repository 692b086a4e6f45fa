"""The README is true: its links, its commands, its verbs."""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _fenced() -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_link_leads_somewhere() -> None:
    """A page or a section that was renamed."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert len(links) >= 3
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link


def test_every_command_parses() -> None:
    """A command or an option that was renamed."""
    from tundish.cli import build_parser

    commands = [line for block in _fenced() for line in _joined(block) if line.startswith("tundish ")]
    assert len(commands) >= 9
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


def _joined(block: str) -> list[str]:
    """The lines of a block; those that end with a backslash are joined with the next one."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def test_every_make_target_is_there() -> None:
    """A target that the Makefile does not have."""
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert targets == {"install", "demo", "test", "check"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE), target


def test_ci_calls_the_commands_of_the_readme() -> None:
    """CI that checks something other than what people run."""
    script = (ROOT / ".ci" / "run").read_text()
    assert [line for line in script.splitlines() if line.startswith("make ")] == ["make check", "make test"]


def test_the_example_uses_arguments_that_exist() -> None:
    """An example with arguments that do not exist."""
    import inspect

    from tundish import foundation_model as fm
    from tundish.plan.compute import Compute

    calls = [
        node
        for example in _fenced()
        if "fm.create(" in example
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fm.create"
    ]
    assert len(calls) >= 2
    for call in calls:
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        assert set(arguments) <= set(inspect.signature(fm.create).parameters)
        if "compute" in arguments:
            Compute.parse(ast.literal_eval(arguments["compute"]))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_are_short_and_use_public_names(recipe: Path) -> None:
    """A recipe that is too long to copy, or needs names that are not public."""
    text = recipe.read_text()
    assert len(text.splitlines()) <= 60
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tundish")
        for alias in node.names
    }
    assert imported <= {"tundish.foundation_model", "tundish.tiny"}
