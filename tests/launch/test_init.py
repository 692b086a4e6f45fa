"""launch/__init__.py: all launchers keep one contract."""

import inspect

import pytest

from tundish import launch
from tundish.launch.contract import Launcher


@pytest.mark.parametrize("name", launch.LAUNCHERS)
def test_each_launcher_has_what_the_contract_asks_for(name: str) -> None:
    """A hook that is missing, or takes other arguments, would show when a run of that launcher needs it."""
    launcher = launch.LAUNCHERS[name]
    hooks = [hook for hook in vars(Launcher) if not hook.startswith("_") and callable(getattr(Launcher, hook))]
    assert len(hooks) > 8
    for hook in hooks:
        expected = list(inspect.signature(getattr(Launcher, hook)).parameters)[1:]
        assert list(inspect.signature(getattr(launcher, hook)).parameters) == expected, hook
