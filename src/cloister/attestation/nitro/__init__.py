"""AWS Nitro Enclaves: attestation documents of the NSM. *format* reads bytes, *verify* decides whether they are authentic."""
