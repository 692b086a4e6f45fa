"""train/eval_prompts.py: answering eval prompts leaves training as it was, whatever happens."""

import random
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Composer warns several times while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tundish.train.eval_prompts  # noqa: F401


@pytest.fixture
def model() -> Any:
    """A model in training mode with a layer that draws numbers."""
    import torch

    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train()


def _draws() -> tuple[float, ...]:
    """The next number of every generator that training uses."""
    import torch

    return random.random(), float(np.random.random()), float(torch.rand(1))


def _seed(number: int) -> None:
    import torch

    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _disturb(model: Any) -> None:
    import torch

    model(torch.ones(2, 4))
    model.eval()
    for _ in range(7):
        _draws()
    _seed(1)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_as_before(model: Any, training: bool) -> None:
    """A run with eval prompts would train other batches and other dropout than the same run without."""
    from tundish.train.eval_prompts import _undisturbed

    model.train(training)
    _seed(99)
    expected = [_draws(), _draws()]
    _seed(99)
    first = _draws()
    with _undisturbed(model):
        assert not model.training and not model[1].training
        _disturb(model)
    assert [first, _draws()] == expected and expected[0] != expected[1]
    assert model.training is model[1].training is training


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_mode_and_random_state_are_as_before_after_an_error(model: Any, error: type[BaseException]) -> None:
    """A prompt that fails would leave the model in evaluation mode: the rest of the run trains without dropout."""
    from tundish.train.eval_prompts import _undisturbed

    _seed(5)
    expected = _draws()
    _seed(5)
    with pytest.raises(error, match="on purpose"), _undisturbed(model):
        _disturb(model)
        raise error("on purpose")
    assert _draws() == expected
    assert model.training and model[1].training


def test_inside_the_numbers_are_always_the_same(model: Any) -> None:
    """Ranks would sample different tokens of one answer; answers of two checkpoints could not be compared."""
    from tundish.train.eval_prompts import _undisturbed

    seen: list[tuple[float, ...]] = []
    for seed in (1, 2):
        _seed(seed)
        with _undisturbed(model):
            seen.append(_draws())
    assert seen[0] == seen[1]
    _seed(1)
    assert _draws() != seen[0]


@pytest.fixture
def state(tiny_model: Any) -> Any:
    """What the callback reads of Composer's state, with the real tiny model and its tokenizer."""
    from composer.core import Precision
    from composer.devices import DeviceCPU
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return SimpleNamespace(model=model.train(), is_model_ddp=False, device=DeviceCPU(), precision=Precision.FP32)


def test_the_answers_of_a_checkpoint_are_always_the_same(state: Any) -> None:
    """What changed in the model could not be told from chance; the prompt must not come back as the answer."""
    from tundish.train.eval_prompts import generate

    prompts = ["what is two and two?", "the quick brown"]
    _seed(3)
    first = generate(state, prompts, 300)
    after = _draws()
    _seed(4)
    assert generate(state, prompts, 300) == first and len(first) == 2 and all(first)
    assert not any(answer.startswith(prompt) for answer, prompt in zip(first, prompts, strict=True))
    _seed(3)
    assert _draws() == after and state.model.training


def test_the_tokenizer_is_not_changed(state: Any) -> None:
    """Composer's own callback leaves it padding on the left when generation fails."""
    from tundish.train.eval_prompts import generate

    tokenizer = state.model.tokenizer
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length)
    generate(state, ["two?"], 300)
    state.model.generate = None
    with pytest.raises(TypeError):
        generate(state, ["two?"], 300)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length) == before
    assert state.model.training


def test_what_takes_too_long_is_cut_off_and_said(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model's run would answer for hours at every checkpoint, or leave prompts out without a word."""
    from tundish.train import eval_prompts

    prompts = ["what is two and two?", "the quick brown", "three?"]
    whole = eval_prompts.generate(state, prompts, 300)
    forward, clock = state.model.forward, [0.0]

    def slow(*arguments: Any, **named: Any) -> Any:
        clock[0] += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(state.model, "forward", slow)
    # transformers looks at the time of day.
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    cut = eval_prompts.generate(state, prompts, 120)
    assert cut[0] == whole[0] and cut[2] == eval_prompts.NO_ANSWER
    assert 0 < len(cut[1]) < len(whole[1]) and clock[0] <= 122
