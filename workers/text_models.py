"""Text classifiers for the stages: from weights or at random, adapted and converted; and tuned ones out of artifacts.

An artifact of kind ``text_model`` holds ``config.json`` (Hugging Face's), ``labels.npz`` (expert of each neuron by
layer), and ``model.safetensors`` with what tuning may have changed. Frozen pretrained tensors are not repeated: they
are read again from the same weights, which must have the same digest. What was converted, and how, is in the
artifact's ``meta`` and comes back with it.

Differs: the public code of EMoE (arXiv 2310.10908) keeps the conversion in folder names, loses the one-score flag of
the gate there, and tests out of domain with other gates than it trained.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import CheckpointError, DataError, EnvironmentProblem, NotFoundError, SpecError
from moe.models.emoe_spec import EMoESpec
from moe.models.text_spec import Family, LoraSpec, TextModelSpec
from workers.datasets._arrays import sha256_file
from workers.modelfile import MODEL_FILE, load_tensors, save_tensors
from workers.text_settings import TextSource
from workers.text_weights import require_minilm
from workers.weight_files import read_state

CONFIG, LABELS = "config.json", "labels.npz"
FAMILIES: Mapping[str, Family] = {"bert": "bert", "gpt2": "gpt2", "llama": "llama"}
CLASSES = {
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "gpt2": ("GPT2Config", "GPT2ForSequenceClassification"),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification"),
}
PREFIX = {"bert": "bert.", "gpt2": "transformer.", "llama": "model."}
HEADS = ("classifier.", "score.", "lm_head.", "cls.")
MAY_START_FRESH = ("classifier.", "score.", "bert.pooler.")
SPARE_ROWS = 1024  # embeddings are often padded to a round number of rows


def weights_folder(source: TextSource, root: Path) -> Path | None:
    """Folder of the pretrained weights; None for a network that starts at random.

    Raises:
        NotFoundError: it is not there; names the command that fetches the packaged one.
        CheckpointError: it holds no safetensors.
    """
    if source.weights is None:
        return None
    folder = require_minilm(root) if source.weights == "minilm" else root / Path(source.weights).expanduser()
    if not (folder / CONFIG).is_file():
        raise NotFoundError(
            f"There is no Hugging Face folder {folder} with {CONFIG}.",
            "Give model.weights: minilm, or the folder of a model (a path, relative to the data root).",
        )
    if not _files(folder):
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
        raise CheckpointError(
            f"{folder} holds {others}; only safetensors are read, since other files may run code when opened.",
            "Save it as safetensors: model.save_pretrained(folder) of transformers 5 does.",
        )
    return folder


def source_digest(source: TextSource, root: Path) -> str:
    """What identifies the weights that a search starts from; empty for random ones."""
    folder = weights_folder(source, root)
    if folder is None:
        return ""
    files = [folder / CONFIG, *_files(folder)]
    return "+".join(_digest(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def build_base(source: TextSource, root: Path, tokens: Mapping[str, Any]) -> tuple[nn.Module, Family, list[str]]:
    """A dense classifier for the task of a ``tokens`` artifact; the caller seeds torch's generator for what is fresh.

    Returns:
        The network, its family, and the tensors that start fresh although there are weights.

    Raises:
        NotFoundError, CheckpointError: no weights, or weights that do not fit.
        SpecError: another family of networks, or a text longer than the network has positions.
        DataError: the tokens were made for another vocabulary.
    """
    from moe.models.text import build_text_model

    folder = weights_folder(source, root)
    if folder is None:
        assert source.random is not None  # TextSource has one or the other
        own = {
            "vocabulary": tokens["vocabulary"],
            "pad_token": tokens["special"]["pad"],
            "num_outputs": tokens["outputs"],
        }
        spec: TextModelSpec = source.random.model_copy(update=own)
        model = build_text_model(spec)
        _check_length(model, tokens)
        return model, spec.family, []
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _check_tokens(record, tokens, folder)
    model, family = _from_config(record, int(tokens["outputs"]), int(tokens["special"]["pad"]), str(folder))
    _check_length(model, tokens)
    state = {name: value for path in _files(folder) for name, value in read_state(path).items()}
    return model, family, _fill(model, family, state, str(folder))


def adapt_and_convert(
    model: nn.Module,
    family: Family,
    lora: LoraSpec | None,
    emoe: EMoESpec | None,
    layers: Sequence[int],
    labels: Mapping[int, Tensor] | None = None,
    hidden: Mapping[int, Tensor] | None = None,
) -> tuple[nn.Module, dict[int, Tensor]]:
    """Adapters, then conversion; the network and the labels used."""
    from moe.models.emoe_convert import convert_layers
    from moe.models.text import add_lora

    if lora is not None:
        model = add_lora(model, family, lora)
    used = {} if emoe is None else convert_layers(model, layers, emoe, labels, hidden)
    return model, used


def save_tuned(
    folder: Path, model: nn.Module, tensors: Mapping[str, Tensor], labels: Mapping[int, Tensor], pad: int
) -> None:
    """Write the files of a ``text_model`` artifact."""
    save_tensors(folder / MODEL_FILE, tensors)
    record = json.loads(config_of(model).to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):  # they say where and when, not what
        record.pop(name, None)
    record["pad_token_id"] = pad
    (folder / CONFIG).write_text(json.dumps(record, indent=1, sort_keys=True))
    arrays: dict[str, Any] = {str(layer): values.numpy().astype(np.int32) for layer, values in labels.items()}
    np.savez(folder / LABELS, **arrays)


def open_tuned(folder: Path, meta: Mapping[str, Any], root: Path) -> nn.Module:
    """The tuned network of an artifact, converted as it was trained, in evaluation mode.

    Raises:
        CheckpointError: damaged files, or the pretrained weights beneath it have changed.
    """
    model, family = dense_network(folder, meta, root)
    lora = None if meta["lora"] is None else LoraSpec(**meta["lora"])
    emoe = None if meta["emoe"] is None else EMoESpec(**meta["emoe"])
    model, _ = adapt_and_convert(model, family, lora, emoe, meta["layers"], read_labels_file(folder))
    load_kept(model, load_tensors(folder / MODEL_FILE), meta["kept"], str(folder / MODEL_FILE))
    return model.eval()


def dense_network(folder: Path, meta: Mapping[str, Any], root: Path) -> tuple[nn.Module, Family]:
    """The dense network beneath a tuned one: its pretrained weights where it has any, else random ones."""
    record = json.loads((folder / CONFIG).read_text())
    model, family = _from_config(record, int(meta["outputs"]), int(record["pad_token_id"]), str(folder))
    source = TextSource(**meta["source"])
    weights = weights_folder(source, root)
    if weights is not None:
        seen = source_digest(source, root)
        if seen != meta["source_digest"]:
            raise CheckpointError(
                f"The weights {source.weights!r} are no longer those that this network was tuned from "
                f"(digest {seen[:12]}, expected {str(meta['source_digest'])[:12]}).",
                "Restore them, or submit again.",
            )
        state = {name: value for path in _files(weights) for name, value in read_state(path).items()}
        _fill(model, family, state, str(weights))
    return model, family


def load_kept(model: nn.Module, tensors: Mapping[str, Tensor], kept: str, what: str) -> None:
    """Load the tensors that an artifact keeps over a freshly built network.

    Raises:
        CheckpointError: unknown names, other shapes, or (with ``kept`` ``all``) missing ones.
    """
    from workers.engines.torch import load_strict

    own = model.state_dict()
    load_strict(model, tensors if kept == "all" else {**own, **tensors}, what=what)


def kept_names(model: nn.Module, everything: bool, fresh: Sequence[str] = ()) -> set[str]:
    """State entries that the pretrained weights do not tell: trained parameters, gates, buffers, what started fresh."""
    state = model.state_dict()
    if everything:
        return set(state)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and ".moe.gate." not in name}
    own = {name for name in frozen if name.removeprefix("base_model.model.") in fresh}
    return {name for name in state if name not in frozen} | own


def read_labels_file(folder: Path) -> dict[int, Tensor]:
    """Expert of each neuron by layer."""
    with np.load(folder / LABELS, allow_pickle=False) as archive:
        return {int(layer): torch.from_numpy(archive[layer].astype(np.int64)) for layer in archive.files}


def config_of(model: nn.Module) -> Any:
    """The Hugging Face configuration of a network, adapted or not."""
    adapted: Any = model
    return (adapted.get_base_model() if hasattr(model, "get_base_model") else adapted).config


def _from_config(record: Mapping[str, Any], outputs: int, pad: int, what: str) -> tuple[nn.Module, Family]:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblem("Text models need transformers.", "pip install 'moepipe[text]'") from error
    family = FAMILIES.get(str(record.get("model_type")))
    if family is None:
        raise SpecError(
            f"{what} holds a network of type {record.get('model_type')!r}.", f"Supported: {', '.join(FAMILIES)}."
        )
    config_class, model_class = CLASSES[family]
    dropped = {"num_labels", "id2label", "label2id", "architectures", "_name_or_path", "problem_type"}
    fields = {name: value for name, value in record.items() if name not in dropped}
    config = getattr(transformers, config_class)(**{**fields, "num_labels": outputs, "pad_token_id": pad})
    config.problem_type = None
    model: nn.Module = getattr(transformers, model_class)(config).float()
    return model, family


def _fill(model: nn.Module, family: Family, state: Mapping[str, Tensor], what: str) -> list[str]:
    """Copy pretrained tensors into a classifier, strictly but for the head; returns what starts fresh."""
    own, prefix = model.state_dict(), PREFIX[family]
    given = {}
    for raw, value in state.items():
        name = raw.replace(".gamma", ".weight").replace(".beta", ".bias")  # BERT's first releases
        given[name if name.startswith((prefix, *HEADS)) else prefix + name] = value
    missing = sorted(name for name in own if name not in given and not name.startswith(MAY_START_FRESH))
    spare = (*HEADS, f"{prefix}embeddings.position_ids")
    extra = sorted(n for n in given if n not in own and not n.startswith(spare) and not _is_mask(n))
    wrong = [n for n in own if n in given and own[n].shape != given[n].shape and not n.startswith(HEADS)]
    if missing or extra or wrong:
        told = [
            f"{title}: {', '.join(names[:4])}" for title, names in (("missing", missing), ("extra", extra)) if names
        ]
        told += [f"{n} is {list(given[n].shape)}, expected {list(own[n].shape)}" for n in wrong[:3]]
        raise CheckpointError(f"{what} does not fit its own {CONFIG} ({'; '.join(told)}).", "Is a file missing?")
    fitting = {n: given[n] for n in own if n in given and own[n].shape == given[n].shape and not n.startswith(HEADS)}
    model.load_state_dict({**own, **fitting})
    return sorted(set(own) - set(fitting))


def _is_mask(name: str) -> bool:
    """Constants that old GPT-2 files carry."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def _check_tokens(record: Mapping[str, Any], tokens: Mapping[str, Any], folder: Path) -> None:
    """Refuse tokens of another vocabulary.

    Raises:
        DataError: the sizes or the special tokens contradict.
    """
    rows, seen = int(record.get("vocab_size", 0)), int(tokens["vocabulary"])
    hint = "Prepare the texts with this network's own tokenizer: text_prepare's `tokenizer` must name the same folder."
    if seen > rows or rows - seen >= SPARE_ROWS:
        raise DataError(f"The tokenizer has {seen} tokens, the network in {folder} {rows}: they do not belong.", hint)
    for kind in ("pad", "bos", "eos"):
        expected, given = record.get(f"{kind}_token_id"), tokens["special"][kind]
        if isinstance(expected, int) and isinstance(given, int) and expected != given:
            raise DataError(
                f"The tokenizer's {kind} token is {given}, the network in {folder} expects {expected}.", hint
            )


def _check_length(model: nn.Module, tokens: Mapping[str, Any]) -> None:
    most = int(getattr(config_of(model), "max_position_embeddings", 0) or 0)
    if most and int(tokens["max_length"]) > most:
        raise SpecError(
            f"max_length={tokens['max_length']} is more than the {most} positions of the network.",
            f"Set text_prepare's max_length to {most} or less.",
        )


def _files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the parts that its index names."""
    single, index = folder / MODEL_FILE, folder / f"{MODEL_FILE}.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    parts = [folder / Path(name).name for name in names]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise CheckpointError(f"{folder} lacks {absent[0]}, which its index names.", "Copy the whole folder again.")
    return parts


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once while size and time stay."""
    return sha256_file(path)
