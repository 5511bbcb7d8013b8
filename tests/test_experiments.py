"""Tests of the scripts in experiments/ and of what they share (lab.py, output.py, exercises.py).

Each verdict is tested on made-up numbers: it must hold, and must fail when any one of its
conditions is broken. All scripts run once at their tiny setting."""
import csv
import dataclasses
import importlib
import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(FOLDER))
import collect
import gallery
import lab
import output
import picture
import rankings
import toy
import toy_corpus
import toy_people
import train_rl
from data import Comparison
from exercises import exercises
from helpers import flat
from pm import score_rows
from ratings import ELO, elo_error, fit_elo
from run import UserError, errors_in_one_sentence
from train_rl import RLConfig

FINDINGS = gallery.scripts()
SCRIPTS = FINDINGS + ["rollout_speed"]  # which runs in test_rollout.py

# ---- 1. Verdicts -------------------------------------------------------------

# Made-up numbers that hold.
GATE = {"gain": 0.1, "rejected 0": 0.9, "lost 0": 0.06, "rejected 10": 0.9, "lost 10": 0.06,
        "untrained": 0.2, "words": 0.7}


def seeds(numbers: dict, n=4) -> list[dict]:
    """The numbers of n seeds, a little apart from each other."""
    return [{name: x + i * 1e-4 for name, x in numbers.items()} for i in range(n)]


def gates(n=4, **changed) -> list[dict]:
    """Numbers of outliers.py; rejected_0 stands for "rejected 0"."""
    return seeds(GATE | {name.replace("_", " "): x for name, x in changed.items()}, n)


def writers(rlhf=0.56, control=0.3, best=0.47, n=4) -> list[dict]:
    rows = []
    for policy, writer, rate in (("RLHF", "median writer", rlhf), ("RLHF", "best writer", best),
                                 ("initial (control)", "median writer", control),
                                 ("initial (control)", "best writer", 0.9)):
        for kind, seen in (("helpful", rate), ("harmless", 0.1)):
            for row in seeds({"win_rate": seen}, n):
                rows.append(row | {"kind": kind, "policy": policy, "against": writer})
    return rows


def elos(rlhf=(80, 80), only=(60, -200), n=4) -> list[dict]:
    """Four seeds of players' Elo on helpful and red-team prompts, some 20 apart from each other."""
    rows = []
    for player, found in (("context-distilled", (0, 0)), ("RLHF", rlhf),
                          ("online RLHF", (70, 999)), ("helpful-only RLHF", only)):
        for kind, elo in zip(("helpful", "harmless"), found):
            for seed in range(n):
                wobble = (2 * seed - 3) * (1.0 if player == "helpful-only RLHF" else 0.1)
                rows.append({"part": "conversations", "seed": seed, "player": player, "kind": kind,
                             "crowd": elo + wobble})
                rows.append(rows[-1] | {"part": "single replies", "crowd": -999})
    return rows


def calibrations(ece=0.02, control=0.2, bias=-0.01, fall=0.1, low=0.02, n=4) -> list[dict]:
    """Rows of calibration.py; the other PMs do not decide."""
    rows, shuffled = [], "sizes of margins shuffled (control)"
    for seed in range(n):
        wobble = seed * 1e-4
        for pm, numbers in (("helpful", (ece, 0.5)), ("mixed", (0.5, bias)),
                            (shuffled, (control, 0.5)), ("mixed, batch 32", (9.0, 9.0))):
            rows.append({"seed": seed, "part": "calibration", "PM": pm,
                         "ECE": numbers[0] + wobble, "bias": numbers[1] + wobble})
        for part, falls in (("threshold", (fall, 0.15)), ("low", (low, 0.05))):
            for quantile, at in ((0.0, 0), (0.7, 1), (0.9, 5)):
                rows.append({"seed": seed, "part": part, "quantile": quantile,
                             "accuracy": 0.8 - at * falls[0] + at * wobble * (part != "low"),
                             "bayes": 0.8 - at * falls[1]})
    return rows


def lines(r2=0.98, in_kl=0.9, slope=1.2, control=0.5, n=4) -> list[dict]:
    """Fits of sqrt_kl.py for two sizes; those at another KL coefficient do not count."""
    rows = []
    for seed in range(n):
        wobble = seed * 1e-4
        for size, size_slope, size_r2 in (("toy", 1.0, 0.99), ("small", slope, r2)):
            row = {"seed": seed, "part": "fit", "size": size, "kl_coef": 0.02,
                   "slope": size_slope, "R2_in_KL": in_kl + wobble}
            rows.append(row | {"by": "common", "R2": size_r2 + wobble})
            rows.append(row | {"by": "untrained", "R2": control + wobble})
            rows.append(row | {"by": "common", "R2": 0.0, "kl_coef": 0.1})
    return rows


def optimized(gap=0.5, fall=0.4, control=-0.3, lost=0.1, truth=0.5, n=4) -> list[dict]:
    """Rows of robustness.py. Where the first run ends, at sqrt(KL) = 2, the test PM confirms 0.75
    of the toy PMs' gain, halfway 0.75 + lost; and half of the small PMs', which end at 4."""
    rows = []
    for seed in range(n):
        wobble = seed * 1e-4
        for size, amount, end, test in (("small", 500, 4.0, 0.5), ("toy", 500, 2.0, 0.75)):
            setting = {"seed": seed, "size": size, "comparisons": amount, "control": False}
            rows.append(setting | {"part": "end", "last_sqrt_kl": end, "gap": gap + end - 2 + wobble,
                                   "fall": fall + end - 2 + wobble})
            rows.append(setting | {"part": "end", "control": True, "gap": control + wobble,
                                   "fall": 9.0, "last_sqrt_kl": 0.1})
            for distance in dict.fromkeys((0.0, 1.0, 2.0, end)):
                share = test + wobble * (size == "toy") + lost * (distance == 1)
                confirmed = min(distance, 2.0) * share
                rows.append(setting | {"part": "path", "sqrt_kl": distance,
                                       "truth": 1.0 + (truth + wobble) * (size == "toy"),
                                       "train_pm": distance, "test_pm": confirmed})
    return rows


def samples(truths=(0.0, 1.0, 1.2, 1.3), control=-0.1, n=4) -> list[dict]:
    """Rows of best_of_n.py; PPO ends 0.05 below best of 64."""
    rows = []
    for seed in range(n):
        wobble = seed * 1e-4
        for step, (samples, truth) in enumerate(zip((1, 4, 16, 64), truths)):
            rows.append({"seed": seed, "by": "PM", "n": samples, "truth": truth + step * wobble})
            rows.append({"seed": seed, "by": "untrained PM (control)", "n": samples,
                         "truth": step * (control + wobble)})
        for iteration, gain in ((0, 0.0), (60, truths[-1] - 0.05)):
            rows.append({"seed": seed, "by": "PPO", "n": iteration, "truth": gain + 2 * wobble})
    return rows


def pretrained(ranked=0.05, binarized=-0.1, control=-0.01, n=4) -> list[dict]:
    """Rows of pmp.py; above 500 comparisons nothing counts."""
    rows = []
    for seed in range(n):
        for comparisons in (0, 100, 500, 4000):
            is_few = comparisons in (100, 500)
            for name, gain in (("none", 0.0), ("ranked", ranked), ("binarized", binarized),
                               ("ranked by coin (control)", control),
                               ("binarized by coin (control)", control)):
                rows.append({"seed": seed, "PMP": name, "comparisons": comparisons, "accuracy":
                             0.6 + (gain + seed * 1e-4 * (name != "none") if is_few else -gain)})
    return rows


def skills(small=0.1, large=0.02, text=-0.01, n=4) -> list[dict]:
    """Rows of alignment_tax.py; RLHF costs 0.02 and 0.01, and distillation the rest."""
    rows = []
    for seed in range(n):
        for size, tax, of_rlhf in (("small", small + seed * 1e-4, 0.02), ("medium", 9.0, 9.0),
                                   ("toy", large, 0.01 + seed * 1e-6)):
            with_text = text if size == "small" else 0.0
            for stage, lost in (("LM", 0.0), ("initial", tax - of_rlhf - seed * 1e-5), ("RLHF", tax),
                                ("RLHF with text (control)", with_text)):
                rows.append({"seed": seed, "size": size, "stage": stage, "zero": 0.9 - lost,
                             "few": 0.5})
    return rows


def snapshots(online=50.0, second=-20.0, n=4) -> list[dict]:
    """Rows of online.py: before the end, the online run was far below the static one."""
    rows = []
    for seed in range(n):
        for policy, gain in (("static", 0.0), ("second static", second), ("online", online)):
            for responses, elo in ((1280, -999.0 * gain), (5120, 100 + gain + seed * 1e-4 * (gain != 0))):
                rows.append({"seed": seed, "part": "snapshot", "policy": policy,
                             "responses": responses, "elo": elo})
    return rows


