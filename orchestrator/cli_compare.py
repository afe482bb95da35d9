"""``moepipe compare``: methods, domains, selection rules and adaptations of any number of runs in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import cli_options as opt

if TYPE_CHECKING:
    from orchestrator.compare import Comparison, Options
    from orchestrator.store import Store

FORMATS = ("terminal", "md", "latex", "csv", "html", "json")
_ENDINGS = {".md": "md", ".tex": "latex", ".csv": "csv", ".html": "html", ".json": "json", ".txt": "terminal"}
REPLICATES = 2000
LEVELS = ("auto", "examples", "domains", "seeds")


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run ids, unique beginnings, 'last', or patterns like 'demo-*'. The last run when nothing is named.",
            autocompletion=opt.complete_run,
        ),
    ] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="The newest so many runs.")] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", help="Only runs of this pipeline.")] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="Row or run that every row is tested against; ERM when it is there.")
    ] = "",
    metric: Annotated[
        str, typer.Option("--metric", help="avg, worst, or a score like macro_f1: what is tested and drawn.")
    ] = "avg",
    selection: Annotated[str, typer.Option("--selection", help="Only models selected by this rule, e.g. iid.")] = "",
    by: Annotated[
        str, typer.Option("--by", help="domain: a column for each; summary: average and worst; auto: what fits.")
    ] = "auto",
    form: Annotated[str, typer.Option("--format", "-f", help="terminal, md, latex, csv, html or json.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
    bootstrap: Annotated[
        str, typer.Option("--bootstrap", help="Resample besides seeds: examples, domains, seeds; auto: the finest.")
    ] = "auto",
    replicates: Annotated[int, typer.Option("--replicates", min=100, max=1_000_000, help="Resamples.")] = REPLICATES,
    watts: Annotated[
        float | None, typer.Option("--watts", min=0, help="Power of one device, for an energy estimate.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Put different data sets or protocols side by side, marked.")
    ] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Compare runs: scores by domain with error bars and significance, worst domain, size, speed and cost."""
    from orchestrator.compare import Options
    from orchestrator.store import Store

    chosen = _format(form, output, json)
    for name, value, allowed in (("--by", by, ("auto", "domain", "summary")), ("--bootstrap", bootstrap, LEVELS)):
        _one_of(name, value, allowed)
    _by_fits(by, chosen)
    options = Options(metric, baseline, selection, allow_different, bootstrap, replicates, watts)
    found = compare_runs(Store.open(store), runs or [], last, pipeline, options)
    _show(found, chosen, by, output, _command(runs or [], last, pipeline, options, by))


def compare_runs(
    store: Store, names: Sequence[str], last: int | None, pipeline: str | None, options: Options
) -> Comparison:
    """Choose, read and compare.

    Raises:
        MoepipeError: see the parts.
    """
    from moe.errors import NotFoundError
    from orchestrator import console
    from orchestrator.compare import compare, read_all
    from orchestrator.compare_read import choose, read_run
    from orchestrator.compare_sources import KINDS, Reader

    chosen = choose(store, names, last, pipeline)
    facts = [read_run(run) for run in chosen]
    found, empty = read_all(Reader(store), facts)
    if empty and (not found or set(empty) & set(names)):
        named = next((run for run in empty if run in names), empty[0])
        raise NotFoundError(
            f"Run {named} has no results to compare.",
            f"It has not come so far (moepipe status {named}), or has none of the stages {', '.join(KINDS)}.",
        )
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        console.note(f"Left out, without results: {', '.join(empty[:3])}{more}")
    open_ends = [run.id for run in facts if not run.ended and run.id not in empty]
    if open_ends:
        console.note(f"Not ended yet, so its results may be a part: {', '.join(open_ends[:3])}")
    return compare(found, options)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    from moe.errors import SpecError, nearest

    if value not in allowed:
        raise SpecError(f"{name} is {value!r}.", nearest(value, allowed))


def _by_fits(by: str, form: str) -> None:
    """Raises SpecError where the form has everything anyway."""
    from moe.errors import SpecError

    if by == "summary" and form in ("csv", "json"):
        raise SpecError(f"--by summary has no effect on {form}, which has every domain.", "Leave it out.")


