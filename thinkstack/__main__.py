"""python -m thinkstack: the command line without an installed script."""

from thinkstack.cli import main

main()
