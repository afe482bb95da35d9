"""``moepipe checkpoint``: the public checkpoints of a method into artifacts, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_options as opt

if TYPE_CHECKING:
    from orchestrator.store import Store
    from workers.official_checkpoints import Part
    from workers.official_export import Source

app = typer.Typer(help="Import and export Meta-DMoE's public checkpoints.", no_args_is_help=True)

Dataset = Annotated[
    str,
    typer.Option("--dataset", help="iwildcam, camelyon17, rxrx1 or fmow.", autocompletion=opt.complete_dataset),
]
Experts = Annotated[int | None, typer.Option("--experts", min=1, help="Number of experts in the file names.")]
REF = "a folder, a digest, or with --run a member"


@app.command("import")
def import_official(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds model/DATASET/, or the files themselves.")],
    dataset: Dataset,
    experts: Experts = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed in the file names.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write into this new folder, not into the store.")] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Take domain_split.pkl even if the seed does not give it.")
    ] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Read public checkpoint files into artifacts, in the store or in a plain folder. Nothing in them is executed."""
    from moe.errors import SpecError
    from orchestrator import console
    from workers.official_checkpoints import find_run, import_run

    run = find_run(folder, dataset, experts, seed)
    if to is not None and to.exists():
        raise SpecError(f"{to} exists already.", "Choose another folder, or remove it first.")
    with ExitStack() as stack:
        keep = _Keeper(to, store, stack)
        parts = import_run(run, keep.working, keep_split)
        places = keep.all(parts)
    rows = [{"part": p.name, "kind": p.kind, "files": list(p.sources), **places[p.name]} for p in parts]
    table = [(p.name, p.kind, ", ".join(p.sources), *places[p.name].values()) for p in parts]
    document = {"dataset": run.dataset, "experts": run.experts, "seed": run.seed, "parts": rows}
    if json:
        console.emit_json(document)
        return
    console.say(f"{run.dataset}: {run.experts} experts, seed {run.seed}, from {run.folder}")
    console.show_table(("part", "kind", "read from", "now"), table)
    absent = sorted(set(_expected(run.files)) - {name for part in parts for name in part.sources})
    if absent:
        console.note(f"Not there, so not imported: {', '.join(absent)}")
    if to is None:
        console.note("No run uses these artifacts, so `moepipe gc` removes them; --to keeps them in a folder.")


