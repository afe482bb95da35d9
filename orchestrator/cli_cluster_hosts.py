"""`moepipe cluster up` and `down`: Ray's launcher with what its provider needs, and a look at the hosts after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def up(
    where: Annotated[Path, typer.Argument(metavar="CLUSTER", help="The cluster's YAML.")] = Path("cluster.yaml"),
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the nodes.")] = 600.0,
    force: Annotated[bool, typer.Option("--force", help="Also when runs are going on there; it restarts Ray.")] = False,
) -> None:
    """Start or update a cluster: `ray up` with the settings that its provider needs, then wait for the nodes."""
    from orchestrator import console
    from orchestrator.cluster_control import wait_for_nodes
    from orchestrator.cluster_jobs import Jobs
    from orchestrator.cluster_tunnel import address_of, read_cluster

    config = read_cluster(where)
    if not force:
        _refuse_while_busy(where)
    _call_ray("up", where, config)
    with address_of(str(where)) as address:
        found = wait_for_nodes(config, Jobs(address).nodes, wait, console.note)
    console.say(f"{where} is up: {', '.join(found)}")


def down(
    where: Annotated[Path, typer.Argument(metavar="CLUSTER", help="The cluster's YAML.")] = Path("cluster.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Also when runs are going on there.")] = False,
) -> None:
    """End a cluster. Results stay in the store; a run that was going on continues when its name is submitted again."""
    from moe.errors import EnvironmentProblem
    from orchestrator import console
    from orchestrator.cluster_control import is_local, stop_hosts
    from orchestrator.cluster_tunnel import read_cluster

    config = read_cluster(where)
    if not force and not _refuse_while_busy(where):
        console.note(f"No answer from the head of {where}; whether runs are going on there is not known")
    hosts = stop_hosts(config) if is_local(config) else []
    _call_ray("down", where, config)
    for host in hosts:
        console.note(f"{host.host}: {'stopped' if host.reached and not host.left else 'not stopped'}")
    silent = [host.host for host in hosts if not host.reached]
    busy = [f"{host.host} ({', '.join(host.left)})" for host in hosts if host.left]
    if silent or busy:
        raise EnvironmentProblem(
            "Ray may still run on " + ", ".join([*(f"{name} (no answer)" for name in silent), *busy]) + ".",
            f"Repeat `moepipe cluster down {where}` when the host answers, or `ray stop --force` there.",
        )
    console.say(f"{where} is down")


def _call_ray(verb: str, where: Path, config: dict[str, Any]) -> None:
    """`ray up` or `ray down`, with its own words to the terminal."""
    import subprocess
    import sys

    from moe.errors import EnvironmentProblem
    from orchestrator.cluster_tunnel import ray_environment, use_token

    use_token(config)
    more = ["--no-config-cache"] if verb == "up" else []
    command = [sys.executable, "-m", "ray.scripts.scripts", verb, str(where), "--yes", *more]
    code = subprocess.run(command, env=ray_environment(config)).returncode
    if code != 0:
        raise EnvironmentProblem(f"`ray {verb} {where}` ended with code {code}.", "Its words stand above.")


def _refuse_while_busy(where: Path) -> bool:
    """Ending or restarting Ray under a run that somebody waits for takes an explicit word.

    Returns:
        whether the head answered.

    Raises:
        BusyError: runs are going on there.
    """
    from moe.errors import BusyError, EnvironmentProblem
    from orchestrator.cluster_jobs import RUNNING, Jobs
    from orchestrator.cluster_tunnel import address_of

    try:
        with address_of(str(where)) as address:
            going = [item["run"] for item in Jobs(address).list() if item["status"] in RUNNING]
    except EnvironmentProblem:
        return False
    if going:
        raise BusyError(
            f"Runs are going on at {where}: {', '.join(going)}.",
            f"`moepipe cluster cancel RUN {where}` stops one at its checkpoints. With --force they are cut off; "
            "submitting their names again continues them.",
        )
    return True
