"""Where and why a training goes wrong, and a fix that was really run."""
