"""Where everything lies in a sealed volume: pure arithmetic, all values in bytes unless a name says otherwise.

Format: docs/format/volume-v1.md 2. Two spaces and their pictures::

    linear space (plaintext)     file, 4 KiB steps | file | ... | zeros up to data_len, a padded multiple of 64 KiB
    stored (one file a segment)  record 0 | record 1 | ... | record 1,023 | with leaves: leaf 0 | leaf 1 | ...
                                 record = 65,536 bytes of ciphertext + 16 bytes of tag; leaf = BLAKE3 of the record

    linear offset  ->  record = offset // 65,536  ->  segment = record // 1,024, place in it = record % 1,024

Padding is Padmé (Nikitin et al., PETS 2019, section 4): a count keeps only its topmost bits, so that a length tells
O(log log n) bits, for at most 12 % more space. It counts records of data, and records of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloister.volume.types import BLOCK, CHUNK

TAG: Final = 16
"""AES-GCM tag (NIST SP 800-38D)."""

RECORD: Final = CHUNK + TAG

LEAF: Final = 32
"""BLAKE3 of one record; also the size of a node, the digest of one segment's leaves."""

RECORDS_PER_SEGMENT: Final = 1024
"""64 MiB an object: one range request of an object store, 2^22 AES blocks per key (GCM's birthday bound: 2^-85)."""

HEAD: Final = 4096
"""The head fills one block, so that a re-wrap is one write."""

MAX_DATA: Final = 1 << 44
"""16 TiB: the most that EROFS can address with 4 KiB blocks."""

MAX_MANIFEST: Final = 1 << 32
"""4 GiB of stored manifest: about 80 million files; larger sets are several volumes."""


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of `BLOCK`: what a file of that size occupies in the linear space."""
    return -(-size // BLOCK) * BLOCK


def padme(count: int) -> int:
    """Smallest padded count >= `count`: Padmé keeps the top floor(log2(floor(log2 count))) + 2 bits or fewer."""
    if count < 2:
        return count
    exponent = count.bit_length() - 1
    zeros = exponent - exponent.bit_length()
    return count if zeros <= 0 else -(-count >> zeros) << zeros


def padded(size: int) -> int:
    """Length of a plaintext stream of `size` bytes once padded: a Padmé number of whole chunks; 0 stays 0."""
    return padme(-(-size // CHUNK)) * CHUNK


@dataclass(frozen=True, slots=True)
class Layout:
    """Geometry of one volume, from the padded length of its linear space and whether it carries leaves."""

    data_len: int
    leaves: bool

    def __post_init__(self) -> None:
        if self.data_len < 0 or self.data_len > MAX_DATA or self.data_len != padded(self.data_len):
            raise ValueError(f"{self.data_len} is no padded length of a linear space")

    @property
    def records(self) -> int:
        """Records of data in the whole volume."""
        return self.data_len // CHUNK

    @property
    def segments(self) -> int:
        """Files below `data/`."""
        return -(-self.records // RECORDS_PER_SEGMENT)

    def records_in(self, segment: int) -> int:
        """Records in one segment: 1,024, in the last segment perhaps fewer."""
        if not 0 <= segment < self.segments:
            raise ValueError(f"no segment {segment}, there are {self.segments}")
        return min(RECORDS_PER_SEGMENT, self.records - segment * RECORDS_PER_SEGMENT)

    def segment_size(self, segment: int) -> int:
        """Bytes of the file of one segment."""
        return self.records_in(segment) * (RECORD + (LEAF if self.leaves else 0))

    @property
    def nodes_len(self) -> int:
        """Bytes of the list of nodes that ends the file `manifest`."""
        return self.segments * LEAF if self.leaves else 0

    def manifest_len(self, plain_len: int) -> int:
        """Bytes of the file `manifest` for a manifest of `plain_len` bytes before padding."""
        return padded(plain_len) // CHUNK * RECORD + self.nodes_len

    def manifest_records(self, stored_len: int) -> int:
        """Records in a file `manifest` of `stored_len` bytes.

        Raises:
            ValueError: no writer makes a manifest of this length.
        """
        records, rest = divmod(stored_len - self.nodes_len, RECORD)
        if rest or records < 1 or padme(records) != records or stored_len > MAX_MANIFEST:
            raise ValueError(f"no manifest of this volume is {stored_len} bytes long")
        return records

    def stored_size(self, plain_manifest_len: int) -> int:
        """Bytes of all files of the volume together."""
        records = self.records * (RECORD + (LEAF if self.leaves else 0))
        return HEAD + self.manifest_len(plain_manifest_len) + records


def segment_name(segment: int) -> str:
    """File name of a segment below `data/`: eight decimal digits."""
    return f"{segment:08d}"


def record_name(record: int) -> str:
    """How findings name a record: its segment and its place in it."""
    segment, place = divmod(record, RECORDS_PER_SEGMENT)
    return f"data/{segment_name(segment)}.record {place}"
