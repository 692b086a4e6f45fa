"""The rules of ARCHITECTURE.md, where a rule can be checked by reading the source. Nothing is imported."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tundish"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
LONGEST_FUNCTION = 100
HEAVY = set(
    "composer datasets deltalake huggingface_hub llmfoundry matplotlib mlflow numpy pandas pyarrow pyspark requests "
    "safetensors sqlalchemy streaming tiktoken tokenizers torch transformers".split()
)
"""Packages that take from 0.1 s to 20 s to import."""
NAMES_SLURM = {
    "plan.compute": "the argument `launcher` and its choices",
    "doctor": "a line of the report",
    "doctor.services": "a line of the report",
    "cli.starting": "an example in the help text",
}
"""Modules outside `launch` that may say the word in code, and why."""

Graph = Mapping[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below `tundish`; a package by its own name."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        trees[re.sub(r"(^|\.)__init__$", "", name)] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of tundish that `tree` imports: at its top, inside functions, and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            # `from package import name`: the name may be a module of the package.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "tundish":
                short = name.removeprefix("tundish").removeprefix(".")
                yield short if short in modules() else short.rpartition(".")[0]


def graph() -> Graph:
    """What each module imports."""
    return {name: set(imported(tree)) - {name} for name, tree in modules().items()}


def package(module: str) -> str:
    """The part of the architecture that a module belongs to."""
    return module.partition(".")[0]


def layers() -> dict[str, int]:
    """Height of each package and single module: the row of ARCHITECTURE.md's table that names it, from the bottom."""
    table = ARCHITECTURE.partition("## The packages")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    heights = {name: height for height, row in enumerate(rows) for name in re.findall(r"`(\w+)/?`", row)}
    assert len(heights) > 10
    return heights


def circles(edges: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""

    def reachable(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return seen

    below = {name: reachable(name) for name in edges}
    groups = {frozenset(other for other in below[name] if name in below[other]) for name in edges}
    return sorted(sorted(group) for group in groups if group)


def functions() -> Iterator[tuple[str, Function]]:
    """Every function and method of the source, with its place."""
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{module}.{node.name} (line {node.lineno})", node


def test_every_file_that_the_architecture_names_exists() -> None:
    """A reader who is sent to a file that was moved."""
    paths = re.findall(r"`((?:src/|tests/|yamls/)?\w+/[\w./]*)`", ARCHITECTURE)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists() and not (SOURCE / path).exists()] == []


def test_every_package_is_in_the_architecture() -> None:
    """A package that a reader of ARCHITECTURE.md does not learn of, or one that no longer exists."""
    assert layers().keys() ^ {package(module) for module in modules()} == {"", "__main__"}


def test_imports_go_downward() -> None:
    """A layer that knows of those above it cannot be read, tested or used without them."""
    heights = layers() | {"": 0, "__main__": len(layers())}
    assert len(modules()) > 80
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if heights[package(other)] > heights[package(module)]
    ]
    assert upward == []


def test_nobody_imports_what_the_launcher_starts() -> None:
    """`train` is started by name on every rank; who imports it loads Composer for 20 seconds."""
    importers = [name for name, others in graph().items() for other in others if package(other) == "train"]
    assert {package(name) for name in importers} == {"train"}


def test_there_is_no_circle_of_imports() -> None:
    """Modules that need each other are one module in several files. Imports inside functions count."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles(graph()) == []


def test_slurm_is_named_by_its_launcher_alone() -> None:
    """A second scheduler would need changes all over the source."""
    named = set()
    for module, tree in modules().items():
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            words = [getattr(node, field, None) for field in ("id", "attr", "name", "module", "arg", "asname")]
            if isinstance(node, ast.Constant) and id(node) not in documentation:
                words.append(node.value)
            if any("slurm" in word.lower() for word in words if isinstance(word, str)):
                named.add(module)
    assert {module for module in named if package(module) != "launch"} <= NAMES_SLURM.keys()


def test_plan_and_command_line_import_nothing_heavy() -> None:
    """`tundish --help` and a plan without data would take seconds."""
    heavy = []
    for module, tree in modules().items():
        if package(module) not in ("base", "plan", "cli", "foundation_model", "errors"):
            continue
        for node in _at_the_top(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            heavy += [f"{module} imports {name}" for name in names if name.partition(".")[0] in HEAVY]
    assert heavy == []


def _at_the_top(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported."""
    left: list[ast.stmt] = list(tree.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With):
            left += node.body


def test_functions_are_short_enough_to_read() -> None:
    """A function that is too long to understand as one thought."""
    lengths = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions()}
    assert len(lengths) > 500
    assert {place: length for place, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_every_function_says_what_it_returns() -> None:
    """A type that a reader, and the type checker, would have to guess."""
    assert [place for place, node in functions() if node.returns is None] == []
