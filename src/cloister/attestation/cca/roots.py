"""What Arm CCA evidence may end at: platform keys (CPAK), pinned by SHA-256 of the DER SubjectPublicKeyInfo. Experimental.

Arm publishes no root, so no vendor pin is here: which platform keys are genuine is known to the relying party only, and it
says so in `Roots.also["cca"]`. Keys whose private half is public are listed as soft, and stay soft whoever else lists them.
"""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

ARM_TEST_CPAK: Final = "0928f896cb02326566530a62a1e36329a12d0a4a308f4fc81e8ff5560bca6bca"
"""P-384 key of Arm's emulators (FVP, QEMU): its private key is in the sources of Trusted Firmware-M."""

SOFT_CPAK: Final = "8ab6df83c8029c6c914fa1d29a912c2b2288dea3f7ef63591c15dfbf98b53500"
"""P-384 key of `soft.cca.platform`: its private key is derived from a published label."""

PINS: Final = Pins(vendor=frozenset(), soft=frozenset({ARM_TEST_CPAK, SOFT_CPAK}))
