"""supervise/causes.py: a failed stage says why: the cause in a sentence, what to do, and the end of the log."""

from pathlib import Path

import pytest

import tundish
from tundish import errors
from tundish.errors import FailureCause
from tundish.supervise.causes import KNOWN, QUOTED_CHARACTERS, cause_of, explain, last_error, lost_nodes

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
    why = explain(logs, 1)
    assert why.cause is FailureCause.OUT_OF_MEMORY
    assert why.sentence.startswith("torch.OutOfMemoryError: CUDA out of memory.")
    assert "device_train_microbatch_size" in why.sentence and "Connection closed" not in why.sentence + why.quoted
    title, *quoted = why.quoted.splitlines()
    assert title == "The end of train-rank1.log:" and quoted[-1].strip() == TRACEBACK.splitlines()[-1]
    assert len(quoted) <= 12


LOGS = [
    ("OUT_OF_MEMORY", "device_train_microbatch_size", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "
     "20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 7.88 MiB is free."),
    ("OUT_OF_MEMORY", "more devices", "RuntimeError: CUDA error: out of memory"),
    ("HOST_OUT_OF_MEMORY", "machine ran", "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. "
     "DefaultCPUAllocator: can't allocate memory: you tried to allocate 549755813888 bytes. Error code 12"),
    ("HOST_OUT_OF_MEMORY", "fewer ranks", "OSError: [Errno 12] Cannot allocate memory"),
    ("HOST_OUT_OF_MEMORY", "fewer ranks", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the "
     "step tasks have been OOM Killed."),
    ("GATED_MODEL", "HF_TOKEN", "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-66) "
     "Access to model meta-llama/Llama-3.2-1B is restricted. You must have access to it and be authenticated."),
    ("HUB_UNREACHABLE", "HF_HUB_OFFLINE", "OSError: We couldn't connect to 'https://huggingface.co' to load the files, "
     "and couldn't find them in the cached files."),
    ("HUB_UNREACHABLE", "its folder as model", "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an "
     "appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic has been "
     "disabled."),
    ("DISK_FULL", "Free some space", "OSError: [Errno 28] No space left on device"),
    ("DISK_FULL", "then resume", "OSError: [Errno 122] Disk quota exceeded: '/home/lab/runs'"),
    ("SHARED_MEMORY_FULL", "--shm-size", "RuntimeError: DataLoader worker (pid 4242) is killed by signal: Bus error. "
     "It is possible that dataloader's workers are out of shared memory."),
    ("SHARED_MEMORY_FULL", "/dev/shm", "RuntimeError: unable to write to file </torch_4242_1_0>: on shm"),
    ("TOO_MANY_FILES", "ulimit -n", "OSError: [Errno 24] Too many open files: '/data/shard.00001.mds'"),
    ("PORT_IN_USE", "another port", "torch.distributed.DistNetworkError: The server socket has failed to listen on any "
     "local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in "
     "use"),
    ("DRIVER_TOO_OLD", "tundish doctor", "RuntimeError: The NVIDIA driver on your system is too old (found version "
     "11040). Please update your GPU driver."),
    ("DRIVER_TOO_OLD", "both versions", "RuntimeError: CUDA error: no kernel image is available for execution on the "
     "device"),
    ("MLFLOW_UNREACHABLE", "tundish doctor", "mlflow.exceptions.MlflowException: API request to "
     "http://127.0.0.1:5000/api/2.0/mlflow/runs/get failed with exception HTTPConnectionPool: Max retries exceeded"),
    ("RANKS_DISCONNECTED", "dist_timeout", "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc"
     ":81] Timed out waiting 60000ms for send operation to complete"),
    ("RANKS_DISCONNECTED", "NCCL_SOCKET_IFNAME", "torch.distributed.DistBackendError: NCCL error: Watchdog caught "
     "collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 milliseconds"),
    ("RANKS_DISCONNECTED", "exited, its own log", "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:"
     "534] Connection closed by peer [127.0.0.1]:39282"),
    ("BAD_CHECKPOINT", "", "tundish.errors.CheckpointError: ep0-ba4: __0_0.distcp is missing."),
    ("BAD_DATA", "", "tundish.errors.DataError: train.jsonl, line 7: is not JSON."),
    ("UNKNOWN", "", "KeyError: 'x'"),
]  # fmt: skip
"""Cause, a part of the advice, and a line as it stands in a log."""


@pytest.mark.parametrize(("cause", "advice", "line"), LOGS)
def test_a_log_shows_its_cause_and_comes_with_what_to_do(cause: str, advice: str, line: str) -> None:
    """Each of them has cost people hours of searching the web for the words of a library."""
    why = explain({"train.log": f"epoch 1\n{line}\n"}, 1)
    assert why.cause is FailureCause(cause)
    assert advice in why.sentence and line in why.quoted
    assert "slurmstepd" in line or why.sentence.startswith(line)


