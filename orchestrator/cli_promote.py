"""``moepipe promote``: check the declared gate, then let ``champion`` mean this run's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_options as opt

if TYPE_CHECKING:
    from orchestrator.runs import Run
    from orchestrator.spec import PromotionSpec
    from orchestrator.store import Store
    from orchestrator.tracking import Writer


def promote(
    run: opt.RunId = "latest",
    to: Annotated[
        str, typer.Option("--to", help="Alias in the registry: champion (checked), or candidate.")
    ] = "champion",
    gate: Annotated[
        Path | None, typer.Option("--gate", help="YAML file with a promotion block, instead of the pipeline's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the gate and change nothing.")] = False,
    store: opt.StoreUrl = opt.DEFAULT_STORE,
    json: opt.Json = False,
) -> None:
    """Make a run's model the champion of the registry, if it meets the conditions that its pipeline declares."""
    from orchestrator import console
    from orchestrator.promote import check, model_of, refuse
    from orchestrator.runs import RunStore
    from orchestrator.store import Store
    from orchestrator.tracking_state import CANDIDATE

    place = Store.open(store)
    chosen = RunStore(place).open(run)
    promotion = _gate(chosen, gate)
    model = model_of(chosen, place, promotion)
    writer = _writer(chosen, place)
    holder = writer.holder(model.name, to)
    gated = to != CANDIDATE
    checked = check(chosen, place, promotion, _run_of(place, holder)) if gated else []
    if not json:
        console.show_table(
            ("condition", "seen", ""), [(c.condition, c.seen, "ok" if c.met else "failed") for c in checked]
        )
    refuse(chosen.id, to, checked)
    document: dict[str, Any] = {
        "run": chosen.id,
        "model": model.name,
        "artifact": model.artifact,
        "alias": to,
        "conditions": [vars(item) for item in checked],
        "previous": holder[0] if holder else None,
        "version": None,
        "promoted": not dry_run,
    }
    if not dry_run:
        document["version"] = _promote(chosen, place, writer, document, model.node, model.dataset)
    if json:
        console.emit_json(document)
    elif dry_run:
        console.say(f"{chosen.id} may become {to} of {model.name}. Nothing was changed (--dry-run).")
    else:
        before = f", before: version {holder[0]}" if holder and holder[0] != document["version"] else ""
        console.say(f"{model.name}@{to} is version {document['version']} now{before}.")
        console.say(f"serve it: moepipe serve models:/{model.name}@{to}{opt.store_flag(place.url)}")


def _gate(run: Run, file: Path | None) -> PromotionSpec:
    """The promotion block of the run's pipeline, or of a file.

    Raises:
        SpecError: there is none, or it is wrong.
        NotFoundError: no such file.
    """
    from moe.errors import SpecError

    if file is None:
        declared = run.spec().promotion
        if declared is None:
            raise SpecError(
                f"The pipeline of run {run.id} declares no gate.",
                "Add a promotion: block to its YAML (moepipe explain promotion), or give one: --gate gate.yaml",
            )
        return declared
    return _read_gate(file)


def _read_gate(file: Path) -> PromotionSpec:
    from pydantic import ValidationError
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from moe.errors import NotFoundError, SpecError
    from orchestrator.spec import PromotionSpec

    try:
        tree = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        block = tree.get("promotion", tree) if isinstance(tree, dict) else tree
        return PromotionSpec.model_validate(block)
    except FileNotFoundError:
        raise NotFoundError(f"There is no file {file}.") from None
    except YAMLError as error:
        raise SpecError(f"{file} is not YAML: {str(error).splitlines()[0]}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{file}: {where}: {first['msg']}.", "See moepipe explain promotion.") from None


def _writer(run: Run, store: Store) -> Writer:
    from orchestrator.tracking import Writer, connect
    from orchestrator.tracking_state import artifact_folder, experiment_name, tracking_uri

    spec = run.spec()
    uri = tracking_uri(spec, store)
    return Writer(connect(uri), experiment_name(spec), artifact_folder(store) if uri.startswith("sqlite:") else None)


def _run_of(store: Store, holder: tuple[str, Any] | None) -> Run | None:
    """The run of the version that holds the alias now; None when nobody does.

    Raises:
        NotFoundError: its run is not in this store, so nothing can be compared with it.
    """
    from moe.errors import NotFoundError
    from orchestrator.runs import RunStore

    if holder is None:
        return None
    name = str(holder[1].get("moepipe.run", ""))
    try:
        return RunStore(store).open(name)
    except NotFoundError:
        raise NotFoundError(
            f"The champion (version {holder[0]}) is of run {name or 'unknown'}, which is not in this store.",
            "Promote from the store that holds it, or remove the alias by hand.",
        ) from None


def _promote(run: Run, store: Store, writer: Writer, document: dict[str, Any], node: str, dataset: str) -> str:
    """Register the model unless it is registered, and move the alias; returns the version."""
    import json
    import time

    from orchestrator.mirror import sync
    from orchestrator.registering import register
    from orchestrator.tracking_state import TrackingState, state_path, tracking_uri

    state = TrackingState.load(state_path(store, run.id), tracking_uri(run.spec(), store))
    if not state.runs.get(""):
        state = sync(run, store, tracking_uri(run.spec(), store))
    now = time.time()
    tags = {"moepipe.run": run.id, "moepipe.node": node, "moepipe.dataset": dataset}
    version = register(writer, store, document["model"], document["artifact"], state.runs[""], now, tags)
    gate = {"moepipe.gate": json.dumps(document["conditions"]), "moepipe.promoted": repr(now), "moepipe.run": run.id}
    writer.promote(document["model"], document["alias"], version, gate)
    return version