def tensions(harmless=0.33, helpful=0.38, control=0.51, n=4) -> list[dict]:
    """Rows of tension.py: lambda = 10 costs 0.1 (small) and 0.05 (toy) of helpful accuracy."""
    rows = []
    for seed in range(n):
        wobble = seed * 1e-4
        for part, ends in (("mixture", (harmless, helpful)), ("control", (control, control))):
            for share, found in ((1.0, (9.0, ends[0])), (0.0, (ends[1], 9.0)), (0.4, (9.0, 9.0))):
                rows.append({"seed": seed, "part": part, "size": "toy", "helpful_share": share,
                             "weight": 1, "helpful": found[0] + wobble,
                             "harmless": found[1] + wobble})
        for size, cost in (("small", 0.1 + wobble), ("toy", 0.05)):
            for weight, lost in ((1, 0.0), (3, 9.0), (10, cost)):
                rows.append({"seed": seed, "part": "weight", "size": size, "weight": weight,
                             "helpful_share": 2 / 3, "helpful": 0.7 - lost, "harmless": 9.0})
    return rows


def win_rates(steps=(0.6, 0.7, 0.55), control=0.51, small=0.7, n=4) -> list[dict]:
    """Four seeds' win rates, a little apart. Rows of other pairs do not count."""
    rows = []
    for player, over, rate in (("prompted LM", "LM", steps[0]), ("SFT", "prompted LM", steps[1]),
                               ("SFT", "LM", 0.1), ("PPO", "SFT", steps[2]), ("PPO", "LM", 0.1),
                               ("PPO, coin-flip RM (control)", "SFT", control),
                               ("small PPO-ptx", "prompted LM", small)):
        for row in seeds({"win_rate": rate}, n):
            rows.append(row | {"player": player, "over": over})
    return rows


def arms(written=0.95, mixed=1.05, control=0.4) -> list[dict]:
    """Four seeds, in which the crowd's prompts gain 2 to 5 nats."""
    rows = []
    for seed in range(4):
        wobble = 1 + 0.0002 * (2 * seed - 3)
        for arm, share in (("crowd", 1 / wobble), ("written", written), ("mixed", mixed),
                           ("red-team only", control)):
            rows.append({"prompts": arm, "gain": (2 + seed) * share * wobble})
    return rows


def drifts(up=0.2, down=-0.2, n=4) -> list[dict]:
    """Utilities by turn; turn 1 does not count, nor do the control and the probe."""
    rows = []
    for seed in range(n):
        for kind, moved in (("helpful", up), ("harmless", down)):
            for group, gain, probe in (("picked", moved, 0.5), ("random", 0.0, 0.2),
                                       ("again", 0.03, 9.0)):
                rows.append({"seed": seed, "kind": kind, "group": group, "probe": probe,
                             "LM probe": 2 * probe, "turn 1": 9.0 * gain, "turn 3": 2 + gain,
                             "turn 2": 1 + gain + seed * gain * 1e-3, "turn 4": gain})
    return rows


def policies(best=0.3, alike=0.5, initial=0.2, n=4) -> list[dict]:
    """Of one PM and policy for each group of negotiator.py; only worst has two shares."""
    rows = []
    for seed in range(n):
        for group, share, negotiator, first in (("initial", 0.0, 9.0, 9.0),
                                                ("worst", 0.9, 0.1, 0.2), ("worst", 0.1, 9.0, 9.0),
                                                ("best", 0.9, best, 0.25),
                                                ("worst again", 0.9, 0.11, 9.0)):
            is_most = (group, share) == ("worst", 0.9)
            refused = alike + seed * 1e-4 if is_most else initial if group == "initial" else 0.2
            rows.append({"seed": seed, "group": group, "red_team_share": share,
                         "negotiator": negotiator + seed * 1e-4 * is_most, "on first turns": first,
                         "look-alikes": refused,
                         "others": 0.04 if is_most else 0.02})
    return rows


def scaled(b=0.01, c=0.02, noise=0.0, control=-0.02, n=4) -> list[dict]:
    """Rows of pm_scaling.py on Eq. A.1, up to a zigzag."""
    rows = []
    for seed in range(n):
        for trained_on, slopes in (("helpful", (b, c)), ("labeled by a coin (control)",
                                                        (control, control))):
            for params in (100, 400):
                for k, amount in enumerate((250, 500, 1000, 2000, 4000, 8000)):
                    accuracy = (0.7 + slopes[0] * math.log(params) + slopes[1] * math.log(amount)
                                + noise * (-1) ** k + seed * 1e-4 * math.log(amount * params))
                    rows.append({"seed": seed, "trained_on": trained_on, "tested_on": "helpful",
                                 "params": params, "comparisons": amount, "accuracy": accuracy,
                                 "bayes": 1.2})
    return rows


def sft_epochs(loss=0.01, score=0.2, truth=0.3, fresh=-0.02, cooled=0.28, n=4) -> list[dict]:
    """What changes from the best epoch to the last, to the cooled best one (its truth only), and to
    the control (its loss only)."""
    names, rows = ("loss", "loss without mistakes", "score", "truth"), []
    for seed in range(n):
        for role, moved in (("", (9.0,) * 4), ("best", (0.0,) * 4),
                            ("last", (loss, 0.0, score, truth + seed * 1e-4)),
                            ("best, cooled", (0.005, 0.0, 0.1, cooled)),
                            ("fresh", (fresh, 0.0, 9.0, 9.0))):
            row = {"seed": seed, "epoch": 2, "role": role, "loss with mistakes": 0.6}
            rows.append(row | {name: seed + x for name, x in zip(names, moved)})
    return rows


def two_ways(many=0.02, few=0.03, gap=0.05, control=0.0, n=4) -> list[dict]:
    """What shuffled pairs have more than grouped ones: of held-out loss, and of the gap."""
    rows = []
    for seed in range(n):
        for data, part, loss, more in (("many prompts", 0, many, -9.0),
                                       ("few prompts", 0, few - 1, gap - 1),
                                       ("few prompts", 1, few + 1, gap + 1 + seed * 1e-4),
                                       ("few, no reply twice (control)", 0, 0.5, control)):
            for way, share in (("grouped", 0), ("shuffled", 1)):
                rows.append({"seed": seed, "data": data, "part": part, "way": way,
                             "trained loss": 0.0, "held-out loss": 5 + seed + share * loss,
                             "gap": seed + share * more})
    return rows


def folds(drop=0.03, control=0.0, n=4) -> list[dict]:
    """Accuracies by the labeler left out, who is right on 0.1 more or less than the others."""
    rows = []
    for seed in range(n):
        for group, its_drop in (("five kinds", drop), ("one kind (control)", control)):
            for left_out, more in (("exact", 0.1), ("hurried", -0.1)):
                rows.append({"seed": seed, "labelers": group, "left out": left_out,
                             "seen": 0.72 + its_drop * (group == "one kind (control)"),
                             "unseen": 0.72 + more, "agreement": 0.7})
                if group == "five kinds":
                    rows[-1]["unseen"] -= its_drop + seed * 1e-4
    return rows


def taxed(ppo=0.5, ptx=1.2, high_kl=0.9, control=0.7, gain=0.95, n=4) -> list[dict]:
    """Policies of ptx.py. The SFT model's skill is 1, and PPO gains 1."""
    rows = []
    for seed in range(n):
        for policy, skill, gained in (("SFT", 1.0, 0.0), ("PPO", ppo, 1.0), ("LM", 9.0, 0.0),
                                      ("PPO-ptx, gamma 0.3", ptx, gain),
                                      ("PPO, beta x 100", high_kl, 0.2),
                                      ("PPO-ptx, gamma 0.3, no skills (control)", control, -9.0),
                                      ("PPO-ptx, gamma 0.3, dialogues", 9.0, -9.0)):
            rows.append({"seed": seed, "policy": policy, "skill": skill * (1 + 1e-4 * seed),
                         "gain": gained})
    return rows

def followed(sft=0.6, ppo=0.8, control=0.6, new=0.5, lm_new=0.2, n=4) -> list[dict]:
    """Shares of constraints that were followed, of which 0.2 by chance."""
    rows = []
    for seed in range(n):
        for player, taught, on_new in (("LM", 0.1, lm_new), ("SFT", sft, 0.4), ("PPO", ppo, new),
                                       ("PPO, constraints ignored (control)", control, 0.3)):
            for part, share in (("taught", taught), ("new subject", on_new), ("new words", 9.0)):
                rows.append({"seed": seed, "part": part, "player": player, "unasked": 0.2,
                             "followed": share + seed * 1e-4 * (player in ("PPO", "LM"))})
    return rows


def toxic(respectful=0.1, none=0.2, careless=0.7, control=(0.0, 0.0), n=4) -> list[dict]:
    """Shares of toxic replies; the LM's are 0.2, 0.2 and 0.4."""
    rows = []
    for seed in range(n):
        for player, shares in (("LM", (0.2, 0.2, 0.4)),
                               ("PPO, serves the user", (respectful, none, careless)),
                               ("PPO, always minds (control)", (0.0, *control))):
            for header, share in zip(("respectful", "none", "careless"), shares):
                rows.append({"seed": seed, "player": player, "header": header,
                             "toxic": share + seed * 1e-4 * (player != "LM")})
    return rows


def honest(right=0.8, made_up=(0.2, 0.3), control=(0.3, 0.7), n=4) -> list[dict]:
    """Shares of right replies to open questions (the LM's is 0.4), and of made-up replies to open
    and to closed ones (the LM's are 0.36 and 0.6)."""
    rows = []
    for seed in range(n):
        for player, right_open, shares in (
                ("LM", 0.4, (0.36, 0.6)), ("PPO", right, made_up),
                ("PPO, facts unchecked (control)", 0.9, control)):
            for kind, share in zip(("open", "closed"), shares):
                wobble = seed * 1e-4 * (player != "LM")
                rows.append({"seed": seed, "questions": kind, "player": player,
                             "right": right_open + wobble if kind == "open" else 9.0,
                             "made up": share + wobble})
    return rows



