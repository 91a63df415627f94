"""Collateral, pure: what a file endorses, which numbers count, and snapshots. The store is in test_collateral_store.py."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cloister.attestation.collateral import marks, snapshot
from cloister.attestation.collateral.read import LIMIT, recognise
from cloister.attestation.collateral.snapshot import Snapshot
from cloister.attestation.edge.collateral import SOFT, soft_collateral
from cloister.attestation.endorsements import Endorsement, Endorsements
from cloister.attestation.roots import Roots
from cloister.attestation.soft import intel
from cloister.attestation.soft import nvidia as soft_nvidia
from cloister.attestation.soft import sgx as soft_sgx
from cloister.attestation.soft import snp as soft_snp
from cloister.attestation.soft import tdx as soft_tdx
from cloister.attestation.soft import tpm as soft_tpm
from cloister.crypto.canonical import cbor_encode, json_decode, json_encode
from cloister.errors import EvidenceError
from tests.attestation.helpers import SHARED, refusal, value_or_malformed

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SOFT_ROOTS = Roots(soft=True)
VECTORS = SHARED / "vectors" / "attestation"


def tdx(issued: datetime = NOW - DAY, **options: Any) -> Endorsement:
    return Endorsement("tdx", soft_tdx.FMSPC, soft_tdx.collateral(issued, **options))


def snp(issued: datetime = NOW - DAY, **options: Any) -> Endorsements:
    return Endorsements(soft_snp.endorsements(issued, **options))


def of(
    item: Endorsement, among: Endorsements | None = None, *, roots: Roots = SOFT_ROOTS, now: datetime = NOW
) -> dict[str, int]:
    return dict(marks.numbers(item, among or Endorsements((item,)), roots, now=now))


# --- which machines is this for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name", "kind", "subject"),
    [
        (soft_tdx.collateral(NOW), "", "tdx", soft_tdx.FMSPC),
        (soft_sgx.collateral(NOW), "", "sgx", soft_sgx.FMSPC),
        (soft_nvidia.driver_rim(), "", "nvidia-gpu", soft_nvidia.rim_ids()[0]),
        (soft_nvidia.driver_rim(arch="BLACKWELL"), "", "nvidia-gpu", soft_nvidia.rim_ids("BLACKWELL")[0]),
        (soft_nvidia.vbios_rim(), f"{soft_nvidia.rim_ids()[1]}.xml", "nvidia-gpu", soft_nvidia.rim_ids()[1]),
        (soft_nvidia.vbios_rim(), "rim-vbios-SOFT_0000_000_F50F700001.xml", "nvidia-gpu", soft_nvidia.rim_ids()[1]),
        (b'{"kty": "EC", "kid": "00ff", "crv": "P-384"}', "", "cca", "cpak/00ff"),
    ],
)  # fmt: skip
def test_a_vendors_file_says_what_it_is_for(data: bytes, name: str, kind: str, subject: str) -> None:
    (found,) = recognise(data, name=name)
    assert (found.kind, found.subject, found.data) == (kind, subject, data)


def test_the_answer_of_the_rim_service_is_its_manifest() -> None:
    rim = soft_nvidia.vbios_rim()
    name = soft_nvidia.rim_ids()[1]
    data = json_encode({"id": name, "rim": base64.b64encode(rim).decode(), "sha256": "x"})
    assert recognise(data) == (Endorsement("nvidia-gpu", name, rim),)


def test_a_vbios_manifest_without_its_id_says_how_to_name_it() -> None:
    for name in ("", "rim.xml", soft_nvidia.rim_ids()[0], "NV_GPU_VBIOS_SOFT_0000_000_F50F700002"):
        assert "NV_GPU_VBIOS_" in refusal(recognise, soft_nvidia.vbios_rim(), name=name).reasons[0].hint


def test_every_soft_object_is_filed_where_its_verifier_looks() -> None:
    """What a generator makes, written to files and read again, has the subject that it was made with (or begins it)."""
    for kind in SOFT:
        for item in soft_collateral(NOW, kind).items:
            if kind in ("nitro", "cca"):  # AWS publishes no lists; a bare public key does not say whose it is
                continue
            (found,) = recognise(item.data, name=item.subject)
            assert found.kind == item.kind
            if kind == "tpm":
                assert found.subject.startswith("crl/")
            else:
                assert item.subject.startswith(found.subject), (item.subject, found.subject)


def test_amd_certificates_and_lists_in_any_armour() -> None:
    chain, crl = (snp().get("sev-snp", f"Milan/{what}/soft") for what in ("vcek", "crl"))
    assert chain is not None
    assert crl is not None
    assert recognise(chain)[0].subject == "Milan/vcek"
    pem = b"-----BEGIN X509 CRL-----\n" + base64.encodebytes(crl) + b"-----END X509 CRL-----\n"
    assert (
        recognise(pem)
        == recognise(crl)
        == recognise(base64.b64encode(crl))
        == (Endorsement("sev-snp", "Milan/crl", crl),)
    )
    leaf = soft_snp.leaf_endorsement(soft_snp.machine("a"))
    assert recognise(leaf.data) == (leaf,)


def test_certificates_of_devices_and_of_tpms_are_authorities() -> None:
    device = soft_nvidia.gpu()
    found = recognise(device.chain)
    assert {item.kind for item in found} <= {"nvidia-gpu", "tpm"}
    assert all(item.subject.startswith("ca/") for item in found)


@pytest.mark.parametrize("data", [b"", b"\x00", b"hello", b"{}", b"{", b"<a/>", b"0", b"\x30\x00", b"-----BEGIN", b'{"kty": 1, "kid": ""}', b'{"tcb_info": 3}', b'{"id": "NV_GPU_DRIVER_GH100_1", "rim": "!"}', b"[" * 100_000, b'{"a":' * 100_000, b"\x30" * (LIMIT + 1)])  # fmt: skip
def test_what_is_no_collateral_is_malformed(data: bytes) -> None:
    assert refusal(recognise, data).code == "evidence-malformed"


@given(
    st.sampled_from([soft_tdx.collateral(NOW), soft_nvidia.driver_rim(), snp().items[0].data, snp().items[2].data]),
    st.data(),
)
def test_changed_files_raise_nothing_else(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    cut = draw.draw(st.sampled_from([data[:at], data[at:], data[:at] + b"\xff" + data[at + 1 :], data[:at] * 2]))
    value_or_malformed(lambda: recognise(cut))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the recorded evidence is not beside the repository")
def test_recorded_collateral_of_vendors_is_recognised() -> None:
    subjects = {}
    for path in sorted(VECTORS.rglob("*")):
        if path.is_file() and ("collateral" in path.name or path.name.startswith(("rim-v", "rim-d", "ocsp", "chain-"))):
            try:
                subjects[path.name] = [item.subject for item in recognise(path.read_bytes(), name=path.name)]
            except EvidenceError as error:
                subjects[path.name] = [str(error.reasons[0])]
    assert subjects["rim-driver-GH100-550.90.07.xml"] == ["NV_GPU_DRIVER_GH100_550.90.07"]
    assert subjects["rim-vbios-1010_0200_882_96009F0001.xml"] == ["NV_GPU_VBIOS_1010_0200_882_96009F0001"]
    assert all(each[0].startswith("ocsp/") for name, each in subjects.items() if name.startswith("ocsp"))
    chains = {each for name, found in subjects.items() if name.startswith("chain-") for each in found}
    assert chains >= {"Milan/vcek", "Genoa/vcek", "Turin/vcek"} or not chains


# --- marks ------------------------------------------------------------------------------------------------------------


def test_tdx_collateral_has_eight_numbers() -> None:
    item = tdx(evaluation=18)
    found = of(item)
    families = {name.split("/")[0]: value for name, value in found.items() if not name.endswith("/time")}
    assert families["tcb"] == families["qe"] == 18
    assert len(found) == 8
    assert {value for name, value in found.items() if name.endswith("/time")} == {int((NOW - DAY).timestamp())}


def test_sgx_and_tdx_do_not_share_marks_of_their_documents() -> None:
    both = of(tdx()).keys() & of(Endorsement("sgx", soft_sgx.FMSPC, soft_sgx.collateral(NOW - DAY))).keys()
    assert {name.split("/")[0] for name in both} == {"crl"}  # the lists are the same two


def test_a_later_issue_is_ahead_and_an_older_one_behind() -> None:
    old, new = of(tdx(NOW - 2 * DAY, evaluation=17)), of(tdx(NOW - DAY, evaluation=18))
    after = marks.advance(marks.advance({}, old), new)
    assert after == new
    error = refusal(marks.advance, after, old)
    assert error.code == "collateral-rolled-back"
    evaluation = next(
        reason
        for reason in error.reasons
        if reason.where.startswith("collateral.tcb/TDX") and not reason.where.endswith("time")
    )
    assert (evaluation.found, evaluation.wanted) == ("17", "at least 18")
    assert marks.advance(after, new) == new  # the same again is no rollback


def test_rollback_of_a_revocation_list_is_found_by_number_and_by_time() -> None:
    old, new = snp(NOW - 2 * DAY, number=4), snp(NOW - DAY, number=5)
    ahead = marks.numbers_of_all(new, SOFT_ROOTS, now=NOW)
    reasons = marks.behind(ahead, marks.numbers_of_all(old, SOFT_ROOTS, now=NOW))
    assert {(reason.found, reason.wanted) for reason in reasons if not reason.where.endswith("time")} == {
        ("4", "at least 5")
    }
    assert len(reasons) == 6  # three product lines, number and time


def test_a_list_without_its_chain_has_no_numbers() -> None:
    lists = Endorsements(tuple(item for item in snp().items if "/crl" in item.subject))
    assert lists.items
    assert marks.numbers_of_all(lists, SOFT_ROOTS, now=NOW) == {}


def test_an_ocsp_response_counts_under_the_authority_that_it_speaks_for() -> None:
    device = soft_nvidia.gpu()
    issuers = [
        Endorsement("nvidia-gpu", f"ca/{index}", each.certificate.public_bytes(Encoding.DER))
        for index, each in enumerate(device.issuers)
    ]
    answers = [item for item in soft_nvidia.endorsements(NOW, (device,)).items if item.subject.startswith("ocsp/")]
    among = Endorsements((*issuers, *answers))
    found = marks.numbers_of_all(among, SOFT_ROOTS, now=NOW)
    assert found
    assert set(found.values()) == {int(NOW.timestamp())}
    assert all(name.startswith("ocsp/") for name in found)
    later = [item for item in soft_nvidia.endorsements(NOW - DAY, (device,)).items if item.subject.startswith("ocsp/")]
    older = marks.numbers_of_all(Endorsements((*issuers, *later)), SOFT_ROOTS, now=NOW)
    assert len(marks.behind(found, older)) == len(found)


def test_lists_of_tpm_authorities_count_under_their_authority() -> None:
    issuer = soft_tpm.authority()
    items = [
        Endorsement("tpm", f"ca/{i}", each.public_bytes(Encoding.DER))
        for i, each in enumerate((issuer.root, issuer.ca))
    ]
    among = Endorsements((*items, *soft_tpm.endorsements(NOW - DAY)))
    assert len({name for name in marks.numbers_of_all(among, SOFT_ROOTS, now=NOW) if name.endswith("/time")}) == 2


def test_attack_poisoned_mark_a_forged_high_number_moves_nothing() -> None:
    """An attacker who can put files into a store writes the highest number there is, so that genuine collateral is behind."""
    genuine = tdx(evaluation=18)
    value = json_decode(genuine.data, canonical=False)
    forged = {
        **value,
        "tcb_info": value["tcb_info"].replace('"tcbEvaluationDataNumber":18', '"tcbEvaluationDataNumber":999999'),
    }
    assert forged != value
    found = of(Endorsement("tdx", genuine.subject, json_encode(forged)))
    assert not any(name.startswith("tcb/") for name in found)
    assert 999999 not in found.values()
    # a whole collateral under a root of the attacker's own
    assert of(tdx(evaluation=10**9, label="attacker")) == {}
    # an attacker who has a PCK key, below the same root, but is no signer of documents
    platform = soft_tdx.platform("stolen")
    key, chain = platform.pck_key, (platform.pck, intel.authority().ca, intel.authority().root)
    stolen = of(tdx(evaluation=10**9, signer=(key, chain)))
    assert not any(name.startswith(("tcb/", "qe/")) for name in stolen)
    # a list with a high number that AMD's key did not sign
    chains = [item for item in snp().items if "/crl" not in item.subject]
    lists = [item for item in snp(number=10**9, label="attacker").items if "/crl" in item.subject]
    assert marks.numbers_of_all(Endorsements((*chains, *lists)), SOFT_ROOTS, now=NOW) == {}


def test_attack_poisoned_mark_the_published_test_key_moves_no_vendors_mark() -> None:
    """Its private key is public, so anybody can sign any number with it."""
    item = tdx(evaluation=10**9)
    assert of(item, roots=Roots()) == {}
    assert of(item)  # believed by name only, and then
    path = VECTORS / "dcap"
    if not path.is_dir():
        pytest.skip("the recorded evidence is not beside the repository")
    for file in sorted(path.rglob("*collateral*.json")):
        for real in recognise(file.read_bytes()):
            issued = NOW
            names = marks.numbers(real, Endorsements((real,)), Roots(), now=issued).keys()
            assert not names & of(item).keys()


def test_attack_poisoned_mark_what_is_issued_in_the_future_does_not_count_yet() -> None:
    assert of(tdx(NOW + DAY)) == {}
    assert marks.numbers_of_all(snp(NOW + DAY), SOFT_ROOTS, now=NOW) == {}
    assert of(tdx(NOW + DAY), now=NOW + 2 * DAY)


def test_collateral_that_has_ended_still_counts() -> None:
    """Its signature is as good as before, and the number must not be forgotten."""
    assert of(tdx(NOW - timedelta(days=90)), now=NOW)
    assert marks.numbers_of_all(snp(NOW - timedelta(days=2000)), SOFT_ROOTS, now=NOW)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the recorded evidence is not beside the repository")
def test_real_collateral_has_real_numbers() -> None:
    found: dict[str, int] = {}
    for file in sorted((VECTORS / "dcap").rglob("*.json")):
        try:
            items = recognise(file.read_bytes())
        except EvidenceError:
            continue
        for item in items:
            found |= marks.numbers(item, Endorsements((item,)), Roots(), now=datetime(2025, 6, 25, tzinfo=UTC))
    evaluations = {value for name, value in found.items() if name.startswith("tcb/") and not name.endswith("/time")}
    assert evaluations
    assert all(0 < value < 100 for value in evaluations)


def test_marks_need_a_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        of(tdx(), now=datetime(2026, 1, 1))  # noqa: DTZ001 - the mistake that is tested


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
)
def test_marks_never_fall(before: dict[str, int], found: dict[str, int]) -> None:
    fallen = {name for name in found if found[name] < before.get(name, 0)}
    if fallen:
        error = refusal(marks.advance, before, found)
        assert error.code == marks.CODE
        assert {reason.where.split(".")[1] for reason in error.reasons} == fallen
        return
    after = marks.advance(before, found)
    assert all(after[name] >= number for name, number in before.items())
    assert all(after[name] == number for name, number in found.items())


def test_mark_names_fit_the_brokers_log() -> None:
    import re

    for kind in SOFT:
        for name in marks.numbers_of_all(soft_collateral(NOW, kind), SOFT_ROOTS, now=NOW):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+/=:._-]{0,126}", name)


# --- snapshots --------------------------------------------------------------------------------------------------------

ITEMS = (tdx(), *snp().items)


def test_a_snapshot_has_one_form_whatever_the_order() -> None:
    first, second = (snapshot.encode(Snapshot(NOW, items)) for items in (ITEMS, ITEMS[::-1]))
    assert first == second
    assert set(snapshot.decode(first).items) == set(ITEMS)
    assert snapshot.decode(first).made == NOW
    assert len(snapshot.name_of(first)) == 64
    keys = [(item.kind, item.subject) for item in snapshot.decode(first).items]
    assert all(one < two for one, two in pairwise(keys))


def test_a_signed_snapshot_is_opened_only_after_its_signature_holds() -> None:
    body = snapshot.encode(Snapshot(NOW, ITEMS))
    asked = []

    def check(signature: str, message: bytes) -> str:
        asked.append((signature, message))
        return "SHA256:me"

    found, signer = snapshot.open_signed(snapshot.seal(body, "armour"), check)
    assert (asked, signer, found.made) == ([("armour", body)], "SHA256:me", NOW)

    def never(signature: str, message: bytes) -> str:
        raise EvidenceError("no", code="evidence-not-authentic")

    assert (
        refusal(snapshot.open_signed, snapshot.seal(b"not even CBOR", "armour"), never).code == "evidence-not-authentic"
    )
    assert snapshot.looks_like_one(snapshot.seal(body, "armour"))
    assert not snapshot.looks_like_one(tdx().data)


GOOD = {"v": 1, "made": "2026-11-20T12:00:00Z", "items": [{"kind": "tdx", "subject": "A", "data": b"x"}]}
FAULTS: dict[str, object] = {
    "another version": {**GOOD, "v": 2},
    "a version that is a switch": {**GOOD, "v": True},
    "a further key": {**GOOD, "more": 1},
    "no time": {**GOOD, "made": "yesterday"},
    "a day that is none": {**GOOD, "made": "2026-13-20T12:00:00Z"},
    "an item twice": {**GOOD, "items": [GOOD["items"][0]] * 2},  # type: ignore[index]
    "items out of order": {**GOOD, "items": [{"kind": "tdx", "subject": s, "data": b"x"} for s in "BA"]},
    "an item without data": {**GOOD, "items": [{"kind": "tdx", "subject": "A", "data": b""}]},
    "an item that is too large": {**GOOD, "items": [{"kind": "tdx", "subject": "A", "data": bytes(LIMIT + 1)}]},
    "a kind that is none": {**GOOD, "items": [{"kind": "../x", "subject": "A", "data": b"x"}]},
    "a subject that does not print": {**GOOD, "items": [{"kind": "tdx", "subject": "A\n", "data": b"x"}]},
    "too many items": {**GOOD, "items": [{"kind": "tdx", "subject": f"{i:05}", "data": b"x"} for i in range(4097)]},
    "an item of another shape": {**GOOD, "items": [1]},
    "no map": [1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_snapshot_of_another_form_is_malformed(fault: str) -> None:
    assert snapshot.decode(cbor_encode(GOOD)).items == (Endorsement("tdx", "A", b"x"),)
    assert refusal(snapshot.decode, cbor_encode(FAULTS[fault])).code == "evidence-malformed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        cbor_encode(GOOD),
        cbor_encode({"v": 1, "snapshot": b"x", "signature": ""}),
        cbor_encode({"v": 1, "snapshot": b"x"}),
        cbor_encode({"v": 2, "snapshot": b"x", "signature": "s"}),
        cbor_encode({"v": 1, "snapshot": "x", "signature": "s"}),
        cbor_encode({"v": 1, "snapshot": b"x", "signature": "s" * 20_000}),
        cbor_encode({"v": 1, "snapshot": b"x", "signature": "s"}) + b"\x00",
        b"\xa3\x61v\x01" + b"\xbb" + b"\xff" * 8,
    ],
)
def test_a_file_without_a_signature_is_no_signed_snapshot(data: bytes) -> None:
    assert refusal(snapshot.unseal, data).code == "evidence-malformed"


def test_a_snapshot_that_breaks_a_limit_is_the_callers_mistake() -> None:
    for wrong in (Snapshot(datetime(2026, 1, 1), ITEMS), Snapshot(NOW, (ITEMS[0], ITEMS[0]))):  # noqa: DTZ001
        with pytest.raises(ValueError, match=r"time zone|twice"):
            snapshot.encode(wrong)


@given(st.binary(max_size=64), st.integers(0, 400))
def test_changed_snapshots_raise_nothing_else(junk: bytes, at: int) -> None:
    good = snapshot.seal(cbor_encode(GOOD), "armour")
    changed = good[:at] + junk + good[at + len(junk) :]
    value_or_malformed(lambda: snapshot.unseal(changed))
    value_or_malformed(lambda: snapshot.decode(changed))
