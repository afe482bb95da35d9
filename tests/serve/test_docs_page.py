"""The reference at ``/docs``: Swagger UI from this server alone, in a headless Chromium."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from tests.serve.http_support import client_for, server_at
from tests.support.browser import Browser, find_browser


def test_the_page_names_no_other_host(tmp_path):
    with client_for(tmp_path) as client:
        page = client.get("/docs")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        found = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert len(found) >= 3 and not any(address.startswith(("http", "//")) for address in found)
        for address in found:
            assert client.get(f"/{address.removeprefix('/')}").status_code == 200, address


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_it_shows_every_route_without_a_network(tmp_path):
    browser = Browser(find_browser())
    try:
        with server_at(tmp_path) as (port, _):
            page = browser.page()
            page.open(f"http://127.0.0.1:{port}/docs")
            page.until("document.querySelectorAll('.opblock').length >= 20")
            routes = page.run("[...document.querySelectorAll('.opblock-summary-path')].map(path => path.textContent)")
            assert any("/v1/states/" in route.replace("\u200b", "") for route in routes)
            page.click(".opblock-summary-control")
            page.until("document.querySelector('.opblock.is-open .responses-table')")
            assert page.errors == []
            hosts = {urlsplit(address).netloc for address in page.addresses if address.startswith(("http", "//", "ws"))}
            assert hosts == {f"127.0.0.1:{port}"}, hosts
    finally:
        browser.close()
