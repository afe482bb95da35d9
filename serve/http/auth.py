"""Bearer tokens: which tenant asks. TLS and single sign-on belong to the gateway in front.

A file or variable holds one ``tenant:token`` a line. Only SHA-256 digests of the tokens are kept, and every one is
compared in constant time, so that neither memory nor timing tells a token. Without tokens everybody is the tenant
``default``: meant for a laptop, where the server listens on loopback.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from moe.errors import NotFoundError, SpecError
from serve.http.problems import Refused

DEFAULT_TENANT = "default"
MIN_TOKEN = 16
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Tokens:
    """The tokens that are accepted.

    Args:
        tenants: token -> tenant; empty accepts everybody as :data:`DEFAULT_TENANT`.

    Raises:
        SpecError: a token shorter than 16 characters or with blanks, or a tenant that is not a plain name.
    """

    def __init__(self, tenants: Mapping[str, str] | None = None) -> None:
        self._digests: dict[bytes, str] = {}
        for token, tenant in (tenants or {}).items():
            if len(token) < MIN_TOKEN or any(c.isspace() for c in token):
                raise SpecError(
                    f"The token of tenant {tenant!r} is too short or holds blanks.",
                    f"Use at least {MIN_TOKEN} characters: python -c 'import secrets; print(secrets.token_urlsafe())'.",
                )
            if not _TENANT.fullmatch(tenant):
                raise SpecError(f"The tenant {tenant!r} is not a plain name.", "Use a-z, 0-9, '-' and '_'.")
            self._digests[_digest(token)] = tenant

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Tokens from lines ``tenant:token``; blank lines and lines that start with ``#`` are skipped.

        Raises:
            SpecError: a line of another form (its number is told, not its text), or two lines with the same token.
        """
        found: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            tenant, colon, token = line.strip().partition(":")
            if not colon or token in found:
                raise SpecError(
                    f"Line {number} of the tokens is not a new 'tenant:token'.", "Write one such pair a line."
                )
            found[token] = tenant
        return cls(found)

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Tokens of a file. Raises NotFoundError when it cannot be read, SpecError when it holds none."""
        try:
            tokens = cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise NotFoundError(f"The token file {path} cannot be read: {error}.", "Check the path.") from error
        if not tokens.required:
            # An empty file must not mean an open door.
            raise SpecError(f"The token file {path} holds no token.", "Write one 'tenant:token' a line.")
        return tokens

    @property
    def required(self) -> bool:
        """Whether a request needs a token."""
        return bool(self._digests)

    def tenant(self, token: str | None) -> str:
        """The tenant of ``token``.

        Raises:
            Refused: 401, when tokens are required and this is none of them.
        """
        if not self._digests:
            return DEFAULT_TENANT
        found = None
        given = _digest(token or "")
        for digest, tenant in self._digests.items():  # no early exit: the time does not tell which one matched
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None or token is None:
            raise Refused(
                401,
                "unauthorised",
                "The bearer token is missing." if token is None else "The bearer token is not known.",
                "Send the header 'Authorization: Bearer TOKEN' with a token of this server.",
            )
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).digest()


_scheme = HTTPBearer(auto_error=False, description="One of the server's tokens; not needed when it was given none.")


async def tenant_of(request: Request, given: HTTPAuthorizationCredentials | None = Security(_scheme)) -> str:  # noqa: B008
    """FastAPI dependency: the tenant that asks. Raises Refused (401)."""
    tokens: Tokens = request.app.state.tokens
    return tokens.tenant(given.credentials if given is not None else None)
