"""SEV-SNP evidence end to end: every way to be wrong, through verify(), on soft reports and on real ones."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attestation import evidence as wire
from cloister.attestation.appraise import appraise
from cloister.attestation.binding import Binding, check_binding
from cloister.attestation.collateral.read import recognise
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.events import event
from cloister.attestation.files import Case
from cloister.attestation.files import snp as files_snp
from cloister.attestation.pki import certificate as pki
from cloister.attestation.roots import Roots
from cloister.attestation.snp import format as snp_format
from cloister.attestation.snp import roots as snp_roots
from cloister.attestation.snp import verify as snp_verify
from cloister.attestation.snp.format import Tcb
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.types import NOT_RATED, Claims, Evidence, Policy
from cloister.attestation.verify import VERIFIERS, verify
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ISSUED = NOW - timedelta(days=1)
SOFT = Roots(soft=True)
MEASUREMENT = hashlib.sha384(b"a guest").digest()
DATA = hashlib.sha512(b"a binding").digest()
ENDORSED = Endorsements(soft_snp.endorsements(ISSUED))


def good(machine: soft_snp.Machine | None = None, **rest: Any) -> Evidence:
    made = soft_snp.machine() if machine is None else machine
    return soft_snp.evidence(made, report_data=DATA, measurement=MEASUREMENT, **rest)


def claims(evidence: Evidence, endorsements: Endorsements = ENDORSED, *, now: datetime = NOW) -> Claims:
    return verify(evidence, endorsements, SOFT, now=now)


def claims_or_refusal(evidence: Evidence) -> Claims | EvidenceError:
    try:
        return claims(evidence)
    except EvidenceError as error:
        return error


def refused(
    evidence: Evidence,
    where: str,
    *,
    endorsements: Endorsements = ENDORSED,
    code: str = "evidence-not-authentic",
    now: datetime = NOW,
    roots: Roots = SOFT,
) -> EvidenceError:
    error = refusal(verify, evidence, endorsements, roots, now=now)
    assert (error.code, error.reasons[0].where) == (code, where), error.reasons
    assert any(where == step or where.startswith(f"{step}.") for step in snp_verify.STEPS)
    return error


def without(subject: str) -> Endorsements:
    return Endorsements(tuple(item for item in ENDORSED.items if item.subject != subject))


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_good_soft_platform_gives_all_claims() -> None:
    found = claims(good(guest_svn=3))
    machine = soft_snp.machine()
    assert (found.kind, found.tee, found.soft, found.debug) == ("tee", "soft-sev-snp", True, False)
    assert (found.tcb_status, found.launch, found.log_in) == (NOT_RATED, "measurement", "report-data")
    assert set(found.measurements) == set(snp_format.FIELDS)
    assert found.measurements["measurement"] == MEASUREMENT
    assert found.svns == {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219, "guest_svn": 3, "abi": 1 * 256 + 55}
    assert found.platform["chip_id"] == machine.chip_id.hex()
    assert (found.platform["product"], found.platform["vmpl"]) == ("Milan-B0", "0")
    assert (found.platform["firmware"], found.platform["cpuid"]) == ("1.55.40", "19-01-01")
    on = {name for name, value in found.attributes.items() if value}
    assert on == {"smt", "tsme", "ecc", "alias_check_complete", "policy_smt", "vmpl0"}
    assert found.valid_until == ISSUED + soft_snp.LIFETIME
    assert len(found.chain) == 3
    assert all("protects nothing" in each for each in found.chain)
    policy = Policy("place", "tee", accept=frozenset({"simulated"}))
    assert appraise(found, policy) == ()


def test_the_binding_holds_with_the_log_in_the_report_data() -> None:
    binding = Binding("release", bytes(range(32)), b"key")
    events = (event("cloister/config/1", b"data"),)
    evidence = soft_snp.evidence(
        soft_snp.machine(), report_data=binding.report_data(), measurement=MEASUREMENT, events=events
    )
    assert check_binding(claims(evidence), binding) == ()
    for other in ((), (event("cloister/config/1", b"other"),), events * 2):
        found = claims(replace(evidence, events=other))
        assert [reason.where for reason in check_binding(found, binding)] == ["binding.report_data"]


@pytest.mark.parametrize("version", snp_format.VERSIONS)
@pytest.mark.parametrize("line", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("signer", ["vcek", "vlek"])
def test_versions_lines_and_signers(version: int, line: snp_format.Line, signer: snp_format.Signer) -> None:
    found = claims(good(soft_snp.machine(line=line, signer=signer), version=version))
    assert ("fmc" in found.svns) == (line == "Turin")
    assert ("chip_id" in found.platform) == (signer == "vcek")
    assert found.platform.get("csp_id") == (soft_snp.CSP_ID if signer == "vlek" else None)
    assert ("cpuid" in found.platform) == (version >= 3)
    assert ("launch_mit_vector" in found.platform) == (version == 5)


def test_svns_are_the_lesser_of_reported_and_committed() -> None:
    committed = Tcb(bootloader=3, tee=0, snp=30, microcode=200)
    found = claims(good(committed=committed, committed_firmware=(1, 54, 9)))
    assert dict(found.svns) == {
        "bootloader": 3, "tee": 0, "snp": 24, "microcode": 200, "guest_svn": 0, "abi": 1 * 256 + 54,
    }  # fmt: skip
    assert found.attributes["provisional"]
    assert claims(good(current=Tcb(4, 0, 24, 220))).attributes["provisional"]


def test_certificates_may_come_from_the_host_s_table_or_from_the_relying_party() -> None:
    machine = soft_snp.machine()
    table = good(machine, table=True)
    assert len(table.parts["table"]) % 4096 == 0
    alone = Endorsements(tuple(item for item in ENDORSED.items if item.subject.endswith("/crl/soft")))
    assert claims(table, alone) == claims(good(machine))
    for each in (machine, soft_snp.machine(signer="vlek"), soft_snp.machine(line="Turin")):
        bare = replace(good(each), parts=MappingProxyType({}))
        more = Endorsements((*ENDORSED.items, soft_snp.leaf_endorsement(each)))
        assert claims(bare, more) == claims(good(each))
        refused(bare, "sev-snp.3-chain")


def test_the_hwid_may_stand_in_an_octet_string() -> None:
    assert claims(good(soft_snp.machine(wrapped=True))) == replace(
        claims(good()), chain=claims(good(soft_snp.machine(wrapped=True))).chain
    )


def test_evidence_travels() -> None:
    for evidence in (good(), good(table=True), good(soft_snp.machine(line="Turin"), version=5)):
        assert claims(wire.decode(wire.encode(evidence))) == claims(evidence)


# --- roots and chains -------------------------------------------------------------------------------------------------


def test_the_soft_root_counts_only_when_it_is_named() -> None:
    error = refused(good(), "sev-snp.2-root", roots=Roots())
    assert error.reasons[0].found == "the published test root"


def test_soft_roots_are_the_published_ones() -> None:
    for line, pin in (
        ("Milan", snp_roots.SOFT_MILAN),
        ("Genoa", snp_roots.SOFT_GENOA),
        ("Turin", snp_roots.SOFT_TURIN),
    ):
        assert hashlib.sha256(soft_snp.authority(line).ark).hexdigest() == pin


def test_a_foreign_root_is_refused() -> None:
    mallory = Endorsements(soft_snp.endorsements(ISSUED, label="mallory"))
    evidence = good(soft_snp.machine(label="mallory"))
    refused(evidence, "sev-snp.2-root", endorsements=mallory)
    refused(evidence, "sev-snp.3-chain.signature")  # under our chain


def test_a_pinned_root_behind_a_foreign_chain_is_refused() -> None:
    ours, theirs = soft_snp.authority("Milan"), soft_snp.authority("Milan", "mallory")
    machine = soft_snp.machine(label="mallory")
    table = snp_format.table({"vcek": machine.leaf, "ask": theirs.ask, "ark": ours.ark})
    evidence = replace(good(machine), parts=MappingProxyType({"table": table}))
    refused(evidence, "sev-snp.3-chain.signature", endorsements=without("Milan/vcek/soft"))


def test_the_relying_party_s_own_root_counts() -> None:
    theirs = Endorsements(soft_snp.endorsements(ISSUED, label="mallory"))
    roots = Roots(also={"sev-snp": frozenset({hashlib.sha256(soft_snp.authority("Milan", "mallory").ark).hexdigest()})})
    assert verify(good(soft_snp.machine(label="mallory")), theirs, roots, now=NOW).tee == "sev-snp"
    # of this kind only, and the published test root stays what it is
    for kind in ("tdx", "nitro", "tpm", "azure-snp"):
        other = Roots(also={kind: roots.also["sev-snp"]})
        assert (
            refusal(verify, good(soft_snp.machine(label="mallory")), theirs, other, now=NOW).reasons[0].where
            == "sev-snp.2-root"
        )
    listed = Roots(also={"sev-snp": frozenset({hashlib.sha256(soft_snp.authority("Milan").ark).hexdigest()})})
    assert refusal(verify, good(), ENDORSED, listed, now=NOW).reasons[0].where == "sev-snp.2-root"


def test_a_leaf_of_the_other_kind_is_refused() -> None:
    # a report that says VLEK, and the key of a chip
    refused(good(signing_key=1), "sev-snp.3-chain.kind")
    refused(good(soft_snp.machine(signer="vlek"), signing_key=0), "sev-snp.3-chain.kind")


def test_a_vcek_under_the_authority_of_clouds_is_refused() -> None:
    """A leaked ASVK makes no chips, and a leaked ASK no clouds."""
    for signer, other in (("vcek", "vlek"), ("vlek", "vcek")):
        machine = soft_snp.machine(signer=signer, issued_by=other)
        refused(good(machine), "sev-snp.3-chain.issuer")
        issuer = soft_snp.authority("Milan")
        middle = issuer.ask if other == "vcek" else issuer.asvk
        table = snp_format.table({signer: machine.leaf, "ask": middle, "ark": issuer.ark})
        evidence = replace(good(machine), parts=MappingProxyType({"table": table}))
        refused(evidence, "sev-snp.3-chain.kind", endorsements=without(f"Milan/{signer}/soft"))


def test_a_chain_of_another_line_is_refused() -> None:
    genoa = soft_snp.endorsements(ISSUED, lines=("Genoa",))
    moved = tuple(Endorsement(each.kind, each.subject.replace("Genoa", "Milan"), each.data) for each in genoa)
    refused(good(), "sev-snp.3-chain.kind", endorsements=Endorsements(moved))


def test_a_chain_that_is_no_pair_is_refused() -> None:
    one = soft_snp.endorsements(ISSUED)[0].data.partition(b"-----END CERTIFICATE-----\n")
    for pem in (one[0] + one[1], soft_snp.endorsements(ISSUED)[0].data * 2):
        items = (*without("Milan/vcek/soft").items, Endorsement("sev-snp", "Milan/vcek", pem))
        refused(good(), "sev-snp.3-chain.format", endorsements=Endorsements(items), code="evidence-malformed")


@pytest.mark.parametrize(
    ("now", "where"),
    [
        (datetime(2026, 11, 1, tzinfo=UTC), None),
        (datetime(2026, 11, 10, tzinfo=UTC), None),
        (datetime(2026, 10, 31, 23, 59, 59, tzinfo=UTC), "sev-snp.3-chain.future"),
        (datetime(2026, 11, 10, 0, 0, 1, tzinfo=UTC), "sev-snp.3-chain.expired"),
    ],
)
def test_the_leaf_s_validity_has_exact_ends(now: datetime, where: str | None) -> None:
    machine = soft_snp.machine(
        not_before=datetime(2026, 11, 1, tzinfo=UTC), not_after=datetime(2026, 11, 10, tzinfo=UTC)
    )
    endorsements = Endorsements(soft_snp.endorsements(datetime(2026, 10, 31, tzinfo=UTC)))
    if where is None:
        assert claims(good(machine), endorsements, now=now).valid_until == datetime(2026, 11, 10, tzinfo=UTC)
    else:
        refused(good(machine), where, now=now, endorsements=endorsements)


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_revoked_authority_is_refused() -> None:
    for part, signer, other in (("ask", "vcek", "vlek"), ("asvk", "vlek", "vcek")):
        endorsements = Endorsements(soft_snp.endorsements(ISSUED, revoked=(part,)))
        error = refused(
            good(soft_snp.machine(signer=signer)),
            "sev-snp.4-revocation.revoked",
            endorsements=endorsements,
        )
        assert f"serial {soft_snp.SERIALS[part]:x} is revoked" in error.reasons[0].found
        assert claims(good(soft_snp.machine(signer=other)), endorsements).soft


def test_without_a_revocation_list_nothing_is_accepted() -> None:
    refused(good(), "sev-snp.4-revocation.revocation", endorsements=without("Milan/crl/soft"))
    assert snp_verify.examine(good(), without("Milan/crl/soft"), SOFT, now=NOW, revocation=False).soft


def test_the_attester_cannot_bring_its_own_revocation_list() -> None:
    """Evidence has no part for one; a list in the host's table is not looked at."""
    listed = soft_snp.endorsements(ISSUED)[2].data
    refused(
        replace(good(), parts=MappingProxyType({"leaf": soft_snp.machine().leaf, "crl": listed})),
        "sev-snp.1-format",
        code="evidence-malformed",
        endorsements=without("Milan/crl/soft"),
    )


