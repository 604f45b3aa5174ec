"""Lets `python -m fastlstm` do what the command `fastlstm` does."""

from fastlstm.cli import main

main()
