"""What RECORD, .pth, direct_url.json and _sysconfigdata mean: vectors with one fault each."""

from __future__ import annotations

import ast
import hashlib

import pytest

from cloister.node.workload.form import FIRST_PACKAGE, UNOWNED, Kind, Row
from cloister.node.workload.packages import (
    attribute,
    direct_url_reasons,
    generated,
    is_note,
    parse_record,
    pth_reasons,
    record_text,
    split_dist_info,
    sysconfig_text,
)
from tests.node.workload.world import record_hash

SITE = "/runtime/venv/lib/python3.11/site-packages"
ONE, TWO = hashlib.sha256(b"one").digest(), hashlib.sha256(b"two").digest()


def row(path: str, digest: bytes = ONE) -> Row:
    return Row(f"{SITE}/{path}", Kind.FILE, 3, digest)


def test_record_claims_what_is_measured_and_nothing_else() -> None:
    text = "\n".join(
        [
            f"a/__init__.py,sha256={record_hash(b'one')},3",
            "a/nohash.py,,",
            '"a/with, comma.py",,',
            "a/short.py,sha256=AAAA,3",
            "a/md5.py,md5=abc,3",
            "a/__pycache__/x.cpython-311.pyc,,",
            f"../../../bin/a,sha256={record_hash(b'two')},9",
            "../../../share/man/a.1,,",
            "../../../../outside.py,,",
            "/etc/passwd,,",
            "A-1.0.dist-info/RECORD,,",
            "A-1.0.dist-info/METADATA,,",
            "",
        ]
    )
    record = parse_record(text, "My_Pkg.x-1.0.dist-info", SITE)
    assert (record.name, record.version) == ("my-pkg-x", "1.0")
    assert record.files == {
        f"{SITE}/a/__init__.py": ONE,
        f"{SITE}/a/nohash.py": None,
        f"{SITE}/a/with, comma.py": None,
        f"{SITE}/a/short.py": None,
        f"{SITE}/a/md5.py": None,
        "/runtime/venv/share/man/a.1": None,
        f"{SITE}/A-1.0.dist-info/METADATA": None,
    }


@pytest.mark.parametrize("name", ["numpy-2.1.0.egg-info", "numpy.dist-info", "x/numpy-1.dist-info"])
def test_other_folders_are_no_dist_info(name: str) -> None:
    assert split_dist_info(name) is None


def test_notes_of_a_vendored_package_are_content() -> None:
    assert is_note(f"{SITE}/a-1.dist-info/INSTALLER", SITE)
    assert not is_note(f"{SITE}/a/_vendor/b-1.dist-info/INSTALLER", SITE)
    assert not is_note(f"{SITE}/a-1.dist-info/METADATA", SITE)


def test_shared_file_belongs_to_the_first_by_name_and_is_modified_only_if_no_claim_holds() -> None:
    records = [
        parse_record(
            f"ns/__init__.py,sha256={record_hash(b'one')},3\nb.py,sha256={record_hash(b'two')},3", "b-1.dist-info", SITE
        ),
        parse_record(f"ns/__init__.py,sha256={record_hash(b'two')},3\ngone.py,,", "a-1.dist-info", SITE),
    ]
    rows, names, absent = attribute([row("ns/__init__.py"), row("b.py"), row("free.py")], records)
    assert names == (("a", "1"), ("b", "1"))
    assert [(found.path.removeprefix(SITE + "/"), found.owner, found.modified) for found in rows] == [
        ("ns/__init__.py", FIRST_PACKAGE, False),
        ("b.py", FIRST_PACKAGE + 1, True),
        ("free.py", UNOWNED, False),
    ]
    assert absent == (f"{SITE}/gone.py",)


def test_generated_record_is_a_function_of_the_rows_alone() -> None:
    rows = [
        Row(f"{SITE}/b.py", Kind.FILE, 3, TWO, FIRST_PACKAGE),
        Row(f"{SITE}/a,b.py", Kind.FILE, 3, ONE, FIRST_PACKAGE),
    ]
    first = generated("3.11.7", (("p", "1"),), rows, ["p-1.dist-info"])
    content, owner = first[f"{SITE}/p-1.dist-info/RECORD"]
    expected = f'"a,b.py",sha256={record_hash(b"one")},3\nb.py,sha256={record_hash(b"two")},3\np-1.dist-info/RECORD,,\n'
    assert (content.decode(), owner) == (expected, FIRST_PACKAGE)
    # With the generated row among the rows, as a reader of a workload has them, the text is the same.
    again = Row(f"{SITE}/p-1.dist-info/RECORD", Kind.FILE, len(content), ONE, FIRST_PACKAGE)
    assert generated("3.11.7", (("p", "1"),), [*rows[::-1], again], ["p-1.dist-info"]) == first


def test_generated_record_reads_back() -> None:
    rows = [row("a.py"), row('odd "name",x.py', TWO)]
    record = parse_record(record_text("p-1.dist-info", rows, SITE).decode(), "p-1.dist-info", SITE)
    assert record.files == {rows[0].path: ONE, rows[1].path: TWO}


@pytest.mark.parametrize("line", ["/home/me/project/src", "../../../src", "sub/../../x", ".."])
def test_pth_line_that_leads_out_is_refused(line: str) -> None:
    reasons = pth_reasons("x.pth", f"# comment\nimport os; os.x\n{line}\n", SITE)
    assert [reason.where for reason in reasons] == ["x.pth"]
    assert line in reasons[0].found
    assert "without -e" in reasons[0].hint


def test_pth_lines_inside_and_imports_are_measured_code() -> None:
    assert pth_reasons("x.pth", "import _distutils_hack\n\n# x\nsub\n./other\n", SITE) == []


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (b'{"url": "file:///src", "dir_info": {"editable": true}}', True),
        (b'{"url": "file:///src", "dir_info": {"editable": false}}', False),
        (b'{"url": "https://example.org/a.whl", "archive_info": {}}', False),
        (b"[]", False),
        (b"not json", True),
    ],
)
def test_editable_installs(content: bytes, refused: bool) -> None:
    assert bool(direct_url_reasons("direct_url.json", content)) is refused


def sysconfig(prefix: str) -> bytes:
    return f"# comment\nbuild_time_vars = {{'B': '{prefix}/bin',\n 'A': 'cc -L{prefix}/lib '\n    '-O2',\n 'N': 3}}\n".encode()


def test_sysconfig_of_two_homes_is_one() -> None:
    short, long = "/opt/py", "/home/somebody/.local/share/interpreters/cpython-3.11"
    text = sysconfig_text(sysconfig(short), [short])
    assert text == sysconfig_text(sysconfig(long), [long])
    namespace = ast.literal_eval(text.decode().partition(" = ")[2])
    assert namespace == {"A": "cc -L/runtime/python/lib -O2", "B": "/runtime/python/bin", "N": 3}


@pytest.mark.parametrize(
    "content",
    [
        b"import os\n",
        b"build_time_vars = dict(a=1)\n",
        b"x = {}\n",
        b"build_time_vars = {1: 2}\n",
        b"a b\n",
        b"\x00",
        b"build_time_vars = {}\nimport os\n",
    ],
)
def test_sysconfig_of_another_shape_stays_as_it_is(content: bytes) -> None:
    assert sysconfig_text(content, ["/opt/py"]) == content
