"""The three example contracts, and requests that they allow: every other test starts one step away from these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

from cloister.attestation.types import Claims
from cloister.contract import Contract, Request, State, parse
from cloister.contract.model import FileList, HostPlace, SignedBy, TeePlace, key_bytes

HERE = Path(__file__).parent / "examples"
NAMES = ("pneumonia-xray", "fraud-two-banks", "acme-automl")
TODAY = date(2027, 1, 15)
GPU = Claims("device", "nvidia-gpu", debug=False, tcb_status="NotRated", gpu="confidential", platform={"ueid": "a1"})
"""A GPU in confidential mode, beside a TEE."""


@cache
def source(name: str) -> str:
    return (HERE / f"{name}.toml").read_text(encoding="utf-8")


@cache
def example(name: str) -> Contract:
    return parse(source(name).encode(), name=f"{name}.toml")


def edited(name: str, *replacements: tuple[str, str]) -> bytes:
    """An example with pieces replaced; each piece must be there exactly once."""
    text = source(name)
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text.encode()


def changed(name: str, *replacements: tuple[str, str]) -> Contract:
    return parse(edited(name, *replacements), name="edited.toml")


@dataclass(frozen=True)
class Case:
    """One request with its state, and what was done to it."""

    request: Request
    state: State
    label: str = "allowed"


def claims(contract: Contract, phase: str) -> Claims:
    """Claims that the place of `phase` accepts."""
    place = contract.place[contract.key_place(phase)]
    if isinstance(place, TeePlace):
        first = place.accept[0]
        return Claims(
            kind="tee",
            tee="soft-tdx" if first == "simulated" else first,
            debug=False,
            tcb_status="UpToDate",
            tcb_date=date(*(place.min_tcb or (2026, 8)), 1),
            gpu=place.gpu,
            devices=(GPU,) if place.gpu == "confidential" else (),
        )
    assert isinstance(place, HostPlace)
    measurements = {}
    if isinstance(place.files, SignedBy):
        measurements["ima-signer"] = key_bytes(contract.party[place.files.party])
    if isinstance(place.files, FileList):
        measurements["ima-list"] = bytes.fromhex(place.files.digest[7:])
    return Claims(kind="attested-host", tee="tpm", debug=False, boot=place.boot[0], measurements=measurements)


def allowed(contract: Contract) -> Iterator[Case]:
    """One allowed case for everything that the contract grants."""
    state = State(signed=contract.signers)
    for name, phase in contract.phase.items():
        code = contract.code[phase.run]
        grants = [("read", asset, "") for asset in phase.read] + [("write", asset, "") for asset in phase.write]
        if code.secret:
            grants.append(("read", phase.run, ""))
        if phase.answer is not None:
            grants += [("answer", "", party) for party in phase.answer.to]
        for op, asset, party in grants:
            request = Request(
                phase=name,
                op=op,  # type: ignore[arg-type]  # three literals above
                asset=asset,
                code=code.digest,
                sandbox=code.sandbox,
                claims=claims(contract, name),
                party=party,
                today=TODAY,
            )
            yield Case(request, state)
