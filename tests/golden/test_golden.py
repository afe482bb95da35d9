"""Every stored case passes, and the replayer fails where it must."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.__main__ import main
from tests.golden.registry import ADAPTERS, CHECKS, Skip, load_adapters, op
from tests.golden.replay import compare_tensor, discover, replay

CASES = Path(__file__).parent / "cases"
load_adapters()


@pytest.mark.parametrize("folder", discover([CASES]), ids=lambda f: f.relative_to(CASES).as_posix())
def test_case(folder):
    outcome = replay(folder, ADAPTERS)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.passed, "\n".join(outcome.complaints)


@pytest.fixture
def case(tmp_path):
    """A private copy of one case, three folders deep."""
    folder = tmp_path / "any" / "depth" / "case"
    shutil.copytree(CASES / "meta_dmoe" / "transform" / "rxrx1_test", folder)
    return folder


def change(folder, edit):
    tensors = load_file(folder / "tensors.safetensors")
    edit(tensors)
    save_file(tensors, folder / "tensors.safetensors")


def test_untouched_copy_passes_and_is_found_at_any_depth(case, tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_perturbed_tensor_fails_with_its_largest_excess(case, tmp_path, capsys):
    def perturb(tensors):
        tensors["out.sub"][1, 2, 3] += 0.5

    change(case, perturb)
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "out.sub: 1 of" in lines[0] and "largest excess 0.5 at (1, 2, 3)" in lines[0]
    assert lines[1] == "0 passed, 1 failed"


def test_perturbed_input_fails(case):
    def perturb(tensors):
        tensors["in.image"][:, :, 0] = torch.arange(48).float()[:, None]

    change(case, perturb)
    assert not replay(case, ADAPTERS).passed


def test_unknown_operation_fails(case):
    record = json.loads((case / "case.json").read_text())
    (case / "case.json").write_text(json.dumps(record | {"op": "meta_dmoe.nothing"}))
    assert replay(case, ADAPTERS).complaints == ["no adapter for operation 'meta_dmoe.nothing'"]


@pytest.mark.parametrize("name, message", [("out.more", "missing from the outputs"), ("out.sub", "not among")])
def test_missing_and_extra_outputs_fail(case, name, message):
    def rename(tensors):
        if name in tensors:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(2)

    change(case, rename)
    complaints = replay(case, ADAPTERS).complaints
    assert len(complaints) == 1 and name in complaints[0] and message in complaints[0]


def test_a_crash_is_a_failed_case(case, tmp_path, capsys):
    (case / "tensors.safetensors").unlink()
    assert main([str(tmp_path)]) == 1
    assert "KeyError" in capsys.readouterr().out


def test_a_case_without_its_data_is_skipped_not_passed(case, tmp_path, capsys, monkeypatch):
    def absent(case, tensors):
        raise Skip("no such package")

    monkeypatch.setitem(ADAPTERS, "meta_dmoe.transform", absent)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("skipped: no such package") and lines[1] == "0 passed, 0 failed, 1 skipped"


def test_a_comparison_of_its_own_replaces_the_common_one(case, monkeypatch):
    monkeypatch.setitem(CHECKS, "meta_dmoe.transform", lambda case, tensors, outputs: ["not like this"])
    assert replay(case, ADAPTERS).complaints == ["not like this"]


def test_a_folder_without_cases_is_an_error(case, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 1
    seen = capsys.readouterr()
    assert "holds no case.json" in seen.err and seen.out.splitlines()[-1] == "0 passed, 0 failed"
    assert main([str(tmp_path / "any"), str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_overlapping_folders_count_each_case_once(case, tmp_path, capsys):
    assert main([str(tmp_path), str(case)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_two_adapters_for_one_operation_are_refused():
    with pytest.raises(ValueError, match="two adapters"):
        op("meta_dmoe.transform")(lambda case, tensors: {})


@pytest.mark.parametrize(
    "answer, stored, rtol, atol, passes",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), 0.0, 0.1, True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.2]), 0.0, 0.1, False),
        (torch.tensor([100.0]), torch.tensor([101.0]), 0.01, 0.0, True),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), 1.0, 1.0, False),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), 1.0, 1.0, False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), 0.0, 0.0, True),
        (torch.tensor([1]), torch.tensor([2]), 1.0, 1.0, False),
        (torch.tensor([1.0]), torch.tensor([1]), 1.0, 1.0, False),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), 1.0, 1.0, False),
        (torch.zeros(0), torch.zeros(0), 0.0, 0.0, True),
    ],
)
def test_comparison(answer, stored, rtol, atol, passes):
    assert (compare_tensor(answer, stored, rtol, atol) == "") is passes


def test_tolerances_of_single_tensors_and_json_results(tmp_path):
    folder = tmp_path / "case"
    folder.mkdir()
    save_file({"in.x": torch.ones(2), "out.y": torch.ones(2)}, folder / "tensors.safetensors")
    record = {"op": "t.t", "params": {}, "rtol": 0, "atol": 0, "expected": {"names": ["a"], "value": 1.0, "count": 3}}
    answers = {"out.y": torch.full((2,), 1.05), "expected": {"names": ["a"], "value": 1, "count": 3}}
    adapters = {"t.t": lambda case, tensors: answers}

    def complaints(**more):
        (folder / "case.json").write_text(json.dumps(record | more))
        return replay(folder, adapters).complaints

    assert len(complaints()) == 1
    assert complaints(tensor_tolerances={"out.y": {"rtol": 0, "atol": 0.1}}) == []
    answers["out.y"] = torch.ones(2)
    answers["expected"] = {"names": ["b"], "value": 1.5, "count": 3}
    assert len(complaints()) == 2
    del answers["expected"]
    assert complaints() == ["expected: missing from the outputs"]
