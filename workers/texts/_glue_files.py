"""Where the files of GLUE and GLUE-X keep their columns and labels: names as each source distributes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FOLDERS: Mapping[str, str] = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}
"""Folder of each task in the official archives."""

COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "sentence1": ("sentence1", "#1 String", "premise"),
    "sentence2": ("sentence2", "#2 String", "hypothesis"),
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "sentence_A": ("sentence_A", "premise"),
    "sentence_B": ("sentence_B", "hypothesis"),
    "text": ("text", "sentence"),
    "content": ("content", "text"),
}
"""A task's column -> the names under which files hold it, first match wins."""

LABEL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "label": ("label", "gold_label", "Quality", "is_duplicate", "entailment_judgment"),
    "score": ("relatedness_score", "score", "similarity_score", "label"),
}

_THREE = {"entailment": 0, "neutral": 1, "contradiction": 2}
LABEL_NAMES: Mapping[str, Mapping[str, int]] = {
    "mnli": _THREE,
    "qnli": {"entailment": 0, "not_entailment": 1},
    "rte": {"entailment": 0, "not_entailment": 1},
}
"""Task -> label as a word -> class, as ``datasets`` numbers them."""


@dataclass(frozen=True)
class OodFile:
    """How a set out of domain is distributed.

    Attributes:
        stems: names of its official file, without suffix.
        raw_suffix: files with this suffix have no line of names.
        raw_header: their columns.
        raw_labels: their labels -> classes.
        only: column and value of the rows that count.
    """

    stems: tuple[str, ...] = ()
    raw_suffix: str = "none"
    raw_header: tuple[str, ...] = ()
    raw_labels: Mapping[str, int] = field(default_factory=dict)
    only: tuple[str, str] | None = None


OOD_FILES: Mapping[str, OodFile] = {
    "yelp_polarity": OodFile((), ".csv", ("label", "text"), {"1": 0, "2": 1}),
    "amazon_polarity": OodFile((), ".csv", ("label", "title", "content"), {"1": 0, "2": 1}),
    "snli": OodFile(("snli_1.0_test",)),
    "sick": OodFile(("SICK",), only=("SemEval_set", "TEST")),
    "hans": OodFile(("heuristics_evaluation_set",)),
    "scitail": OodFile(("scitail_1.0_test",), ".tsv", ("premise", "hypothesis", "label")),
}


def split_stems(task: str, split: str) -> tuple[str, ...]:
    """File names of a split, without suffix: the archives' first, then those of ``datasets``."""
    if split == "train":
        return ("train",)
    if task == "mnli":
        return ("dev_matched", "validation_matched")
    if task == "mnli_mismatched":
        return ("dev_mismatched", "validation_mismatched")
    return ("dev", "validation")
