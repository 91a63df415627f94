"""AMD SEV-SNP: attestation reports. *format* reads bytes, *verify* decides whether they are authentic, *roots* are data."""
