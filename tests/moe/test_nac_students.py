"""Distillation students of a circuit, and the circuit assembled from them."""

import pytest
import torch

from moe.errors import CheckpointError, SpecError
from moe.models.nac.assembly import assemble_circuit, student_files
from moe.models.nac.circuit import build_circuit
from moe.models.nac.specs import StudentSpec
from moe.models.nac.students import Stage, build_student
from tests.moe.test_nac import MOD, images, spec_of

SHARE = {"state_dim": 8, "code_dim": 4, "num_heads": 2, "head_dim": 3, "mod_fc_kwargs": MOD, "ffn_capacity_factor": 2.0}
STUDENTS = {
    "share_kwargs": SHARE,
    "mediator": {"latent_attention_kwargs": {"share_layernorm": True}},
    "readin": {
        "tokenizer_kwargs": {
            "capacity_preset": "atto",
            "num_stages": 2,
            "positional_grid_kwargs": {"dim": 3, "grid_size": [2, 2]},
        },
        "tokenizer_type": "ConvNeXtImageTokenizer",
    },
    "readout": {"tokenizer_kwargs": {"softmax_type": "gumbel"}, "output_dim": 4},
}


def student(position, stitch=10, seed=0, config=STUDENTS, **more):
    spec = StudentSpec.from_official(config, position, stitch)
    return build_student(spec.model_copy(update=more), seed)


def test_students_are_stages_of_a_network():
    first, middle, last = (student(position) for position in ("readin", "mediator", "readout"))
    assert all(isinstance(stage, Stage) for stage in (first, middle, last))
    hidden = first(images())
    assert hidden.shape == (2, 1, 10)
    assert middle(torch.randn(2, 7, 10)).shape == (2, 7, 10)
    assert last(middle(hidden)).shape == (2, 4)
    with pytest.raises(SpecError, match=r"\[B, T, 10\], got \(2, 7, 9\)"):
        middle(torch.randn(2, 7, 9))


