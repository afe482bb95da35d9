import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moe.adaptation.base import make
from moe.backbones import build_student
from moe.errors import CheckpointError, DataError, NotFoundError, SpecError
from moe.specs import BackboneSpec, StudentMoESpec
from orchestrator.runs import RunStore
from orchestrator.spec import API_VERSION, PipelineSpec, StageSpec
from orchestrator.store import Key, Store
from serve.delta import Delta
from serve.experts import ExpertBank
from serve.info import ServedInfo
from serve.loading import locate, write_bundle
from serve.mixed import MixedTwin
from serve.model import ServedModel
from tests.serve import making
from workers.modelfile import MODEL_FILE, model_meta, save_aggregator, save_tensors

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def images(served_model, domain_images):
    return served_model.preprocess(domain_images(30, 24)[0])


def alone(model, images, deltas):
    return torch.cat([model.predict(images[row : row + 1], [delta]) for row, delta in enumerate(deltas)])


def wrap(student, size=32, channels=3):
    """A served model of any student, without files."""
    transform = {"normalisation": "unit", "size": (size, size), "channels": channels}
    outputs = student.classifier[0].out_features
    names = tuple(map(str, range(outputs)))
    info = ServedInfo("x", "0" * 64, "multiclass", outputs, names, channels, (size, size), transform, 0, {})
    return ServedModel(info, student)


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_bundle_brings_everything(served_model, domain_images):
    info = served_model.info
    assert (info.name, info.task, info.outputs, info.channels, info.image_size) == (
        "digits",
        "multiclass",
        10,
        1,
        (28, 28),
    )
    assert info.class_names[3] == "three" and info.experts == 3 and len(info.version) == 64
    assert info.methods["distill"] is None and info.methods["bn"] is None
    assert served_model.defaults["distill"]["steps"] == 3
    found, labels = domain_images(30, 200)
    accuracy = (served_model.predict(served_model.preprocess(found)).argmax(1).numpy() == labels).mean()
    assert accuracy > 0.8


@pytest.mark.parametrize("method", ["bn", "tent", "distill"])
def test_adaptation_to_a_new_angle_helps(served_model, domain_images, method):
    found, labels = domain_images(90, 300)
    support = served_model.preprocess(domain_images(90, 100, 1250)[0])
    adapted = make(method, served_model.defaults.get(method)).adapt(
        served_model.private_base(), support, served_model.tokens(support), served_model.aggregator
    )
    delta = Delta.changed(served_model.state_dict(), adapted.delta)
    delta.check_fits(served_model)
    x = served_model.preprocess(found)
    before, after = ((served_model.predict(x, d).argmax(1).numpy() == labels).mean() for d in (None, delta))
    assert after > before + 0.02
    assert served_model.shares_pass(delta) == (method != "distill")


def test_a_student_of_a_store_finds_its_experts(served_folder, served_model, tmp_path):
    store = Store.open(tmp_path / "store")
    bundle = locate(str(served_folder))

    def commit(kind, network, meta, key=None, more=()):
        folder = store.staging()
        for name in (MODEL_FILE, *more):
            shutil.copyfile(network.folder / name, folder / name)
        return store.commit(folder, kind, meta, key)

    experts = [commit("model", e, {**e.meta, "domains": [n]}) for n, e in enumerate(bundle.experts)]
    features = []
    for expert in experts:
        folder = store.staging()
        (folder / "x").write_text(expert.digest)
        features.append(store.commit(folder, "features", {"expert": expert.digest}))
    arriving = " ".join(f"group={n}@{f.digest}" for n, f in enumerate(features))
    folder = store.staging()
    (folder / "value_names.json").write_text(json.dumps({"y": making.NAMES}))
    data = store.commit(folder, "data", {"dataset": "rotated14"})
    meta = {k: v for k, v in bundle.student.meta.items() if k not in ("name", "class_names")}
    student = commit(
        "student",
        bundle.student,
        meta,
        Key("a" * 64, {"input.features": arriving, "input.data": f"@{data.digest}"}),
        ("aggregator.safetensors",),
    )
    model = ServedModel.load(student.digest[:10], str(tmp_path / "store"), name="Digits & co")
    assert model.info.name == "Digits-co" and model.info.version == student.digest
    assert model.info.experts == 3 and model.info.methods["distill"] is None
    assert model.info.class_names == making.NAMES  # those of the data that it was trained on
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(model.tokens(x), served_model.tokens(x)) and torch.equal(
        model.predict(x), served_model.predict(x)
    )
    again = tmp_path / "again"
    digest = write_bundle(locate(student.digest, store.url), again)
    copied = ServedModel.load(str(again)).info
    assert copied.version == digest and copied.class_names == making.NAMES
    with pytest.raises(SpecError, match="'features'"):
        ServedModel.load(features[0].digest, store.url)
    lonely = ServedModel.load(str(store.local_path(student)))
    assert "no store" in lonely.info.methods["distill"] and lonely.info.methods["bn"] is None
    assert lonely.info.class_names == tuple("0123456789")
    with pytest.raises(SpecError, match="no experts"):
        lonely.tokens(x)


