"""Hosts made of namespaces: each has its own processes, network, name, home, /tmp and sshd, all on one bridge.

What Ray and moepipe see is what several machines would show them: other process numbers, addresses, host names, disks,
and one shared folder that stands for NFS. `kill` is the loss of power, `boot` brings the host back with its disk, `cut`
pulls its cable. Everything lives below one process (the first of a PID namespace) which ends when its standard input
closes: whatever happens to the tests, nothing is left.

Unlike machines: one kernel, clock and processor for all, and the shared folder does not run over the network, so a cut
host still sees it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil

USER, UID = "ubuntu", 1000
HOME = f"/home/{USER}"
SHARED = "/mnt/shared"
PYTHON, PACKAGES = "/opt/python", "/opt/packages"
_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen", "rsync")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The switch: one private mount and network namespace. Its file systems are what all hosts begin with.
_SWITCH = r"""
set -eu
mount -t tmpfs -o mode=755 tmpfs /opt && mount -t tmpfs -o mode=755 tmpfs /home
mkdir -p /opt/python /opt/packages /opt/base /home/ubuntu
mount --bind "$PYTHON" /opt/python && mount --bind "$PACKAGES" /opt/packages && mount --bind "$BASE" /opt/base
mount -t tmpfs -o mode=755 tmpfs /mnt && mkdir /mnt/shared && mount --bind "$BASE/shared" /mnt/shared
mount --bind "$BASE/etc/passwd" /etc/passwd && mount --bind "$BASE/etc/group" /etc/group
mount --bind "$BASE/etc/shadow" /etc/shadow && mount --bind "$BASE/etc/hosts" /etc/hosts
if ! setpriv --reuid=1000 --regid=1000 --clear-groups test -x "$PYTHON/bin"; then
  # A Python in root's home, whose libraries are looked for by that path.
  top="/$(echo "$PYTHON" | cut -d / -f 2)"
  test "$top" = /home || mount -t tmpfs -o mode=755 tmpfs "$top"
  mkdir -p "$PYTHON" && mount --bind /opt/python "$PYTHON"
