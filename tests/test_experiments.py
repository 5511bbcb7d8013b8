"""Tests of the scripts in experiments/ and of what they share (lab.py, output.py, exercises.py).

Each verdict is tested on made-up numbers: it must hold, and must fail when any one of its
conditions is broken. All scripts run once at their tiny setting."""
import csv
import dataclasses
import importlib
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
import lab
import output
import toy
import toy_corpus
import toy_people
from exercises import exercises
from helpers import flat
from measures import ELO, elo_error
from pm import score_rows
from train_rl import RLConfig

HELPERS = ("lab", "output", "measures", "exercises", "campaign", "decide")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
FINDINGS = [name for name in SCRIPTS if name != "rollout_speed"]  # that runs in test_rollout.py

# ---- 1. Verdicts -------------------------------------------------------------

# Made-up numbers that hold.
FIT = {"size": "toy", "slope": 1.0, "R2": 0.99, "R2_in_KL": 0.9}
SMALL = FIT | {"size": "small", "slope": 1.4}
END = {"gap": 0.5, "gap_se": 0.1, "fall": 0.5, "fall_se": 0.1}
LEADS = {"seed": 7, "initial, helpful": 9.0, "initial, red-team": 9.0, "only, helpful": 0.0,
         "only, red-team": 9.0}
PMP = {"comparisons": 250, "gain": 0.05, "gain_error": 0.02, "gain_binarized": 0.05,
       "gain_binarized_error": 0.02}
ECE = {"ECE": 0.02, "+- ECE": 0.001, "bias": 0.012}
LAST_OF_64 = {"n": 64, "truth": 1.5, "truth_se": 0.1}
OUTLIERS = ("toy", [0.8, 0.82], [0.9, 0.93])


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


def policies(best=0.3, alike=0.5, n=4) -> list[dict]:
    """Of one PM and policy for each group of negotiator.py; only worst has two shares."""
    rows = []
    for seed in range(n):
        for group, share, negotiator, first in (("initial", 0.0, 9.0, 9.0),
                                                ("worst", 0.9, 0.1, 0.2), ("worst", 0.1, 9.0, 9.0),
                                                ("best", 0.9, best, 0.25),
                                                ("worst again", 0.9, 0.11, 9.0)):
            is_most = (group, share) == ("worst", 0.9)
            rows.append({"seed": seed, "group": group, "red_team_share": share,
                         "negotiator": negotiator + seed * 1e-4 * is_most, "on first turns": first,
                         "look-alikes": alike + seed * 1e-4 if is_most else 0.2,
                         "others": 0.04 if is_most else 0.02})
    return rows


def scaling_fits(r2=0.95, b=0.01, c=0.02):
    return {("helpful", "helpful"): ((0.7, b, c), r2), ("mixed", "helpful"): ((0.7, -1, -1), 0.1),
            ("mixed", "harmless"): ((0.7, -1, -1), 0.2)}


