"""Small, boring cryptography: canonical encodings, HPKE, key derivation, signatures, secrets in memory.

Nothing here decides anything. Primitives come from `cryptography`; this room fixes parameters, labels and
encodings once, so that no other room chooses its own.
"""