def test_an_old_list_cannot_hide_a_revocation() -> None:
    old = Endorsements(soft_snp.endorsements(NOW - timedelta(days=31)))
    refused(good(), "sev-snp.4-revocation.revocation", endorsements=old)
    early = Endorsements(soft_snp.endorsements(NOW + timedelta(seconds=1)))
    refused(good(), "sev-snp.4-revocation.revocation", endorsements=early)


def test_a_second_list_counts_too() -> None:
    """The list of the VLEK endpoint beside that of the VCEK endpoint: one revocation is enough, one stale list as well."""
    revoked = soft_snp.endorsements(ISSUED, revoked=("ask",))[2].data
    stale = soft_snp.endorsements(NOW - timedelta(days=40))[2].data
    for data, where in ((revoked, "revoked"), (stale, "revocation")):
        items = (*ENDORSED.items, Endorsement("sev-snp", "Milan/crl/vlek", data))
        refused(good(), f"sev-snp.4-revocation.{where}", endorsements=Endorsements(items))


def test_a_list_that_another_root_signed_is_refused() -> None:
    foreign = soft_snp.endorsements(ISSUED, label="mallory")[2].data
    items = (*without("Milan/crl/soft").items, Endorsement("sev-snp", "Milan/crl", foreign))
    refused(good(), "sev-snp.4-revocation.revocation", endorsements=Endorsements(items))
    genoa = soft_snp.endorsements(ISSUED, lines=("Genoa",))[2].data
    items = (*without("Milan/crl/soft").items, Endorsement("sev-snp", "Milan/crl", genoa))
    refused(good(), "sev-snp.4-revocation.revocation", endorsements=Endorsements(items))


