"""`make bench-runs`: what run control costs: starting, listing, accepting and supervising runs.

Each figure comes from a fresh process, so that nothing but the disk cache is warm.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.corpus import write_chats
from benchmarks.table import Row, machine, options, promised, show_chosen

FOLDERS = 10_000
DAMAGED = 100
BYTES = 100_000_000
CLOCK = "import os, sys, time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
# The second create() is measured: the first one has imported MLflow and created its database.
CREATE = """
import json, os, sys, time
from mlflow import MlflowClient
from tundish import foundation_model as fm
given = json.loads(sys.argv[1])
small, large = given.pop("small"), given.pop("large")
for path in (small, large):
    start = time.perf_counter()
    run = fm.create(**given, train_data_path=path)
    seconds = time.perf_counter() - start
    fm.cancel(run)
print(seconds)
"""
SUPERVISE = """
import json, os, sys, time
import psutil
from tundish import foundation_model as fm
run = fm.create(**json.loads(sys.argv[1]))
pid = json.loads((run.run_dir / "supervisor.json").read_text())["pid"]
supervisor, trained, peak = psutil.Process(pid), None, 0
while not run.refresh().status.is_terminal():
    try:
        used, peak = sum(supervisor.cpu_times()[:2]), max(peak, supervisor.memory_info().rss)
    except psutil.NoSuchProcess:
        break
    types = [event.type for event in fm.get_events(run)]
    if trained is None and "TRAIN_STARTED" in types:
        trained = time.time(), used
    if "TRAIN_FINISHED" in types:
        break
    time.sleep(1)
print(json.dumps({"seconds": time.time() - trained[0], "used": used - trained[1], "peak": peak}))
fm.cancel(run)
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where, and how often."""

    scratch: Path
    runs: int

    def ask(self, script: str, home: str, *arguments: str) -> Any:
        """The last line that a script prints in a process of its own."""
        environment = {**os.environ, "TUNDISH_HOME": str(self.scratch / home), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=self.scratch)
        return json.loads(done.stdout.splitlines()[-1])

    def seconds(self, statement: str, home: str = "empty") -> float:
        """Median time of a statement."""
        return median(self.ask(CLOCK.format(statement), home) for _ in range(self.runs))


def start(bench: Bench) -> Iterator[Row]:
    """Includes the interpreter's start: that is what people wait for."""
    for what, command in (
        ("import tundish", [sys.executable, "-c", "import tundish"]),
        ("tundish --help", [sys.executable, "-m", "tundish", "--help"]),
    ):
        taken: list[float] = []
        for _ in range(bench.runs):
            begun = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            taken.append(time.perf_counter() - begun)
        yield Row(what, f"{median(taken):.2f} s", target=promised(median(taken) <= 0.3, "≤ 0.3 s"))


def listing(bench: Bench) -> Iterator[Row]:
    """Copies of one run's folder; the newest are damaged, each in one of four ways."""
    _folders(bench.scratch / "many")
    ready = "from tundish import foundation_model as fm; fm.get_models(); start = time.perf_counter(); "
    for what, call, limit in (
        (
            "list() of 10,000 runs: the 100 damaged ones",
            "assert sum(r.damaged_file is not None for r in fm.list()) == 100",
            1.0,
        ),
        ("list(limit=200) of them: 100 damaged, 100 others", "fm.list(limit=200)", 1.0),
        ("list(statuses=['QUEUED']), which reads all of them", "fm.list(statuses=['QUEUED'])", None),
        ("get() of one of them", "fm.get('ift-tiny-000017')", None),
    ):
        taken = bench.seconds(ready + call, "many")
        target = promised(taken <= limit, f"≤ {limit:g} s") if limit else ""
        yield Row(what, f"{taken:.3f} s", target=target)


