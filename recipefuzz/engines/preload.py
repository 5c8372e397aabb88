"""Imported by the process that workers are forked from, before it forks any."""

from recipefuzz.garbage import imports_kept

with imports_kept():
    import recipefuzz.engines.worker  # noqa: F401 - to have it imported is all
