"""Why a request was refused, as an exception: status, stable code, what is wrong, what to do, when to come back.

Free of any web framework, so that the batcher and the backends can raise it too. The codes are listed in
``docs/serving_api.md``; the texts may change, the codes may not.
"""

from __future__ import annotations

from moe.errors import MoepipeError


class Refused(MoepipeError):
    """A request that is not served, with the HTTP status that says whose fault it is.

    Args:
        status: HTTP status, 400 to 503.
        reason: stable code, such as ``too-large``.
        message: what is wrong, with the value seen.
        fix: what to do about it.
        retry_after: seconds after which the same request may succeed; None when repeating is pointless.
    """

    def __init__(self, status: int, reason: str, message: str, fix: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, fix)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Refused], tuple[int, str, str, str, float | None]]:
        # Exceptions are rebuilt from ``args``, which the base class set to (message, hint): name all five instead.
        return type(self), (self.status, self.reason, self.message, self.hint, self.retry_after)


def too_large(what: str, seen: int, limit: int, unit: str, fix: str = "Send less in one request.") -> Refused:
    """413: ``seen`` of something is above ``limit``."""
    return Refused(413, "too-large", f"{what} of {seen} {unit} is above the limit of {limit} {unit}.", fix)
