"""Tests of report.py and curves.py: the numbers are where they belong, and nobody's text does
anything but stand there."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import curves
import report
from curves import H, LEFT, PANELS, RIGHT, W, Line, Row, chart, health, hero, read, shown, ticks
from report import QUANTITIES, ReportError, arithmetic, choose, page, strips, write

EVIL = ("<script>alert(1)</script>\"'><img src=x onerror=alert(2)> &lt; \x1b[31m \x00\u202eabc"
        "\u2066 \ud83d \u2028 </style></details>")
LONG = "word " * 2000


def reply(prompt="\n\nHuman: q\n\nAssistant:", group="question", n=3, text=" a b", **more) -> dict:
    """A reply of n tokens whose numbers agree with each other: lambda 0.5, gamma 1, GAE's 0.9."""
    k = [0.1 * (t + 1) for t in range(n)]
    rewards = [-0.5 * x for x in k]
    rewards[-1] += 2.0
    values, advantages, after, later = [0.2 * t for t in range(n)], [0.0] * n, 0.0, 0.0
    for t in reversed(range(n)):
        advantages[t] = later = rewards[t] + after - values[t] + 0.9 * later
        after = values[t]
    return {"prompt": prompt, "group": group, "text": text, "score": 2.0, "finished": True,
            "truth": 1.0, "tokens": [" t"] * n, "logp": [x - 1.0 for x in k],
            "ref_logp": [-1.0] * n, "values": values, "rewards": rewards, "advantages": advantages,
            "prefix_scores": [None] * (n - 1) + [2.0]} | more


def make_run(folder: Path, replies=None, steps=(0, 7, 9), pm: dict | None = None, more="") -> Path:
    folder.mkdir(exist_ok=True)
    metrics = [{"stage": "rl", "step": s, "kl": 0.25 * s, "score": 0.1 * s, "truth": -0.1 * s,
                "finished": 1.0} for s in range(10)]
    metrics += [{"stage": "lm", "step": 0, "loss": 3.0}, {"stage": "pm", "step": 5, "subset": EVIL,
                "accuracy": 0.7, "low": 0.6, "high": 0.8, "bayes": 0.75}]
    record = [{"stage": "rl", "step": s, "replies": [reply()] if replies is None else replies}
              for s in steps]
    record[0]["table"] = {"correct " + EVIL: [0.4, 0.3, 0.5]}
    record[-1]["table"] = {"correct " + EVIL: [0.9, 0.8, 0.95]}
    record.append({"stage": "pm", "step": 5} | (pm or {}))
    for name, lines in (("metrics", metrics), ("record", record)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text + more)
    (folder / "config.json").write_text(json.dumps(
        {"rl": {"kl_coef": 0.5, "gamma": 1.0, "gae_lambda": 0.9, "evil": EVIL}}))
    return folder


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def drawn(folder: Path) -> str:
    return write([folder]).read_text("utf-8")


# ---- 1. Text and damage ------------------------------------------------------


def test_text_of_strangers_is_shown_and_does_nothing(tmp_path):
    """In every place that text can reach."""
    replies = [reply(EVIL + str(i), group, text=EVIL, tokens=[EVIL, "\n", LONG])
               for i, group in enumerate([EVIL, "red-team", "look-alike", LONG])]
    pm = {"calibration": {EVIL: [[0.6, 0.6, 0.5, 0.7, 9]]}, "gaps": EVIL, "worst": [
        {"prompt": EVIL, "chosen": LONG, "rejected": EVIL, "margin": -1.0, "p_chosen": EVIL}]}
    text = drawn(make_run(tmp_path / "a<b>&'\"", replies, pm=pm))
    page = Elements(text)
    allowed = """html meta title style script h1 h2 h3 h4 nav a div p b em small sub code section
    article svg text rect line path circle label input output details summary table tr th td ol ul
    li"""
    assert {tag for tag, _ in page.found} <= set(allowed.split())
    assert len(page.all("script")) == 1 and not page.all("script")[0]
    for tag, attributes in page.found:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066\ud800-\udfff]", text)
    for words in ("<script>alert(1)</script>", "\u27e8001B\u27e9[31m", "\u27e8202E\u27e9abc",
                  "\u27e80000\u27e9", "\ufffd", "characters]"):
        assert words in page.text, words
    policy = page.all("meta")[1]["content"]
    script = re.search("<script>(.*)</script>", text, re.S)[1]
    style = re.search("<style>(.*)</style>", text, re.S)[1]
    assert policy == (f"default-src 'none'; style-src {report.digest(style)}; "
                      f"script-src {report.digest(script)}")


