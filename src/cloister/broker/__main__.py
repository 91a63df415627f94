"""`python -m cloister.broker`: a broker in this process. `cloister up` is the friendlier door to the same `serve`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cloister.broker.client import root_pins
from cloister.broker.main import Config, serve
from cloister.errors import CloisterError


def main(arguments: list[str] | None = None) -> int:
    """Run a broker until a signal stops it; return the exit status of docs/errors.md."""
    parser = argparse.ArgumentParser(prog="python -m cloister.broker", description=__doc__)
    parser.add_argument("state", type=Path, help="folder with the broker's state; made if it does not exist")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; broker.json in the folder says which")
    parser.add_argument("--attester", default="auto", help="auto, tdx, or soft-tdx (protects nothing)")
    parser.add_argument("--allow-soft", action="store_true", help="admit nodes in soft TEEs, which protect nothing")
    parser.add_argument(
        "--node", action="append", default=None, metavar="HEX", help="accepted launch measurement of nodes"
    )
    parser.add_argument("--origin", default=Config().origin, help="name of the log")
    parser.add_argument("--lease", type=int, default=Config().lease_s, metavar="SECONDS")
    parser.add_argument("--collateral", type=Path, action="append", default=[], help="file with vendor collateral")
    parser.add_argument("--kbs", action="store_true", help="also serve clients of Trustee's KBS protocol (docs/kbs.md)")
    parser.add_argument(
        "--root", action="append", default=[], metavar="KIND=FILE", help="further root certificate to believe"
    )
    given = parser.parse_args(arguments)
    try:
        nodes = None if given.node is None else frozenset(bytes.fromhex(text) for text in given.node)
    except ValueError:
        parser.error("--node wants hex digits")
    try:
        roots = root_pins((kind, name) for kind, _, name in (text.partition("=") for text in given.root))
    except CloisterError as error:
        sys.stderr.write(json.dumps(error.as_json()) + "\n")
        return error.exit_status
    config = Config(
        origin=given.origin,
        attester=given.attester,
        node_measurements=nodes,
        allow_soft=given.allow_soft,
        lease_s=given.lease,
        collateral=tuple(given.collateral),
        roots=roots,
        kbs=given.kbs,
    )
    try:
        serve(given.state, given.host, given.port, config)
    except CloisterError as error:
        sys.stderr.write(json.dumps(error.as_json()) + "\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
