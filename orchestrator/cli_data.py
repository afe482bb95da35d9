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
    from workers.datasets.base import DATASETS

    root = opt.data_root(data, store)
    found = []
    for name in DATASETS.names():
        module = DATASETS.load(name)
        lacking = module.missing(root)
        info = module.INFO
        found.append(
            {
                "name": name,
                "title": info.title,
                "task": info.task,
                "outputs": info.num_outputs,
                "image_size": list(info.image_size),
                "domain_field": info.domain_field,
                "licence": info.licence,
                "source": info.source,
                "extra": info.extra,
                "present": not lacking,
                "missing": [{"what": item.what, "fix": item.fix} for item in lacking],
                "importable": hasattr(module, "import_archive"),
                "miniature": hasattr(module, "miniature"),
            }
        )
    if json:
        console.emit_json({"root": str(root), "datasets": found})
        return
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
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Open a data set, check its files and print what is in it."""
    from moe.errors import NotFoundError
    from orchestrator import console
    from workers.data import load_data
    from workers.datasets.base import DATASETS, data_root

    root = opt.data_root(data, store)
    module = DATASETS.load(name)
    chosen = _options(option)
    lacking = [] if chosen else module.missing(root)  # with options the set itself knows what it needs
    if lacking:
        what = "; ".join(item.what for item in lacking)
        raise NotFoundError(f"{name} lacks: {what}.", lacking[0].fix)
    checked = _check_files(name, data_root(root, module.INFO), module.INFO.files)
    loaded = load_data(name, chosen, root)
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
        "files_checked": checked,
    }
    if json:
        console.emit_json(document)
        return
    shape = "x".join(map(str, first.shape))
    splits = ", ".join(f"{split} {count}" for split, count in rows.items())
    console.say(
        f"{name}: ok, {len(loaded.images)} rows ({splits})",
        f"  images {shape} {first.dtype}; metadata {', '.join(loaded.fields)}; files checked: {checked}",
        f"  digest {loaded.digest}",
    )


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


def _check_files(name: str, folder: Path, files: Any) -> int:
    """Compare the files that the record knows with sizes and checksums; returns how many."""
    from moe.errors import DataError
    from orchestrator.artifacts import file_digest

    present = [record for record in files if (folder / record.path).is_file()]
    for record in present:
        path = folder / record.path
        if path.stat().st_size != record.size or file_digest(path) != record.sha256:
            raise DataError(
                f"{path} ({path.stat().st_size} bytes) is not the file that {name} expects ({record.size} bytes, "
                f"sha256 {record.sha256[:12]}...).",
                "Fetch it again.",
            )
    return len(present)


@app.command("import")
def import_archive(
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A downloaded archive, or an unpacked folder.")],
    data: opt.DataRoot = None,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Take a downloaded archive or folder into the data root (a folder is linked, not copied)."""
    from moe.errors import SpecError
    from orchestrator import console
    from workers.datasets.base import DATASETS

    root = opt.data_root(data, store)
    module = DATASETS.load(name)
    if not hasattr(module, "import_archive"):
        can = [other for other in DATASETS.names() if hasattr(DATASETS.load(other), "import_archive")]
        raise SpecError(
            f"{name} comes with a package and has no archive to import.",
            f"Check it with `moepipe data verify {name}`. Data sets with archives: {', '.join(can)}.",
        )
    place = module.import_archive(root, path)
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
    from moe.errors import SpecError
    from orchestrator import console
    from workers.datasets.base import DATASETS

    root = opt.data_root(data, store)
    module = DATASETS.load(name)
    if not hasattr(module, "miniature"):
        raise SpecError(
            f"{name} needs no miniature: its real data is embedded.", f"Use it as it is: --set dataset={name}"
        )
    module.miniature(root, seed)
    if json:
        console.emit_json({"name": name, "root": str(root), "seed": seed})
    else:
        # Sets whose real files may lie beside the generated ones choose between them by an option.
        flag = " --option source=miniature" if module.missing(root) else ""
        console.say(
            f"A generated stand-in of {name} is below {root}. It says nothing about results on the real data.",
            f"Check it with: moepipe data verify {name}{flag} --data {root}",
        )
