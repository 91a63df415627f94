"""`./run bench` lists the benchmarks, `./run bench NAME [--json]` runs one, `./run bench NAME --help` explains it."""

from __future__ import annotations

import importlib
import sys

from bench import common


def main(argv: list[str]) -> int:
    known = common.modules()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, known))
        print("benchmarks: ./run bench NAME [--json]\n")
        for name, about in known.items():
            print(f"  {name.ljust(width)}  {about}")
        return 0
    if argv[0] not in known:
        print(f"error: no benchmark '{argv[0]}'\nhint: there are {', '.join(known)}", file=sys.stderr)
        return 2
    return common.main(importlib.import_module(f"bench.{argv[0]}"), argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