# --- TCB and chip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["bootloader", "tee", "snp", "microcode", "fmc"])
def test_a_key_of_another_firmware_level_is_refused(component: str) -> None:
    """A key that leaked at an old level signs no report of a new one, and the other way round."""
    line: snp_format.Line = "Turin" if component == "fmc" else "Milan"
    machine = soft_snp.machine(line=line)
    for step in (1, -1):
        level = max(0, getattr(machine.tcb, component) + step)
        if level != getattr(machine.tcb, component):
            changed = replace(machine.tcb, **{component: level})
            refused(good(machine, reported=changed), "sev-snp.5-tcb")


def test_the_layout_of_turin_is_not_that_of_milan() -> None:
    """The same eight bytes read in the other layout would be other numbers: family and product must agree."""
    refused(good(soft_snp.machine(line="Turin"), cpu=(0x19, 1, 1)), "sev-snp.6-chip")
    machine = soft_snp.machine(tcb=Tcb(bootloader=4, tee=0, snp=0, microcode=9))
    refused(good(machine, cpu=(0x1A, 2, 1)), "sev-snp.6-chip")


def test_the_certificate_of_another_chip_is_refused() -> None:
    """Cuckoo: the report of one machine with the key of another, both genuine."""
    a, b = soft_snp.machine("a"), soft_snp.machine("b")
    stolen = replace(good(a), parts=MappingProxyType({"leaf": b.leaf}))
    refused(stolen, "sev-snp.6-chip")
    refused(good(a, chip_id=b.chip_id), "sev-snp.6-chip")
    # the chip id is right, the key is not
    refused(replace(good(a, chip_id=b.chip_id), parts=MappingProxyType({"leaf": b.leaf})), "sev-snp.7-signature")


