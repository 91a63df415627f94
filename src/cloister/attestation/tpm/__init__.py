"""TPM 2.0: quotes, attestation keys and how they are enrolled, measured boot and IMA."""
