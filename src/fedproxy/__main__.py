"""`python -m fedproxy`."""

from fedproxy.cli import main

main()
