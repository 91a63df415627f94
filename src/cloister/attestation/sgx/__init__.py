"""Intel SGX: quotes v3 of enclaves, judged as one kind of evidence. What it shares with TDX is in `dcap`."""
