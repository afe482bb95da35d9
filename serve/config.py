"""Settings of one server: the ``args`` of the Serve application, checked before anything starts.

The same record is written by ``moepipe serve``, by the ``deploy`` stage and by hand in a Serve config file, so that an
unknown or impossible value is one clear error wherever it comes from. Light: neither ray nor torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe.errors import SpecError
from orchestrator.store import DEFAULT_URL, Store
from serve.http.limits import Limits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ServeConfig(BaseModel):
    """One model behind one address."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="Run id, artifact digest, folder, or models:/NAME@ALIAS.")
    store: str | None = Field(default=None, description="Store of the model (folder or URL); null: MOEPIPE_STORE.")
    name: str | None = Field(default=None, description="Name in the addresses; null: what the model calls itself.")
    states: str | None = Field(
        default=None, description="Folder of the states, seen by all replicas; null: STORE/states."
    )
    front: Literal["direct", "proxy"] = Field(
        default="proxy",
        description="direct: each replica listens on host:port itself (one machine); proxy: Ray Serve's HTTP proxy.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on (front: direct).")
    port: int = Field(default=8000, ge=1, le=65535, description="Port to listen on (front: direct).")
    replicas: int = Field(default=1, ge=1, le=256, description="Processes that answer predictions.")
    threads: int = Field(default=1, ge=1, le=256, description="Compute threads of each process.")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu or cuda.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that each process reserves; fractions are shared.")
    resident_bytes: int = Field(
        default=256 * 2**20, ge=2**20, description="Domain states held in memory by each replica."
    )
    batch_rows: int = Field(default=32, ge=1, description="Most images in one forward pass.")
    batch_wait_ms: float = Field(default=0.0, ge=0, le=1000, description="How long a batch waits for company.")
    queue_rows: int = Field(default=1024, ge=1, description="Images that may wait; more are refused with 429.")
    max_wait_s: float = Field(
        default=4.0, gt=0, le=30, description="Longest expected wait for a prediction; more is refused with 429."
    )
    adapt_queue: int = Field(default=32, ge=1, description="Adaptations that may wait; more are refused with 429.")
    adapt_steps: int = Field(default=1000, ge=1, le=100_000, description="Most optimiser steps of one adaptation.")
    limits: Limits = Field(
        default_factory=Limits, description="What one request may cost: bytes, images, pixels, time."
    )
    tokens_file: str | None = Field(
        default=None, description="File with one tenant:token a line; null: no authentication."
    )
    data: str | None = Field(default=None, description="Folder with prepared data sets that clients may name.")
    samples: str | None = Field(
        default=None, description="Folder of pictures, or of a folder for each domain, that the page offers to try."
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("letters, digits, '.', '_' and '-' only, beginning with a letter or digit")
        return value

    @property
    def store_url(self) -> str:
        """Where models are looked up."""
        return self.store or os.environ.get("MOEPIPE_STORE") or DEFAULT_URL

    @property
    def states_folder(self) -> Path:
        """Where the domain states live; beside the local part of the store by default."""
        return Path(self.states) if self.states else Store.open(self.store_url).folder / "states"

    @property
    def is_loopback(self) -> bool:
        """Nobody outside this machine can reach the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")


def checked(values: Mapping[str, Any]) -> ServeConfig:
    """``values`` as a configuration.

    Raises:
        SpecError: unknown, missing or impossible values (all of them in one message), a token file that does not exist,
            or an address that others can reach without any token.
    """
    try:
        config = ServeConfig(**values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SpecError(f"The server's settings do not fit: {wrong}.", "docs/serving.md lists them.") from None
    if config.tokens_file is not None and not Path(config.tokens_file).is_file():
        raise SpecError(f"There is no token file {config.tokens_file}.", "Make it: one tenant:token a line, mode 0600.")
    if config.samples is not None and not Path(config.samples).is_dir():
        raise SpecError(f"There is no folder {config.samples} with samples.", "Check the path.")
    if config.front == "direct":
        require_closed(config)
    return config


def require_closed(config: ServeConfig) -> None:
    """Refuse to listen where others reach the server without any token; by either front, on this machine.

    Raises:
        SpecError: it would.
    """
    if not config.is_loopback and config.tokens_file is None:
        raise SpecError(
            f"Listening on {config.host} lets everybody who reaches this machine use the server.",
            "Give a token file (--tokens FILE), or listen on 127.0.0.1.",
        )
