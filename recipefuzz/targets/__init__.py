"""Targets: what is trained, by our engines or by itself."""
