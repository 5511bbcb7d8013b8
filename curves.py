"""What a run has left in its folder, and charts of it as SVG text, for report.py.

Neither torch nor the training code is imported, because that would take seconds. Read it in this
order:
  1. Text     how anyone's text becomes part of a page
  2. Reading  metrics.jsonl, record.jsonl (record.py describes it), and what is damaged in them
  3. Charts   lines, dots, intervals and a healthy range
  4. Health   the README's table "Is my run healthy?"
  5. Curves   the numbers of metrics.jsonl, row by row of that table
  6. Hero     the README's picture
"""
import contextlib
import html
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"

# ---- 1. Text -----------------------------------------------------------------


def shown(text, most: int = 1200) -> str:
    """Anyone's text as HTML that shows it and does nothing: no markup, and no character that is
    invisible or turns the direction of writing. The middle of a very long text is left out."""
    text = str(text).strip(" \n") or "\u2205"
    if len(text) > most:
        n_cut = len(text) - most // 2 * 2
        text = f"{text[:most // 2]} [{n_cut:,} characters] {text[-(most // 2):]}"
    characters = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            character = "\ufffd"  # half of a character
        elif kind in ("Cc", "Cf", "Zl", "Zp") and character != "\n":
            character = f"\u27e8{ord(character):04X}\u27e9"
        characters.append(character)
    return html.escape("".join(characters))


def is_number(x) -> bool:
    """Whether a chart can show it: no NaN or infinity, and no text in the place of a number."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100


# ---- 2. Reading --------------------------------------------------------------


class ReportError(Exception):
    """The user's mistake, in one sentence. (run.UserError is not used: it would import torch.)"""


@dataclass
class Data:
    """What a run has left behind so far. Whatever is damaged is left out and noted."""
    name: str
    metrics: list[dict]
    notes: list[str]
    replies: dict[int, list[dict]] = field(default_factory=dict)  # updates -> replies, in order
    tables: dict[int, dict] = field(default_factory=dict)         # updates -> closing table
    beliefs: dict = field(default_factory=dict)                   # of the PM
    options: dict = field(default_factory=dict)                   # numbers of stage 5's options
    samples: str = ""

    def points(self, stage: str, key: str) -> list[tuple[float, float]]:
        """(step, number) of each line that has this number."""
        lines = [line for line in self.metrics if line["stage"] == stage]
        return [(line["step"], line[key]) for line in lines if is_number(line.get(key))]


