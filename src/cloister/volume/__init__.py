"""Data at rest: sealed, fresh, mountable, fast. The format is `docs/format/volume-v1.md`, the promises `docs/volumes.md`.

types     what a reader sees: tree and linear space        (pure)
layout    arithmetic of chunks, records, segments, padding (pure)
format    bytes <-> head and manifest, strict              (pure)
keys      every key of a volume and what it is for         (pure)
seal      a folder becomes a volume                        (edge)
read      open, read, verify, extract a volume             (edge)
output    one writer at a time publishes a new generation  (edge)
fuse      a volume becomes a mounted folder                (edge)
"""
