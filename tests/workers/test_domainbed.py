"""DomainBed's protocol: draws, splits, sampling, sweeps, selection and tables, beyond what the golden cases show."""

import csv
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe.errors import DataError, NotFoundError, SpecError
from workers.domainbed import hparams, mnist, scores
from workers.domainbed.benchmark_sets import SETS
from workers.domainbed.jobs import Sweep, held_out_sets, job_id, job_state, sweep_jobs
from workers.domainbed.loader import InfiniteBatches
from workers.domainbed.protocol import PROTOCOLS, evaluation_steps, protocol, steps_per_epoch
from workers.domainbed.records import parse_record, read_run, read_sweep, records_of
from workers.domainbed.report import collect
from workers.domainbed.seeds import seed_hash
from workers.domainbed.selection import ranking, run_choices, sweep_accuracy, validation_accuracy
from workers.domainbed.splits import split_domain
from workers.domainbed.tables import render


def test_nothing_imports_torch_before_it_is_called():
    modules = [
        "hparams",
        "jobs",
        "loader",
        "mnist",
        "protocol",
        "records",
        "report",
        "scores",
        "seeds",
        "selection",
        "splits",
        "tables",
    ]
    code = "import sys\n" + "\n".join(f"import workers.domainbed.{name}" for name in modules)
    done = subprocess.run([sys.executable, "-c", code + "\nprint('torch' in sys.modules)"], capture_output=True)
    assert done.stdout.strip() == b"False", done.stderr.decode()


# Seeds


def test_a_seed_does_not_depend_on_numpys_types():
    plain = seed_hash("PACS", [0, 1], 3, 0.5, None, True, (1, "a"))
    same = seed_hash(np.str_("PACS"), np.array([0, 1]), np.int64(3), np.float64(0.5), None, np.bool_(True), (1, "a"))
    assert plain == same and 0 <= plain < 2**31
    assert len({seed_hash(0, 1), seed_hash(1, 0), seed_hash("0", 1), seed_hash([0, 1]), seed_hash()}) == 5


def test_what_has_no_stable_text_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be made from"):
        seed_hash(0, [tmp_path])


# Hyper-parameters


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PROTOCOLS)),
    st.sampled_from(["ERM", "IRM", "CDANN", "Fishr", "MLDG", "Mixup", "RSC", "ARM", "SANDMask", "MTL"]),
    st.sampled_from(["PACS", "DomainNet", "ColoredMNIST", "Debug224"]),
    st.integers(0, 2**31 - 1),
)
def test_draws_are_builtin_reproducible_and_of_the_default_names(which, algorithm, dataset, seed):
    default = hparams.default_hparams(which, algorithm, dataset)
    drawn = hparams.random_hparams(which, algorithm, dataset, seed)
    assert list(drawn) == list(default)
    assert drawn == hparams.random_hparams(which, algorithm, dataset, seed)
    assert all(type(value) in (bool, int, float, str) for value in [*drawn.values(), *default.values()])
    assert json.loads(json.dumps(drawn)) == drawn
    small = dataset == "ColoredMNIST"
    low, high = (10**-4.5, 10**-2.5) if small else (1e-5, 10**-3.5)
    assert low <= drawn["lr"] <= high
    assert drawn["weight_decay"] == 0 if small else 1e-6 <= drawn["weight_decay"] <= 1e-2
    if small:
        assert 8 <= drawn["batch_size"] <= 512
    else:
        assert drawn["batch_size"] == 8 if algorithm == "ARM" else 8 <= drawn["batch_size"] <= 45


def test_protocols_differ_where_the_codes_do():
    lr = {name: hparams.default_hparams(name, "ERM", "PACS")["lr"] for name in PROTOCOLS}
    assert lr == {"domainbed_2020": 5e-5, "domainbed_head": 5e-5, "gmoe_fork": 3e-5, "emoe_fork": 3e-5}
    mixup = {name: hparams.hparam_table(name, "Mixup", "PACS")["mixup_alpha"] for name in PROTOCOLS}
    assert [entry.default for entry in mixup.values()] == [0.2, 0.2, 0.1, 0.1]
    assert mixup["gmoe_fork"].sample("mixup_alpha", 5) == 0.1 != mixup["domainbed_2020"].sample("mixup_alpha", 5)
    names = {name: set(hparams.default_hparams(name, "MLDG", "PACS")) for name in PROTOCOLS}
    assert names["domainbed_head"] - names["domainbed_2020"] >= {"n_meta_test", "vit_dropout", "resnet50_augmix"}
    assert names["gmoe_fork"] - names["domainbed_2020"] == {"optimizer", "val_augment", "freeze_bn", "pretrained"}
    assert [protocol(name).steps("DomainNet") for name in PROTOCOLS] == [5001, 5001, 15001, 15001]
    assert [protocol(name).checkpoint_frequency("DomainNet") for name in PROTOCOLS] == [1000, 1000, 500, 500]


