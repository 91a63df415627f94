"""Fuzzing of every verifier: bytes in, `EvidenceError` or the very same claims out, nothing else.

    python -m tests.fuzz                                   every target for 2 s each, random mutations
    python -m tests.fuzz sev-snp --seconds 60              one kind
    python -m tests.fuzz sev-snp quote --guided --seconds 600     coverage-guided (libFuzzer), needs `pip install atheris`

A target is one input of one verifier: the quote or a part of a kind of evidence, with everything else good. The oracle:

- no exception but `EvidenceError` with a code of the evidence family and at least one reason
- what is accepted says the same as the good evidence: same report data, measurements, debug, events and devices
- no single run takes longer than `SLOW_S` or makes more than `MEMORY` bytes of garbage

Found inputs are written to the folder that `--findings` names. docs/fuzzing.md says what was run and what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cloister.attestation.edge.attester import SOFT_KINDS, find_attester
from cloister.attestation.edge.soft import SoftGpuAttester
from cloister.attestation.endorsements import Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.types import Claims, Evidence
from cloister.attestation.verify import verify
from cloister.errors import EvidenceError

SLOW_S: Final = 1.0
MEMORY: Final = 64 << 20
MAGIC: Final = (b"", b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0" * 64)


@dataclass(frozen=True)
class Target:
    """One input of one verifier."""

    kind: str
    part: str
    good: Evidence
    endorsements: Endorsements
    now: datetime

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.part}"

    @property
    def seed(self) -> bytes:
        return self.good.quote if self.part == "quote" else self.good.parts[self.part]

    def run(self, data: bytes) -> Claims | EvidenceError:
        """Return what the verifier says about the good evidence with `data` in the place of this input."""
        if self.part == "quote":
            changed = replace(self.good, quote=data)
        else:
            changed = replace(self.good, parts=MappingProxyType({**self.good.parts, self.part: data}))
        try:
            return verify(changed, self.endorsements, Roots(soft=True), now=self.now)
        except EvidenceError as error:
            return error


def targets(now: datetime | None = None) -> Iterator[Target]:
    """Yield every input of every soft kind."""
    from cloister.attestation.edge.collateral import soft_collateral

    moment = now or datetime.now(UTC)
    good: list[Evidence] = []
    for kind in SOFT_KINDS:
        attester = find_attester(kind, measurement=hashlib.sha384(b"fuzz").digest())
        attester.extend("cloister/config/1", b"fuzz")
        good.append(attester.evidence(bytes(attester.report_data_bytes)))
    good.append(SoftGpuAttester().evidence(bytes(32)))
    endorsements = soft_collateral(moment)
    for evidence in good:
        for part in ("quote", *evidence.parts):
            yield Target(evidence.kind, part, evidence, endorsements, moment)


def problem(target: Target, data: bytes, expected: Claims) -> str | None:
    """Return what is wrong with how `data` was judged, or None."""
    begin = time.perf_counter()
    try:
        found = target.run(data)
    except Exception as error:  # noqa: BLE001 - the finding
        return f"another exception: {type(error).__name__}: {str(error)[:200]}"
    if time.perf_counter() - begin > SLOW_S:
        return f"{time.perf_counter() - begin:.1f} s for {len(data)} bytes"
    if isinstance(found, EvidenceError):
        if not found.reasons or not found.code.startswith("evidence"):
            return f"a refusal without a reason: {found.code} {found}"
        return None
    if said(found) != said(expected):
        return "accepted, and says something else than the good evidence"
    shown = {(each.digest, each.data) for each in expected.boot_log}
    if any(each.data is not None and (each.digest, each.data) not in shown for each in found.boot_log):
        return "shows data of a boot event that was not measured"
    return None


def said(claims: Claims) -> tuple[Any, ...]:
    """What a relying party builds on."""
    # the data of boot events is not signed: a changed one may disappear (None), and must not be shown
    log = tuple((each.register, each.digest) for each in claims.boot_log)
    return (claims.tee, claims.report_data, dict(claims.measurements), claims.debug, claims.events, claims.launch, log, claims.boot)  # fmt: skip


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Return `data` with one to four faults: flips, cuts, copies, magic numbers, other lengths."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(len(out) + 1)
        size = draw.choice((1, 1, 2, 4, 8, 48, 256))
        match draw.randrange(7):
            case 0 if out:
                out[place % len(out)] ^= 1 << draw.randrange(8)
            case 1 if out:
                out[place % len(out)] = draw.randrange(256)
            case 2:
                del out[place : place + size]
            case 3:
                out[place:place] = out[place : place + size] * draw.choice((1, 2, 16))
            case 4:
                magic = draw.choice(MAGIC)
                out[place : place + len(magic)] = magic
            case 5:
                del out[place:]
            case _:
                other = draw.randrange(len(out) + 1)
                out[place : place + size] = out[other : other + size]
    return bytes(out[: 4 << 20])


def random_run(target: Target, seconds: float, seed: int, findings: Path | None) -> tuple[int, list[str]]:
    """Mutate at random for `seconds`; return how many inputs ran and what was found."""
    expected = target.run(target.seed)
    if isinstance(expected, EvidenceError):
        return 0, [f"the good evidence is refused: {expected} {expected.reasons}"]
    draw = random.Random(seed)  # repeatable on purpose
    found: list[str] = []
    count = 0
    tracemalloc.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(found) < 5:
        tracemalloc.reset_peak()
        data = mutate(target.seed, draw)
        text = problem(target, data, expected)
        count += 1
        if text is None and tracemalloc.get_traced_memory()[1] > MEMORY:
            text = f"{tracemalloc.get_traced_memory()[1] >> 20} MiB for {len(data)} bytes"
        if text is not None:
            found.append(text)
            keep(findings, target, data)
    tracemalloc.stop()
    return count, found


def keep(findings: Path | None, target: Target, data: bytes) -> None:
    if findings is not None:
        findings.mkdir(parents=True, exist_ok=True)
        name = f"{target.kind}-{target.part}-{hashlib.sha256(data).hexdigest()[:12]}"
        (findings / name).write_bytes(data)


def guided_run(target: Target, seconds: float, findings: Path | None) -> None:
    """Hand `target` to libFuzzer; does not return."""
    import tempfile

    import atheris  # not a dependency: see the docstring

    atheris.instrument_all()
    expected = target.run(target.seed)
    assert not isinstance(expected, EvidenceError), expected
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    (corpus / "good").write_bytes(target.seed)

    def one(data: bytes) -> None:
        text = problem(target, data, expected)
        if text is not None:
            keep(findings, target, data)
            raise RuntimeError(text)

    atheris.Setup(
        [sys.argv[0], str(corpus), f"-max_total_time={int(seconds)}", f"-max_len={2 * len(target.seed)}"], one
    )
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None, out: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", nargs="?", help="kind of evidence; default: all")
    parser.add_argument("part", nargs="?", help="quote, or a part of the evidence; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="coverage-guided; one target")
    parser.add_argument("--findings", type=Path, help="where to write inputs that were found")
    options = parser.parse_args(argv)
    chosen = [each for each in targets() if options.kind in (None, each.kind) and options.part in (None, each.part)]
    if not chosen:
        out("no such target; there are: " + ", ".join(sorted(each.name for each in targets())))
        return 2
    if options.guided:
        guided_run(chosen[0], options.seconds, options.findings)
    bad = 0
    for target in chosen:
        count, found = random_run(target, options.seconds, options.seed, options.findings)
        bad += len(found)
        out(f"{target.name}: {count} inputs, {'; '.join(found) or 'nothing found'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
