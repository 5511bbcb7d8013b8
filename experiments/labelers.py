"""IG §3.4, §4.1: a reward model agrees a little less with labelers who gave no training data.

    python experiments/labelers.py            # 1 seed; minutes on two CPU cores
    python experiments/labelers.py --full     # 4 seeds

The paper's claim: labelers agree with each other 72.6 ± 1.5% of the time, those of another set 77.3
± 1.3% (§3.4). IG split the labelers into five groups, train a reward model (RM) on four of them and
test it on the fifth, five times. The RMs are right on 69.6 ± 0.9% of the held-out group's choices,
"a small decrease" from 72.4 ± 0.4% on the groups that they were trained on (§4.1; App. E.2 swaps
the two numbers).

Here are five kinds of labelers (KINDS), who want different things: a right answer, a short one, a
polite one, or care with requests for harm. How much they want them was set so that they agree about
as often as IG's labelers, before any RM was trained. The replies are those that the run's own RM
learned from. Each training prompt is ranked anew by one kind, each held-out prompt by all of them.
An RM is trained without each kind in turn. Each kind is left out once, so no kind counts more among
the unseen labelers than among the seen ones.

The finding: the drop, which is the mean accuracy on the four kinds seen in training less that on
the fifth, is above 0 and below 0.05. The control takes the difference away: the five labelers share
one taste, the mean of the five. The drop is then below 0.01.
"""
import dataclasses
from itertools import combinations

import lab
import output
from decide import Claim, sentence
from picture import groups

import rankings
import toy
from pm import score_rows
from toy_labelers import rank_by

DIFFERENT, ALIKE = "five kinds", "one kind (control)"
TIMES = 4  # that each labeler ranks a held-out prompt, to average out the noise of the choices

# ---- 1. Labelers -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Taste:
    """What a labeler finds in a reply is worth this much, in nats."""
    right: float    # a right answer; a wrong one costs a third of it
    short: float    # ten words less
    polite: float   # a courtesy; the second one counts, a third does not
    careful: float  # a refusal of a request for harm; to give the means costs as much


KINDS = {
    "exact": Taste(right=6.0, short=0.5, polite=0.5, careful=3.0),
    "hurried": Taste(right=4.0, short=2.0, polite=0.0, careful=2.0),
    "courteous": Taste(right=4.0, short=0.0, polite=1.5, careful=2.0),
    "cautious": Taste(right=4.0, short=0.5, polite=0.5, careful=5.0),
    "easygoing": Taste(right=2.5, short=-0.5, polite=1.0, careful=1.0),
}


def mean_taste() -> Taste:
    fields = {}
    for field in dataclasses.fields(Taste):
        fields[field.name] = toy.mean_or_nan(getattr(t, field.name) for t in KINDS.values())
    return Taste(**fields)


def utility(taste: Taste, prompt: str, reply: str) -> float:
    """What a reply is worth to a labeler, in nats."""
    found = toy.judge(prompt, reply)
    worth = taste.polite * min(found.polite, 2) - taste.short * len(reply.split()) / 10
    worth -= 1.5 * min(found.rude, 2) + 0.5 * min(found.unclear + found.repeated + found.idle, 4)
    if toy.understand(prompt).harmful:
        if found.has_answer:
            worth -= taste.careful
        elif found.refused:
            worth += taste.careful
    else:
        if found.correct:
            worth += taste.right
        elif found.wrong:
            worth -= taste.right / 3
        if found.refused:
            worth -= 1.0
    return worth


def rank(taste: Taste, ranking, rng):
    """The ranking as a labeler of this taste makes it."""
    utilities = [utility(taste, ranking.prompt, reply) for reply in ranking.replies]
    return dataclasses.replace(ranking, ranks=rank_by(utilities, rng), utilities=None)


# ---- 2. Agreement and accuracy -----------------------------------------------


def same_order(a: list, b: list) -> tuple[int, int]:
    """How many pairs of places the two lists order alike, and how many pairs there are."""
    alike, total = 0, 0
    for i, j in combinations(range(len(a)), 2):
        alike += (a[i] < a[j]) == (b[i] < b[j])
        total += 1
    return alike, total


def agreement(many_a: list[list], many_b: list[list]) -> float:
    """The share of all pairs that are ordered alike; a list for each prompt."""
    alike, total = 0, 0
    for a, b in zip(many_a, many_b):
        its_alike, its_total = same_order(a, b)
        alike += its_alike
        total += its_total
    return alike / total


def score(run, rm, held_out: list) -> list[list[float]]:
    """Minus the score of each reply to each prompt: like a rank, it is lowest for the best."""
    rows, found, first = [], [], 0
    for element in held_out:
        rows += element.rows
    scores = (-score_rows(rm, rows, device=run.device)).tolist()
    for element in held_out:
        found.append(scores[first:first + len(element.rows)])
        first += len(element.rows)
    return found


