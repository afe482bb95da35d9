"""Texts as token numbers: encoded once per (data set, tokenizer, length), kept as an artifact that all members share.

Rows are stored end to end without padding; a batch is padded to its own longest row.
Shapes: B rows, S tokens of the longest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import DataError, EnvironmentProblem, NotFoundError
from workers.datasets.base import IntArray
from workers.text_weights import require_minilm
from workers.texts.base import TextData, TextRows

TOKENS = "tokens.npz"
TOKENIZER = "tokenizer.json"
WORDS = 4096  # largest vocabulary of the tokenizer `words`


@dataclass(frozen=True)
class TokenRows:
    """Encoded rows of one split.

    Attributes:
        ids: token numbers of all rows end to end, int32.
        types: which text of a pair a token belongs to, uint8; None where the tokenizer does not say.
        offsets: where each row begins, and the end of the last, int64 ``[N + 1]``.
        labels: int64 classes or float64 values ``[N]``.
        metrics: of the split.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    offsets: IntArray
    labels: NDArray[Any]
    metrics: tuple[str, ...]

    def __len__(self) -> int:
        """Rows."""
        return len(self.labels)

    def batch(self, rows: IntArray, pad: int) -> Batch:
        """Some rows, padded at the right with the token ``pad``."""
        spans = [(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows]
        longest = max(end - start for start, end in spans)
        ids = np.full((len(spans), longest), pad, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for number, (start, end) in enumerate(spans):
            ids[number, : end - start] = self.ids[start:end]
            mask[number, : end - start] = 1
            if self.types is not None:
                types[number, : end - start] = self.types[start:end]
        given = None if self.types is None else torch.from_numpy(types)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), given, torch.from_numpy(self.labels[rows]))


@dataclass(frozen=True)
class Batch:
    """Token numbers, mask (1: a token) and types, int64 ``[B, S]``; labels ``[B]``."""

    ids: Tensor
    mask: Tensor
    types: Tensor | None
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        types = None if self.types is None else self.types.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), types, self.labels.to(device))


def open_tokenizer(source: str, root: Path, data: TextData) -> Any:
    """A fast tokenizer of transformers.

    Args:
        source: ``minilm``, a Hugging Face folder (a path, relative to ``root``), or ``words``: the words of the
            training split, for networks that start at random.
        root: data root.
        data: whose words.

    Raises:
        NotFoundError: no such folder, or no tokenizer in it.
        EnvironmentProblem: the extra ``text`` is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblem("Tokenizers need transformers.", "pip install 'moepipe[text]'") from error
    if source == "words":
        return _word_tokenizer(transformers, data.splits["train"])
    folder = require_minilm(root) if source == "minilm" else root / Path(source).expanduser()
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder} with a tokenizer.", "Give minilm, words, or a folder.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFoundError(
            f"{folder} holds no tokenizer that can be read ({reason}).", "It needs tokenizer.json and config.json."
        ) from error
    if tokenizer.pad_token_id is None:  # GPT-2, LLaMA
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise DataError(f"The tokenizer in {folder} has neither a padding nor an end token, or no tokenizer.json.")
    return tokenizer


def prepare_tokens(
    data: TextData,
    tokenizer: Any,
    max_length: int,
    folder: Path,
    *,
    selection: str = "official",
    fraction: float = 0.1,
    limit: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Encode all splits into ``folder`` and return the artifact's ``meta``.

    Args:
        data: the texts.
        tokenizer: see :func:`open_tokenizer`.
        max_length: longest row in tokens; longer ones are cut, the longer text of a pair first.
        folder: of the artifact.
        selection: ``official``: the validation rows also select (Parity: as in GLUE practice and EMoE's public code);
            ``held_out``: training rows are set apart for it.
        fraction: of the training rows, for ``held_out``.
        limit: kind of split (``train``, ``selection``, ``validation``, ``ood``) -> most rows, drawn at random.
        seed: of these draws.
    """
    splits = choose_rows(data, selection, fraction, limit or {}, seed)
    arrays: dict[str, Any] = {}
    lengths: dict[str, float] = {}
    for name, rows in splits.items():
        encoded = encode(tokenizer, rows, max_length, rows.metrics or data.info.metrics)
        arrays |= {f"{name}/ids": encoded.ids, f"{name}/offsets": encoded.offsets, f"{name}/labels": encoded.labels}
        if encoded.types is not None:
            arrays[f"{name}/types"] = encoded.types
        lengths[name] = round(float(np.diff(encoded.offsets).mean()), 2)
    np.savez(folder / TOKENS, **arrays)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    text = tokenizer.backend_tokenizer.to_str(pretty=False)
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    return {
        "dataset": data.info.name,
        "title": data.info.title,
        "digest": data.digest,
        "task": data.info.task,
        "outputs": data.info.num_outputs,
        "selection": selection,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "metrics": {name: list(rows.metrics or data.info.metrics) for name, rows in splits.items()},
        "mean_tokens": lengths,
        "max_length": max_length,
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "vocabulary": len(tokenizer),
        "special": {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "cls", "sep", "bos", "eos")},
        "miniature": data.info.generated,
    }


