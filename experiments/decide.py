"""How a finding is decided: one number a seed, a 95% interval, and one of three outcomes.

A seed is a language model that was trained anew, with everything that follows from it. Two runs
from one language model share its flaws, so they count as one seed: average them first.

Read it in this order:
  1. Student's t   the interval of a mean of few numbers
  2. Outcomes      HOLDS, DOES NOT HOLD or NOT DECIDED; several claims at once
"""
import math
from dataclasses import dataclass
from functools import lru_cache

from output import mean_se

LEVEL = 0.05        # how often an interval misses the true mean
FEWEST_SEEDS = 4    # below this, nothing is decided
NUMBERS_OF_SEEDS = (4, 5, 6, 8, 10, 12, 16, 20, 30, 50, 100)  # that an undecided claim may take

# ---- 1. Student's t ----------------------------------------------------------


def t_tail(t: float, df: int) -> float:
    """P(T > t) for t >= 0 and Student's t with `df` degrees of freedom.

    With t = sqrt(df) tan(a), the density becomes cos(a)^(df - 1) up to a constant. Simpson's rule
    integrates that from a to pi / 2."""
    def integral(start: float, steps: int = 400) -> float:
        width, total = (math.pi / 2 - start) / steps, 0.0
        for k in range(steps + 1):
            weight = 1 if k in (0, steps) else 4 if k % 2 else 2
            total += weight * max(math.cos(start + k * width), 0.0) ** (df - 1)
        return total * width / 3
    return 0.5 * integral(math.atan(t / math.sqrt(df))) / integral(0.0)


@lru_cache
def t_quantile(df: int, tail: float = LEVEL / 2) -> float:
    """The t with P(T > t) = tail, by bisection. With 3 degrees of freedom it is 3.18, not 1.96."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if t_tail(middle, df) > tail:
            low = middle
        else:
            high = middle
    return high


# ---- 2. Outcomes -------------------------------------------------------------


@dataclass
class Claim:
    """That the mean of an effect lies between two bounds, and one measurement of it for each
    seed. "No worse by more than 0.01" has the bound above = -0.01; "equal within 10%" has two."""
    name: str
    values: list[float]
    above: float = -math.inf
    below: float = math.inf


@dataclass
class Decision:
    claim: Claim
    outcome: str      # "HOLDS", "DOES NOT HOLD" or "NOT DECIDED"
    mean: float
    low: float        # the 95% interval
    high: float
    needed: int | None  # if not decided: so many seeds would do, at this mean and spread; None
    #                     if even a hundred would not

    def __str__(self) -> str:
        claim, n = self.claim, len(self.claim.values)
        bounds = []
        if claim.above > -math.inf:
            bounds.append(f"above {claim.above:g}")
        if claim.below < math.inf:
            bounds.append(f"below {claim.below:g}")
        words = f"{claim.name}: {self.mean:.3f}"
        if n > 1:
            words += f" [{self.low:.3f}, {self.high:.3f}]"
        words += f", n = {n}, threshold {' and '.join(bounds)}"
        if self.outcome == "NOT DECIDED":
            words += f", would take {self.needed or 'over 100'} seeds"
        return words


def decide(claim: Claim, level: float = LEVEL) -> Decision:
    """A claim holds if the whole interval of the mean satisfies it, and does not hold if none of
    the interval does. Otherwise the measurements are compatible with both, and it is not decided.
    Raises ValueError if a value is not finite."""
    values, n = claim.values, len(claim.values)
    if not all(math.isfinite(x) for x in values):
        raise ValueError(f"{claim.name}: not every measurement is a number: {values}")
    if n < 2:
        return Decision(claim, "NOT DECIDED", values[0], -math.inf, math.inf, FEWEST_SEEDS)
    mean, error = mean_se(values)
    reach = t_quantile(n - 1, level / 2) * error
    low, high = mean - reach, mean + reach
    if n >= FEWEST_SEEDS and claim.above < low and high < claim.below:
        return Decision(claim, "HOLDS", mean, low, high, None)
    if n >= FEWEST_SEEDS and (high < claim.above or claim.below < low):
        return Decision(claim, "DOES NOT HOLD", mean, low, high, None)
    return Decision(claim, "NOT DECIDED", mean, low, high,
                    seeds_needed(mean, error * math.sqrt(n), claim, level))


def seeds_needed(mean: float, deviation: float, claim: Claim, level: float) -> int | None:
    """How many seeds would decide, at this mean and standard deviation."""
    distance = min(abs(mean - bound) for bound in (claim.above, claim.below))
    for n in NUMBERS_OF_SEEDS:
        if t_quantile(n - 1, level / 2) * deviation / math.sqrt(n) < distance:
            return n
    return None


def decide_all(claims: list[Claim]) -> tuple[str, list[Decision]]:
    """Decide several claims of one finding -> the outcome of the finding, and each decision.

    The finding holds if all its claims hold, each decided at LEVEL. That needs no correction: if a
    claim is false, all m hold no more often than this one does (an intersection-union test, Berger
    1982). The finding does not hold if one claim does not, and m claims have m chances to fail by
    bad luck. So this is decided at LEVEL / m (Bonferroni)."""
    decisions = [decide(claim) for claim in claims]
    strict = [decide(claim, LEVEL / len(claims)).outcome for claim in claims]
    if all(decision.outcome == "HOLDS" for decision in decisions):
        return "HOLDS", decisions
    if "DOES NOT HOLD" in strict:
        return "DOES NOT HOLD", decisions
    return "NOT DECIDED", decisions


def less_control(claim: Claim, control: Claim) -> Claim:
    """That the effect is further in the claimed direction than the control's of the same seed."""
    differences = [x - y for x, y in zip(claim.values, control.values, strict=True)]
    name = f"{claim.name}, less the control's"
    if claim.above > -math.inf:
        return Claim(name, differences, above=0.0)
    return Claim(name, differences, below=0.0)


def sentence(title: str, claims: list[Claim],
             control: list[Claim] | None = None) -> tuple[str, str]:
    """The finding's outcome, and one sentence with every claim's number, interval and threshold.

    control: the same claims (or the first of them), measured where the finding's cause is taken
    away. The effect must also exceed the control's, seed by seed. A finding that holds there, too,
    is no finding: then the outcome is "DOES NOT HOLD"."""
    own, words = list(claims), ""
    for claim, other in zip(claims, control or []):
        own.append(less_control(claim, other))
    outcome, decisions = decide_all(own)
    if control is not None:
        of_control, measured = decide_all(control)
        words = f" Control, {of_control}: " + "; ".join(map(str, measured)) + "."
        if of_control == "HOLDS":
            outcome = "DOES NOT HOLD"
    return outcome, f"{outcome}: {title}. " + "; ".join(map(str, decisions)) + "." + words
