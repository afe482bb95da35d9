"""Loading: merging, overrides, references, and every kind of bad file, each with its place."""

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from textwrap import dedent

import pytest
from ruamel.yaml.error import YAMLWarning

from moe.errors import NotFoundError
from orchestrator.loading import load, load_pipeline
from orchestrator.positions import SpecErrors
from tests.support.yaml_files import HEADER, TOY, write


def problems(path, **kwargs):
    with pytest.raises(SpecErrors) as caught:
        load(path, **kwargs)
    assert caught.value.exit_code == 2
    return caught.value.problems


def messages(path, **kwargs):
    return {str(problem) for problem in problems(path, **kwargs)}


def find(found, path):
    (problem,) = [p for p in found if p.path == path]
    return problem


def source(tmp_path, config="", top="", name="p.yaml"):
    body = f"{dedent(top)}stages:\n  source:\n    kind: numbers\n    config: {{{config}}}\n"
    return write(tmp_path, body, name)


# ---- merging -----------------------------------------------------------------------------------------------


def test_profile_merges_maps_and_replaces_lists(tmp_path):
    path = write(tmp_path)
    plain, big, small = load_pipeline(path), load_pipeline(path, "big"), load_pipeline(path, "small")
    assert (plain.stages["source"].config["count"], big.stages["source"].config["count"]) == (3, 5)
    assert small.seeds == [4] and small.scale == "smoke" and small.params == {"n": 3}
    assert small.stages["total"].resources.cpus == 0.5
    assert small.stages["total"].inputs == plain.stages["total"].inputs
    assert load(path).profiles == ("big", "small")


def test_unknown_profile_suggests(tmp_path):
    assert messages(write(tmp_path), profile="smal") == {
        "--profile: there is no profile 'smal'. Did you mean 'small'? Allowed: big, small."
    }


def test_a_profile_for_a_stage_that_is_not_there(tmp_path):
    path = write(tmp_path, TOY + "  far:\n    stages:\n      totl:\n        resources: {cpus: 2}\n")
    (problem,) = problems(path, profile="far")
    assert problem.path == "profiles.far.stages.totl" and "Did you mean 'total'?" in problem.hint
    assert problem.place.line == path.read_text().splitlines().index("      totl:") + 1


def test_extends_merges_in_order_and_keeps_the_files_apart_in_messages(tmp_path):
    write(tmp_path, TOY, "base.yaml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.yaml").write_text("params: {n: 2, extra: [1, 2]}\nprofiles: {tiny: {params: {n: 1}}}\n")
    path = tmp_path / "top.yaml"
    path.write_text("extends: [base.yaml, sub/more.yaml]\nname: top\nparams: {extra: [9]}\n")
    loaded = load(path)
    assert loaded.spec.name == "top" and loaded.spec.params == {"n": 2, "extra": [9]}
    assert [file.name for file in loaded.files] == ["top.yaml", "base.yaml", "more.yaml"]
    assert loaded.profiles == ("big", "small", "tiny")
    (tmp_path / "sub" / "more.yaml").write_text("stages: {total: {config: {factr: 2}}}\n")
    (problem,) = problems(path)
    assert str(problem).startswith(f"{tmp_path}/sub/more.yaml:1:27: stages.total.config.factr: is not a known key.")