def test_emoes_protocol_is_gmoes_with_the_mixture_as_hyperparameters():
    gmoe = hparams.default_hparams("gmoe_fork", "GMOE", "PACS")
    emoe = hparams.default_hparams("emoe_fork", "GMOE", "PACS")
    assert emoe.items() > gmoe.items() and set(hparams.EMOE) <= set(emoe) - set(gmoe)
    assert (emoe["num_experts"], emoe["topk"], emoe["router"], emoe["lr"]) == (6, 1, "cosine_top", 3e-5)
    assert not set(hparams.EMOE_LARGE) - {"vit_type"} & set(emoe)  # read for the large network only
    drawn = [hparams.random_hparams("emoe_fork", "GMOE", "TerraIncognita", seed) for seed in range(40)]
    assert all(10**-4.5 <= draw["lr"] <= 10**-2.5 and draw["weight_decay"] == 0 for draw in drawn)
    assert {draw["resnet_dropout"] for draw in drawn} == {0.0, 0.1, 0.5} and {draw["topk"] for draw in drawn} == {1}
    assert drawn[3].items() > hparams.random_hparams("gmoe_fork", "GMOE", "TerraIncognita", 3).items()
    assert hparams.default_hparams("emoe_fork", "ERM", "CUB") == hparams.default_hparams("gmoe_fork", "ERM", "CUB")


def test_seed_zero_of_a_run_means_the_defaults():
    default = hparams.default_hparams("gmoe_fork", "GMOE", "VLCS")
    assert hparams.run_hparams("gmoe_fork", "GMOE", "VLCS", 0, 2) == default
    runs = [hparams.run_hparams("gmoe_fork", "GMOE", "VLCS", seed, trial) for seed in (1, 2) for trial in (0, 1)]
    assert len({run["lr"] for run in runs}) == 4 and {run["weight_decay"] for run in runs} == {0.0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hparams.default_hparams("domainbed", "ERM", "PACS"), "no protocol 'domainbed'"),
        (lambda: hparams.default_hparams("gmoe_fork", "GMoE", "PACS"), "Did you mean 'GMOE'"),
        (lambda: hparams.default_hparams("domainbed_head", "GMOE", "PACS"), "not tabled"),
        (lambda: hparams.default_hparams("domainbed_head", "CAD", "PACS"), "not tabled"),
        (lambda: hparams.default_hparams("domainbed_head", "ERM", "CUB"), "It belongs to: gmoe_fork"),
        (lambda: hparams.default_hparams("domainbed_2020", "ERM", "SVIRO"), "no data set 'SVIRO'"),
        (lambda: protocol("gmoe_fork").steps("PACSS"), "Did you mean 'PACS'"),
        (lambda: evaluation_steps(10, 0), "at least 1"),
        (lambda: steps_per_epoch([], 4), "at least 1"),
    ],
)
def test_names_and_numbers_that_do_not_exist(call, message):
    with pytest.raises(SpecError, match=message):
        call()


def test_schedule_of_evaluations():
    steps = evaluation_steps(5001, protocol("gmoe_fork").checkpoint_frequency("PACS"))
    assert len(steps) == 18 and steps[:2] == [0, 300] and steps[-1] == 5000
    assert evaluation_steps(5002, 1000)[-2:] == [5000, 5001] and evaluation_steps(1, 7) == [0]
    assert steps_per_epoch([100, 64, 80], 32) == 2