def _format(form: str, output: Path | None, json: bool) -> str:
    """The form that is meant: said, or by the file's ending."""
    from moe.errors import SpecError

    if json:
        if form not in ("", "json"):
            raise SpecError(f"--json and --format {form} are given.", "Use one of them.")
        return "json"
    if not form:
        return _ENDINGS.get(output.suffix, "terminal") if output else "terminal"
    _one_of("--format", form, FORMATS)
    return form


def _show(found: Comparison, form: str, by: str, output: Path | None, command: str) -> None:
    from orchestrator import console
    from orchestrator.blobs import write_atomic

    if form == "terminal" and output is None:
        _terminal(found, by)
        return
    text = _text(found, form, by, command)
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    write_atomic(output, text.encode())
    console.note(f"Wrote {output}: {len(found.rows)} rows of {len(found.runs)} runs.")


def _text(found: Comparison, form: str, by: str, command: str) -> str:
    import json

    from orchestrator import compare_export, compare_render, console

    if form == "html":
        from orchestrator.compare_page import page

        return page(found, command, domains=by != "summary")
    if form == "json":
        return json.dumps(console.finite(compare_export.to_json(found)), allow_nan=False) + "\n"
    if form == "terminal":
        form = "md"
    if form == "csv":
        return compare_export.to_csv(found)
    writers = {"md": compare_render.markdown, "latex": compare_render.latex}
    return writers[form](found, domains=by != "summary")


def _terminal(found: Comparison, by: str) -> None:
    from orchestrator import console
    from orchestrator.compare_render import TERMINAL_DOMAINS, TERMINAL_ROWS, grids, notes

    wide = by == "domain" or (by == "auto" and len(found.domains) <= TERMINAL_DOMAINS)
    for grid in grids(found, domains=wide):
        header = [grid.header[0], *(f"{title}>" for title in grid.header[1:])]
        console.say(grid.title)
        console.show_table(header, grid.body[:TERMINAL_ROWS])
        if len(grid.body) > TERMINAL_ROWS:
            console.say(f"and {len(grid.body) - TERMINAL_ROWS} more rows: --format csv, md or html has all.")
        console.say("")
    if not wide and len(found.domains) > 1:
        console.say(f"{len(found.domains)} domains: --by domain, or --format html, shows each.")
    console.say(*notes(found))


def _command(runs: Sequence[str], last: int | None, pipeline: str | None, options: Options, by: str) -> str:
    """What to type to get the same again."""
    import shlex

    words = ["moepipe", "compare", *runs]
    words += ["--last", str(last)] if last is not None else []
    words += ["--pipeline", pipeline] if pipeline else []
    words += ["--baseline", options.baseline] if options.baseline else []
    words += ["--metric", options.metric] if options.metric != "avg" else []
    words += ["--selection", options.selection] if options.selection else []
    words += ["--by", by] if by != "auto" else []
    words += ["--bootstrap", options.level] if options.level != "auto" else []
    words += ["--replicates", str(options.replicates)] if options.replicates != REPLICATES else []
    words += ["--watts", f"{options.watts:g}"] if options.watts is not None else []
    words += ["--allow-different"] if options.allow_different else []
    return shlex.join(words)


def cite(
    run: opt.RunId = "latest",
    form: Annotated[str, typer.Option("--format", "-f", help="bibtex or plain.")] = "bibtex",
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Print the papers that a run stands on: its algorithms, adaptation methods, backbones and data sets."""
    from orchestrator import console
    from orchestrator.cite import citations, complete
    from orchestrator.runs import RunStore
    from orchestrator.store import Store

    _one_of("--format", form, ("bibtex", "plain"))
    chosen = RunStore(Store.open(store)).open(run)
    found = citations(complete(chosen))
    if json:
        console.emit_json({"run": chosen.id, "papers": [entry.to_json() for entry in found]})
        return
    for entry in found:
        if form == "plain":
            console.say(f"- {entry.paper.plain()} ({', '.join(entry.used)})")
        else:
            console.say(f"% {', '.join(entry.used)}", entry.paper.bibtex(), "")
    if not found:
        console.note("This run uses nothing with a paper.")
