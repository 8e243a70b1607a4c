"""What stands in a figure, as plain numbers and text."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike


def numbers(data: ArrayLike) -> list[float]:
    """The coordinates of a line as plain numbers."""
    return [float(number) for number in np.asarray(data)]


def curves(axes: Axes, color: str, marker: str = "o") -> list[Any]:
    """The lines of one colour and marker: where, and how high."""
    return [
        (numbers(line.get_xdata()), numbers(line.get_ydata()))
        for line in axes.lines
        if line.get_color() == color and line.get_marker() == marker
    ]


def horizontal(axes: Axes, color: str) -> list[float]:
    """The heights of the horizontal lines of one colour."""
    lines = [line for line in axes.lines if line.get_color() == color]
    return [
        numbers(line.get_ydata())[0]
        for line in lines
        if numbers(line.get_xdata()) == [0.0, 1.0]
    ]


def legend(figure: Figure) -> list[str]:
    """What the legend says."""
    return [text.get_text() for text in figure.legends[0].get_texts()]
