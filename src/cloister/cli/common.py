"""What most verbs share: who you are, which broker you trust, where contracts come from, common options."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar
from urllib.parse import urlsplit

import click

from cloister.cli.ui import Ui
from cloister.errors import CloisterError, InputError, MachineError, PeerError, Reason

if TYPE_CHECKING:
    from cloister.broker.client import BrokerClient, Signer, Trust
    from cloister.contract.model import Contract
    from cloister.node.workload import Workload

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_HOME: Final = "~/.config/cloister"
TEES: Final = ("tdx", "sgx", "sev-snp", "nitro", "cca", "azure-snp", "azure-tdx")
SOFT_NOTE: Final = (
    "software evidence under a published test root: it protects nothing and is for trying things out only"
)


def now() -> datetime:
    """The one clock of the command line."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class You:
    """Who runs the command: home folder, SSH key, broker address, and whether soft TEEs are accepted."""

    ui: Ui
    home: Path
    key_file: Path
    broker_url: str
    soft: bool
    broker_software: frozenset[bytes] | None = None
    """Accepted launch measurements of brokers; None means this software's own."""
    node_software: frozenset[bytes] | None = None
    """Accepted launch measurements of nodes; None means the brokers' values."""
    broker_tees: frozenset[str] = frozenset()
    """TEE types of brokers besides `tdx`."""
    roots: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Kind of evidence -> SHA-256 of roots that you believe besides the vendors'."""

    def signer(self) -> Signer:
        """Return a function that signs with your key: in process for a plain key file, else through ssh-keygen.

        Raises:
            InputError: there is no key yet, or it cannot be used.
        """
        from cloister.contract import edge

        self._check_key()
        if self.key_file.suffix != ".pub":
            try:
                return edge.Signer.load(self.key_file).sign
            except InputError:  # a passphrase or a security key: ssh-keygen asks for it
                pass
        return functools.partial(edge.sign, key_file=self.key_file)

    def fingerprint(self) -> str:
        """Return `SHA256:...` of your key as contracts name parties.

        Raises:
            InputError: there is no key yet, or it cannot be read.
        """
        from cloister.contract import edge

        self._check_key()
        return edge.fingerprint(self.key_file)

    def _check_key(self) -> None:
        if not self.key_file.exists():
            raise InputError(
                f"no SSH key at {self.key_file}",
                hint="`cloister key new` makes one; `--key FILE` uses another (a .pub file means ssh-agent or a token)",
            )

    def trust(self) -> Trust:
        """Return what you believe of a broker: your own version of the software, on hardware unless you said otherwise."""
        from cloister.attestation.roots import Roots
        from cloister.broker.client import Trust

        return Trust(
            roots=Roots(soft=self.soft, also=self.roots),
            broker_measurements=self.broker_software,
            node_measurements=self.node_software,
            allow_soft=self.soft,
            accept=frozenset({"tdx"}) | self.broker_tees,
        )

    def broker(self) -> BrokerClient:
        """Attest the broker and return a client of it.

        Raises:
            InputError: no address was given.
            EvidenceError, PeerError, TamperedError: it is not one to trust.
        """
        from cloister.broker.client import BrokerClient

        _check_address(self.broker_url)
        if not self.broker_url:
            raise InputError(
                "which broker?",
                reasons=[Reason("--broker", "nothing", "https://<host>:<port>")],
                hint="set CLOISTER_BROKER, or start one with `cloister up`",
            )
        client = BrokerClient.connect(self.broker_url, trust=self.trust(), memory=self.home / "brokers.json", clock=now)
        click.get_current_context().call_on_close(client.close)
        if client.broker.soft:
            self.ui.warn(f"the broker shows {SOFT_NOTE}")
        return client

    def party_in(self, contract: Contract) -> str:
        """Return your name in `contract`.

        Raises:
            InputError: your key is not a party's.
        """
        mine = self.fingerprint()
        for name, fingerprint in contract.party.items():
            if fingerprint == mine:
                return name
        raise InputError(
            f"your key is not a party of contract '{contract.name}'",
            reasons=[Reason("party", mine, " or ".join(f"{n} {f}" for n, f in contract.party.items()))],
            hint="use `--key` or `--home` of a party",
        )

    def holds_key_of(self, fingerprint: str) -> bool:
        """Whether this machine can sign with the key `fingerprint` right now: proven, not claimed."""
        from cloister.contract import sshsig

        if not self.key_file.exists() or self.fingerprint() != fingerprint:
            return False
        challenge = secrets.token_bytes(32)
        signature = self.signer()(challenge, namespace="audience@cloister")
        return sshsig.verify(signature, challenge, namespace="audience@cloister").fingerprint == fingerprint