# Splits and sampling


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(0, 3), st.integers(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_a_split_is_a_partition(size, trial, env, holdout, uda):
    split = split_domain(size, trial, env, holdout, uda)
    assert sorted(np.concatenate(split).tolist()) == list(range(size))
    assert len(split.out) == int(size * holdout) and len(split.uda) == int((size - len(split.out)) * uda)
    assert np.array_equal(split.out, split_domain(size, trial, env, holdout).out)


def test_splits_depend_on_trial_and_domain():
    first = split_domain(50, 0, 0).out.tolist()
    assert first != split_domain(50, 1, 0).out.tolist() and first != split_domain(50, 0, 1).out.tolist()
    keys = list(range(50))
    np.random.RandomState(seed_hash(0, 0)).shuffle(keys)
    assert first == keys[:10]
    for bad in ({"holdout_fraction": 1.2}, {"uda_fraction": -0.1}):
        with pytest.raises(SpecError, match="from 0 to 1"):
            split_domain(10, 0, 0, **bad)


class Endless(torch.utils.data.Sampler):
    """Restarts a batch sampler for ever."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from self.sampler


def dataloader(size, batch, weights=None):
    """Torch's own loader on the global generator, as the protocol has it."""
    rows = torch.arange(size)
    if weights is None:
        sampler = torch.utils.data.RandomSampler(rows, replacement=True)
    else:
        sampler = torch.utils.data.WeightedRandomSampler(weights, batch, replacement=True)
    batches = Endless(torch.utils.data.BatchSampler(sampler, batch, drop_last=True))
    return iter(torch.utils.data.DataLoader(rows, num_workers=0, batch_sampler=batches))


@pytest.mark.parametrize("weighted", [False, True])
def test_domains_share_one_generator_as_torchs_loaders_do(weighted):
    sizes, batch = (7, 100, 33), 5
    chances = [np.arange(1, size + 1) / size if weighted else None for size in sizes]
    torch.manual_seed(3)
    loaders = [dataloader(size, batch, chance) for size, chance in zip(sizes, chances, strict=True)]
    expected = [[next(loader).tolist() for loader in loaders] for _ in range(60)]
    generator = torch.Generator().manual_seed(3)
    streams = [InfiniteBatches(size, batch, generator, chance) for size, chance in zip(sizes, chances, strict=True)]
    assert [[next(stream) for stream in streams] for _ in range(60)] == expected


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 3, 17])
def test_a_stream_goes_on_from_a_checkpoint(weighted, taken):
    weights = np.linspace(0, 1, 13) if weighted else None
    generator = torch.Generator().manual_seed(0)
    stream = InfiniteBatches(13, 4, generator, weights)
    for _ in range(taken):
        next(stream)
    state, random = json.loads(json.dumps(stream.state_dict())), generator.get_state()
    expected = list(itertools.islice(stream, 9))
    other = torch.Generator().manual_seed(99)
    resumed = InfiniteBatches(13, 4, other, weights)
    other.set_state(random)
    resumed.load_state_dict(state)
    assert list(itertools.islice(resumed, 9)) == expected


def test_balanced_sampling_draws_classes_equally():
    labels = np.array([7] * 90 + [2] * 10)
    weights = scores.balanced_weights(labels)
    assert weights.dtype == np.float32 and weights.sum() == pytest.approx(1)
    stream = InfiniteBatches(100, 50, torch.Generator().manual_seed(0), weights)
    drawn = labels[np.concatenate(list(itertools.islice(stream, 40)))]
    assert np.mean(drawn == 2) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "size, batch, weights, message",
    [
        (3, 4, None, "never fills a batch"),
        (0, 1, None, "at least 1"),
        (3, 0, None, "at least 1"),
        (3, 2, [1.0, 1.0], r"shape \(2,\) do not fit 3"),
        (2, 2, [0.0, 0.0], "not all 0"),
        (2, 2, [1.0, -1.0], "not negative"),
        (2, 2, [1.0, float("nan")], "finite"),
    ],
)
def test_streams_that_could_not_run(size, batch, weights, message):
    with pytest.raises(SpecError, match=message):
        InfiniteBatches(size, batch, torch.Generator(), weights)


def test_a_strange_state_is_refused():
    stream = InfiniteBatches(3, 2, torch.Generator())
    with pytest.raises(SpecError, match="epoch"):
        stream.load_state_dict({"epoch": 1})
    with pytest.raises(SpecError, match="2 batches into a pass, and 3 images give 1"):
        stream.load_state_dict({"seed": 1, "taken": 2})


# Accuracy


