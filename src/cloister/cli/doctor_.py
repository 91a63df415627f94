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
        *_evidence(),
        _gpu(),
        *_confinement(),
        _mount(),
        _memory(),
        _tool("ssh-keygen", "signs with agents and security keys", "Debian: apt install openssh-client"),
        _swtpm(),
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


def _evidence() -> list[Finding]:
    from cloister.attestation.edge.attester import look

    findings = []
    for sight in look():
        where = ", ".join(str(path) for path in sight.traces) or "the kernel says so"
        if sight.missing:
            lacking = "; ".join(f"{reason.found}, wanted {reason.wanted}" for reason in sight.missing)
            remedies = "; ".join(dict.fromkeys(reason.hint for reason in sight.missing if reason.hint))
            findings.append(Finding(sight.kind, "note", f"{where}, but it cannot attest: {lacking}", remedies))
        elif sight.kind == "tpm":
            text = f"TPM 2.0 ({where}): attests this host, which protects nothing from its administrator"
            findings.append(Finding(sight.kind, "ok", text))
        else:
            findings.append(Finding(sight.kind, "ok", f"this is inside {_NAMES.get(sight.kind, sight.kind)} ({where})"))
    if not any(finding.state == "ok" and finding.name != "tpm" for finding in findings):
        devices = ", ".join(finding.name for finding in findings)
        text = f"not inside a TEE that can attest (found: {devices})" if devices else "no TEE device and no TPM"
        remedy = (
            "good for sealing, signing and asking; nodes here need --insecure-soft-tee, which every contract must name as "
            "`simulated`"
        )
        findings.insert(0, Finding("platform", "note", text, remedy))
    return findings


_NAMES = {
    "tdx": "a TDX guest",
    "sev-snp": "an SEV-SNP guest",
    "cca": "an Arm CCA realm",
    "sgx": "an SGX enclave",
    "nitro": "an AWS Nitro enclave",
    "azure-snp": "an Azure confidential VM on SEV-SNP",
    "azure-tdx": "an Azure confidential VM on TDX",
}


def _gpu() -> Finding:
    from cloister.attestation.edge import nvml

    driver = Path("/proc/driver/nvidia/version")
    try:
        state = nvml.state()
        count = len(nvml.find_gpus())
    except CloisterError as error:
        if not driver.exists():
            return Finding("gpu", "note", "no NVIDIA driver")
        return Finding("gpu", "note", f"{driver}, but {error.message}", error.hint)
    problem = state.problem()
    if problem is not None:
        return Finding("gpu", "note", f"{count} NVIDIA GPUs; {problem.found}", problem.hint)
    return Finding("gpu", "ok", f"{count} NVIDIA GPUs, confidential computing on")


def _swtpm() -> Finding:
    path = shutil.which("swtpm")
    if path is None:
        return Finding("swtpm", "note", "not installed: needed by tests only", "Debian: apt install swtpm")
    return Finding("swtpm", "ok", f"{path}: TPMs for tests")


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