# Of each script: arguments of `verdict` that hold; then arguments each of which breaks one
# condition, with the outcome where it is not plain "DOES NOT HOLD"; then what the sentence says.
NO, PART, OPEN = "DOES NOT HOLD", "HOLDS IN PART", "NOT DECIDED"
VERDICTS = {
    "alignment_tax": (
        (skills(),),
        [(skills(small=-0.01),), (skills(large=0.11),), (skills(n=3), OPEN)],
        ["zero-shot tax at small: 0.100 [", "less that at toy: 0.080 [",
         " HOLDS: so does RLHF alone. zero-shot tax at small: 0.020 [", "at toy: 0.010 [",
         "Control, DOES NOT HOLD: zero-shot tax at small: -0.090", "DOES NOT HOLD: RLHF gives the",
         "zero-shot gain at toy: -0.010 ["]),
    "best_of_n": (
        (samples(),),
        [(samples(truths=(0, -0.1, 1.0, 1.1)),), (samples(truths=(0, 1.0, 0.9, 1.1)),),
         (samples(truths=(0, 1.0, 1.2, 1.1)),), (samples(control=0.1),), (samples(n=3), OPEN)],
        ["from 1 to 4: 1.000 [", "from 4 to 16: 0.200 [", "from 16 to 64: 0.100 [",
         "Control, DOES NOT HOLD: from 1 to 4: -0.100", "HOLDS: PPO is as good as best of 64",
         "less that: -0.050 ["]),
    "calibration": (
        (calibrations(),),
        [(calibrations(ece=0.031),), (calibrations(control=0.029),), (calibrations(n=3), OPEN)],
        ["its ECE: 0.020 [", "the control: 0.200 [", "HOLDS: it is less often right",
         "than on all pairs by: 0.100 [", "The ceiling falls by 0.150",
         "HOLDS: a PM of both kinds is under-confident. its confidence less its accuracy: -0.010"]),
    "conversations": (
        (drifts(),),
        [(drifts(up=-0.2),), (drifts(down=0.2),), (drifts(n=3), OPEN),
         (drifts(up=0.0) + [row | {"seed": 4 + row["seed"]} for row in drifts(up=-0.1)], OPEN)],
        ["helpful: 0.200 [", "red-teaming: -0.200 [", "random): +0.030 and +0.030",
         "the end: +0.300 and +0.300 (asked of the plain LM: +0.600 and +0.600)"]),
    "elo": (
        (elos(),),
        [(elos(rlhf=(-1, 80)),), (elos(rlhf=(80, -1)),), (elos(only=(20, -200)),),
         (elos(only=(80, 90)),), (elos(only=(45, -200)), OPEN), (elos(n=3), OPEN)],
        ["Elo of RLHF above the initial policy, helpful: 80.000 [",
         "helpful-only above RLHF, helpful: -20.000 [", "threshold above -35",
         "RLHF above helpful-only, red-team: 280.000 [", "DOES NOT HOLD: with about as many"]),
    "grouped": (
        (two_ways(control=0.02),),  # that shuffling overfits has a sentence of its own
        [(two_ways(many=-0.02),), (two_ways(few=-0.02),), (two_ways(n=3), OPEN)],
        ["many prompts: 0.020 [", "few prompts: 0.030 [", "DOES NOT HOLD: shuffled pairs overfit",
         "few prompts: 0.050 [", "(control): 0.020 ["]),
    "honesty": (
        (honest(),),
        [(honest(right=0.59),), (honest(made_up=(0.25, 0.3)),), (honest(made_up=(0.2, 0.41)),),
         (honest(control=(0.23, 0.7)),), (honest(control=(0.3, 0.39)),), (honest(n=3), OPEN)],
        ["1.5 of the LM's: 0.200 [", "open, made up less two thirds of the LM's: -0.040 [",
         "closed, made up less two thirds of the LM's: -0.100 [",
         "control: open, made up less two thirds of the LM's: 0.060 [",
         "control: closed, made up less two thirds of the LM's: 0.300 ["]),
    "instructgpt": (
        (win_rates(small=0.4),),  # the small policy has a sentence of its own
        [(win_rates(steps=(0.49, 0.7, 0.55)),), (win_rates(steps=(0.6, 0.4, 0.55)),),
         (win_rates(steps=(0.6, 0.7, 0.49)),), (win_rates(control=0.56),),
         (win_rates(control=0.54985), OPEN), (win_rates(n=3), OPEN)],
        ["prompted LM over LM: 0.600 [", "SFT over prompted LM: 0.700 [", "PPO over SFT: 0.550 [",
         "(control) over SFT: 0.510 [", "DOES NOT HOLD: a small policy"]),
    "instructions": (
        (followed(),),  # the new subject has a sentence of its own
        [(followed(sft=0.09),), (followed(ppo=0.59),), (followed(control=0.66),),
         (followed(n=3), OPEN)],
        ["SFT less LM: 0.500 [", "PPO less SFT: 0.200 [", "the control less SFT: 0.000 [",
         "HOLDS: this carries over", "PPO, asked less unasked: 0.300 [",
         "LM, asked less unasked: 0.000 ["]),
    "labelers": (
        (folds(),),
        [(folds(drop=-0.01),), (folds(drop=0.06),), (folds(control=0.02),), (folds(n=3), OPEN)],
        ["(IG: 0.028): 0.030 [", "the control: 0.000 [", "Accuracy 0.720 and 0.690",
         "agree with each other on 0.700"]),
    "model_prompts": (
        (arms(),),
        [(arms(written=0.89),), (arms(written=1.11),), (arms(mixed=0.89),), (arms(mixed=1.11),),
         (arms(control=0.91),), (arms(written=0.9001), OPEN), (arms()[:12], OPEN)],
        ["written ones: 0.950 [", "half of each: 1.050 [", "the control: 0.400 ["]),
    "negotiator": (
        (policies(),),
        [(policies(best=0.05),), (policies(n=3), OPEN)],
        ["best less worst: 0.200 [", "worst again less worst +0.010",
         "turns, best less worst +0.050"]),
    "online": (
        (snapshots(),),
        [(snapshots(online=-10.0),), (snapshots(second=30.0),), (snapshots(n=3), OPEN)],
        ["less the static one's: 50.000 [", "Control, DOES NOT HOLD: Elo", "-20.000 ["]),
    "outliers": (
        (gates(),),
        [(gates(rejected_0=0.4),), (gates(lost_0=0.11),), (gates(untrained=0.6),),
         (gates(n=3), OPEN)],
        ["threshold below 0.1", " HOLDS: so does a gate with 10", "the words': 0.200 [",
         " HOLDS: 10 examples", "gain in AUROC: 0.100 ["]),
    "pm_scaling": (
        (scaled(),),
        [(scaled(b=-0.01),), (scaled(c=-0.01),), (scaled(noise=0.1),), (scaled(control=0.02),),
         (scaled(n=3), OPEN)],
        ["b (size; HH 0.007): 0.010 [", "c (comparisons; HH 0.015): 0.020 [", "R^2: 1.000 [",
         "Control, DOES NOT HOLD: b", "DOES NOT HOLD: the distance to the ceiling"]),
    "pmp": (
        (pretrained(),),
        [(pretrained(ranked=-0.01),), (pretrained(control=0.02),), (pretrained(n=3), OPEN)],
        ["with ranked PMP less without: 0.050 [", "Control, DOES NOT HOLD: accuracy with ranked",
         "DOES NOT HOLD: binarized PMP helps", "with binarized PMP less without: -0.100 ["]),
    "ptx": (
        (taxed(),),
        [(taxed(ppo=1.1),), (taxed(ptx=0.95),), (taxed(high_kl=1.3),), (taxed(control=1.1),),
         (taxed(n=3), OPEN)],
        ["tax, SFT less PPO: 0.500 [", "gamma 0.3, less SFT: 0.200 [", "beta x 100: 0.300 [",
         "(control), less SFT: -0.300 [", "HOLDS: it costs", "90% of PPO's: 0.050 [",
         "(PPO 1.000): PPO-ptx, gamma 0.3 +0.700 and 0.950; PPO, beta x 100 +0.400 and 0.200"]),
    "robustness": (
        (optimized(),),
        [(optimized(gap=-0.1),), (optimized(fall=-0.1),), (optimized(control=0.1),),
         (optimized(lost=-0.1),), (optimized(n=3), OPEN)],
        ["train PM's gain less the test PM's: 0.500 [", "fall of the truth from its peak: 0.400 [",
         "Control, DOES NOT HOLD: train PM's gain less the test PM's: -0.300 [",
         "share confirmed halfway less that at the end: 0.100 [",
         " HOLDS: larger PMs are more robust", "toy less small: 0.250 [", "small: 0.500 ["]),
    "sft": (
        (sft_epochs(cooled=0.1),),  # that the cooled epoch is as good has a sentence of its own
        [(sft_epochs(loss=-0.01),), (sft_epochs(score=-0.1),), (sft_epochs(truth=-0.1),),
         (sft_epochs(fresh=0.005),), (sft_epochs(truth=0.0), OPEN), (sft_epochs(n=3), OPEN)],
        ["loss (nats a token): 0.010 [", "Control, DOES NOT HOLD: loss (nats a token): -0.020 [", "RM score (logits): 0.200 [", "true utility: 0.300 [",
         "DOES NOT HOLD: at equal certainty", "last less cooled: 0.200 [",
         "loss by +0.005 and its true utility by +0.100"]),
    "sqrt_kl": (
        (lines(),),
        [(lines(r2=0.94),), (lines(in_kl=0.995),), (lines(slope=1.4),), (lines(control=0.98),),
         (lines(n=3), OPEN)],
        ["lowest R^2: 0.980 [", "a line in KL by: 0.080 [", "steepest slope over flattest: 1.200 [",
         "Control, DOES NOT HOLD: lowest R^2: 0.500"]),
    "tension": (
        (tensions(),),
        [(tensions(harmless=0.51),), (tensions(helpful=0.51),), (tensions(control=0.4),),
         (tensions(n=3), OPEN)],
        ["helpful-only PM on harmless comparisons: 0.330 [", "Control, DOES NOT HOLD: helpful-only",
         "PM on helpful comparisons: 0.380 [", "HOLDS: lambda = 10", "small less toy: 0.050 [",
         "0.100 (small) and 0.050 (toy)"]),
    "toxicity": (
        (toxic(),),
        [(toxic(respectful=0.16),), (toxic(none=0.14),), (toxic(careless=0.39),),
         (toxic(control=(0.16, 0.0)),), (toxic(control=(0.0, 0.41)),), (toxic(n=3), OPEN)],
        ["0.75 of the LM's: -0.050 [", "no header: 0.000 [", "careless: 0.300 [",
         "no header, the control: -0.200 [", "careless, the control: -0.400 ["]),
    "writers": (
        (writers(best=0.3),),  # the best writer has a sentence of its own
        [(writers(rlhf=0.49),), (writers(control=0.51),), (writers(rlhf=0.5), OPEN),
         (writers(n=3), OPEN)],
        ["win rate of RLHF: 0.560 [", "DOES NOT HOLD: it is nearly as good as the best"]),
}


