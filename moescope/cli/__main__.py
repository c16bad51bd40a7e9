"""`python -m moescope.cli` is the `moescope` command."""

from moescope.cli import main

main()