def test_a_masked_chip_is_refused_with_a_vcek() -> None:
    refused(good(mask_chip_key=True), "sev-snp.6-chip")
    error = refused(good(chip_id=bytes(64)), "sev-snp.6-chip")
    assert error.reasons[0].found == "a masked CHIP_ID"


def test_turin_s_chip_id_is_eight_bytes_and_zeros() -> None:
    machine = soft_snp.machine(line="Turin")
    assert machine.chip_id[8:] == bytes(56)
    assert claims(good(machine)).platform["chip_id"] == machine.chip_id.hex()
    refused(good(machine, chip_id=machine.chip_id[:8] + b"\x01" + bytes(55)), "sev-snp.6-chip")


# --- signature --------------------------------------------------------------------------------------------------------


def test_a_changed_byte_of_the_signed_report_is_never_accepted() -> None:
    evidence = good(version=5, host_data=b"\x55" * 32)
    for position in range(snp_format.REPORT_BYTES):
        changed = bytearray(evidence.quote)
        changed[position] ^= 1 << (position % 8)
        refusal(claims, replace(evidence, quote=bytes(changed)))


def test_the_other_signature_of_the_same_report_changes_no_claim() -> None:
    """ECDSA: (r, n - s) is valid where (r, s) is. So a report's hash is no identity; its content is the same."""
    evidence = good()
    s = int.from_bytes(evidence.quote[0x2E8:0x330], "little")
    other = evidence.quote[:0x2E8] + (soft_snp._ORDER - s).to_bytes(72, "little") + evidence.quote[0x330:]
    assert other != evidence.quote
    assert claims(replace(evidence, quote=other)) == claims(evidence)


@pytest.mark.parametrize("value", [0, soft_snp._ORDER, (1 << 384) - 1])
def test_signatures_outside_of_the_group_are_refused(value: int) -> None:
    for at in (0x2A0, 0x2E8):
        evidence = good()
        changed = evidence.quote[:at] + value.to_bytes(72, "little") + evidence.quote[at + 72 :]
        refused(replace(evidence, quote=changed), "sev-snp.7-signature")


# --- what appraisal judges ----------------------------------------------------------------------------------------------


