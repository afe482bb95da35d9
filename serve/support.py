"""Experts' features of recent support sets, so that another adaptation to the same images need not run the experts.

They are kept by the digest of the images and bounded in bytes; the least recently used go first. All experts of one
batch run as the served model does it (stacked on a GPU).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from serve.model import ServedModel


class SupportCache:
    """Features by digest.

    Args:
        model: runs the experts.
        limit: bytes.
        chunk: images of one pass.
    """

    def __init__(self, model: ServedModel, limit: int, chunk: int = 64) -> None:
        self._model, self._limit, self._chunk = model, limit, chunk
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(value.numel() * value.element_size() for value in self._kept.values())

    def tokens(self, digest: str, images: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Features ``[S, E, D]`` of ``images`` ``[S, C, H, W]``, whose digest the caller knows.

        Args:
            digest: of the images as they were sent.
            images: prepared, on the model's device.
            progress: told (images done, images in all).
        """
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
                self.hits += 1
                return found
            self.misses += 1
        pieces = []
        for piece in torch.split(images, self._chunk):
            pieces.append(self._model.tokens(piece, self._chunk))
            if progress is not None:
                progress(sum(len(done) for done in pieces), images.shape[0])
        # A copy outside inference mode, since methods may put the features into a graph.
        fresh = torch.cat(pieces).clone()
        with self._lock:
            if fresh.numel() * fresh.element_size() <= self._limit:
                self._kept[digest] = fresh
                while self.nbytes > self._limit:
                    self._kept.popitem(last=False)
        return fresh
