"""Every algorithm of the registry: presets, building, one step; and imports that stay light."""

import subprocess
import sys

import pydantic
import pytest
import torch

from moe.algorithms.base import ALGORITHMS, algorithm
from moe.errors import SpecError
from moe.inner import inner_step
from tests.moe.helpers import episode

OFFICIAL = ("iwildcam", "camelyon17", "rxrx1", "fmow")
PAIRS = [(name, dataset) for name in ALGORITHMS.names() for dataset in algorithm(name).PRESETS]


@pytest.mark.parametrize("name, dataset", PAIRS)
def test_presets_are_valid_and_survive_json(name, dataset):
    method = algorithm(name)
    config = method.preset(dataset)
    assert method.Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(pydantic.ValidationError):
        method.preset(dataset, nonsense=1)


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_every_algorithm_names_its_presets(name):
    with pytest.raises(SpecError, match="no preset"):
        algorithm(name).preset("imagenet")


# What brings an architecture of its own, or splits a transformer's, takes its first step in its own tests.
ANY_BACKBONE = [
    name
    for name in ALGORITHMS.names()
    if {"backbone", "moe"} <= set(algorithm(name).Config.model_fields) and name != "emoe"
]


@pytest.mark.parametrize("name", ANY_BACKBONE)
def test_an_algorithm_on_any_backbone_takes_a_step(name):
    method = algorithm(name)
    torch.manual_seed(0)
    tiny = {"name": "tiny_cnn", "channels": 1, "width": 2}
    moe = {"num_experts": 3, "top_k": 2}
    run = method(method.preset("rotated14", backbone=tiny, moe=moe))
    module = run.build(3)
    batch = episode() if name == "meta_dmoe" else (torch.randn(6, 1, 12, 12), torch.randint(0, 3, (6,)))
    losses = run.loss(module, batch)
    losses.total.backward()
    assert losses.parts["balance"] > 0 and losses.total.requires_grad
    groups = run.param_groups(module)
    grouped = [id(p) for group in groups for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    assert len(groups) == (3 if name == "meta_dmoe" else 1)
    student = getattr(module, "student", module).eval()
    assert run.predict(student, torch.randn(4, 1, 12, 12)).shape == (4,)


def test_official_constants():
    method = algorithm("meta_dmoe")
    config = {name: method.preset(name) for name in OFFICIAL}
    assert [config[n].num_experts for n in OFFICIAL] == [10, 5, 3, 4]
    assert [config[n].seed for n in OFFICIAL] == [1, 3407, 1000, 42]
    assert [(config[n].meta.support, config[n].meta.query) for n in OFFICIAL] == [
        (24, 16),
        (64, 32),
        (75, 48),
        (64, 48),
    ]
    assert [config[n].meta.step.inner_lr for n in OFFICIAL] == [3e-4, 1e-3, 1e-4, 1e-4]
    assert [config[n].meta.student_lr for n in OFFICIAL] == [3e-5, 1e-4, 1e-6, 1e-5]
    assert [config[n].meta.aggregator_lr for n in OFFICIAL] == [1e-6, 1e-6, 3e-6, 1e-6]
    assert [config[n].meta.reset_optimizer for n in OFFICIAL] == [True, True, False, True]
    assert [config[n].meta.epochs for n in OFFICIAL] == [20, 10, 10, 30]
    assert [config[n].expert.weight_decay for n in OFFICIAL] == [0, 1e-2, 1e-5, 0]
    assert [config[n].aggregator_training.lr for n in OFFICIAL] == [1e-6, 3e-6, 1e-5, 3e-6]
    assert all(config[n].meta.step.order == "second" and config[n].meta.step.exclusion == "drop" for n in OFFICIAL)
    assert all(config[n].aggregator.heads == 16 and config[n].aggregator.depth == 1 for n in OFFICIAL)


def test_parity_official_asks_for_the_loss_before_adaptation():
    method = algorithm("meta_dmoe")
    assert method.preset("fmow", parity="official").step.loss_before
    assert not method.preset("fmow").step.loss_before


def test_adaptation_repeats_the_inner_step_of_meta_training():
    method = algorithm("meta_dmoe")
    torch.manual_seed(0)
    run = method(method.preset("rotated14", backbone={"name": "tiny_cnn", "channels": 1, "width": 2}))
    module, batch = run.build(3), episode()
    with torch.no_grad():
        module.rates.rate.normal_()
    rates = module.rates.values()
    result = run.adaptation(rates).adapt(module.student, batch.support, batch.tokens_SED, module.aggregator)
    with torch.no_grad():
        target = module.aggregator(batch.tokens_SED).feat_BD
    expected = inner_step(module.student, batch.support, target, module.rates(), graph="full").adapted
    for name, value in expected.items():
        torch.testing.assert_close(result.delta[name], value.detach())


def test_importing_configurations_imports_no_torch():
    code = (
        "import sys\n"
        "import moe.specs\n"
        "from moe.algorithms.base import ALGORITHMS, algorithm\n"
        "from moe.adaptation.base import ADAPTATIONS, make\n"
        "for name in ALGORITHMS.names():\n"
        "    method = algorithm(name)\n"
        "    [method(method.preset(dataset)) for dataset in method.PRESETS]\n"
        "[make(name) for name in ADAPTATIONS.names()]\n"
        "heavy = {'torch', 'timm', 'torchvision', 'ray', 'mlflow', 'pandas', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
