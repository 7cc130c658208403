"""`python -m memretrofit` is the command `memretrofit`."""

from memretrofit.cli import main

main()
