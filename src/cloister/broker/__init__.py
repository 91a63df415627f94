"""The broker: keys, leases, budgets, freshness and the audit log; runs in a TEE that everybody attests."""
