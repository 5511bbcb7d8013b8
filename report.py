"""Draw what a run did: one HTML page with curves, token strips, the PM's beliefs, before and after.

    python report.py out/toy-0                   # writes out/toy-0/report.html; also while it runs
    python report.py out/toy-0 out/toy-1         # writes out/toy-0/compare.html
    python report.py --hero reference            # writes reference/hero.svg, the README's picture

The page stands alone: no network, no framework, and without JavaScript only the slider is missing.
All that a model or a person wrote goes through `curves.shown`. Read it in this order:
  1. Replies   what the parts of the page say about a reply
  2. Strips    replies, token by token, through training
  3. Beliefs   what the PM gets right and wrong
  4. Before    the closing table, and replies side by side
  5. The page  its parts together; the command
"""
import argparse
import base64
import contextlib
import hashlib
import html
import json
import os
import sys
from pathlib import Path
from string import Template

from curves import (Data, Line, ReportError, chart, curves, hero, is_number, is_row, list_in, read,
                    score_and_truth, shown)

PARTS = Path(__file__).resolve().parent / "report_page"  # page.html, page.css, page.js
MAX_BYTES = 3_000_000                                    # of a page
GROUPS = ("red-team", "look-alike", "follow-up", "question", "helpful")  # record.group_of


# ---- 1. Replies --------------------------------------------------------------


def log_ratios(reply: dict) -> list[float]:
    return [logp - ref_logp for logp, ref_logp in zip(reply["logp"], reply["ref_logp"])]


def prompt(text) -> str:
    """A dialogue without its empty lines and its empty last turn."""
    words = str(text).removesuffix("\n\nAssistant:").replace("\n\n", "\n")
    return f'<div class="prompt">{shown(words)}</div>'


def when(step: int) -> str:
    return f"after {step:,} updates" if step else "initial policy"


def outcome(reply: dict, more: str = "") -> str:
    """What became of a reply, in one line."""
    truth = f', truth <em>{reply["truth"]:.2f}</em>' if "truth" in reply else ""
    unfinished = ""
    if not reply.get("finished", True):
        unfinished = ", unfinished (the score includes the penalty)"
    return (f'<p class="outcome">PM score <em>{reply["score"]:.2f}</em>{truth}, log-ratio to the '
            f"reference {sum(log_ratios(reply)):.2f} nats{unfinished}{more}</p>")


# ---- 2. Strips ---------------------------------------------------------------

N_STRIPS, N_WORST, MAX_TOKENS = 12, 3, 300
# Letter of the CSS class -> what it colors.
QUANTITIES = {"k": "log-ratio to the reference", "r": "reward", "v": "value", "a": "advantage",
              "p": "PM's score of the prefix"}


def columns(reply: dict) -> dict[str, list]:
    """{letter: a number for each token}. A prefix score may be missing."""
    return {"k": log_ratios(reply), "r": reply["rewards"], "v": reply["values"],
            "a": reply["advantages"], "p": reply["prefix_scores"]}


def choose(replies: list[dict]) -> list[str]:
    """The prompts of the strips: the first ones of each group, and last those that end worst, by
    the truth or, where it is unknown, by the PM's score."""
    by_worth = sorted(replies, key=lambda reply: reply.get("truth", reply["score"]))
    worst, chosen = [reply["prompt"] for reply in by_worth[:N_WORST]], []
    queues = []
    for group in GROUPS:
        queues.append([reply["prompt"] for reply in replies if reply["group"] == group])
    for nth in range(len(replies)):
        for queue in queues:
            if nth < len(queue) and len(chosen) < N_STRIPS - N_WORST and queue[nth] not in worst:
                chosen.append(queue[nth])
    return chosen + worst


def scales(replies: list[dict]) -> dict[str, float]:
    """{letter: the size that gets the strongest color}, the 90th percentile."""
    sizes = {letter: [0.01] for letter in QUANTITIES}
    for reply in replies:
        for letter, numbers in columns(reply).items():
            sizes[letter] += [abs(x) for x in numbers if is_number(x)]
    return {letter: max(sorted(found)[int(0.9 * (len(found) - 1))], 0.01)
            for letter, found in sizes.items()}


