"""The audit log: what is in it, how it is proven, who watches it. Pure: no file, socket, clock, randomness."""
