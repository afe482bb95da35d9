"""Generated stand-ins of GLUE's tasks and GLUE-X's sets in the formats of their archives: they prove the code only.

A text's class shows in its words; sets out of domain mix other filler words in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workers.glue import TASKS
from workers.texts._glue_files import FOLDERS

_FILLER = ("the", "a", "this", "that", "of", "in", "on", "with", "for", "near", "under", "over", "red", "blue", "new")
_FOREIGN = ("yonder", "hither", "whilst", "amid", "upon", "thy", "mere", "oft", "ere", "lest")
_CUES = (
    ("poor", "dull", "broken", "sad", "wrong", "bad", "slow", "cold"),
    ("fine", "bright", "whole", "glad", "right", "good", "quick", "warm"),
    ("odd", "torn", "pale", "vague", "faint", "dim", "worn", "bare"),
)
ROWS = {"train": 96, "validation": 32, "ood": 32}


def write(root: Path, seed: int) -> None:
    """All tasks below ``<root>/glue`` and all sets below ``<root>/glue_x``."""
    rng = np.random.default_rng(seed)
    for task, folder in FOLDERS.items():
        for split, stem in (("train", "train"), ("validation", "dev_matched" if task == "mnli" else "dev")):
            _task(root / "glue" / folder / f"{stem}.tsv", task, ROWS[split], rng)
    _task(root / "glue" / "MNLI" / "dev_mismatched.tsv", "mnli", ROWS["ood"], rng, foreign=True)
    (root / "glue" / "MINIATURE").write_text("generated\n")
    _out_of_domain(root / "glue_x", rng)


def _task(path: Path, task: str, rows: int, rng: np.random.Generator, foreign: bool = False) -> None:
    single = len(TASKS[task].columns) == 1
    lines = []
    for number, label in enumerate(_labels(task, rows)):
        a, b = _text(label, rng, foreign), _text(label, rng, foreign)
        lines.append(_line(task, number, label, a, a if single else b))
    header = {
        "sst2": "sentence\tlabel",
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "stsb": "index\tgenre\tsentence1\tsentence2\tscore",
        "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "mnli": "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "qnli": "index\tquestion\tsentence\tlabel",
        "rte": "index\tsentence1\tsentence2\tlabel",
    }
    _write(path, [*([header[task]] if task in header else []), *lines])


def _line(task: str, number: int, label: int, a: str, b: str) -> str:
    two, three = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
    return {
        "cola": lambda: f"gj04\t{label}\t\t{a}",
        "sst2": lambda: f"{a}\t{label}",
        "mrpc": lambda: f"{label}\t{number}\t{number}\t{a}\t{b}",
        "stsb": lambda: f"{number}\tnews\t{a}\t{b}\t{2.5 * label:.3f}",
        "qqp": lambda: f"{number}\t1\t2\t{a}\t{b}\t{label}",
        "mnli": lambda: f"{number}\tfiction\t{a}\t{b}\t{three[label]}\t{three[label]}",
        "qnli": lambda: f"{number}\t{a}\t{b}\t{two[label]}",
        "rte": lambda: f"{number}\t{a}\t{b}\t{two[label]}",
    }[task]()


def _out_of_domain(folder: Path, rng: np.random.Generator) -> None:
    pairs = [(label, _text(label, rng, True), _text(label, rng, True)) for label in _labels("mnli", ROWS["ood"])]
    binary = [(min(label, 1), a, b) for label, a, b in pairs]
    three, judged = ("entailment", "neutral", "contradiction"), ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
    _write(folder / "imdb" / "test.jsonl", [json.dumps({"text": a, "label": y}) for y, a, _ in binary])
    _write(folder / "yelp_polarity" / "test.csv", [f'"{y + 1}","{a}"' for y, a, _ in binary])
    _write(folder / "amazon_polarity" / "test.csv", [f'"{y + 1}","title","{a}"' for y, a, _ in binary])
    _write(folder / "flipkart" / "collected.tsv", ["sentence\tlabel", *(f"{a}\t{y}" for y, a, _ in binary)])
    _write(folder / "cola_ood" / "collected.tsv", ["sentence\tlabel", *(f"{a}\t{y}" for y, a, _ in binary)])
    head = "sentence1\tsentence2\tlabel"
    _write(folder / "twitter" / "collected.tsv", [head, *(f"{a}\t{b}\t{y}" for y, a, b in binary)])
    snli = [{"gold_label": three[y], "sentence1": a, "sentence2": b} for y, a, b in pairs]
    _write(folder / "snli" / "snli_1.0_test.jsonl", [json.dumps(r) for r in [*snli, {**snli[0], "gold_label": "-"}]])
    names = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\tSemEval_set"
    sick = [f"{i}\t{a}\t{b}\t{1 + 2 * y}\t{judged[y]}\tTEST" for i, (y, a, b) in enumerate(pairs)]
    _write(folder / "sick" / "SICK.txt", [names, "0\tx\ty\t3.0\tNEUTRAL\tTRAIN", *sick])
    known = ("entailment", "not_entailment")
    qnli = [{"question": a, "sentence": b, "label": known[y]} for y, a, b in binary]
    _write(folder / "qnli_ood" / "collected.jsonl", [json.dumps(row) for row in qnli])
    words = ("entails", "neutral")
    _write(folder / "scitail" / "scitail_1.0_test.tsv", [f"{a}\t{b}\t{words[y]}" for y, a, b in binary])
    hans = [f"{('entailment', 'non-entailment')[y]}\t{a}\t{b}" for y, a, b in binary]
    _write(folder / "hans" / "heuristics_evaluation_set.txt", ["gold_label\tsentence1\tsentence2", *hans])


def _labels(task: str, rows: int) -> list[int]:
    classes = 3 if task in ("mnli", "stsb") else 2
    return [row % classes for row in range(rows)]


def _text(label: int, rng: np.random.Generator, foreign: bool) -> str:
    words = [*rng.choice(_FILLER, 4), *rng.choice(_CUES[label], 2)]
    if foreign:
        words += [*rng.choice(_FOREIGN, 3), rng.choice(_CUES[(label + 1) % 2])]
    rng.shuffle(words)
    return " ".join(map(str, words))


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
