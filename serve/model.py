"""A model as it is served: an immutable base student, its frozen experts and aggregator, and mixed-domain prediction.

Plain torch; no HTTP and no Ray. Nothing here changes a tensor of the base, and every method may be called from several
threads: each thread that predicts has its own twin of the module objects, all with the same tensors.

Shapes: B rows, C channels, E experts, D feature width, K outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.aggregator import Aggregator
from moe.errors import DataError, SpecError
from moe.student import Student
from serve.delta import Delta
from serve.experts import ExpertBank
from serve.info import ServedInfo, class_names, plain_image, served_transform, usable_methods
from serve.loading import Parts, locate
from serve.mixed import MixedTwin, twin_of
from workers.datasets.base import DATASETS, DatasetInfo
from workers.modelfile import load_aggregator, load_student
from workers.transforms import Transform, TransformSpec

__all__ = ["ServedInfo", "ServedModel"]


class ServedModel:
    """Base, teacher and prediction. Use :meth:`load`.

    Attributes:
        info: see there.
        base: in evaluation mode and frozen. Never give it to ``functional_call`` or ``Student.run(images, adapted)``
            while others predict with it: use :meth:`private_base`.
        experts: feature extractors in the aggregator's order; empty without a teacher.
        aggregator: the teacher, or None.
        defaults: adaptation method -> options learned in training (``distill``: rates and steps).
    """

    def __init__(
        self,
        info: ServedInfo,
        base: Student,
        experts: Sequence[Student] = (),
        aggregator: Aggregator | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.info = info
        self.base = base.eval().requires_grad_(False)
        self.experts = [expert.eval().requires_grad_(False) for expert in experts]
        self.aggregator = None if aggregator is None else aggregator.eval().requires_grad_(False)
        self._bank = ExpertBank(self.experts) if self.experts else None
        self.defaults = dict(defaults or {})
        self.device = next(base.parameters()).device
        self._transform = Transform(TransformSpec(**info.transform))
        self._twins = threading.local()
        self._alone = any(getattr(getattr(m, "spec", None), "eval_capacity", False) for m in base.modules())
        twin = MixedTwin(base)
        probe = torch.rand(3, info.channels, *info.image_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            self._by_row = twin.by_row if twin.agrees(probe.to(self.device)) else frozenset()

    @classmethod
    def load(
        cls, source: str, store_url: str | None = None, device: str | torch.device = "cpu", name: str | None = None
    ) -> ServedModel:
        """Load what ``source`` names (see :mod:`serve.loading`).

        Args:
            source: folder, artifact digest, run id, or ``models:/NAME@ALIAS``.
            store_url: where digests, runs and registry are looked up; the default store when left out.
            device: of all networks.
            name: replaces the name that the source suggests.

        Raises:
            NotFoundError: there is no such thing.
            SpecError: it is not a model that can be served.
            CheckpointError: damaged files, or experts, aggregator and student of different widths.
            EnvironmentProblem: the registry does not answer.
        """
        return cls.from_parts(locate(str(source), store_url, name), device)

    @classmethod
    def from_parts(cls, parts: Parts, device: str | torch.device = "cpu") -> ServedModel:
        """Load located files; see :meth:`load`."""
        meta = parts.student.meta
        base = load_student(parts.student.folder, meta).to(device)
        aggregator = load_aggregator(parts.student.folder, meta).to(device) if parts.has_aggregator else None
        experts = [load_student(expert.folder, expert.meta).to(device) for expert in parts.experts]
        data: DatasetInfo = DATASETS.load(meta["dataset"]).INFO
        spec = served_transform(data, meta)
        size = spec.size or data.image_size
        why = parts.why
        widths = {expert.feature_dim for expert in experts} - {base.feature_dim}
        if widths and not why:
            why = f"the experts' features are {widths.pop()} wide, the student's {base.feature_dim}"
        info = ServedInfo(
            name=parts.name,
            version=parts.version,
            task=data.task,
            outputs=int(meta["num_outputs"]),
            class_names=class_names(data, meta, parts.class_names),
            channels=spec.channels or int(meta["backbone"]["channels"]),
            image_size=size,
            transform=spec.model_dump(mode="json"),
            experts=0 if why else len(experts),
            methods=usable_methods(base, data.task, why),
        )
        learned = dict(meta.get("adaptation", {}))
        distill = {key: learned[key] for key in ("inner_lr", "adapt", "rates") if key in learned}
        if "inner_steps" in learned:
            distill["steps"] = learned["inner_steps"]
        return cls(info, base, () if why else experts, None if why else aggregator, {"distill": distill})

    # ---- images ----------------------------------------------------------------------------------------------------

    def preprocess(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """Decoded images to the tensor that the network reads.

        Args:
            images: at least one; uint8 ``[H, W]`` or ``[H, W, C]`` of any size, or float ``[C, H, W]``. Transparency is
                dropped, and colour becomes luminance (ITU-R 601) where the network reads one channel.

        Returns:
            float32 ``[B, C, H, W]`` on the CPU.

        Raises:
            DataError: no image, or one of another form.
        """
        if not len(images):
            raise DataError("There is no image.", "Send at least one.")
        return self._transform.batch([plain_image(np.asarray(image), self.info.channels) for image in images])

    def check_images(self, images: Tensor) -> None:
        """Raises DataError for another shape or type than ``[B, C, H, W]`` of the network, or for NaN and infinity."""
        wanted = (self.info.channels, *self.info.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not images.shape[0]:
            raise DataError(
                f"The images have the shape {list(images.shape)}.", f"Send [B, {', '.join(map(str, wanted))}]."
            )
        if not images.is_floating_point():
            raise DataError(f"The images are of type {images.dtype}.", "Send preprocessed float32 tensors.")
        if not bool(images.isfinite().all()):
            raise DataError("The images hold NaN or infinite values.", "Send finite values.")

    # ---- prediction ------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor, deltas: Sequence[Delta | None] | Delta | None = None) -> Tensor:
        """Logits of rows that may all belong to different domains; a row does not depend on its neighbours.

        States that touch norm layers and the head alone share one pass; each other state has a pass of its own.

        Args:
            images: float32 ``[B, C, H, W]``.
            deltas: one per row (None: the base), or one for all rows.

        Returns:
            float32 ``[B, K]`` on the model's device.

        Raises:
            SpecError: not one delta per row.
            DataError: images of another shape.
        """
        count = images.shape[0]
        each = [deltas] * count if deltas is None or isinstance(deltas, Delta) else list(deltas)
        if len(each) != count:
            raise SpecError(f"There are {count} images and {len(each)} states.", "Give one state per image.")
        wanted = (self.info.channels, *self.info.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not count:
            raise DataError(
                f"The images have the shape {list(images.shape)}.", f"Send [B, {', '.join(map(str, wanted))}]."
            )
        states: dict[int, Mapping[str, Tensor]] = {}
        rows: dict[int, list[int]] = {}
        for row, delta in enumerate(each):
            key = id(delta) if delta is not None and len(delta) else 0
            states[key] = delta.tensors if key and delta is not None else {}
            rows.setdefault(key, []).append(row)
        with torch.inference_mode():
            return self._run(images.to(self.device, torch.float32), states, rows)

    def _run(self, images: Tensor, states: Mapping[int, Mapping[str, Tensor]], rows: Mapping[int, list[int]]) -> Tensor:
        if self._alone and images.shape[0] > 1:  # a capacity that images compete for
            owner = {row: key for key, own in rows.items() for row in own}
            return torch.cat([self._twin.one(images[r : r + 1], states[owner[r]]) for r in range(images.shape[0])])
        if len(rows) == 1:
            return self._twin.one(images, next(iter(states.values())))
        shared = [key for key in rows if states[key].keys() <= self._by_row]
        passes = [[key] for key in rows if key not in shared] + ([shared] if shared else [])
        out = torch.empty(images.shape[0], self.info.outputs, device=self.device)
        for keys in passes:
            where = torch.tensor([row for key in keys for row in rows[key]], device=self.device)
            if len(keys) == 1:
                out[where] = self._twin.one(images[where], states[keys[0]])
            else:
                state_B = torch.tensor([g for g, key in enumerate(keys) for _ in rows[key]], device=self.device)
                out[where] = self._twin.mixed(images[where], [states[key] for key in keys], state_B)
        return out

    def shares_pass(self, delta: Delta) -> bool:
        """Whether ``delta`` can share a pass with other domains (it touches norm layers and the head alone)."""
        return delta.tensors.keys() <= self._by_row

    @property
    def _twin(self) -> MixedTwin:
        found: MixedTwin | None = getattr(self._twins, "own", None)
        if found is None:
            found = self._twins.own = MixedTwin(self.base)
        return found

    # ---- adaptation ------------------------------------------------------------------------------------------------

    def private_base(self) -> Student:
        """A twin of :attr:`base` for the caller alone, with the same tensors: safe for ``run(images, adapted)``.

        Its parameters require gradients, as adaptation methods expect; nobody may step an optimiser on them.
        """
        twin = twin_of(self.base)
        for module in twin.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.detach())  # shares memory
        return twin

    def tokens(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features of all experts ``[B, E, D]`` on the model's device, without a graph.

        On a GPU, experts of one architecture run as one stacked forward; on a CPU, one after the other is faster.

        Raises:
            SpecError: there are no experts.
        """
        if self._bank is None:
            raise SpecError("The served model has no experts.", "Use a method that needs no teacher: bn, tent or eata.")
        pieces = [self._bank(piece.to(self.device, torch.float32)) for piece in torch.split(images, batch_size)]
        return torch.cat(pieces)

    def state_dict(self) -> dict[str, Tensor]:
        """The base's tensors by name, to compare an adapted state with (:meth:`serve.delta.Delta.changed`)."""
        return dict(self.base.state_dict())
