"""Attestation: evidence in, claims or refusals out. The second specification of the room."""
