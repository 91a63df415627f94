"""The edge of attestation: devices, files, randomness. Everything that judges lives one level up and is pure."""
