"""The report of validation: problems and warnings, and one sample as the model will see it."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tundish.base.files import write_atomic
from tundish.base.progress import Progress
from tundish.base.text import printable
from tundish.base.workers import guarded, limited
from tundish.data.encoding import Job, allowed
from tundish.data.findings import Finding, Outcome
from tundish.data.manifest import Prepared
from tundish.data.prepare import examine
from tundish.data.preview import Segment, marked_html, segments
from tundish.data.source import Source, first_samples
from tundish.data.tokenize import texts_of
from tundish.errors import DataError
from tundish.plan.address import local_path

PLACES_BYTES = 1_500_000
"""Of the places of all findings in a saved report; messages and preview come on top."""
PREVIEW_TOKENS = 400
PREVIEW_CHARACTERS = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Problems and warnings of the training or the evaluation data."""

    argument: str
    """`train_data_path` or `eval_data_path`."""
    source: str
    unit: str
    """`line`, `row` or `file`."""
    total: int
    """Lines, rows or files that were read."""
    samples: int
    problems: list[Finding]
    warnings: list[Finding]
    prepared: Prepared | None
    """None if there are problems."""
    preview: list[Segment]
    """The first valid sample, decoded; only its beginning if it is long."""

    @property
    def messages(self) -> list[str]:
        """The problems, for an error."""
        return [f"{self.argument}: {finding.message}" for finding in self.problems]

    def to_dict(self, most: int) -> dict[str, Any]:
        """The report for JSON, with `most` bytes for the places of each finding."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["problems"] = [finding.to_dict(most) for finding in self.problems]
        content["warnings"] = [finding.to_dict(most) for finding in self.warnings]
        # Its warnings are those above.
        content["prepared"] = None if self.prepared is None else asdict(replace(self.prepared, warnings=[]))
        return content

    def lines(self) -> Iterator[str]:
        """The report as text, without the preview."""
        read = f"{self.total:,} {self.unit}{'s' * (self.total != 1)}"
        good = f"{self.samples:,} sample{'s' * (self.samples != 1)}"
        yield f"{self.argument}: {printable(self.source)}, {read}, {good}"
        for finding in self.problems:
            yield f"  problem: {finding.message}"
        for finding in self.warnings:
            yield f"  warning: {finding.message}"
        if self.prepared is not None:
            yield f"  {self.prepared.facts.summary(self.prepared.context_length)}"


@dataclass(frozen=True, slots=True)
class Validation:
    """What `validate()` returns: printed, it is a report; in a notebook, a page."""

    reports: list[Report]

    @property
    def ok(self) -> bool:
        """Whether a run would accept the data."""
        return not any(report.problems for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """The reports, for JSON; with only as many places of samples as keep the JSON below two megabytes."""
        count = sum(len(report.problems) + len(report.warnings) for report in self.reports)
        most = PLACES_BYTES // max(1, count)
        return {"ok": self.ok, "reports": [report.to_dict(most) for report in self.reports]}

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        content = self.to_dict()
        findings = [item for report in content["reports"] for item in (*report["problems"], *report["warnings"])]
        # Indented like the rest, each place would have a line of its own, a million in a large report.
        places = [json.dumps(finding["where"], ensure_ascii=False) for finding in findings]
        for number, finding in enumerate(findings):
            finding["where"] = f"\0{number}"
        text = json.dumps(content, indent=2, ensure_ascii=False)
        text = re.sub(r'"\\u0000(\d+)"', lambda match: places[int(match[1])], text)
        write_atomic(local_path(path, "path"), text + "\n")

    def __str__(self) -> str:
        parts: list[str] = []
        for report in self.reports:
            parts.extend(report.lines())
            if report.preview:
                parts.append("  the first sample as the model sees it, [[trained tokens]] marked:")
                parts.append("".join(f"[[{text}]]" if trained else text for text, trained in report.preview))
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return "".join(_html(report) for report in self.reports)


def _html(report: Report) -> str:
    head, *rest = report.lines()
    color = "#b00020" if report.problems else "#1b5e20"
    items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in rest)
    sample = f"<p>The first sample as the model sees it; trained tokens are marked.</p>{marked_html(report.preview)}"
    title = f'<b style="color:{color}">{html.escape(head)}</b>'
    return f"<div>{title}<ul>{items}</ul>{sample if report.preview else ''}</div>"


def report_on(argument: str, source: Source, job: Job, cluster: str | None, progress: Progress) -> Report:
    """Prepare a source, and report on it.

    Raises:
        DataError: the data has no samples, or compressed data is damaged.
    """
    if cluster is None:
        outcome = examine(source, job, cluster, progress)
        return report_of(argument, source, outcome, _preview(source, job))
    # In another process, and first: on a cluster, this process loads the tokenizer itself, which may crash it.
    preview = guarded(_preview, source, job, tables=True)
    return report_of(argument, source, examine(source, job, cluster, progress), preview)


def report_of(argument: str, source: Source, outcome: Outcome, preview: list[Segment]) -> Report:
    """The report of an outcome."""
    return Report(
        argument=argument, source=source.place.source, unit=source.place.unit, total=outcome.total,
        samples=outcome.samples, problems=outcome.problems, warnings=outcome.warnings, prepared=outcome.prepared,
        preview=preview,
    )  # fmt: skip


def _preview(source: Source, job: Job) -> list[Segment]:
    """The first sample that the chat template accepts, as runs of trained and untrained text."""
    encoder = job.encoder
    for sample in first_samples(source):
        with limited(f"{source.place.source}: the preview of its first sample", *allowed(texts_of(sample))):
            (encoded,) = encoder.encode([sample[:PREVIEW_CHARACTERS] if isinstance(sample, str) else sample])
        if isinstance(encoded, DataError):
            continue
        tokens, mask = encoded.tokens[:PREVIEW_TOKENS], encoded.loss_mask[:PREVIEW_TOKENS]
        more = [(" …", False)] if len(encoded.tokens) > PREVIEW_TOKENS else []
        return [*segments(tokens, mask, encoder.backend), *more]
    return []
