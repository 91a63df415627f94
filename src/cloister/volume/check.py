"""Edge: check the stored bytes of a volume without any key: for whoever hosts, copies or backs up what others own.

Steps; an error names the part that failed:
  1 head       4,096 bytes, strict, signed                                    format.decode_head
  2 manifest   length and SHA-256 are the head's; its end are the nodes of the segments
  3 sizes      every segment is there, a regular file, exactly as long as the head says
  4 name       the head's digest is the one the caller wants; if not, the volume is *stale*
  5 records    the leaves of each segment give its node, and each record gives its leaf (all findings together)
Steps 1 to 3 and 5 fail with `volume-tampered`, step 4 with `volume-stale`.

With the right name, all of this binds every stored byte but the wraps, so a passed check means: whoever has the key gets what was
sealed. It does not open the volume, so it cannot tell whether a wrap still opens (they lie outside the name), nor whether the sealed
tree is a valid one. Without a name it tells only that the parts fit each other. A volume without leaves cannot be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloister.errors import InputError, Reason, TamperedError
from cloister.volume import format as fmt
from cloister.volume import layout
from cloister.volume.stored import MAX_REASONS, RUN, Leaves, Stored
from cloister.volume.types import CHUNK


def check(path: Path, *, expect: str | None, progress: Callable[[int, int], None] | None = None) -> fmt.Head:
    """Compare every stored byte of the volume at `path` with its name; the head, of which the name is `digest`.

    `expect` is the name that a contract, the broker or the owner gives; None takes whatever is there, which finds accidents
    but not an exchange of the whole volume. `progress` is called with (bytes of the linear space done, bytes in all).

    Raises:
        InputError: there is no volume at `path`, or it was sealed without leaves.
        TamperedError: code `volume-tampered`, with all broken records (the first hundred), or `volume-stale`.
        MachineError: the disk does not answer.
    """
    with Stored(path) as files:
        head = files.head()
        nodes = files.manifest(head)[head.manifest_len - head.layout.nodes_len :]
        files.open_segments(head.layout)
        if expect is not None and head.digest != expect:
            raise files.not_registered(head, expect)
        if head.suite != fmt.SUITE_LEAVES:
            raise InputError(
                f"{path} was sealed without leaves: without its key nobody can check it",
                hint="let a holder of the key verify it, or seal it with leaves",
            )
        findings = _records(files, head.layout, nodes, progress)
        if findings:
            raise files.broken(findings)
        return head


def _records(
    files: Stored, geometry: layout.Layout, nodes: bytes, progress: Callable[[int, int], None] | None
) -> list[Reason]:
    """Step 5: what is wrong with the records, at most about `MAX_REASONS` of them."""
    leaves, findings = Leaves(files, geometry, nodes), []
    for first, records in files.runs(geometry, memoryview(bytearray(RUN * layout.RECORD))):
        for record, sealed in enumerate(records, first):
            try:
                if not leaves.fits(record, sealed):
                    findings.append(Reason(layout.record_name(record), "does not match its leaf", "the sealed bytes"))
            except TamperedError as error:
                findings += error.reasons
        if len(findings) >= MAX_REASONS:
            break
        if progress:
            progress((first + len(records)) * CHUNK, geometry.data_len)
    return findings