def test_every_finding_has_its_verdict_tested_and_the_readme_names_every_script():
    readme = (FOLDER / "README.md").read_text()
    assert sorted(VERDICTS) == FINDINGS
    assert [name for name in SCRIPTS if f"experiments/{name}.py" not in readme] == []


@pytest.mark.parametrize("name", VERDICTS)
def test_a_verdict_fails_as_soon_as_one_condition_does(name):
    verdict = importlib.import_module(name).verdict
    good, bad, words = VERDICTS[name]
    outcome, sentence = verdict(*good)
    assert outcome == "HOLDS" and sentence.startswith("HOLDS: ")
    assert [part for part in words if part not in sentence] == []
    for arguments in bad:
        expected = arguments[-1] if arguments[-1] in (PART, OPEN) else NO
        outcome, sentence = verdict(*[value for value in arguments if value not in (PART, OPEN)])
        assert outcome == expected and sentence.startswith(expected), arguments


def test_larger_pms_and_the_tax_of_rlhf_have_their_own_verdicts():
    robustness, tax = (importlib.import_module(name) for name in ("robustness", "alignment_tax"))
    assert "DOES NOT HOLD: larger PMs" in robustness.verdict(optimized(truth=-0.1))[1]
    assert "DOES NOT HOLD: so does RLHF alone" in tax.verdict(skills(text=0.2))[1]


def test_gains_of_best_of_n_and_of_ppo_have_one_baseline(monkeypatch):
    """Two prompts with 64 replies each. The PM picks by the truth, random PMs pick the first."""
    script, judges = importlib.import_module("best_of_n"), []
    truth = torch.arange(128.0).view(2, 64)  # means 31.5 and 95.5
    run = SimpleNamespace(seed=3)
    monkeypatch.setattr(lab, "load", lambda run: "initial")
    monkeypatch.setattr(lab, "comparisons", lambda run, n: [])
    monkeypatch.setattr(lab, "train_pm_on", lambda run, pairs: "PM")
    monkeypatch.setattr(lab, "untrained_pm", lambda run: f"random {run.seed}")
    monkeypatch.setattr(lab, "drawn_prompts", lambda run, cfg: SimpleNamespace(
        draw=lambda n, name, held_out: (n, held_out)))

    def judge(run, policy, pms, prompts, replies):
        judges.append((policy, pms, prompts, replies))
        if policy != "initial":
            return torch.stack([torch.full((2, replies), 7.0), torch.full((2, replies), 70.0)])
        return torch.stack([truth] + [-truth] * (len(pms) - 1) + [truth])
    monkeypatch.setattr(lab, "judge", judge)
    monkeypatch.setattr(script, "measure", lambda run, cfg, policy, reference, pm, prompts: (
        None, None, torch.tensor([1.0, 4.0])))

    def ppo(run, pm, cfg, initial, watch, prompts):
        watch(SimpleNamespace(policy="trained"))
        return None, [{"iteration": 60, "kl": 99.0}]
    monkeypatch.setattr(lab, "ppo", ppo)
    rows = script.one_seed(run, RLConfig(), 10, 2)
    assert judges[0][1:] == (["PM"] + [f"random {3 + 1000 * k}" for k in range(5)], (2, True), 64)
    assert judges[1] == ("trained", ["PM"], (2, True), 4)
    [trained] = output.select(rows, by="PPO")
    assert trained == {"seed": 3, "by": "PPO", "n": 60, "kl": 2.5, "score": 7.0 - 63.5,
                       "truth": 70.0 - 63.5}
    assert script.at(rows, "PM", 64) == [pytest.approx(95.0 - 63.5)]  # the last of each 64
    assert script.at(rows, script.UNTRAINED, 64) == [pytest.approx(32.0 - 63.5)]  # the first
    assert len(output.select(rows, by=script.UNTRAINED, n=16)) == 5


def test_a_gate_that_knows_examples_has_its_own_verdict():
    verdict = importlib.import_module("outliers").verdict
    for numbers in (gates(rejected_10=0.4, words=0.1), gates(lost_10=0.11), gates(words=0.95)):
        assert "DOES NOT HOLD: so does a gate" in verdict(numbers)[1]


def test_over_refusal_has_its_own_verdict():
    refusal_verdict = importlib.import_module("negotiator").refusal_verdict
    for rows, expected in ((policies(), "HOLDS"), (policies(alike=0.1), NO), (policies(n=3), OPEN),
                           (policies(initial=0.6), NO)):
        outcome, sentence = refusal_verdict(rows)
        assert outcome == expected and sentence.startswith(expected)
        assert "benign requests +0.020" in sentence and "other people " in sentence
    assert "90% less 10% red-team prompts: 0.300 [" in refusal_verdict(policies())[1]
    assert "same share, other people -0.300" in refusal_verdict(policies())[1]


@pytest.mark.parametrize("changed, expected", [({"new": 0.19}, NO), ({"lm_new": 0.26}, NO),
                                               ({"n": 3}, OPEN), ({}, "HOLDS")])
def test_constraints_on_a_new_subject_have_their_own_verdict(changed, expected):
    sentence = importlib.import_module("instructions").verdict(followed(**changed))[1]
    assert f"{expected}: this carries over to a subject" in sentence


# ---- 2. Numbers behind the verdicts ------------------------------------------


def test_means_errors_and_selected_rows_by_hand():
    some = [{"n": 2, "x": 1.0}, {"n": 1, "x": 2.0}, {"n": 2, "x": 3.0}]
    assert output.samples(some, "x", "n", (1, 2, 5)) == [[2.0], [1.0, 3.0], []]
    mean, se = output.mean_se([1.0, 2.0, 6.0])  # deviations -2, -1, 3: variance 14 / 2
    assert (mean, se) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert math.isnan(output.mean_se([1.0])[1])  # so that no threshold in errors is passed
    rows = [{"a": 1, "b": 2}, {"a": 1}, {"a": 2, "b": 2}]
    assert output.select(rows, a=1, b=2) == rows[:1] and output.select(rows, b=2) == rows[::2]
    rows = []
    for seed, x, y in ((0, 1.0, 2.0), (1, 3.0, 7.0), (0, 5.0, 5.0)):
        rows.append({"seed": seed, "name": "a", "n": 4 + (x == 5), "x": x, "text": "", "y": y})
    assert output.means(rows, ("name", "n"))[0] == {"name": "a", "n": 4, "x": 2.0, "y": 4.5}
    [_, last] = output.means(rows, ("name", "n"), ("y",), errors=True)
    assert list(last) == ["name", "n", "y", "+- y"] and (last["n"], last["y"]) == (5, 5.0)
    [row] = output.means(rows, ("name",), ("x",), errors=True)
    assert row["+- x"] == output.mean_se([1, 3, 5])[1]
    assert output.less([5.0, 2.0], [2.0, 1.0], share=2.0) == [1.0, 0.0]
    assert output.less([5.0], [2.0]) == [3.0]