def read(folder: Path) -> Data:
    """Raises ReportError if the folder holds no run."""
    if not os.path.isfile(folder / "metrics.jsonl"):
        raise ReportError(f"{folder} is not the output folder of a run: it has no metrics.jsonl")
    notes = []
    run = Data(folder.resolve().name, read_lines(folder / "metrics.jsonl", notes), notes)
    for line in run.metrics:
        if is_number(line.get("kl")):
            line["sqrt_kl"] = max(line["kl"], 0.0) ** 0.5
    n_damaged = 0
    for line in sorted(read_lines(folder / "record.jsonl", notes), key=lambda line: line["step"]):
        if line["stage"] in ("pm", "rm"):
            run.beliefs = line
        if isinstance(line.get("table"), dict):
            run.tables[line["step"]] = line["table"]
        good = [reply for reply in list_in(line, "replies") if is_reply(reply)]
        n_damaged += len(list_in(line, "replies")) - len(good)
        if good:
            run.replies[line["step"]] = good
    if n_damaged:
        notes.append(f"Damaged replies of record.jsonl, left out: {n_damaged}.")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError,
                             RecursionError):
        config = json.loads((folder / "config.json").read_text("utf-8", "replace"))
        run.options = {name: x for name, x in config["rl"].items() if is_number(x)}
    with contextlib.suppress(OSError):
        run.samples = (folder / "samples.txt").read_text("utf-8", "replace")
    return run


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The lines that say their stage and step. Others are counted, such as one cut short."""
    try:
        texts = path.read_text("utf-8", "replace").split("\n")
    except OSError:
        notes.append(f"{path.name} cannot be read; what it would show is left out.")
        return []
    found, n_damaged = [], 0
    for text in texts:
        try:
            line = json.loads(text or "null")
        except (ValueError, RecursionError):
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and is_number(step) and isinstance(line.get("stage"), str):
            found.append(line)
        else:
            n_damaged += text.strip() != ""
    if n_damaged:
        notes.append(f"Damaged or half-written lines of {path.name}, left out: {n_damaged}.")
    return found


def list_in(line: dict, key: str) -> list:
    return line[key] if isinstance(line.get(key), list) else []


def is_row(numbers, n: int) -> bool:
    return isinstance(numbers, list) and len(numbers) == n and all(map(is_number, numbers))


def is_reply(reply) -> bool:
    """Whether a reply of record.jsonl has all that a strip needs."""
    if not isinstance(reply, dict) or not list_in(reply, "tokens"):
        return False
    n, texts = len(reply["tokens"]), [reply.get(key) for key in ("prompt", "group", "text")]
    return (all(isinstance(text, str) for text in texts + reply["tokens"])
            and all(is_row(reply.get(key), n) for key in
                    ("logp", "ref_logp", "values", "rewards", "advantages"))
            and len(list_in(reply, "prefix_scores")) == n
            and is_number(reply.get("score")) and is_number(reply.get("truth", 0)))


# ---- 3. Charts ---------------------------------------------------------------

W, H, LEFT, RIGHT, TOP, BOTTOM = 400, 210, 46, 12, 40, 34  # of a chart, in pixels


@dataclass
class Line:
    name: str
    points: list[tuple[float, float]]
    color: int = 0
    dash: int = 0        # also the shape of a dot: black and white must tell lines apart
    dots: bool = False
    bars: list[tuple[float, float, float]] = field(default_factory=list)  # x, low, high

    def mark(self, x: float, y: float) -> str:
        look = f'class="c{self.color % 6} dot"'
        if self.dash % 2:
            return f'<path {look} d="M{x - 3.5:.1f} {y + 3:.1f}h7l-3.5 -6.5z"/>'
        return f'<circle {look} cx="{x}" cy="{y}" r="3"/>'


def around(low: float, high: float, share: float) -> tuple[float, float]:
    """A range around both that is not empty."""
    room = (high - low) * share
    if high - low < 1e-9 * max(abs(low), abs(high), 1):
        room = max(abs(low), 1) * 0.1
    return low - room, high + room


def ticks(low: float, high: float) -> dict[float, str]:
    """About four round numbers between the two, with their labels."""
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= raw * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return {k * step: f"{k * step:.6g}" for k in numbers}


def chart(title: str, lines: list[Line], band=None, x_title: str = "updates",
          x_names: list[str] | None = None, diagonal: bool = False) -> str:
    """An SVG; "" if there is nothing to draw. band: (low, high) of y, shaded. x_names: labels of
    x = 0, 1, ... diagonal: with the line y = x."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    for line in lines:
        for _, low, high in line.bars:
            ys += [low, high]
    if band:  # a border that is near shows how near
        ys += [y for y in band if min(ys) - 1 <= y <= max(ys) + 1]
    x0, x1 = around(min(xs), max(xs), 0.2 if x_names else 0)
    y0, y1 = around(min(ys), max(ys), 0.05)

    def across(x):
        return round(LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT), 1)

    def down(y):
        return round(H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{shown(title)}">'
             f'<text x="{LEFT}" y="13" class="title">{shown(title)}</text>']
    if band and min(band[1], y1) > max(band[0], y0):
        top, bottom = down(min(band[1], y1)), down(max(band[0], y0))
        parts.append(f'<rect class="band" x="{LEFT}" y="{top}" width="{W - LEFT - RIGHT}" '
                     f'height="{bottom - top:.1f}"/>')
    for y, label in ticks(y0, y1).items():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{down(y)}" '
                     f'y2="{down(y)}"/><text x="{LEFT - 5}" y="{down(y) + 4:.1f}" class="end">'
                     f"{label}</text>")
    for x, label in (dict(enumerate(x_names)) if x_names else ticks(x0, x1)).items():
        parts.append(f'<text x="{across(x)}" y="{H - BOTTOM + 14}" class="mid">{shown(label)}'
                     "</text>")
    parts.append(f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 4}" class="mid">{x_title}</text>')
    if diagonal:
        low, high = max(x0, y0), min(x1, y1)
        parts.append(f'<path class="axis" d="M{across(low)} {down(low)}L{across(high)} '
                     f'{down(high)}"/>')
    legend = LEFT
    for line in lines:
        look = f'class="c{line.color % 6} d{line.dash % 4}"'
        places = [(across(x), down(y)) for x, y in sorted(line.points)]
        for x, low, high in line.bars:
            parts.append(f'<path class="c{line.color % 6}" d="M{across(x)} {down(low)}'
                         f'V{down(high)}"/>')
        is_dotted = line.dots or len(places) == 1
        if is_dotted:
            parts += [line.mark(*place) for place in places]
        else:
            parts.append(f'<path {look} d="M{"L".join(f"{x} {y}" for x, y in places)}"/>')
        if line.name:
            parts.append(line.mark(legend + 9, 26) if is_dotted else
                         f'<path {look} d="M{legend} 26h18"/>')
            parts.append(f'<text x="{legend + 22}" y="30">{shown(line.name, most=40)}</text>')
            legend += 36 + 6 * min(len(line.name), 40)
    return "".join(parts) + "</svg>"


