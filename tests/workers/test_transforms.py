import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as reference
from torchvision.transforms import functional

from moe.errors import DataError, SpecError
from workers.datasets.base import DatasetInfo
from workers.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    TransformSpec,
    recorded,
    transform_after,
    transform_for,
)


def info(name, normalisation="imagenet", channels=3):
    return DatasetInfo(
        name, name, "multiclass", 3, channels, (8, 8), "d", ("d",), ("accuracy",), "accuracy", normalisation, "", ""
    )


def picture(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(60, 84), (500, 300), (448, 448)])
def test_iwildcam_equals_torchvision_on_pillow(shape):
    image = picture(*shape)
    steps = [reference.Resize((448, 448)), reference.ToTensor(), reference.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    wanted = reference.Compose(steps)(Image.fromarray(image))
    assert torch.equal(transform_for(info("iwildcam"), None, True)(image), wanted)


@pytest.mark.parametrize(
    "shape, nominal", [((50, 70), (50, 70)), ((50, 70), (64, 51)), ((33, 40), (48, 90)), ((9, 8), (6, 5))]
)
def test_crop_follows_the_nominal_resolution(shape, nominal):
    image = picture(*shape)
    ours = transform_for(info("fmow"), None, False, original_resolution=nominal)(image)
    steps = [reference.CenterCrop(min(nominal)), reference.ToTensor(), reference.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    assert torch.equal(ours, reference.Compose(steps)(Image.fromarray(image)))


def test_square_nominal_resolution_does_not_crop():
    assert transform_for(info("fmow"), None, False, original_resolution=(8, 8))(picture(20, 30)).shape == (3, 20, 30)


def test_instance_standardisation_in_double_precision():
    image = picture(37, 53)
    image[:, :, 1] = 201
    result = transform_for(info("rxrx1", "instance"), None, False)(image)
    assert torch.equal(result[1], torch.zeros(37, 53))
    assert torch.allclose(result[0].double().mean(), torch.tensor(0.0, dtype=torch.double), atol=1e-7)
    assert abs(float(result[2].double().std()) - 1) < 1e-6
    assert torch.equal(transform_for(info("rxrx1", "instance"), None, False)(picture(1, 1)), torch.zeros(3, 1, 1))


def test_rxrx1_has_eight_different_variants():
    train = transform_for(info("rxrx1", "instance"), None, True)
    image = picture(16, 16)
    results = [train.fixed(v)(image) for v in range(train.variants)]
    assert train.variants == 8 and len({r.numpy().tobytes() for r in results}) == 8
    assert torch.equal(results[0], transform_for(info("rxrx1", "instance"), None, False)(image))
    for v, result in enumerate(results):
        turned = functional.rotate(Image.fromarray(image), 90 * (v % 4))
        turned = functional.hflip(turned) if v >= 4 else turned
        assert torch.equal(result, results[0].new_tensor(train.fixed(0)(np.asarray(turned)).numpy()))
    drawn = train.batch(np.stack([image] * 64), np.random.default_rng(0))
    assert all(any(torch.equal(d, r) for r in results) for d in drawn)
    assert len({d.numpy().tobytes() for d in drawn}) == 8
    with pytest.raises(SpecError, match="without a generator"):
        train(image)


def test_official_rxrx1_evaluation_is_random_by_option_only():
    assert transform_for(info("rxrx1", "instance"), None, False).variants == 1
    assert transform_for(info("rxrx1", "instance"), None, False, official_rxrx1_eval=True).variants == 8
    assert transform_for(info("fmow"), None, True).variants == 1


@pytest.mark.parametrize("channels, normalisation", [(1, "unit"), (2, "unit"), (3, "imagenet"), (3, "instance")])
@pytest.mark.parametrize("size", [None, 20])
def test_a_batch_equals_its_images_one_by_one(channels, normalisation, size):
    images = np.stack([picture(32, 32, channels, seed) for seed in range(5)])
    apply = transform_for(info("any", normalisation, channels), size, False)
    batch = apply.batch(images)
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    assert batch.shape == (5, channels, size or 32, size or 32)
    assert torch.equal(batch, torch.stack([apply(image) for image in images]))
    assert torch.equal(batch, apply.batch(list(images)))


def test_images_of_different_sizes_need_a_resize():
    images = [picture(20, 30), picture(31, 17)]
    assert transform_for(info("any"), 16, False).batch(images).shape == (2, 3, 16, 16)
    with pytest.raises(DataError, match="different sizes"):
        transform_for(info("any"), None, False).batch(images)


def test_grey_images_without_a_channel_axis():
    grey = picture(9, 9, 1)[..., 0]
    apply = transform_for(info("any", "unit", 1), None, False)
    assert torch.equal(apply(grey), torch.from_numpy(grey.astype(np.float32) / 255)[None])
    assert apply.batch(np.stack([grey, grey])).shape == (2, 1, 9, 9)


def test_floats_pass_through_and_can_be_resized():
    image = np.random.default_rng(0).normal(size=(8, 20, 20)).astype(np.float32)
    apply = transform_for(info("poverty", "none", 8), None, True)
    assert torch.equal(apply(image), torch.from_numpy(image))
    assert torch.equal(apply.batch([image, image])[1], torch.from_numpy(image))
    small = transform_for(info("poverty", "none", 8), 10, True)(image)
    assert small.shape == (8, 10, 10) and abs(float(small.mean()) - float(image.mean())) < 0.05


def test_channels_for_a_colour_backbone():
    apply = transform_for(info("any", "unit", 1), 8, False, normalisation="imagenet", channels=3)
    assert apply(picture(8, 8, 1)).shape == (3, 8, 8)
    assert float(transform_for(info("any", "unit"), 8, False, channels=3)(picture(8, 8, 2))[2].max()) == 0
    with pytest.raises(DataError, match="5 channels"):
        transform_for(info("any", "unit"), 8, False, channels=3)(picture(8, 8, 5))
    with pytest.raises(DataError, match="needs 3 channels"):
        transform_for(info("any"), None, False)(picture(8, 8, 1))


def test_wrong_images_are_refused():
    with pytest.raises(DataError, match="int64"):
        transform_for(info("any"), None, False)(np.zeros((4, 4, 3), dtype=np.int64))


def test_identity_names_the_numbers():
    spec = TransformSpec(normalisation="unit")
    assert Transform(spec).identity == Transform(TransformSpec(normalisation="unit", size=None)).identity
    others = [
        spec.model_copy(update=change) for change in ({"crop": 4}, {"size": (4, 4)}, {"variant": 1}, {"augment": True})
    ]
    assert len({Transform(other).identity for other in [spec, *others]}) == 5
    assert "variant" in Transform(spec).fixed(3).identity


@pytest.mark.parametrize(("height", "width"), [(300, 401), (401, 300), (40, 40)])
def test_the_centre_after_a_resize_of_the_short_edge_is_torchvisions(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    ours = Transform(TransformSpec(normalisation="none", size=(42, 42), short_edge=48))(picture)
    steps = [reference.Resize(48, reference.InterpolationMode.BICUBIC), reference.CenterCrop(42)]
    expected = np.asarray(reference.Compose(steps)(Image.fromarray(picture)))
    assert np.array_equal(ours.numpy(), expected.transpose(2, 0, 1))


def test_a_stored_network_keeps_the_preprocessing_of_its_record():
    own = TransformSpec(normalisation="unit", size=(12, 12), short_edge=14, channels=3)
    meta = {"transform": own.model_dump(mode="json")}
    rxrx1 = info("rxrx1", "instance")
    assert transform_after({}, rxrx1, 16, True).identity == transform_for(rxrx1, 16, True).identity
    assert transform_after(meta, rxrx1, None, False).spec == own
    assert transform_after(meta, rxrx1, 12, True).spec == own.model_copy(update={"augment": True})
    larger = own.model_copy(update={"size": (16, 16), "short_edge": None})
    assert transform_after(meta, rxrx1, 16, False).spec == larger
    assert recorded({}, transform_after({}, rxrx1, 16, False)) == {}
    assert recorded(meta, transform_after(meta, rxrx1, None, False)) == meta