def strip(reply: dict, scale: dict[str, float], options: dict) -> str:
    """One reply: its tokens, colored; what became of it; its arithmetic."""
    spans, numbers_of = [], columns(reply)
    for t, token in enumerate(reply["tokens"][:MAX_TOKENS]):
        classes, words = [], []
        for letter, title in QUANTITIES.items():
            x = numbers_of[letter][t]
            if is_number(x):
                classes.append(f"{letter}{round(4 * max(-1.0, min(1.0, x / scale[letter])))}")
                words.append(f"{title} {x:+.2f}")
        spans.append(f'<b class="{" ".join(classes)}" tabindex="{-1 if t else 0}" '
                     f'data-n="{"; ".join(words)}">{token_text(token)}</b>')
    n_cut = len(reply["tokens"]) - MAX_TOKENS
    if n_cut > 0:
        spans.append(f"<small> and {n_cut:,} more tokens</small>")
    return (f'<div class="strip">{"".join(spans)}</div>{outcome(reply)}'
            f"{arithmetic(reply, options)}")


def token_text(token: str) -> str:
    """With its space, which `shown` would cut off."""
    words = token.replace("\n", "\u21b5")
    space = " " if words.startswith(" ") else ""
    return space + shown(words, most=200)


def arithmetic(reply: dict, options: dict) -> str:
    """The same reply as a table, and its numbers in the formulas of ppo.py."""
    k, rewards, values = log_ratios(reply), reply["rewards"], reply["values"]
    advantages, prefixes = reply["advantages"], reply["prefix_scores"]
    for name in ("gamma", "gae_lambda", "kl_coef"):
        if name not in options:
            return f"<p>No arithmetic: config.json does not say what {name} was."
    gamma, lam, kl_coef = options["gamma"], options["gae_lambda"], options["kl_coef"]
    next_values, next_advantages = values[1:] + [0.0], advantages[1:] + [0.0]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, next_values, values)]
    total = reply["score"] - kl_coef * sum(k)
    by_hand = deltas[0] + gamma * lam * next_advantages[0]
    rows = []
    for t, token in enumerate(reply["tokens"][:MAX_TOKENS]):
        numbers = (reply["logp"][t], reply["ref_logp"][t], k[t], rewards[t], values[t], deltas[t],
                   advantages[t], advantages[t] + values[t], prefixes[t])
        # The sum turns -0.0 into 0.0.
        cells = [f"<td>{round(x, 3) + 0.0:.3f}" if is_number(x) else "<td>" for x in numbers]
        rows.append(f"<tr><td>{token_text(token)}{''.join(cells)}")
    head = "<th>".join((
        "token", "log \u03c0", "log \u03c0<sub>ref</sub>", "log-ratio k", "reward r", "value V",
        "\u03b4", "advantage A", "return", "PM of the prefix"))
    return f"""<details><summary>The arithmetic of this reply</summary>
<p>Each token costs \u03bb<sub>KL</sub>\u00b7k, and the last one earns the score, because the PM
reads whole replies. So the rewards add up to score \u2212 \u03bb<sub>KL</sub>\u00b7\u03a3k =
{reply["score"]:.3f} \u2212 {kl_coef:g} \u00b7 {sum(k):.3f} = {total:.3f}; the column adds up to
{sum(rewards):.3f}.
<p>GAE, first token: \u03b4 = r + \u03b3V\u2032 \u2212 V = {rewards[0]:.3f} + {gamma:g} \u00b7
{next_values[0]:.3f} \u2212 {values[0]:.3f} = {deltas[0]:.3f}; A = \u03b4 + \u03b3\u03bb A\u2032 =
{deltas[0]:.3f} + {gamma * lam:g} \u00b7 {next_advantages[0]:.3f} = {by_hand:.3f}. A prime marks the
next token; after the last one V\u2032 and A\u2032 are 0. The return is A + V.
<div class="wide"><table><tr><th>{head}{"".join(rows)}</table></div></details>"""


