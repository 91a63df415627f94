"""Root certificates of NVIDIA devices and of NVIDIA's reference manifests, pinned by SHA-256 of the DER certificate.

Two hierarchies: device keys and manifest signers. A manifest root never vouches for a device, nor the other way round.
A relying party that believes a further root names it in `Roots.also`, under `nvidia-gpu`, `nvidia-switch` or `nvidia-rim`.
"""

from __future__ import annotations

from typing import Final

from cloister.attestation.roots import Pins

DEVICE_IDENTITY_CA: Final = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
"""CN=NVIDIA Device Identity CA, O=NVIDIA, valid 2021-11-05 to 9999-12-31; in NVIDIA's nvtrust and in every device chain."""
RIM_ROOT_CA: Final = "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"
"""CN=NVIDIA CoRIM signing Root CA, O=NVIDIA, valid 2023-03-16 to 2053-03-08; in NVIDIA's nvtrust and in every manifest."""

SOFT_DEVICE_ROOT: Final = "fd05520280d49ae632215e44b195ba5191cd3589f2143a0a6227267779858486"
"""CN=Cloister SOFT device root - protects nothing: made by `soft.nvidia.authority`, its private key is public."""
SOFT_RIM_ROOT: Final = "37ce0ecc64dfd93b4203e90ff402410c3577d0dfca2976712a05d05ea33b7c96"
"""CN=Cloister SOFT RIM root - protects nothing: made by `soft.nvidia.authority`, its private key is public."""

RIM_KIND: Final = "nvidia-rim"

PINS: Final = Pins(vendor=frozenset({DEVICE_IDENTITY_CA}), soft=frozenset({SOFT_DEVICE_ROOT}))
RIM_PINS: Final = Pins(vendor=frozenset({RIM_ROOT_CA}), soft=frozenset({SOFT_RIM_ROOT}))
