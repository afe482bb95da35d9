"""``moepipe data``: list, verify, import and generate data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import cli_options as opt

app = typer.Typer(help="List, verify, import and generate data sets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Data set name.", autocompletion=opt.complete_dataset)]


@app.command("ls")
def list_all(data: opt.DataRoot = None, store: opt.StoreUrl = opt.DEFAULT_STORE, json: opt.Json = False) -> None:
    """List the data sets: what they are and whether they are here."""
    from orchestrator import console
    from workers.catalogue import list_datasets
    from workers.texts.base import list_texts

    root = opt.data_root(data, store)
    found, texts = [row.record() for row in list_datasets(root)], list_texts(root)
    if json:
        console.emit_json({"root": str(root), "datasets": found, "texts": texts})
        return
    found += [{**item, "domain_field": "(text)"} for item in texts]
    rows = [
        (
            str(item["name"]),
            "ok" if item["present"] else "missing",
            str(item["task"]),
            str(item["outputs"]),
            str(item["domain_field"]),
            str(item["title"]),
        )
        for item in found
    ]
    console.show_table(("name", "here", "task", "outputs>", "expert domains", "title"), rows)
    if any(not item["present"] for item in found):
        console.note(f"Data root: {root}. What a set lacks, and how to get it: moepipe data verify NAME")


@app.command()
def verify(
    name: Name,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the set; may be repeated.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Decode every image, not only 64 spread over the set.")] = False,
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Check a data set's files, tables and images, and print what is in it."""
    from orchestrator import console
    from workers import catalogue
    from workers.texts.base import TEXTS

    root = opt.data_root(data, store)
    if name in TEXTS.names():
        _verify_text(name, root, _options(option), json)
        return
    result = catalogue.verify(name, root, _options(option), None if every else catalogue.SAMPLE)
    result.require()
    loaded = result.data
    assert loaded is not None  # a set that cannot be opened has a failed check
    first = loaded.images[0]
    rows = {split: len(members) for split, members in loaded.splits.items()}
    document: dict[str, Any] = {
        "name": name,
        "root": str(root),
        "digest": loaded.digest,
        "rows": len(loaded.images),
        "splits": rows,
        "fields": list(loaded.fields),
        "image": {"shape": list(first.shape), "dtype": str(first.dtype)},
        "checks": [check.what for check in result.checks],
    }
    if json:
        console.emit_json(document)
        return
    shape = "x".join(map(str, first.shape))
    splits = ", ".join(f"{split} {count}" for split, count in rows.items())
    console.say(
        f"{name}: ok, {len(loaded.images)} rows ({splits})",
        f"  images {shape} {first.dtype}; metadata {', '.join(loaded.fields)}",
        *(f"  checked: {check.what}" for check in result.checks),
        f"  digest {loaded.digest}",
    )


def _verify_text(name: str, root: Path, options: dict[str, Any], json: bool) -> None:
    """Open a text data set, which checks its columns and labels, and print its splits."""
    from orchestrator import console
    from workers.texts.base import load_text

    loaded = load_text(name, options, root)
    rows = {split: len(members) for split, members in loaded.splits.items()}
    if json:
        console.emit_json({"name": loaded.info.name, "root": str(root), "digest": loaded.digest, "splits": rows})
        return
    shown = ", ".join(f"{split} {count}" for split, count in rows.items())
    console.say(f"{loaded.info.name}: ok, {sum(rows.values())} texts ({shown})", f"  digest {loaded.digest}")


def _options(texts: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` texts with values in YAML.

    Raises:
        SpecError: no ``=``, or the value is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from moe.errors import SpecError

    chosen: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise SpecError(f"--option {text!r} is not of the form KEY=VALUE.", "For example: --option target=synth")
        try:
            chosen[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise SpecError(f"--option {text!r}: the value is not YAML ({error}).", "Quote it.") from None
    return chosen


@app.command("import")
def import_archive(
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A downloaded archive, or an unpacked folder.")],
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Take a downloaded archive or folder into the data root (a folder is linked, not copied)."""
    from orchestrator import console
    from workers import catalogue

    place = catalogue.import_archive(name, path, opt.data_root(data, store))
    if json:
        console.emit_json({"name": name, "path": str(place)})
    else:
        console.say(f"{name} is in {place}. Check it with: moepipe data verify {name}")


@app.command()
def miniature(
    name: Name,
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Everything drawn follows from it.")] = 0,
    json: opt.Json = False,
) -> None:
    """Generate a small stand-in in the official on-disk layout, to try a pipeline without the real data."""
    from orchestrator import console
    from workers import catalogue
    from workers.texts import base as texts

    root, text = opt.data_root(data, store), name in texts.TEXTS.names()
    if text:
        texts.write_miniature(name, root, seed)
    else:
        catalogue.miniature(name, root, seed)
    if json:
        console.emit_json({"name": name, "root": str(root), "seed": seed})
    elif text:
        console.say(f"Generated texts of {name} are below {root}. They say nothing about results on the real ones.")
    else:
        # Sets whose real files may lie beside the generated ones choose between them by an option.
        flag = "" if catalogue.describe(name, root).present else " --option source=miniature"
        console.say(
            f"A generated stand-in of {name} is below {root}. It says nothing about results on the real data.",
            f"Check it with: moepipe data verify {name}{flag} --data {root}",
        )
