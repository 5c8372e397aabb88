"""`python -m recipefuzz`."""

from recipefuzz.cli import main

main()