def test_a_run_gives_its_student_or_the_member_that_is_named(served_folder, tmp_path):
    store = Store.open(tmp_path / "store")
    parts = locate(str(served_folder))
    made = {}
    for node, kind, source in (("erm/seed=0", "model", parts.experts[0]), ("distill/seed=0", "student", parts.student)):
        folder = store.staging()
        shutil.copyfile(source.folder / MODEL_FILE, folder / MODEL_FILE)
        meta = {key: value for key, value in source.meta.items() if key not in ("aggregator", "name")}
        made[node] = store.commit(folder, kind, meta).digest
    spec = PipelineSpec(apiVersion=API_VERSION, name="digits", stages={"erm": StageSpec(kind="train")})
    run = RunStore(store).create(spec)
    for node, digest in made.items():
        run.record("member-finished", node, digest=digest)
    for source in (run.id, "latest"):  # also while it goes on
        assert locate(source, store.url).version == made["distill/seed=0"]
    assert locate(f"{run.id}/erm/seed=0", store.url).version == made["erm/seed=0"]
    run.finish("finished", made)
    model = ServedModel.load(run.id, store.url)
    assert model.info.name == "digits" and "no aggregator" in model.info.methods["distill"]
    with pytest.raises(NotFoundError, match="no finished member"):
        locate(f"{run.id}/erm/seed=7", store.url)


def test_what_cannot_be_loaded(served_folder, tmp_path):
    store = str(tmp_path / "store")
    for source in ("no-such-run", "a" * 64, str(tmp_path), "models:/digits@champion"):
        with pytest.raises(NotFoundError):
            ServedModel.load(source, store)
    with pytest.raises(SpecError, match="models:/NAME@ALIAS"):
        ServedModel.load("models:/a/b/c", store)
    with pytest.raises(SpecError, match="not empty"):
        write_bundle(locate(str(served_folder)), served_folder)
    for damage in ("model.safetensors", "experts/1/model.safetensors", "manifest.json"):
        copy = tmp_path / damage.replace("/", "-")
        shutil.copytree(served_folder, copy)
        (copy / damage).write_bytes((copy / damage).read_bytes()[:-100])
        with pytest.raises(CheckpointError):
            ServedModel.load(str(copy))


def test_experts_of_another_width_leave_everything_but_distillation(served_folder, tmp_path):
    parts = locate(str(served_folder))
    wide = BackboneSpec(name="tiny_cnn", channels=1, width=2)
    folder = tmp_path / "narrow"
    save_tensors(folder / MODEL_FILE, build_student(wide, 10).state_dict())
    narrow = type(parts.student)(folder, model_meta("student", wide, 10, 32, "rotated14"))
    model = ServedModel.from_parts(type(parts)("x", "0" * 64, parts.student, [narrow]))
    assert "32 wide" in model.info.methods["distill"] and model.info.methods["tent"] is None


# ---- images ----------------------------------------------------------------------------------------------------------


def test_uploads_of_any_size_and_colour(served_model):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (28, 28), dtype=np.uint8)
    plain = served_model.preprocess([grey])
    assert plain.shape == (1, 1, 28, 28) and plain.dtype == torch.float32
    rgb = np.repeat(grey[..., None], 3, 2)
    rgba = np.concatenate([rgb, np.full((28, 28, 1), 7, np.uint8)], 2)
    for same in (grey[..., None], rgb, rgba, np.stack([grey, grey], 2)):
        assert torch.equal(served_model.preprocess([same]), plain)
    mixed = served_model.preprocess([grey, rng.integers(0, 256, (300, 40, 3), dtype=np.uint8)])
    assert mixed.shape == (2, 1, 28, 28) and torch.equal(mixed[:1], plain)


