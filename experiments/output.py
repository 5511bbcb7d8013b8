"""What comes out of an experiment: tables, means over seeds, a CSV file, a picture and a finding.

Read it in this order:
  1. Tables     select rows, average over seeds, subtract seed by seed, print
  2. Scripts    the options of a script, and what it leaves behind

Legend:  "row": a dict of numbers under their names, a line of a table and of the CSV file
"""
import argparse
import ast
import csv
import json
import math
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from run import UserError, errors_in_one_sentence, file_hash, write_atomically

OUT, PICTURES = Path("out/experiments"), Path(__file__).parent / "pictures"
MADE = "made.json"  # beside the pictures: {script: what `finish` found, and with which code}
# Of the lines of a panel, by turns. The colors can be told apart by the color-blind.
COLORS = ("black", "#0072b2", "#d55e00", "#e69f00", "#009e73", "#888888")
MARKERS, DASHES = tuple("os^DvP"), ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 2)))

# ---- 1. Tables ---------------------------------------------------------------


def select(rows: list[dict], **where) -> list[dict]:
    """The rows whose entries are equal to `where`."""
    found = rows
    for name, value in where.items():
        found = [row for row in found if row.get(name) == value]
    return found


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def samples(rows: list[dict], name: str, key: str, values) -> list[list]:
    """A column of the rows of each value of `key`: most often one number a seed."""
    return [column(select(rows, **{key: value}), name) for value in values]


def mean_se(values) -> tuple[float, float]:
    """The mean of numbers, most often one a seed, and its standard error (NaN for one number).

    Two standard errors are no test at 5% with few seeds: Student's t asks for 4.3 of them with
    three seeds, and for 12.7 with two."""
    values = list(values)
    mean, n = toy.mean_or_nan(values), len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)


def means(rows: list[dict], keys: tuple, columns=None, errors: bool = False) -> list[dict]:
    """A row for each combination of `keys`: the means of the columns over all rows that have it,
    most often one a seed. errors: also their standard errors, under "+- " and the column's name.
    columns: by default all that hold numbers."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for values, group in groups.items():
        mean = dict(zip(keys, values))
        for name in columns or numbers_in(group[0], keys):
            mean[name], error = mean_se(column(group, name))
            if errors:
                mean[f"+- {name}"] = error
        found.append(mean)
    return found


def seed_means(rows: list[dict], name: str, *more: str) -> list[float]:
    """A column's mean over the rows of each seed; more: of each seed and value of these columns."""
    return column(means(rows, ("seed", *more), (name,)), name)


def numbers_in(row: dict, keys: tuple) -> list[str]:
    """The names of a row's numbers, without the seed and the keys."""
    names = []
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in (*keys, "seed"):
            names.append(name)
    return names


def less(values: list[float], others: list[float], share: float = 1.0) -> list[float]:
    """Each value less `share` times the other of the same seed."""
    return [value - share * other for value, other in zip(values, others)]


def table(rows: list[dict]):
    """Print rows below the names of their entries."""
    lines = [list(rows[0])]
    for row in rows:
        cells = []
        for value in row.values():
            cells.append(f"{value:.3f}" if isinstance(value, float) else str(value))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("    " + "  ".join(map(str.rjust, line, widths)))


# ---- 2. Scripts --------------------------------------------------------------


