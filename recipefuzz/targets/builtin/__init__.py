"""Data sets and models that can be named in a config without code of the user's own."""