def test_images_that_cannot_be_read(served_model, images):
    for wrong in ([], [np.zeros((4, 4, 4, 4), np.uint8)], [np.zeros((28, 28), np.int64)]):
        with pytest.raises(DataError):
            served_model.preprocess(wrong)
    broken = images.clone()
    broken[1, 0, 3, 3] = float("nan")
    for wrong in (broken, images[:, :, :20], images[:0], images[0], images.to(torch.uint8), images.repeat(1, 3, 1, 1)):
        with pytest.raises(DataError):
            served_model.check_images(wrong)
    served_model.check_images(images)
    for wrong in (images[:, :, :20], images[:0], images[0]):
        with pytest.raises(DataError):
            served_model.predict(wrong)
    with pytest.raises(SpecError, match="24 images and 2 states"):
        served_model.predict(images, [None, None])


# ---- mixed batches ---------------------------------------------------------------------------------------------------


def test_rows_of_many_domains_are_what_they_are_alone(served_model, images, make_delta):
    norms = [make_delta(seed) for seed in range(6)]
    others = [make_delta(7, "classifier"), make_delta(8, "features"), make_delta(9, "running_mean"), Delta({}), None]
    each = [(norms + others)[row % 11] for row in range(24)]
    together = served_model.predict(images, each)
    torch.testing.assert_close(together, alone(served_model, images, each), **CLOSE)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    shuffled = served_model.predict(images[order], [each[row] for row in order])
    torch.testing.assert_close(shuffled, together[order], **CLOSE)


def test_states_matter(served_model, images, make_delta):
    one, two = make_delta(1), make_delta(2)
    found = served_model.predict(images, [one, two] * 12)
    base = served_model.predict(images)
    assert (found - base).abs().max() > 1e-2 and (
        found[0] - served_model.predict(images[:1], two)[0]
    ).abs().max() > 1e-3


def test_a_neighbour_with_absurd_values_changes_nothing(served_model, images, make_delta):
    wild = Delta({name: value * 1e4 for name, value in make_delta(1).tensors.items()})
    each = [make_delta(2), None, make_delta(3)]
    quiet = served_model.predict(images[:3], each)
    noisy = images[:5].clone()
    noisy[3:] = 1e6
    torch.testing.assert_close(served_model.predict(noisy, [*each, wild, None])[:3], quiet, **CLOSE)


def test_the_base_is_never_changed(served_model, images, make_delta):
    before = {name: value.clone() for name, value in served_model.state_dict().items()}
    first = served_model.predict(images)
    served_model.predict(images, [make_delta(1), make_delta(2, "features")] * 12)
    private = served_model.private_base()
    make("distill", {"inner_lr": 0.1}).adapt(private, images, served_model.tokens(images), served_model.aggregator)
    assert all(torch.equal(before[name], value) for name, value in served_model.state_dict().items())
    assert torch.equal(served_model.predict(images), first)
    assert all(p.requires_grad for p in private.parameters())
    shared = dict(private.named_parameters())
    assert all(p.data_ptr() == shared[name].data_ptr() for name, p in served_model.base.named_parameters())


def test_threads_do_not_see_each_others_states(served_model, images, make_delta):
    deltas = [None, make_delta(1), make_delta(2, "features"), make_delta(3, "classifier")]
    wanted = [served_model.predict(images, delta) for delta in deltas]
    mixed = [deltas[row % 4] for row in range(24)]
    wanted_mixed = served_model.predict(images, mixed)
    stop = threading.Event()

    def adapt():
        while not stop.is_set():
            base = served_model.private_base()
            make("distill", {"inner_lr": 0.5}).adapt(base, images, served_model.tokens(images), served_model.aggregator)

    def check(number):
        found = served_model.predict(images, deltas[number % 4])
        whole = served_model.predict(images, mixed)
        return torch.equal(found, wanted[number % 4]) and torch.equal(whole, wanted_mixed)

    noise = threading.Thread(target=adapt)
    noise.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(check, range(40)))
    finally:
        stop.set()
        noise.join()


