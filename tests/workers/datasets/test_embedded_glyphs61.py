from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.errors import NotFoundError
from workers.datasets import _glyph_fonts as fonts
from workers.datasets import _glyphs as glyphs
from workers.datasets import _render as render
from workers.datasets import glyphs61

pytest.importorskip("HersheyFonts", reason="glyphs61 needs the extra `demo` (Hershey-Fonts)")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def lite(root):
    return glyphs61.load(root, glyphs61.Options(per_class=5))


def test_table_of_families():
    assert (len(fonts.FAMILIES), len(fonts.MATPLOTLIB), len(fonts.HERSHEY), len(fonts.DEBIAN)) == (61, 10, 15, 36)
    assert len(fonts.BY_NAME) == 61 and len(fonts.PACKAGES) == 23
    assert len(fonts.matplotlib_faces()) == 19 and all(path.is_file() for path in fonts.matplotlib_faces())


def test_splits_of_families():
    hard = glyphs61.split_families(glyphs61.Options(split="hard"))
    assert [len(part) for part in hard] == [36, 8, 17]
    assert len({*hard[0], *hard[1], *hard[2]}) == 61 and {*hard[1], *hard[2]} <= fonts.BY_NAME.keys()
    lite = glyphs61.split_families(glyphs61.Options())
    assert [len(part) for part in lite] == [19, 0, 6]
    draws = [glyphs61.split_families(glyphs61.Options(split="random", split_seed=s)) for s in (0, 0, 1)]
    assert [len(part) for part in draws[0]] == [39, 8, 14]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="split_seed=1 has no effect on split=hard"):
        glyphs61.Options(split="hard", split_seed=1)


def test_lite_needs_no_debian_fonts(lite):
    assert lite.images[0].shape == (32, 32, 1) and lite.images[0].dtype == np.uint8
    assert len(lite.labels) == 25 * 36 * 5 and set(np.unique(lite.labels)) == set(range(36))
    test = {lite.value_names["domain"][d] for d in np.unique(lite.column("domain", lite.splits["test"]))}
    assert test == set(glyphs61.LITE_TEST)
    assert len(np.unique(lite.column("domain", lite.splits["train"]))) == 19
    rows = np.concatenate([lite.splits[n] for n in ("train", "id_val", "test_support", "test")])
    assert len(rows) == len(np.unique(rows)) == len(lite.labels)


def test_lite_is_the_same_from_cache(lite, root):
    assert len(list((root / "glyphs61").iterdir())) == 25
    assert glyphs61.load(root, glyphs61.Options(per_class=5)).digest == lite.digest


@pytest.mark.parametrize("name", ["DejaVuSans", "scripts"])
def test_rendering_is_deterministic(lite, name):
    family = fonts.BY_NAME[name]
    files = fonts.font_files(Path("."), (family,))[name]
    pictures = render.photos()
    one = glyphs.render_family(family, files, pictures, 0, 5)
    assert one["images"].shape == (180, 32, 32, 1)
    domain = lite.value_names["domain"].index(name)
    assert np.array_equal(one["images"], lite.images.array[lite.column("domain") == domain])
    other = glyphs.render_family(family, files, pictures, 1, 5)
    assert not np.array_equal(one["images"], other["images"])


def test_profiles_stay_in_their_ranges():
    looks = [glyphs.profile(family.name) for family in fonts.FAMILIES]
    assert all(0.4 <= abs(look.contrast) <= 1 for look in looks)
    assert all(min(look.background, look.background + look.contrast) >= -1e-9 for look in looks)
    assert all(max(look.background, look.background + look.contrast) <= 1 + 1e-9 for look in looks)
    assert {look.blur for look in looks} == {0.0, 0.6, 1.2}
    assert len({look.contrast for look in looks}) == 61


def test_hard_says_what_is_missing(tmp_path):
    with pytest.raises(NotFoundError, match="Lobster") as caught:
        glyphs61.load(tmp_path, glyphs61.Options(split="hard"))
    hint = caught.value.hint
    assert "apt-get download" in hint and "fonts-lobster" in hint and "dpkg -x" in hint and str(tmp_path) in hint
    assert glyphs61.missing(tmp_path) == []
    assert len(glyphs61.optional(tmp_path)) == 1


def test_only_the_missing_package_is_named(tmp_path):
    place = tmp_path / "fonts" / "usr"
    place.mkdir(parents=True)
    for family in fonts.DEBIAN:
        for face in family.faces:
            if family.name != "Lobster":
                (place / face).touch()
    (gap,) = fonts.missing_fonts(tmp_path, fonts.FAMILIES)
    assert "families Lobster)" in gap.what and "apt-get download fonts-lobster &&" in gap.fix


def test_blur_keeps_the_mean():
    image = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    soft = render.blur(image, 1.2)
    assert soft.mean() == pytest.approx(image.mean(), abs=1e-3) and soft.std() < 0.5 * image.std()