def strips(run: Data, room: int) -> str:
    """The chosen prompts after each recorded number of updates, as many as fit into `room` bytes
    besides the last."""
    steps = list(run.replies)
    if not steps:
        return "<p>There are no recorded replies yet."
    chosen = choose(run.replies[steps[-1]])
    kept = {}  # updates -> the replies to the chosen prompts
    for step in steps:
        kept[step] = [reply for reply in run.replies[step] if reply["prompt"] in chosen]
    scale = scales(sum(kept.values(), []))
    drawn = {}  # updates -> {prompt: its strip}
    for step in dict.fromkeys([steps[-1], steps[0], *steps[::4], *steps[::2], *steps]):
        bodies = {r["prompt"]: strip(r, scale, run.options) for r in kept[step]}
        room -= n_bytes("".join(bodies.values()))
        if drawn and room < 0:
            break
        drawn[step] = bodies
    parts = []
    for text in chosen:
        group = next(r["group"] for r in kept[steps[-1]] if r["prompt"] == text)
        parts.append(f"<article><h4>{shown(group, most=20)}</h4>{prompt(text)}")
        for nth, step in enumerate(sorted(drawn)):
            on = " on" if step == steps[-1] else ""
            body = drawn[step].get(text, "<p>This reply is missing.</p>")
            parts.append(f'<div class="step{on}" data-step="{nth}">{body}</div>')
        parts.append("</article>")
    labels = html.escape(json.dumps([when(step) for step in sorted(drawn)]))
    return f"""<section><div class="control">{radios("mode", QUANTITIES)}
<label hidden>training <input type="range" id="step" min="0" max="{len(drawn) - 1}"
value="{len(drawn) - 1}" data-labels="{labels}"></label>
<output id="when">{when(steps[-1])}</output></div>
<p>Blue is above 0; orange, with a line, is below. Point at a token, or press Tab and then the
arrow keys, to see its numbers. The prompts are held out; the last {N_WORST} end worst.
{"".join(parts)}</section>"""


def radios(name: str, titles: dict[str, str]) -> str:
    """Buttons that work by CSS alone; the first one is on."""
    buttons = []
    for nth, (key, title) in enumerate(titles.items()):
        buttons.append(f'<label><input type="radio" name="{name}" id="{name}-{key}"'
                       f'{"" if nth else " checked"}> {title}</label>')
    return "".join(buttons)


def rules() -> str:
    """The CSS that goes with the radio buttons."""
    found = []
    for letter in QUANTITIES:
        on = f"body:has(#mode-{letter}:checked)"
        for size in range(1, 5):
            high, low = f"rgb(var(--high) / .{18 * size})", f"rgb(var(--low) / .{18 * size})"
            found.append(f"{on} .{letter}{size} {{ background: {high} }}")
            found.append(f"{on} .{letter}-{size} {{ background: {low}; border-color: var(--0) }}")
    for group in GROUPS:
        found.append(f"body:has(#only-{group}:checked) .pair:not(.{group}) {{ display: none }}")
    return "\n".join(found)


# ---- 3. Beliefs --------------------------------------------------------------