def test_states_of_the_platform_are_claims() -> None:
    policy = Policy(
        "place",
        "tee",
        accept=frozenset({"simulated"}),
        require={"sev-snp": {"migrate_ma": False, "vmpl0": True, "alias_check_complete": True}},
        min_svn={"sev-snp": {"snp": 20, "microcode": 200}},
    )
    assert appraise(claims(good()), policy) == ()
    for rest, rule in (
        ({"debug": True}, "debug"),
        ({"migrate": True}, "migrate_ma"),
        ({"vmpl": 3}, "vmpl0"),
        ({"platform_info": 1}, "alias_check_complete"),
        ({"committed": replace(soft_snp.TCB, snp=19)}, "snp"),
    ):
        found = claims(good(**rest))
        reasons = appraise(found, policy)
        assert len(reasons) == 1, reasons
        assert rule in str(reasons[0])


def test_a_host_that_launches_the_right_image_with_a_migration_agent_of_its_own() -> None:
    """The host chooses the guest policy, the measurement does not cover it, and an agent gets the keys of the guest's memory."""
    policy = Policy("place", "tee", accept=frozenset({"simulated"}))
    own, moved = claims(good()), claims(good(migrate=True))
    assert moved.measurements["measurement"] == own.measurements["measurement"]
    assert appraise(own, policy) == ()
    assert [reason.where for reason in appraise(moved, policy)] == ["place.require.migrate_ma"]
    assert appraise(moved, replace(policy, require={"sev-snp": {"migrate_ma": True}})) == ()


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0x00, struct.pack("<I", 1)),
        (0x00, struct.pack("<I", 6)),
        (0x08, struct.pack("<Q", 1 << 16)),  # the bit that must be one is zero
        (0x08, struct.pack("<Q", soft_snp.POLICY | 1 << 26)),
        (0x08, struct.pack("<Q", soft_snp.POLICY | 1 << 63)),
        (0x30, struct.pack("<I", 4)),
        (0x30, struct.pack("<I", 0xFFFFFFFF)),
        (0x34, struct.pack("<I", 0)),
        (0x34, struct.pack("<I", 2)),
        (0x48, struct.pack("<I", 7 << 2)),
        (0x48, struct.pack("<I", 2 << 2)),
        (0x48, struct.pack("<I", 1 << 5)),
        (0x4C, b"\x01"),
        (0x38 + 3, b"\x01"),
        (0x180 + 2, b"\x01"),
        (0x18B, b"\x01"),
        (0x19F, b"\x01"),
        (0x1EB, b"\x01"),
        (0x1EF, b"\x01"),
        (0x1F8, b"\x01"),
        (0x29F, b"\x01"),
    ],
)
def test_a_signed_field_that_the_specification_does_not_allow_is_malformed(offset: int, value: bytes) -> None:
    refused(good(edit=((offset, value),)), "sev-snp.1-format", code="evidence-malformed")


def test_bytes_that_nobody_signs_must_be_zero() -> None:
    for offset in (0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48, 0x330, 0x49F):
        evidence = good()
        changed = bytearray(evidence.quote)
        changed[offset] = 1
        refused(replace(evidence, quote=bytes(changed)), "sev-snp.1-format", code="evidence-malformed")


def test_unknown_bits_of_the_platform_are_kept_and_not_judged() -> None:
    found = claims(good(platform_info=soft_snp.PLATFORM_INFO | 1 << 40))
    assert found.platform["platform_info"] == f"{soft_snp.PLATFORM_INFO | 1 << 40:016x}"


@pytest.mark.parametrize("size", [0, 1, 0x29F, 0x49F, 0x4A1, 4000, 65536])
def test_reports_of_another_size_are_malformed(size: int) -> None:
    quote = good().quote.ljust(size, b"\x00")[:size]
    refused(replace(good(), quote=quote), "sev-snp.1-format", code="evidence-malformed")


def test_parts_are_named() -> None:
    leaf = soft_snp.machine().leaf
    for parts in ({"leaf": leaf, "table": soft_snp.certificate_table(soft_snp.machine())}, {"vcek": leaf}):
        refused(replace(good(), parts=MappingProxyType(parts)), "sev-snp.1-format", code="evidence-malformed")


@pytest.mark.parametrize(
    "edit",
    [
        lambda leaf: b"",
        lambda leaf: leaf[:-1],
        lambda leaf: leaf + b"\x00",
        lambda leaf: leaf * 20,
        lambda leaf: soft_snp.authority("Milan").ask,
        lambda leaf: soft_snp.authority("Milan").ark,
        lambda leaf: leaf.replace(b"\x16\x08Milan-B0", b"\x16\x08Mylan-B0"),
        lambda leaf: leaf.replace(b"\x16\x08Milan-B0", b"\x16\x07Milan-B0"),
        lambda leaf: leaf.replace(b"\x02\x02\x00\xdb", b"\x02\x02\x01\xdb"),
        lambda leaf: leaf.replace(b"\x02\x02\x00\xdb", b"\x03\x02\x00\xdb"),
    ],
)
def test_a_leaf_of_another_form_is_malformed(edit: Callable[[bytes], bytes]) -> None:
    leaf = edit(soft_snp.machine().leaf)
    error = refusal(claims, replace(good(), parts=MappingProxyType({"leaf": leaf})))
    assert error.code == "evidence-malformed"
    assert error.reasons[0].where in {"sev-snp.1-format", "sev-snp.3-chain.format"}