def test_extends_circle_missing_file_and_wrong_type(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("\nextends: [a.yaml]\n")
    (circle,) = problems(tmp_path / "a.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in circle.message
    assert (circle.place.source, circle.place.line) == (str(tmp_path / "b.yaml"), 2)
    (tmp_path / "c.yaml").write_text("extends: [bb.yaml, 3]\n")
    missing, wrong = problems(tmp_path / "c.yaml")
    assert "Did you mean 'b.yaml'?" in missing.hint and "found 3" in wrong.message


def test_the_same_base_twice_is_not_a_circle(tmp_path):
    write(tmp_path, TOY, "base.yaml")
    (tmp_path / "l.yaml").write_text("extends: base.yaml\nparams: {n: 4}\n")
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nseeds: [9]\n")
    (tmp_path / "top.yaml").write_text("extends: [l.yaml, r.yaml]\n")
    assert load_pipeline(tmp_path / "top.yaml").seeds == [9]


# ---- --set -------------------------------------------------------------------------------------------------


def test_set_reads_yaml_values(tmp_path):
    spec = load_pipeline(
        write(tmp_path),
        overrides=[
            "stages.total.config.rate=3e-4",
            "seeds=[7, 8]",
            "seeds.1=9",
            "params.n=2",
            "stages.end.timeout_s=1.5",
            "stages.total.resources.custom.spot=1",
            "description=a: b"[:13] + "text",
            'tracking.uri="3"',
            "stages.source.timeout_s=null",
        ],
    )
    assert spec.stages["total"].config["rate"] == 3e-4
    assert spec.seeds == [7, 9] and spec.params["n"] == 2 and spec.stages["squares"].config["count"] == 2
    assert spec.stages["end"].timeout_s == 1.5 and spec.stages["total"].resources.custom == {"spot": 1}
    assert spec.tracking.uri == "3" and spec.stages["source"].timeout_s is None


def test_set_wins_over_the_profile_and_feeds_references(tmp_path):
    spec = load_pipeline(write(tmp_path), "big", ["params.n=1", "params.n=6"])
    assert spec.stages["source"].config["count"] == 6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.totl.config.rate=1", "--set #1: stages.totl.config.rate: stages has no 'totl'. Did you mean 'total'?"),
        ("parms.n=1", "--set #1: parms.n: the pipeline has no 'parms'. Did you mean 'params'?"),
        ("params.m=1", "--set #1: params.m: params has no 'm'. Allowed: n."),
        ("params.n.x=1", "--set #1: params.n.x: params.n is 3, which has nothing inside to set."),
        ("name.x=1", "--set #1: name.x: name is 'toy', which has nothing inside to set."),
        ("dataset.x=1", "--set #1: dataset.x: dataset is a single value, which has nothing inside to set."),
        ("stages.total.config.rat=1", "--set #1: stages.total.config.rat: is not a known key. Did you mean 'rate'?"),
        ("stages.total.config.rate=2", "--set #1: stages.total.config.rate: expected a value of at most 1, found 2."),
        ("stages.total.inputs.nums=x", "--set #1: stages.total.inputs.nums: this stage kind has no input 'nums'."),
        ("seeds.2=1", "--set #1: seeds[2]: seeds is a list of 2; 2 is not one of its indices."),
        ("seeds=[1", "--set #1: seeds: the value '[1' is not valid YAML"),
        ("seeds", "--set #1: expected PATH=VALUE, found 'seeds'."),
        ("=1", "--set #1: expected PATH=VALUE, found '=1'."),
        ("profiles.big.params.n=1", "--set #1: profiles.big.params.n: the pipeline has no 'profiles'."),
        ("name=*x", "--set #1: name: the value '*x' is not valid YAML"),
    ],
)
def test_wrong_overrides_are_reported_by_number(tmp_path, override, expected):
    (message,) = messages(write(tmp_path), overrides=[override])
    assert message.startswith(expected)


def test_overrides_are_numbered_and_come_after_the_file(tmp_path):
    path = write(tmp_path, TOY.replace("value: 7", "vale: 7"))
    found = problems(path, overrides=["seeds=[0]", "nam=x", "stages.total.config.x=1"])
    assert [problem.place.source for problem in found] == [str(path), "--set #2", "--set #3"]


# ---- references --------------------------------------------------------------------------------------------