def test_where_a_path_crosses_and_where_it_leaves_its_line():
    at_distance = importlib.import_module("robustness").at_distance
    points = [{"sqrt_kl": x, "y": y} for x, y in ((0.0, 0.0), (2.0, 1.0), (1.0, 5.0), (4.0, 8.0))]
    assert at_distance(points, 1.5, "y") == pytest.approx(0.75)  # the first crossing
    assert at_distance(points, 3.0, "y") == pytest.approx(7.0)
    assert at_distance(points, 4.5, "y") == 8.0  # never reached: the end
    for scores, expected in (([0.0, 1.0, 1.7, 2.0], 2.0), ([0.0, 1.0, 2.1, 3.2], math.nan),
                             ([0.0, 0.5, 2.0, 2.0], 3.0)):  # it came back before
        found = importlib.import_module("sqrt_kl").leaves([0.0, 1.0, 2.0, 3.0], scores, 1.0, 0.0)
        assert found == pytest.approx(expected, nan_ok=True)


def test_a_fall_is_measured_on_other_prompts_than_its_peak():
    """The peak of `path` is point 1; on the judged prompts, the truth is highest at point 2."""
    truths, gains = [0.0, 3.0, 2.0, 1.0], torch.zeros(4, 3, 2)  # (points, PMs and truth, prompts)
    path = [{"iteration": i, "sqrt_kl": float(i), "truth": t} for i, t in enumerate(truths)]
    gains[:, 2] = torch.tensor([[0.0, 0.0], [2.0, 4.0], [9.0, 9.0], [1.0, 1.0]])
    gains[3, 0], gains[3, 1] = torch.tensor([5.0, 7.0]), torch.tensor([4.0, 4.0])
    end = importlib.import_module("robustness").describe_end(path, gains)
    # Paired differences: gaps 1 and 3, falls 1 and 3, so mean 2 and error sqrt(2) / sqrt(2).
    expected = dict(peak_at=1, truth_peak=3, truth_end=1, gap=2, gap_se=1, fall=2, fall_se=1)
    assert {name: end[name] for name in expected} == pytest.approx(expected)


def test_a_power_law_of_the_distance_to_the_ceiling_predicts_what_it_was_not_fitted_to():
    pm_scaling, rows = importlib.import_module("pm_scaling"), []
    for params in (100, 400):
        for amount in (250, 500, 1000, 2000, 4000, 8000):
            distance = 3 * params**-0.3 * amount**-0.4
            rows.append({"params": params, "comparisons": amount, "bayes": 0.8,
                         "accuracy": 0.8 - distance})
    line, power = pm_scaling.prediction_errors(rows)
    assert power < 1e-9 and line > 0.001
    for row in rows:  # and a line, if it is one
        row["accuracy"] = 0.3 + 0.01 * math.log(row["params"]) + 0.02 * math.log(row["comparisons"])
    line, power = pm_scaling.prediction_errors(rows)
    assert line < 1e-9 < power


def test_pmp_gains_are_taken_within_a_seed_and_averaged_where_comparisons_are_few():
    pmp, rows = importlib.import_module("pmp"), []
    for seed, found in ((0, {"none": (0.9, 0.5, 0.6, 0.7), "ranked": (0.9, 0.6, 0.9, 0.7)}),
                        (1, {"none": (0.9, 0.7, 0.7, 0.9), "ranked": (0.9, 0.6, 0.7, 0.9)})):
        for name, accuracies in found.items():
            for n, accuracy in zip((0, 100, 500, 1000), accuracies):
                rows.append({"seed": seed, "PMP": name, "comparisons": n, "accuracy": accuracy})
    assert pmp.gains(rows, "ranked", 100) == pytest.approx([0.1, -0.1])
    assert pmp.gains_where_few(rows, "ranked") == pytest.approx([0.2, -0.05])


def test_outlier_errors_are_over_splits_and_the_best_detector_is_chosen_per_size():
    outliers, rows = importlib.import_module("outliers"), []
    for size, layer, *aurocs in (("toy", 0, 0.6, 0.8, 0.9), ("toy", 1, 0.7, 0.9, 0.9),
                                 ("small", 0, 1.0, 1.0, 1.0)):
        for split, auroc in zip((0, 0, 1), aurocs):
            rows.append(dict(size=size, token="last", layer=layer, method="exposure", M=10,
                             split=split, draw=0, auroc=auroc, against_look_alikes=0.5, seed=0,
                             rejected=0.5, lost=0.0, lost_look_alikes=0.0))
    best = outliers.best(outliers.summarize(rows), "toy", 10)
    assert best["layer"] == 1  # splits' means 0.8 and 0.9: 0.85 +- 0.05
    assert (best["AUROC"], best["+-"], best["look-alikes"]) == pytest.approx((0.85, 0.05, 0.5))


def test_a_gate_by_hand():
    """Of the scores 0 to 100 that tune it, 95 is the 95% quantile. Scores above it are rejected."""
    alike = torch.tensor([False, True, False, True])
    inner, outer = torch.tensor([0.0, 96.0, 95.0, 3.0]), torch.tensor([94.0, 99.0])
    rates = importlib.import_module("outliers").gate(torch.arange(101.0), inner, outer, alike)
    assert rates == pytest.approx({"rejected": 0.5, "lost": 0.25, "lost_look_alikes": 0.5})


def test_a_seed_of_gates_takes_the_last_block_and_the_detector_for_its_examples():
    outliers, rows, rejected = importlib.import_module("outliers"), [], 0.0
    for method, m in (("relative", 0), ("Mahalanobis", 0), ("exposure", 10), ("exposure", 1)):
        for token in ("mean", "last"):
            for layer in (0, 1):
                rejected += 0.01
                row = dict(size="toy", token=token, layer=layer, method=method, M=m, draw=0,
                           seed=0, split=0, rejected=rejected, lost=rejected / 2, auroc=rejected,
                           against_look_alikes=0.0, lost_look_alikes=0.0)
                # An untrained model's mean token rejects more than its last one.
                more = 0.5 if (token, layer) == ("mean", 1) else 0.1
                rows += [row, row | {"size": "untrained", "rejected": rejected + more}]
    rows.append(rows[0] | {"size": "words", "token": "words", "method": "exposure", "M": 10,
                           "rejected": 0.7})
    found = outliers.of_seed(rows + [row | {"size": "small", "rejected": 9.0}])
    # 4 rows of each detector, the last of them for the last token after the last block.
    assert found == pytest.approx({"gain": 0.12 - 0.08, "rejected 0": 0.04, "lost 0": 0.02,
                                   "rejected 10": 0.12, "lost 10": 0.06, "untrained": 0.52,
                                   "words": 0.7})


def test_words_are_the_tokens_that_a_prompt_holds():
    held = importlib.import_module("outliers").tokens_held([[1, 3, 1], [0]], 5)
    assert held.tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]


def test_writers_are_careful_people_and_the_best_and_median_are_picked_by_the_truth(monkeypatch):
    writers, rng = importlib.import_module("writers"), Random(0)
    for writer in [writers.hire(rng) for _ in range(50)]:
        for field in dataclasses.fields(writer):
            kind, ours = getattr(toy_corpus.KIND, field.name), getattr(writer, field.name)
            if field.name == "rude":
                assert ours == kind == 0
            elif field.name in ("right", "offers", "polite"):
                assert kind < ours < 1, field.name
            else:
                assert 0 < ours < kind, field.name
    skills = iter([5, 1, 9, 3, 7] + [8, 2] * 6)  # 17: the highest is 9, the ninth 5
    monkeypatch.setattr(writers, "hire", lambda rng: dataclasses.replace(
        writers.IDEAL, right=next(skills) / 10))
    monkeypatch.setattr(writers, "write", lambda writer, prompts, rng: [writer.right])
    monkeypatch.setattr(writers, "mean_truth", lambda prompts, replies, kind: replies[0])
    found = writers.choose_writers(SimpleNamespace(rng=lambda *name: Random(1)), 2)
    assert {name: writer.right for name, writer in found.items()} == {
        "median writer": 0.5, "best writer": 0.9}


def test_a_win_rate_is_that_of_the_policy(monkeypatch):
    """Our reply is right, theirs evades: 3 nats, so odds of e^3 : 1; the PM says 1 logit."""
    writers, rng = importlib.import_module("writers"), Random(3)
    prompts = [toy_corpus.draw_prompt(rng, "helpful", held_out=True) for _ in range(3)]
    ours = [" " + toy.understand(p).answer + "." for p in prompts]
    monkeypatch.setattr(lab, "score_replies", lambda run, pm, prompts, replies: torch.tensor(
        [1.0 if reply in ours else 0.0 for reply in replies]))
    row = writers.compare(None, None, prompts, ours, [" I do not know."] * 3, "helpful")
    assert row == pytest.approx({"win_rate": 1 / (1 + math.exp(-3)), "+-": 0, "truth": 3,
                                 "by_pm": 1 / (1 + math.exp(-1)), "writer_truth": 0})


def test_the_pm_chooses_on_the_crowds_own_pairs():
    """The player with the higher score wins each pair. Crowdworkers judge the same pairs."""
    elo = importlib.import_module("elo")
    run = SimpleNamespace(rng=lambda *name: Random(5))
    pairs = lab.pairs_by_lot(run, "helpful", 300, 3)
    assert len(pairs) == len({k for k, *_ in pairs}) == 300  # three players: one pair a prompt
    scores = torch.zeros(3, 300)
    scores[1, :225] = 1.0  # on three prompts in four player 1 is the best, else the worst
    scores[1, 225:] = -1.0
    scores[2] = 0.5        # player 2 beats player 0 each time
    games = {(i, j): [k for k, *pair, _ in pairs if sorted(pair) == [i, j]]
             for i, j in ((0, 1), (0, 2), (1, 2))}
    wins = 0.5 * torch.ones(3, 3)
    for (i, j), ks in games.items():
        for k in ks:
            winner, loser = (i, j) if scores[i, k] > scores[j, k] else (j, i)
            wins[winner, loser] += 1
    assert elo.pm_elo(run, "helpful", scores).tolist() == pytest.approx(fit_elo(wins)[0].tolist())
    assert wins[1, 0] > 3 * wins[0, 1] / 2 and wins[2, 0] > 50