def test_a_vcek_needs_its_chip_and_a_vlek_its_cloud() -> None:
    for machine in (
        soft_snp.machine(hwid=b""),
        soft_snp.machine(hwid=bytes(63)),
        soft_snp.machine(hwid=bytes(8)),
        soft_snp.machine(line="Turin", hwid=bytes(64)),
        soft_snp.machine(signer="vlek", csp_id=""),
    ):
        refused(good(machine), "sev-snp.1-format", code="evidence-malformed")


# --- the host's certificate table -------------------------------------------------------------------------------------


def test_tables_round_trip() -> None:
    found = {"vcek": b"a", "ask": b"bc", "ark": b"def"}
    assert dict(snp_format.parse_table(snp_format.table(found))) == found
    assert dict(snp_format.parse_table(bytes(24))) == {}
    # an entry that we do not know is left out
    other = snp_format.table(found).replace(snp_format.GUIDS["ask"], bytes(range(16)))
    assert dict(snp_format.parse_table(other)) == {"vcek": b"a", "ark": b"def"}


@pytest.mark.parametrize(
    "table",
    [
        b"",
        bytes(23),
        snp_format.GUIDS["vcek"] + struct.pack("<II", 48, 1),  # no entry of zeros
        snp_format.GUIDS["vcek"] + struct.pack("<II", 48, 1) + bytes(24),  # outside
        snp_format.GUIDS["vcek"] + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + bytes(48),
        snp_format.GUIDS["vcek"] + struct.pack("<II", 48, 0) + bytes(48),  # empty
        snp_format.GUIDS["vcek"] + struct.pack("<II", 0, 24) + bytes(48),  # the index itself
        (snp_format.GUIDS["vcek"] + struct.pack("<II", 72, 1)) * 2 + bytes(48),  # twice
        (bytes(range(16)) + struct.pack("<II", 480, 1)) * 17 + bytes(480),
        bytes(24) + bytes(snp_format.TABLE_LIMIT),
    ],
)
def test_tables_of_another_form_are_malformed(table: bytes) -> None:
    refused(replace(good(), parts=MappingProxyType({"table": table})), "sev-snp.1-format", code="evidence-malformed")


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=1300))
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    value_or_malformed(lambda: snp_format.parse(data))
    value_or_malformed(lambda: snp_format.parse_table(data))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_evidence_is_refused_or_says_the_same(data: st.DataObject) -> None:
    evidence = good(table=data.draw(st.booleans()), version=data.draw(st.sampled_from([2, 3, 5])))
    ((name, part),) = evidence.parts.items()
    target = data.draw(st.sampled_from(["quote", name]))
    blob = bytearray(evidence.quote if target == "quote" else part)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert"])):
            case "flip":
                blob[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                blob[at : at + 4] = data.draw(st.sampled_from([b"\xff\xff\xff\xff", bytes(4), b"\x30\x84\xff\xff"]))
            case "cut":
                del blob[at : at + data.draw(st.integers(1, 64))]
            case _:
                blob[at:at] = data.draw(st.binary(max_size=8))
        if not blob:
            blob = bytearray(b"\x00")
    changed = (
        replace(evidence, quote=bytes(blob))
        if target == "quote"
        else replace(evidence, parts=MappingProxyType({name: bytes(blob)}))
    )
    found = claims_or_refusal(changed)
    if isinstance(found, EvidenceError):
        assert found.reasons
        assert found.code in {"evidence-malformed", "evidence-not-authentic"}
    else:
        assert found == claims(evidence)


def test_times_without_a_zone_and_other_kinds_are_a_caller_s_mistake() -> None:
    with pytest.raises(ValueError, match="time zone"):
        verify(good(), ENDORSED, SOFT, now=datetime(2026, 11, 20))  # noqa: DTZ001 - the point
    with pytest.raises(ValueError, match="kind"):
        snp_verify.verify(replace(good(), kind="tdx"), ENDORSED, SOFT, now=NOW)


def test_the_verifier_is_found() -> None:
    assert VERIFIERS["sev-snp"] is snp_verify.verify
    assert list(snp_verify.STEPS) == sorted(snp_verify.STEPS)
    assert all(f"  {name.split('.')[1].split('-')[0]} " in (snp_verify.__doc__ or "") for name in snp_verify.STEPS)


# --- serial number 0 --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_serial_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cryptography` as it announced to be: it refuses certificates with serial number 0."""
    real = pki._load

    def load(data: bytes) -> x509.Certificate:
        found = real(data)
        if found.serial_number == 0:
            raise ValueError("the serial number is not positive")
        return found

    monkeypatch.setattr(pki, "_load", load)
    snp_verify._certificate.cache_clear()
    snp_format.leaf.cache_clear()


@pytest.mark.usefixtures("no_serial_0")
def test_certificates_with_serial_0_keep_working() -> None:
    for machine in (soft_snp.machine(), soft_snp.machine(signer="vlek"), soft_snp.machine(line="Turin", wrapped=True)):
        assert claims(good(machine)).soft
    refused(good(signing_key=1), "sev-snp.3-chain.kind")
    refused(good(soft_snp.machine(label="mallory")), "sev-snp.3-chain.signature")
    refused(good(soft_snp.machine(not_after=NOW - timedelta(seconds=1))), "sev-snp.3-chain.expired")
    refused(good(soft_snp.machine(serial=0, issued_by="vlek")), "sev-snp.3-chain.issuer")


@pytest.mark.usefixtures("no_serial_0")
def test_no_byte_of_a_certificate_with_serial_0_is_free() -> None:
    """The fallback is a second parser: what it lets pass beside the signed part, such as the outer algorithm, must be nothing."""
    leaf = soft_snp.machine().leaf
    signed = 4 + len(asn1_x509.Certificate.load(leaf)["tbs_certificate"].dump())
    # every byte around the signed part, some within it
    for position in (*range(0, signed, 9), *range(signed, signed + 110), *range(signed, len(leaf), 31)):
        changed = bytearray(leaf)
        changed[position] ^= 1 << (position % 8)
        refusal(claims, replace(good(), parts=MappingProxyType({"leaf": bytes(changed)})))


# --- real evidence ----------------------------------------------------------------------------------------------------

FOLDER = SHARED / "vectors" / "attestation"


def _entries() -> list[dict[str, Any]]:
    manifest = FOLDER / "manifest.json"
    if not manifest.exists():
        return []
    return [entry for entry in json.loads(manifest.read_text()) if entry["kind"] == "snp"]


ENTRIES = _entries()
real = pytest.mark.skipif(not ENTRIES, reason="third-party vectors are not beside the repository")


def case(entry: dict[str, Any], **files: bytes) -> Case:
    chains = {path.stem.removeprefix("chain-"): path.read_bytes() for path in (FOLDER / "snp").glob("chain-*.pem")}
    return Case(
        "snp",
        {role: (FOLDER / path).read_bytes() for role, path in entry["files"].items()} | files,
        datetime.fromisoformat(entry["at"] or "2025-06-01T00:00:00Z"),
        entry["name"],
        chains=chains,
        chain=entry.get("chain", ""),
    )


def _as_expected(entry: dict[str, Any]) -> None:
    observed = files_snp.observe(case(entry))
    expect = dict(entry["expect"])
    reason = expect.pop("reason", None)
    assert {name: observed.facts.get(name) for name in expect} == expect
    if reason is not None:
        assert observed.error is not None
        assert observed.error.reasons[0].where == f"sev-snp.3-{reason}"
    if expect.get("authentic"):
        states = {step.name: step.state for step in observed.steps}
        assert states.pop("sev-snp.4-revocation") == "not done"
        assert set(states.values()) == {"passed"}
        assert observed.claims is not None
        assert observed.claims.tee == "sev-snp"


@real
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_every_vector_gives_its_verdict(entry: dict[str, Any]) -> None:
    _as_expected(entry)


@real
@pytest.mark.usefixtures("no_serial_0")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_every_vector_gives_its_verdict_without_serial_0(entry: dict[str, Any]) -> None:
    _as_expected(entry)


@real
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e["expect"].get("authentic")], ids=lambda e: e["name"])
def test_real_reports_have_no_byte_to_spare(entry: dict[str, Any]) -> None:
    report = (FOLDER / entry["files"]["report"]).read_bytes()
    for position in range(0, snp_format.REPORT_BYTES, 17):
        changed = bytearray(report)
        changed[position] ^= 1 << (position % 8)
        assert files_snp.observe(case(entry, report=bytes(changed))).facts == {"authentic": False}
    assert files_snp.observe(case(entry, report=report + bytes(2816))).facts["authentic"] is True
    assert files_snp.observe(case(entry, report=report + b"\x01")).facts == {"authentic": False}