def test_one_reference_keeps_its_type_and_text_takes_scalars(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_NAME", "here")
    path = source(
        tmp_path,
        'value: "${params.deep.number}", size_kb: "${params.again}"',
        """
        description: "${scale} of ${params.deep.number} in ${env:TOY_NAME}, $${kept}, ${dataset}."
        params:
          deep: {number: 4, flag: true}
          again: ${params.deep.number}
          all: ${params.deep}
          first: ${params.list.0}
          list: [a, b]
        """,
    )
    spec = load_pipeline(path)
    assert spec.description == "dev of 4 in here, ${kept}, ."
    assert spec.stages["source"].config == {"value": 4, "size_kb": 4}
    assert spec.params["all"] == {"number": 4, "flag": True} and spec.params["first"] == "a"
    assert isinstance(spec.stages["source"].config["value"], int)


def test_top_level_values_that_are_left_out_have_their_defaults(tmp_path):
    top = 'description: "${scale}|${dataset}|"\nparams: {options: "${dataset_options}"}\n'
    spec = load_pipeline(source(tmp_path, top=top))
    assert spec.description == "dev||" and spec.params == {"options": {}}
    spec = load_pipeline(source(tmp_path, top="dataset_options:\n" + top))
    assert spec.params == {"options": {}}


def test_what_is_set_and_not_referred_to_is_told(tmp_path):
    path = write(tmp_path, TOY.replace("params: {n: 3}", "params: {n: 3, other: {a: 1}}"))
    assert load(path, overrides=["params.n=4"]).warnings == ()
    told = load(path, overrides=["params.other.a=2", "scale=paper", "dataset=digits5", "dataset_options.target=mfeat"])
    paths = {warning.path for warning in told.warnings if "has no effect: nothing" in warning.message}
    assert paths == {"params.other.a", "scale", "dataset", "dataset_options.target"}
    assert "refers to ${scale}" in str(told.warnings)
    assert load(path, profile="small").warnings == ()  # its scale is a label


def test_environment_values_are_read_as_the_field_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNT", "2")
    monkeypatch.setenv("TOY_TEXT", "12")
    path = source(
        tmp_path,
        'count: "${params.count}", sleep_s: "${env:TOY_SLEEP:-0.5}", seeded: "${env:TOY_FLAG:-true}"',
        'description: "${env:TOY_TEXT}"\nparams: {count: "${env:TOY_COUNT}"}\n',
    )
    spec = load_pipeline(path)
    assert spec.stages["source"].config == {"count": 2, "sleep_s": 0.5, "seeded": True}
    assert spec.description == "12"
    assert len(load(path).graph.nodes) == 2
    json.loads(spec.canonical())


def test_a_wrong_environment_value_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNT", "hunter2")
    (message,) = messages(source(tmp_path, 'count: "${env:TOY_COUNT}"'))
    assert "hunter2" not in message and "(from ${env:TOY_COUNT})" in message and "expected an integer" in message


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ('description: "${params.x}"', "${params.x}: the pipeline has no 'params'."),
        ('params: {xx: 1}\ndescription: "${params.x}"', "${params.x}: params has no 'x'. Did you mean 'xx'?"),
        ('params: {x: 1}\ndescription: "${params.x.y}"', "${params.x.y}: params.x is 1, which has no 'y'."),
        ('description: "${parms.x}"', "${parms.x} is not a reference that exists. Did you mean 'params'?"),
        ('description: "${env:TOY_ABSENT}"', "the environment variable TOY_ABSENT is not set."),
        ('description: "${env:a b}"', "${env:a b} is not an environment reference."),
        ('description: "${stages.source}"', "${stages.source} can only stand in a stage's inputs"),
        ('description: "${scale"', "'${scale' has a reference without its closing brace."),
        ('params: {x: {y: 1}}\ndescription: "a ${params.x}"', "${params.x} is a map or a list and cannot stand"),
        ('params: {x: "${params.x}"}', "${params.x} goes round in a circle: params.x needs itself."),
        ('params: {x: {y: "${params.x}"}}', "${params.x} goes round in a circle: params.x needs itself."),
        ('params: {x: "${params.y}", y: "a ${params.x}"}', "goes round in a circle"),
        ('description: "${}"', "${} is not a reference that exists."),
    ],
)
def test_wrong_references(tmp_path, monkeypatch, top, expected):
    monkeypatch.delenv("TOY_ABSENT", raising=False)
    (problem,) = problems(source(tmp_path, top=top + "\n"))
    assert expected in str(problem) and problem.place.line >= 3 and problem.place.column > 1


def test_a_broken_reference_is_told_once(tmp_path):
    (problem,) = problems(
        source(tmp_path, 'count: "${params.n}", value: "${params.n}"', "params: {n: '${params.q}'}\n")
    )
    assert problem.path == "params.n"


def _reference(name, times=1):
    return "'" + f"${{params.{name}}}" * times + "'"


