"""`cloister verify`: check hardware evidence, a sealed volume or a receipt, offline."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from cloister.cli.common import You, options
from cloister.cli.keyring import Keyring
from cloister.cli.ui import human_bytes, human_seconds
from cloister.errors import InputError, Reason


class _Time(click.ParamType[datetime]):
    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        from cloister.attestation.files.manifest import parse_time

        try:
            return parse_time(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2025-11-01T00:00:00Z", param, ctx)


class _Hex(click.ParamType[bytes]):
    name = "HEX"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        try:
            found = bytes.fromhex(str(value))
        except ValueError:
            self.fail(f"{value!r} is not hexadecimal", param, ctx)
        if not found:  # a variable of a script that was never set, most often
            self.fail("an empty nonce asks for nothing; leave the option out", param, ctx)
        return found


@click.command("verify", short_help="Check hardware evidence, a sealed volume or a receipt.")
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--at", type=_Time(), help="Judge evidence at this time (RFC 3339).  [default: now]")
@click.option(
    "--collateral",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Vendor collateral: a file of the vendor, a snapshot, or a store (`cloister collateral`).",
)
@click.option(
    "--policy",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also judge by a place: a contract, or its [place] tables.",
)
@click.option("--place", default="", help="Which place of the policy.  [default: the only one]")
@click.option("--nonce", type=_Hex(), help="The nonce that the evidence must be over.")
@click.option(
    "--manifest",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Run a directory of evidence with expected outcomes.",
)
@click.option("--digest", default=None, help="The root digest that the volume must have.")
@click.option("--log-key", default="", help="Verifier key of the log.  [default: of the broker remembered in HOME]")
@options
def command(
    you: You,
    paths: tuple[str, ...],
    at: datetime | None,
    collateral: tuple[Path, ...],
    policy: Path | None,
    place: str,
    nonce: bytes | None,
    manifest: Path | None,
    digest: str | None,
    log_key: str,
) -> None:
    """Check evidence, a sealed volume, or a receipt file, offline.

    Evidence is what hardware signed: quotes and reports of SGX, TDX, SEV-SNP, TPM, NVIDIA, Nitro, Azure and CCA, alone or with the
    files that explain them (certificates, logs, reference manifests), in the vendor's formats or Cloister's. Files are
    recognised; ROLE=FILE says what one is (quote, report, leaf, chain, collateral, ccel, ...). Every step is shown; exit
    status 0 only if all of them were done and passed, and the policy, if there is one, holds.

    With the key of the volume in your home, every record is opened and audited. Without it, whoever merely hosts the
    volume can still check every stored byte against its name: give the --digest that its contract or receipt states.

    \b
    Examples:
      cloister verify quote.bin --collateral collateral.json --at 2025-06-25T00:00:00Z
      cloister verify report.bin vcek.der --collateral milan.pem --collateral milan.crl --policy contract.toml --place enclave
      cloister verify --manifest vectors/manifest.json
      cloister verify scans.sealed
      cloister verify scans.sealed --digest sha256:5f70…
      cloister verify HOME/receipts/answer-17.json
    """
    if manifest is not None:
        from cloister.cli import evidence

        if paths:
            raise InputError("a manifest names its own files", hint="give either --manifest or files")
        evidence.verify_manifest(you, manifest, at=at)
    elif len(paths) == 1 and Path(paths[0]).is_dir():
        _volume(you, Path(paths[0]), digest)
    elif len(paths) == 1 and _is_receipt(Path(paths[0])):
        _receipt(you, Path(paths[0]), log_key)
    elif paths:
        from cloister.cli import evidence

        wanted, contract = (None, None) if policy is None else evidence.read_policy(policy, place)
        evidence.verify_files(you, paths, at=at, collateral=collateral, policy=wanted, nonce=nonce, contract=contract)
    else:
        raise InputError("what is to be verified?", hint="`cloister verify --help` shows what can be")


def _is_receipt(path: Path) -> bool:
    """Whether `path` is to be read as a receipt: JSON of that shape, or nothing that evidence could be."""
    from cloister.attestation import evidence as wire
    from cloister.attestation.files.sniff import sniff
    from cloister.cli.common import read_file
    from cloister.errors import EvidenceError

    data = read_file(path, "what is to be verified")
    if sniff(data) is not None:
        return False
    try:
        wire.decode(data)
    except EvidenceError:
        return True
    return False


def _volume(you: You, path: Path, digest: str | None) -> None:
    import time

    from cloister.volume.check import check
    from cloister.volume.read import Volume, peek

    head = peek(path)
    key = Keyring(you.home / "keys").find(head.volume_id)
    begin = time.perf_counter()
    if key is None:
        if digest is None:
            raise InputError(
                f"you have no key of {path}, so its name is needed",
                reasons=[Reason("--digest", "nothing", "sha256:… from the contract or a receipt")],
                hint="without key and name only accidents could be found, not an exchange of the whole volume",
            )
        with you.ui.bar("checking") as bar:
            head = check(path, expect=digest, progress=bar.update)
        took = time.perf_counter() - begin
        you.ui.result(
            {"digest": head.digest, "generation": head.generation, "seconds": took, "key": False},
            f"{head.digest}: every stored byte is what its name says (checked without a key) in {human_seconds(took)}",
        )
        return
    volume = Volume.open(path, key, expect=digest)
    with you.ui.bar("verifying") as bar:
        volume.verify(progress=bar.update)
    took = time.perf_counter() - begin
    you.ui.result(
        {
            "digest": volume.digest,
            "generation": volume.generation,
            "entries": len(volume.tree),
            "size_bytes": volume.data_len,
            "seconds": took,
            "key": True,
        },
        f"{volume.digest}: every record is authentic, {human_bytes(volume.data_len)} in {human_seconds(took)}",
    )


def _receipt(you: You, path: Path, log_key: str) -> None:
    from cloister.broker.log.receipt import check_receipt
    from cloister.cli.audit_ import log_key_of, read_receipt, remembered

    key = log_key or remembered(you).log_key
    verified = check_receipt(read_receipt(path), log_key_of(key))
    leaf = verified.leaf
    you.ui.result(
        {"index": verified.index, "size": verified.signed.checkpoint.size, "kind": leaf.KIND, "leaf": leaf.as_json()},
        f"entry {verified.index} of {verified.signed.checkpoint.origin}: {leaf.KIND} at {leaf.time:%Y-%m-%d %H:%M:%S} UTC; "
        "its place in the log is proven",
    )
