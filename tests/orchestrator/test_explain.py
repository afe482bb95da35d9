import json
import subprocess
import sys
from enum import Enum
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from moe.errors import SpecError
from moe.registry import Registry
from orchestrator import explain as explain_module
from orchestrator.explain import explain, paths
from orchestrator.field_docs import model_fields, type_words, yaml_words
from tests.support.toy_stages import KINDS  # noqa: F401 - registers the kinds

PRESETS = {"camelyon17": {"rate": 1e-4}, "fmow": {"rate": 3e-4, "count": 4}}


class Inner(BaseModel):
    """The inside."""

    depth: int = Field(1, ge=1, le=9, description="How deep.")


class Settings(BaseModel):
    """Some settings."""

    rate: float = Field(1e-3, gt=0, description="Step size.")
    count: int = Field(description="How many.")
    mode: Literal["fast", "slow"] = Field("fast", description="How.")
    inner: Inner = Field(default_factory=Inner, description="More.")
    names: list[str] | None = Field(None, description="Names.")


def test_fields_tell_type_bounds_default_and_presets():
    docs = {item.name: item for item in model_fields(Settings)}
    assert str(docs["rate"]).splitlines() == [
        "rate: number, > 0, default 0.001",
        "    Step size.",
        "    presets: camelyon17 0.0001, fmow 0.0003",
    ]
    assert (docs["count"].type, docs["count"].default, docs["count"].presets) == ("integer", "required", {"fmow": 4})
    assert docs["mode"].type == "fast | slow" and docs["names"].type == "list of text or null"
    assert (docs["inner"].type, docs["inner"].default) == ("map", "default {}")


def test_stage_shows_ports_and_config():
    text = str(explain("stages.sum"))
    assert "inputs.numbers: one or more artifacts of kind number, required" in text
    assert "config.factor: integer, >= -1000, <= 1000, default 1\n    The sum is multiplied by this." in text
    assert "Makes an artifact of kind 'number', once for every seed." in text
    assert "once over all seeds" in str(explain("stages.gather"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "apiVersion"),
        ("pipeline", "profiles"),
        ("stages", "min_success"),
        ("stages.numbers.config", "fail_times"),
        ("stages.numbers.config.count", "count: integer, >= 0, default 1"),
        ("stages.sum.inputs", "extra: one artifact of kind number, optional"),
        ("stages.sum.inputs.extra", "One more number."),
        ("stages.sum.resources.gpus", "gpus: number, >= 0, default 0"),
        ("stages.sum.timeout_s", "Seconds after which a member is stopped"),
        ("resources", "custom: map of number"),
        ("retry.preemption", "preemption: integer, >= -1, default -1"),
        ("tracking.uri", "uri: text or null"),
        ("seeds", "seeds: list of integer"),
        ("extends", "relative to this one"),
        ("scale", "smoke | dev | paper"),
        ("datasets.poverty", "fold: A | B | C | D | E"),
        ("datasets.poverty.fold", "Official fold"),
        ("datasets", "camelyon17"),
        ("dataset_options", "Choices of the dataset"),
    ],
)
def test_paths(path, expected):
    answer = explain(path)
    assert expected in str(answer)
    assert json.loads(json.dumps(answer.to_json()))["path"] == answer.path


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("stags", "'stages'"),
        ("stages.smu", "'sum'"),
        ("stages.sum.config.fctor", "'factor'"),
        ("stages.sum.confg", "'config'"),
        ("stages.sum.inputs.xtra", "'extra'"),
        ("resources.cpu", "'cpus'"),
        ("datasets.camelyon", "'camelyon17'"),
        ("seeds.x", ""),
        ("resources.cpus.x", ""),
    ],
)
def test_wrong_paths_suggest(path, suggestion):
    with pytest.raises(SpecError, match="nothing to explain") as caught:
        explain(path)
    assert suggestion in caught.value.hint


def test_nested_models_are_walked(monkeypatch, tmp_path):
    module = tmp_path / "explained.py"
    module.write_text(
        '"""An algorithm."""\nfrom tests.orchestrator.test_explain import PRESETS, Settings\n'
        "class Method:\n    Config = Settings\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("moe.algorithms", noun="algorithm", entry_point="nothing.here")
    registry.add("mine", "explained")
    monkeypatch.setitem(explain_module._CATALOGUES, "algorithms", registry)
    text = str(explain("algorithms.mine"))
    assert "An algorithm." in text and "presets: camelyon17 0.0001" in text
    assert "depth: integer, >= 1, <= 9, default 1" in str(explain("algorithms.mine.inner"))
    assert "How deep." in str(explain("algorithms.mine.inner.depth"))


def test_every_known_path_explains_itself():
    for path in paths():
        assert str(explain(path)).strip()


def test_types_and_values_in_words_of_yaml():
    assert type_words(dict[str, list[int]]) == "map of list of integer"
    assert type_words(tuple[float, ...]) == "list of number"
    assert type_words(Enum) == "Enum"
    assert yaml_words({"a": [True, None, "x y", "ab", 1.5]}) == '{a: [true, null, "x y", ab, 1.5]}'
    assert yaml_words("") == '""' and yaml_words("null") == '"null"' and yaml_words('a"b') == '"a\\"b"'


def test_listing_paths_imports_no_stage():
    code = (
        "import sys; from orchestrator.explain import paths; paths(); print('numpy' in sys.modules, len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