def test_codes_of_students_are_seeded_saved_averaged_and_trained_on_demand():
    one, same, other = (student("mediator", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.codes, same.codes) and not torch.equal(one.codes, other.codes)
    assert "codes" in one.state_dict() and "codes" not in one.official_state_dict()
    hidden = torch.randn(2, 3, 10)
    several = student("mediator", num_codes=3)
    parts = [several(hidden, codes=code.unsqueeze(0)) for code in several.codes]
    torch.testing.assert_close(several(hidden), torch.stack(parts).mean(0))
    trained = student("readout", train_codes=True)
    trained(hidden).sum().backward()
    assert trained.codes.grad.any() and trained.initial_states.grad.any()
    assert "codes" not in dict(one.named_parameters())


def test_read_in_student_starts_with_the_official_layer_scale():
    assert student("readin").read_in.ffn.layer_scale.gamma[0].item() == pytest.approx(1e-6)
    assert student("readin", official_layer_scale=False).read_in.ffn.layer_scale.gamma[0].item() == pytest.approx(0.1)


def test_official_student_files_load_strictly():
    source, target = student("readin", seed=1), student("readin", seed=2)
    own = target.codes.clone()
    target.load_official(source.official_state_dict())
    assert torch.equal(target.codes, own)
    assert torch.equal(target.post_stitch.weight, source.post_stitch.weight)
    state = source.official_state_dict()
    state["post_stitch.weight"] = state["post_stitch.weight"].T
    state["more"] = state.pop("post_stitch.bias")
    shapes = r"post_stitch\.weight \(8, 10\) instead of \(10, 8\)"
    with pytest.raises(
        CheckpointError, match=rf"missing: post_stitch\.bias; 1 unexpected: more; 1 of another shape: {shapes}"
    ):
        target.load_official(state)
    with pytest.raises(SpecError, match="no section 'readin'"):
        StudentSpec.from_official({"mediator": {}}, "readin", 3)
    with pytest.raises(SpecError, match="image tokenizer"):
        student("readin", config={**STUDENTS, "readin": {"tokenizer_kwargs": {"temperature": 1.0}}})


def distilled(stitch=10):
    config = {**STUDENTS, "share_kwargs": {**SHARE, "code_dim": 6}}
    kinds = {"ReadInStudent": "readin", "ReadOutStudent": "readout"}
    return {
        file: student(kinds.get(file, "mediator"), stitch, seed, config).state_dict()
        for seed, file in enumerate(student_files(2))
    }


@pytest.fixture
def target():
    return build_circuit(spec_of(ffn_capacity_factor=2.0), fit_priors=False)


def test_assembly_takes_every_module_from_its_student(target):
    students = distilled()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = assemble_circuit(target, students)
    state = target.state_dict()
    for name, source in report.loaded_from.items():
        file, _, key = source.partition(".")
        assert torch.equal(state[name], students[file][key])
    assert all(torch.equal(state[name], before[name]) for name in report.not_loaded)
    assert set(report.loaded_from) | set(report.not_loaded) == set(state)
    assert report.loaded_from["latent_graphs.0.propagators.1.ffn.ffn.0.native_weight"].startswith("MediatorStudent_2.")
    assert "MediatorStudent_1.pre_stitch.weight" in report.unused and "output_tokenizer.to_logits.weight" in state
    assert torch.isfinite(target(images())).all()


def test_assembly_for_tiny_imagenet_keeps_grid_and_classifier(target):
    reports = [assemble_circuit(target, distilled(), kind) for kind in ("tinynet", "tinyimnet")]
    assert reports[0] == reports[1]
    assert "input_tokenizer.positional_grid.grid" in reports[0].not_loaded
    assert "output_tokenizer.to_logits.weight" in reports[0].not_loaded
    with pytest.raises(SpecError, match="Did you mean 'imagenet'"):
        assemble_circuit(target, distilled(), "imagenets")


def test_assembly_resizes_the_grid_only_on_demand(target):
    students = distilled()
    students["ReadInStudent"]["tokenizer.positional_grid.grid"] = torch.ones(3, 4, 4)
    with pytest.raises(CheckpointError, match=r"grid \(3, 4, 4\) does not fit .*\(3, 2, 2\)"):
        assemble_circuit(target, students)
    report = assemble_circuit(target, students, "tinynet", resize_grid=True)
    assert report.resized == ["input_tokenizer.positional_grid.grid"]
    torch.testing.assert_close(target.state_dict()[report.resized[0]], torch.ones(3, 2, 2))


def test_assembly_refuses_wrong_students_and_then_loads_nothing(target):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    students = distilled()
    with pytest.raises(CheckpointError, match="MediatorStudent_2"):
        assemble_circuit(target, {file: s for file, s in students.items() if file != "MediatorStudent_2"})
    with pytest.raises(CheckpointError, match="MediatorStudent_9"):
        assemble_circuit(target, {**students, "MediatorStudent_9": {}})
    short = {**students, "ReadOutStudent": {k: v for k, v in students["ReadOutStudent"].items() if "exit" not in k}}
    with pytest.raises(
        CheckpointError, match=r"no student has latent_graphs\.0\.read_out\.latent_attention\.exit_layer"
    ):
        assemble_circuit(target, short)
    more = {**students, "ReadOutStudent": {**students["ReadOutStudent"], "surprise": torch.zeros(1)}}
    with pytest.raises(CheckpointError, match="surprise has no place"):
        assemble_circuit(target, more)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    some = assemble_circuit(target, {"MediatorStudent_1": students["MediatorStudent_1"]}, partial=True)
    assert all("propagators.0." in name for name in some.loaded_from)


def test_stitches_can_be_kept():
    target = build_circuit(spec_of(ffn_capacity_factor=2.0, stitch_dim=10), fit_priors=False)
    report = assemble_circuit(target, distilled())
    kept = {name: source for name, source in report.loaded_from.items() if ".stitches." in name and "weight" in name}
    assert kept["latent_graphs.0.stitches.0.post_stitch.weight"] == "ReadInStudent.post_stitch.weight"
    assert kept["latent_graphs.0.stitches.0.pre_stitch.weight"] == "MediatorStudent_1.pre_stitch.weight"
    assert kept["latent_graphs.0.stitches.2.pre_stitch.weight"] == "ReadOutStudent.pre_stitch.weight"
    assert len(kept) == 6