def test_shown():
    assert shown(" a\nb ") == "a\nb" and shown(" \n") == "\u2205" and shown(None) == "None"
    assert shown("x" * 20, most=11) == "xxxxx [10 characters] xxxxx"
    assert shown("e\u0301 \U0001f642 \u05d0") == "e\u0301 \U0001f642 \u05d0"  # as it is


@pytest.mark.parametrize("lines, n_damaged", [
    ('{"stage": "rl", "step": 8, "repl', 1), ("[1, 2]\n5\n" + "[" * 100_000, 3), ("\xff\n\n", 1),
    ('{"stage": "rl", "step": "8"}\n{"step": 1}', 2),
    ('{"stage": "rl", "step": 1' + "0" * 400 + ', "score": 1.0}', 1),
    ('{"stage": "pm", "step": 1, "worst": [4, {"margin": "x"}], "calibration": [1], "gaps": 3}', 0),
    ('{"stage": "rl", "step": 9, "table": {"t": [1, "x", null]}, "replies": 4}', 0)])
def test_damaged_lines_are_counted_and_the_rest_is_shown(tmp_path, lines, n_damaged):
    text = Elements(drawn(make_run(tmp_path, more=lines))).text
    for name in ("metrics", "record"):
        note = f"Damaged or half-written lines of {name}.jsonl, left out: {n_damaged}."
        assert (note in text) == (n_damaged > 0)
    assert "after 9 updates" in text and "Score and truth" in text


@pytest.mark.parametrize("damage", [
    {"logp": [1.0]}, {"values": None}, {"rewards": [1, 2, "3"]}, {"tokens": [1, 2, 3]},
    {"tokens": []}, {"score": float("nan")}, {"truth": None}, {"prompt": 7}, {"text": None},
    {"prefix_scores": 3}, {"advantages": [0.0, 0.0, float("inf")]}])
def test_a_damaged_reply_is_left_out(tmp_path, damage):
    run = read(make_run(tmp_path, [reply(), reply() | damage, 5]))
    assert [[r["prompt"] for r in found] for found in run.replies.values()] == [
        ["\n\nHuman: q\n\nAssistant:"]] * 3
    assert run.notes == ["Damaged replies of record.jsonl, left out: 6."]


def test_what_is_not_there_yet_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "lm", "step": 0, "loss": 3.0}\n')
    (tmp_path / "config.json").write_text("[" * 100_000)
    text = Elements(drawn(tmp_path)).text
    for words in ("record.jsonl cannot be read", "no recorded replies yet", "not done",
                  "not there yet", "1. LM: loss"):
        assert words in text
    assert hero(read(tmp_path)).startswith("<svg")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ReportError, match="has no metrics.jsonl"):
        read(tmp_path)


# ---- 2. Charts and health ----------------------------------------------------


def test_a_chart_puts_numbers_in_their_places():
    svg = chart("T", [Line("a", [(0, 0.0), (10, 1.0), (5, 0.5)]),
                      Line("b", [(0, 1.0)], 1, 1, dots=True, bars=[(0, 0.5, 1.5)])], (1.0, 9e9))
    root = ElementTree.fromstring(svg)

    def down(y):
        return H - 34 - (y + 0.075) / 1.65 * (H - 40 - 34)  # 0 to 1.5, and 5% on each side
    numbers = [list(map(float, re.findall(r"-?[\d.]+", path.get("d"))))
               for path in root.iter("path")]
    middle = (LEFT + W - RIGHT) / 2
    assert numbers[0] == pytest.approx(
        [LEFT, down(0), middle, down(0.5), W - RIGHT, down(1)], abs=0.06)
    assert numbers[2] == pytest.approx([LEFT, down(0.5), down(1.5)], abs=0.06)
    band = root.find("rect").attrib
    assert float(band["y"]) == pytest.approx(40, abs=0.06)
    assert float(band["y"]) + float(band["height"]) == pytest.approx(down(1), abs=0.11)
    labels = {text.text: text.attrib for text in root.iter("text")}
    assert {"0", "0.5", "1", "1.5", "5", "10", "a", "b", "T", "updates"} <= set(labels)
    assert float(labels["0.5"]["y"]) - 4 == pytest.approx(down(0.5), abs=0.06)


