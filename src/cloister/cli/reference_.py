"""`cloister reference`: signed reference values, made without the hardware, imported from whoever vouches for them."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cloister.cli.common import You, now, options, read_file, read_workload, system_error, write_file
from cloister.errors import EvidenceError, InputError, Reason

if TYPE_CHECKING:
    from cloister.attestation.reference import Document, Workload
    from cloister.attestation.types import Software

SEEN: Final = "references.json"
"""In HOME: the highest serial seen of each signer and name."""


@click.group("reference", short_help="Make, show and import signed reference values.")
def command() -> None:
    """What good software measures, stated by whoever made it, and signed.

    A document names programs (digests of `cloister measure`) and builds of machines (launch measurements). Its signature is an SSH
    signature in FILE.sig; its serial grows, and an older document is refused once a newer one was seen.

    \b
    Examples:
      cloister reference make --name trainer --workload trainer.workload --to trainer.json
      cloister reference import trainer.json --signer SHA256:5cHj…
    """


@command.command("make", short_help="Write and sign a document of reference values.")
@click.option("--name", required=True, help="What the values are of, such as node-image.")
@click.option(
    "--serial", type=click.IntRange(min=1), help="Grows with each document.  [default: one more than the last one seen]"
)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long it counts.")
@click.option(
    "--workload",
    "workloads",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="A file of `cloister measure --to`.",
)
@click.option("--software", is_flag=True, help="This Cloister installation, as a soft TEE measures it.")
@click.option(
    "--evidence",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="Evidence of a machine that you know to be good: verified, then its launch measurement counts.",
)
@click.option("--collateral", type=click.Path(path_type=Path), multiple=True, help="Vendor collateral for --evidence.")
@click.option(
    "--snp-firmware", type=click.Path(dir_okay=False, path_type=Path), help="Firmware (OVMF) of an SEV-SNP guest."
)
@click.option("--snp-kernel", type=click.Path(dir_okay=False, path_type=Path), help="Its kernel, for direct boot.")
@click.option("--snp-initrd", type=click.Path(dir_okay=False, path_type=Path), help="Its initial file system.")
@click.option("--snp-append", default="", help="Its kernel command line.")
@click.option(
    "--snp-vcpus", type=click.IntRange(1, 4096), default=1, show_default=True, help="Its number of processors."
)
@click.option("--snp-vcpu-type", default="EPYC-v4", show_default=True, help="Its processor model, as QEMU names it.")
@click.option(
    "--to", "target", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Where to write it."
)
@options
def make(
    you: You,
    name: str,
    serial: int | None,
    days: int,
    workloads: tuple[Path, ...],
    software: bool,
    evidence: tuple[Path, ...],
    collateral: tuple[Path, ...],
    snp_firmware: Path | None,
    snp_kernel: Path | None,
    snp_initrd: Path | None,
    snp_append: str,
    snp_vcpus: int,
    snp_vcpu_type: str,
    target: Path,
) -> None:
    """Write a document of reference values and sign it with your SSH key.

    The launch digest of an SEV-SNP guest is computed from its files, without the hardware (needs the extra `tools`). The values
    of a machine that already runs come from its verified evidence.

    \b
    Examples:
      cloister reference make --name trainer --workload trainer.workload --to trainer.json
      cloister reference make --name node --snp-firmware OVMF.fd --snp-kernel bzImage --snp-initrd initrd --to node.json
      cloister reference make --name node --evidence quote.bin --collateral collateral.json --to node.json
    """
    found: list[Software] = []
    if software:
        found.append(_own())
    for path in evidence:
        with you.ui.step(f"verifying {path}") as step:
            found.append(_verified(you, path, collateral))
            step.text = f"{path}: genuine, its launch measurement is taken"
    if snp_firmware is not None:
        from cloister.attestation.edge.launch import launch_digest
        from cloister.attestation.types import Software as Values

        digest = launch_digest(
            snp_firmware,
            cpus=snp_vcpus,
            cpu_type=snp_vcpu_type,
            kernel=snp_kernel,
            initrd=snp_initrd,
            cmdline=snp_append,
        )
        found.append(Values(label(name), "sev-snp", {"measurement": frozenset({digest})}))
    if not (found or workloads):
        raise InputError("no reference values", hint="give --workload, --software, --evidence or --snp-firmware")
    from cloister.attestation.reference import Workload as Program

    programs = tuple(Program(label(path.stem), read_workload(path).digest) for path in workloads)
    document, digest_of = write(you, target, name, serial, days, tuple(found), programs)
    you.ui.result(
        {"digest": digest_of, "serial": document.serial, "file": str(target), "signer": you.fingerprint()},
        f"{target}: {name} {document.serial}, {digest_of}; signed by {you.fingerprint()} in {target}.sig",
    )


def write(
    you: You,
    target: Path,
    name: str,
    serial: int | None,
    days: int,
    software: tuple[Software, ...],
    workloads: tuple[Workload, ...],
) -> tuple[Document, str]:
    """Write and sign a document; returns it and its digest.

    Raises:
        InputError: values that no document may have, or no key to sign with.
    """
    with _alone(you):
        return _write(you, target, name, serial, days, software, workloads)


def _write(
    you: You,
    target: Path,
    name: str,
    serial: int | None,
    days: int,
    software: tuple[Software, ...],
    workloads: tuple[Workload, ...],
) -> tuple[Document, str]:
    from cloister.attestation import reference

    signer = you.fingerprint()
    seen = _seen(you)
    last = seen.get(f"{signer} {name}", 0)
    begin = now().replace(microsecond=0)
    document = reference.Document(name, serial or last + 1, begin, begin + timedelta(days=days), software, workloads)
    if document.serial <= last:
        raise InputError(
            f"'{name}' already has a document with serial {last}",
            reasons=[Reason("--serial", str(document.serial), f"{last + 1} or more")],
        )
    data = document.encode()
    try:
        reference.decode(data)
    except EvidenceError as error:
        raise InputError("these are no reference values", reasons=error.reasons) from error
    signature = you.signer()(data, namespace=reference.NAMESPACE)
    write_file(target.with_name(f"{target.name}.sig"), signature.encode())
    write_file(target, data)
    _remember(you, signer, document)
    return document, reference.digest(data)


@command.command("show", short_help="What a document of reference values says.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@options
def show(you: You, file: Path) -> None:
    """Show FILE and who signed it; nothing is believed or remembered.

    \b
    Example:
      cloister reference show node.json
    """
    from cloister.attestation import reference

    data = read_file(file, "reference values")
    document = _decode(file, data)
    signer = _signer(file, data)
    _tell(you, document, reference.digest(data), signer, imported=False)


@command.command("import", short_help="Check a signed document and show what a contract has to say to use it.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--signer", required=True, metavar="SHA256:...", help="Fingerprint of the key that has to have signed it."
)
@options
def import_(you: You, file: Path, signer: str) -> None:
    """Check that FILE was signed by SIGNER, counts today and is not older than one that you have seen; then remember its serial.

    What it prints goes into the contract: `[[place.<name>.software]]` tables and `code` digests. Evidence with any other value is
    refused.

    \b
    Example:
      cloister reference import node.json --signer SHA256:5cHj…
    """
    from cloister.attestation import reference

    data = read_file(file, "reference values")
    found = _signer(file, data)
    if found != signer:
        raise InputError(
            f"{file} was signed by another key",
            code="signature-invalid",
            reasons=[Reason("reference.signer", found, signer, "do not use these values")],
        )
    document = _decode(file, data)
    digest = reference.digest(data)
    with _alone(you):
        problem = document.problem(now=now(), least=_seen(you).get(f"{signer} {document.name}", 0))
        if problem is not None:
            raise EvidenceError("these reference values do not count", code="evidence-unacceptable", reasons=[problem])
        write_file(you.home / "references" / f"{digest.removeprefix('sha256:')}.json", data)
        _remember(you, signer, document)
    _tell(you, document, digest, signer, imported=True)


def _own() -> Software:
    from cloister import __version__
    from cloister.attestation.edge.software import measure_package
    from cloister.attestation.types import Software as Values

    return Values(f"cloister-{__version__}", "tdx", {"mrtd": frozenset({measure_package()})})


def _verified(you: You, path: Path, collateral: tuple[Path, ...]) -> Software:
    from cloister.attestation.reference import of_claims
    from cloister.cli.evidence import observe_files

    observed = observe_files(you, [str(path)], at=now(), collateral=collateral, nonce=None)
    undone = [step.name for step in observed.steps if step.state != "passed"]
    if observed.error is not None:
        raise observed.error
    if observed.claims is None or undone:
        found = ", ".join(undone) or "no claims"
        raise EvidenceError(
            f"{path} is not verified to the end",
            code="evidence-not-authentic",
            reasons=[Reason("reference.evidence", found, "every step passed", "give the vendor's collateral")],
        )
    if observed.claims.debug:
        raise EvidenceError(
            f"{path} is of a debuggable TEE",
            code="evidence-unacceptable",
            reasons=[Reason("reference.evidence", "debug", "debug off")],
        )
    if observed.claims.soft:
        you.ui.warn(f"{path} is software evidence: its values are worth nothing on hardware")
    try:
        return of_claims(observed.claims, label(path.stem))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def label(text: str) -> str:
    """Return `text` as a label that contracts take, too."""
    return re.sub(r"[^a-z0-9._-]", "-", text.lower())[:40].lstrip("._-") or "build"


def _decode(file: Path, data: bytes) -> Document:
    from cloister.attestation import reference

    try:
        return reference.decode(data)
    except EvidenceError as error:
        raise InputError(f"{file} holds no reference values", reasons=error.reasons) from error


def _signer(file: Path, data: bytes) -> str:
    from cloister.attestation.reference import NAMESPACE
    from cloister.contract import sshsig

    signature = read_file(file.with_name(f"{file.name}.sig"), "the signature of the reference values")
    return sshsig.verify(signature, data, namespace=NAMESPACE).fingerprint


@contextmanager
def _alone(you: You) -> Iterator[None]:
    """Hold the memory of serials from the look at it to the change: two commands at once must not forget each other's."""
    try:
        you.home.mkdir(parents=True, exist_ok=True)
        lock = (you.home / f"{SEEN}.lock").open("a")
    except OSError as error:
        raise system_error(error, f"cannot use {you.home}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _seen(you: You) -> dict[str, int]:
    path = you.home / SEEN
    if not path.exists():
        return {}
    try:
        value = json.loads(read_file(path, "the serials of reference values"))
        if isinstance(value, dict) and all(isinstance(each, int) for each in value.values()):
            return value
    except ValueError:
        pass
    raise InputError(
        f"{path} is damaged",
        hint="it remembers which reference values you have seen; restore it, or delete it and lose that",
    )


def _remember(you: You, signer: str, document: Document) -> None:
    seen = _seen(you)
    key = f"{signer} {document.name}"
    seen[key] = max(seen.get(key, 0), document.serial)
    write_file(you.home / SEEN, json.dumps(seen, indent=1, sort_keys=True).encode())


def _tell(you: You, document: Document, digest: str, signer: str, *, imported: bool) -> None:
    lines = [
        f"# {document.name} {document.serial}, {digest}",
        f"# signed by {signer}; counts from {_day(document.issued)} to {_day(document.until)}",
    ]
    for software in document.software:
        lines += toml(software)
    launches = sorted({each.hex() for values in document.software for each in _launches(values)})
    if launches:
        lines.append("# for `cloister up --node` and --trust-node: " + " ".join(launches))
    lines += [f'# code: {each.label} = {{ owner = "…", digest = "{each.code}" }}' for each in document.workloads]
    if imported:
        lines.append("# checked; goes below the place that shall accept it")
    data: dict[str, Any] = {**json.loads(document.encode()), "digest": digest, "signer": signer, "imported": imported}
    you.ui.result(data, "\n".join(lines))


LAUNCH: Final = frozenset({"mrtd", "mrenclave", "measurement", "pcr0", "rim", "boot_aggregate", "azure_launch"})
"""Measurements that name the software started (`Claims.launch`)."""


def _launches(values: Software) -> frozenset[bytes]:
    return frozenset().union(*(accepted for name, accepted in values.measurements.items() if name in LAUNCH))


def toml(software: Software, place: str = "enclave") -> list[str]:
    """Return `software` as a contract writes it, line by line."""
    lines = [f"[[place.{place}.software]]", f'label = "{label(software.label)}"']
    if software.tee:
        lines.append(f'tee = "{software.tee}"')
    if software.measurements:
        values = ", ".join(
            f"{name} = [{', '.join(json.dumps(each.hex()) for each in sorted(accepted))}]"
            for name, accepted in sorted(software.measurements.items())
        )
        lines.append(f"measurements = {{ {values} }}")
    for key, numbers in (("svns_equal", software.svns_equal), ("svns_least", software.svns_least)):
        if numbers:
            lines.append(f"{key} = {{ {', '.join(f'{name} = {number}' for name, number in sorted(numbers.items()))} }}")
    if software.log:
        rules = ", ".join(
            f"{{ index = {rule.register}, digests = [{', '.join(json.dumps(each.hex()) for each in sorted(rule.digests))}], "
            f"only = {str(rule.only).lower()} }}"
            for rule in software.log
        )
        lines.append(f"log = [{rules}]")
    return lines


def _day(time: datetime) -> str:
    return f"{time:%Y-%m-%d}"
