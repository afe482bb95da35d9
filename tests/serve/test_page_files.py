"""The page's files, read as text: nothing inline, nothing from elsewhere, nothing that could turn data into markup."""

import re
from html.parser import HTMLParser

import pytest

from moe.errors import NotFoundError
from serve.page import HEADERS, MEDIA_TYPES, page_files
from serve.page.samples import MAX_BYTES, MAX_SAMPLES, Samples

TEXTS = {file.path: file.content.decode() for file in page_files()}
SCRIPTS = sorted(path for path in TEXTS if path.endswith(".js"))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_all_files_of_the_page_are_served():
    assert {file.path for file in page_files()} == {"/", *(f"/{name}" for name in MEDIA_TYPES if name != "index.html")}
    assert all(file.content for file in page_files())


def test_the_markup_has_no_inline_script_style_or_handler():
    for tag, attributes in Tags(TEXTS["/"]).found:
        assert "style" not in attributes, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "style"
        if tag == "script":
            assert attributes["src"] and attributes["type"] == "module"


def test_every_id_that_the_scripts_ask_for_exists_once():
    ids = [attributes["id"] for _, attributes in Tags(TEXTS["/"]).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r"""at\("([a-z-]+)"\)""", "".join(TEXTS[path] for path in SCRIPTS)))
    assert asked and asked <= set(ids)


def test_every_reference_between_elements_points_at_one():
    found = Tags(TEXTS["/"]).found
    ids = {attributes["id"] for _, attributes in found if "id" in attributes}
    for _, attributes in found:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= ids, attributes


@pytest.mark.parametrize("path", sorted(TEXTS))
def test_nothing_comes_from_another_host(path):
    addresses = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", TEXTS[path], re.IGNORECASE)
    assert set(addresses) <= {"http://www.w3.org"}  # the name of SVG's vocabulary; nothing is fetched


@pytest.mark.parametrize("path", SCRIPTS)
def test_data_cannot_become_markup_or_code(path):
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert word not in TEXTS[path]


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_import_only_what_is_served(path):
    for name in re.findall(r'from "\./([^"]+)"', TEXTS[path]):
        assert f"/{name}" in TEXTS


def test_the_policy_allows_nothing_inline():
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


def test_samples_are_the_pictures_of_one_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    for name in ("b.png", "a.JPG", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (folder / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    samples = Samples(folder)
    assert samples.listing() == {"samples": [{"name": "a.JPG", "domain": ""}, {"name": "b.png", "domain": ""}]}
    assert samples.read("a.JPG") == (b"a.JPG", "image/jpeg")
    for name in ("../secret.png", "/etc/passwd", "notes.txt", "link.png", "large.png", "", "."):
        with pytest.raises(NotFoundError):
            samples.read(name)


def test_samples_have_a_folder_for_each_domain(tmp_path):
    for domain in ("north", "south"):
        (tmp_path / "samples" / domain / "deeper").mkdir(parents=True)
        (tmp_path / "samples" / domain / "1.png").write_bytes(domain.encode())
        (tmp_path / "samples" / domain / "deeper" / "2.png").write_bytes(b"too deep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.png").write_bytes(b"secret")
    (tmp_path / "samples" / "west").symlink_to(tmp_path / "other")
    samples = Samples(tmp_path / "samples")
    listed = samples.listing()["samples"]
    assert listed == [{"name": f"{domain}/1.png", "domain": domain} for domain in ("north", "south")]
    assert samples.read("south/1.png") == (b"south", "image/png")
    for name in ("west/3.png", "north/deeper/2.png", "north/../../other/3.png", "north", "north/"):
        with pytest.raises(NotFoundError):
            samples.read(name)


def test_samples_are_few(tmp_path):
    for number in range(MAX_SAMPLES + 5):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    listed = [sample["name"] for sample in Samples(tmp_path).listing()["samples"]]
    assert listed == [f"{number}.png" for number in range(MAX_SAMPLES)]


@pytest.mark.parametrize("folder", [None, "missing"])
def test_without_a_folder_there_are_no_samples(folder, tmp_path):
    assert Samples(folder and tmp_path / folder).listing() == {"samples": []}