def test_charts_of_little_or_odd_data():
    assert chart("", [Line("a", [])]) == ""
    for y in (0.0, 5.0, -1e-30, 1e99):
        ElementTree.fromstring(chart("", [Line("", [(3, y), (3, y)])], (0.0, 0.2), diagonal=True))
    named = chart("", [Line("", [(0, 1), (1, 2)])], x_names=["first", "<b>"])
    assert "first" in named and "&lt;b&gt;" in named
    assert list(ticks(0, 1).values()) == ["0", "0.5", "1"]
    assert list(ticks(-3, 11).values()) == ["0", "5", "10"]
    assert list(ticks(0.0171, 0.0178).values()) == ["0.0172", "0.0174", "0.0176", "0.0178"]


def test_the_readme_is_the_source_of_what_is_healthy():
    rows = {name: row for row in health() for name in row.names}
    assert set(rows) == set(PANELS) and len(health()) == 10
    bands = {name: row.band(name) for name, row in rows.items() if row.band(name)}
    infinity = float("inf")
    assert bands == {"fin": (0.95, 1.05), "KL": (1, 2), "ev": (0.5, infinity), "appKL": (0, 0.02),
                     "clip": (0, 0.2)}
    assert rows["vloss"].healthy == "falls" and "drift" in rows["vloss"].otherwise
    assert Row(["a", "b"], "below 1, above 2.5").band("b") == (2.5, infinity)


def test_curves_are_drawn_of_all_that_is_logged(tmp_path, monkeypatch):
    run = read(make_run(tmp_path))
    for line in run.metrics[1:4]:
        for panels in PANELS.values():
            for _, numbers in panels:
                line |= {key: 1.0 for _, key in numbers if line["stage"] == "rl"}
    run.metrics += [{"stage": stage, "step": 0, "loss": 1.0, "kl": 1.0}
                    for stage in ("lm", "cd", "pmp", "pm")]
    assert run.points("rl", "sqrt_kl")[9] == (9, 1.5)
    text = curves.curves([run])
    for title in [title for panels in PANELS.values() for title, _ in panels]:
        assert f'aria-label="{title}' in text
    assert text.count("<svg") == 14 + 5 and text.count("band") == 5
    assert "Bayes ceiling" in text and text.count("Healthy:") == 10
    monkeypatch.setattr(curves, "README", tmp_path / "missing")
    assert "Healthy:" not in curves.curves([run]) and "Value loss" in curves.curves([run])


# ---- 3. Replies --------------------------------------------------------------


def test_the_arithmetic_of_a_reply():
    """k = 0.1, 0.2, 0.3; V = 0, 0.2, 0.4; the score 2 is on the last token."""
    options = {"kl_coef": 0.5, "gamma": 1.0, "gae_lambda": 0.9}
    text = " ".join(Elements(arithmetic(reply(), options)).text.split())
    assert "2.000 \u2212 0.5 \u00b7 0.600 = 1.700; the column adds up to 1.700" in text
    # delta = -0.05 + 0.2 - 0; A = 0.15 + 0.9 (0.1 + 0.9 * 1.45) = 1.4145
    assert "= -0.050 + 1 \u00b7 0.200 \u2212 0.000 = 0.150; A" in text
    assert "= 0.150 + 0.9 \u00b7 1.405 = 1.415" in text or "= 1.414." in text
    cells = re.findall(r"<td>([^<]*)", arithmetic(reply(), options))
    assert cells[10:20] == [" t", "-0.800", "-1.000", "0.200", "-0.100", "0.200", "0.100", "1.405",
                            "1.605", ""]
    assert cells[-1] == "2.000"


def test_strips_show_the_chosen_prompts_at_all_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_TOKENS", 6)
    replies = [reply(f"{group} {i}", group, truth=float(i), n=8 if i == 1 else 3)
               for group in report.GROUPS for i in range(5)]
    assert [len(choose(replies[:n])) for n in (25, 12, 2, 1)] == [12, 12, 2, 1]
    chosen = choose(replies)
    assert len(set(chosen)) == 12 and chosen[-3:] == [f"{group} 0" for group in report.GROUPS[:3]]
    assert {text.split()[0] for text in chosen} == set(report.GROUPS)
    run = read(make_run(tmp_path, replies, steps=[0, 1, 2, 3, 4, 5, 9]))
    n_bytes = len(strips(run, 0))
    for room, n_steps in ((10**9, 7), (0, 1), (int(3.2 * n_bytes), 3)):
        page = Elements(strips(run, room))
        steps = [a for a in page.all("div") if "data-step" in a]
        on = [a for a in steps if a["class"] == "step on"]
        assert len(on) == 12 and {a["data-step"] for a in on} == {str(n_steps - 1)}
        assert len(steps) == 12 * n_steps and int(page.all("input")[-1]["max"]) == n_steps - 1
        labels = json.loads(page.all("input")[-1]["data-labels"])
        assert labels[-1] == "after 9 updates" and (n_steps == 1 or labels[0] == "initial policy")
    assert "and 2 more tokens" in page.text
    tokens = page.all("b")
    assert tokens[0]["tabindex"] == "0" and tokens[1]["tabindex"] == "-1"
    assert "log-ratio to the reference +0.10; reward -0.05; value +0.00" in tokens[0]["data-n"]