ARCHITECTURES = {
    "resnet18": ("torchvision:resnet18", {}, True),
    "vit": ("timm:vit_tiny_patch16_224", {"image_size": 32}, True),
    "convnext": ("timm:convnext_atto", {}, True),
    "efficientnet": ("timm:efficientnet_lite0", {}, True),
    "swin": ("timm:swin_tiny_patch4_window7_224", {"image_size": 64}, None),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_share_a_pass_or_fall_back_with_the_same_numbers(name):
    backbone, options, shares = ARCHITECTURES[name]
    torch.manual_seed(0)
    student = build_student(BackboneSpec(name=backbone, **options), 5).eval()
    size = options.get("image_size", 32)
    model = wrap(student, size)
    if shares is not None:
        assert bool(model._by_row) == shares
    generator = torch.Generator().manual_seed(1)
    own = model.state_dict()
    names = [n for n in MixedTwin(student).by_row if own[n].is_floating_point()]
    assert len(names) > 10
    deltas = [
        Delta({n: own[n] * (0.9 + 0.2 * torch.rand(own[n].shape, generator=generator)) for n in names})
        for _ in range(3)
    ]
    x = torch.rand(5, 3, size, size, generator=generator)
    each = [deltas[0], None, deltas[1], deltas[0], deltas[2]]
    torch.testing.assert_close(model.predict(x, each), alone(model, x, each), **CLOSE)


def test_a_student_with_a_block_of_experts(make_delta):
    torch.manual_seed(0)
    moe = StudentMoESpec(num_experts=4, top_k=1)
    student = build_student(BackboneSpec(name="tiny_cnn", channels=1, width=4), 10, moe).eval()
    for name, parameter in student.named_parameters():
        if ".w2." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model = wrap(student, 28, 1)
    assert "moe.norm.weight" in model._by_row
    x = torch.rand(6, 1, 28, 28)
    each = [make_delta(1), None, make_delta(2), make_delta(1), None, make_delta(3)]
    torch.testing.assert_close(model.predict(x, each), alone(model, x, each), **CLOSE)


class _GroupsAndFlat(torch.nn.Sequential):
    """GroupNorm on maps and BatchNorm1d on vectors."""

    def __init__(self):
        conv, flat = torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten()
        super().__init__(conv, torch.nn.GroupNorm(2, 8), torch.nn.AdaptiveAvgPool2d(2), flat, torch.nn.BatchNorm1d(32))


def test_group_norm_and_flat_batch_norm():
    from moe.student import Student

    model = wrap(Student(_GroupsAndFlat(), torch.nn.Linear(32, 4)).eval(), 8, 3)
    assert len(model._by_row) == 9  # weight and bias of both and of the head, statistics and their count
    own = model.state_dict()
    deltas = [Delta({n: own[n] + torch.rand(own[n].shape) for n in own if n in model._by_row and own[n].ndim})] * 2
    deltas.append(Delta({n: 2 * v for n, v in deltas[0].tensors.items()}))
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(model.predict(x, deltas), alone(model, x, deltas), **CLOSE)


class _TokensFirst(torch.nn.Module):
    """A norm layer that sees another axis first: must be found out and not be shared."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(9)

    def forward(self, x):
        return self.norm(x.flatten(2).transpose(0, 1)).transpose(0, 1).flatten(1)


def test_a_layer_without_the_batch_in_front_falls_back():
    from moe.student import Student

    student = Student(_TokensFirst(), torch.nn.Linear(27, 4)).eval()
    model = wrap(student, 3, 3)
    assert not model._by_row
    deltas = [Delta({"features.norm.weight": torch.rand(9)}) for _ in range(3)]
    x = torch.rand(3, 3, 3, 3)  # three channels and three rows: the shapes alone do not tell
    torch.testing.assert_close(model.predict(x, deltas), alone(model, x, deltas), **CLOSE)


def test_tokens_in_pieces_and_of_every_expert(served_model, images):
    whole = served_model.tokens(images)
    assert whole.shape == (24, 3, 64) and not whole.requires_grad
    torch.testing.assert_close(served_model.tokens(images, batch_size=5), whole, **CLOSE)
    torch.testing.assert_close(whole[:, 1], served_model.experts[1].extract(images), **CLOSE)


def test_the_aggregator_is_written_with_the_bundle(served_folder, served_model, tmp_path):
    save_aggregator(tmp_path, served_model.aggregator)
    assert (tmp_path / "aggregator.safetensors").read_bytes() == (served_folder / "aggregator.safetensors").read_bytes()


def test_stacked_experts_give_the_same_tokens_without_new_memory(served_folder, served_model, images):
    model = ServedModel.load(str(served_folder))
    bank = ExpertBank(model.experts, stacked=True)
    assert bank.stacked and not ExpertBank(served_model.experts).stacked
    torch.testing.assert_close(bank(images), served_model.tokens(images), **CLOSE)
    first, second = (dict(expert.named_parameters()) for expert in model.experts[:2])
    name = "features.0.0.weight"
    assert first[name].untyped_storage().data_ptr() == second[name].untyped_storage().data_ptr()
    torch.testing.assert_close(model.tokens(images), served_model.tokens(images), **CLOSE)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, bank(images)) for found in pool.map(bank, [images] * 8))


def test_experts_of_two_architectures_are_not_stacked(served_model):
    other = build_student(BackboneSpec(name="tiny_cnn", channels=1, width=2), 10).eval()
    assert not ExpertBank([served_model.experts[0], other], stacked=True).stacked