def test_accuracy_of_one_logit_and_of_half_precision():
    single = [(np.array([[0.5], [-1.0], [0.0]]), np.array([[1], [1], [0]]))]
    assert scores.accuracy(single) == pytest.approx(2 / 3)
    assert scores.accuracy([(single[0][0], np.array([1, 1, 0]))], [0.0, 1.0, 0.0]) == 0
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]], dtype=torch.bfloat16, requires_grad=True)
    assert scores.accuracy([(logits, torch.tensor([1, 1]))]) == 0.5


@pytest.mark.parametrize(
    "batches, weights, message",
    [
        ([], None, "not defined"),
        ([(np.zeros((2, 3)), np.zeros(2))], [1.0], "do not fit 2 samples"),
        ([(np.zeros((2, 3)), np.zeros(2))], [0.0, 0.0], "not defined"),
        ([(np.zeros((2, 3)), np.zeros((2, 1)))], None, r"Labels of shape \(2, 1\)"),
        ([(np.zeros(2), np.zeros(2))], None, r"not \[B, K\]"),
    ],
)
def test_accuracies_that_are_not_defined(batches, weights, message):
    with pytest.raises(SpecError, match=message):
        scores.accuracy(batches, weights)
    with pytest.raises(SpecError, match="no classes"):
        scores.balanced_weights(np.zeros(3))


# MNIST


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.sampled_from([0, 45, 60, 75, 90, 180, 270, 360, -90, -15, 450]), st.floats(-720, 720)),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 9),
)
def test_rotation_is_pillows(degrees, height, width, seed):
    from PIL import Image

    images = np.random.default_rng(seed).integers(0, 256, (3, height, width)).astype(np.uint8)
    expected = [
        np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=0)) for image in images
    ]
    assert np.array_equal(mnist.rotate_bilinear(images, degrees), np.stack(expected))


def test_rotation_works_in_blocks_on_any_number_of_images():
    images = np.random.default_rng(0).integers(0, 256, (1100, 28, 28)).astype(np.uint8)
    turned = mnist.rotate_bilinear(images, 15)
    assert np.array_equal(turned[1030:1031], mnist.rotate_bilinear(images[1030:1031], 15))
    assert mnist.rotate_bilinear(images[:0], 15).shape == (0, 28, 28)


def pool(count):
    rng = np.random.default_rng(1)
    return rng.integers(1, 256, (count, 28, 28)).astype(np.uint8), rng.integers(0, 10, count)


def test_environments_are_disjoint_and_complete():
    images, labels = pool(31)
    dealt = mnist.rotated_mnist(images, labels, torch.Generator().manual_seed(0))
    rows = np.concatenate([env.rows for env in dealt.environments])
    assert sorted(rows) == list(range(31)) and [len(env.rows) for env in dealt.environments] == [6, 5, 5, 5, 5, 5]
    assert np.array_equal(dealt.environments[0].x[:, 0], images[dealt.environments[0].rows])
    assert all(np.array_equal(env.y, labels[env.rows]) for env in dealt.environments)


def test_colours_follow_the_label_as_often_as_the_environment_says():
    images, labels = np.full((9000, 2, 2), 200, np.uint8), np.arange(9000) % 10
    dealt = mnist.colored_mnist(images, labels, torch.Generator().manual_seed(0))
    for env, flip in zip(dealt.environments, mnist.COLOUR_FLIPS, strict=True):
        lit = env.x.any(axis=(2, 3))
        assert (lit.sum(axis=1) == 1).all()
        assert np.mean(lit[:, 1] != env.y) == pytest.approx(flip, abs=0.03)
        assert np.mean(env.y != (labels[env.rows] < 5)) == pytest.approx(0.25, abs=0.03)
    pure = mnist.colored_mnist(images, labels, torch.Generator(), (0.0,), label_flip=0.0).environments[0]
    assert np.array_equal(pure.y, labels[pure.rows] < 5) and np.array_equal(pure.x[:, 1].any(axis=(1, 2)), pure.y)


def test_arrays_that_are_no_images():
    images, labels = pool(4)
    generator = torch.Generator()
    with pytest.raises(DataError, match="float64"):
        mnist.rotated_mnist(images / 255, labels, generator)
    with pytest.raises(DataError, match="do not fit 4 images"):
        mnist.rotated_mnist(images, labels[:3], generator)
    with pytest.raises(SpecError, match="no environment"):
        mnist.rotated_mnist(images, labels, generator, ())
    with pytest.raises(SpecError, match="from 0 to 1"):
        mnist.colored_mnist(images, labels, generator, (1.5,))


