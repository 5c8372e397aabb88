"""Values that are not finite in a user's data. Whether they do harm, only the model and the loss can tell."""

from __future__ import annotations

from dataclasses import dataclass

from recipefuzz.errors import InputError, Place

MOST_ROWS = 1000  # whose indices a finding names


@dataclass(frozen=True)
class NonFinite:
    """The values of one side of the data that are not finite.

    Attributes:
        name: `x_train`, `y_train`, `x_test` or `y_test`.
        row: of the first such value, counted from 0.
        column: its place in the row, an index for each dimension.
        value: NaN or an infinity.
        count: how many there are.
        rows: the rows that hold them, of which the first `MOST_ROWS`.
        total_rows: how many rows hold them.
    """

    name: str
    row: int
    column: tuple[int, ...]
    value: float
    count: int
    rows: tuple[int, ...]
    total_rows: int

    def __str__(self) -> str:
        spot = f"row {self.row}" + (f", column {', '.join(map(str, self.column))}" if self.column else "")
        return f"{self.name} holds a value that is not finite: {spot} (counted from 0)"

    @property
    def found(self) -> str:
        """The value, and how many there are."""
        values, rows = "value" + "s" * (self.count > 1), "row" + "s" * (self.total_rows > 1)
        return f"{self.value}; {self.count} such {values} in {self.total_rows} {rows}"

    def error(self, place: Place) -> InputError:
        """What is said where they do harm."""
        return InputError(
            str(self),
            place=place,
            found=self.found,
            expected="finite numbers: one NaN in a batch makes every parameter NaN",
            fix="drop or fill those rows in load()",
        )
