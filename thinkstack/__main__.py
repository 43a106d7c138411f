"""Entry point of python -m thinkstack."""

from thinkstack.cli import main

main()