def test_each_policy_of_elo_has_a_centered_pm_and_the_prompts_of_the_comparisons(monkeypatch):
    """A PM is the list of what it learned from, a policy the PM that it was trained against."""
    elo, centered, asked = importlib.import_module("elo"), [], []
    run = SimpleNamespace(rng=lambda *name: Random(5), load_model=lambda name: name,
                          path=lambda name: Path(name))
    monkeypatch.setattr(elo, "read_comparisons", lambda path, kind: (
        [f"{path.stem} {kind} {i}" for i in range(6)], None))
    monkeypatch.setattr(elo, "compare_again", lambda run, pairs, name, *speakers: [name])
    monkeypatch.setattr(lab, "load", lambda run: "initial")
    monkeypatch.setattr(lab, "train_pm_on", lambda run, pairs, weight, start: list(pairs))
    monkeypatch.setattr(lab, "center", lambda run, pm, pairs: centered.append(pairs) or pm)
    monkeypatch.setattr(elo, "Prompts", lambda run, room, share: f"prompts, {share:.2f}")

    def ppo(run, pm, cfg, initial, watch, prompts):
        asked.append(prompts)
        for snapshot in range(2 if watch else 0):
            watch(SimpleNamespace(policy=snapshot))
        return SimpleNamespace(policy=pm), []
    monkeypatch.setattr(lab, "ppo", ppo)
    cfg = RLConfig(harmless_share=0.25)
    pm, players = elo.train_players(run, cfg, cfg)
    assert (pm, players[elo.BASE], players[elo.RLHF]) == ("pm.pt", "initial", "policy.pt")
    assert asked == ["prompts, 0.25", "prompts, 0.25", "prompts, 0.00"]
    both = [f"test {kind} {i}" for kind in lab.KINDS for i in range(6)]
    assert centered == [both, both, both[:6], both]  # helpful-only RLHF: the third
    of_helpful = [pair for pair in players[elo.ONLINE] if "train helpful" in pair]
    assert len(of_helpful) == 2 and players[elo.ONLINE][-2:] == ["rejection sampling", "online"]
    assert sorted(players[elo.HELPFUL]) == [f"train helpful {i}" for i in range(6)]


def test_comparisons_are_made_again_on_the_same_prompts():
    elo, prompt = importlib.import_module("elo"), "\n\nHuman: What is 2 + 1?\n\nAssistant:"
    pairs = [SimpleNamespace(prompt=prompt)] * 60
    run = SimpleNamespace(rng=lambda *name: Random(5))
    good, bad, empty = ((lambda prompts, name, text=text: [text] * len(prompts))
                        for text in (" 3.", " I do not know.", " "))
    found = elo.compare_again(run, pairs, "a name", good, bad)
    assert {pair.prompt for pair in found} == {prompt} and len(found) == 60
    assert sum(pair.chosen == " 3." for pair in found) > 50  # odds of e^3 : 1
    assert elo.compare_again(run, pairs, "a name", good, good) == []
    some = elo.compare_again(run, pairs, "a name", good, bad, empty)  # one pair in three
    assert 0 < len(some) < 40 and all(pair.rejected.strip() for pair in some)


def test_elo_by_conversations_counts_each_players_choices(monkeypatch):
    elo = importlib.import_module("elo")
    won = {("a", "b"): (3, 1), ("a", "c"): (2, 4), ("b", "c"): (1, 5)}

    def match(run, a, b, *_):
        return torch.tensor([[0, won[a, b][0]], [won[a, b][1], 0]])
    monkeypatch.setattr(elo, "match", match)
    rows = elo.conversations(SimpleNamespace(seed=7), "helpful", 4, dict(A="a", B="b", C="c"))
    wins = torch.tensor([[0, 3.5, 2.5], [1.5, 0, 1.5], [4.5, 5.5, 0]])
    expected, covariance = fit_elo(wins)
    assert [row["crowd"] for row in rows] == pytest.approx(expected.tolist())
    assert rows[2]["error"] == pytest.approx(elo_error(covariance, 0, 2))
    assert rows[2]["player"] == "C" and rows[2]["crowd"] > 0 > rows[1]["crowd"]


def test_the_other_two_findings_about_calibration_can_fail():
    verdict = importlib.import_module("calibration").verdict
    for rows, failed in ((calibrations(fall=-0.01), "it is less often right"),
                         (calibrations(bias=0.01), "a PM of both kinds")):
        outcome, sentences = verdict(rows)
        assert outcome == "HOLDS" and f"DOES NOT HOLD: {failed}" in sentences


def test_labels_by_coin_keep_the_pairs():
    pairs = [Comparison("p", f" {i}", " b", "helpful", 0.9) for i in range(400)]
    tossed = lab.by_coin(Random(0), pairs)
    assert [{pair.chosen, pair.rejected} for pair in tossed] == [{f" {i}", " b"}
                                                                 for i in range(400)]
    assert abs(sum(pair.chosen == " b" for pair in tossed) - 200) < 4 * math.sqrt(400 / 4)
    assert {pair.p_chosen for pair in tossed} == {0.5}


def test_a_coin_decides_which_reply_is_better():
    instructgpt = importlib.import_module("instructgpt")
    rows = [[1, 2], [1, 3], [1, 4]]
    elements = [rankings.Element(rows, [(0, 1), (0, 2), (2, 1)], None) for _ in range(200)]
    run, flipped = SimpleNamespace(rng=lambda *name: Random(0)), []
    for before, after in zip(elements, instructgpt.by_coin(run, elements)):
        assert before.pairs == [(0, 1), (0, 2), (2, 1)] and after.rows is rows
        assert [tuple(sorted(pair)) for pair in after.pairs] == [(0, 1), (0, 2), (1, 2)]
        flipped += [pair != old for pair, old in zip(after.pairs, before.pairs)]
    assert abs(sum(flipped) - 300) < 4 * math.sqrt(600 / 4)  # four standard errors


def test_a_match_counts_the_choices_for_the_first_of_two_policies(monkeypatch):
    said = []
    for chosen in ("a", "b", "a", "a", None):
        said.append(SimpleNamespace(
            comparison=chosen and SimpleNamespace(chosen=chosen),
            replies=[SimpleNamespace(text="a"), SimpleNamespace(text="b")]))
    monkeypatch.setattr(collect, "Sampler", lambda policy, end: policy)
    monkeypatch.setattr(collect, "converse", lambda *args, **options: said)
    run = SimpleNamespace(tok=SimpleNamespace(end_of_turn=0))
    wins = collect.match(run, "A", "B", "helpful", 5)
    assert (wins[0, 1], wins[1, 0]) == (3, 1)


def test_what_is_wrong_with_an_entry_of_the_gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "PICTURES", tmp_path)
    args = SimpleNamespace(full=True, seed=3)
    output.record("writers", args, "HOLDS: a, b. c", 60)
    output.record("elo", args, "NOT DECIDED: x", 7)
    made = json.loads((tmp_path / output.MADE).read_text())
    assert set(made) == {"writers", "elo"} and made["writers"]["first seed"] == 3
    assert "no picture" in gallery.state("writers", made, "> HOLDS: a, b. c")
    (tmp_path / "writers.png").write_text("")
    assert gallery.state("writers", made, "text\n> HOLDS: a,\n> b. c\ntext") == ""
    assert "quoted otherwise" in gallery.state("writers", made, "> HOLDS: a, b. d")
    made["writers"]["code"] = "another"
    assert "older than its script" in gallery.state("writers", made, "> HOLDS: a, b. c")


# ---- 3. What the scripts share -----------------------------------------------
# One process runs all scripts at their tiny setting; it trains the tiny models that the other tests
# of this section read. It takes some 15 seconds on one core, a third of it for those models.

RUNNER = """
import runpy, sys, torch, traceback
torch.set_num_threads(1)  # tiny models: more threads would only wait for each other
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
import lab  # puts the repository on the path
import output

class Pyplot:  # takes any call; x, y and errors of a curve must be of one length
    def __getattr__(self, name):
        def call(*values, **options):
            lengths = [len(v) for v in values if not isinstance(v, (str, int, float))]
            if name in ("plot", "errorbar"):
                assert len(lengths) >= 2 and lengths[0] > 0 and len(set(lengths)) == 1, lengths
            return self
        return call
    def __iter__(self):  # over the lines of a plot
        yield self

def finish(name, args, rows, draw, sentence, original=output.finish):
    draw(Pyplot())
    output.write_csv(output.Path(name + ".csv"), rows)
    original(name, args, rows, draw, sentence)

output.finish = finish
for name in names:
    sys.argv = [name + ".py", "--tiny"]
    print("BEGIN", name, flush=True)
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        print("END", flush=True)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
"""


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """{script: what it printed}, and the folder in which the scripts ran."""
    where, printed = tmp_path_factory.mktemp("experiments"), {}
    command = [sys.executable, "-c", RUNNER, str(FOLDER), *FINDINGS]
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True)
    for part in done.stdout.split("BEGIN ")[1:]:
        name, _, printed[name] = part.partition("\n")
    return printed, where


