"""What is drawn in all pictures: means over seeds with their intervals (output.py has the style).

A point is a mean over seeds, its bar the 95% interval by Student's t (none for one seed). Where the
seeds differ on the x axis, too, each seed has a thin line of its own (`paths`).
"""
import math

from decide import LEVEL, t_quantile
from output import column, mean_se, select


def interval(values: list[float]) -> tuple[float, float]:
    """The mean of the seeds' numbers, and half the width of its 95% interval (NaN for one)."""
    mean, error = mean_se(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, t_quantile(len(values) - 1, LEVEL / 2) * error


def curve(plt, x, samples: list[list[float]], label: str = "", **looks):
    """A line through the means of the seeds' numbers at each x."""
    means, halves = zip(*[interval(values) for values in samples])
    plt.errorbar(x, means, halves, label=label, **looks)


def groups(plt, names: list[str], samples: dict[str, list[list[float]]]):
    """Several groups' points side by side above each name on the x axis. samples: {group: the
    seeds' numbers for each name}."""
    for i, (group, found) in enumerate(samples.items()):
        shift = 0.5 * (i - (len(samples) - 1) / 2) / len(samples)
        curve(plt, [k + shift for k in range(len(names))], found, group, linestyle="")
    plt.xticks(range(len(names)), names)
    plt.xlim(-0.5, len(names) - 0.5)


def paths(plt, rows: list[dict], x: str, y: str, label: str):
    """A thin line for each seed through its rows, all of them in one color and with one dash."""
    looks = {"label": label}
    for seed in dict.fromkeys(column(rows, "seed")):
        mine = select(rows, seed=seed)
        [line] = plt.plot(column(mine, x), column(mine, y), marker="", **looks)
        looks = {"color": line.get_color(), "linestyle": line.get_linestyle()}
