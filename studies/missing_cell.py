from pathlib import Path

import numpy as np


def load():
    """Hours of sun and rain (mm) of a day, and what a solar roof gave (kWh)."""
    table = np.genfromtxt(Path(__file__).with_suffix(".csv"), delimiter=",", skip_header=1, dtype=np.float32)
    x, y = table[:, :2], table[:, 2:]
    return x[:40], y[:40], x[40:], y[40:]
