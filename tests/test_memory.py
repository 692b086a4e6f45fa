"""memory.py: what is chosen for the planned sizes, and the table that shows it; train/test_memory.py measures."""

import pytest

from tundish.memory import GIB, MemoryPlan, plan, usable
from tundish.models import find_card


def _plan(name: str, devices: int, context_length: int = 8192, device_memory: float = 80) -> MemoryPlan:
    card = find_card(f"meta-llama/Meta-Llama-3.1-{name}")
    return plan(
        card, context_length, devices, 16, device="gpu", attention=card.gpu_attention,
        device_memory=int(device_memory * GIB),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "devices", "microbatch", "again", "gib", "fits"),
    [
        ("8B", 1, 1, True, 110, False),
        ("8B", 8, 2, True, 49, True),
        ("70B", 32, 1, True, 59, True),
        ("405B", 128, 1, True, 107, False),
    ],
)
def test_the_choices_for_the_planned_sizes(
    name: str, devices: int, microbatch: int, again: bool, gib: int, fits: bool
) -> None:
    """A run would end out of memory, or be slower than its devices, after a change that nobody meant."""
    found = _plan(name, devices)
    chosen = found.chosen
    assert (chosen.microbatch, chosen.activation_checkpointing, found.fits) == (microbatch, again, fits)
    assert round(chosen.peak / GIB) == gib


def test_what_fits_is_the_best_that_fits() -> None:
    """Layers would be computed twice without need, or rows be trained one by one."""
    for memory in (40, 60, 80, 141, 192):
        found = _plan("8B", 8, device_memory=memory)
        limit = usable(int(memory * GIB), "gpu")
        fitting = [one for one in found.candidates if one.peak <= limit]
        assert found.chosen == (fitting[0] if fitting else min(found.candidates, key=lambda one: one.peak))
        assert found.fits is bool(fitting)
    assert not _plan("8B", 8, device_memory=192).chosen.activation_checkpointing


def test_a_shorter_context_takes_less() -> None:
    """The advice to shorten rows would not help."""
    assert _plan("405B", 128, 4096).chosen.peak < _plan("405B", 128).chosen.peak


def test_the_table_marks_what_is_chosen() -> None:
    """The caller would read numbers without knowing which are his."""
    lines = list(_plan("8B", 8).lines())
    (chosen,) = [line for line in lines if "← chosen" in line]
    assert chosen.split()[:2] == ["2", "again"]
    assert "none fits into the 80.0 GiB" in list(_plan("8B", 1).lines())[-1]
