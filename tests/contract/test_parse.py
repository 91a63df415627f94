"""What a contract file may say: one fault per case, with the path and the words of the finding."""

from __future__ import annotations

import hashlib
import time
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.contract import parse, required_signers
from cloister.contract.model import NOBODY, HePlace, HostPlace, SignedBy, TeePlace
from cloister.contract.parse import MAX_BYTES
from cloister.contract.text import Finding
from cloister.errors import InputError
from tests.contract.samples import NAMES, changed, edited, example, source


def findings(data: bytes) -> list[Finding]:
    with pytest.raises(InputError) as caught:
        parse(data, name="bad.toml")
    assert caught.value.code == "contract-invalid"
    assert "bad.toml" in str(caught.value)
    reasons = list(caught.value.reasons)
    assert reasons
    found = [reason for reason in reasons if isinstance(reason, Finding)]
    assert found == reasons
    return found


@pytest.mark.parametrize("name", NAMES)
def test_examples_parse_and_their_id_is_the_digest_of_the_bytes(name: str) -> None:
    contract = example(name)
    assert contract.name == name
    assert contract.id == "sha256:" + hashlib.sha256(source(name).encode()).hexdigest()


def test_free_text_becomes_typed_values() -> None:
    xray, banks, acme = (example(name) for name in NAMES)
    host, cipher, enclave = xray.place["gpu-host"], banks.place["cipher"], xray.place["enclave"]
    assert isinstance(host, HostPlace)
    assert host.files == SignedBy("vendor")
    assert isinstance(cipher, HePlace)
    assert cipher.refresh == "enclave"
    assert isinstance(enclave, TeePlace)
    assert enclave.min_tcb == (2026, 8)
    assert banks.board["board"].wait == timedelta(hours=72)
    assert acme.phase["train"].size == {"model": 64 * 1024 * 1024}
    answer = acme.phase["serve"].answer
    assert answer is not None
    assert (answer.pad, answer.every) == (1024, timedelta(milliseconds=50))
    assert acme.expires == date(2027, 3, 31)


def test_everybody_whose_assets_are_touched_signs() -> None:
    xray, banks, acme = (example(name) for name in NAMES)
    assert required_signers(xray) == {"hospital", "vendor"}  # the clinic only asks
    assert required_signers(banks) == {"north", "south", "vendor", "auditor"}  # a board is its members
    assert required_signers(acme) == {"customer", "acme"}  # nobody owns the model
    assert acme.outputs == {"model": NOBODY}


def test_contracts_are_equal_by_their_bytes_and_frozen() -> None:
    first, again = example("acme-automl"), parse(source("acme-automl").encode(), name="again.toml")
    assert first == again
    assert hash(first) == hash(again)
    assert first != changed("acme-automl", ("budget = 100_000", "budget = 100_001"))
    with pytest.raises(TypeError):
        first.phase["train"].write["model"] = "acme"  # type: ignore[index]  # what must not work
    with pytest.raises(TypeError):
        first.party["eve"] = "SHA256:x"  # type: ignore[index]
    with pytest.raises(AttributeError):
        first.version = 2  # type: ignore[misc]


XRAY, BANKS, ACME = NAMES
DIGEST = "sha256:" + "0" * 64
KEY1 = "SHA256:1mbN4yyqQzwlbR7YvIZ0fpcMTk4w8DkAXlHEzMZzvCI"
HOST = '"signed-by:vendor"'

