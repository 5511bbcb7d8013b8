"""Elo of the policies of several rounds, by chats in which two of them answer (§2.4, App. B.5).

Simulated people choose, so it is for the toy world only. Read it in this order:
  1. Matches   a round's policy against the initial policy and those of all earlier rounds
  2. Elo       by maximum likelihood over all matches so far; the table and the picture

Legend: a round is a Run in the round's own folder (train_online.py); k counts rounds from 1, and
policy 0 is the initial one.
Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from run import load, write_atomically  # before torch: Ctrl-C prints no traceback

import torch

from collect import match
from curves import Line, chart, picture, read_lines
from pipeline import Run
from ratings import elo_error, fit_elo

KINDS = {"helpful": "helpful", "harmless": "red-team"}  # of prompts -> their name in the table


@dataclass
class EloConfig:
    conversations: int = 200  # toy: held-out chats of each kind, with each earlier policy


# ---- 1. Matches --------------------------------------------------------------


def play(rounds: list[Run], cfg: EloConfig, max_response: int):
    """Match the last round's policy against the initial policy and those of the other rounds. Reads
    their policies, writes elo.pt to the last round's folder."""
    last, k = rounds[-1], len(rounds)
    files = [earlier.path("policy.pt") for earlier in rounds[:-1]]
    if last.reuse("elo", cfg, files):
        return
    stage = last.begin("elo", cfg, data=files)
    stage.start()
    print(f"    round {k}, step 4: Elo against the initial policy and those of all earlier rounds")
    policy, opponents = last.load_model("policy.pt"), [last.load_model("initial.pt")]
    for earlier in rounds[:-1]:
        opponents.append(earlier.load_model("policy.pt"))
    wins = {}
    for kind in KINDS:
        rows = []
        for j, opponent in enumerate(opponents):
            found = match(last, policy, opponent, kind, cfg.conversations, max_response,
                          f"round {k} against {j},")
            won, lost = found[0, 1].item(), found[1, 0].item()
            stage.log(k, kind=kind, opponent=j, won=won, lost=lost)
            rows.append([won, lost])
        wins[kind] = torch.tensor(rows)  # (k, 2): won and lost against each opponent
    stage.end(wins=wins)


# ---- 2. Elo ------------------------------------------------------------------


def ratings(rounds: list[Run], kind: str) -> tuple[list[float], list[float]]:
    """Elo of the initial policy, which is 0, and of each round's, with standard errors. All others
    are NaN where no finite Elo exists, as for a policy that never lost."""
    n = len(rounds) + 1
    wins = torch.zeros(n, n)
    for k, of_round in enumerate(rounds, start=1):
        found = load(of_round.path("elo.pt"))["wins"][kind]  # (k, 2)
        wins[k, :k], wins[:k, k] = found[:, 0], found[:, 1]
    try:
        elo, covariance = fit_elo(wins)
    except ValueError:
        unknown = [0.0] + [math.nan] * (n - 1)
        return unknown, unknown
    errors = [elo_error(covariance, 0, k) for k in range(n)]
    return elo.tolist(), errors


def show(rounds: list[Run], out: Path):
    """Print the table of all rounds, and write it and the picture to `out`."""
    names = ["initial", *map(str, range(1, len(rounds) + 1))]
    rows = [f"    {'round':8}{'new pairs':>10}{'PM accuracy':>13}{'helpfulness':>13}"
            f"{'harmlessness':>14}", f"    {names[0]:58}"]
    for k, of_round in enumerate(rounds, start=1):
        rows.append(f"    {k:<8}{numbers_of(of_round)}")
    lines = []
    for i, (kind, name) in enumerate(KINDS.items()):
        elo, errors = ratings(rounds, kind)
        line = Line(f"{name} prompts", [], color=i, dash=i)
        rows[0] += f"{'Elo, ' + name:>16}"
        for k, (y, error) in enumerate(zip(elo, errors)):
            rows[k + 1] += f"{y:9.0f} +- {error:3.0f}"
            if math.isfinite(y):
                line.points.append((k, y))
                line.bars.append((k, y - error, y + error))
        lines.append(line)
    table = "\n".join(rows) + "\n"
    print(f"\n{table}    (PM accuracy on the held-out pairs of all rounds so far; true utilities "
          "of the policy;\n    Elo with one standard error)")
    write_atomically(out / "elo.txt", table.encode())
    svg = picture(chart("Elo by crowdworkers, with one standard error", lines, x_title="round",
                        x_names=names))
    write_atomically(out / "elo.svg", svg.encode())
    print(f"    -> {out / 'elo.svg'}")


def numbers_of(of_round: Run) -> str:
    """The cells of the table that come from a round's metrics.jsonl."""
    numbers = {}
    for line in read_lines(of_round.path("metrics.jsonl"), []):
        if line["stage"] in ("online", "rl") or line.get("subset") == "all":
            numbers |= line
    cells = f"{numbers.get('new', 0):10,}"
    for name, width in (("accuracy", 13), ("eval_helpfulness", 13), ("eval_harmlessness", 14)):
        cells += f"{numbers.get(name, math.nan):{width}.3f}"
    return cells
