"""Measured numbers in words: the sentences with which tables and reports begin.

A cell is a measured number {"value", "ci95", "n"}.
"""

from nanorecall.plots import drawn_slices, large_cells


def percent(cell):
    return f"{cell['value']:.1%}"


def differ(low, high):
    """Do the intervals of two cells leave a gap?"""
    return low["ci95"][1] < high["ci95"][0]


def widest_slice(by_slice):
    """The slice whose values differ most -> (name, lowest value, highest value) or None.

    Values of few measurements do not count, nor do slices within whose intervals all may be equal.
    """
    found, widest = None, 0.0
    for name, cells in drawn_slices(by_slice).items():
        large = large_cells(cells.values())
        values = [value for value, cell in cells.items() if cell in large]
        low = min(values, key=lambda value: cells[value]["value"])
        high = max(values, key=lambda value: cells[value]["value"])
        distance = cells[high]["value"] - cells[low]["value"]
        if differ(cells[low], cells[high]) and distance > widest:
            found, widest = (name, low, high), distance
    return found


def describe_widest(by_slice, what):
    """What differs most between the values of a slice, as a sentence. what: "accuracy"."""
    found = widest_slice(by_slice)
    if not found:
        return f"no slice has values between which {what} differs by more than the intervals"
    name, low, high = found
    cells = by_slice[name]
    ends = f"{percent(cells[low])} at {low} to {percent(cells[high])} at {high}"
    return f"{what} differs most by {name}: {ends}"