@real
def test_real_evidence_is_refused_without_a_revocation_list() -> None:
    entry = next(entry for entry in ENTRIES if entry["name"] == "milan-vcek-trustee")
    one = case(entry)
    evidence = Evidence("sev-snp", one.files["report"], (), MappingProxyType({"leaf": one.files["leaf"]}))
    error = refusal(verify, evidence, files_snp.endorsements(one), Roots(), now=one.now)
    assert error.reasons[0].where == "sev-snp.4-revocation.revocation"


@real
def test_a_leaf_in_a_file_is_filed_where_its_report_looks_for_it() -> None:
    for name in ("milan-vcek-trustee", "milan-debug-google"):
        one = case(next(entry for entry in ENTRIES if entry["name"] == name))
        (found,) = recognise(one.files["leaf"])
        assert found.subject == snp_format.wanted_subject(snp_format.parse(one.files["report"]))
        bare = Evidence("sev-snp", one.files["report"])
        endorsed = Endorsements((*files_snp.endorsements(one).items, found))
        assert snp_verify.examine(bare, endorsed, Roots(), now=one.now, revocation=False).tee == "sev-snp"
    one = case(next(entry for entry in ENTRIES if entry["name"] == "milan-vlek-aws"))
    (found,) = recognise(one.files["leaf"])
    assert found.subject == "vlek/CN=cc-us-east-2.amazonaws.com"


