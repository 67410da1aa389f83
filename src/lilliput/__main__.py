"""`python -m lilliput` is the command `lilliput`."""

from lilliput.cli.main import run

run()