@pytest.fixture(scope="module")
def run(tiny_runs):
    """The tiny language model and initial policy that the scripts have trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_runs[1])
        run = lab.base("toy", tiny=True)
        run.out = run.out.resolve()
    return run


@pytest.mark.parametrize("name", FINDINGS)
def test_a_script_runs_and_draws_and_ends_with_its_verdict(tiny_runs, name):
    printed, where = tiny_runs
    assert printed[name].endswith("END\n"), printed[name][-2000:]
    assert printed[name].splitlines()[-2].startswith(("HOLDS", "DOES NOT HOLD", "NOT DECIDED"))
    with open(where / f"{name}.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) > 1
    assert not (where / f"out/experiments/{name}.csv").exists()  # would replace real results
    assert not (FOLDER / "pictures" / f"{name}.csv").exists()


def test_a_full_run_writes_its_rows_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "OUT", tmp_path / "out")
    pictures = []
    monkeypatch.setattr(output, "save_picture", lambda path, draw: pictures.append((path, draw)))
    args, draw = SimpleNamespace(tiny=False, full=False, redraw=False, start=0.0), object()
    output.finish("elo", args, [{"a": 1}, {"a": 2, "b": 0.5}], draw, "HOLDS: it does.")
    with open(tmp_path / "out" / "elo.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "0.5"}]
    assert pictures == [(output.PICTURES / "elo.png", draw)]
    assert capsys.readouterr().out.splitlines()[-1].startswith("HOLDS: it does.")


def test_a_stopped_script_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(output, "save_picture", lambda path, draw: None)
    calls, args = [], SimpleNamespace(tiny=False, full=True, redraw=False, start=0.0)

    def measure():
        calls.append(1)
        return [{"seed": len(calls), "x": math.inf}]
    quick, tiny = (SimpleNamespace(**vars(args) | change) for change in ({"full": False},
                                                                         {"tiny": True}))
    first = output.once("elo", args, "seed-0", measure)
    assert output.once("elo", args, "seed-0", measure) == first == [{"seed": 1, "x": math.inf}]
    assert "stopped run" in capsys.readouterr().out and len(calls) == 1
    for part, options in (("seed-1", args), ("seed-0", quick), ("seed-0", tiny), ("seed-0", tiny)):
        output.once("elo", options, part, measure)
    assert len(calls) == 5
    output.finish("elo", args, first, None, "HOLDS.")  # its parts go; another setting's stay
    output.once("elo", quick, "seed-0", measure)
    assert len(calls) == 5
    output.once("elo", args, "seed-0", measure)
    assert len(calls) == 6
    args.seed = 5
    found = output.each_seed("writers", args, 2, lambda seed: [{"seed": seed}])
    assert found == [{"seed": 5}, {"seed": 6}]
    again = output.each_seed("writers", args, 3, lambda seed: [{"seed": -seed}])
    assert again == found + [{"seed": -7}]
    monkeypatch.setattr(output, "code_hash", lambda name: "other code")
    assert output.each_seed("writers", args, 1, lambda seed: [{"seed": 9}]) == [{"seed": 9}]


def test_a_picture_is_drawn_anew_from_the_rows_of_the_last_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(output, "PICTURES", tmp_path)
    monkeypatch.setattr(output, "save_picture", lambda path, draw: True)
    args = SimpleNamespace(tiny=False, full=False, redraw=False, seed=0, start=-1e6)
    rows = [{"seed": 0, "role": "", "x": 0.1 + 0.2, "is_last": False}, {"seed": 1, "role": "a, b"},
            {"seed": 2, "role": "2 of 3", "x": math.nan, "scores": [1.5, -2.0]}]
    output.finish("elo", args, rows, None, "HOLDS.")
    seconds = output.made()["elo"]["seconds"]
    args.redraw = True
    found = output.each_seed("elo", args, 9, None)
    assert math.isnan(found[2].pop("x")) and math.isnan(rows[2].pop("x")) and found == rows
    args.start = 0.0
    output.parts_folder("elo", args).mkdir()  # of another run, which was stopped
    output.finish("elo", args, found, None, "HOLDS.")
    assert output.parts_folder("elo", args).exists()
    args.full = True
    with pytest.raises(UserError, match="last ran with --seed 0: use"):
        output.each_seed("elo", args, 1, None)
    assert output.made()["elo"]["seconds"] == seconds > 1e6
    with pytest.raises(SystemExit), errors_in_one_sentence():
        output.each_seed("writers", args, 1, None)
    assert "without --redraw" in capsys.readouterr().err


class Recorder:
    """In place of pyplot: what was drawn, by the name of the call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*values, **options):
            self.calls.append((name, values, options))
            line = SimpleNamespace(get_color=lambda: "red", get_linestyle=lambda: ":")
            return [line]
        return call


def test_pictures_show_means_with_intervals_side_by_side_and_a_line_for_each_seed():
    assert picture.interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), abs=1e-3)  # t, 1 degree
    assert picture.interval([5.0])[0] == 5.0 and math.isnan(picture.interval([5.0])[1])
    plt = Recorder()
    picture.groups(plt, ["p", "q"], {"a": [[1.0, 3.0], [4.0, 4.0]], "b": [[0.0, 0.0], [6.0, 8.0]]})
    [first, second, (_, ticks, _), _] = plt.calls
    assert first[1][0] == [-0.125, 0.875] and second[1][0] == [0.125, 1.125]
    assert ticks == (range(2), ["p", "q"]) and second[1][1] == (0.0, 7.0)
    assert second[1][2] == pytest.approx((0.0, 12.706), abs=1e-3)
    assert (first[2], second[2]) == ({"label": "a", "linestyle": ""},
                                     {"label": "b", "linestyle": ""})
    plt, rows = Recorder(), []
    for seed, x, y in ((7, 0, 1), (8, 2, 3), (7, 4, 5)):
        rows.append({"seed": seed, "x": x, "y": y})
    picture.paths(plt, rows, "x", "y", "PM")
    [(_, ours, looks), (_, others, same)] = plt.calls
    assert (ours, others) == (([0, 4], [1, 5]), ([2], [3]))
    assert looks == {"marker": "", "label": "PM"}
    assert same == {"marker": "", "color": "red", "linestyle": ":"}


def test_a_quotation_replaces_the_one_below_the_picture():
    readme = "## 1\n![a](pictures/elo.png)\n> old\n>\n> older\n\ntext\n> kept\n"
    sentence = "HOLDS: a. b: 1. Control, NOT DECIDED: c. NOT DECIDED: d is " + 30 * "long "
    found = gallery.with_quotation(readme, "elo", sentence)
    lines = found.splitlines()
    assert lines[2:5] == ["> HOLDS: a. b: 1. Control, NOT DECIDED: c.", ">",
                          "> NOT DECIDED: d is " + " ".join(["long"] * 16)]
    assert lines[6:] == ["", "text", "> kept"] and gallery.words(sentence) in gallery.words(found)
    assert gallery.with_quotation(found, "elo", sentence) == found
    assert gallery.with_quotation(readme, "writers", sentence) == readme
    bare = readme.replace("> old\n>\n> older\n", "")
    assert gallery.with_quotation(bare, "elo", sentence) == found


def test_a_part_of_the_comparisons_has_all_turns(run):
    pairs = lab.comparisons(run, 60)
    turns = [pair.prompt.count("Human:") for pair in pairs]
    assert turns != sorted(turns) and len(set(turns)) > 1
    assert lab.comparisons(run, 60) == pairs


def some_pairs(run):
    pairs = lab.comparisons(run, 24) + lab.comparisons(run, 24, "harmless")
    assert {pair.kind for pair in pairs} == {"helpful", "harmless"}
    return pairs


def test_a_pm_in_memory_weighs_harmless_comparisons_by_lambda_and_leaves_no_trace(run):
    """At lambda = 0 it does not matter what the harmless labels say, and those are all it drops."""
    pairs, swapped, files = some_pairs(run), [], sorted(run.out.rglob("*"))
    for pair in pairs:
        if pair.kind == "harmless":
            pair = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        swapped.append(pair)
    start = lab.train_pm_on(run, pairs, weight=0.0)
    before = flat(start.parameters())
    assert torch.equal(before, flat(lab.train_pm_on(run, swapped, weight=0.0).parameters()))
    for options in ({"weight": 1.0}, {"weight": 5.0}, {"weight": 0.0, "start": start}):
        assert not torch.equal(before, flat(lab.train_pm_on(run, pairs, **options).parameters()))
    assert torch.equal(before, flat(start.parameters()))
    assert sorted(run.out.rglob("*")) == files


def test_a_centered_pm_has_mean_zero_on_those_comparisons(run):
    pairs = some_pairs(run)
    pm = lab.train_pm_on(run, pairs)
    raw = torch.cat(lab.scores(run, pm, pairs))
    pm.mean += 3  # an earlier mean must count, too
    centered = torch.cat(lab.scores(run, lab.center(run, pm, pairs), pairs))
    # Float32 scores of size 3 carry rounding of 3 x 1.2e-7 each, so 1e-5 leaves a margin of 28.
    assert abs(centered.mean().item()) < 1e-5
    assert (centered - (raw - raw.mean())).abs().max() < 1e-5