def options(function: Callable[P, R]) -> Callable[..., R]:
    """`--home`, `--key`, `--broker`, `--insecure-soft-tee`, `--json`; the command gets them as one `You`."""

    @click.option(
        "--home",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="CLOISTER_HOME",
        default=DEFAULT_HOME,
        show_default=True,
        help="Your keys, receipts and memory of brokers.",
    )
    @click.option(
        "--key",
        "key_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="SSH key to sign with; a .pub file means ssh-agent or a security key.  [default: HOME/id_ed25519]",
    )
    @click.option("--broker", "broker_url", envvar="CLOISTER_BROKER", default="", help="Address of the broker.")
    @click.option(
        "--insecure-soft-tee",
        "soft",
        is_flag=True,
        envvar="CLOISTER_INSECURE_SOFT_TEE",
        help="Accept and make software evidence. Protects nothing.",
    )
    @click.option(
        "--trust-broker",
        "trusted_brokers",
        multiple=True,
        metavar="HEX",
        help="Accepted software measurement of a broker.  [default: this software's own]",
    )
    @click.option(
        "--trust-node",
        "trusted_nodes",
        multiple=True,
        metavar="HEX",
        help="Accepted software measurement of a node.  [default: the brokers' values]",
    )
    @click.option(
        "--trust-tee",
        "trusted_tees",
        multiple=True,
        type=click.Choice(TEES),
        help="Accept a broker in this TEE, besides tdx.",
    )
    @click.option(
        "--trust-root",
        "trusted_roots",
        multiple=True,
        type=Pair("KIND=FILE"),
        help="Believe this root certificate, too, for one kind of evidence.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        home: Path,
        key_file: Path | None,
        broker_url: str,
        soft: bool,
        trusted_brokers: tuple[str, ...],
        trusted_nodes: tuple[str, ...],
        trusted_tees: tuple[str, ...],
        trusted_roots: tuple[tuple[str, str], ...],
        as_json: bool,
        **rest: Any,
    ) -> R:
        folder = home.expanduser()
        ui = click.get_current_context().find_object(Ui) or Ui()
        ui.as_json = as_json
        you = You(
            ui,
            folder,
            key_file or folder / "id_ed25519",
            broker_url,
            soft,
            measurements(trusted_brokers, "--trust-broker"),
            measurements(trusted_nodes, "--trust-node"),
            frozenset(trusted_tees),
            root_pins(trusted_roots),
        )
        return function(you, *args, **rest)  # type: ignore[arg-type]  # click passes by name

    return wrapper


def measurements(texts: Iterable[str], option: str) -> frozenset[bytes] | None:
    """Return launch measurements given as hex; None where none was given.

    Raises:
        InputError: something else than 32, 48 or 64 bytes in hex: SHA-256, SHA-384 (this software, TDX, SNP, Nitro) or SHA-512.
    """
    found = set()
    for text in texts:
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if len(value) not in (32, 48, 64):
            raise InputError(
                f"{option} wants 96 hex digits (64 for SGX), found '{text}'",
                hint="`cloister measure --software` prints them",
            )
        found.add(value)
    return frozenset(found) or None


def root_pins(pairs: Iterable[tuple[str, str]]) -> Mapping[str, frozenset[str]]:
    """Return the pins of `KIND=FILE` options; see `broker.client.root_pins`."""
    given = tuple(pairs)
    if not given:  # `--help` and most commands load nothing for this
        return {}
    from cloister.broker.client import root_pins as pins

    return pins(given)