@real
def test_soft_collateral_stands_beside_amd_s() -> None:
    """One set of endorsements for both, as a demonstration on a real machine has it: neither hides the other."""
    entry = next(entry for entry in ENTRIES if entry["name"] == "milan-vcek-trustee")
    one = case(entry)
    evidence = Evidence("sev-snp", one.files["report"], (), MappingProxyType({"leaf": one.files["leaf"]}))
    for both in (ENDORSED | files_snp.endorsements(one), files_snp.endorsements(one) | ENDORSED):
        assert snp_verify.examine(evidence, both, SOFT, now=one.now, revocation=False).tee == "sev-snp"
        assert claims(good(), both).tee == "soft-sev-snp"


@real
def test_a_nonce_is_compared() -> None:
    entry = next(entry for entry in ENTRIES if entry["name"] == "milan-vcek-trustee")
    report_data = snp_format.parse(case(entry).files["report"]).report_data
    for nonce, authentic in ((report_data, True), (report_data[:32], True), (report_data[:31], False), (b"x", False)):
        observed = files_snp.observe(replace(case(entry), nonce=nonce))
        assert observed.facts["authentic"] is authentic
        assert (observed.error is None) is authentic


@real
def test_vectors_under_the_soft_root_stay_real() -> None:
    """`soft` admits more roots; it changes nothing about AMD's."""
    entry = next(entry for entry in ENTRIES if entry["name"] == "milan-vlek-aws")
    observed = files_snp.observe(replace(case(entry), roots=SOFT))
    assert observed.claims is not None
    assert (observed.claims.tee, observed.claims.soft) == ("sev-snp", False)
    assert observed.claims.platform["csp_id"] == "CN=cc-us-east-2.amazonaws.com"
    assert "chip_id" not in observed.claims.platform


def test_files_under_the_soft_root() -> None:
    """The same door for unknown files: PEM leaves, tables, a revocation list as collateral."""
    machine = soft_snp.machine()
    chains = {item.subject: item.data for item in ENDORSED.items if not item.subject.endswith("/crl/soft")}
    crl = {"milan.crl": ENDORSED.get("sev-snp", "Milan/crl/soft") or b"", "noise.txt": b"noise"}
    files = {"report": good().quote, "leaf": machine.leaf}
    one = Case("snp", files, NOW, chains=chains, roots=SOFT, collateral=crl)
    observed = files_snp.observe(one)
    assert observed.error is None
    assert {step.state for step in observed.steps} == {"passed"}
    revoked = {"milan.crl": soft_snp.endorsements(ISSUED, revoked=("ask",))[2].data}
    observed = files_snp.observe(replace(one, collateral=revoked))
    assert observed.error is not None
    assert observed.error.reasons[0].where == "sev-snp.4-revocation.revoked"
    table = {"report": good().quote, "table": soft_snp.certificate_table(machine)}
    assert files_snp.observe(replace(one, files=table)).facts["authentic"] is True
    for broken in ({"report": b""}, {"report": good().quote, "leaf": b"-----BEGIN CERTIFICATE-----"}):
        observed = files_snp.observe(replace(one, files=broken))
        assert observed.facts == {"authentic": False}
        assert any(step.state == "failed" for step in observed.steps)
    observed = files_snp.observe(
        replace(one, files={"milan": chains["Milan/vcek/soft"], "turin": chains["Turin/vlek/soft"]})
    )
    assert observed.facts["roots_sha256"] == [snp_roots.SOFT_MILAN, snp_roots.SOFT_TURIN]
    assert files_snp.observe(replace(one, files={"x": chains["Milan/vcek/soft"]}, roots=Roots())).facts == {
        "authentic": False
    }


# --- docs -------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_code_does() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "attestation" / "sev-snp.md").read_text()
    assert re.findall(r"^\| `(sev-snp\.\d-\w+)` \|", page, re.MULTILINE) == list(snp_verify.STEPS)
    for pin in snp_roots.PINS.vendor:
        assert pin in page
    claims_table = page.split("\n## Claims", 1)[1].split("\n## ", 1)[0]
    found = claims(good(soft_snp.machine(line="Turin"), version=5))
    for names in (found.measurements, found.svns, found.attributes):
        assert all(f"`{name}`" in claims_table for name in names)
    for name, (offset, size) in snp_format.FIELDS.items():
        assert re.search(rf"`0x{offset:03X}`.*\| {size} \|.*`{name}`", page)