def arguments(description: str, **more) -> argparse.Namespace:
    """--seed, --full, --tiny, --redraw, and a script's own options (name=default)."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--full", action="store_true", help="more seeds, sizes and data")
    parser.add_argument("--tiny", action="store_true",
                        help="a smoke test in seconds; its numbers mean nothing")
    parser.add_argument("--redraw", action="store_true",
                        help="decide and draw anew from the last run's CSV file; give the same "
                             "--seed and --full as in that run")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    args.start = time.perf_counter()
    return args


def parts_folder(name: str, args) -> Path:
    """Of a script that has not ended yet. Its rows are of no use to a script with other code."""
    return OUT / f"{name}-{'full' if args.full else 'quick'}-{code_hash(name)}"


def once(name: str, args, part: str, measure) -> list[dict]:
    """The rows that `measure()` returns for one part of a script, such as a seed. They are written
    down at once. A script that is stopped and started again reads them; `finish` deletes them."""
    path = parts_folder(name, args) / f"{part}.json"
    if path.exists() and not args.tiny:
        print(f"    {part}: from {path}, which a stopped run left (delete it to measure again)")
        return json.loads(path.read_text())
    rows = measure()
    if not args.tiny:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(rows).encode())
        print(f"    {part}: measured ({time.perf_counter() - args.start:.0f} s)", flush=True)
    return rows


def each_seed(name: str, args, n_seeds: int, measure) -> list[dict]:
    """The rows that `measure(seed)` returns for n_seeds seeds, each measured once (see `once`).
    --redraw: the rows of the last run."""
    if args.redraw:
        last = made().get(name, {"full": args.full, "first seed": args.seed})
        if (last["full"], last["first seed"]) != (args.full, args.seed):
            options = f"--seed {last['first seed']}" + (" --full" if last["full"] else "")
            raise UserError(f"{name}.py last ran with {options}: use the same with --redraw")
        return read_csv(OUT / f"{name}.csv")
    rows = []
    for seed in range(args.seed, args.seed + n_seeds):
        rows += once(name, args, f"seed-{seed}", lambda: measure(seed))
    return rows


def finish(name: str, args, rows: list[dict], draw, sentence: str):
    """Write the rows as CSV, draw them with `draw(pyplot)` if matplotlib is installed, and print
    the finding. A tiny run writes no file, because it would overwrite real results."""
    seconds = round(time.perf_counter() - args.start)
    if args.redraw:
        seconds = made().get(name, {}).get("seconds", seconds)
    if not args.tiny:
        write_csv(OUT / f"{name}.csv", rows)
        if save_picture(PICTURES / f"{name}.png", draw):
            record(name, args, sentence, seconds)
        if not args.redraw:  # a stopped run may still need its parts
            shutil.rmtree(parts_folder(name, args), ignore_errors=True)
    print(f"{sentence}  ({seconds} s)")


def made() -> dict:
    """{script: what its last run with a picture left}."""
    path = PICTURES / MADE
    return json.loads(path.read_text()) if path.exists() else {}


def record(name: str, args, sentence: str, seconds: int):
    """Note what a picture was made with, for gallery.py."""
    entries = made()
    entries[name] = {"code": code_hash(name), "full": args.full, "first seed": args.seed,
                     "seconds": seconds, "sentence": sentence}
    write_atomically(PICTURES / MADE, json.dumps(entries, indent=1, sort_keys=True).encode())


def code_hash(name: str) -> str:
    return file_hash([Path(__file__).with_name(f"{name}.py")])


def write_csv(path: Path, rows: list[dict]):
    names = {}  # a dict keeps the order; a row may lack some entries of the others
    for row in rows:
        names |= row
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)
    print(f"    -> {path}")


def read_csv(path: Path) -> list[dict]:
    """The rows that `write_csv` wrote. A row lacks its empty cells, except in columns of words."""
    if not path.exists():
        raise UserError(f"{path} is missing: run the script without --redraw first")
    rows, words = [], {}
    with open(path, newline="") as file:
        for cells in csv.DictReader(file):
            row = {name: value_of(cell) for name, cell in cells.items() if cell}
            for name, value in row.items():
                if isinstance(value, str):
                    words[name] = ""
            rows.append(row)
    return [words | row for row in rows]


def value_of(cell: str):
    """The number, the list or the word in a cell."""
    try:
        return float(cell) if cell in ("nan", "inf", "-inf") else ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return cell


def style(matplotlib) -> dict:
    """One size and one look for all pictures. Each line of a panel has its own color, marker and
    dashes, so the pictures can be read in gray."""
    lines = matplotlib.cycler(color=COLORS, marker=MARKERS, linestyle=DASHES)
    return {"figure.figsize": (8, 4), "figure.dpi": 80, "font.size": 8, "axes.titlesize": 8,
            "axes.prop_cycle": lines, "lines.linewidth": 1, "lines.markersize": 4,
            "errorbar.capsize": 3, "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False}


def save_picture(path: Path, draw) -> bool:
    """Whether there is a picture: not without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("    no picture: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with matplotlib.rc_context(style(matplotlib)):
        pyplot.figure()
        draw(pyplot)
        pyplot.tight_layout()
        path.parent.mkdir(exist_ok=True)
        pyplot.savefig(path)
    print(f"    -> {path}")
    return True


def main(script, description: str, **more):
    """Run `script`, a function of the parsed arguments. Mistakes end it as in the commands."""
    with errors_in_one_sentence():
        script(arguments(description, **more))