def test_references_cannot_blow_up(tmp_path):
    lists = "\n".join(f"  l{i}: [{', '.join([_reference(f'l{i - 1}')] * 10)}]" for i in range(1, 9))
    started = time.thread_time()
    found = messages(source(tmp_path, top=f"params:\n  l0: [1]\n{lists}\n"))
    assert any("more than 10,000 values" in text for text in found)
    texts = "\n".join(f"  t{i}: {_reference(f't{i - 1}', 10)}" for i in range(1, 9))
    found = messages(source(tmp_path, top=f"params:\n  t0: aaaaaaaaaa\n{texts}\n"))
    assert any("more than 100,000 characters" in text for text in found)
    assert time.thread_time() - started < 5


# ---- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": the file is empty."),
        (b"# only a comment\n", ": the file is empty."),
        (b"\n- a\n", ":2:1: the file holds a list; a pipeline is a map"),
        (b"text", ":1:1: the file holds a single value"),
        (b"a: 1\nb: \xff\n", ":2:4: byte 0xff is not UTF-8 text."),
        (b"a: 1\nb:\n\tc: 1\n", ":3:1: not valid YAML"),
        (b"a: [1, 2\n", ":2:1: not valid YAML"),
        (b"a: 'x\n", "not valid YAML"),
        (b"a: *b\n", ":1:4: not valid YAML: found undefined alias 'b'."),
        (b"a: &b [*b]\n", ":1:4: alias *b contains itself."),
        (b"a: 1\nc: 2\na: 3\n", ":3:1: the key 'a' is there twice. The first is at"),
        (b"a: 1\n---\nb: 1\n", "expected a single document"),
        (
            b"a: !!python/object/apply:os.system ['echo']\n",
            ":1:4: the tag !!python/object/apply:os.system is not allowed.",
        ),
        (b"a: !mine 3\n", ":1:4: the tag !mine is not allowed."),
        (b"a: .nan\n", ":1:4: '.nan' is not a finite number."),
        (b"a: !!int x\n", ":1:4: 'x' is not an integer."),
        (b"1: a\n", ":1:1: keys must be text."),
        (b"? [a]\n: b\n", "keys must be text."),
        (b"a: " + b"[" * 5000, ": the file is nested deeper than 60 levels."),
        (b"a: 1\n" * 250_000, "is larger than 1000 kB"),
        (b"a\x00b: 1\n", "not valid YAML"),
        (b"a: " + b"9" * 5000 + b"\n", "is not an integer."),
    ],
)
def test_files_that_are_no_pipeline(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    found = problems(path)
    assert any(expected in str(problem) for problem in found), found
    assert all(problem.place.source == str(path) for problem in found)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(NotFoundError, match=r"no pipeline file .*absent\.yaml") as caught:
        load(tmp_path / "absent.yaml")
    assert caught.value.exit_code == 4
    write(tmp_path)
    assert "is a directory; a pipeline is one YAML file. It contains: " in next(iter(messages(tmp_path)))


def test_alias_bomb(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    started = time.thread_time()
    (message,) = messages(path)
    assert "more than 10,000 values after its aliases are expanded" in message
    assert time.thread_time() - started < 2


def test_too_many_values_are_refused_before_they_are_all_read(tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text("".join(f"k{i}: [1, 2, 3]\n" for i in range(50_000)))
    started = time.thread_time()
    (message,) = messages(path)
    assert "more than 10,000 values" in message
    assert time.thread_time() - started < 15


def test_anchors_and_merge_keys_work(tmp_path):
    path = write(
        tmp_path,
        """
        params:
          common: &common {value: 2, count: 2}
        stages:
          a: {kind: numbers, config: {<<: *common, count: 3}}
          b: {kind: numbers, config: *common}
        """,
    )
    spec = load_pipeline(path)
    assert spec.stages["a"].config == {"value": 2, "count": 3}
    assert spec.stages["b"].config == {"value": 2, "count": 2}


def test_an_anchor_may_be_redefined_and_fifty_levels_are_fine(tmp_path, recwarn):
    top = "params:\n  a: &x 1\n  b: *x\n  c: &x 2\n  d: *x\n  e: " + "[" * 50 + "]" * 50 + "\n"
    params = load_pipeline(source(tmp_path, top=top)).params
    # What earlier tests left behind may warn as well when it is collected.
    told = [str(warning.message) for warning in recwarn if issubclass(warning.category, YAMLWarning)]
    assert (params["b"], params["d"]) == (1, 2) and told == []


def test_yaml_1_2(tmp_path):
    spec = load_pipeline(
        source(tmp_path, top="params: {a: no, b: 3e-4, c: 010, d: 0o17, e: 2024-01-01, f: 12:30, g: 1_000, h: ~}\n")
    )
    assert spec.params == {
        "a": "no", "b": 3e-4, "c": 10, "d": 15, "e": "2024-01-01", "f": "12:30", "g": 1000, "h": None
    }  # fmt: skip


# ---- checks ------------------------------------------------------------------------------------------------


def test_all_errors_at_once_with_places_and_suggestions(tmp_path):
    path = write(
        tmp_path,
        """\
        nam: x
        seeds: [0, -1, "x", 1.5]
        scale: papr
        tracking: {enabled: yes, url: x}
        stages:
          a:
            kind: numbers
            config:
              cont: 3
              value: "3"
              fail_how: exits
              sleep_s: -1
            resources: {cpu: 2, gpus: [1], workers: 0}
            min_success: 2
            retries: {}
          b:
            kind: nmbers
          c:
            kind: square
            inputs:
              numbr: ${stages.a}
              number: a
          d:
            kind: sum
            inputs:
              numbers: ["${stages.a2}", 3]
          e:
            kind: sum
            inputs: {numbers: "${stages.end}", extra: ["${stages.a}", "${stages.c}"]}
          end:
            kind: gather
            config:
          f:
            config: 3
          1g: {kind: numbers}
        """,
    )
    lines = path.read_text().splitlines()
    found = {problem.path: problem for problem in problems(path)}
    expected = {
        "nam": "Did you mean 'name'?",
        "seeds[1]": "expected a value of at least 0, found -1.",
        "seeds[2]": "expected an integer, found 'x'.",
        "seeds[3]": "expected an integer, found 1.5.",
        "scale": "expected 'smoke', 'dev' or 'paper', found 'papr'. Did you mean 'paper'?",
        "tracking.enabled": "expected true or false, found 'yes'. YAML 1.2 knows only true and false.",
        "tracking.url": "Did you mean 'uri'?",
        "stages.a.config.cont": "Did you mean 'count'?",
        "stages.a.config.value": "expected an integer, found '3'. Remove the quotes.",
        "stages.a.config.fail_how": "Did you mean 'exit'?",
        "stages.a.config.sleep_s": "expected a value of at least 0, found -1.",
        "stages.a.resources.cpu": "Did you mean 'cpus'?",
        "stages.a.resources.gpus": "expected a number, found a list of 1.",
        "stages.a.resources.workers": "expected a value of at least 1, found 0.",
        "stages.a.min_success": "expected a value of at most 1, found 2.",
        "stages.a.retries": "Did you mean 'retry'?",
        "stages.b.kind": "Did you mean 'numbers'?",
        "stages.c.inputs.numbr": "Did you mean 'number'?",
        "stages.c.inputs.number": "expected a reference to a stage, found 'a'. Write ${stages.a}.",
        "stages.d.inputs.numbers[0]": "there is no stage 'a2'. Did you mean 'a'?",
        "stages.d.inputs.numbers[1]": "expected text, found 3.",
        "stages.e.inputs.numbers": "takes an artifact of kind 'number', but 'end' makes 'report'.",
        "stages.e.inputs.extra": "takes one artifact, but 2 stages are listed.",
        "stages.end.inputs.numbers": "is missing; it takes an artifact of kind 'number'. Numbers of all seeds.",
        "stages.f.kind": "is missing.",
        "stages.f.config": "expected a map, found 3.",
        "stages.1g": "",
    }  # fmt: skip
    for name, text in expected.items():
        assert name in found, name
        assert text in str(found[name]), found[name]
        last = name.split(".")[-1].split("[")[0]
        if "is missing" not in text:
            assert last in lines[found[name].place.line - 1]
    assert set(found) == set(expected)


def test_a_union_of_types_is_one_problem(tmp_path):
    (problem,) = problems(write(tmp_path), overrides=["stages.total.inputs.numbers={a: 1}"])
    assert "expected text or a list, found a map with 1 keys." in str(problem)


def test_missing_top_level_fields(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("description: x\n")
    assert {p.path for p in problems(path)} == {"apiVersion", "name", "stages"}
    path.write_text(HEADER + "stages: {}\n")
    assert "expected at least 1 entries" in str(problems(path)[0])


def test_a_later_api_version_is_refused(tmp_path):
    path = write(tmp_path, header="apiVersion: moepipe/v2\nname: x\n")
    assert "expected 'moepipe/v1', found 'moepipe/v2'" in str(problems(path)[0])


def test_unknown_dataset_and_options(tmp_path):
    (problem,) = problems(source(tmp_path, top="dataset: camelyn17\n"))
    assert problem.path == "dataset" and "There is no dataset named 'camelyn17'." in problem.message
    (problem,) = problems(source(tmp_path, top="dataset_options: {fold: 1}\n"))
    assert problem.path == "dataset_options" and "no dataset" in problem.message


def test_empty_blocks_are_empty_maps(tmp_path):
    path = write(
        tmp_path, "params:\ntracking:\nstages:\n  a:\n    kind: numbers\n    config:\n    inputs:\n    retry:\n"
    )
    assert load_pipeline(path).stages["a"].config == {}


def test_problems_as_json(tmp_path):
    (problem,) = problems(source(tmp_path, "valu: 1"))
    record = problem.to_json()
    assert json.loads(json.dumps(record)) == record
    assert (record["line"], record["column"], record["path"]) == (6, 14, "stages.source.config.valu")


def test_the_example_of_the_docs_loads(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    examples = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    whole = [example for example in examples if "apiVersion" in example]
    assert whole
    for example in whole:
        assert load(write(tmp_path, example, header="")).warnings == ()


def test_random_damage_never_ends_in_a_traceback(tmp_path):
    """Cut, swap, double and spoil lines: the answer is a pipeline or SpecErrors whose places lie in the file."""
    pieces = [
        "${params.n}",
        "${",
        "}",
        "*a",
        "&a ",
        "<<: *a",
        "- ",
        "[",
        "{",
        ": ",
        "null",
        "!!int ",
        "'",
        "\t",
        "\n",
        "| ",
    ]
    pieces += ["${env:HOME}", "${params}", "1e999", "-1", "é", "# ", "---\n", "? ", "config:", "inputs:", "0x", "\x00"]
    random = Random(7)
    outcomes = {"fine": 0, "refused": 0}
    for _ in range(150):
        lines = (HEADER + TOY).split("\n")
        for _ in range(random.randint(1, 3)):
            at, other = random.randrange(len(lines)), random.randrange(len(lines))
            cut = random.randrange(len(lines[at]) + 1)
            spoilt = lines[at][:cut] + random.choice(pieces) + lines[at][cut + random.choice([0, 1, 5]) :]
            lines[at] = random.choice([lines[other], spoilt, spoilt, ""])
        path = tmp_path / "damaged.yaml"
        path.write_text("\n".join(lines))
        count = path.read_text().count("\n") + 2
        try:
            load(path, random.choice([None, "big"]))
            outcomes["fine"] += 1
        except SpecErrors as error:
            outcomes["refused"] += 1
            assert error.problems and all(0 <= problem.place.line <= count for problem in error.problems)
    assert outcomes["fine"] > 5 and outcomes["refused"] > 50


# ---- speed -------------------------------------------------------------------------------------------------


def test_fifty_stages_and_a_thousand_members_load_in_half_a_second(tmp_path):
    lines = ["params: {n: 21}", "stages:", "  s0: {kind: numbers, config: {count: 21}}"]
    for i in range(1, 49):
        lines += [f"  s{i}:", "    kind: square", f"    inputs: {{number: '${{stages.s{i - 1}}}'}}"]
        lines += ["    config:", "      count: ${params.n}", "    resources: {cpus: 1, threads: 1}", "    timeout_s: 9"]
    lines += ["  end: {kind: gather, inputs: {numbers: '${stages.s48}'}}"]
    path = write(tmp_path, "\n".join(lines))
    times = []
    for _ in range(3):
        started = time.thread_time()
        graph = load(path).graph
        times.append(time.thread_time() - started)
    assert len(graph.nodes) > 1000 and len(graph.stages) == 50
    assert min(times) < 0.5


def test_loading_imports_nothing_heavy():
    code = (
        "import sys, orchestrator.loading, orchestrator.schema, orchestrator.explain, orchestrator.scaffold;"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'numpy', 'matplotlib', 'sklearn', 'timm'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