# Sweeps


@pytest.mark.parametrize("name", SETS)
def test_a_full_sweep_holds_out_every_domain_and_pair(name):
    domains = len(SETS[name].labels)
    jobs = sweep_jobs(Sweep(datasets=(name,), algorithms=("ERM",), data_dir="data"))
    assert len(jobs) == 3 * 20 * (domains + domains * (domains - 1) // 2)
    assert len({job.output_dir for job in jobs}) == len({job.train_args["seed"] for job in jobs}) == len(jobs)
    assert all(job.output_dir == f"sweep_out/{job_id(job.train_args)}" for job in jobs)


def test_jobs_of_ones_own_data_and_quoting():
    sweep = Sweep(
        datasets=("Mine",),
        algorithms=("ERM",),
        data_dir="it's here",
        n_trials=1,
        n_hparams=1,
        single_test_envs=True,
        environments={"Mine": 2},
    )
    jobs = sweep_jobs(sweep, "out")
    assert [job.train_args["test_envs"] for job in jobs] == [[0], [1]]
    assert """--data_dir 'it'"'"'s here' --dataset Mine""" in jobs[0].command
    assert held_out_sets(3) == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    with pytest.raises(SpecError, match="number of domains of 'Mine'"):
        sweep_jobs(sweep.model_copy(update={"environments": {}}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_hparams": 2, "n_hparams_from": 2},
        {"n_hparams_from": 30},
        {"hparams": "[1]"},
        {"hparams": "{"},
        {"trials": 1},
    ],
)
def test_sweeps_that_make_no_sense(wrong):
    with pytest.raises(ValidationError):
        Sweep(datasets=("PACS",), algorithms=("ERM",), data_dir="data", **wrong)


# Records


def record(test_envs=(0,), seed=0, step=0, ins=(0.5, 0.6, 0.7), outs=(0.4, 0.5, 0.6), trial=0, **args):
    args = {"dataset": "ColoredMNIST", "algorithm": "ERM", **args}
    accuracies = {f"env{i}_in_acc": value for i, value in enumerate(ins)}
    accuracies |= {f"env{i}_out_acc": value for i, value in enumerate(outs)}
    return {
        "args": {**args, "test_envs": list(test_envs), "hparams_seed": seed, "trial_seed": trial},
        "step": step,
        "hparams": {"lr": 10.0**-seed},
        **accuracies,
    }


def without(data, *keys):
    for key in keys:
        data.pop(key, None)
        data["args"].pop(key, None)
    return data


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "no `args`"),
        ({"step": 1}, "no `args`"),
        (without(record(), "step"), "lacks step"),
        (without(record(), "hparams_seed"), "lacks hparams_seed"),
        (without(record(), "dataset"), "no dataset"),
        (without(record(), "trial_seed"), "no trial_seed"),
        (without(record(), "env1_out_acc"), "lacks env1_out_acc"),
        (without(record(), "env2_out_acc"), "3 accuracies env.*in_acc and 2"),
        (record(ins=(), outs=()), "0 accuracies"),
        (record(test_envs=(3,)), "holds out domain 3, but has accuracies of 3"),
        (record(test_envs=()), r"test_envs \[\]"),
        (record(test_envs=(1, 1)), r"test_envs \[1, 1\]"),
        (record(test_envs=("0",)), "'0'"),
        (record(step=1.5), "has step 1.5"),
        (record(ins=(0.5, "0.6", 0.7)), "env1_in_acc '0.6'"),
    ],
)
def test_records_that_lack_something_say_what(data, message):
    with pytest.raises(DataError, match=message):
        parse_record(data, "results.jsonl, line 3,")


def write(folder, records, done=True, tail=""):
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(data) + "\n" for data in records) + tail)
    if done:
        (folder / "done").touch()


def test_folders_of_a_sweep_are_read(tmp_path):
    assert job_state(tmp_path / "a") == "not launched"
    write(tmp_path / "b", [record(step=0), record(step=100)])
    write(tmp_path / "a", [record(seed=1)], done=False, tail='{"step": 100, "args')
    (tmp_path / "empty").mkdir()
    runs = read_sweep(tmp_path)
    assert [(run.path.name, run.state, run.cut) for run in runs] == [("a", "incomplete", True), ("b", "done", False)]
    assert [r.step for r in records_of(runs)] == [0, 0, 100] and records_of(runs)[0].hparams == {"lr": 0.1}
    assert [run.path.name for run in read_sweep(tmp_path, only_done=True)] == ["b"]