def accepting(bench: Bench) -> Iterator[Row]:
    """`create()` with 100 MB of chats, every line checked."""
    given = _arguments(bench.scratch, chats=200)
    large = bench.scratch / "large.jsonl"
    lines = (bench.scratch / "chats.jsonl").read_bytes()
    large.write_bytes(lines * (BYTES // len(lines) + 1))
    arguments: dict[str, Any] = {"small": given.pop("train_data_path"), "large": str(large), **given}
    taken = median(bench.ask(CREATE, "create", json.dumps(arguments)) for _ in range(bench.runs))
    size = f"{large.stat().st_size / 1e6:.0f} MB of JSONL"
    measure = f"create() with {size}, importing MLflow left out"
    yield Row(measure, f"{taken:.2f} s", target=promised(taken <= 3, "≤ 3 s"))


def supervising(bench: Bench) -> Iterator[Row]:
    """A whole run: its supervisor's own CPU time while it trains, and its peak memory."""
    given = {**_arguments(bench.scratch, chats=600), "training_duration": "150ba"}
    results = bench.ask(SUPERVISE, "supervise", json.dumps(given))
    share, peak = results["used"] / results["seconds"], results["peak"] / 1e6
    measured = f"{share:.2%} of a core over {results['seconds']:.0f} s"
    yield Row("supervisor while it trains", measured, target=promised(share <= 0.01, "≤ 1 %"))
    yield Row("supervisor's memory", f"{peak:.0f} MB", target=promised(peak <= 100, "≤ 100 MB"))


def _folders(home: Path) -> None:
    from dataclasses import asdict

    from tundish.base import events
    from tundish.base.run_folder import RunFolder
    from tundish.plan.compute import Compute
    from tundish.plan.spec import Duration, RunSpec
    from tundish.tracking.experiment import Tracking

    compute, duration = Compute(device="cpu", devices_per_node=1), Duration(value=1, unit="ep")
    tracking = Tracking(
        tracking_uri="sqlite:///x", experiment_id="1", experiment_name="e", run_id="r", save_folder="/x"
    )
    types = ["CREATED", "STARTED", "DATA_VALIDATED", "MODEL_INITIALIZED", "TRAIN_STARTED", *["TRAIN_UPDATED"] * 100]
    types += ["CHECKPOINT_SAVED", "TRAIN_FINISHED", "COMPLETED"]
    model = RunFolder(home / "model")
    model.folder.mkdir(parents=True)
    for type in types:
        events.append(model.events, type, "A message of about the usual length of events.")
    for number in range(FOLDERS):
        name = f"ift-tiny-{number:06d}"
        paths = RunFolder(home / "runs" / name)
        paths.result("tracking").parent.mkdir(parents=True)
        spec = RunSpec(
            run_name=name, created_by="lab", created_at="2026-11-22T10:00:00+00:00", model="/models/tiny",
            train_data_path="/data/train.jsonl", register_to="main.lab", experiment_path=f"/Users/lab/{name}",
            task_type="INSTRUCTION_FINETUNE", training_duration=duration, learning_rate=5e-7, context_length=64,
            compute=compute,
        )  # fmt: skip
        paths.spec.write_text(spec.to_json())
        paths.result("tracking").write_text(json.dumps(asdict(tracking)))
        shutil.copyfile(model.events, paths.events)
        if number >= FOLDERS - DAMAGED:
            file = (paths.spec, paths.events, paths.result("tracking"), paths.supervisor)[number % 4]
            file.write_text('{"launcher": "lo')
            if file == paths.supervisor:  # read only if the run has not ended
                events.append(paths.events, "REQUEUED", "It continues.")


def _arguments(scratch: Path, chats: int) -> dict[str, Any]:
    from tundish.tiny import make_base_model

    data = write_chats(scratch / "chats.jsonl", chats=chats)
    texts = [message["content"] for line in data.open() for message in json.loads(line)["messages"]]
    shape = {"hidden_size": 64, "max_position_embeddings": 4096}
    model = make_base_model(scratch / f"model{chats}", texts, vocabulary=1_000, **shape)
    compute = {"device": "cpu", "devices_per_node": 1}
    given = {"model": str(model), "train_data_path": str(data), "register_to": "main.lab", "context_length": 4096}
    return {**given, "learning_rate": 1e-4, "training_duration": "2ep", "compute": compute}


MEASURES: Mapping[int, Callable[[Bench], Iterator[Row]]] = {1: start, 2: listing, 3: accepting, 4: supervising}


def main() -> None:
    """Measure and print."""
    given = options(__doc__ or "", MEASURES).parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tundish-bench-"))
    try:
        print(machine(os.cpu_count() or 1, ("tundish", "mlflow", "llm-foundry", "torch")))
        show_chosen(MEASURES, Bench(scratch, given.runs), given)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