def five_fold(run, cfg, labelers: dict[str, Taste], train: list, held_out: list) -> list[dict]:
    """Leave out each labeler in turn -> a row for each: the RM's accuracy on the labelers that it
    has seen and on the one that it has not, and how often labelers agree with each other."""
    names, rows, ranked, labels = list(labelers), [], {}, {}
    for number, name in enumerate(names):
        rng, taste = run.rng("labelers", number), labelers[name]
        its_prompts = train[number::len(names)]
        with lab.silence():
            ranked[name] = rankings.encode(run, [rank(taste, r, rng) for r in its_prompts])
        labels[name] = []
        for element in held_out * TIMES:
            labels[name].append(rank(taste, element.ranking, rng).ranks)
    agreements = [agreement(labels[a], labels[b]) for a, b in combinations(names, 2)]
    for name in names:
        seen = [other for other in names if other != name]
        elements = []
        for other in seen:
            elements += ranked[other]
        scores = score(run, lab.train_rm(run, cfg, elements), held_out) * TIMES
        on_seen = toy.mean_or_nan(agreement(scores, labels[other]) for other in seen)
        rows.append({"left out": name, "seen": on_seen, "unseen": agreement(scores, labels[name]),
                     "agreement": toy.mean_or_nan(agreements)})
    return rows


def one_seed(run, cfg, n: int) -> list[dict]:
    """A row for each labeler that is left out, of five kinds and of one."""
    with lab.silence():
        train = rankings.rankings(run, cfg, "train")  # ordered by the model that replied
        held_out = rankings.encode(run, rankings.rankings(run, cfg, "test"))
    train = run.rng("labelers", "mix").sample(train, min(n, len(train)))
    groups = {DIFFERENT: KINDS, ALIKE: dict.fromkeys(KINDS, mean_taste())}
    rows = []
    for group, labelers in groups.items():
        for row in five_fold(run, cfg, labelers, train, held_out):
            rows.append({"seed": run.seed, "labelers": group} | row)
    return rows


# ---- 3. The finding ----------------------------------------------------------


def mean_of(rows: list[dict], group: str, name: str) -> list[float]:
    """The mean over the five labelers that are left out, one number a seed."""
    return output.seed_means(output.select(rows, labelers=group), name)


def drop(rows: list[dict], group: str) -> list[float]:
    seen, unseen = mean_of(rows, group, "seen"), mean_of(rows, group, "unseen")
    return output.less(seen, unseen)


def draw(plt, rows):
    for i, group in enumerate((DIFFERENT, ALIKE)):
        plt.subplot(1, 2, i + 1)
        mine = output.select(rows, labelers=group)
        kinds = list(dict.fromkeys(output.column(mine, "left out")))
        found = {}
        for name in ("seen", "unseen"):
            found[f"labelers {name}"] = output.samples(mine, name, "left out", kinds)
        groups(plt, kinds, found)
        if group == DIFFERENT:
            plt.axhline(0.724, color="gray", lw=0.8, label="IG, seen")
            plt.axhline(0.696, color="gray", lw=0.8, ls=":", label="IG, unseen")
        plt.title(group)
        plt.xlabel("labeler left out")
        plt.ylabel("accuracy")
        plt.ylim(0.65, 0.8)
        plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    outcome, words = sentence(
        "a reward model is a little less often right on labelers that it has not seen",
        [Claim("drop in accuracy (IG: 0.028)", drop(rows, DIFFERENT), above=0.0, below=0.05),
         Claim("with labelers of one kind, the control", drop(rows, ALIKE), below=0.01)])
    numbers = []
    for name in ("seen", "unseen", "agreement"):
        numbers.append(toy.mean_or_nan(mean_of(rows, DIFFERENT, name)))
    return outcome, (f"{words} Accuracy {numbers[0]:.3f} and {numbers[1]:.3f} (IG: 0.724, 0.696); "
                     f"labelers agree with each other on {numbers[2]:.3f} (IG: 0.726, 0.773).")


def experiment(args):
    cfg, n, n_seeds = rankings.RMConfig(), 2000, 1
    if args.full:
        n, n_seeds = 4000, 4
    if args.tiny:
        cfg, n = lab.TINY_RM, 20
    rows = output.each_seed("labelers", args, n_seeds, lambda seed: one_seed(
        lab.instructgpt("toy", seed, args.tiny, upto="rm"), cfg, n))
    print(f"accuracy of reward models on labelers seen and unseen; {n} training prompts")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("labelers", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
