"""memory.py: what is chosen for the planned sizes, and the table that shows it; train/test_memory.py measures."""

import pytest

from tundish.plan.memory import GIB, MemoryPlan, Setting, plan, usable
from tundish.plan.models import find_card


def _plan(name: str, devices: int, context_length: int = 8192, device_memory: float = 80, **fixed: int) -> MemoryPlan:
    card = find_card(f"meta-llama/Meta-Llama-3.1-{name}")
    setting = Setting(
        card=card, context_length=context_length, devices=devices, rows_per_device=16, device="gpu",
        attention=card.gpu_attention,
    )  # fmt: skip
    return plan(setting, int(device_memory * GIB), fixed)


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
    choice = found.chosen.choice
    assert (choice.microbatch, choice.activation_checkpointing, found.fits) == (microbatch, again, fits)
    assert round(found.chosen.peak / GIB) == gib


def test_what_fits_is_the_best_that_fits() -> None:
    """Layers would be computed twice without need, or rows be trained one by one."""
    for memory in (40, 60, 80, 141, 192):
        found = _plan("8B", 8, device_memory=memory)
        limit = usable(int(memory * GIB), "gpu")
        fitting = [one for one in found.candidates if one.peak <= limit]
        assert found.chosen == (fitting[0] if fitting else min(found.candidates, key=lambda one: one.peak))
        assert found.fits is bool(fitting)
    assert not _plan("8B", 8, device_memory=192).chosen.choice.activation_checkpointing


def test_what_the_caller_has_chosen_is_planned_with() -> None:
    """The comment in the run's file would tell the memory of another run."""
    found = _plan("8B", 8, microbatch=4, activation_checkpointing=True)
    assert [one.choice.microbatch for one in found.candidates] == [4]
    assert found.chosen.peak > _plan("8B", 8, microbatch=2, activation_checkpointing=True).chosen.peak
    kept = _plan("8B", 8, microbatch=2, activation_checkpointing=True, reshard_after_forward=False)
    assert kept.chosen.gathered == 2 * find_card("meta-llama/Meta-Llama-3.1-8B").parameters


def test_on_a_cpu_weights_are_gathered_once_where_there_is_room() -> None:
    """A small model's step would take a tenth longer, or a large one's not fit."""
    card = find_card("meta-llama/Llama-3.2-1B")
    setting = Setting(
        card=card, context_length=1024, devices=1, rows_per_device=1, device="cpu", attention="sdpa"
    )  # fmt: skip
    roomy, tight = plan(setting, 64 * GIB), plan(setting, int(18.6 * GIB))
    assert not roomy.chosen.choice.reshard_after_forward and tight.chosen.choice.reshard_after_forward
    assert roomy.fits and tight.fits and roomy.chosen in roomy.candidates


def test_a_shorter_context_takes_less() -> None:
    """The advice to shorten rows would not help."""
    assert _plan("405B", 128, 4096).chosen.peak < _plan("405B", 128).chosen.peak


def test_the_table_marks_what_is_chosen() -> None:
    """The caller would read numbers without knowing which are his."""
    lines = list(_plan("8B", 8).lines())
    (chosen,) = [line for line in lines if line.startswith("  → ")]
    assert chosen.split()[:2] == ["→", "2"] and chosen.split()[-1] == "recomputed"
    assert "none fits into the 80.0 GiB" in list(_plan("8B", 1).lines())[-1]


def test_the_table_fits_a_terminal() -> None:
    """Its lines would break, and no number stand under its title."""
    largest = _plan("405B", 1, reshard_after_forward=False)
    assert [line for line in [*largest.lines(), *_plan("8B", 8).lines()] if len(line) > 80] == []
    assert len({len(line.rpartition("  ")[0]) for line in list(largest.lines())[1:] if "  " in line.lstrip(" →")}) == 1
    assert "gathers the weights once" in "\n".join(largest.lines())
