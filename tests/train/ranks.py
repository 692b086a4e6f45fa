"""A process that has imported Composer and forks the ranks of training runs from itself: an import takes half a minute.

`python ranks.py` reads one run a line from its input, as JSON: `yaml`, `world`, `folder` (for logs and results) and
`environment`. It answers with the ranks' process ids when they are started, and with their exit codes when they have
ended. Rank 0 leaves in the folder `losses.json`, the loss of each batch, `rates.json` (the learning rate of each
step as it was used and logged, and the tokens trained before it), and `tables.json`; each rank, in
`listening#.json`, the addresses at which it listens. With GREEDY, eval prompts are
answered without chance.

Things that happen to the rank whose environment names it:
- KILL_RANK, KILL_AT = a batch: it kills itself there; KILL_WHEN says whether after the batch (`batch`) or while
  it writes the first checkpoint from that batch on (`saving`).
- ASK_RANK, ASK_AT = a batch: it is asked to end after it; ASK_BY is a signal's name, or `file`;
  with ASK_CHILDREN, its loader's processes get the signal too.
- FULL_RANK, FULL_AT = a batch: the disk is full from that batch on.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killer() -> Any:
    """The callback for KILL_RANK, KILL_AT and KILL_WHEN."""
    from composer import Callback, Logger, State

    from tundish.checkpoints import saving

    class Killer(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if int(state.timestamp.batch) < int(os.environ["KILL_AT"]):
                return
            if os.environ["KILL_WHEN"] == "batch":
                _kill()
            original: Any = saving._write_item

            def write_item(*args: Any, **kwargs: Any) -> Any:
                original(*args, **kwargs)
                args[0].flush()
                _kill()

            saving._write_item = write_item

    return Killer()


def _asker() -> Any:
    """The callback for ASK_RANK, ASK_AT and ASK_BY."""
    from composer import Callback, Logger, State

    from tundish.base.run_folder import RUN_VARIABLE, RunFolder

    class Asker(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            if int(state.timestamp.batch) + 1 != int(os.environ["ASK_AT"]):
                return
            if os.environ["ASK_BY"] == "file":
                request = RunFolder(Path(os.environ[RUN_VARIABLE]).parent).stop_request
                request.parent.mkdir(exist_ok=True)
                request.touch()
            else:
                children = psutil.Process().children() if "ASK_CHILDREN" in os.environ else []
                assert len(children) == (2 if "ASK_CHILDREN" in os.environ else 0)
                for process in [*children, psutil.Process()]:
                    process.send_signal(getattr(signal, os.environ["ASK_BY"]))

    return Asker()


def _filler() -> Any:
    """The callback for FULL_RANK and FULL_AT: the system no longer lets files grow."""
    import resource

    from composer import Callback, Logger, State

    class Filler(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            if int(state.timestamp.batch) >= int(os.environ["FULL_AT"]):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    return Filler()


def _rank(run: dict[str, Any], rank: int, port: int) -> None:
    """Train in this process, as the composer launcher starts it."""
    world = run["world"]
    where = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in (where | run["environment"]).items()})
    # LLM Foundry's ranks wait there for files of other ranks.
    work = Path(run["folder"]) / "work"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    log = os.open(Path(run["folder"]) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    from composer.loggers import InMemoryLogger

    from tundish.train import __main__ as entry

    torch.set_num_threads(1)
    if "GREEDY" in os.environ:
        from tundish.train import eval_prompts

        eval_prompts.GENERATION = {"max_new_tokens": eval_prompts.ANSWER_TOKENS, "do_sample": False}
    built, used, memory = entry.build_trainer, list[float](), InMemoryLogger()

    def build(cfg: Any) -> Any:
        trainer = built(cfg)
        memory.init(trainer.state, trainer.logger)
        trainer.logger.destinations = (*trainer.logger.destinations, memory)
        if os.environ.get("KILL_RANK") == str(rank):
            trainer.state.callbacks.append(_killer())
        if os.environ.get("ASK_RANK") == str(rank):
            trainer.state.callbacks.append(_asker())
        if os.environ.get("FULL_RANK") == str(rank):
            trainer.state.callbacks.append(_filler())
        (optimizer,) = trainer.state.optimizers
        optimizer.register_step_pre_hook(lambda *_: used.append(float(optimizer.param_groups[0]["lr"])))
        return trainer

    entry.build_trainer = build
    sys.argv = ["tundish.train", run["yaml"]]
    entry.main()
    ports = [link.laddr for link in psutil.Process().net_connections("tcp") if link.status == psutil.CONN_LISTEN]
    (Path(run["folder"]) / f"listening{rank}.json").write_text(json.dumps([place.ip for place in ports]))
    if rank == 0:
        losses = {int(time.batch): value for time, value in memory.data.get("loss/train/total", [])}
        (Path(run["folder"]) / "losses.json").write_text(json.dumps(losses))
        logged = [value for _, value in memory.data.get("lr-DecoupledLionW/group0", [])]
        tokens = [int(value) for _, value in memory.data.get("time/token", [])]
        rates = {"used": used, "logged": logged, "tokens": tokens}
        (Path(run["folder"]) / "rates.json").write_text(json.dumps(rates))
        (Path(run["folder"]) / "tables.json").write_text(json.dumps(memory.tables))


def _fork(run: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _rank(run, rank, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(others: set[int]) -> None:
    """As the launcher does: ranks that wait for one that no longer exists get SIGTERM, then SIGKILL."""
    for pid in others:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in others):
        time.sleep(0.05)
    for pid in others:
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Serve runs until the input ends."""
    import tundish.train.__main__
    import tundish.train.eval_prompts  # noqa: F401

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        pids = [_fork(run, rank, run["port"]) for rank in range(run["world"])]
        print(json.dumps(pids), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and len(codes) < len(pids):
                _end(set(pids) - set(codes))
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