# example, what is replaced, by what, path of the finding, words in it
TCB = 'min_tcb = "2026-08"'
MR = f'measurements = {{ mrtd = ["{"ab" * 48}"] }}'
FAULTS = [
    # form
    (XRAY, 'sandbox = "one-shot"', 'sandbx = "one-shot"', "code.server.sandbx", "did you mean 'sandbox'?"),
    (XRAY, 'sandbox = "one-shot"', 'sandbox = "oneshot"', "code.server.sandbox", "did you mean 'one-shot'?"),
    (XRAY, "[change]", "[chnge]", "chnge", "did you mean 'change'?"),
    (XRAY, "[phase.train]", "[phase.trian]", "phase.trian", "did you mean 'train'?"),
    (XRAY, 'kind = "tee"', 'kind = "te"', "place.enclave.kind", "did you mean 'tee'?"),
    (XRAY, 'kind = "tee", ', "", "place.enclave.kind", "found nothing"),
    (XRAY, "per_day = 2_000", "per_dy = 2_000", "phase.serve.answer.per_dy", "did you mean 'per_day'?"),
    (XRAY, "per_day = 2_000", "per_day = 0", "phase.serve.answer.per_day", "at least 1"),
    (XRAY, "per_day = 2_000", "per_day = true", "phase.serve.answer.per_day", "a whole number"),
    (XRAY, "per_day = 2_000", "per_day = 2000.0", "phase.serve.answer.per_day", "a whole number"),
    (XRAY, "per_day = 2_000", "per_day = 9_007_199_254_740_992", "phase.serve.answer.per_day", "at most"),
    (XRAY, "version  = 1", "version = 0", "version", "at least 1"),
    (XRAY, "version  = 1", 'version = "1"', "version", "a whole number"),
    (XRAY, "expires  = 2027-06-30", 'expires = "2027-06-30"', "expires", "a TOML date"),
    (XRAY, "expires  = 2027-06-30", "expires = 2027-06-30T00:00:00Z", "expires", "a TOML date"),
    (XRAY, "expires  = 2027-06-30\n", "", "expires", "found nothing"),
    (XRAY, "2027-06-30", "2027-06-31", "toml", "date"),
    (XRAY, 'contract = "pneumonia-xray"', 'contract = "Pneumonia"', "contract", "a name"),
    (XRAY, 'contract = "pneumonia-xray"', f'contract = "{"a" * 41}"', "contract", "a name"),
    (XRAY, "8c3d5b6f0e2a4c6d", "8C3d5b6f0e2a4c6d", "code.trainer.digest", "64 lower-case hex"),
    (XRAY, "ZzvCI", "ZzvC", "party.hospital", "fingerprint of an SSH key"),
    (XRAY, "clinic   =", "Clinic   =", "party.Clinic", "a name"),
    (XRAY, 'read  = ["xrays", "backbone"]', "read  = []", "phase.train.read", "at least one entry"),
    (XRAY, 'read  = ["xrays", "backbone"]', 'read  = "xrays"', "phase.train.read", "an array"),
    (XRAY, 'read  = ["xrays", "backbone"]', 'read  = ["xrays", "xrays"]', "phase.train.read", "each entry once"),
    (XRAY, 'default = ["hospital", "vendor"]', 'default = "hospital"', "change.default", "a board, or an array"),
    (XRAY, 'default = ["hospital", "vendor"]', "default = []", "change.default", "an array of parties"),
    (XRAY, 'min_tcb = "2026-08"', 'min_tcb = "2026-99"', "place.enclave.min_tcb", "01 to 12"),
    (XRAY, 'min_tcb = "2026-08"', 'min_tcb = "2026-8"', "place.enclave.min_tcb", "YYYY-MM"),
    (XRAY, "boot = [", "debug = 1, boot = [", "place.gpu-host.debug", "true or false"),
    (XRAY, HOST, '"anything"', "place.gpu-host.files", "signed-by:<party>"),
    (XRAY, '"tdx", "sev-snp"', '"tdx", "soft-tdx"', "place.enclave.accept.1", "simulated"),
    (XRAY, '["tdx", "sev-snp", "sgx"]', "[]", "place.enclave.accept", "at least one entry"),
    (BANKS, 'wait = "72h"', 'wait = "three days"', "board.board.wait", "a duration"),
    (BANKS, 'wait = "72h"', 'wait = "72 h"', "board.board.wait", "no space"),
    (BANKS, "need = 3", "need = 0", "board.board.need", "at least 1"),
    (BANKS, "workers = 4", "workers = 4097", "phase.train.workers", "at most 4096"),
    (BANKS, 'scheme = "ckks-128"', 'scheme = "ckks"', "place.cipher.scheme", "did you mean 'ckks-128'?"),
    (BANKS, "decimals = 2", "decimals = 18", "phase.serve.answer.decimals", "at most 17"),
    (BANKS, '"owner", "sandbox", "phase"]', '"owner", "sandbx"]', "change.successor.same.1", "did you mean 'sandbox'?"),
    (ACME, 'pad = "1 KiB"', 'pad = "1KiB"', "phase.serve.answer.pad", "a size"),
    (ACME, 'pad = "1 KiB"', 'pad = "0 B"', "phase.serve.answer.pad", "a size"),
    (ACME, 'pad = "1 KiB"', 'pad = "9999999 TiB"', "phase.serve.answer.pad", "8192 TiB"),
    (ACME, 'every = "50ms"', 'every = "0ms"', "phase.serve.answer.every", "above zero"),
    (ACME, 'every = "50ms"', 'every = "9999999h"', "phase.serve.answer.every", "3660d"),
    (ACME, "secret = true", 'secret = "yes"', "code.automl.secret", "true or false"),
    (ACME, "[data]\nrecords =", "[data]\nrecords = 1\nx =", "data.records", "a table"),
    # what a TEE place may demand
    (XRAY, TCB, 'tcb = ["Revoked"]', "place.enclave.tcb.0", "OutOfDate"),
    (XRAY, TCB, 'tcb = ["UpTodate"]', "place.enclave.tcb.0", "did you mean 'UpToDate'?"),
    (XRAY, TCB, "tcb = []", "place.enclave.tcb", "at least one entry"),
    (XRAY, TCB, 'max_tcb_age = "180"', "place.enclave.max_tcb_age", "a number of days"),
    (XRAY, TCB, 'max_tcb_age = "72h"', "place.enclave.max_tcb_age", "a number of days"),
    (XRAY, TCB, 'max_tcb_age = "0d"', "place.enclave.max_tcb_age", "a number of days"),
    (XRAY, TCB, 'deny_advisories = ["intel-sa-1"]', "place.enclave.deny_advisories.0", "an advisory"),
    (XRAY, TCB, 'deny_advisories = ["AMD-SB-3019"]', "place.enclave.deny_advisories.0", "other vendors' evidence names none"),
    (XRAY, TCB, "min_svn = { sevsnp = { snp = 22 } }", "place.enclave.min_svn.sevsnp", "did you mean 'sev-snp'?"),
    (XRAY, TCB, "min_svn = { nitro = { x = 22 } }", "place.enclave.min_svn.nitro", "a type that this place accepts"),
    (XRAY, TCB, "min_svn = { nvidia-gpu = { x = 1 } }", "place.enclave.min_svn.nvidia-gpu", "a type that this place accepts"),
    (XRAY, TCB, "min_svn = { sev-snp = { snp = true } }", "place.enclave.min_svn.sev-snp.snp", "a whole number"),
    (XRAY, TCB, "min_svn = { sev-snp = { snp = -1 } }", "place.enclave.min_svn.sev-snp.snp", "at least 0"),
    (XRAY, TCB, "min_svn = { sev-snp = { SNP = 1 } }", "place.enclave.min_svn.sev-snp.SNP", "a name as the evidence has it"),
    (XRAY, TCB, "min_svn = {}", "place.enclave.min_svn", "at least one entry"),
    (XRAY, TCB, "min_svn = { tdx = {} }", "place.enclave.min_svn.tdx", "at least one entry"),
    (XRAY, TCB, "require = { sev-snp = { smt = 0 } }", "place.enclave.require.sev-snp.smt", "true or false"),
    (XRAY, TCB, "require = { snp = { smt = false } }", "place.enclave.require.snp", "did you mean 'sev-snp'?"),
    (XRAY, TCB, "platforms = {}", "place.enclave.platforms", "`allow`, `deny` or both"),
    (XRAY, TCB, 'platforms = { alow = ["fmspc:00806f050000"] }', "place.enclave.platforms.alow", "did you mean 'allow'?"),
    (XRAY, TCB, "platforms = { allow = [] }", "place.enclave.platforms.allow", "at least one entry"),
    (XRAY, TCB, 'platforms = { deny = ["pipd:aa"] }', "place.enclave.platforms.deny.0", "the id of a machine"),
    (XRAY, TCB, 'platforms = { deny = ["ppid:AB"] }', "place.enclave.platforms.deny.0", "the id of a machine"),
    (XRAY, TCB, f'platforms = {{ deny = ["ppid:{"A" * 32}"] }}', "place.enclave.platforms.deny.0", "the id of a machine"),
    (XRAY, TCB, f'platforms = {{ deny = ["ppid:{"a" * 31}"] }}', "place.enclave.platforms.deny.0", "the id of a machine"),
    (XRAY, TCB, 'platforms = { allow = ["ueid:aa"] }', "place.enclave.platforms.allow", "`gpus.allow`"),
    (XRAY, TCB, 'platforms = { allow = ["csp_id:a"], deny = ["csp_id:a"] }', "place.enclave.platforms.deny", "in `allow` too"),
    (XRAY, TCB, 'gpus = { allow = ["ueid:aa"] }', "place.enclave.gpus", 'gpu = "confidential" too'),
    (XRAY, TCB, 'gpu = "confidential", gpus = { allow = ["ppid:aa"] }', "place.enclave.gpus.allow.0", "the id of a GPU"),
    (XRAY, TCB, 'gpu = "confidential", gpus = { deny = ["ueid:aa"] }', "place.enclave.gpus.deny", "one of allow"),
    (XRAY, TCB, "software = []", "place.enclave.software", "an array of tables with at least one"),
    (XRAY, TCB, 'software = [{ label = "a" }]', "place.enclave.software.0", "it would be any software"),
    (XRAY, TCB, 'software = [{ label = "a", tee = "tdx" }]', "place.enclave.software.0", "it would be any software"),
    (XRAY, TCB, f"software = [{{ {MR} }}]", "place.enclave.software.0.label", "the key 'label'"),
    (XRAY, TCB, f'software = [{{ label = "A", {MR} }}]', "place.enclave.software.0.label", "a label"),
    (XRAY, TCB, f'software = [{{ label = "a", {MR} }}, {{ label = "a", {MR} }}]', "place.enclave.software.1.label", "of its own"),
    (XRAY, TCB, f'software = [{{ label = "a", tee = "nitro", {MR} }}]', "place.enclave.software.0.tee", "that this place accepts"),
    (XRAY, TCB, f'software = [{{ label = "a", tee = "tpm", {MR} }}]', "place.enclave.software.0.tee", '"sgx"'),
    (XRAY, TCB, 'software = [{ label = "a", measurments = { mrtd = ["aa"] } }]', "place.enclave.software.0.measurments", "'measurements'?"),
    (XRAY, TCB, 'software = [{ label = "a", measurements = { mrtd = [] } }]', "place.enclave.software.0.measurements.mrtd", "at least one"),
    (XRAY, TCB, 'software = [{ label = "a", measurements = { mrtd = "aa" } }]', "place.enclave.software.0.measurements.mrtd", "an array"),
    (XRAY, TCB, 'software = [{ label = "a", measurements = { mrtd = ["AA"] } }]', "place.enclave.software.0.measurements.mrtd.0", "lower-case hex"),
    (XRAY, TCB, 'software = [{ label = "a", measurements = { mrtd = ["abc"] } }]', "place.enclave.software.0.measurements.mrtd.0", "hex"),
    (XRAY, TCB, 'software = [{ label = "a", log = [{ index = 24, digests = ["aa"] }] }]', "place.enclave.software.0.log.0.index", "at most 23"),
    (XRAY, TCB, 'software = [{ label = "a", log = [{ index = 2 }] }]', "place.enclave.software.0.log.0.digests", "nothing"),
    (XRAY, TCB, 'software = [{ label = "a", log = [{ index = 2, digest = ["aa"] }] }]', "place.enclave.software.0.log.0.digest", "did you mean 'digests'?"),
    (XRAY, TCB, f'software = [{", ".join(f"{{ label = {chr(34)}a{n}{chr(34)}, {MR} }}" for n in range(33))}]', "place.enclave.software", "at most 32"),
    (XRAY, TCB, f'deny_advisories = [{", ".join(f"{chr(34)}SA-{n}{chr(34)}" for n in range(257))}]', "place.enclave.deny_advisories", "at most 256"),
    (XRAY, HOST, '"signed-by:vendor", platforms = {}', "place.gpu-host.platforms", "`allow`, `deny` or both"),
    (XRAY, HOST, '"signed-by:vendor", tcb = ["UpToDate"]', "place.gpu-host.tcb", "an unknown key"),
    # names
    (XRAY, 'owner = "hospital", digest', 'owner = "hospitl", digest', "data.xrays.owner", "did you mean 'hospital'?"),
    (XRAY, 'run   = "trainer"', 'run   = "trainr"', "phase.train.run", "did you mean 'trainer'?"),
    (XRAY, 'at    = "gpu-host"', 'at    = "gpuhost"', "phase.train.at", "did you mean 'gpu-host'?"),
    (XRAY, '"xrays", "backbone"', '"xray", "backbone"', "phase.train.read", "did you mean 'xrays'?"),
    (XRAY, '"xrays", "backbone"', '"xrays", "trainer"', "phase.train.read", "the code 'trainer'"),
    (XRAY, "detector = ", "server = ", "phase.train.write.server", "a code or a stream"),
    (XRAY, 'write = { detector = "hospital" }', 'write = { detector = "hospitl" }', "phase.train.write.detector", "hospital"),
    (XRAY, 'metrics_to = ["hospital"]', 'metrics_to = ["ward"]', "phase.train.metrics_to", "'ward'"),
    (XRAY, 'metrics_to = ["hospital"]', 'leaves = ["logs"]', "phase.train.leaves", "without `metrics_to`"),
    (XRAY, 'to = ["clinic"]', 'to = ["clinc"]', "phase.serve.answer.to", "did you mean 'clinic'?"),
    (XRAY, 'form = "label"', 'form = "label", decimals = 2', "phase.serve.answer.decimals", "form"),
    (XRAY, HOST, '"signed-by:vendr"', "place.gpu-host.files", "did you mean 'vendor'?"),
    (XRAY, 'default = ["hospital", "vendor"]', 'default = ["hospitl"]', "change.default", "did you mean 'hospital'?"),
    (XRAY, 'default = ["hospital", "vendor"]', 'default = "boad"', "change.default", "a board"),
    (BANKS, 'code    = "board"', 'code    = "bord"', "change.code", "did you mean 'board'?"),
    (BANKS, '["trainer", "refiner", "scorer"]', '["trainr"]', "change.successor.of", "did you mean 'trainer'?"),
    (BANKS, '["fraud-net", "north-new"] ', '["fraudnet"] ', "change.successor.keeps", "did you mean 'fraud-net'?"),
    (BANKS, 'north-new = { owner = "north" }', 'north-new = { owner = "nrth" }', "stream.north-new.owner", "'north'?"),
    (BANKS, 'refresh = "enclave"', 'refresh = "enclav"', "place.cipher.refresh", "did you mean 'enclave'?"),
    (BANKS, 'refresh = "enclave"', 'refresh = "cipher"', "place.cipher.refresh", "of kind he"),
    (BANKS, 'veto = ["north", "south"]', 'veto = ["nort"]', "board.board.veto", "did you mean 'north'?"),
    (BANKS, '"south", "vendor", "auditor"]', '"vendor", "auditor"]', "board.board.veto", "found 'south'"),
    (BANKS, "need = 3", "need = 5", "board.board.need", "4 members"),
    (BANKS, "fraud-net = \"board\" }         #", 'north-new = "north" }         #', "phase.train.write.north-new", "stream"),
    (ACME, 'size    = { model = "64 MiB" }', 'size = { modl = "64 MiB" }', "phase.train.size.modl", "did you mean 'model'?"),
    (ACME, 'write   = { model = "nobody" }', 'write   = { metrics = "nobody" }', "phase.train.write.metrics", "reserved"),
    # reserved words, one name for one thing, one key for one party
    (XRAY, "clinic   =", "nobody   =", "party.nobody", "the reserved word"),
    (XRAY, "clinic   =", "board    =", "party.board", "the reserved word"),
    (BANKS, "board = { members", "nobody = { members", "board.nobody", "the reserved word"),
    (BANKS, "board = { members", "vendor = { members", "board.vendor", "also a party"),
    (XRAY, "backbone = {", "trainer = {", "data.trainer", "also a code"),
    (BANKS, "north-new = {", "north-tx = {", "stream.north-tx", "also a data"),
    (XRAY, "SHA256:Yx2tqk1fJwIzOMXc6WkC4oT6Sy9vEpuvDkkkXHSKnQk", KEY1, "party.clinic", "the key of 'hospital'"),
    (XRAY, "Yx2tqk1fJwIzOMXc6WkC4oT6Sy9vEpuvDkkkXHSKnQk", KEY1[7:-1] + "J", "party.clinic", "the key of 'hospital'"),
    # ownership of what is written
    (XRAY, "detector = ", "xrays = ", None, None),
    (XRAY, 'detector = "hospital"', 'xrays = "vendor"', "phase.train.write.xrays", "owner 'hospital', as in data.xrays"),
    (BANKS, 'write = { fraud-net = "board" }\n', 'write = { fraud-net = "vendor" }\n', "phase.refine.write.fraud-net", "phase.train"),
    # sealed
    (ACME, 'sandbox = "sealed"', 'sandbox = "offline"', "code.automl.sandbox", "the code is secret"),
    (ACME, 'size    = { model = "64 MiB" }', "", "phase.train.size.model", "a fixed size"),
    (ACME, 'traffic = "fixed-rate"', 'metrics_to = ["acme"]', "phase.train.metrics_to", "metrics of sealed code"),
    # versions
    (BANKS, "version  = 4", "version  = 1", "replaces", "nothing in version 1"),
    (XRAY, "version  = 1", "version  = 2", "replaces", "the digest of version 1"),
    # text
    (XRAY, "trainer = {", "tra\\u0069ner = {", "text", "a backslash"),
    (XRAY, 'contract = "pneumonia-xray"', 'contract = "pneumoni\u0430-xray"', "text", "CYRILLIC SMALL LETTER A"),
    (XRAY, "# fast:", "# \u202e fast:", "text", "RIGHT-TO-LEFT OVERRIDE"),
    (XRAY, "# fast:", "# \u200b fast:", "text", "ZERO WIDTH SPACE"),
    (XRAY, "# fast:", "# \ufeff fast:", "text", "ZERO WIDTH NO-BREAK SPACE"),
    (XRAY, "# fast:", "# \u2028 fast:", "text", "LINE SEPARATOR"),
    (XRAY, "# fast:", "# \x1b[8m fast:", "text", "U+001B"),
    (XRAY, "version  = 1\n", "version  = 1\r\n", "text", "carriage return"),
    # TOML
    (XRAY, "version  = 1\n", "version  = 1\nversion = 1\n", "toml", "Cannot overwrite"),
    (XRAY, "[phase.serve] ", "[phase.train] ", "toml", "Cannot declare"),
    (XRAY, "version  = 1\n", "version  = \n", "toml", "Invalid value"),
    (XRAY, "version  = 1\n", f"version  = {'[' * 9000}\n", "toml", "nested too deeply"),
    (XRAY, "version  = 1\n", f"version  = {'9' * 5000}\n", "toml", "limit"),
    (XRAY, "version  = 1\n", f"version  = 1\n{'a.' * 30_000}a = 1\n", "toml", "nested at most five deep"),
    (XRAY, "version  = 1\n", f"version  = 1\n{'a.' * 60}a = 1\n", "a", "an unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "path", "words"), FAULTS)
def test_one_fault_is_found_where_it_is(name: str, old: str, new: str, path: str | None, words: str | None) -> None:
    data = edited(name, (old, new))
    if path is None:  # the control: overwriting data for its own owner is no fault of the write table
        found = findings(data)
        assert {finding.where for finding in found} == {"phase.serve.read"}
        return
    found = findings(data)
    match = [finding for finding in found if finding.where == path]
    assert match, f"no finding at {path}: {[str(each) for each in found]}"
    assert words is not None
    assert any(words in str(finding) for finding in match), [str(finding) for finding in match]


def test_line_numbers_point_at_the_key() -> None:
    data = edited(XRAY, ('sandbox = "one-shot"', 'sandbox = "oneshot"'), ("per_day = 2_000", "per_day = 0"))
    lines = data.decode().split("\n")
    by_path = {finding.where: finding.line for finding in findings(data)}
    assert lines[by_path["code.server.sandbox"] - 1].startswith("server  =")
    assert lines[by_path["phase.serve.answer.per_day"] - 1].startswith("answer =")


def test_all_mistakes_are_reported_together_in_the_order_of_lines() -> None:
    data = edited(
        BANKS,
        ('wait = "72h"', 'wait = "soon"'),
        ("workers = 4", "wrkers = 4"),
        ('code    = "board"', 'code    = "bord"'),
        ("# no single bank can open it", "# \u200e"),
    )
    found = findings(data)
    assert {finding.where for finding in found} == {"board.board.wait", "phase.train.wrkers", "change.code", "text"}
    assert [finding.line for finding in found] == sorted(finding.line for finding in found)
    assert all(finding.line for finding in found)


def test_an_entry_of_bad_form_still_counts_as_declared() -> None:
    assert (
        len(findings(edited(XRAY, ('owner = "hospital", digest', 'ownr = "hospital", digest')))) == 2
    )  # and the missing owner


@pytest.mark.parametrize("empty", [b"", b"# only a comment\n"])
def test_an_empty_file_misses_everything(empty: bytes) -> None:
    paths = {finding.where for finding in findings(empty)}
    assert paths == {"contract", "version", "expires", "party", "code", "place", "phase", "change"}


def test_other_sizes_and_encodings_are_refused() -> None:
    padded = source(XRAY).encode() + b"#" * MAX_BYTES
    assert findings(padded)[0].where == "file"
    assert findings(source(XRAY).encode("utf-16"))[0].where == "text"
    assert findings(b"\xef\xbb\xbf" + source(XRAY).encode())[0].found.startswith("U+FEFF")
    exact = source(XRAY).encode()
    exact += b"\n" + b"#" * (MAX_BYTES - len(exact) - 1)
    assert len(exact) == MAX_BYTES
    parse(exact, name="exact.toml")


def test_comments_may_be_in_any_language() -> None:
    contract = changed(XRAY, ("# fast:", "# schnell, größer; быстро; 快: "))
    assert contract.phase.keys() == example(XRAY).phase.keys()


def test_a_list_of_files_may_be_named_by_its_digest() -> None:
    place = changed(XRAY, (HOST, f'"{DIGEST}"')).place["gpu-host"]
    assert isinstance(place, HostPlace)
    assert str(place.files) == DIGEST


def test_findings_are_capped_and_short() -> None:
    text = "\n".join(f'{"k" * 200}{n} = "{"v" * 50}"' for n in range(200))
    found = findings(text.encode())
    assert len(found) == 100
    assert max(len(str(finding)) for finding in found) < 400


def test_a_hostile_file_costs_less_than_a_second() -> None:
    names = ", ".join(f'"r{n}"' for n in range(3000))
    codes = "\n".join(f'c{n} = {{ owner = "x" }}' for n in range(1000))
    hostile = f'[phase.train]\nrun = "a"\nat = "b"\nread = [{names}]\n[code]\n{codes}'
    dotted = f"[{'a.' * 30_000}a]"
    started = time.process_time()
    assert len(findings(hostile.encode())) == 100
    assert findings(dotted.encode())[0].where == "toml"
    assert time.process_time() - started < 1


def test_as_json_carries_the_line() -> None:
    assert findings(edited(XRAY, ("version  = 1", "version = 0")))[0].as_json() == {
        "where": "version",
        "found": "0",
        "wanted": "at least 1",
        "hint": "",
        "line": 3,
    }


def parses_or_refuses(data: bytes) -> None:
    refusal = None
    try:
        contract = parse(data, name="fuzz.toml")
    except InputError as error:
        refusal = error
    if refusal is None:
        assert contract.signers <= contract.party.keys()
    else:
        assert refusal.code == "contract-invalid"
        assert refusal.reasons
        assert all(str(reason).isprintable() for reason in refusal.reasons)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_contract_or_an_input_error(data: bytes) -> None:
    parses_or_refuses(data)


SCALARS = st.sampled_from(
    [
        '"x"',
        '"nobody"',
        '"tee"',
        "1",
        "-1",
        "true",
        "1.5",
        "nan",
        "2027-01-01",
        "12:00:00",
        "[]",
        "[[]]",
        "[{}]",
        "{}",
        '""',
    ]
)
KEYS = st.sampled_from(
    ["owner", "kind", "read", "write", "x", '"é"', '""', "a.b", "to", "need", "default", "keeps", "refresh", "1"]
)
INLINE = st.lists(st.tuples(KEYS, SCALARS), max_size=4).map(
    lambda pairs: "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }"
)
LINES = st.one_of(
    st.sampled_from([line for name in NAMES for line in source(name).split("\n")]),
    st.tuples(KEYS, SCALARS | INLINE).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.sampled_from(
        [
            "party",
            "code",
            "data",
            "stream",
            "place",
            "phase",
            "phase.train",
            "board",
            "change",
            "change.successor",
            '"x.y"',
        ]
    ).map(lambda table: f"[{table}]"),
)


@given(st.lists(LINES, max_size=30).map("\n".join))
def test_any_lines_are_a_contract_or_an_input_error(text: str) -> None:
    parses_or_refuses(text.encode())


@given(st.sampled_from(NAMES), st.data())
def test_one_changed_value_never_ends_in_a_traceback(name: str, data: st.DataObject) -> None:
    lines = source(name).split("\n")
    at = data.draw(st.integers(0, len(lines) - 1))
    key, equals, _ = lines[at].partition("=")
    lines[at] = f"{key}= {data.draw(SCALARS | INLINE)}" if equals else data.draw(LINES)
    parses_or_refuses("\n".join(lines).encode())


@given(st.sampled_from(NAMES), st.data())
def test_one_flipped_bit_gives_another_id_or_a_refusal(name: str, data: st.DataObject) -> None:
    original = source(name).encode()
    at = data.draw(st.integers(0, len(original) * 8 - 1))
    flipped = bytearray(original)
    flipped[at // 8] ^= 1 << at % 8
    try:
        contract = parse(bytes(flipped), name="flipped.toml")
    except InputError:
        return
    assert contract.id != example(name).id