@app.command()
def export(
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="The files go to FOLDER/model/DATASET/.")],
    dataset: Dataset,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for the file names.")],
    split: Annotated[str | None, typer.Option("--split", metavar="REF", help=f"Domain split: {REF}.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option("--expert", metavar="REF", help="An expert, in order; a whole fan-out: experts/seed=0."),
    ] = None,
    aggregator: Annotated[str | None, typer.Option("--aggregator", metavar="REF", help="Pre-trained.")] = None,
    student: Annotated[str | None, typer.Option("--student", metavar="REF", help="Pre-trained.")] = None,
    distill: Annotated[
        str | None, typer.Option("--distill", metavar="REF", help="Meta-trained student with its aggregator.")
    ] = None,
    experts: Experts = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Take REFs as members of this run.", autocompletion=opt.complete_run)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Write artifacts under the public file and tensor names, for use with the authors' code."""
    from orchestrator import console
    from workers.official_export import Sources, export_run

    refs = _Refs(store, run)
    sources = Sources(
        split=refs.one(split),
        experts=refs.many(expert or []),
        aggregator=refs.one(aggregator),
        student=refs.one(student),
        distill=refs.one(distill),
    )
    files = export_run(sources, dataset, seed, to, experts, force)
    if json:
        console.emit_json({"files": [str(path) for path in files]})
    else:
        console.say(*(f"{path} ({console.size(path.stat().st_size)})" for path in files))
    rates = {} if sources.distill is None else sources.distill.meta.get("adaptation", {}).get("rates", {})
    if rates:
        console.note(f"The {len(rates)} learned inner rates of the student have no place in these files.")


def _expected(files: Any) -> tuple[str, ...]:
    """All names that a public run can have."""
    pair = (files.pretrained_selector, files.pretrained_student)
    return (files.split, *files.experts, *pair, files.meta_selector, files.meta_student)


class _Keeper:
    """Where imported parts are worked on and then kept; working folders of a failed import are removed."""

    def __init__(self, to: Path | None, store: str, stack: ExitStack) -> None:
        import tempfile

        from orchestrator.store import Store

        self._to, self._stack = to, stack
        self._store = None if to is not None else Store.open(store)
        self._aside = Path()
        if to is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            aside = tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent, ignore_cleanup_errors=True)
            self._aside = Path(stack.enter_context(aside))
        self._count = 0

    def working(self) -> Path:
        """A new empty folder."""
        import shutil

        if self._store is not None:
            folder = self._store.staging()
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder
        self._count += 1
        folder = self._aside / "parts" / str(self._count)
        folder.mkdir(parents=True)
        return folder

    def all(self, parts: list[Part]) -> dict[str, dict[str, str]]:
        """Keep every part; returns where each is now."""
        import os

        from orchestrator.artifacts import MANIFEST, describe_folder

        if self._store is not None:
            made = {part.name: self._store.commit(part.folder, part.kind, part.meta) for part in parts}
            return {name: {"artifact": artifact.digest} for name, artifact in made.items()}
        assert self._to is not None
        for part in parts:
            manifest = describe_folder(part.folder, part.kind, part.meta).manifest()
            (part.folder / MANIFEST).write_bytes(manifest)
            os.replace(part.folder, part.folder.with_name(part.name))
        os.replace(self._aside / "parts", self._to)
        return {part.name: {"folder": str(self._to / part.name)} for part in parts}


class _Refs:
    """Turns what the user wrote into artifacts: a folder with a manifest, a digest, or a member of a run."""

    def __init__(self, store: str, run: str | None) -> None:
        self._url, self._run = store, run
        self._opened: Store | None = None
        self._members: Mapping[str, str] | None = None

    def one(self, ref: str | None) -> Source | None:
        """The artifact, or None when nothing was written.

        Raises:
            NotFoundError: there is no such artifact.
        """
        if ref is None:
            return None
        from moe.errors import NotFoundError
        from orchestrator.artifacts import MANIFEST, Artifact, digest_of
        from workers.official_export import Source

        manifest = Path(ref) / MANIFEST
        if manifest.is_file():
            data = manifest.read_bytes()
            try:
                artifact = Artifact.parse(digest_of(data), data)
            except (ValueError, KeyError, TypeError) as error:
                raise NotFoundError(f"{manifest} is not the manifest of an artifact ({error}).") from None
            return Source(Path(ref), artifact.kind, artifact.meta)
        digest = self._named().get(ref, ref)
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            members = ", ".join(sorted(self._named())[:8])
            hint = f"Members: {members}, ..." if members else "With --run it may also be a member like distill/seed=0."
            raise NotFoundError(f"{ref!r} is neither a folder with a {MANIFEST} nor a digest of 64 digits.", hint)
        artifact = self._store().artifact(digest)
        return Source(self._store().local_path(artifact), artifact.kind, artifact.meta)

    def many(self, refs: list[str]) -> list[Source]:
        """Artifacts in order; a prefix of members stands for all of them, by number."""
        found: list[Source] = []
        for ref in refs:
            below = [name for name in self._named() if name.startswith(f"{ref}/")]
            below.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
            for name in below or [ref]:
                source = self.one(name)
                assert source is not None
                found.append(source)
        return found

    def _named(self) -> Mapping[str, str]:
        """Members of the run and their artifacts."""
        from orchestrator.runs import RunStore

        if self._members is None:
            self._members = {} if self._run is None else RunStore(self._store()).open(self._run).artifacts()
        return self._members

    def _store(self) -> Store:
        from orchestrator.store import Store

        if self._opened is None:
            self._opened = Store.open(self._url)
        return self._opened
