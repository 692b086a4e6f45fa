"""What a run needs before it trains: prepared data, custom weights on this machine, and the YAML, all from its plan.

Where `create()` has prepared the data a moment ago, `adopt` links it and writes the YAML: no process is started, and
nothing is loaded. Anything else takes a process of its own, `stages.prepare_stage`.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml

from tundish.base.files import write_atomic
from tundish.base.progress import Progress, no_progress
from tundish.base.run_folder import RunFolder
from tundish.base.text import counted
from tundish.model.pretrained import state_of
from tundish.plan.foundry import render
from tundish.plan.models import find_card
from tundish.plan.overrides import BATCH_SIZE
from tundish.plan.run_plan import DataFacts, RunPlan
from tundish.plan.spec import RunSpec


def planned(run: RunFolder) -> RunPlan:
    """The plan of a run; one that was created before there were plans gets it now.

    Raises:
        RunDamagedError, RunNotFoundError: a file of the run's folder is damaged or missing.
        SpecError: the model of a run without a plan no longer exists.
    """
    if run.plan.exists():
        return RunPlan.read(run)
    plan = _plan_of_before(run)
    plan.write(run)
    return plan


def batch_size_before(run: RunFolder) -> int | None:
    """Rows in a batch of a folder that was made before; None where nothing has been prepared in it.

    Raises:
        RunDamagedError: the file with the batch size cannot be read.
    """
    if run.plan.exists():
        plan = run.read(run.plan, RunPlan.from_json)
        return plan.batch_size if plan.batch_size_is_final else None
    return int(_read_yaml(run)[BATCH_SIZE]) if run.foundry_yaml.exists() else None


def _read_yaml(run: RunFolder) -> dict[str, Any]:
    """What is trained, as a version of tundish without plans has left it."""

    def parsed(text: bytes) -> dict[str, Any]:
        try:
            content: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict) or type(cast(Any, content).get(BATCH_SIZE)) is not int:
            raise ValueError("is not the YAML of a run")
        return cast(dict[str, Any], content)

    return run.read(run.foundry_yaml, parsed)


def _plan_of_before(run: RunFolder) -> RunPlan:
    """The plan of a run without one, from what its earlier version left: spec, tracking, YAML and prepared data."""
    from tundish.data.manifest import Prepared

    spec, tracking = RunSpec.read(run), run.read_tracking()
    plan = RunPlan.of(
        spec,
        find_card(spec.model),
        tracking_uri=tracking.tracking_uri,
        registry_uri=tracking.registry_uri,
        save_folder=tracking.save_folder,
    )
    if not run.foundry_yaml.exists():
        return plan  # nothing has been prepared yet
    content = _read_yaml(run)
    facts = dict[str, DataFacts]()
    for split in plan.data:
        with suppress(OSError, ValueError, TypeError):  # the prepared data no longer exists: it is prepared once more
            facts[split] = Prepared.read(run.data(split).resolve()).facts
    return plan.with_batches(content[BATCH_SIZE]).completed(facts, load_path=content.get("load_path"))


def adopt(run: RunFolder) -> bool:
    """Whether all that the run needs before it trains was there already, and is in place now."""
    plan = planned(run)
    # Custom weights are copied and checked by the stage; so is a base model that has changed since create().
    ready = plan.is_prepared and plan.spec.custom_weights_path is None
    if not ready or plan.model_state is None or state_of(plan.spec.model) != plan.model_state:
        return False
    try:
        result = finish(run, plan)
        run.write_result("prepare", result)
    except OSError:
        return False  # the stage meets it too, and reports it
    return True


def prepare(plan: RunPlan, progress: Callable[[str], Progress] = lambda split: no_progress) -> RunPlan:
    """The completed plan: data that is not prepared, or no longer, is; custom weights are on this machine, and checked.

    Args:
        plan: of a run.
        progress: for a split, what is called with how much is done, and of how much.

    Raises:
        DataError, SpecError: the data, or an address, is wrong.
        CheckpointError: the custom weights are damaged, or another model's.
        StageError: preparing failed.
    """
    from tundish.data.encoding import Job
    from tundish.data.prepare import prepare_guarded
    from tundish.model.weights import check_weights, fetch_weights

    spec, facts, load_path = plan.spec, dict[str, DataFacts](), None
    for split, part in plan.data.items():
        if part.prepared is None or not Path(part.prepared.folder).is_dir():
            cluster, system_message = spec.data_prep_cluster_id, plan.card.system_message
            prepared = prepare_guarded(
                part.address, Job.of(spec), cluster, progress(split), system_message=system_message
            )
            facts[split] = prepared.facts
    if spec.custom_weights_path is not None:
        weights = fetch_weights(spec.custom_weights_path)
        check_weights(weights, spec.model)
        load_path = str(weights)
    return plan.completed(facts, load_path=load_path)


def weights_warning(plan: RunPlan) -> str:
    """What is doubtful about the custom weights of a completed plan; empty where nothing is."""
    from tundish.checkpoints.manifest import base_model

    if plan.load_path is None:
        return ""
    weights = Path(plan.load_path)
    base = (base_model(weights) if weights.is_dir() else None) or plan.weights_model
    if base is None or base == plan.spec.model:
        return ""
    return (
        f" WARNING: the checkpoint of custom_weights_path was trained from {base}, not from {plan.spec.model}. The "
        "shapes of its weights match; if these are two models, vocabulary and template may not."
    )


def finish(run: RunFolder, plan: RunPlan, note: str = "") -> dict[str, Any]:
    """Keep a completed plan, link its data, write the YAML, and report it; `note` ends the event's message.

    Returns:
        What the stage leaves as its result.
    """
    prepared = {split: part.prepared for split, part in plan.data.items() if part.prepared is not None}
    for split, facts in prepared.items():
        link = run.data(split)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(facts.folder)
    plan.write(run)
    write_atomic(run.foundry_yaml, render(plan, run))
    context_length, train = plan.spec.context_length, prepared["train"]
    text = " ".join(f"{split.capitalize()} data: {facts.summary(context_length)}" for split, facts in prepared.items())
    for split, facts in prepared.items():
        if facts.warned:
            text += f" {facts.warned:,} samples of the {split} data have warnings; `tundish validate` shows them."
    if train.chatml_added:
        text += " The tokenizer has no chat template; ChatML is used, and saved with the export."
    about = "about " if plan.spec.training_duration.unit == "tok" else ""
    text += f" A step takes {counted(plan.batch_size, 'row')}, the run {about}{counted(plan.steps or 0, 'step')}.{note}"
    counts = {"batch_size": plan.batch_size, "steps": plan.steps}
    run.add_event("DATA_VALIDATED", text, rows=train.rows, tokens=train.tokens, **counts)
    return {split: facts.folder for split, facts in prepared.items()} | counts