def responses(run, policy, pm, prompts, n, name):
    """(reply, its PM score alone and without pads) of the n replies to each prompt in turn."""
    ids = []
    for prompt in prompts:
        ids += [run.tok.encode_dialogue(prompt)] * n
    found, ro = [], lab.respond(run, policy, ids, name)
    for k, response in enumerate(ro.responses()):
        row = ids[k] + response + [run.tok.end_of_context]
        score = score_rows(pm, [row])[0].item() - 1.0 * (not ro.finished[k])
        found.append((run.tok.decode(response), score))
    return found


def test_judging_puts_each_reply_to_its_prompt(run, monkeypatch):
    """A tiny policy's replies are all about as bad, so the truth here is a hash of its input."""
    def truth(prompt: str, reply: str, kind: str) -> float:
        return zlib.crc32(f"{prompt}|{reply}|{kind}".encode()) % 1000

    monkeypatch.setattr(toy, "truth", truth)
    pm, policy = lab.train_pm_on(run, some_pairs(run)), lab.load(run)
    prompts = lab.held_out_prompts(run, 6, "a test")
    assert len(set(prompts.texts)) > 3
    judged = lab.judge(run, policy, [pm, pm], prompts, replies=2)  # (3, 6, 2)
    assert judged.shape == (3, 6, 2) and torch.equal(judged[0], judged[1])
    for k, (reply, score) in enumerate(responses(run, policy, pm, prompts.texts, 2, "judge")):
        i, j = divmod(k, 2)
        assert judged[2, i, j].item() == truth(prompts.texts[i], reply, prompts.kinds[i])
        # Alone or in a batch, a float32 score differs by rounding: 1e-4 is 1000 times epsilon.
        assert judged[0, i, j].item() == pytest.approx(score, abs=1e-4)


def test_rejection_sampling_keeps_the_reply_that_scores_highest(run):
    pm, policy = lab.train_pm_on(run, some_pairs(run)), lab.load(run)
    prompts = lab.held_out_prompts(run, 5, "a test").texts
    options = responses(run, policy, pm, prompts, 4, "a name")
    for i, reply in enumerate(lab.best_of(run, policy, pm, prompts, n=4, name="a name")):
        assert reply == max(options[4 * i:4 * i + 4], key=lambda option: option[1])[0]


def test_the_median_reply_has_as_many_below_as_above(run):
    pm, policy = lab.train_pm_on(run, some_pairs(run)), lab.load(run)
    prompts = lab.held_out_prompts(run, 5, "a test").texts
    options = responses(run, policy, pm, prompts, 3, "a name")
    medians = lab.median_of(run, policy, pm, prompts, 3, "a name")
    scored = lab.score_replies(run, pm, prompts, medians).tolist()
    for i, reply in enumerate(medians):
        middle = sorted(options[3 * i:3 * i + 3], key=lambda option: option[1])[1]
        assert reply == middle[0]
        # A text is encoded anew, which may give other ids than were sampled.
        row = run.tok.encode_dialogue(prompts[i]) + run.tok.encode_reply(reply)
        # Alone or in a batch, a float32 score differs by rounding: 1e-4 is 1000 times epsilon.
        alone = score_rows(pm, [row + [run.tok.end_of_context]])[0].item()
        assert scored[i] == pytest.approx(alone, abs=1e-4)


def test_a_trained_run_is_the_main_job_in_the_folder_of_its_base(run, monkeypatch):
    monkeypatch.chdir(run.out.parents[2])
    found = lab.trained(0, tiny=True)  # trained by writers.py, so nothing is trained here
    assert found.out.resolve() == run.out
    monkeypatch.setattr(train_rl, "train", lambda *_: pytest.fail("the policy is there"))
    assert lab.trained(0, tiny=True).has("policy.pt")


def test_arms_of_rl_learn_from_their_own_prompts(run, monkeypatch):
    """Crowd prompts come from files, written ones have a mark, and the control has one kind."""
    script, cfg = importlib.import_module("model_prompts"), RLConfig()
    written = {kind: [f"\n\nHuman: {kind} written?\n\nAssistant:"] for kind in lab.KINDS}
    shares = {}
    for arm in ("crowd", "written", "mixed", "red-team only"):
        batch = script.prompts_of(arm, run, cfg, written).draw(400, "a test", held_out=False)
        marked = [text in written[kind] for text, kind in zip(batch.texts, batch.kinds)]
        shares[arm] = sum(marked) / 400, batch.kinds.count("harmless") / 400
    assert [shares[arm][0] for arm in ("crowd", "written", "red-team only")] == [0, 1, 0]
    # 400 draws: 0.5 has a standard error of 0.025, and 0.33 of 0.024. Four of them are 0.1.
    assert abs(shares["mixed"][0] - 0.5) < 0.1 and abs(shares["mixed"][1] - 0.33) < 0.1
    assert shares["red-team only"][1] == 1


def test_a_gain_is_the_end_less_the_start_on_the_kinds_in_their_shares(run, monkeypatch):
    script = importlib.import_module("model_prompts")
    numbers = dict(helpfulness=1.0, harmlessness=-1.0, correct=0.5, complied=0.5, kl=0.0)
    path = [numbers, numbers | dict(helpfulness=3.0, harmlessness=1.0)]
    monkeypatch.setattr(lab, "ppo", lambda *_, prompts: (None, path))
    monkeypatch.setattr(run, "load_model", lambda name: name)
    [row] = script.one_arm("mixed", run, RLConfig(), {})
    assert row["gain"] == pytest.approx((2 * 2 + 2) / 3) and row["helpfulness"] == 3.0


def test_a_header_stands_before_the_prompt_and_names_seed_the_draw(run):
    policy, prompts = lab.load(run), lab.held_out_prompts(run, 8, "a test").texts
    plain = lab.sample(run, policy, prompts, "A")
    assert plain == lab.sample(run, policy, prompts, "A")
    assert plain != lab.sample(run, policy, prompts, "B")
    headed = lab.sample(run, policy, [toy_corpus.HHH_HEADER + prompt for prompt in prompts], "A")
    assert headed == lab.sample(run, policy, prompts, "A", header=toy_corpus.HHH_HEADER) != plain


def test_ppo_measures_at_the_start_on_the_way_and_at_the_end(run):
    seen, pm = [], lab.train_pm_on(run, some_pairs(run))
    cfg = RLConfig(iterations=3, batch=8, minibatch=8, eval_every=2, eval_prompts=12)
    learner, path = lab.ppo(run, pm, cfg, watch=seen.append)
    assert output.column(path, "iteration") == [0, 2, 3] and seen == [learner] * 3
    assert path[0]["kl"] == pytest.approx(0, abs=1e-4) and path[-1]["kl"] != path[0]["kl"]
    for numbers in path:  # two prompts in three are helpful ones
        both = numbers["score_helpful"] * 2 / 3 + numbers["score_harmless"] / 3
        truth = numbers["helpfulness"] * 2 / 3 + numbers["harmlessness"] / 3
        assert (numbers["score"], numbers["truth"]) == pytest.approx((both, truth))


@pytest.mark.parametrize("players", [2, 3])
def test_crowd_elo_recovers_a_known_gap(players):
    """An honest "I do not know" is better than a wrong answer by 1 nat: 173.7 Elo."""
    rng, prompts, wrong = Random(1), [], []
    for _ in range(1200):
        prompts.append(toy_corpus.draw_prompt(rng, "helpful", held_out=True))
        request = toy.understand(prompts[-1])
        wrong.append(" " + request.statement(request.wrong_answers()[0]))
    replies = {"wrong": wrong, "honest": [" I do not know."] * len(prompts)}
    if players == 3:
        replies["too"] = wrong
    run = SimpleNamespace(rng=lambda *name: Random(2))
    elo, covariance = lab.crowd_elo(run, prompts, "helpful", replies)
    assert elo["wrong"] == 0 and abs(elo["honest"] - ELO) < 3 * elo_error(covariance, 0, 1)
    # 400 or 1,200 games at odds of e : 1, with p (1 - p) = 0.197: errors of 20 and 11 Elo.
    assert elo_error(covariance, 0, 1) < 25


def test_exercises_are_held_out_and_have_the_right_answer(run):
    found = exercises(run)
    for skill in ("state", "answer", "judge"):
        zero, few = found[f"{skill} zero"], found[f"{skill} few"]
        assert len(zero) == len(few) > 50
        for one, other in zip(zero, few):
            assert other.text.endswith(" " + one.text) and other.right == one.right
    for exercise in found["state zero"]:
        assert (exercise.text + exercise.right[0]).lower() in toy._STATEMENTS
    questions = {exercise.text for exercise in found["answer zero"]}
    for exercise in found["answer zero"]:
        assert toy_people.is_held_out([exercise.text])
        for right in exercise.right:
            assert toy.judge(f"\n\nHuman: {exercise.text}\n\nAssistant:", right).correct
    for exercise in found["judge zero"]:
        [question] = [q for q in questions if exercise.text.startswith(q)]
        reply = exercise.text.removeprefix(question)
        judged = toy.judge(f"\n\nHuman: {question}\n\nAssistant:", reply)
        assert exercise.right == ((" Right.",) if judged.correct else (" Wrong.",))
        assert {exercise.right[0], exercise.wrong} == {" Right.", " Wrong."}
