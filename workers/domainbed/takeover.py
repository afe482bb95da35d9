"""Runs that move between DomainBed's folders and ours: take over what has ended, and export what we have.

A folder of the public code is the md5 of its run's arguments with ``results.jsonl`` and ``done`` in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe.errors import DataError
from workers.context import Context
from workers.domainbed.jobs import DONE, RESULTS, job_id, job_state
from workers.domainbed.records import read_run


def take_over(folder: Path, args: Mapping[str, Any], digest: str, context: Context) -> dict[str, Any]:
    """Copy the records of a run that has ended, checked, into ``context.output``.

    Args:
        folder: of the sweep.
        args: official arguments of the run.
        digest: sha256 of its ``results.jsonl`` when the pipeline was planned.
        context: of the member.

    Raises:
        DataError: the records changed since, are damaged, or belong to other arguments.
    """
    own = folder.expanduser() / job_id(args)
    content = (own / RESULTS).read_bytes() if (own / RESULTS).is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{own / RESULTS} changed after this run was planned.", "Submit again.")
    records = read_run(own).records
    if not records:
        raise DataError(f"{own / RESULTS} has no record, and the run is marked as done.", f"Delete {own}.")
    for record in records:
        seen = (record.dataset, record.algorithm, list(record.test_envs), record.hparams_seed, record.trial_seed)
        wanted = tuple(args[name] for name in ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed"))
        if seen != wanted:
            raise DataError(
                f"{own / RESULTS} holds records of {seen}, and the folder is that of {wanted}.",
                "The folder belongs to another protocol or was renamed; remove it, or leave `extends` out.",
            )
    (context.output / RESULTS).write_bytes(content)
    (context.output / DONE).write_text("done")
    context.log(f"taken over from {own}: {len(records)} records")
    return {"args": dict(args), "taken_over": True, "steps": max(record.step for record in records) + 1}


def export_runs(runs: Iterable[tuple[Mapping[str, Any], Path]], folder: Path) -> tuple[int, int]:
    """Write runs into a sweep's folder as the public code would; a run that has ended there stays as it is.

    Args:
        runs: arguments and artifact folder of each.
        folder: of the sweep; made when missing.

    Returns:
        How many were written, and how many were there already.
    """
    written = kept = 0
    folder.mkdir(parents=True, exist_ok=True)
    for args, source in runs:
        target = folder / job_id(args)
        if job_state(target) == "done":
            kept += 1
            continue
        aside = folder / f".{target.name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in (RESULTS, DONE):
            shutil.copyfile(source / name, aside / name)
        if target.exists():  # begun elsewhere and not ended: the public code would delete it, too
            shutil.rmtree(target)
        os.replace(aside, target)
        written += 1
    return written, kept
