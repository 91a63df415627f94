"""Who may use what, with which code, where, and who sees the results?

A contract is a TOML file that its owners sign. `parse` turns its bytes into a frozen `Contract` or reports everything
that is wrong; `decide` answers one request under it; `analyse` says who could read and who could change what; `change`
compares versions and counts votes; `sshsig` checks signatures. All of these are pure. `edge` signs.

The language: docs/contract.md. Signatures: docs/identity.md.
"""

from cloister.contract.decide import Decision, Request, State, compile_place, decide
from cloister.contract.model import Contract
from cloister.contract.parse import parse

__all__ = ["Contract", "Decision", "Request", "State", "compile_place", "decide", "parse", "required_signers"]


def required_signers(contract: Contract) -> frozenset[str]:
    """Return the parties who must sign: owners of data, code, streams and written assets; boards stand for their members."""
    return contract.signers
