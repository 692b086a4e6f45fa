"""The commands that start a run, or show what would be started: create, run, render, resume."""

import argparse
import dataclasses
import shlex

from tundish.base.progress_bar import progress_bar
from tundish.cli.arguments import (
    USAGE,
    add_compute_options,
    add_create_options,
    compute_arguments,
    create_arguments,
    read_experiment,
    replaced,
)
from tundish.cli.output import add_json, add_run, print_json, record
from tundish.cli.parsing import Command, whole
from tundish.errors import Interrupted, SpecError
from tundish.plan.address import local_path
from tundish.plan.spec import RunSpec
from tundish.runs import control, creating, following, planning, reading, selecting
from tundish.runs.records import RunRecord

FIRST_PORT = 29500


def create_options(command: argparse.ArgumentParser) -> None:
    """What `tundish create` takes."""
    add_json(command)
    command.add_argument("--wait", action="store_true", help="show the progress of the run until it ends")
    add_create_options(command)


def create(arguments: argparse.Namespace) -> int:
    """`tundish create`."""
    return _started(creating.create(create_arguments(arguments), progress_bar), arguments.json, wait=arguments.wait)


def run_options(command: argparse.ArgumentParser) -> None:
    """What `tundish run` takes."""
    add_json(command)
    command.add_argument("--detach", action="store_true", help="return as soon as the run has started")
    command.add_argument("file", metavar="FILE", help="YAML file with the arguments of create()")
    command.add_argument(
        "arguments",
        nargs="*",
        default=[],
        metavar="key=value",
        help="arguments that replace those of the file, such as training_duration=1ep, compute.devices_per_node=2 or "
        "overrides.optimizer.lr=1e-5; the options below do the same",
    )
    add_create_options(
        command, optional={field.name for field in dataclasses.fields(RunSpec)}
    )  # the file may have them


def run(arguments: argparse.Namespace) -> int:
    """`tundish run FILE key=value …`."""
    values = read_experiment(arguments.file)
    replaced(values, arguments, arguments.arguments)
    return _started(creating.create(values, progress_bar), arguments.json, wait=not arguments.detach)


def render_options(command: argparse.ArgumentParser) -> None:
    """What `tundish render` takes."""
    command.add_argument(
        "--launch", action="store_true", help="print what would start the run: an sbatch script, or commands"
    )
    command.add_argument(
        "--out", metavar="DIR", help="with --launch: create DIR with the prepared data and a script for each host"
    )
    command.add_argument(
        "--master-addr", metavar="HOST", help="with --launch: address of the first host, as the other hosts reach it"
    )
    command.add_argument(
        "--master-port",
        metavar="PORT",
        type=whole,
        help=f"with --launch: a free port of the first host (default {FIRST_PORT})",
    )
    add_create_options(command, leave_out={"validate_inputs"})


def render(arguments: argparse.Namespace) -> int:
    """`tundish render`."""
    if arguments.launch:
        return _launch(arguments)
    for option in ("out", "master_addr", "master_port"):
        if getattr(arguments, option) is not None:
            raise SpecError(
                f"--{option.replace('_', '-')} has no effect without --launch. Add --launch, or leave it out."
            )
    print(planning.render_only(create_arguments(arguments)), end="")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """Print what would start the run, or write it into a folder."""
    from tundish.runs import scripts

    port = FIRST_PORT if arguments.master_port is None else arguments.master_port
    if not 0 < port < 1 << 16:
        raise SpecError(f"--master-port must be from 1 to 65535, not {port}.")
    values, master = create_arguments(arguments), (arguments.master_addr, port)
    if arguments.out is None:
        print("\n".join(scripts.scripts(values, *master).values()), end="")
        return 0
    for host, script in enumerate(scripts.write(values, *master, local_path(arguments.out, "--out"))):
        print(f"On host {host}:  bash {shlex.quote(str(script))}")
    return 0


def resume_options(command: argparse.ArgumentParser) -> None:
    """What `tundish resume` takes."""
    add_json(command)
    add_run(command)
    command.add_argument("--wait", action="store_true", help="show the progress of the run until it ends")
    command.add_argument("--training-duration", metavar="D", help="train longer than before: 2ep, 200ba, 2_000_000tok")
    add_compute_options(command)


def resume(arguments: argparse.Namespace) -> int:
    """`tundish resume`."""
    compute = compute_arguments(arguments)
    run = control.resume(selecting.named(arguments.run), compute, arguments.training_duration)
    return _started(run, arguments.json, wait=arguments.wait, done="was resumed")


def _started(run: RunRecord, as_json: bool, *, wait: bool, done: str = "was created") -> int:
    if not as_json:
        print(f"Run {run.name} {done}.")
    if wait:
        try:
            run = reading.wait(run.name) if as_json else following.follow(run.name)
        except KeyboardInterrupt:
            raise Interrupted(run.name) from None
    if as_json:
        print_json(record(run))
    elif not wait:
        print(f"Follow it with:  tundish events {run.name} --follow")
    return 1 if run.status.value in ("FAILED", "STOPPED") else 0


COMMANDS = {
    "create": Command(
        options=create_options,
        action=create,
        interrupted="No run was created.",
        usage=USAGE,
        examples=[
            "tundish create --model ./my-model --train-data-path ./train.jsonl --register-to main.lab --wait",
            "tundish create --model meta-llama/Llama-3.1-8B --train-data-path main.lab.chats "
            "--register-to main.lab.dates --training-duration 3ep --devices 8 --set seed=3",
        ],
    ),
    "run": Command(
        options=run_options,
        action=run,
        usage="FILE [key=value ...] [options]",
        interrupted="No run was created.",
        examples=["tundish run chat.yaml", "tundish run chat.yaml training_duration=1ep overrides.seed=3 --detach"],
    ),
    "render": Command(
        options=render_options,
        action=render,
        usage=USAGE,
        examples=[
            "tundish render --model ./my-model --train-data-path ./train.jsonl --register-to main.lab > run.yaml",
            "tundish render --model ./my-model --train-data-path ./train.jsonl --register-to main.lab "
            "--launcher slurm --nodes 2 --devices 4 --launch",
        ],
    ),
    "resume": Command(
        options=resume_options,
        action=resume,
        interrupted="The run is as it was.",
        examples=["tundish resume RUN --wait", "tundish resume RUN --training-duration 2ep"],
    ),
}
