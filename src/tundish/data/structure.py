"""Checks data without a tokenizer: whether its lines or rows are samples."""

from tundish.base.workers import Workers, no_collection
from tundish.data.encoding import EncodedChunk
from tundish.data.findings import Outcome
from tundish.data.samples import Problem, Rules
from tundish.data.shards import PartResult
from tundish.data.source import EMPTY, NO_SAMPLE, Chunk, Source
from tundish.errors import DataError


def check_structure(source: Source) -> Outcome:
    """Check a source without a tokenizer: whether its lines or rows are samples.

    Raises:
        DataError: compressed data is damaged.
    """
    result = PartResult()
    with Workers() as workers:
        for checked in workers.map(_structure, ((chunk, source.rules) for chunk in source.chunks())):
            result.add(checked)
    if not result.samples and not result.problems:
        raise DataError(NO_SAMPLE.format(source.place.source))
    problems = result.problems.findings(source.place, result.units)
    return Outcome(prepared=None, total=result.units, samples=result.samples, problems=problems, warnings=[])


def _structure(chunk: Chunk, rules: Rules) -> EncodedChunk:
    checked = EncodedChunk(chunk.size, chunk.units)
    with no_collection():
        for number, sample in chunk.samples(rules):
            if isinstance(sample, Problem):
                checked.problems.add(number, sample)
            else:
                checked.samples += sample != EMPTY
    return checked