def beliefs(run: Data) -> str:
    if not run.beliefs:
        return "<p>The preference model is not done, or was not recorded."
    kinds = run.beliefs.get("calibration")
    kinds = kinds if isinstance(kinds, dict) else {}
    lines = [binned(kind, bins, nth) for nth, (kind, bins) in enumerate(kinds.items())]
    gaps = binned("agrees with the truth", run.beliefs.get("gaps"), 0)
    items = []
    for pair in list_in(run.beliefs, "worst"):
        if isinstance(pair, dict) and is_number(pair.get("margin")):
            p, preferred = pair.get("p_chosen"), "second" if pair["margin"] < 0 else "first"
            truth = f" The label had a probability of {p:.2f}." if is_number(p) else ""
            items.append(f'<li>{prompt(pair.get("prompt"))}<p class="reply">1, labeled better: '
                         f'{shown(pair.get("chosen"))}\n2, labeled worse: '
                         f'{shown(pair.get("rejected"))}</p><p class="outcome">The PM prefers the '
                         f'{preferred} by <em>{abs(pair["margin"]):.2f}</em> logits.{truth}')
    calibration = chart("How sure it is, and how often it is right", lines, diagonal=True,
                        x_title="stated probability")
    by_gap = chart("By the true gap between the replies", [gaps], x_title="gap in nats")
    return ("<p>On held-out comparisons, with 95% intervals. A calibrated PM is right as often as "
            f'it says, as on the line.<div class="charts">{calibration}{by_gap}</div>'
            '<h3>Pairs that it gets most wrong</h3><ol class="pairs">'
            f"{''.join(items)}</ol>{overrated(run)}")


def binned(name: str, bins, nth: int) -> Line:
    """The points of bins [x, y, low, high, n]."""
    line = Line(name, [], color=nth, dash=nth, dots=True)
    for row in bins if isinstance(bins, list) else []:
        if is_row(row, 5):
            line.points.append((row[0], row[1]))
            line.bars.append((row[0], row[2], row[3]))
    return line


