"""`cloister doctor`: what this machine can do, what is missing, how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from cloister import __version__
from cloister.cli.common import You, options
from cloister.errors import CloisterError

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, and how to get what is missing."""

    name: str
    state: State
    found: str
    remedy: str = ""


@click.command("doctor", short_help="What this machine can do, what is missing, how to get it.")
@options
def command(you: You) -> None:
    """Look at this machine: TEE, confinement, mounts, memory protection, own known answers.

    Exit status 1 if something is missing that `cloister run` needs.

    \b
    Examples:
      cloister doctor
      cloister doctor --json
    """
    findings = [
        _software(),
        _known_answers(),
        _platform(),
        *_confinement(),
        _mount(),
        _memory(),
        _tool("ssh-keygen", "signs with agents and security keys", "Debian: apt install openssh-client"),
    ]
    if you.broker_url:
        findings.append(_broker(you))
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": you.ui.style("ok     ", "ok"), "missing": you.ui.style("missing", "bad"), "note": "note   "}
    lines = []
    for finding in findings:
        lines.append(f"{finding.name.ljust(width)}  {marks[finding.state]}  {finding.found}")
        if finding.remedy:
            lines.append(f"{' ' * width}           {you.ui.style(finding.remedy, 'dim')}")
    you.ui.result(
        {"findings": [{"name": f.name, "state": f.state, "found": f.found, "remedy": f.remedy} for f in findings]},
        "\n".join(lines),
    )
    if any(finding.state == "missing" for finding in findings):
        raise click.exceptions.Exit(1)


def _software() -> Finding:
    from cloister.attestation.edge.software import measure_package

    return Finding(
        "software",
        "ok",
        f"cloister {__version__}, Python {platform.python_version()}, measurement {measure_package().hex()[:16]}…",
    )


def _known_answers() -> Finding:
    from cloister.crypto.selftest import ANSWERS, run_all

    failed = run_all()
    if failed:
        return Finding(
            "known answers", "missing", f"wrong: {', '.join(failed)}", "reinstall `cryptography`; do not use this"
        )
    return Finding("known answers", "ok", f"{len(ANSWERS)} of {len(ANSWERS)} ({', '.join(ANSWERS)})")


def _platform() -> Finding:
    tsm = Path("/sys/kernel/config/tsm/report")
    devices = [name for name in ("/dev/tdx_guest", "/dev/sev-guest", "/dev/sgx_enclave") if Path(name).exists()]
    if Path("/dev/tdx_guest").exists() and tsm.is_dir():
        return Finding("platform", "ok", "TDX guest with configfs-tsm")
    found = f"no TDX guest interface ({', '.join(devices) or 'no TEE device'})"
    return Finding(
        "platform",
        "note",
        found,
        "good for sealing, signing and asking; nodes here need --insecure-soft-tee, which every contract must name as "
        "`simulated`",
    )


def _confinement() -> list[Finding]:
    from cloister.confine.probe import probe

    seen = probe()
    meaning = {
        "L3": "full jail in a VM TEE",
        "L2": "full jail on a plain host",
        "L1": "reduced: no Landlock; a data owner has to accept it by name",
        "L0": "none",
    }[seen.level]
    parts = [f"bubblewrap {seen.bwrap_version or 'absent'}", f"Landlock ABI {seen.landlock_abi}"]
    parts.append("limits by " + (", ".join(seen.cgroups) if seen.cgroups else "rlimits only"))
    state: State = "ok" if seen.level in ("L2", "L3") else "missing"
    findings = [Finding("sandbox", state, f"{seen.level}, {meaning} ({'; '.join(parts)})")]
    findings += [Finding(reason.where, "missing", reason.found, reason.hint) for reason in seen.missing]
    return findings


def _mount() -> Finding:
    device = Path("/dev/fuse")
    if not device.exists():
        return Finding(
            "mount", "missing", "no /dev/fuse", "load the kernel module `fuse`, or give the container the device"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding(
            "mount", "missing", "/dev/fuse cannot be opened by this user", "run as root, or chmod 0666 /dev/fuse"
        )
    door = "own mount namespace" if os.geteuid() == 0 else "user namespace"
    return Finding("mount", "ok", f"FUSE through {device}, in an {door}")


def _memory() -> Finding:
    from cloister.crypto.memory import harden_process

    got = harden_process()
    swaps = len(Path("/proc/swaps").read_text().splitlines()) - 1 if Path("/proc/swaps").exists() else 0
    text = f"keys in {got.keys_in}, core dumps {'off' if got.core_dumps_off else 'ON'}"
    text += ", pages locked" if got.pages_locked else ", pages can be swapped"
    if swaps and not got.pages_locked:
        return Finding("memory", "note", text, "raise RLIMIT_MEMLOCK, or switch swap off or encrypt it")
    return Finding("memory", "ok", text)


def _tool(name: str, what: str, remedy: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, "ok", f"{path}: {what}") if path else Finding(name, "missing", "not installed", remedy)


def _broker(you: You) -> Finding:
    try:
        broker = you.broker()
    except CloisterError as error:
        return Finding("broker", "missing", error.message, error.hint)
    return Finding("broker", "ok", f"{broker.broker.url}, attested as {broker.broker.claims.tee}")
