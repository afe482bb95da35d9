"""The real API over a real model behind uvicorn in a thread: what the page's tests and screenshots talk to."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.catalogue import Catalogue
from serve.http.api import make_api
from serve.http.auth import Tokens
from serve.http.samples import offer_samples
from serve.http.server import server_for
from serve.local import LocalBackend
from serve.model import ServedModel
from serve.page.samples import Samples


class PageServer:
    """Serves ``model`` on a free port of the loopback while it is entered.

    Args:
        model: loaded.
        folder: of the catalogue of states.
        samples: folder of sample images.
        tokens: bearer token -> tenant; nobody is asked when empty.
    """

    def __init__(
        self,
        model: ServedModel,
        folder: Path,
        samples: Path | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend = LocalBackend(model, Catalogue(folder, resident_bytes=64_000_000))
        api = make_api(backend, tokens=Tokens(tokens))
        offer_samples(api, Samples(samples))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server = server_for(api)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def __enter__(self) -> PageServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()

    def post(self, path: str, files: Sequence[Path]) -> tuple[int, Any]:
        """Status and JSON of a request with picture files, made without a browser."""
        boundary = uuid.uuid4().hex
        head = '--{}\r\nContent-Disposition: form-data; name="files"; filename="{}"\r\n\r\n'
        parts = [head.format(boundary, file.name).encode() + file.read_bytes() + b"\r\n" for file in files]
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(self.address + path, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def predict(self, files: Sequence[Path], state: str = "") -> dict[str, Any]:
        """Answer of the plain predictions."""
        status, told = self.post(f"v1/predict?state={state}", files)
        assert status == 200, told
        return dict(told)

    def refusal(self, path: str, files: Sequence[Path]) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that must be refused."""
        status, told = self.post(path, files)
        assert status >= 400
        return status, dict(told["error"])
