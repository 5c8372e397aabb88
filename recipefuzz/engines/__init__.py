"""Engines: how tasks are trained."""
