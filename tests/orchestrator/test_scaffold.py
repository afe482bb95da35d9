import pytest

from moe.errors import SpecError
from orchestrator.loading import load
from orchestrator.scaffold import Recipe, Step, methods, render, scaffold
from tests.support.toy_stages import KINDS  # noqa: F401 - registers the kinds
from workers.datasets.base import DATASETS

TOY = Recipe(
    'Adds "numbers".',
    (
        Step("source", "numbers", config={"count": 2}, comment="Where it begins."),
        Step("gang", "gang"),
        Step("total", "sum", {"numbers": ("source", "gang"), "extra": ("gang",)}),
        Step("end", "gather", {"numbers": ("total",)}),
    ),
)


def test_the_text_is_a_valid_pipeline(tmp_path):
    path = tmp_path / "made.yaml"
    path.write_text(render("toy", TOY, "poverty"))
    loaded = load(path)
    assert loaded.spec.dataset == "poverty" and loaded.spec.name == "toy-poverty"
    assert loaded.spec.stages["source"].config == {"count": 2}
    assert loaded.warnings == () and loaded.profiles == ("cluster", "laptop")
    for profile in loaded.profiles:
        load(path, profile)


def test_every_field_is_explained_with_its_default(tmp_path):
    text = render("toy", TOY, "poverty")
    lines = [line.strip() for line in text.splitlines()]
    assert "# Members of the fan-out (integer, >= 0)." in lines and "count: 2" in lines
    assert "# Seconds to wait before writing (number, >= 0)." in lines and "# sleep_s: 0.0" in lines
    assert lines.index("# Where it begins.") == lines.index("source:") + 1
    assert "# dataset_options:" in lines and "#   fold: A" in lines
    assert 'numbers: ["${stages.source}", "${stages.gang}"]' in lines


def test_every_default_can_be_switched_on(tmp_path):
    """Removing the comment signs of all defaults gives the same configs again."""
    text = render("toy", TOY, "poverty")
    lines = []
    for line in text.splitlines():
        body = line.lstrip()
        plain = body.removeprefix("# ")
        name = plain.strip().split(":")[0]
        is_default = body.startswith("# ") and ":" in plain and " " not in name and name.isidentifier()
        lines.append(line.replace("# ", "", 1) if is_default and "$schema" not in line else line)
    path = tmp_path / "made.yaml"
    path.write_text("\n".join(lines))
    spec = load(path).spec
    assert spec.dataset_options["fold"] == "A"
    assert spec.stages["source"].config["sleep_s"] == 0.0 and len(spec.stages["source"].config) == 8
    plain = tmp_path / "plain.yaml"
    plain.write_text(text)
    before = load(plain).graph
    after = load(path, overrides=["stages.gang.resources.workers=1"]).graph
    assert {name: node.config for name, node in before.nodes.items()} == {n.id: n.config for n in after.nodes.values()}


def test_a_recipe_cannot_name_a_field_that_is_not_there():
    wrong = Recipe("x", (Step("source", "numbers", config={"cont": 2}),))
    with pytest.raises(SpecError, match="Did you mean 'count'"):
        render("toy", wrong, "poverty")


def test_unknown_names_suggest():
    with pytest.raises(SpecError, match="Did you mean 'meta_dmoe'"):
        scaffold("meta_dme", "camelyon17")
    with pytest.raises(SpecError, match="Did you mean 'camelyon17'"):
        scaffold("erm", "camelyon")


@pytest.mark.parametrize("dataset", DATASETS.names())
@pytest.mark.parametrize("method", methods())
def test_every_method_on_every_dataset_is_valid(tmp_path, method, dataset):
    path = tmp_path / "made.yaml"
    path.write_text(scaffold(method, dataset))
    loaded = load(path)
    assert loaded.spec.dataset == dataset and loaded.warnings == ()
    for profile in loaded.profiles:
        load(path, profile)
