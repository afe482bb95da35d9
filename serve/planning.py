"""From a request to a plan: everything that can be told about an adaptation without computing anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from moe.adaptation.base import ADAPTATIONS, Adaptation, make
from moe.errors import SpecError
from serve.http.problems import too_large
from serve.model import ServedModel
from serve.once import check_key
from serve.records import check_state_name
from serve.requests import AdaptRequest, digest_of


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        request: as it came.
        method: with its options, capped.
        options: the method's options as they are recorded with a state; what the model learned in training is left out.
        model_version: of the base.
    """

    request: AdaptRequest
    method: Adaptation[Any]
    options: Mapping[str, Any]
    model_version: str

    @property
    def follows(self) -> bool:
        """Whether a single request begins at the state that is there; only when it says so."""
        return self.method.config.reset in ("follow", "collapse")

    @cached_property
    def images_digest(self) -> str:
        """Digest of the images as they were sent."""
        return digest_of(self.request.images)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides the outcome."""
        asked = self.request
        what = (asked.name, asked.method, sorted(self.options.items()), asked.dry_run, self.model_version)
        return hashlib.sha256(f"{what!r}\n{self.images_digest}".encode()).hexdigest()


class Planner:
    """Checks requests for one served model.

    Args:
        model: what is served.
        max_images: of one request.
        max_steps: of one request.
        chunk: images of one pass, so that memory stays flat however many images come.
    """

    def __init__(self, model: ServedModel, max_images: int, max_steps: int, chunk: int) -> None:
        self.model, self.max_images, self.max_steps, self.chunk = model, max_images, max_steps, chunk

    def __call__(self, request: AdaptRequest) -> Plan:
        """The plan.

        Raises:
            SpecError: name, method, options, step cap or key are wrong, or the method makes no sense for the model.
            Refused: 413, too many images.
        """
        check_state_name(request.tenant, "tenant")
        check_state_name(request.name)
        if request.idempotency_key is not None:
            check_key(request.idempotency_key)
        if not len(request.images):
            raise SpecError("There is no image to adapt to.", "Send at least one unlabelled image of the domain.")
        if len(request.images) > self.max_images:
            raise too_large("A support set", len(request.images), self.max_images, "images")
        if request.step_cap is not None and not 1 <= request.step_cap <= self.max_steps:
            raise SpecError(f"The step cap is {request.step_cap}.", f"Allow between 1 and {self.max_steps} steps.")
        self._require_used(request)
        method = self.method(request.method, request.options).capped(request.step_cap or self.max_steps)
        chosen = method.config.model_dump(mode="json")
        if "rates" in chosen and "rates" not in request.options:
            del chosen["rates"]  # hundreds of numbers that belong to the model
        return Plan(request, method, chosen, self.model.info.version)

    def _require_used(self, request: AdaptRequest) -> None:
        """Raises SpecError for an option that the rates which the model learned would leave without effect."""
        learned, asked = self.model.defaults.get(request.method, {}), request.options
        if not learned.get("rates") or "rates" in asked:
            return
        for name in ("inner_lr", "adapt"):
            if name in asked and asked[name] != learned.get(name):
                told = f"{name}={asked[name]!r}"
                raise SpecError(
                    f"{told} has no effect: this model learned a rate for each tensor, which replaces it.",
                    f'Leave it out, or send "rates": {{}} beside {name} to adapt without the learned rates.',
                )

    def method(self, name: str, options: Mapping[str, Any]) -> Adaptation[Any]:
        """The method with ``options`` over what the model learned in training and what a server adds.

        Raises:
            SpecError: see :meth:`__call__`.
        """
        found: type[Adaptation[Any]] = ADAPTATIONS.load(name).Method
        why = self.model.info.methods.get(name)
        if why is not None:
            usable = ", ".join(known for known, reason in self.model.info.methods.items() if reason is None)
            raise SpecError(f"{name} cannot be used here: {why}.", f"Use one of: {usable}.")
        serving = {"measure_after": True, "chunk": self.chunk}  # a loss to judge by, passes of bounded size
        added = {key: value for key, value in serving.items() if key in found.Config.model_fields}
        try:
            return make(name, {**added, **self.model.defaults.get(name, {}), **options}, self.model.info.task)
        except (ValidationError, TypeError) as error:
            raise SpecError(f"The options of {name} do not fit: {_told(error)}.", "docs/serving_methods.md") from None


def _told(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)[:200]
    items = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, item['loc']))[:100]}: {item['msg']}" for item in items[:5])
