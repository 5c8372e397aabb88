"""Why something can't be trained in lanes."""


class NotFusableError(Exception):
    """What of the user's target it is, in words for them."""
