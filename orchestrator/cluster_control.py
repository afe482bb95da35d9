"""After `ray up`: are all hosts there? And `ray down` that means it on hosts one has already.

On a cloud `ray down` ends the machines. On hosts of one's own (``provider: local``) it only calls a bare ``ray stop``
on the head, which the login shell does not find in the environment that the YAML made, and never asks the workers:
they go on for as long as they look for the head. So each host is asked here, with the YAML's own command, and looked at
after.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import EnvironmentProblem

_POLL_S = 2.0
_STOP_S = 90.0
_UNREACHED = 255  # ssh's own
# Names of Ray's own processes that this user runs, by what the kernel says: `ps` and `pgrep` may not be installed.
_LEFT = """
left=
for place in /proc/[0-9]*; do
  if [ -O "$place" ] && { read -r name < "$place/comm"; } 2> /dev/null; then
    case "$name" in raylet|gcs_server|ray::*) left="$left $name";; esac
  fi
done
echo "left:$left"
"""


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether the cluster is made of hosts that were there before."""
    return (config.get("provider") or {}).get("type") == "local"


def addresses(config: Mapping[str, Any]) -> list[str]:
    """Of a local cluster: the head's, then the workers'."""
    provider = config["provider"]
    return [str(provider["head_ip"]), *(str(ip) for ip in provider.get("worker_ips") or [])]


def expected_nodes(config: Mapping[str, Any]) -> int:
    """How many nodes a cluster has when nothing runs on it: the head and the workers that are always there."""
    if is_local(config):
        most = len(addresses(config)) - 1
        return 1 + min(most, int(config.get("min_workers", most)))
    head = config.get("head_node_type")
    kinds = config.get("available_node_types") or {}
    return 1 + sum(int(kind.get("min_workers", 0)) for name, kind in kinds.items() if name != head)


def wait_for_nodes(
    config: Mapping[str, Any], live: Callable[[], Sequence[str]], wait_s: float, say: Callable[[str], None]
) -> list[str]:
    """Wait until all nodes that should be there have joined; returns their addresses.

    Args:
        config: the cluster's YAML.
        live: asks for the addresses of the nodes that are alive.
        wait_s: how long.
        say: told how many there are whenever that changes.

    Raises:
        EnvironmentProblem: some are missing after that time; those of a local cluster by name.
    """
    wanted, deadline, told = expected_nodes(config), time.monotonic() + wait_s, -1
    while True:
        found = list(live())
        if len(found) != told:
            told = len(found)
            say(f"{told} of {wanted} nodes are up")
        if told >= wanted:
            return found
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    missing = [ip for ip in addresses(config) if ip not in found] if is_local(config) else []
    raise EnvironmentProblem(
        f"After {wait_s:g} s {told} of {wanted} nodes are up"
        + (f"; missing: {', '.join(missing)}." if missing else "."),
        "The autoscaler on the head says why: /tmp/ray/session_latest/logs/monitor.out and monitor.err.",
    )


@dataclass(frozen=True)
class Stopped:
    """What a host said when it was asked to stop Ray.

    Attributes:
        host: its address.
        reached: whether it answered.
        left: names of Ray's processes that are still there.
    """

    host: str
    reached: bool
    left: tuple[str, ...]


def stop_hosts(config: Mapping[str, Any]) -> list[Stopped]:
    """Stop Ray on every host of a local cluster, the head (and with it the autoscaler) first. Safe to repeat."""
    head, *workers = addresses(config)
    first = _stop(config, head, "head", None)
    via = head if first.reached else None
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [first, *pool.map(lambda ip: _stop(config, ip, "worker", via), workers)]


def _stop(config: Mapping[str, Any], host: str, role: str, via: str | None) -> Stopped:
    """Ask one host; a host that had no Ray yet has nothing to stop, and that is well."""
    stops = [line for line in config.get(f"{role}_start_ray_commands") or [] if "ray stop" in line]
    script = f"{{ {stops[0] if stops else 'ray stop'}; }} > /dev/null 2>&1\n{_LEFT}"
    try:
        done = subprocess.run(
            [*_ssh(config, host, via), f"bash --login -c {shlex.quote(script)}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_STOP_S,
        )
    except subprocess.TimeoutExpired:
        return Stopped(host, False, ())
    said = [line for line in done.stdout.splitlines() if line.startswith("left:")]
    if done.returncode == _UNREACHED or not said:
        return Stopped(host, False, ())
    return Stopped(host, True, tuple(said[-1].removeprefix("left:").split()))


def _ssh(config: Mapping[str, Any], host: str, via: str | None) -> list[str]:
    """The words of a call of ssh as Ray's own, over the head where the workers cannot be reached from here."""
    auth, provider = config.get("auth") or {}, config["provider"]
    base = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
    base += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ServerAliveInterval=5"]
    if key := auth.get("ssh_private_key"):
        base += ["-o", "IdentitiesOnly=yes", "-i", str(Path(key).expanduser())]
    user = f"{auth['ssh_user']}@" if auth.get("ssh_user") else ""
    outside = str(provider.get("external_head_ip") or provider["head_ip"])
    proxy = auth.get("ssh_proxy_command")
    to_head = [*base, *(["-o", f"ProxyCommand={proxy}"] if proxy else [])]
    if host == provider["head_ip"]:
        return [*to_head, f"{user}{outside}"]
    if via is not None:
        return [
            *base,
            "-o",
            f"ProxyCommand={shlex.join([*to_head, '-W', '%h:%p', f'{user}{outside}'])}",
            f"{user}{host}",
        ]
    return [*to_head, f"{user}{host}"]