fi
ip link set lo up && ip link add br0 type bridge && ip addr add 10.0.0.1/24 dev br0 && ip link set br0 up
echo ready
cat > /dev/null || true
"""

# A host: its first process. bash reaps whatever is left to it, as an init does.
_HOST = r"""
set -eu
hostname "$NAME"
mount --bind "/opt/base/hosts/$NAME/home" /home/ubuntu
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -m 755 /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "/opt/base/hosts/$NAME/tmp" /tmp
read -r _
ip link set lo up && ip addr add "$ADDRESS/24" dev eth0 && ip link set eth0 up && ip route add default via 10.0.0.1
/usr/sbin/sshd -D -e -f "/opt/base/etc/sshd_config" 2> "/opt/base/hosts/$NAME/sshd.log" &
echo ready
while true; do wait || true; sleep 1; done
"""

_SSHD = """Port 22
HostKey /opt/base/etc/host_key
AuthorizedKeysFile /opt/base/etc/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
PrintMotd no
PrintLastLog no
UseDNS no
MaxStartups 100
LogLevel ERROR
"""


def lacking() -> str:
    """Why no hosts can be made here, in one sentence; empty when they can."""
    path = f"{os.environ.get('PATH', '')}:{_PATH}"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        packages = "openssh-server openssh-client rsync iproute2 util-linux"
        return f"hosts need {', '.join(missing)} (apt-get install {packages})"
    probe = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--net", "--uts", "--ipc", "--kill-child"]
    script = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge && ip link add name va type veth peer name vb"
    done = subprocess.run([*probe, "sh", "-c", script], capture_output=True, text=True, env={"PATH": _PATH})
    return f"hosts need root and namespaces: {done.stderr.strip() or 'refused'}" if done.returncode else ""


class Host:
    """One host. Made by :meth:`Hosts.add`."""

    def __init__(self, hosts: Hosts, name: str, address: str) -> None:
        self.hosts, self.name, self.address = hosts, name, address
        self.folder = hosts.base / "hosts" / name
        self.home, self.tmp = self.folder / "home", self.folder / "tmp"
        for path, mode, owner in ((self.home, 0o755, UID), (self.tmp, 0o1777, 0)):
            path.mkdir(parents=True)
            path.chmod(mode)
            os.chown(path, owner, owner)
        self._outer: subprocess.Popen[str] | None = None
        self.pid = 0
        self._cable = f"v-{name}"[:15]

    # ---- power and cable -------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Switch it on; what lay in its home is there, /tmp is empty as after any boot."""
        for path in self.tmp.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.hosts.ip(f"link del {self._cable}", check=False)
        spaces = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--net", "--uts", "--ipc", "--kill-child"]
        command = [*self.hosts.enter("--pid"), *spaces, "bash", "-c", _HOST]
        outer = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "boot.log").open("w"),
            text=True,
            env={"PATH": _PATH, "NAME": self.name, "ADDRESS": self.address},
        )
        self._outer = outer
        assert outer.stdin and outer.stdout
        self.pid = _innermost(outer.pid, "bash")
        self.hosts.ip(f"link add {self._cable} type veth peer name eth0 netns {self.pid}")
        self.hosts.ip(f"link set {self._cable} master br0 up")
        outer.stdin.write("go\n")
        outer.stdin.flush()
        assert outer.stdout.readline() == "ready\n", (
            f"{self.name} does not boot: {(self.folder / 'boot.log').read_text()}"
        )

    def kill(self) -> None:
        """Power off: the cable is dead and every process gone at once, nobody says goodbye."""
        self.cut()
        os.kill(self.pid, signal.SIGKILL)
        assert self._outer
        self._outer.wait(timeout=30)
        self.pid = 0

    def cut(self) -> None:
        """Pull the cable: packets go nowhere, in both directions."""
        self.hosts.ip(f"link set {self._cable} down")

    def heal(self) -> None:
        """Plug the cable in again."""
        self.hosts.ip(f"link set {self._cable} up")

    # ---- commands --------------------------------------------------------------------------------------------------

    def command(self, line: str, root: bool = False, **environment: str) -> list[str]:
        """The words that run a shell line on the host, as its user in a login shell."""
        spaces = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--net", "--uts", "--ipc", "--"]
        who = [] if root else ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        home = "/root" if root else HOME
        given = [f"{name}={value}" for name, value in environment.items()]
        clean = ["env", "-i", f"PATH={_PATH}", f"HOME={home}", f"USER={'root' if root else USER}", "LANG=C.UTF-8"]
        return [*spaces, *who, *clean, *given, "bash", "-c", f"cd {home} && {line}"]

    def run(
        self, line: str, timeout: float = 120, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell line to its end."""
        done = subprocess.run(
            self.command(line, **environment), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{self.name}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def processes(self) -> list[psutil.Process]:
        """What runs on the host besides its first process and sshd."""
        found = []
        space = os.readlink(f"/proc/{self.pid}/ns/pid") if self.pid else ""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") != space or process.pid == self.pid:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and process.name() not in ("sshd", "sleep"):
                    found.append(process)
        return found

    def rays(self) -> list[str]:
        """Command lines of Ray's processes and of what Ray started there."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if "ray" in line.lower():
                    found.append(f"{process.pid} {line[:120]}")
        return found


class Hosts:
    """The network and its hosts; a context manager.

    Args:
        base: an empty folder for their disks.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.shared = base / "shared"
        self.all: dict[str, Host] = {}
        self._switch: subprocess.Popen[str] | None = None
        self._pid = 0

    def __enter__(self) -> Hosts:
        etc = self.base / "etc"
        etc.mkdir(parents=True)
        self.shared.mkdir()
        os.chown(self.shared, UID, UID)
        root = "root:x:0:0:root:/root:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
        (etc / "passwd").write_text(f"{root}{USER}:x:{UID}:{UID}::{HOME}:/bin/bash\n")
        (etc / "group").write_text(f"root:x:0:\nnogroup:x:65534:\ntty:x:5:\n{USER}:x:{UID}:\n")
        (etc / "shadow").write_text(f"root:*:19000:0:99999:7:::\n{USER}:*:19000:0:99999:7:::\n")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "sshd_config").write_text(_SSHD)
        for name in ("host_key", "key"):
            self._keygen(etc / name)
        (etc / "authorized_keys").write_text((etc / "key.pub").read_text())
        for path in (self.base, *self.base.parents):  # the hosts' user must get at its own disk
            if path.stat().st_mode & 0o111 != 0o111 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o111)
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--net", "--kill-child"]
        self._switch = subprocess.Popen(
            [*command, "bash", "-c", _SWITCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                "PATH": _PATH,
                "BASE": str(self.base),
                "PYTHON": sys.base_prefix,
                "PACKAGES": sysconfig.get_path("purelib"),
            },
        )
        assert self._switch.stdout
        assert self._switch.stdout.readline() == "ready\n", "the network of the hosts was not made"
        self._pid = _innermost(self._switch.pid, "bash")
        return self

    def __exit__(self, *_: object) -> None:
        """Everything goes: the hosts, their processes, mounts and cables."""
        if self._switch is None:
            return
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._switch.kill()
        self._switch.wait(timeout=30)
        for host in self.all.values():
            if host._outer is not None:
                host._outer.kill()
                host._outer.wait(timeout=30)

    def add(self, name: str, address: str) -> Host:
        """A new host, booted."""
        host = Host(self, name, address)
        self.all[name] = host
        with (self.base / "etc" / "hosts").open("a") as stream:
            stream.write(f"{address} {name}\n")
        host.boot()
        return host

    def enter(self, *more: str) -> list[str]:
        """The words that run a program on the switch."""
        return ["nsenter", "--target", str(self._pid), "--mount", "--net", *more, "--"]

    def ip(self, words: str, check: bool = True) -> None:
        """Call ``ip`` on the switch; process numbers are those of the tests."""
        command = ["nsenter", "--target", str(self._pid), "--net", "--", "ip", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": _PATH})
        assert not check or done.returncode == 0, f"ip {words}: {done.stderr}"

    def make_python(self, target: Path) -> None:
        """A virtual environment at ``~/moepipe/venv`` of a host with all that moepipe needs, but not moepipe itself.

        It stands for the long download of the first `pip install`: the packages of the environment that runs the tests
        are mounted read-only and found through a path file, so that pip is content with them.
        """
        home = f"{HOME}/moepipe/venv"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = target / "lib" / version / "site-packages"
        site.mkdir(parents=True)
        (target / "bin").mkdir()
        (target / "pyvenv.cfg").write_text(f"home = {PYTHON}/bin\ninclude-system-site-packages = false\n")
        for name in ("python", "python3", version):
            (target / "bin" / name).symlink_to(f"{PYTHON}/bin/{version}")
        (site / "everything_else.pth").write_text(f"{PACKAGES}\n")
        programs = {"pip": "pip._internal.cli.main", "ray": "ray.scripts.scripts"}
        for name, module in programs.items():
            path = target / "bin" / name
            path.write_text(f"#!{home}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
            path.chmod(0o755)
        for path in (target, *target.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)

    @staticmethod
    def _keygen(path: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True, env={"PATH": _PATH})


def _innermost(pid: int, name: str) -> int:
    """Number, as seen here, of the process of this name below ``pid`` that is the first of its namespace."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children(recursive=True):
                status = Path(f"/proc/{child.pid}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid")).split()
                if numbers[-1] == "1" and child.name() == name:
                    return child.pid
        time.sleep(0.05)
    raise AssertionError(f"no first process below {pid}")


def give(host: Host, source: Path, target: str) -> None:
    """Copy a file or folder into a host's home, as its user's."""
    place = host.home / target
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, place)
    top = host.home / Path(target).parts[0]
    for path in (top, *top.rglob("*")):
        os.chown(path, UID, UID, follow_symlinks=False)


def quote(words: list[str]) -> str:
    """Words -> one shell line."""
    return shlex.join(words)