def test_folders_that_cannot_be_read_name_the_place(tmp_path):
    with pytest.raises(NotFoundError, match="no folder"):
        read_sweep(tmp_path / "none")
    with pytest.raises(NotFoundError, match="has no run"):
        read_sweep(tmp_path)
    with pytest.raises(NotFoundError, match=r"no results\.jsonl"):
        read_run(tmp_path)
    write(tmp_path / "a", [record()], tail="{")
    with pytest.raises(DataError, match=r"results\.jsonl, line 2, is not JSON"):
        read_sweep(tmp_path)
    write(tmp_path / "b" / "c", [record(), without(record(), "env0_in_acc")], done=False)
    with pytest.raises(DataError, match=r"line 2, lacks env0_in_acc"):
        read_run(tmp_path / "b" / "c")
    write(tmp_path / "d" / "e", [record()], done=False)
    with pytest.raises(NotFoundError, match="no run that has ended"):
        read_sweep(tmp_path / "d", only_done=True)


# Selection


def parsed(*records):
    return [parse_record(data) for data in records]


def test_iid_refuses_several_held_out_domains():
    with pytest.raises(SpecError, match=r"holds out \[0, 1\]"):
        validation_accuracy(parsed(record(test_envs=(0, 1)))[0])
    assert run_choices(parsed(record(test_envs=(0, 1))), "iid")[0].accuracy is None
    with pytest.raises(DataError, match="no training domain"):
        validation_accuracy(parsed(record(ins=(0.5,), outs=(0.5,)))[0])


@pytest.mark.parametrize("method", ["iid", "oracle"])
def test_groups_are_not_mixed(method):
    with pytest.raises(DataError, match=r"different domains: \[0, 1\]"):
        run_choices(parsed(record(test_envs=(0,)), record(test_envs=(1,))), method)


def test_a_pair_of_other_domains_does_not_serve_leave_one_out():
    with pytest.raises(DataError, match="does not belong"):
        run_choices(parsed(record(test_envs=(0,)), record(test_envs=(1, 2))), "loo")
    with pytest.raises(SpecError, match="Allowed: iid, loo, oracle"):
        run_choices(parsed(record()), "best")


def test_the_three_methods_select_differently():
    runs = [
        record(step=0, ins=(0.1, 0, 0), outs=(0.2, 0.9, 0.9)),
        record(step=100, ins=(0.2, 0, 0), outs=(0.3, 0.5, 0.5)),
        record(step=200, ins=(0.3, 0, 0), outs=(0.1, 0.4, 0.4)),
    ]
    runs += [record((0, v), step=100, ins=(0, 0.8, 0.6)) for v in (1, 2)]
    chosen = {name: run_choices(parsed(*runs), name)[0].accuracy for name in ("iid", "loo", "oracle")}
    assert {name: (choice.step, choice.test) for name, choice in chosen.items()} == {
        "iid": (0, 0.1),
        "loo": (100, 0.2),
        "oracle": (200, 0.3),
    }
    assert chosen["loo"].val == pytest.approx(0.7) and chosen["oracle"].val == 0.1


def test_ranking_puts_nan_last_and_keeps_hparams():
    nan = float("nan")
    runs = parsed(
        record(seed=2, outs=(0, nan, nan)),
        record(seed=1, outs=(0, 0.3, 0.3)),
        record(seed=0, outs=(0, 0.3, 0.3), ins=(0.9, 0, 0)),
        record(seed=1, step=9, outs=(0, nan, 0.3)),
    )
    ranked = ranking(run_choices(runs, "iid"))
    assert [choice.hparams_seed for choice, _ in ranked] == [1, 0, 2]
    assert ranked[0][0].hparams == {"lr": 0.1} and sweep_accuracy(run_choices(runs, "iid")) == 0.5
    assert sweep_accuracy([]) is None


# Tables


def small_sweep(**args):
    return [
        parse_record(record((env,), trial=trial, ins=tuple(0.5 + (trial + env) / 100 for _ in range(3)), **args))
        for trial in range(3)
        for env in range(3)
    ]


