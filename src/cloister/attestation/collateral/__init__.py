"""What vendors publish about their hardware, kept so that nobody can take it back.

`read` says what a vendor's file endorses, `marks` which of its numbers never go back, `snapshot` how it travels on a disk to
a machine without a network. Pure; the store and the fetchers are in `attestation.edge`. Nothing is believed because it
is here: verifiers check signatures and times at `now`.
"""