def test_colors_go_by_sign_and_size():
    found = reply(n=4, values=[-9.0, -1.0, 0.0, 2.0])
    levels = re.findall(r"\bv(-?\d)", report.strip(found, dict.fromkeys(QUANTITIES, 2.0), {}))
    assert levels == ["-4", "-2", "0", "4"]
    rules = report.rules()
    assert ".v4 { background: rgb(var(--high) / .72) }" in rules and ".v-1 {" in rules
    assert report.scales([reply(values=[0.0, 5.0, -7.0])])["v"] == 5.0


def test_the_worst_overrated_replies_are_near_and_far(tmp_path):
    replies = [reply(f"p{i}", truth=1.0 - i / 9, logp=[-1 + 0.1 * i, -1.0, -1.0])
               for i in range(9)]
    replies += [reply(f"red {i}", "red-team", truth=-5.0) for i in range(2)]  # as usual there
    parts = report.overrated(read(make_run(tmp_path, replies))).split("<h4>")
    assert [re.findall(r">(p\d)<", part) for part in parts[1:]] == [
        ["p4", "p3", "p2", "p1"], ["p8", "p7", "p6", "p5"]]
    assert "red" not in parts[1]


def test_a_page_of_two_runs_and_the_commands(tmp_path, monkeypatch, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (a / "samples.txt").write_text("Human: Hi.\n\nAssistant: Yo.\n\nHuman: x?\n\nAssistant:\n"
                                   "    initial: two turns\n    RLHF:    no\n\nHuman: <one>?\n\n"
                                   "Assistant:\n    initial: old\n    RLHF:    new\n\n"
                                   f"Human: x?\n\nAssistant:\n    initial: {LONG}\n    RLHF: \n")

    def call(*args) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
        try:
            report.main()
        except SystemExit as end:
            return end.code
        return 0
    assert call(a, b) == 0 and call("--hero", a) == 0 and not (a / "report.html").exists()
    text = Elements((a / "compare.html").read_text()).text
    for words in ("a PM score", "b truth", "initial policy", "a, after 9 updates",
                  "b, after 9 updates", "0.900 [0.800, 0.950]"):
        assert words in text
    words = "".join(ElementTree.fromstring((a / "hero.svg").read_text()).itertext())
    assert "Human: <one>?initial policy: oldRLHF policy: new" in words and "two turns" not in words
    capsys.readouterr()
    assert call(tmp_path) == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert call(a) == 2 and "cannot write" in capsys.readouterr().err
    assert not list(a.glob("*.tmp"))


def test_the_main_job_writes_the_page_at_its_end_and_when_interrupted(tmp_path, capsys):
    for error, is_logged, is_written in (
            (KeyboardInterrupt, True, True), (ValueError, False, False), (None, False, True)):
        run = make_run(tmp_path / f"{error}")
        try:
            with report.written_at_the_end(run):
                if is_logged:
                    with open(run / "metrics.jsonl", "a") as file:
                        file.write("{}\n")
                if error:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        assert (run / "report.html").exists() == is_written, error
    with report.written_at_the_end(tmp_path / "nothing"):
        pass
    assert "no report: " in capsys.readouterr().out
    run = make_run(tmp_path / "of rank 1")
    with report.written_at_the_end(run, is_writer=False):
        pass
    assert not (run / "report.html").exists()


def test_the_page_needs_no_torch_and_stays_below_3_mb(tmp_path):
    """With torch it would take seconds. Long replies at many steps: as many as fit."""
    code = "import sys, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=report.PARTS.parent).returncode == 0
    replies = [reply(LONG + str(i), n=300, text=LONG) for i in range(12)]
    found = page([read(make_run(tmp_path, replies, steps=range(5)))])
    assert 1e6 < len(found) < report.MAX_BYTES
