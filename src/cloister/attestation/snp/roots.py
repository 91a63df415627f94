"""Root certificates of SEV-SNP evidence, pinned by SHA-256 of the DER certificate.

AMD has one root per product line; Bergamo and Siena are endorsed under Genoa's. VCEK and VLEK chains of a line end in the
same root. As everywhere, the certificates themselves are not kept here.
"""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

ARK_MILAN: Final = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"
"""CN=ARK-Milan, valid 2020-10-22 to 2045-10-22; published at kdsintf.amd.com/vcek/v1/Milan/cert_chain."""
ARK_GENOA: Final = "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"
"""CN=ARK-Genoa, valid 2022-01-26 to 2047-01-26; kdsintf.amd.com/vcek/v1/Genoa/cert_chain."""
ARK_TURIN: Final = "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"
"""CN=ARK-Turin, valid 2023-05-15 to 2048-05-15; kdsintf.amd.com/vcek/v1/Turin/cert_chain."""

SOFT_MILAN: Final = "8d83159ee22e34334488d853137ed3ac96dcc9d884800339319aa251cbc62757"
SOFT_GENOA: Final = "13b9a3adea1d1f42256d7600f4431224c6bc220d4d373acb11ba961144ad40f7"
SOFT_TURIN: Final = "fb0c4aecb05cc149d93d9886fcf741efe64eb059415ce45de70ad75bceb28e0d"
"""O=Cloister SOFT - protects nothing: made by `soft.snp.authority`, their private keys are public."""

PINS: Final = Pins(
    vendor=frozenset({ARK_MILAN, ARK_GENOA, ARK_TURIN}), soft=frozenset({SOFT_MILAN, SOFT_GENOA, SOFT_TURIN})
)