# Of each script: arguments of `verdict` that hold; then arguments each of which breaks one
# condition, with the outcome where it is not plain "DOES NOT HOLD"; then what the sentence says.
NO, PART, OPEN = "DOES NOT HOLD", "HOLDS IN PART", "NOT DECIDED"
VERDICTS = {
    "alignment_tax": (
        ([("small", 0.12, 0.01), ("medium", -9.0, 1.0), ("toy", 0.02, 0.01)], 3),
        [([("small", 0.12, 0.07), ("toy", -0.9, 0.01)], 3),    # the first is not significant
         ([("small", 0.12, 0.01), ("toy", 0.08, 0.02)], 3),    # the difference is not
         ([("small", 0.12, math.nan), ("toy", 0.02, 0.01)], 1)],  # one seed has no error
        ["+0.120 +- 0.010 at small", "+0.020 +- 0.010 at toy", "n = 3"]),
    "best_of_n": (
        ([1, 4, 16], [(1.0, 0.1), (0.3, 0.1)], LAST_OF_64, (1.4, 0.2)),
        [([1, 4, 16], [(1.0, 0.1), (0.19, 0.1)], LAST_OF_64, (1.4, 0.2)),
         ([1, 4, 16], [(1.0, 0.1), (0.3, 0.1)], LAST_OF_64, (1.25, 0.2))],
        ["1.000 (10.0 se), 0.300 (3.0 se)", "best of 64 gains 1.500", "PPO 1.400 +- 0.200"]),
    "calibration": (
        (ECE, ECE | {"ECE": 0.5}, (0.2, 0.05), 0.15),
        [(ECE | {"ECE": 0.031}, ECE, (0.2, 0.05), 0.15), (ECE, ECE, (0.2, 0.11), 0.15)],
        ["ECE is 0.020 +- 0.001", "the mixed PM's are 0.500", "0.200 +- 0.050", "ceiling 0.150"]),
    "conversations": (
        (drifts(),),
        [(drifts(up=-0.2),), (drifts(down=0.2),), (drifts(n=3), OPEN),
         (drifts(up=0.0) + [row | {"seed": 4 + row["seed"]} for row in drifts(up=-0.1)], OPEN)],
        ["helpful: 0.200 [", "red-teaming: -0.200 [", "random): +0.030 and +0.030",
         "the end: +0.300 and +0.300 (asked of the plain LM: +0.600 and +0.600)"]),
    "elo": (
        ([LEADS, LEADS | {"only, helpful": -9.0}],),
        [([LEADS, LEADS | {"initial, helpful": 1.9}],),
         ([LEADS, LEADS | {"initial, red-team": 1.9}],),
         ([LEADS, LEADS | {"only, helpful": 2.1}],), ([LEADS, LEADS | {"only, red-team": 1.9}],)],
        ["in each of n = 2 seeds"]),
    "negotiator": (
        (policies(),),
        [(policies(best=0.05),), (policies(n=3), OPEN)],
        ["best less worst: 0.200 [", "worst again less worst +0.010",
         "turns, best less worst +0.050"]),
    "online": (([(110.0, 16.0), (35.0, 17.0)],), [([(110.0, 16.0), (33.0, 17.0)],)],
               ["110 +- 16, 35 +- 17", "n = 2"]),
    "outliers": (
        ([OUTLIERS, ("small", [0.7, 0.7], [0.9, 0.9])], [5, 4], 6),
        [([OUTLIERS, ("small", [0.7, 0.7], [0.7, 0.8])], [5, 4], 6),
         ([("small", [0.7, 0.7], [0.7, 0.8]), OUTLIERS], [5, 4], 6)],
        ["0.810 and 0.915 (toy, gain 0.105 +- 0.005)", "5 cases of 6", "and in 4 after"]),
    "pm_scaling": (
        (scaling_fits(),),
        [(scaling_fits(r2=0.89),), (scaling_fits(b=-0.01),), (scaling_fits(c=-0.02),)],
        ["b = 0.010 and c = 0.020", "R^2 = 0.950", "0.100 on helpful and 0.200 on harmless"]),
    "pmp": (
        (PMP, PMP | {"gain": 0.0, "gain_binarized": 0.0}, 3),
        [(PMP | {"gain": 0.039}, PMP, 3, PART), (PMP | {"gain_binarized": -1.0}, PMP, 3, PART),
         (PMP | {"gain": 0.039, "gain_binarized": 0.039}, PMP, 3)],
        ["+0.050 +- 0.020 over no PMP", "by +0.000 +- 0.020 and"]),
    "robustness": (([END, END],), [([END, END | {"gap": 0.19}],), ([END | {"fall": 0.1}],)],
                   ["in 2 of 2 runs", "errors in 2 of 2"]),
    "sqrt_kl": (
        ([FIT, SMALL | {"slope": 1.2}, SMALL],),
        [([FIT, FIT | {"R2": 0.94}],), ([FIT | {"R2_in_KL": 0.995}],), ([FIT, SMALL],),
         ([FIT, FIT | {"size": "m", "slope": -1}],)],
        ["at least 0.990", "in 3 runs", "in 3;", "1.30 times"]),
    "tension": (
        ((0.33, 0.03), (0.38, 0.02), {"small": 0.1, "toy": 0.05}, 10, 3),
        [((0.41, 0.03), (0.38, 0.02), {}, 10, 3), ((0.33, 0.03), (0.41, 0.02), {}, 10, 3)],
        ["0.330 +- 0.030 of harmless", "0.380 +- 0.020 of helpful", "0.100 (small), 0.050 (toy)"]),
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
    if name == "elo":  # it says what failed, and in which seed
        _, sentence = verdict([LEADS, LEADS | {"only, red-team": 1.0}])
        assert sentence.endswith("fails at: helpful-only below RLHF on red-team prompts (seed 7).")


def test_over_refusal_has_its_own_verdict():
    refusal_verdict = importlib.import_module("negotiator").refusal_verdict
    for rows, expected in ((policies(), "HOLDS"), (policies(alike=0.1), NO), (policies(n=3), OPEN)):
        outcome, sentence = refusal_verdict(rows)
        assert outcome == expected and sentence.startswith(expected)
        assert "benign requests +0.020" in sentence and "other people " in sentence
    assert "90% less 10% red-team prompts: 0.300 [" in refusal_verdict(policies())[1]
    assert "same share, other people -0.300" in refusal_verdict(policies())[1]


# ---- 2. Numbers behind the verdicts ------------------------------------------


def test_means_errors_and_selected_rows_by_hand():
    mean, se = output.mean_se([1.0, 2.0, 6.0])  # deviations -2, -1, 3: variance 14 / 2
    assert (mean, se) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert math.isnan(output.mean_se([1.0])[1])  # so that no threshold in errors is passed
    rows = [{"a": 1, "b": 2}, {"a": 1}, {"a": 2, "b": 2}]
    assert output.select(rows, a=1, b=2) == rows[:1] and output.select(rows, b=2) == rows[::2]


def test_where_a_path_crosses_and_where_it_leaves_its_line():
    interpolate = importlib.import_module("best_of_n").interpolate
    xs, ys = [0.0, 2.0, 1.0, 4.0], [0.0, 1.0, 5.0, 8.0]  # the first crossing on a path that turns
    assert interpolate(1.5, xs, ys) == pytest.approx(0.75)
    assert interpolate(3.0, xs, ys) == pytest.approx(7.0)
    assert math.isnan(interpolate(4.5, xs, ys))
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


def test_pmp_gains_are_taken_within_a_seed():
    found = [{("none", 8): 0.5, ("ranked", 8): 0.6, ("binarized", 8): 0.4},
             {("none", 8): 0.7, ("ranked", 8): 0.8, ("binarized", 8): 0.7}]
    row = importlib.import_module("pmp").summarize(found, 8)
    assert (row["gain"], row["gain_error"]) == pytest.approx((0.1, 0.0))
    assert (row["gain_binarized"], row["gain_binarized_error"]) == pytest.approx((-0.05, 0.05))
    assert row["none_error"] == pytest.approx(0.1)


def test_outlier_errors_are_over_splits_and_the_best_detector_is_chosen_per_size():
    outliers, rows = importlib.import_module("outliers"), []
    for size, layer, *aurocs in (("toy", 0, 0.6, 0.8, 0.9), ("toy", 1, 0.7, 0.9, 0.9),
                                 ("small", 0, 1.0, 1.0, 1.0)):
        for split, auroc in zip((0, 0, 1), aurocs):
            rows.append(dict(size=size, token="last", layer=layer, method="exposure", M=10,
                             split=split, draw=0, auroc=auroc, against_look_alikes=0.5))
    best = outliers.best(outliers.summarize(rows), "toy", 10)
    assert best["layer"] == 1  # splits' means 0.8 and 0.9: 0.85 +- 0.05
    assert (best["AUROC"], best["+-"], best["look-alikes"]) == pytest.approx((0.85, 0.05, 0.5))


def test_elo_leads_are_in_errors_of_the_difference():
    elo = importlib.import_module("elo")
    covariance = torch.tensor([[0.0, 0.0], [0.0, 16.0]])
    rows = [{"player": "A", "crowd": 0.0}, {"player": "B", "crowd": 12.0}]
    assert elo.lead(rows, covariance, "B", "A") == pytest.approx(3.0)
    scores = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # one logit apart: 173.7 Elo (Eq. 2.1)
    assert elo.pm_elo(scores).tolist() == pytest.approx([0.0, ELO], rel=1e-5)


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
    args, draw = SimpleNamespace(tiny=False, start=0.0), object()
    output.finish("name", args, [{"a": 1}, {"a": 2, "b": 0.5}], draw, "HOLDS: it does.")
    with open(tmp_path / "out" / "name.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "0.5"}]
    assert pictures == [(output.PICTURES / "name.png", draw)]
    assert capsys.readouterr().out.splitlines()[-1].startswith("HOLDS: it does.")


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
