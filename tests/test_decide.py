"""Tests of experiments/decide.py: its t against closed forms and tables, its errors by simulation.
"""
import math
import random
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
from decide import Claim, decide, decide_all, mean_se, sentence, t_quantile, t_tail


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 60.0])
def test_t_has_the_closed_forms_of_one_two_and_three_degrees_of_freedom(t):
    a = math.atan(t / math.sqrt(3))
    exact = {1: 0.5 - math.atan(t) / math.pi, 2: 0.5 - t / (2 * math.sqrt(2 + t * t)),
             3: 0.5 - (a + math.sin(a) * math.cos(a)) / math.pi}
    for df, tail in exact.items():
        assert t_tail(t, df) == pytest.approx(tail, abs=1e-6)


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (99, 1.984)])
def test_quantiles_of_a_printed_table(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=6e-4)


def test_a_finding_that_holds_in_its_control_does_not_hold():
    real, flat = Claim("a", [1.0, 1.1, 0.9, 1.0], above=0.0), Claim("b", [0.1, -0.1, 0.1, 0.0], 0.0)
    assert sentence("x", [real], [flat])[0] == "HOLDS"
    low = Claim("c", [-x for x in real.values], below=-0.5)
    assert sentence("x", [real, low], [flat])[0] == "HOLDS"  # a control of the first claim alone
    outcome, words = sentence("x", [low], [flat])
    assert outcome == "HOLDS" and words.count("c, less the control's: -1.0") == 1
    noisy = Claim("d", [0.9, 1.4, 0.6, 0.9], above=1.0)  # it does not hold, but is no smaller
    assert sentence("x", [real], [noisy])[0] == "NOT DECIDED"
    outcome, words = sentence("x", [real], [real])
    assert outcome == "DOES NOT HOLD" and words.startswith("DOES NOT HOLD: x. a: 1.000 [")
    assert "Control, HOLDS: a: 1.000 [" in words and sentence("x", [flat], [real])[0] != "HOLDS"


def test_a_mean_and_its_error_by_hand():
    assert mean_se([1.0, 2.0, 6.0]) == (3.0, math.sqrt((4 + 1 + 9) / 2 / 3))


@pytest.mark.parametrize("values, above, below, outcome", [
    ([1, 2, 3, 4], 0, math.inf, "HOLDS"), ([-1, -2, -3, -4], 0, math.inf, "DOES NOT HOLD"),
    ([-1, 2, 3, 4], 0, math.inf, "NOT DECIDED"), ([1, 2, 3], 0, math.inf, "NOT DECIDED"),
    ([1, 1, 1], 0, math.inf, "NOT DECIDED"), ([5], 0, math.inf, "NOT DECIDED"),
    ([0.01, -0.01, 0.02, 0], -0.1, 0.1, "HOLDS"), ([0.2, -0.2, 0.1, 0], -0.1, 0.1, "NOT DECIDED"),
    ([1, 1.1, 0.9, 1], -0.1, 0.1, "DOES NOT HOLD"), ([-1, -1.1, -0.9, -1], -math.inf, 0, "HOLDS")])
def test_three_outcomes(values, above, below, outcome):
    decision = decide(Claim("effect", values, above, below))
    assert decision.outcome == outcome
    assert (decision.needed is None) == (outcome != "NOT DECIDED")
    assert decision.mean == sum(values) / len(values)


def test_what_a_claim_that_is_not_decided_would_take():
    # Mean 2, deviation 2.16: with 6 seeds the interval reaches to 2 - 2.571 x 0.882 = -0.27; with 8
    # to 2 - 2.365 x 0.764 = 0.19.
    assert decide(Claim("effect", [-1.0, 2.0, 3.0, 4.0], above=0)).needed == 8
    assert decide(Claim("effect", [-1.0, 1.0, -1.0, 1.01], above=0)).needed is None
    with pytest.raises(ValueError, match="effect: not every"):
        decide(Claim("effect", [1.0, math.nan]))


def test_a_finding_needs_all_its_claims_and_says_so():
    yes, no = Claim("gain", [4, 5, 6, 5], 0), Claim("loss", [5, 5, 6, 5], below=1)
    open_ = Claim("tie", [-1.0, 1.0, 0.5, -0.4], above=0)
    for claims, outcome in (([yes], "HOLDS"), ([yes, open_], "NOT DECIDED"),
                            ([yes, no], "DOES NOT HOLD")):
        assert decide_all(claims)[0] == sentence("It rains", claims)[0] == outcome
    words = sentence("It rains", [yes, no])[1]
    assert words.startswith("DOES NOT HOLD: It rains. gain: 5.000 [") and words.endswith(" 1.")
    assert "n = 4, threshold above 0; loss: 5.250 [" in words
    # Alone it does not hold; as one of three claims it might be bad luck.
    down = Claim("down", [-1.1, -0.4, -1.5, -0.8], above=0)
    assert decide_all([down])[0] == "DOES NOT HOLD"
    outcome, decisions = decide_all([down, yes, yes])
    assert outcome == "NOT DECIDED" and decisions[0] == decide(down)


@pytest.mark.parametrize("n", [4, 8])
def test_error_rates(n):
    """Of 10,000 experiments without an effect, each wrong outcome comes in 2.5%. Of three claims, of
    which one is false and two are true by far, the finding holds in as many; of three claims that
    are barely true it fails in no more. With an effect of three deviations, nearly all hold. The
    margins are four standard errors. It takes seconds."""
    rng, n_experiments = random.Random(0), 10_000
    counts = {"HOLDS": 0, "DOES NOT HOLD": 0, "NOT DECIDED": 0, "found": 0, "false": 0, "failed": 0}
    for _ in range(n_experiments):
        draws = [[rng.gauss(0, 1) for _ in range(n)] for _ in range(3)]
        counts[decide(Claim("none", draws[0], above=0)).outcome] += 1
        shifted = [x + 3 for x in draws[0]]
        counts["found"] += decide(Claim("three", shifted, above=0)).outcome == "HOLDS"
        none = [Claim("none", values, above=0) for values in draws]
        true = [Claim("far", [x + 20 for x in values], above=0) for values in draws[1:]]
        counts["false"] += decide_all([none[0], *true])[0] == "HOLDS"
        counts["failed"] += decide_all(none)[0] == "DOES NOT HOLD"
    margin = 4 * math.sqrt(0.025 * 0.975 / n_experiments)
    assert abs(counts["HOLDS"] / n_experiments - 0.025) < margin
    assert abs(counts["DOES NOT HOLD"] / n_experiments - 0.025) < margin
    assert abs(counts["false"] / n_experiments - 0.025) < margin
    assert 0.015 < counts["failed"] / n_experiments < 0.025 + margin
    assert counts["found"] / n_experiments > 0.85