class Pair(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "name=value"

    def __init__(self, what: str = "NAME=PATH") -> None:
        self.what = what

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            self.fail(f"wants {self.what}, found '{value}'", param, ctx)
        return name, rest


def paths(pairs: Iterable[tuple[str, str]], option: str) -> dict[str, Path]:
    """Return the mapping of `NAME=PATH` options; a name twice is refused."""
    result: dict[str, Path] = {}
    for name, value in pairs:
        if name in result:
            raise InputError(f"{option} names '{name}' twice")
        result[name] = Path(value).absolute()
    return result


def read_contract(path: Path) -> tuple[bytes, Contract]:
    """Return the bytes and the parsed form of a contract file.

    Raises:
        InputError: no such file, or every finding in it.
    """
    from cloister.contract.parse import parse

    data = read_file(path, "a contract")
    return data, parse(data, name=path.name)


def note_contract(you: You, contract: Contract) -> None:
    """Say which contract a name led to, and warn if the same name led to another one before.

    A name at a broker belongs to whoever took it first: the id and the signers are what counts.
    """
    path = you.home / "contracts.json"
    key = f"{you.broker_url} {contract.name}"
    known = _known_contracts(path)
    you.ui.say(
        f"contract {contract.name} version {contract.version}, {contract.id}; signed by {', '.join(sorted(contract.signers))}"
    )
    if known.get(key, contract.id) != contract.id:
        you.ui.warn(
            f"'{contract.name}' was {known[key]} when you used it last: `cloister contract diff` shows what changed"
        )
    if known.get(key) != contract.id:
        write_file(path, json.dumps({**known, key: contract.id}, indent=1, sort_keys=True).encode())


def _known_contracts(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}, which remembers contracts: {error}", hint="move it away") from error
    return {str(name): str(identity) for name, identity in value.items()} if isinstance(value, dict) else {}


def find_contract(reference: str, broker: BrokerClient) -> Contract:
    """Return a contract by file, by id (`sha256:...`) or by name; the latter two from the broker."""
    from cloister.contract.parse import parse

    if Path(reference).is_file():
        return read_contract(Path(reference))[1]
    status = broker.contract_status(check_reference(reference))
    return parse(broker.contract_bytes(status.contract), name=status.name)


def check_reference(reference: str) -> str:
    """Return `reference` if a broker can know a contract by it.

    Raises:
        InputError: it is no id and no name, such as the path of a file that is not there.
    """
    if re.fullmatch(r"sha256:[0-9a-f]{64}|[a-z][a-z0-9-]{0,39}", reference, re.ASCII):
        return reference
    raise InputError(
        f"no contract '{reference}'",
        reasons=[Reason("contract", f"no file '{reference}'", "a file, an id (sha256:...) or a contract's name")],
        hint="check the path; `cloister status` lists the contracts that the broker knows",
    )


def _check_address(url: str) -> None:
    """A port that is none ends here, not in a traceback."""
    try:
        valid = urlsplit(url).port != 0
    except ValueError:
        valid = False
    if not valid:
        raise InputError(
            f"'{url}' is not an address",
            reasons=[Reason("--broker", url, "https://<host>:<port>")],
            hint="`cloister up` prints the address",
        )


def real(path: Path) -> Path:
    """Return `path` without links, as far as it exists; unlike `Path.resolve` it has no trouble with links in a circle."""
    return Path(os.path.realpath(path))


def read_workload(path: Path) -> Workload:
    """Return the measured workload in a file that `cloister measure --to` wrote; an error names the file.

    Raises:
        InputError: it cannot be read, or is no workload.
    """
    from cloister.node.workload import Workload

    data = read_file(path, "a workload file")
    try:
        return Workload.from_bytes(data)
    except InputError as error:
        raise InputError(
            f"{path} is not a workload file: {error.message}",
            code=error.code,
            reasons=error.reasons,
            hint=error.hint or "`cloister measure ... --to FILE` writes one",
        ) from error


def count(number: int, one: str, many: str = "") -> str:
    """1 file, 2 files; 1 entry, 2 entries (`many` where an s is not enough)."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def read_file(path: Path, what: str) -> bytes:
    """Return the bytes of a file that the user named.

    Raises:
        InputError: it cannot be read; says which file was wanted.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {what} at {path}: {error.strerror}", hint=_READ_HINTS.get(error.errno or 0, "")
        ) from error


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file as a whole or not at all; what is there and is no file (`/dev/null`, a pipe) is written to.

    Raises:
        InputError: it cannot be written there; the old file is untouched.
        MachineError: (`disk-full`) no room; the old file is untouched. Or another reason that the system gives.
    """
    temporary = ""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced by a file
            with path.open("wb") as file:
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.")
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        raise system_error(error, f"cannot write {path}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def system_error(error: OSError, what: str = "") -> CloisterError:
    """Return what the system said as an error of the tree; `what` names what was tried, else the path in `error`.

    For the edge of the command line: a path of the user that cannot be used is never a traceback.
    """
    if not what:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        what = f"cannot use {name}" if name else "the system refused"
    message = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(message, code="disk-full", hint="free some space, or use another disk")
    if error.errno in _WRITE_HINTS:
        return InputError(message, hint=_WRITE_HINTS[error.errno])
    if isinstance(error, ConnectionError | TimeoutError):
        return PeerError(message)
    return MachineError(message)


_READ_HINTS: Final = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check its permissions, or run as the user who may read it",
    errno.EISDIR: "this is a folder; name a file",
}
_WRITE_HINTS: Final = {
    errno.EACCES: "check the permissions there, or name another place",
    errno.EPERM: "check the permissions there, or name another place",
    errno.EROFS: "this file system is read-only; name another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "there is a folder of this name; name a file",
    errno.EEXIST: "name a new place",
    errno.ENOTEMPTY: "name a new place",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "symbolic links go in a circle there; check the path",
}


def keep_receipt(you: You, receipt: bytes, name: str) -> Path:
    """Keep a receipt in your home; `audit` checks all of them against the log."""
    path = you.home / "receipts" / f"{name}.json"
    write_file(path, receipt)
    return path


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Return rows as aligned columns with a header, without colour."""
    listed = list(rows)
    if not listed:
        return ""
    names = list(listed[0])
    widths = {name: max(len(name), *(len(row[name]) for row in listed)) for name in names}
    lines = ["  ".join(name.ljust(widths[name]) for name in names).rstrip()]
    lines += ["  ".join(row[name].ljust(widths[name]) for name in names).rstrip() for row in listed]
    return "\n".join(lines)