def choose_rows(
    data: TextData, selection: str, fraction: float, limit: Mapping[str, int], seed: int
) -> dict[str, TextRows]:
    """Splits ``train``, ``selection``, ``validation`` and those out of domain, cut to their limits."""
    rng = np.random.default_rng((seed, 7))
    splits = dict(data.splits)
    if selection == "held_out":
        order = rng.permutation(len(splits["train"]))
        count = max(1, round(fraction * len(order)))
        if count >= len(order):
            raise DataError(f"{data.info.name}: {len(order)} training rows leave none beside the {count} held out.")
        train = splits["train"]
        splits = {
            **splits,
            "train": train.take(np.sort(order[count:])),
            "selection": train.take(np.sort(order[:count])),
        }
    found = {}
    for name, rows in splits.items():
        most = limit.get("ood" if name.startswith("ood:") else name)
        if most is not None and most < len(rows):
            rows = rows.take(np.sort(rng.permutation(len(rows))[:most]))
        found[name] = rows
    found.setdefault("selection", found["validation"])
    return found


def encode(tokenizer: Any, rows: TextRows, max_length: int, metrics: Sequence[str]) -> TokenRows:
    """Token numbers of all rows, special tokens included."""
    second = list(rows.second) if rows.second else None
    out = tokenizer(list(rows.first), second, truncation=True, max_length=max_length, padding=False)
    pieces = [piece or [tokenizer.pad_token_id] for piece in out["input_ids"]]
    offsets = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    ids = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
    types = None
    if "token_type_ids" in out:
        types = np.concatenate([np.asarray(piece or [0], dtype=np.uint8) for piece in out["token_type_ids"]])
    return TokenRows(ids, types, offsets, rows.labels, tuple(metrics))


def read_tokens(folder: Path, meta: Mapping[str, Any]) -> dict[str, TokenRows]:
    """The splits of a ``tokens`` artifact."""
    found = {}
    with np.load(folder / TOKENS, allow_pickle=False) as archive:
        for name, metrics in meta["metrics"].items():
            types = archive[f"{name}/types"] if f"{name}/types" in archive.files else None
            ids, offsets, labels = (archive[f"{name}/{part}"] for part in ("ids", "offsets", "labels"))
            found[name] = TokenRows(ids, types, offsets, labels, tuple(metrics))
    return found


def _word_tokenizer(transformers: Any, rows: TextRows) -> Any:
    """Lower-case words of the training rows by frequency; pairs are separated as BERT does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    splitter = pre_tokenizers.Whitespace()
    counts = Counter(
        word for text in (*rows.first, *rows.second) for word, _ in splitter.pre_tokenize_str(text.lower())
    )
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *words[: WORDS - len(special)]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
