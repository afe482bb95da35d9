"""Bad pipelines and files through the real command line: exit code, message, no traceback, nothing half-written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.faults import Said, files_below, moepipe, truncate
from tests.workers.datasets.wilds_sets import copy_of, replace

HEAD = "apiVersion: moepipe/v1\nname: bad\ntracking: {enabled: false}\n"
GOOD = """
stages:
  source:
    kind: numbers
    config: {count: 2}
  total:
    kind: sum
    inputs: {numbers: "${stages.source}"}
  end:
    kind: gather
    inputs: {numbers: "${stages.total}"}
"""
PREPARE = """
stages:
  data:
    kind: prepare
    config: {dataset: camelyon17}
"""


@dataclass(frozen=True)
class Bad:
    """A pipeline and what must be said about it.

    Attributes:
        id: of the test.
        text: body of the YAML.
        code: exit code.
        words: what the message contains.
        arguments: of ``validate``.
    """

    id: str
    text: str
    code: int
    words: tuple[str, ...]
    arguments: tuple[str, ...] = ()


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


PIPELINES = [
    Bad("unknown key", changed("kind: sum", "knd: sum"), 2, ("bad.yaml:10:5", "knd", "'kind'")),
    Bad("unknown config key", changed("{count: 2}", "{cuont: 2}"), 2, ("bad.yaml:8:14", "cuont", "'count'")),
    Bad("unknown top key", GOOD + "sedes: [1]\n", 2, ("sedes", "'seeds'")),
    Bad("wrong type", changed("{count: 2}", "{count: many}"), 2, ("bad.yaml:8:21", "count", "many")),
    Bad("out of bounds", changed("{count: 2}", "{count: -1}"), 2, ("count", "-1")),
    Bad("unknown kind", changed("kind: sum", "kind: summ"), 2, ("summ", "'sum'")),
    Bad("unknown stage in reference", changed("${stages.source}", "${stages.sauce}"), 2, ("sauce", "'source'")),
    Bad("missing input", changed('    inputs: {numbers: "${stages.source}"}\n', ""), 2, ("numbers", "total")),
    Bad(
        "cycle",
        changed(
            'kind: sum\n    inputs: {numbers: "${stages.source}"}', 'kind: sum\n    inputs: {numbers: "${stages.more}"}'
        )
        + '  more:\n    kind: sum\n    inputs: {numbers: "${stages.total}"}\n',
        2,
        ("total", "more", "cycle"),
    ),
    Bad("broken yaml", "stages: {a: [1, 2\n", 2, ("bad.yaml:",)),
    Bad("duplicate key", GOOD + "seeds: [0]\nseeds: [1]\n", 2, ("seeds", "bad.yaml:")),
    Bad("a list instead of a mapping", "- 1\n- 2\n", 2, ("bad.yaml",)),
    Bad("python tag", GOOD + "description: !!python/object/apply:os.system ['touch pwned']\n", 2, ("python",)),
    Bad("negative seed", GOOD + "seeds: [-1]\n", 2, ("seeds", "-1")),
    Bad("unknown data set", PREPARE.replace("camelyon17", "camelyon71"), 2, ("camelyon71", "'camelyon17'")),
    Bad(
        "unknown data set option",
        PREPARE.replace("{dataset: camelyon17}", "{dataset: poverty, options: {fold: F}}"),
        2,
        ("fold", "'A'"),
    ),
    Bad(
        "unknown profile", GOOD + "profiles: {laptop: {seeds: [1]}}\n", 2, ("labtop", "laptop"), ("--profile", "labtop")
    ),
    Bad("set of an unknown path", GOOD, 2, ("stages.totl", "total"), ("--set", "stages.totl.config.factor=2")),
    Bad("set without a value", GOOD, 2, ("seeds",), ("--set", "seeds")),
    Bad("set of a wrong type", GOOD, 2, ("factor", "fast"), ("--set", "stages.total.config.factor=fast")),
]


def fine(said: Said, code: int, *words: str) -> None:
    """The answer has this code, these words and no traceback."""
    assert said.code == code, said.text
    for word in words:
        assert word in said.words, f"{word!r} is not in:\n{said.text}"
    assert "Traceback" not in said.text and "crash log" not in said.text, said.text


@pytest.mark.parametrize("bad", PIPELINES, ids=lambda bad: bad.id)
def test_pipelines(bad, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(HEAD + bad.text)
    said = moepipe("validate", path, *bad.arguments, store=tmp_path / "store")
    fine(said, bad.code, *bad.words)
    assert files_below(tmp_path) == {"bad.yaml"}


def test_the_good_one_is_good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(HEAD + GOOD)
    fine(moepipe("validate", path, store=tmp_path / "store"), 0, "ok")


def test_all_errors_at_once_and_as_json(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(HEAD + changed("{count: 2}", "{cuont: 2}").replace("kind: gather", "kind: gahter"))
    fine(moepipe("submit", path, store=tmp_path / "store"), 2, "cuont", "gahter", "2 problems")
    said = moepipe("submit", path, "--json", store=tmp_path / "store")
    document = json.loads(said.out)["error"]
    assert said.code == document["exit_code"] == 2 and document["code"] == "spec"
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("submit", "nothing.yaml"), (2, 4), ("nothing.yaml",)),
        (("status", "no-such-run"), (4,), ("no-such-run",)),
        (("resume", "no-such-run"), (4,), ("no-such-run",)),
        (("show", "../../etc/passwd"), (4,), ("passwd",)),
        (("data", "verify", "camelyon71"), (2,), ("camelyon71", "camelyon17")),
        (("data", "verify", "camelyon17"), (4,), ("camelyon17_v1.0", "moepipe data miniature camelyon17")),
        (("data", "import", "camelyon17", "no-such.tar.gz"), (4,), ("no-such.tar.gz",)),
        (("sbumit", "x.yaml"), (2,), ("sbumit",)),
    ],
    ids=["pipeline", "status", "resume", "traversal", "data set", "absent data set", "archive", "command"],
)
def test_names_of_things_that_are_not_there(arguments, code, words, tmp_path):
    said = moepipe(*arguments, store=tmp_path / "store")
    assert said.code in code, said.text
    fine(said, said.code, *words)


def prepare_pipeline(tmp_path: Path) -> Path:
    path = tmp_path / "prepare.yaml"
    path.write_text(HEAD + PREPARE)
    return path


def submit_prepare(tmp_path: Path) -> Said:
    return moepipe(
        *("submit", prepare_pipeline(tmp_path), "--on", "inline", "--data", tmp_path / "data"), store=tmp_path / "store"
    )


def test_a_missing_data_set(tmp_path):
    fine(submit_prepare(tmp_path), 4, str(tmp_path / "data" / "camelyon17_v1.0"), "moepipe data miniature camelyon17")


def test_a_missing_table_and_its_return(tmp_path):
    folder = copy_of("camelyon17", tmp_path / "data")
    content = (folder / "metadata.csv").read_bytes()
    (folder / "metadata.csv").unlink()
    fine(submit_prepare(tmp_path), 4, str(folder / "metadata.csv"), "moepipe data import camelyon17")
    (folder / "metadata.csv").write_bytes(content)
    fine(moepipe("resume", "--on", "inline", store=tmp_path / "store"), 0)
    replace(folder / "metadata.csv", content.replace(b"tumor", b"tumour"))
    fine(submit_prepare(tmp_path), 6, "metadata.csv", "column 'tumor' missing")


def test_a_missing_image(tmp_path):
    folder = copy_of("camelyon17", tmp_path / "data")
    image = next(iter((folder / "patches" / "patient_000_node_0").iterdir()))
    image.unlink()
    fine(submit_prepare(tmp_path), 6, str(image), "missing")


def test_a_corrupt_image(tmp_path):
    folder = copy_of("camelyon17", tmp_path / "data")
    image = folder / "patches" / "patient_000_node_0" / "patch_patient_000_node_0_x_0_y_0.png"
    truncate(image)
    said = moepipe("data", "verify", "camelyon17", "--data", tmp_path / "data", store=tmp_path / "store")
    fine(said, 6, str(image), "cannot be decoded")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no weights", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_weights(content, name, tmp_path):
    from moe.errors import CheckpointError
    from workers.weights import read_state

    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_state(path)
    assert not Path("pwned").exists()


TRAIN = (
    PREPARE
    + """
  model:
    kind: train
    inputs: {data: "${stages.data}"}
    config:
      backbone: {name: tiny_cnn, pretrained: PATH}
      training: {batch_size: 360, steps: 1, lr: 0.001}
"""
)


def submit_training(tmp_path: Path, pretrained: str) -> Said:
    path = tmp_path / "train.yaml"
    path.write_text(HEAD + TRAIN.replace("PATH", pretrained))
    return moepipe("submit", path, "--on", "inline", "--data", tmp_path / "data", store=tmp_path / "store")


def test_training_meets_a_corrupt_image_and_goes_on_when_it_is_repaired(tmp_path):
    folder = copy_of("camelyon17", tmp_path / "data")
    image = folder / "patches" / "patient_000_node_0" / "patch_patient_000_node_0_x_0_y_0.png"
    whole = image.read_bytes()
    truncate(image)
    fine(submit_training(tmp_path, "false"), 6, str(image), "cannot be decoded")
    replace(image, whole)
    fine(submit_training(tmp_path, "false"), 0, "finished")


def test_training_meets_truncated_weights(tmp_path):
    import torch

    copy_of("camelyon17", tmp_path / "data")
    weights = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(64, 64, 3, 3)}, weights)
    truncate(weights)
    fine(submit_training(tmp_path, str(weights)), 6, "weights.pth")
    fine(submit_training(tmp_path, str(tmp_path / "nowhere.pth")), 4, "nowhere.pth")
