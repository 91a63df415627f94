"""Where the workload room touches the machine: find, scan, hash, cache, stage."""
