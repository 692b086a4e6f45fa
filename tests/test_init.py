"""Importing tundish and asking for help loads nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = tuple("torch transformers mlflow composer llmfoundry streaming pandas tokenizers numpy pyarrow".split())


def _loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import tundish",
        "import tundish.cli",
        "import tundish.foundation_model",
        "from tundish.cli import main\nmain(['--help'])",
        "from tundish.cli import main\nmain(['models'])",
    ],
    ids=["package", "cli", "foundation_model", "help", "models"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    """Every import and every `--help` would take seconds."""
    loaded = _loaded_by(code)
    assert "tundish" in loaded
    assert not loaded & set(HEAVY)


def test_python_m_tundish_works_like_the_command() -> None:
    """`python -m tundish` would not run, or lose the exit code."""
    done = subprocess.run([sys.executable, "-m", "tundish", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: tundish") and done.stderr == ""
    done = subprocess.run([sys.executable, "-m", "tundish", "get", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no run 'x'" in done.stderr and "Traceback" not in done.stderr