# ---- 4. Health ---------------------------------------------------------------


@dataclass
class Row:
    """A row of the README's table: which numbers of the log line it is about, and what it says."""
    names: list[str]
    healthy: str = ""
    otherwise: str = ""

    def band(self, name: str) -> tuple[float, float] | None:
        """The range that the row calls healthy for this number, as far as it gives numbers."""
        bands = {}
        pattern = r"(?:`(\w+)` )?(above|below|near) ([\d.]*\d)|(\d+) or (\d+)"
        for owner, word, number, low, high in re.findall(pattern, self.healthy):
            # "`fin` near 1" names its owner. Else the first range is that of the first name, ...
            owner = owner or self.names[min(len(bands), len(self.names) - 1)]
            x = float(number or 0)
            bands[owner] = {"above": (x, math.inf), "below": (0.0, x), "near": (0.95 * x, 1.05 * x),
                            "": (float(low or 0), float(high or 0))}[word]
        return bands.get(name)


def health() -> list[Row]:
    """The table's rows. Without the README the curves have no ranges and no sentences."""
    text, rows = "", []
    with contextlib.suppress(OSError):
        text = README.read_text("utf-8")
    for line in text.partition("## Is my run healthy?")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = [name for name in re.findall(r"`(\w+)`", cells[0]) if name in PANELS]
        if len(cells) == 3 and names:
            rows.append(Row(names, cells[1], cells[2]))
    return rows or [Row([name]) for name in PANELS]


def sentence(start: str, text: str) -> str:
    return f"<p><b>{start}:</b> " + re.sub("`([^`]*)`", r"<code>\1</code>", shown(text)) + "."


# ---- 5. Curves ---------------------------------------------------------------

# Name in the log line -> panels: a title, and (name of a line, its number in metrics.jsonl) each.
PANELS = {
    "len": [("Tokens a response", [("training", "tokens"), ("held-out", "eval_tokens")])],
    "fin": [("Finished responses", [("training", "finished"), ("held-out", "eval_finished")])],
    "score": [("Score and truth, training", [("PM score", "score"), ("truth", "truth")])],
    "truth": [("Held-out, helpful prompts",
               [("PM score", "eval_score_helpful"), ("truth", "eval_helpfulness")]),
              ("Held-out, red-team prompts",
               [("PM score", "eval_score_harmless"), ("truth", "eval_harmlessness")])],
    "KL": [("KL to the initial policy, nats", [("training", "kl"), ("held-out", "eval_kl")]),
           ("\u221aKL", [("training", "sqrt_kl"), ("held-out", "eval_sqrt_kl")])],
    "k3": [("Two estimates of the KL", [("k1", "kl"), ("k3", "kl_k3")])],
    "ev": [("Explained variance of the returns", [("", "explained_variance")])],
    "ent": [("Entropy, nats a token", [("", "entropy")])],
    "appKL": [("KL of an update, nats a token", [("", "approx_kl")])],
    "clip": [("Ratios outside the clip", [("", "clip_fraction")])],
    "vloss": [("Value loss", [("", "value_loss")])],
    "grad": [("Gradient norms", [("policy", "grad_norm"), ("critic", "critic_grad_norm")])],
}
EARLIER = [("lm", "1. LM: loss, nats a token", [("batch", "loss"), ("held-out", "test_loss")]),
           ("cd", "2. Distillation: KL to the teacher", [("batch", "kl"), ("end", "kl_after")]),
           ("pmp", "3. PM pretraining: loss", [("", "loss")]),
           ("pm", "4. PM: loss", [("", "loss")]),
           ("sft", "2. SFT: loss, nats a token", [("batch", "loss"), ("held-out", "test_loss")]),
           ("rm", "3. Reward model: loss", [("", "loss")]),
           ("select", "4. RM score after an epoch", [("", "rm_score")])]
AT_FEW_STEPS = ("test_loss", "kl_after", "rm_score")  # drawn as dots, like all "eval_" numbers


def panel(runs: list, stage: str, title: str, numbers: list, band=None) -> str:
    """A chart with a line for each number of each run. Several runs differ by color."""
    lines, many = [], len(runs) > 1
    for r, run in enumerate(runs):
        for n, (name, key) in enumerate(numbers):
            lines.append(Line(f"{run.name} {name}".strip() if many else name,
                              run.points(stage, key), color=r if many else n, dash=n,
                              dots=key.startswith("eval_") or key in AT_FEW_STEPS))
    return chart(title, lines, band)


