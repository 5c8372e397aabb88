"""Reports: tables, and what the terminal shows."""
