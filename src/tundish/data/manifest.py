"""The manifest of a prepared folder: what is in it, and what it was made of."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tundish.data.templates import TEMPLATE_DATE
from tundish.plan.run_plan import DataFacts

FORMAT_VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The manifest of a prepared folder."""

    folder: str
    samples: int
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    """Samples cut at context_length."""
    context_length: int
    source_hash: str
    tokenizer_hash: str
    chatml_added: bool
    """Whether the tokenizer had no chat template and got ChatML."""
    units: int
    """Lines, rows or files, blank ones too."""
    refused: int = 0
    """Empty .txt files, which hold no sample; a bad sample is an error."""
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Warnings: rule, text and the numbers of the samples."""
    engine: str = "tokenizers"
    """The library that turned text into ids; both give the same."""
    template_date: str = TEMPLATE_DATE
    format_version: int = FORMAT_VERSION
    versions: dict[str, str]
    """Of the packages that decide the bytes."""

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        """The manifest of a complete prepared folder."""
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        # The folder may have been moved since.
        return cls(**(content | {"folder": str(folder)}))

    @property
    def facts(self) -> DataFacts:
        """What a run's plan keeps of it."""
        return DataFacts(
            folder=self.folder, samples=self.samples, rows=self.rows, tokens=self.tokens, empty=self.refused,
            target_tokens=self.target_tokens, truncated=self.truncated, chatml_added=self.chatml_added,
            warned=sum(len(warning["where"]) for warning in self.warnings), digest=self.source_hash,
        )  # fmt: skip

    @property
    def fill(self) -> float:
        """PartResult of the rows' tokens that are used, 0 … 1."""
        return self.tokens / (self.rows * self.context_length)