def pm_accuracy(run, source: str, title: str) -> str:
    """Held-out accuracy by kind with its interval, and the ceiling that label noise sets.
    source: what the kinds' names begin with, "people " for people's choices."""
    accuracy, ceiling = Line("accuracy", [], dots=True), Line("Bayes ceiling", [], 1, 1, dots=True)
    names = []
    for line in run.metrics:
        subset = str(line.get("subset", ""))
        is_of_people = subset.startswith("people ")
        if (line["stage"] in ("pm", "rm") and is_of_people == (source == "people ")
                and is_row([line.get(key) for key in ("accuracy", "low", "high")], 3)):
            x = len(names)
            names.append(subset.removeprefix(source))
            accuracy.points.append((x, line["accuracy"]))
            accuracy.bars.append((x, line["low"], line["high"]))
            if is_number(line.get("bayes")):
                ceiling.points.append((x, line["bayes"]))
    return chart(title, [accuracy, ceiling], x_names=names, x_title="")


def curves(runs: list) -> str:
    cards = []
    for row in health():
        panels = []
        for name in row.names:
            for nth, (title, numbers) in enumerate(PANELS[name]):
                band = row.band(name) if nth == 0 else None  # not of the square root
                panels.append(panel(runs, "rl", title, numbers, band))
        if any(panels):
            words = ""
            if row.healthy:
                words = sentence("Healthy", row.healthy) + sentence("Warning signs", row.otherwise)
            cards.append(f'<div class="card n{len(panels)}"><div class="charts">{"".join(panels)}'
                         f"</div>{words}</div>")
    earlier = [panel(runs, stage, title, numbers) for stage, title, numbers in EARLIER]
    if len(runs) == 1:
        earlier.append(pm_accuracy(runs[0], "", "4. PM: held-out accuracy, 95% interval"))
        earlier.append(pm_accuracy(runs[0], "people ", "4. PM: held-out choices of people"))
    return (f'<div class="cards">{"".join(cards)}</div><h3>The stages before</h3><div '
            f'class="charts">{"".join(earlier)}</div>')


# ---- 6. Hero -----------------------------------------------------------------

HERO_TEXT = 64  # characters of a line, at most
PICTURE_STYLE = """text{font:11px system-ui,sans-serif;fill:#808080}.title{font-weight:600}
.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#808080;opacity:.3}
path{fill:none;stroke-width:1.8}.c0{stroke:#d9822b}.c1{stroke:#2a7fba}.d1{stroke-dasharray:6 3}"""
HERO_STYLE = """text{font:11px system-ui,sans-serif;fill:#808080}.title,.who{font-weight:600}
.say{font-size:9.5px}
.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#808080;opacity:.3}
.c0{fill:#d9822b}.c1{fill:#2a7fba}"""


def score_and_truth(runs: list) -> str:
    """Each point an iteration: the PM's score and the truth over the policy's distance."""
    lines = []
    for r, run in enumerate(runs):
        distance = dict(run.points("rl", "sqrt_kl"))
        for n, (name, key) in enumerate((("PM score", "score"), ("true utility", "truth"))):
            points = [(distance[step], y) for step, y in run.points("rl", key) if step in distance]
            if len(runs) > 1:
                lines.append(Line(f"{run.name} {name}", points, color=r, dash=n, dots=True))
            else:
                lines.append(Line(name, points, color=n, dash=n, dots=True))
    return chart("Score and truth, as the policy moves away", lines,
                 x_title="\u221aKL from the initial policy (KL in nats)")


def picture(svg: str) -> str:
    """A chart of lines that can stand alone in a file."""
    svg = svg or f'<svg viewBox="0 0 {W} {H}"></svg>'
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="640" ', 1)
    return svg.replace("</svg>", f"<style>{PICTURE_STYLE}</style></svg>")


def hero(run) -> str:
    """The README's picture, in colors that are right on white and on dark: the chart, and below it
    the last dialogue of samples.txt that has one turn and fits, before and after."""
    words = []
    pattern = r"(Human:.*?)\n\nAssistant:\n {4}initial:([^\n]*)\n {4}RLHF:([^\n]*)"
    for prompt, before, after in re.findall(pattern, run.samples, re.S):
        if "\n" not in prompt and max(map(len, (prompt, before, after))) <= HERO_TEXT:
            words = [("Human", prompt[6:]), ("initial policy", before), ("RLHF policy", after)]
    texts = []
    for nth, (who, text) in enumerate(words):
        texts.append(f'<text x="8" y="{H + 14 + 15 * nth}" class="say"><tspan class="who">{who}:'
                     f"</tspan> {shown(text)}</text>")
    svg = score_and_truth([run]) or f'<svg viewBox="0 0 {W} {H}"></svg>'
    svg = svg.replace(f'<svg viewBox="0 0 {W} {H}"', '<svg xmlns="http://www.w3.org/2000/svg" '
                      f'viewBox="0 0 {W} {H + 17 * len(texts)}" width="640"', 1)
    return svg.replace("</svg>", f"{''.join(texts)}<style>{HERO_STYLE}</style></svg>")
