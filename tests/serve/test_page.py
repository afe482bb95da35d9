"""The browser page in headless Chromium, against the real API with a real small model."""

import itertools
import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.page_server import PageServer
from tests.support.browser import Browser, find_browser

FOUND = find_browser()
pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium on this machine (chromium, google-chrome)")
READY = "document.documentElement.dataset.ready"
COUNT = 12
VERSION = "closest('tr').children[1].textContent"
NAMED = ("button", "link", "textbox", "combobox", "checkbox", "spinbutton", "progressbar", "img", "image", "table")
names = (f"domain-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def browser():
    browser = Browser(FOUND)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(served_model, tmp_path_factory, pictures):
    with PageServer(served_model, tmp_path_factory.mktemp("states"), samples=pictures[0].parent) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(domain_images, tmp_path_factory):
    """Files of a domain that the model has not seen: digits turned by 45 degrees."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(domain_images(45, COUNT)[0]):
        Image.fromarray(image[..., 0]).save(folder / f"digit-{number:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def page(browser, server):
    page = browser.page()
    page.media(prefers_reduced_motion="reduce", prefers_color_scheme="light")
    page.open(server.address)
    page.until(READY)
    yield page
    errors = page.errors
    page.close()
    assert errors == []


def chosen(page, pictures):
    page.drop("#drop", pictures)
    page.until(f"document.querySelectorAll('#thumbs li').length === {len(pictures)}")


def adapted(page, pictures, name):
    chosen(page, pictures)
    page.fill("#name", name)
    page.click("#adapt")
    page.until("!document.querySelector('#results').hidden && document.querySelector('#progress').hidden")
    page.until("!document.querySelector('#adapt').hasAttribute('aria-disabled')")
    return name


def button(key, name):
    return f"[data-action={key}][data-state='{name}']"


def shown(page, key, name):
    return page.run(f"document.querySelector({json.dumps(button(key, name))}) !== null")


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answer(server, path):
    with urllib.request.urlopen(server.address + path) as response:
        return json.load(response)


def alert(page):
    page.until("document.querySelector('#alert .what')")
    return page.text("#alert .what"), page.text("#alert .fix")


def test_the_page_loads_everything_from_its_own_server(page, server):
    model = answer(server, "v1/model")
    assert model["name"] in page.text("#model") and model["version"][:12] in page.text("#model")
    assert all(address.startswith((server.address, "blob:")) for address in page.addresses)
    options = page.run("[...document.querySelectorAll('#method option')].map((option) => option.value)")
    assert options == [name for name, reason in model["methods"].items() if reason is None]
    for name, reason in model["methods"].items():
        assert reason is None or reason in page.text("#unusable"), name


def test_the_policy_is_sent_and_has_teeth(browser, server):
    page = browser.page()
    page.open(server.address)
    page.until(READY)
    assert page.errors == []
    with urllib.request.urlopen(server.address) as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    page.run(
        "(() => { const script = document.createElement('script'); script.textContent = 'window.broken = 1';"
        " document.body.append(script); })()"
    )
    assert page.run("window.broken === undefined")
    wait_for(lambda: any("Content Security Policy" in text for text in page.errors))
    page.close()


def test_from_dropped_images_to_before_and_after(page, server, pictures):
    name = adapted(page, pictures, next(names))
    cards = page.run(
        "[...document.querySelectorAll('.card')].map((card) => [card.querySelector('img').alt,"
        " ...[...card.querySelectorAll('.label, .score')].map((node) => node.textContent)])"
    )
    told = server.predict(pictures, name)["predictions"]
    assert len(cards) == COUNT
    for (file, *texts), row, picture in zip(cards, told, pictures, strict=True):
        expected = [[row[key]["label"], f"{100 * row[key]['confidence']:.0f}%"] for key in ("before", "after")]
        assert file == picture.name
        assert [texts[0], texts[2]] == [expected[0][0], expected[1][0]]
        shares = [float(text.rstrip("%")) for text in (texts[1], texts[3])]
        assert shares == pytest.approx([100 * row[key]["confidence"] for key in ("before", "after")], abs=0.51)
    changed = sum(row["before"]["label"] != row["after"]["label"] for row in told)
    assert page.run("document.querySelectorAll('.card.changed').length") == changed
    assert page.text("#summary").startswith(f"{changed} of {COUNT}")


def test_the_experts_heard_and_the_facts_are_those_of_the_state(page, server, pictures):
    name = adapted(page, pictures, next(names))
    record = answer(server, f"v1/states/{name}")
    weights = page.run("[...document.querySelectorAll('.experts .score')].map((node) => parseFloat(node.textContent))")
    assert weights == pytest.approx([100 * weight for weight in record["expert_weights"]], abs=0.051)
    assert len(weights) == 3 and sum(weights) == pytest.approx(100, abs=0.2)
    widths = page.run("[...document.querySelectorAll('.experts i')].map((node) => node.getBoundingClientRect().width)")
    assert widths[weights.index(max(weights))] == max(widths) > min(widths) > 0
    facts = page.text(".facts")
    assert f"Images{record['support']}" in facts and f"Collapse check{record['collapse']}" in facts


def test_progress_is_shown_while_the_server_works(page, pictures):
    page.run(
        "window.seen = []; window.bar = document.querySelector('#progress-text');"
        "new MutationObserver(() => seen.push(bar.textContent)).observe(bar, { childList: true })"
    )
    adapted(page, pictures, next(names))
    assert any("Adapting" in text for text in page.run("window.seen"))
    assert page.run("document.querySelector('#progress').hidden")


def test_chosen_files_can_be_predicted_without_a_state(page, server, pictures):
    before = answer(server, "v1/states")
    page.choose("#images", pictures[:3])
    page.until("document.querySelectorAll('#thumbs li').length === 3")
    page.choose("#images", pictures[3:5])  # a second choice adds to the first
    page.until("document.querySelectorAll('#thumbs li').length === 5")
    page.click("#predict")
    page.until("document.querySelectorAll('.card').length === 5")
    labels = page.run("[...document.querySelectorAll('.card .label')].map((node) => node.textContent)")
    assert labels == [row["before"]["label"] for row in server.predict(pictures[:5])["predictions"]]
    assert answer(server, "v1/states") == before
    page.click("#clear")
    assert page.run("document.querySelectorAll('#thumbs li').length") == 0


def test_the_sample_images_of_the_server_can_be_tried(page):
    assert page.run("!document.querySelector('#samples').hidden")
    assert page.run("document.querySelector('#sample-field').hidden")  # there is one folder: nothing to choose
    page.click("#samples")
    page.until(f"document.querySelectorAll('#thumbs li').length === {COUNT}")
    page.click("#predict")
    page.until(f"document.querySelectorAll('.card').length === {COUNT}")


def test_sample_domains_are_chosen_by_name(browser, served_model, tmp_path, pictures):
    for domain, files in (("north wing", pictures[:3]), ("south", pictures[3:8])):
        (tmp_path / "samples" / domain).mkdir(parents=True)
        for file in files:
            (tmp_path / "samples" / domain / file.name).write_bytes(file.read_bytes())
    with PageServer(served_model, tmp_path / "states", samples=tmp_path / "samples") as server:
        page = browser.page()
        page.open(server.address)
        page.until(READY)
        options = page.run("[...document.querySelectorAll('#sample-domain option')].map((option) => option.value)")
        assert options == ["north wing", "south"]
        page.click("#samples")
        page.until("document.querySelectorAll('#thumbs li').length === 3")
        assert page.run("document.querySelector('#name').value") == "north-wing"
        page.run("document.querySelector('#sample-domain').value = 'south'")
        page.click("#samples")
        page.until("document.querySelectorAll('#thumbs li').length === 5")
        assert page.run("document.querySelector('#name').value") == "south"
        page.fill("#name", "mine")
        page.click("#samples")
        page.until("!document.querySelector('#samples').hasAttribute('aria-disabled')")
        assert page.run("document.querySelector('#name').value") == "mine"
        page.click("#predict")
        page.until("document.querySelectorAll('.card').length === 5")
        assert page.errors == []
        page.close()


def test_a_dry_run_shows_the_report_and_keeps_nothing(page, server, pictures):
    before = answer(server, "v1/states")
    page.run("document.querySelector('#more').open = true")
    page.click("#dry-run")
    name = adapted(page, pictures, next(names))
    assert "dry run, nothing kept" in page.text("#results-name")
    assert "passed" in page.text(".facts")
    assert answer(server, "v1/states") == before
    assert not shown(page, "pin", name)


def test_errors_are_those_of_the_server(page, server, pictures):
    chosen(page, pictures[:2])
    page.fill("#name", "a.b")
    page.click("#adapt")
    what, fix = alert(page)
    status, told = server.refusal("v1/states/a.b?method=distill&wait=false", pictures[:2])
    assert (what, fix) == (told["message"], told["fix"])
    assert str(status) in page.text("#alert .code") and told["code"] in page.text("#alert .code")
    assert page.run("document.activeElement.id") == "name"
    assert page.run("document.querySelector('#name').getAttribute('aria-invalid')") == "true"
    page.click("#alert button")
    assert page.text("#alert") == ""


def test_what_is_not_an_image_is_named(page, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    page.choose("#images", [path])
    page.until("document.querySelectorAll('#thumbs li').length === 1")
    page.click("#predict")
    assert "notes.png" in alert(page)[0]


def test_without_images_it_says_what_to_do(page):
    page.click("#adapt")
    assert alert(page) == ("There are no images yet.", "Choose some, or drop them on the field.")
    assert page.run("document.activeElement.id") == "images"


def test_a_server_that_is_away_is_told_in_words(page):
    page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.click("#refresh")
    what, fix = alert(page)
    assert what == "The server cannot be reached." and fix


def test_names_never_become_markup(page, pictures, tmp_path):
    hostile = "<img src=x onerror=window.broken=1>.png"
    path = tmp_path / hostile
    path.write_bytes(pictures[0].read_bytes())
    page.choose("#images", [path])
    page.until("document.querySelectorAll('#thumbs li').length === 1")
    page.click("#predict")
    page.until("document.querySelectorAll('.card').length === 1")
    page.fill("#name", "<b id=bold>x</b>")
    page.click("#adapt")
    alert(page)
    assert page.run("document.querySelector('.card img').alt") == hostile
    assert page.run("window.broken === undefined && document.querySelector('#bold') === null")


def test_states_are_pinned_rolled_back_and_deleted(page, server, pictures):
    name = adapted(page, pictures, next(names))
    page.fill("#name", name)
    page.click("#adapt")
    page.until(
        f"document.querySelector({json.dumps(button('pin', name))})?.closest('tr').children[1].textContent === '2'"
    )
    page.click(button("pin", name))
    page.until(f"document.querySelector({json.dumps(button('pin', name))})?.textContent === 'Unpin'")
    assert answer(server, f"v1/states/{name}")["pinned"]
    page.click(button("rollback", name))
    page.until("document.querySelector('#confirm').open")
    assert page.run("document.querySelectorAll('#confirm-version option').length") == 1
    page.click("#confirm-yes")
    page.until(
        f"document.querySelector({json.dumps(button('pin', name))})?.closest('tr').children[1].textContent === '1'"
    )
    assert answer(server, f"v1/states/{name}")["version"] == 1
    page.click(button("delete", name))
    page.until("document.querySelector('#confirm').open")
    assert page.run("document.activeElement.id") == "confirm-no"  # the safe answer has the focus
    page.click("#confirm-no")
    assert answer(server, f"v1/states/{name}")["name"] == name
    page.click(button("delete", name))
    page.until("document.querySelector('#confirm').open")
    page.click("#confirm-yes")
    page.until(f"!document.querySelector({json.dumps(button('delete', name))})")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        answer(server, f"v1/states/{name}")


def test_a_state_is_exported_as_the_server_gives_it(page, server, browser, pictures, tmp_path):
    name = adapted(page, pictures, next(names))
    page.downloads(tmp_path)
    page.click(button("export", name))
    page.until(f"document.querySelector('#live').textContent.includes('{name}.1.safetensors saved')")
    path = tmp_path / f"{name}.1.safetensors"
    with urllib.request.urlopen(f"{server.address}v1/states/{name}/export") as response:
        whole = response.read()
    wait_for(lambda: path.exists() and path.read_bytes() == whole)


def test_an_existing_state_is_compared_on_new_images(page, pictures):
    name = adapted(page, pictures, next(names))
    page.click("#clear")
    chosen(page, pictures[:4])
    page.click(button("show", name))
    page.until("document.querySelectorAll('.card').length === 4")
    assert page.run("document.querySelectorAll('.experts li').length") == 3


def test_the_whole_way_with_the_keyboard_alone(page, pictures):
    order = []
    page.run("document.body.focus()")
    for _ in range(12):
        page.press("Tab", 9)
        order.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    expected = ["Skip to the images", "API", "Metrics", "theme", "images", "samples", "name", "method", "Options"]
    assert order == [*expected, "adapt", "predict", "refresh"]
    chosen(page, pictures)
    page.run("document.querySelector('#method').focus()")
    page.press("Tab", 9)
    page.press("Tab", 9)
    page.press("Enter", 13, text="\r")
    page.until(f"document.querySelectorAll('.card').length === {COUNT}")
    page.until("document.activeElement.id === 'results'")  # where the news is
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "refresh"


def test_a_single_image_is_removed_with_the_keyboard(page, pictures):
    chosen(page, pictures[:4])
    page.run("document.querySelector('#samples').focus()")
    page.press("Tab", 9)
    page.press("ArrowRight", 39)
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"Remove {pictures[1].name}"
    page.press("Delete", 46)
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"Remove {pictures[2].name}"
    assert page.text("#chosen-text").startswith("3 images")
    assert page.text("#live") == f"{pictures[1].name} removed, 3 images left."
    page.press("End", 35)
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "clear"  # the thumbnails are one stop


def test_a_collapsed_adaptation_is_shown_as_undone(page):
    check = {
        "collapsed": True,
        "message": "All answers became one class.",
        "top_share_before": 0.2,
        "top_share_after": 1,
    }
    record = {"method": "tent", "support": 8, "collapse": "class-entropy", "collapse_check": check}
    page.run(f"import('./views.js').then((views) => document.body.append(views.facts('Tried', {json.dumps(record)})))")
    assert page.text(".undone h3") == "Tried"
    assert "All answers became one class." in page.text(".undone")
    assert "failed: class-entropy" in page.text(".undone") and "20% → 100%" in page.text(".undone")


def test_of_many_experts_the_most_heard_are_shown(page):
    weights = [0.001] * 30 + [0.57, 0.4]
    page.run(f"import('./views.js').then((views) => document.body.append(views.experts({json.dumps(weights)})))")
    heard = page.run("[...document.querySelectorAll('.experts .name')].map((node) => node.textContent)")
    assert heard[:2] == ["Expert 31", "Expert 32"] and len(heard) == 14
    assert page.text(".experts + .note") == "The other 18 have 1.8% together."


def test_among_many_states_one_is_found_by_its_name(page, server, pictures):
    made = [f"many-{number}" for number in range(11)]
    for name in made:
        status, _ = server.post(f"v1/states/{name}?method=bn", pictures[:2])
        assert status == 200
    page.click("#refresh")
    page.until(f"document.querySelectorAll('tbody tr').length >= {len(made)}")
    page.fill("#find", "MANY-7")
    page.until("document.querySelectorAll('tbody tr').length === 1")
    assert shown(page, "show", "many-7")
    page.fill("#find", "nowhere")
    page.until("document.querySelector('.empty')")


def test_a_focus_ring_is_visible_on_the_file_field(page):
    page.run("document.body.focus()")
    for _ in range(5):
        page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "images"
    assert page.run("getComputedStyle(document.querySelector('label[for=images]')).outlineStyle") == "solid"


def test_a_screen_reader_is_told_everything(page, pictures):
    name = adapted(page, pictures, next(names))
    nodes = page.tree()
    for role in (
        "button",
        "link",
        "textbox",
        "combobox",
        "checkbox",
        "spinbutton",
        "progressbar",
        "img",
        "image",
        "table",
    ):
        for node in nodes:
            assert node["role"] != role or node["name"], node
    headings = [(node["level"], node["name"]) for node in nodes if node["role"] == "heading"]
    assert [level for level, _ in headings].count(1) == 1
    assert all(after - before <= 1 for (before, _), (after, _) in itertools.pairwise(headings))
    roles = {node["role"] for node in nodes}
    assert {"banner", "navigation", "main", "alert", "status", "complementary", "region"} <= roles
    labels = [node["name"] for node in nodes if node["role"] == "button"]
    assert f"Delete: {name}" in labels and f"Pin: {name}" in labels
    assert page.text("#live").startswith(f"{name} is ready.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page, pictures, scheme):
    page.media(prefers_reduced_motion="reduce", prefers_color_scheme=scheme)
    adapted(page, pictures, next(names))
    page.fill("#name", "a.b")
    page.click("#adapt")
    alert(page)
    weak = page.run(Path(__file__).with_name("contrast.js").read_text())
    assert weak["checked"] > 100
    assert weak["weak"] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_cut_off_at_any_width(page, pictures, width):
    page.resize(width, 800)
    adapted(page, pictures, next(names))
    page.fill("#name", "x" * 60 + ".")
    page.click("#adapt")
    alert(page)
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = page.run(
        "[...document.querySelectorAll('main *, header *')].filter((node) => !node.closest('.visually-hidden') &&"
        f" node.getBoundingClientRect().right > {width} + 1).map((node) => node.outerHTML.slice(0, 120))"
    )
    assert outside == []


def test_the_theme_follows_the_system_until_one_is_chosen(page, server):
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.run(paper)
    page.media(prefers_color_scheme="dark")
    dark = page.run(paper)
    assert light != dark
    page.click("#theme")
    assert (page.text("#theme"), page.run(paper)) == ("Theme: light", light)
    page.open(server.address)
    page.until(READY)
    assert (page.text("#theme"), page.run(paper)) == ("Theme: light", light)


def test_a_server_with_tokens_asks_for_one(browser, served_model, tmp_path):
    token = "correct-horse-battery-staple"
    with PageServer(served_model, tmp_path / "states", tokens={token: "team"}) as guarded:
        page = browser.page()
        page.open(guarded.address)
        page.until(READY)
        assert page.run("!document.querySelector('#token-form').hidden && document.activeElement.id === 'token'")
        page.fill("#token", "wrong")
        page.press("Enter", 13, text="\r")
        page.until("document.querySelector('#alert .what')")
        page.fill("#token", token)
        page.press("Enter", 13, text="\r")
        page.until("document.querySelector('#token-form').hidden")
        assert served_model.info.name in page.text("#model")
        assert page.errors == []
        page.close()
