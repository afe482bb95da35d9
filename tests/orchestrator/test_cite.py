"""Citations of a run, and the lineage of its artifacts."""

from __future__ import annotations

import json
import re

import pytest

from moe.registry import Registry
from orchestrator import cite
from orchestrator.bibliography import BY_ARXIV, PAPERS
from orchestrator.compare_read import RunFacts, StageFacts
from tests.orchestrator.cli_support import INLINE, call, document, folder  # noqa: F401
from tests.orchestrator.compare_store import STAGES, Runs


def papers(**stages):
    """Keys of what a run of these stages cites."""
    facts = {name: StageFacts(stage["kind"], stage.get("config", {}), {}, {}) for name, stage in stages.items()}
    return {entry.paper.key: entry.used for entry in cite.citations(RunFacts("r", "p", "dev", "", facts, {}))}


def test_methods_adaptations_backbones_and_data_are_cited():
    found = papers(
        data={"kind": "prepare", "config": {"dataset": "rotated_digits"}},
        erm={"kind": "train", "config": {"backbone": {"name": "torchvision:resnet50"}}},
        distill={"kind": "distill"},
        evaluate={"kind": "evaluate", "config": {"adaptations": {"erm": {"tent": {}, "bn": {}}}}},
    )
    assert {"zhong2022metadmoe", "vapnik1998", "he2016resnet", "wang2021tent", "schneider2020bn"} <= set(found)
    assert {"lecun1998mnist", "zhang2021arm"} <= set(found) and found["wang2021tent"] == ["adaptation tent"]


def test_a_sweep_cites_its_algorithms_and_the_protocol():
    config = {
        "datasets": ["digits5"],
        "algorithms": ["ERM", "Mine", "CORAL"],
        "methods": {"Mine": {"algorithm": "gmoe"}},
        "backbone": {"name": "vit_small_focus"},
    }
    found = papers(sweep={"kind": "sweep", "config": config})
    assert {"gulrajani2021domainbed", "li2023gmoe", "sun2016coral", "vapnik1998", "oquab2024dinov2"} <= set(found)


@pytest.mark.parametrize("name", Registry("moe.algorithms", "algorithm", "moepipe.algorithms").names())
def test_every_algorithm_has_a_known_paper(name):
    found = list(cite._of_module("algorithm", name, "moe.algorithms", "moepipe.algorithms"))
    assert found and all(paper in PAPERS for _, paper in found)


def test_an_unlisted_paper_is_cited_by_its_number(monkeypatch):
    monkeypatch.setattr(cite, "_docstring", lambda registry, name: "New.\n\nPaper: A (arXiv 2511.01234), eq. 1.\n")
    ((what, paper),) = cite._of_module("adaptation", "new", "moe.adaptation", "moepipe.adaptation")
    assert what == "adaptation new" and paper.arxiv == "2511.01234" and paper.year == 2025
    assert "eprint = {2511.01234}" in paper.bibtex()


def test_the_bibliography_is_well_formed():
    assert len({paper.key for paper in PAPERS}) == len(PAPERS) == len({paper.title for paper in PAPERS})
    assert len(BY_ARXIV) == sum(bool(paper.arxiv) for paper in PAPERS)
    for paper in PAPERS:
        text = paper.bibtex()
        assert text.count("{") == text.count("}") and re.match(r"@\w+\{[a-z0-9]+,\n", text)
        assert "others" not in paper.plain() and "{" not in paper.plain()


def test_the_command(store, monkeypatch):
    monkeypatch.setenv("MOEPIPE_STORE", str(store.folder))
    name = Runs(store).run({"erm": (5, 5)}, stages=STAGES)
    text = call("cite").stdout
    assert "@inproceedings{zhong2022metadmoe," in text and "% algorithm meta_dmoe" in text
    assert "- Vladimir N. Vapnik. Statistical Learning Theory." in call("cite", name, "-f", "plain").stdout
    found = document("cite")
    assert found["run"] == name and {"key", "title", "for", "bibtex"} <= set(found["papers"][0])
    call("cite", "-f", "apa", code=2)
    call("cite", "ghost", code=4)


# ---- lineage ----


def test_lineage_goes_back_to_the_data_and_names_settings_and_code(folder):  # noqa: F811
    call("submit", "toy.yaml", *INLINE, "--quiet")
    found = document("show", "latest", "--why")
    assert found["roots"] == ["report"]
    nodes = found["nodes"]
    assert set(nodes["report"]["inputs"]["numbers"]) == {
        f"slow/seed={seed}/item={item}" if f"slow/seed={seed}/item={item}" in nodes else f"slow/seed={seed}"
        for seed in (0, 1)
        for item in (0, 1)
    }
    leaf = nodes["numbers/seed=0/item=0"]
    assert leaf["config"]["count"] == "2" and len(leaf["code"]) == 64 and leaf["files"] >= 1 and leaf["inputs"] == {}
    assert leaf["digest"] == document("show", "latest", "numbers/seed=0/item=0")["members"][0]["artifact"]["digest"]
    text = call("show", "latest", "--why").stdout
    assert (text.startswith("report  ") and "(as above)" in text) or "└─" in text
    assert "count=2" in text and "source files" in text


def test_lineage_of_a_hit_says_so_and_a_change_says_why(folder):  # noqa: F811
    call("submit", "toy.yaml", *INLINE, "--quiet")
    call("submit", "toy.yaml", *INLINE, "--quiet", "--set", "stages.slow.config.steps=5")
    nodes = document("show", "latest", "slow", "--why")["nodes"]
    made = next(node for name, node in nodes.items() if name.startswith("slow"))
    kept = next(node for name, node in nodes.items() if name.startswith("numbers"))
    assert made["state"] == "made" and "steps changed from 4 to 5" in made["reason"] and kept["state"] == "hit"
    text = call("show", "latest", "slow", "--why").stdout
    assert "config.steps changed from 4 to 5" in text and "hit, first made in" in text


def test_lineage_of_what_is_not_there(folder):  # noqa: F811
    call("submit", "toy.yaml", *INLINE, "--quiet")
    error = document("show", "latest", "slo", "--why", code=4)["error"]
    assert "Did you mean 'slow'" in error["hint"]
    for key in folder.glob(".moepipe/keys/*.json"):
        key.unlink()
    assert "settings and code are unknown" in call("show", "latest", "--why").stdout
    assert json.loads(call("show", "latest", "--why", "--json").stdout)["nodes"]["report"]["code"] == ""
