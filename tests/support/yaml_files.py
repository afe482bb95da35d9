"""Small pipelines of toy stages, written to a folder for tests of loading, graph and schema."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import tests.support.toy_stages  # noqa: F401 - registers the kinds

HEADER = "apiVersion: moepipe/v1\nname: toy\n"
TOY = """
seeds: [0, 1]
params: {n: 3}
stages:
  source:
    kind: numbers
    config: {count: "${params.n}", value: 7}
  squares:
    kind: square
    inputs: {number: "${stages.source}"}
    config: {count: "${params.n}"}
  total:
    kind: sum
    inputs:
      numbers: ["${stages.source}", "${stages.squares}"]
  end:
    kind: gather
    inputs: {numbers: "${stages.total}"}
profiles:
  big:
    params: {n: 5}
  small:
    seeds: [4]
    scale: smoke
    stages:
      total:
        resources: {cpus: 0.5}
"""


def write(folder: Path, text: str = TOY, name: str = "toy.yaml", header: str = HEADER) -> Path:
    """Write a pipeline (indented text is fine) and return its path."""
    path = folder / name
    path.write_text(header + dedent(text))
    return path
