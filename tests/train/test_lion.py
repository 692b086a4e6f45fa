"""train/lion.py: the updates of LLM Foundry's DecoupledLionW, to the bit."""

import copy
import warnings
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """LLM Foundry warns several times while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tundish.train.lion  # noqa: F401


def _parameters() -> list[torch.nn.Parameter]:
    """Several shapes and types; the last never has a gradient."""
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((8, 16), torch.float32), ((5,), torch.float32), ((2, 3, 4), torch.bfloat16), ((7,), torch.float32)
    ]  # fmt: skip
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in shapes]


def _train(optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 10)
            for parameter in group["params"][:-1]:
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                # Zero gradients have no sign: their weights follow the momentum alone.
                parameter.grad = gradient * (gradient > 0)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("chunk_bytes", [256 << 20, 100, 1])
def test_updates_are_those_of_llm_foundry(
    weight_decay: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would not be the run that its recipe describes."""
    from llmfoundry.optim import DecoupledLionW as FoundryLion

    from tundish.train import lion

    monkeypatch.setattr(lion, "CHUNK_BYTES", chunk_bytes)
    mine, theirs = _parameters(), _parameters()
    arguments: dict[str, Any] = {"lr": 1e-2, "betas": (0.99, 0.95), "weight_decay": weight_decay}
    ours, foundry = lion.DecoupledLionW(mine, **arguments), FoundryLion(theirs, **arguments)
    for optimizer in (ours, foundry):
        _train(optimizer, range(6))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
        assert (one in ours.state) == (other in foundry.state)
        if other in foundry.state:
            assert torch.equal(ours.state[one]["exp_avg"], foundry.state[other]["exp_avg"])
    assert not torch.equal(mine[0], _parameters()[0]) and torch.equal(mine[-1], _parameters()[-1])


def test_it_goes_on_from_llm_foundrys_state() -> None:
    """A run that was begun with LLM Foundry's optimizer could not be resumed."""
    from llmfoundry.optim import DecoupledLionW as FoundryLion

    from tundish.train.lion import DecoupledLionW

    theirs = _parameters()
    foundry = FoundryLion(theirs, lr=1e-2, betas=(0.99, 0.95))
    _train(foundry, range(3))
    mine = copy.deepcopy(theirs)
    ours = DecoupledLionW(mine, lr=1e-2, betas=(0.99, 0.95))
    ours.load_state_dict(copy.deepcopy(foundry.state_dict()))
    for optimizer in (ours, foundry):
        _train(optimizer, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