def overrated(run: Data) -> str:
    """Replies that the PM scores far above the truth, near the initial policy and far from it. A
    PM's zero is arbitrary, so the mean of score - truth over each kind of prompt is subtracted."""
    distinct = {}
    for step, replies in run.replies.items():
        for reply in replies:
            if "truth" in reply:
                distinct.setdefault((reply["prompt"], reply["text"]), (step, reply))
    excesses = {True: [], False: []}
    for _, reply in distinct.values():
        excesses[reply["group"] == "red-team"].append(reply["score"] - reply["truth"])
    rated = []
    for step, reply in distinct.values():
        usual = excesses[reply["group"] == "red-team"]
        excess = reply["score"] - reply["truth"] - sum(usual) / len(usual)
        rated.append((excess, step, reply))
    distances = sorted(sum(log_ratios(reply)) for _, _, reply in rated)
    lists = {"Near": [], "Far": []}
    for excess, step, reply in sorted(rated, key=lambda row: -row[0]):
        is_near = sum(log_ratios(reply)) < distances[len(distances) // 2]
        lists["Near" if is_near else "Far"].append(
            f'<li>{prompt(reply["prompt"])}<p class="reply">{shown(reply["text"])}</p>'
            + outcome(reply, f"; overrated by <em>{excess:.2f}</em>, {when(step)}"))
    if not rated:
        return ""
    return ("<h3>Replies of the policy that it overrates most</h3>"
            "<p>By how much score \u2212 truth is above its mean over the recorded replies. Near: "
            f"the log-ratio is below {distances[len(distances) // 2]:.2f} nats, the median."
            + "".join(f"<h4>{word}</h4><ol class='pairs'>{''.join(found[:4])}</ol>"
                      for word, found in lists.items()))


# ---- 4. Before and after -----------------------------------------------------


def closing_table(runs: list[Data]) -> str:
    """The first policy of the first run, and the last one of each, with 95% intervals."""
    columns_of = []
    for run in runs:
        name = f"{run.name}, " if len(runs) > 1 else ""
        steps = list(run.tables)
        if run is not runs[0]:
            steps = steps[-1:]
        for step in steps:
            columns_of.append((name + when(step), run.tables[step]))
    if not columns_of:
        return "<p>The closing table is not there yet."
    rows = []
    for title in columns_of[0][1]:
        cells = []
        for _, table in columns_of:
            row = table.get(title)
            cells.append("<td>{:.3f} <small>[{:.3f}, {:.3f}]</small>".format(*row)
                         if is_row(row, 3) else "<td>")
        rows.append(f"<tr><td>{shown(title)}{''.join(cells)}")
    head = "".join(f"<th>{shown(name)}" for name, _ in columns_of)
    return (f'<div class="wide"><table><tr><th>held-out prompts{head}{"".join(rows)}</table></div>'
            "<p>In brackets: 95% intervals.")


def side_by_side(run: Data) -> str:
    if not run.replies:
        return ""
    first, last = min(run.replies), max(run.replies)
    before = {reply["prompt"]: reply for reply in run.replies[first]}
    groups, pairs = {"all": "all"}, []
    for reply in run.replies[last]:
        group = reply["group"] if reply["group"] in GROUPS else "helpful"
        groups[group] = group
        texts, versions = [], {first: before.get(reply["prompt"])}
        versions[last] = reply  # the only one, if nothing was recorded after the first
        for step, found in versions.items():
            if found is not None:
                texts.append(f'<p class="reply"><small>{when(step)}:</small>\n'
                             f'{shown(found["text"])}</p>{outcome(found)}')
        pairs.append(f'<article class="pair {group}">{prompt(reply["prompt"])}{"".join(texts)}'
                     "</article>")
    return (f'<section><div class="control">{radios("only", groups)}</div><div class="pairs">'
            f'{"".join(pairs)}</div></section>')


# ---- 5. The page -------------------------------------------------------------


def n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def digest(text: str) -> str:
    """What the page's security policy allows: this text, and nothing else."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(runs: list[Data]) -> bytes:
    """One run in full; of several the curves and the closing table."""
    style = (PARTS / "page.css").read_text("utf-8") + rules()
    script = (PARTS / "page.js").read_text("utf-8")
    notes = []
    for run in runs:
        notes += [f"<li>{shown(run.name)}: {shown(note)}" for note in run.notes]
    slots = {"title": shown(", ".join(run.name for run in runs)), "style": style, "script": script,
             "style_hash": digest(style), "script_hash": digest(script), "links": "",
             "notes": f'<ul class="notes">{"".join(notes)}</ul>' if notes else "",
             "hero": score_and_truth(runs), "curves": curves(runs), "strips": "", "beliefs": "",
             "before": closing_table(runs)}
    if len(runs) == 1:
        slots["before"] += side_by_side(runs[0])
        slots["beliefs"] = f'<h2 id="beliefs">What the PM believes</h2>{beliefs(runs[0])}'
        slots["links"] = ('<a href="#strips">Token by token</a> '
                          '<a href="#beliefs">What the PM believes</a> ')
        room = MAX_BYTES - n_bytes("".join(slots.values())) - 100_000
        slots["strips"] = f'<h2 id="strips">Token by token</h2>{strips(runs[0], room)}'
    template = Template((PARTS / "page.html").read_text("utf-8"))
    return template.substitute(slots).encode("utf-8", "replace")


def save(path: Path, content: bytes) -> Path:
    """Readers see the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ReportError(f"cannot write {path}: {error.strerror}") from None
    return path


def write(folders: list[Path]) -> Path:
    """Write the page into the first folder. Raises ReportError."""
    name = "report.html" if len(folders) == 1 else "compare.html"
    return save(folders[0] / name, page([read(folder) for folder in folders]))


@contextlib.contextmanager
def written_at_the_end(out: Path, is_writer: bool = True):
    """For the main job: write the page when the block ends. If an error or Ctrl-C ends it, the page
    is written only if the block has logged anything: a wrong option leaves the folder as it was.
    Of several processes (ranks.py) only one may write the page."""
    if not is_writer:
        yield
        return
    metrics = out / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    try:
        yield
    except BaseException:
        if metrics.is_file() and metrics.stat().st_size != size:
            write_or_say(out)
        raise
    write_or_say(out)


def write_or_say(out: Path):
    """A page that cannot be written is no reason for a run to fail."""
    try:
        print(f"    -> {write([out])}, for a browser")
    except ReportError as error:
        print(f"    no report: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--hero", action="store_true", help="write hero.svg, and no page")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a folder's name may have characters that it lacks
    try:
        if args.hero:
            picture = hero(read(args.folders[0]))
            print(save(args.folders[0] / "hero.svg", picture.encode("utf-8", "replace")))
        else:
            print(write(args.folders))
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
