"""DomainBed's image sets on disk: official order, every rule of the layout, splits, stand-ins, archives."""

import shutil
import tarfile
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from moe.errors import DataError, NotFoundError
from workers import catalogue
from workers.datasets import _folder_index, domainnet, pacs
from workers.datasets.base import DATASETS
from workers.domainbed.benchmark_sets import SETS
from workers.transforms import transform_for

FOLDERS = {
    "pacs": "PACS",
    "vlcs": "VLCS",
    "officehome": "OfficeHome",
    "terraincognita": "TerraIncognita",
    "domainnet": "DomainNet",
    "sviro": "SVIRO",
    "cub_dg": "CUB",
}
POOLED = {"wilds_camelyon": "WILDSCamelyon", "wilds_fmow": "WILDSFMoW"}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """name -> data root with its stand-in, written once."""

    @cache
    def root_of(name):
        root = tmp_path_factory.mktemp(name)
        DATASETS.load(name).miniature(root, 0)
        return root

    return root_of


@pytest.fixture
def set_at(generated, tmp_path):
    """A copy of PACS's stand-in that a test may break: (data root, folder)."""
    shutil.copytree(generated("pacs") / "PACS", tmp_path / "PACS")
    return tmp_path, tmp_path / "PACS"


def load(name, root, **options):
    module = DATASETS.load(name)
    return module.load(root, module.Options(**options))


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_stand_as_torchvision_reads_them(name, generated):
    from torchvision.datasets import ImageFolder

    entry, data = SETS[FOLDERS[name]], load(name, generated(name))
    folder = generated(name) / entry.folder
    paths, labels, domains = [], [], []
    for number, domain in enumerate(sorted(place.name for place in folder.iterdir() if place.is_dir())):
        official = ImageFolder(folder / domain)
        assert tuple(official.classes) == data.value_names["y"]
        paths += [Path(path) for path, _ in official.samples]
        labels += official.targets
        domains += [number] * len(official)
    assert [folder / path for path in data.images.names] == paths
    assert data.labels.tolist() == labels and data.labels.dtype == np.int64
    assert data.column("domain").tolist() == domains
    first, image = official.samples[0], data.images[len(paths) - len(official)]
    assert np.array_equal(image, np.asarray(official.loader(first[0]))) and 200 <= len(paths) <= 400


@pytest.mark.parametrize("name", [*FOLDERS, *POOLED])
def test_a_set_agrees_with_the_benchmarks_table(name, generated, tmp_path):
    module = DATASETS.load(name)
    entry = SETS[{**FOLDERS, **POOLED}[name]]
    domains = get_args(module.Domain)
    assert domains == (entry.domains or entry.labels) and module.INFO.num_outputs == entry.classes
    assert (module.INFO.task, module.INFO.normalisation) == ("multiclass", "imagenet")
    gaps = module.missing(tmp_path)
    assert gaps and all("data miniature" in gap.fix for gap in gaps) and not list(tmp_path.iterdir())
    with pytest.raises(NotFoundError, match="missing"):
        load(name, tmp_path)
    assert transform_for(module.INFO, None, train=False).spec.size == (224, 224)
    if name in FOLDERS:
        assert catalogue.verify(name, generated(name), sample=8).ok