def test_every_cause_that_a_log_can_show_is_shown_by_one() -> None:
    """A sign that matches nothing real would never be noticed."""
    assert set(KNOWN) <= {FailureCause(cause) for cause, _, _ in LOGS}


def test_every_cause_is_one_that_something_fails_with() -> None:
    """A program that waits for a cause would wait for ever."""
    sources = [file.read_text() for file in Path(tundish.__file__).parent.rglob("*.py") if file.name != "errors.py"]
    by_class = {kind.failure for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "failure")}
    by_name = {cause for cause in FailureCause if any(f"FailureCause.{cause.name}" in text for text in sources)}
    assert by_class | by_name == set(FailureCause)


def _raised(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.DataError("train.jsonl, line 3: is not JSON."), "BAD_DATA"),
        (errors.DataError("train.jsonl, line 3: found '401 Client Error'."), "BAD_DATA"),
        (errors.SpecError("model: /models/tiny: model.safetensors is cut off."), "BAD_MODEL"),
        (errors.SpecError("train_data_path: there is no such file."), "BAD_INPUT"),
        (errors.SpecError("model: cannot be loaded (couldn't connect to 'https://huggingface.co')"), "HUB_UNREACHABLE"),
        (errors.CheckpointError("ep0-ba4: is incomplete."), "BAD_CHECKPOINT"),
        (errors.CheckpointError("weights differ.", failure=FailureCause.MODEL_MISMATCH), "MODEL_MISMATCH"),
        (errors.StoreError("http://x: 401 Client Error", "Log in."), "MLFLOW_UNREACHABLE"),
        (errors.StageError("the loss is nan", failure=FailureCause.DIVERGED), "DIVERGED"),
        (_raised(errors.StageError("preparing failed"), OSError(28, "No space left on device")), "DISK_FULL"),
        (OSError(28, "No space left on device"), "DISK_FULL"),
        (RuntimeError("boom"), "UNKNOWN"),
    ],
)  # fmt: skip
def test_an_error_has_a_cause(error: Exception, cause: str) -> None:
    """What a stage refuses in its own words would be UNKNOWN to programs, or be judged by a word that it quotes."""
    assert cause_of(error) is FailureCause(cause)


def test_other_causes_come_without_advice() -> None:
    """Advice that has nothing to do with the cause sends people the wrong way."""
    why = explain({"train.log": "KeyError: 'x'\n"}, 1)
    assert (why.sentence, why.quoted) == ("KeyError: 'x'.", "The end of train.log:\n    KeyError: 'x'")


@pytest.mark.parametrize(
    ("returncode", "cause", "words"),
    [
        (
            -9,
            "KILLED",
            "was killed by SIGKILL, often the out-of-memory killer (check dmesg), and its log shows no error.",
        ),
        (247, "KILLED", "was killed by SIGKILL, often the out-of-memory killer"),
        (137, "KILLED", "was killed by SIGKILL, often the out-of-memory killer"),
        (-15, "KILLED", "was killed by SIGTERM, and its log"),
        (-11, "CRASHED", "was killed by SIGSEGV, and its log"),
        (-64, "CRASHED", "was killed by SIGRTMAX, and its log"),
        (3, "UNKNOWN", "exited with code 3, and its log shows no error."),
        (255, "UNKNOWN", "exited with code 255, and"),
    ],
)
def test_a_process_that_leaves_no_error_is_explained_by_how_it_ended(returncode: int, cause: str, words: str) -> None:
    """A kernel that is out of memory leaves no line in any log, and a launcher's exit code means nothing to people."""
    why = explain({"train.log": "epoch 1\n"}, returncode)
    assert why.cause is FailureCause(cause) and why.sentence.startswith(f"its process {words}")
    assert explain({}, returncode).quoted == ""


def test_a_lost_node_is_named() -> None:
    """A time-out of some collective says nothing of which of 32 machines to look at."""
    log = (
        "ERROR: node 1 (h1) has not been heard from for 22 s.\nERROR: node 1 (h1) is heard from again.\n"
        "ERROR: node 2 (h2) has not been heard from for 21 s.\nRuntimeError: Timed out waiting 60000ms for send\n"
    )
    assert lost_nodes(log) == ["node 2 (h2) has not been heard from for 21 s."]
    why = explain({"train.log": log}, 1)
    assert why.cause is FailureCause.NODE_LOST
    assert " Node 2 (h2) has not been heard from for 21 s. The ranks lost their connection." in why.sentence


def test_secrets_are_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are shown in notebooks and kept for ever; a line that is cut would show half of one."""
    monkeypatch.setenv("WANDB_KEY", "abcdefgh1234" * 10)
    secret = f"ValueError: {'x' * (QUOTED_CHARACTERS - 50)} {'abcdefgh1234' * 10} at mysql://lab:pa/ss@db:5432/x"
    why = explain({"train.log": secret}, 1)
    assert not any(part in text for text in (why.sentence, why.quoted) for part in ("abcdefgh", "pa/ss"))
