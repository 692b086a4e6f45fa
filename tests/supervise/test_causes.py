"""supervise/causes.py: a failed stage says why: the cause in a sentence, what to do, and the end of the log."""

import pytest

from tundish.supervise.causes import QUOTED_CHARACTERS, explain, last_error, lost_nodes

TRACEBACK = """\
Traceback (most recent call last):
  File "/x/train.py", line 3, in <module>
    raise ValueError("first")
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/train.py", line 5, in <module>
    main()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""
LAUNCHER = """\
ERROR:composer.cli.launcher:Rank 0 crashed with exit code 1.
Waiting up to 30 seconds for all training processes to terminate. Press Ctrl-C to exit immediately.
Global rank 0 (PID 4242) exited with code 1
Error occurred. Press Ctrl-C to exit.
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        (TRACEBACK + LAUNCHER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("[rank1]: Traceback (most recent call last):\n[rank1]: RuntimeError: boom\n", "RuntimeError: boom"),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("tundish.errors.DataError: train.jsonl is gone\r\n", "tundish.errors.DataError: train.jsonl is gone"),
        ("[rank0]: Exception: no such layer\n[rank0]: There are: a, b\n", "Exception: no such layer"),
        ("a.b_c.MyException: x\nINFO: closing\n", "a.b_c.MyException: x"),
    ],
)
def test_the_last_exception_of_a_log_is_the_cause(text: str, found: str) -> None:
    """The user would read the launcher's words, or the first of several errors, instead of the cause."""
    assert last_error(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        LAUNCHER,
        "INFO: 0 Errors\nan Error: in a sentence\n  ValueError: quoted and indented\nExitStack closed\n",
        "Exception in thread 1\n",
    ],
)
def test_a_log_without_an_exception_has_no_cause(text: str) -> None:
    """Any line with the word error in it would be called the cause."""
    assert last_error(text) is None


def test_the_log_of_the_rank_that_crashed_first_is_quoted() -> None:
    """The other ranks' complaints that they lost it would be taken for the cause."""
    lost = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:39282\n"
    logs = {
        "train.log": lost + "ERROR:composer.cli.launcher:Rank 1 crashed with exit code 1.\n",
        "train-rank1.log": "loading\n" + TRACEBACK,
    }
    text = explain(logs, 1)
    assert text.startswith("torch.OutOfMemoryError: CUDA out of memory.")
    assert "device_train_microbatch_size" in text and "Connection closed" not in text
    cause, newline, quoted = text.partition("\nThe end of train-rank1.log:\n")
    assert newline and quoted.splitlines()[-1].strip() == TRACEBACK.splitlines()[-1] and "\n" not in cause
    assert len(quoted.splitlines()) <= 12


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "device_train_microbatch_size"),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you",
            "machine ran",
        ),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error. Access to model x is restricted.", "HF_TOKEN"),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "HF_HUB_OFFLINE"),
        ("OSError: [Errno 28] No space left on device", "Make room"),
        ("OSError: [Errno 24] Too many open files: '/x'", "ulimit -n"),
        ("RuntimeError: DataLoader worker is killed by signal: Bus error. insufficient shared memory", "--shm-size"),
        ("torch.distributed.DistNetworkError: port: 29500, EADDRINUSE", "another port"),
        ("RuntimeError: [gloo/unbound_buffer.cc:81] Timed out waiting 60000ms for send operation", "dist_timeout"),
        ("torch.distributed.DistBackendError: Watchdog caught collective operation timeout", "NCCL_SOCKET_IFNAME"),
    ],
)
def test_common_causes_come_with_what_to_do(line: str, advice: str) -> None:
    """Each of them has cost people hours of searching the web for the words of a library."""
    text = explain({"train.log": f"epoch 1\n{line}\n"}, 1)
    assert text.startswith(line) and advice in text.partition("\n")[0]


def test_other_causes_come_without_advice() -> None:
    """Advice that has nothing to do with the cause sends people the wrong way."""
    text = explain({"train.log": "KeyError: 'x'\n"}, 1)
    assert text == "KeyError: 'x'.\nThe end of train.log:\n    KeyError: 'x'"


def test_a_death_without_a_word_is_told_by_its_signal() -> None:
    """An empty cause: the kernel that runs out of memory leaves no line in any log."""
    assert explain({}, -9).startswith("its process was killed by signal 9 (by somebody, or by the kernel for want")
    assert explain({"train.log": "x\n"}, 3).startswith("its process ended with exit code 3 and left no error")


def test_a_lost_node_is_named() -> None:
    """A time-out of some collective says nothing of which of 32 machines to look at."""
    log = (
        "ERROR: node 1 (h1) has not been heard from for 22 s.\nERROR: node 1 (h1) is heard from again.\n"
        "ERROR: node 2 (h2) has not been heard from for 21 s.\nRuntimeError: Timed out waiting 60000ms for send\n"
    )
    assert lost_nodes(log) == ["node 2 (h2) has not been heard from for 21 s."]
    assert " Node 2 (h2) has not been heard from for 21 s. The ranks lost each other." in explain({"train.log": log}, 1)


def test_secrets_are_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are shown in notebooks and kept for ever; a line that is cut would show half of one."""
    monkeypatch.setenv("WANDB_KEY", "abcdefgh1234" * 10)
    secret = f"ValueError: {'x' * (QUOTED_CHARACTERS - 50)} {'abcdefgh1234' * 10} at mysql://lab:pa/ss@db:5432/x"
    assert "abcdefgh" not in explain({"train.log": secret}, 1) and "pa/ss" not in explain({"train.log": secret}, 1)


def test_a_killed_rank_is_told_as_a_killed_process() -> None:
    """The launcher's exit code says nothing to anybody; want of memory is the most common cause."""
    assert "was killed by signal 9 (by somebody, or by the kernel for want of memory" in explain({}, 247)
    assert "ended with exit code 255" in explain({}, 255)
