"""memory.py against what training takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.train.conftest import free_port

from tundish.plan.memory import Choice, Setting, step_memory
from tundish.plan.models import ModelCard

pytestmark = pytest.mark.slow

SIZES = [
    (256, 4, 704, 4, 2, 2000, 512, 8, False, True),
    (512, 8, 1408, 8, 4, 8000, 512, 4, False, False),
    (512, 8, 1408, 8, 4, 8000, 512, 4, False, True),
    (512, 8, 1408, 8, 4, 8000, 1024, 2, True, True),
]


def _card(size: tuple[int, ...]) -> ModelCard:
    hidden, layers, feed_forward, heads, key_values, vocabulary = size[:6]
    return ModelCard(
        name="x", display_name="x", max_context_length=size[6], family="llama", gated=False, system_message=True,
        gpu_attention="sdpa", learning_rate=1e-4, layers=layers, hidden_size=hidden, heads=heads,
        key_value_heads=key_values, feed_forward_size=feed_forward, vocabulary_size=vocabulary,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> list[int]:
    """Peak bytes of each size. What is freed goes back to the system at once, or the peak would be the allocator's."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "peak.py"), str(free_port())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [*command, json.dumps(SIZES)], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_step_takes_what_is_planned(measured: list[int], number: int) -> None:
    """A run would end out of memory after its data is prepared, or leave half of a device unused."""
    size = SIZES[number]
    setting = Setting(
        card=_card(size), context_length=size[6], devices=1, rows_per_device=size[7], device="cpu", attention="sdpa"
    )
    choice = Choice(microbatch=size[7], activation_checkpointing=size[8], reshard_after_forward=size[9])
    planned = step_memory(setting, choice).peak
    assert abs(planned / measured[number] - 1) < 0.15, (planned, measured[number])