def test_splits_hold_out_what_is_asked(generated):
    root = generated("pacs")
    data = load("pacs", root, target=("sketch", "photo"), validation="cartoon", per_domain=20)
    names = {
        split: {data.value_names["domain"][d] for d in data.column("domain", r)} for split, r in data.splits.items()
    }
    assert names["train"] == names["id_val"] == {"art_painting"} and names["val"] == {"cartoon"}
    assert names["test"] == names["test_support"] == {"sketch", "photo"}
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 16,
        "id_val": 4,
        "val": 20,
        "test_support": 20,
        "test": 20,
    }
    one, other = load("pacs", root, target="photo"), load("pacs", root, target="sketch")
    kept = np.flatnonzero(one.column("domain") == 0)
    assert np.array_equal(np.intersect1d(one.splits["train"], kept), np.intersect1d(other.splits["train"], kept))
    assert np.array_equal(one.splits["val"], one.splits["id_val"]) and one.digest != other.digest
    assert one.digest == load("pacs", root, target="photo").digest != load("pacs", root, target="photo", seed=1).digest


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "drawing"}, "sketch"),
        ({"target": ()}, "at least one domain"),
        ({"target": ("photo", "photo")}, "each named once"),
        ({"target": ("photo", "sketch"), "validation": "sketch"}, "target as well"),
        ({"id_fraction": 1.0}, "less than 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValidationError, match=message):
        pacs.Options(**options)


def test_nothing_left_to_train_on(generated):
    with pytest.raises(DataError, match="no domain is left to train on"):
        load("pacs", generated("pacs"), target=("sketch", "photo", "cartoon"), validation="art_painting")


def test_a_missing_domain(set_at):
    root, folder = set_at
    shutil.rmtree(folder / "cartoon")
    assert [gap.what for gap in pacs.missing(root)] == [f"domain folder {folder / 'cartoon'}"]
    with pytest.raises(NotFoundError, match=r"missing domain folder .*cartoon"):
        load("pacs", root)


def test_a_stray_folder_is_no_domain(set_at):
    root, folder = set_at
    (folder / ".cache").mkdir()
    load("pacs", root)
    (folder / "splits").mkdir()
    with pytest.raises(DataError, match=r"no domains of PACS: splits\.") as caught:
        load("pacs", root)
    assert "art_painting, cartoon, photo, sketch" in caught.value.hint
    with pytest.raises(DataError, match="splits"):
        pacs.fingerprint(root, pacs.Options())


def test_unequal_class_lists(set_at):
    root, folder = set_at
    (folder / "photo" / "dog").rename(folder / "photo" / "dogs")
    with pytest.raises(DataError, match=r"photo: .* differ from those of art_painting: it lacks dog and adds dogs\."):
        load("pacs", root)


def test_the_number_of_classes(set_at):
    root, folder = set_at
    for domain in get_args(pacs.Domain):
        shutil.rmtree(folder / domain / "dog")
    assert load("pacs", root).value_names["y"][0] == "elephant"  # a stand-in may show some of the classes
    (folder / "MINIATURE.json").unlink()
    with pytest.raises(DataError, match="6 class folders, and PACS has 7 classes"):
        load("pacs", root)


def test_an_empty_class(set_at):
    root, folder = set_at
    for path in (folder / "sketch" / "horse").iterdir():
        path.unlink()
    (folder / "sketch" / "horse" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"sketch/horse: the class folder has no image"):
        load("pacs", root)


@pytest.mark.parametrize("keep", [0, 300])
def test_a_corrupt_image_is_named_when_it_is_decoded(set_at, keep):
    root, folder = set_at
    path = folder / "photo" / "dog" / "dog_003.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    data = load("pacs", root)
    row = data.images.names.index("photo/dog/dog_003.jpg")
    with pytest.raises(DataError, match=r"photo/dog/dog_003\.jpg: image cannot be decoded"):
        data.images[row]
    assert data.images[row + 1].dtype == np.uint8


def test_the_sets_own_folder_works_as_data_root(set_at):
    root, folder = set_at
    assert load("pacs", folder).digest == load("pacs", root).digest
    (root / "PACS" / "kfold").mkdir()
    for domain in get_args(pacs.Domain):
        (folder / domain).rename(folder / "kfold" / domain)
    with pytest.raises(NotFoundError, match=r"missing domains in .*PACS") as caught:
        load("pacs", root)
    assert f"They lie in {folder / 'kfold'}" in caught.value.hint


def test_the_kept_index_follows_the_files(set_at, monkeypatch):
    root, folder = set_at
    before = pacs.fingerprint(root, pacs.Options())
    with monkeypatch.context() as patch:
        patch.setattr(_folder_index, "_domain", lambda *arguments: pytest.fail("the folders were walked again"))
        assert pacs.fingerprint(root, pacs.Options()) == before
    shutil.copy(folder / "photo" / "dog" / "dog_000.jpg", folder / "photo" / "dog" / "dog_000b.jpg")
    data = load("pacs", root)
    assert pacs.fingerprint(root, pacs.Options()) != before and "photo/dog/dog_000b.jpg" in data.images.names
    (folder / "photo" / "dog" / "dog_000b.jpg").unlink()
    (folder / _folder_index.KEPT).write_text("{damaged")
    assert pacs.fingerprint(root, pacs.Options()) == before


def test_nested_folders_and_other_files(set_at):
    root, folder = set_at
    (folder / "photo" / "dog" / "b").mkdir()
    (folder / "photo" / "dog" / "dog_005.jpg").rename(folder / "photo" / "dog" / "b" / "A.JPEG")
    (folder / "photo" / "readme.txt").write_text("not a class")
    data = load("pacs", root)
    names = [name for name in data.images.names if name.startswith("photo/dog/")]
    assert (
        names[-1] == "photo/dog/b/A.JPEG" and len(names) == 10 and data.images[data.images.names.index(names[-1])].any()
    )


def test_domainnets_duplicates(generated, tmp_path, monkeypatch):
    shutil.copytree(generated("domainnet") / "domain_net", tmp_path / "domain_net")
    whole = load("domainnet", tmp_path)
    assert "domain_net_duplicates.txt" in domainnet.optional(tmp_path)[0].fix
    monkeypatch.setattr(domainnet, "_WITHOUT", len(whole.labels) - 2)
    with pytest.warns(UserWarning, match="252 images, 2 more than without duplicates"):
        load("domainnet", tmp_path)
    listed = ["clipart/angel/angel_001.jpg", "real/axe/axe_000.jpg", "real/axe/gone_already.jpg"]
    (tmp_path / "domainnet_duplicates.txt").write_text("\n".join(listed) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load("domainnet", tmp_path)
    assert set(whole.images.names) - set(data.images.names) == set(listed[:2])
    assert data.digest != whole.digest and domainnet.optional(tmp_path) == []
    print_ = domainnet.fingerprint(tmp_path, domainnet.Options())
    (tmp_path / "domainnet_duplicates.txt").write_text("clipart/angel/angel_002.jpg\nreal/axe/axe_000.jpg\n")
    assert domainnet.fingerprint(tmp_path, domainnet.Options()) != print_  # as many, but others
    (tmp_path / "domainnet_duplicates.txt").write_text("clipart/angel/a.jpg\n/etc/passwd\n")
    with pytest.raises(DataError, match=r"entry 2 is '/etc/passwd'"):
        load("domainnet", tmp_path)


def test_a_stand_in_is_reproducible_and_replaces_nothing_real(generated, tmp_path):
    pacs.miniature(tmp_path, 0)
    assert pacs.fingerprint(tmp_path, pacs.Options()) == pacs.fingerprint(generated("pacs"), pacs.Options())
    first = load("pacs", tmp_path)
    assert np.array_equal(first.images[5], load("pacs", generated("pacs")).images[5])
    assert first.value_names["_miniature"] == ("yes",)
    pacs.miniature(tmp_path, 1)
    assert load("pacs", tmp_path).digest != first.digest
    (tmp_path / "PACS" / "MINIATURE.json").unlink()
    with pytest.raises(DataError, match="left alone"):
        pacs.miniature(tmp_path, 0)
    assert load("pacs", tmp_path).images[0].any()


def test_a_stand_in_can_be_learnt_and_shifts(generated):
    """Nearest neighbours on small grey pictures: better than chance inside the domains, worse on the unseen one."""
    from sklearn.neighbors import KNeighborsClassifier

    from workers.domainbed.augment import resized

    data = load("pacs", generated("pacs"), target="sketch")
    pixels = np.stack([resized(data.images[row], 12).astype(np.float64).ravel() for row in range(len(data.labels))])
    train, known, unseen = (data.splits[name] for name in ("train", "id_val", "test"))
    model = KNeighborsClassifier(3).fit(pixels[train], data.labels[train])
    inside, outside = (np.mean(model.predict(pixels[rows]) == data.labels[rows]) for rows in (known, unseen))
    assert inside > 2 / 7 > 0.2 and outside < inside


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_an_archive_may_wrap_the_domains(generated, tmp_path, kind):
    source = generated("vlcs") / "VLCS"
    archive, root = tmp_path / f"release.{kind}", tmp_path / "root"
    if kind == "folder":
        shutil.copytree(source, archive / "inner" / "vlcs_release")
    elif kind == "tar":
        with tarfile.open(archive, "w") as tar:
            tar.add(source, "inner/vlcs_release")
    else:
        with zipfile.ZipFile(archive, "w") as pack:
            for path in source.rglob("*.jpg"):
                pack.write(path, Path("inner/vlcs_release") / path.relative_to(source))
    assert catalogue.import_archive("vlcs", archive, root) == root / "VLCS"
    assert len(load("vlcs", root).labels) == 280 and not list(root.glob(".*"))
    with pytest.raises(DataError, match="exists already"):
        catalogue.import_archive("vlcs", archive, root)
    with pytest.raises(DataError, match="no folder in it holds art_painting"):
        catalogue.import_archive("pacs", archive, root)
    with pytest.raises(NotFoundError, match="does not exist"):
        catalogue.import_archive("pacs", tmp_path / "no.tar", root)
    assert not (root / "PACS").exists() and not list(root.glob(".*"))


@pytest.mark.parametrize("name, wilds, column", [("wilds_camelyon", "camelyon17", 0), ("wilds_fmow", "fmow", 0)])
def test_wilds_sets_are_pooled_by_hospital_and_region(name, wilds, column, generated):
    root = generated(name)
    plain, data = load(wilds, root), load(name, root)
    assert len(data.labels) == len(plain.labels) and np.array_equal(data.metadata, plain.metadata)
    assert data.info.domain_field == data.fields[column]
    domains = data.column(data.info.domain_field)
    pooled = np.concatenate([plain.splits["train"], plain.splits["val"], plain.splits["test"]])
    for number in range(len(data.value_names[data.info.domain_field])):
        rows = np.flatnonzero(domains == number)
        assert len(rows) and len(np.intersect1d(rows, pooled))
    assert set(domains[data.splits["test"]]) == {2} and 2 not in domains[data.splits["train"]]
    assert data.digest not in (plain.digest, load(name, root, seed=1).digest)
