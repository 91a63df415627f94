"""`python -m cloister` is the command `cloister`."""

from cloister.cli import entry

entry()
