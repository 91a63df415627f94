"""A jail for programs that are untrusted or merely unmodified.

profile.py   what a jail allows                       pure
job.py       what to run in it                        pure
seccomp.py   profile -> BPF program                   pure
landlock.py  profile + layout -> Landlock rules       pure
shim.py      the last steps before the job -> ELF     pure
bubble.py    job + profile -> bubblewrap arguments    pure
probe.py     what this machine can do                 edge
launch.py    start, watch, kill, read outputs         edge
holder.py    the trusted parent of one jail           edge, a process of its own
"""
