"""What is installed: the torch build, flash-attn, and whether versions meet tundish's requirements.

Nothing is imported: torch alone would take longer than the whole report.
"""

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tundish.doctor.finding import Finding
from tundish.plan.compute import count_gpus

MAIN = ("mosaicml", "llm-foundry", "torch", "transformers", "mlflow", "mosaicml-streaming")
"""Packages whose versions every report shows."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch, from its files."""

    version: str | None
    """None = not installed."""
    cuda: str | None = None
    """None = built without CUDA."""


def torch_build() -> TorchBuild:
    """Read torch/version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return TorchBuild(None)
    values: dict[str, Any] = {}
    for node in ast.parse(Path(spec.origin).with_name("version.py").read_text()).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and isinstance(value := getattr(node, "value", None), ast.Constant):
            values[target.id] = value.value
    return TorchBuild(values["__version__"], values.get("cuda"))


def judge_torch(build: TorchBuild, usable: int) -> Finding:
    """Whether torch can use the devices of this machine.

    Args:
        build: what is installed.
        usable: GPUs that this process may use.
    """
    if build.version is None:
        return Finding("torch", "problem", "not installed", "Install tundish's locked dependencies: `make install`.")
    if build.cuda is None and usable:
        advice = "Install a torch build with CUDA, or use `--device cpu`."
        return Finding(
            "torch", "problem", f"{build.version}, built without CUDA, on a machine with {usable} GPUs", advice
        )
    cuda = f"built for CUDA {build.cuda}" if build.cuda else "built without CUDA"
    return Finding("torch", "ok", f"{build.version}, {cuda}")


def torch() -> Finding:
    """Check torch."""
    return judge_torch(torch_build(), count_gpus())


def judge_flash_attention(version: str | None, usable: int) -> Finding:
    """Whether the fastest attention is installed.

    Args:
        version: of flash-attn; None = not installed.
        usable: GPUs that this process may use.
    """
    if version:
        return Finding("flash-attn", "ok", version)
    if usable:
        advice = "For faster steps: `pip install 'flash-attn>=2.7.4,<3' --no-build-isolation`."
        return Finding("flash-attn", "absent", "not installed; a slower attention is used", advice)
    return Finding("flash-attn", "absent", "not installed; a CPU cannot use it")


def flash_attention() -> Finding:
    """Check flash-attn."""
    return judge_flash_attention(_version("flash-attn"), count_gpus())


def judge_packages(requirements: Sequence[str], versions: Mapping[str, str | None]) -> Finding:
    """Whether installed versions meet tundish's requirements.

    Args:
        requirements: of tundish, as its metadata has them.
        versions: by package name; None = not installed.
    """
    from packaging.requirements import Requirement

    wrong: list[str] = []
    for requirement in map(Requirement, requirements):
        version = versions[requirement.name]
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is not installed'} ({requirement.specifier})")
    if wrong:
        advice = "Install the locked versions: `make install`."
        return Finding("packages", "problem", f"versions that tundish does not support: {', '.join(wrong)}", advice)
    return Finding("packages", "ok", ", ".join(f"{name} {versions[name]}" for name in MAIN if name in versions))


def packages() -> Finding:
    """Compare installed versions with tundish's requirements; extras are left out."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("tundish") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "absent", "tundish is not installed, so its requirements are unknown")
    required = [text for text in required if (marker := Requirement(text).marker) is None or marker.evaluate()]
    return judge_packages(required, {(name := Requirement(text).name): _version(name) for text in required})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