def test_means_and_errors():
    report = collect(small_sweep(), ["iid"])
    assert report.records == 9 and [table.title for table in report.tables] == ["ColoredMNIST", "Averages"]
    row = report.tables[0].rows[0]
    assert [cell.mean for cell in row.cells] == pytest.approx([51, 52, 53])
    assert (
        row.cells[0].error == pytest.approx(100 * np.std([0.5, 0.51, 0.52]) / np.sqrt(3)) and row.cells[0].trials == 3
    )
    assert row.average == pytest.approx(52) and row.worst == pytest.approx(51)
    assert report.tables[1].rows[0].cells[0].mean == pytest.approx(52)


def test_formats_show_the_same_numbers():
    report = collect(small_sweep(algorithm="IB_ERM") + small_sweep(algorithm="My|<b>"), ["iid", "oracle"])
    text, markdown = render(report, "text"), render(report, "markdown")
    html, latex = render(report, "html"), render(report, "latex")
    for output in (text, markdown, html, latex):
        assert output.count("51.0") == 2 * 2 * 2 and "Worst" in output and output.endswith("\n")
    assert r"| My\|<b> | 51.0 ± 0.5 |" in markdown and "3 trials" in markdown
    assert "My|&lt;b&gt;" in html and "<b>" not in html
    assert r"IB\_ERM" in latex and r"\textbf{+90\%}" in latex and "% model selection method: test-domain" in latex
    lines = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert len(lines) == 2 * 2 * (3 + 1) and float(lines[0]["mean"]) == pytest.approx(51)
    assert {line["domain"] for line in lines} == {"+90%", "+80%", "-90%", "Avg"}


def test_a_single_trial_has_no_error():
    report = collect([item for item in small_sweep() if item.trial_seed == 0], ["iid"])
    assert "| ERM | 50.0 | 51.0 | 52.0 | 51.0 | 50.0 |" in render(report, "markdown")
    assert "50.0 +/- 0.0" in render(report, "text", compat=True) and "+/-" not in render(report, "text")
    assert ",ERM,+90%,50.0,,1\n" in render(report, "csv")


def test_compat_cuts_what_ours_keeps():
    name = "AnAlgorithmWithAVeryLongName"
    report = collect(small_sweep(dataset="WILDSCamelyon_of_our_own_hospital", algorithm=name), ["iid"])
    official, ours = render(report, "latex", compat=True), render(report, "latex")
    assert r"\textbf{WILDSCamelyon_of_" in official and r"\textbf{WILDSCamelyon_of_our_own" not in official
    assert r"\textbf{WILDSCamelyon\_of\_our\_own\_hospital}" in ours
    for output in (render(report, "text", compat=True), official):
        assert name not in output and name[:20] in output
    assert name in render(report, "text") and name in ours
    balance = [line.count("{") - line.count("}") for line in ours.splitlines() if "textbf" in line]
    assert balance == [0, 0]


def test_missing_cells_stay_visible():
    records = [r for r in small_sweep() if r.test_envs != (1,)] + small_sweep(algorithm="IRM")
    first = collect(records, ["iid"]).tables[0]
    assert [row.algorithm for row in first.rows] == ["ERM", "IRM"]
    assert first.rows[0].cells[1] is None and first.rows[0].average is None and first.rows[0].worst is None
    assert ",ERM,+80%,,,0\n" in render(collect(records, ["iid"]), "csv")


def test_sets_of_ones_own_have_columns():
    own = small_sweep(dataset="Mine")
    assert collect(own, ["iid"]).tables[0].columns == ("env0", "env1", "env2")
    assert collect(own, ["iid"], {"Mine": ["x", "y", "z"]}).tables[0].columns == ("x", "y", "z")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: collect([]), DataError, "no records"),
        (lambda: collect(small_sweep(dataset="PACS")), DataError, r"\[3\] domains, and it has 4: A, C, P, S"),
        (lambda: collect([parse_record(record(dataset=""), grouped=False)]), DataError, "does not say its data set"),
        (lambda: collect(small_sweep(), ["all"]), SpecError, "no selection method 'all'"),
        (lambda: render(collect(small_sweep()), "word"), SpecError, "no format 'word'"),
        (lambda: render(collect(small_sweep()), "html", compat=True), SpecError, "does not print html"),
    ],
)
def test_tables_that_cannot_be_made(call, error, message):
    with pytest.raises(error, match=message):
        call()
