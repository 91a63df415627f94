"""`cloister collateral`: keep, fetch and carry what vendors publish about their hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from cloister.cli.common import You, count, now, options, read_file, table, write_file
from cloister.cli.ui import human_bytes
from cloister.errors import InputError, Reason

if TYPE_CHECKING:
    from cloister.attestation.collateral.needs import Need
    from cloister.attestation.edge.store import Change, Store
    from cloister.attestation.endorsements import Endorsements
    from cloister.attestation.roots import Roots
    from cloister.attestation.types import Evidence

P = ParamSpec("P")
R = TypeVar("R")
PRODUCTS: Final = ("Milan", "Genoa", "Turin")


def stored(function: Callable[P, R]) -> Callable[P, R]:
    """`--store`."""
    return click.option(
        "--store",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="The store's folder.  [default: HOME/collateral]",
    )(function)


@click.group("collateral", short_help="Keep, fetch and carry what hardware vendors publish.")
def command() -> None:
    """Keep, fetch and carry what hardware vendors publish: TCB info, certificates, revocation lists, manifests.

    It is kept in a store, a folder whose numbers only go up: an older revocation list is refused. Nothing in it is believed before
    evidence is verified with it. `cloister up` and `cloister verify` take a store, a snapshot or a vendor's file as --collateral.

    \b
    Examples:
      cloister collateral fetch --for quote.bin
      cloister collateral list
      cloister collateral export collateral.snapshot --key ~/.ssh/id_ed25519
      cloister collateral import collateral.snapshot --signer SHA256:47DEQ…
      cloister up --collateral ~/.config/cloister/collateral
    """


@command.command("list")
@stored
@options
def list_(you: You, folder: Path | None) -> None:
    """List what the store holds, its numbers, and until when each is valid.

    \b
    Examples:
      cloister collateral list
      cloister collateral list --json
    """
    from cloister.attestation.collateral import marks
    from cloister.attestation.collateral.read import ends

    store = _store(you, folder)
    found = store.endorsements()
    time = now()
    rows: list[dict[str, str]] = []
    data: list[dict[str, Any]] = []
    for item in sorted(found.items, key=lambda each: (each.kind, each.subject)):
        numbers = marks.numbers(item, found, _roots(you), now=time)
        until = ends(item)
        over = until is not None and until < time
        counted = [
            value for name, value in numbers.items() if not name.endswith("/time") and not name.startswith("ocsp/")
        ]
        rows.append(
            {
                "kind": item.kind,
                "subject": item.subject if len(item.subject) <= 60 else item.subject[:59] + "…",
                "number": str(counted[0]) if counted else "-",
                "until": "-" if until is None else f"{until:%Y-%m-%d %H:%M}{' (over)' if over else ''}",
                "size": human_bytes(len(item.data)),
            }
        )
        data.append(
            {
                "kind": item.kind,
                "subject": item.subject,
                "numbers": dict(numbers),
                "until": None if until is None else until.isoformat(),
                "over": over,
                "size": len(item.data),
            }
        )
    text = table(rows) or f"{store.folder} holds no collateral"
    you.ui.result({"store": str(store.folder), "items": data, "marks": dict(store.marks())}, text)


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@stored
@options
def add(you: You, files: tuple[Path, ...], folder: Path | None) -> None:
    """Add vendors' files: quote collateral, chains, revocation lists, manifests, OCSP responses.

    Files are recognised by their bytes. All are added or none: what is older than what is there is refused.

    \b
    Examples:
      cloister collateral add collateral.json
      cloister collateral add milan.pem milan.crl NV_GPU_VBIOS_1010_0200_882_96009F0001.xml
    """
    from cloister.attestation.collateral.snapshot import looks_like_one

    for path in files:
        if path.is_file() and looks_like_one(read_file(path, "the collateral")[:8]):
            raise InputError(
                f"{path} is a snapshot", hint="`cloister collateral import` takes it, and checks its signer"
            )
    store = _store(you, folder)
    with you.ui.step(f"adding {count(len(files), 'file')}"):
        change = store.add_files(files, roots=_roots(you), now=now())
    _tell(you, store, change)


@command.command()
@click.option(
    "--for",
    "evidence",
    multiple=True,
    metavar="EVIDENCE",
    help="Fetch what this evidence needs; several files of one piece of evidence.",
)
@click.option("--fmspc", multiple=True, metavar="HEX", help="Intel machines of this FMSPC, 12 hex digits.")
@click.option("--tee", type=click.Choice(["tdx", "sgx"]), multiple=True, help="For --fmspc.  [default: both]")
@click.option(
    "--ca",
    type=click.Choice(["platform", "processor"]),
    default="platform",
    show_default=True,
    help="For --fmspc: who issued the machines' PCK certificates.",
)
@click.option("--product", type=click.Choice(PRODUCTS), multiple=True, help="AMD's product line.")
@click.option("--rim", multiple=True, metavar="ID", help="NVIDIA's manifest of this id.")
@click.option("--pcs", metavar="URL", help="Intel's service, or a cache of it (PCCS).")
@click.option("--root-crl", metavar="URL", help="Revocation list of Intel's root.")
@click.option("--kds", metavar="URL", help="AMD's service.")
@click.option("--rim-service", metavar="URL", help="NVIDIA's manifests.")
@click.option("--ocsp", metavar="URL", help="NVIDIA's OCSP responder.")
@stored
@options
def fetch(
    you: You,
    evidence: tuple[str, ...],
    fmspc: tuple[str, ...],
    tee: tuple[str, ...],
    ca: str,
    product: tuple[str, ...],
    rim: tuple[str, ...],
    pcs: str | None,
    root_crl: str | None,
    kds: str | None,
    rim_service: str | None,
    ocsp: str | None,
    folder: Path | None,
) -> None:
    """Fetch collateral from the vendors, over https; without --for, --fmspc, --product and --rim, renew what the store holds.

    This is the only command that asks vendors for anything. It tells them which processor or GPU you ask about, and nothing else.
    Nothing that comes back is believed before evidence is verified with it; what is older than what is there is refused.

    \b
    Examples:
      cloister collateral fetch --for quote.bin
      cloister collateral fetch --for gpu-report.bin --for gpu-chain.pem
      cloister collateral fetch --fmspc 50806F000000 --tee tdx --pcs https://pccs.example:8081
      cloister collateral fetch --product Milan --product Genoa
      cloister collateral fetch                                      (renew)
    """
    from cloister.attestation.collateral.needs import renewal
    from cloister.attestation.edge.fetch import Sources, Web
    from cloister.attestation.edge.fetch import fetch as ask

    store = _store(you, folder)
    wanted = _wanted(evidence, fmspc, tee, ca, product, rim)
    if not (evidence or wanted):
        wanted = renewal(store.endorsements())
        if not wanted:
            raise InputError(
                f"{store.folder} holds nothing that could be renewed",
                hint="say what to fetch: --for EVIDENCE, --fmspc HEX, --product NAME, --rim ID",
            )
    if not wanted:
        you.ui.say("vendors publish nothing that this evidence needs")
        you.ui.result({"store": str(store.folder), "added": [], "same": [], "kept": []}, "nothing to fetch")
        return
    own = Sources()
    sources = Sources(
        pcs or own.pcs, root_crl or own.root_crl, kds or own.kds, rim_service or own.rim, ocsp or own.ocsp
    )
    web = Web(say=you.ui.say)
    with you.ui.step("fetching") as step, you.ui.bar("fetching", unit="items") as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.update(done, total, what)
            if what:
                step.text = f"fetching: {what}"

        items = ask(wanted, web, sources, progress=progress)
        step.text = f"fetched {count(len(items), 'item')}"
    _tell(you, store, store.add(items, roots=_roots(you), now=now()))


@command.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@stored
@options
def export(you: You, file: Path, folder: Path | None) -> None:
    """Write all collateral to FILE, a snapshot signed with your SSH key, for a machine without a network.

    \b
    Examples:
      cloister collateral export collateral.snapshot
      cloister collateral export /media/usb/collateral.snapshot --key ~/.ssh/id_ed25519_sk.pub
    """
    from cloister.attestation.collateral.snapshot import NAMESPACE, name_of, unseal

    store, sign = _store(you, folder), you.signer()
    data = store.export(made=now(), sign=lambda message: sign(message, namespace=NAMESPACE))
    write_file(file, data)
    name, items = name_of(unseal(data)[0]), len(store.endorsements().items)
    fingerprint = you.fingerprint()
    you.ui.say(f"{count(items, 'item')}, {human_bytes(len(data))}, signed by {fingerprint}")
    you.ui.result({"file": str(file), "snapshot": name, "items": items, "signer": fingerprint}, name)


@command.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--signer",
    "signers",
    multiple=True,
    metavar="SHA256:...",
    help="Whose snapshots count, by fingerprint.  [default: your own key's]",
)
@stored
@options
def import_(you: You, file: Path, signers: tuple[str, ...], folder: Path | None) -> None:
    """Take in a snapshot that a --signer signed. What is newer in the store stays.

    \b
    Examples:
      cloister collateral import collateral.snapshot
      cloister collateral import collateral.snapshot --signer SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU
    """
    from cloister.attestation.collateral.snapshot import FILE_LIMIT, NAMESPACE
    from cloister.contract import sshsig

    store = _store(you, folder)
    accepted = frozenset(signers) or frozenset({you.fingerprint()})

    def check(signature: str, message: bytes) -> str:
        found = sshsig.verify(signature, message, namespace=NAMESPACE).fingerprint
        if found not in accepted:
            raise InputError(
                "the snapshot was signed by somebody else",
                code="signature-invalid",
                reasons=[Reason("snapshot.signer", found, " or ".join(sorted(accepted)))],
                hint="ask who that is before you name it with --signer",
            )
        return found

    if file.is_file() and file.stat().st_size > FILE_LIMIT:
        raise InputError(f"{file} is too large for a snapshot")
    data = read_file(file, "the snapshot")
    with you.ui.step(f"importing {file.name}"):
        change, found, signer = store.import_(data, check=check, roots=_roots(you), now=now())
    you.ui.say(f"made {found.made:%Y-%m-%d %H:%M} UTC, signed by {signer}")
    _tell(you, store, change)


def _store(you: You, folder: Path | None) -> Store:
    from cloister.attestation.edge.store import Store

    return Store(folder or you.home / "collateral")


def _roots(you: You) -> Roots:
    from cloister.attestation.roots import Roots

    return Roots(soft=you.soft, also=you.roots)


def _tell(you: You, store: Store, change: Change) -> None:
    for reason in change.kept:
        you.ui.say(f"kept ours: {reason}")
    lines = [f"{kind} {subject}" for kind, subject in change.added]
    text = "\n".join(
        [*lines, f"{count(len(change.added), 'item')} added, {len(change.same)} unchanged in {store.folder}"]
    )
    data = {
        "store": str(store.folder),
        "added": [list(key) for key in change.added],
        "same": [list(key) for key in change.same],
        "kept": [reason.as_json() for reason in change.kept],
    }
    you.ui.result(data, text)


def _wanted(
    evidence: Sequence[str],
    fmspcs: Sequence[str],
    tees: Sequence[str],
    authority: str,
    products: Sequence[str],
    rims: Sequence[str],
) -> tuple[Need, ...]:
    import re

    from cloister.attestation.collateral.needs import LINES, AmdLine, IntelTcb, NvidiaManifest, needs

    found: list[Need] = []
    if evidence:
        line = LINES[products[0]] if len(products) == 1 else None
        found += needs(_evidence(evidence), line=line)
    for text in fmspcs:
        if not re.fullmatch("[0-9A-Fa-f]{12}", text):
            raise InputError(
                "an FMSPC has 12 hex digits", reasons=[Reason("--fmspc", text[:80], "such as 50806F000000")]
            )
        for tee in tees or ("tdx", "sgx"):
            found.append(
                IntelTcb(
                    "tdx" if tee == "tdx" else "sgx",
                    text.upper(),
                    "processor" if authority == "processor" else "platform",
                )
            )
    if not evidence:
        for product in products:
            found += [AmdLine(LINES[product], "vcek"), AmdLine(LINES[product], "vlek")]
    for text in rims:
        if not re.fullmatch("NV_[A-Za-z0-9_.]{3,120}", text):
            raise InputError(
                "no id of a manifest", reasons=[Reason("--rim", text[:80], "NV_GPU_DRIVER_GH100_550.90.07")]
            )
        found.append(NvidiaManifest(text))
    return tuple(dict.fromkeys(found))


def pick(named: Sequence[tuple[str, bytes]], found: Endorsements) -> list[tuple[str, bytes]]:
    """Return what of `found` is for the evidence in vendors' files `named`, as further files of it: (name, content).

    Raises:
        InputError, EvidenceError: it is not known what these files need.
    """
    from cloister.attestation.collateral.needs import LINES, AmdLeaf, AmdLine, IntelTcb, NvidiaManifest, needs

    evidence = _assembled(named)
    if evidence.kind == "sev-snp":  # a report may not say its line; then every line's files are for it
        lines = [each for each in LINES.values() if any(item.subject.startswith(f"{each}/") for item in found.items)]
        wanted = needs(evidence, line=lines[0] if len(lines) == 1 else None)
    else:
        wanted = needs(evidence)
    keys: list[tuple[str, str]] = []
    for need in wanted:
        match need:
            case IntelTcb():
                keys.append((need.tee, need.fmspc))
            case AmdLine():
                keys += [("sev-snp", f"{need.line}/{need.signer}"), ("sev-snp", f"{need.line}/crl")]
            case AmdLeaf():
                keys.append(("sev-snp", need.subject))
            case NvidiaManifest():
                keys += [("nvidia-gpu", need.id), ("nvidia-gpu", "ocsp/")]
            case _:
                continue
    picked = [
        item
        for item in found.items
        if any(item.kind == kind and item.subject.startswith(start) for kind, start in keys)
    ]
    return [(f"{item.kind} {item.subject}".replace("=", ":"), item.data) for item in picked]


def _evidence(arguments: Sequence[str]) -> Evidence:
    """Return the evidence that the files make up, as far as its needs are concerned."""
    from cloister.cli import evidence as files

    return _assembled([(each, files.read(Path(each.partition("=")[2] or each), "the evidence")) for each in arguments])


def _assembled(named: Sequence[tuple[str, bytes]]) -> Evidence:
    from cloister.attestation import evidence as wire
    from cloister.attestation.files.sniff import assemble
    from cloister.attestation.types import Evidence
    from cloister.errors import EvidenceError

    if len(named) == 1:
        try:
            return wire.decode(named[0][1])
        except EvidenceError:
            pass
    case = assemble(named)
    match case.kind:
        case "dcap":
            return _quote(case.files["quote"])
        case "snp":
            from cloister.attestation.files.snp import der, without_padding

            leaf = next((case.files[role] for role in ("leaf", "vcek", "vlek") if role in case.files), None)
            parts = {} if leaf is None else {"leaf": der(leaf)}
            return Evidence("sev-snp", without_padding(case.files["report"]), parts=parts)
        case "nvidia" if "report" in case.files:
            from cloister.attestation.files.nvidia import unhex

            parts = {"chain": case.files["chain"]} if "chain" in case.files else {}
            return Evidence("nvidia-gpu", unhex(case.files["report"]), parts=parts)
        case "tpm" | "nitro" | "cca":
            return Evidence(case.kind, b"")
    raise InputError(
        "what this evidence needs is not known from these files",
        reasons=[Reason("--for", case.kind, "a quote, an SEV-SNP report, or a GPU's report and its chain")],
    )


def _quote(data: bytes) -> Evidence:
    from cloister.attestation.sgx import format as sgx
    from cloister.attestation.tdx import format as tdx
    from cloister.attestation.types import Evidence

    if data[4:8] == b"\x00\x00\x00\x00":
        return Evidence("sgx", sgx.without_padding(data))
    return Evidence("tdx", tdx.without_padding(data))
