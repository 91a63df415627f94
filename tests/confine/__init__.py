"""The jail: pure compilers against small interpreters of their output, and hostile programs against the real thing."""
