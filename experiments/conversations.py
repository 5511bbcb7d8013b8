"""§2.2, §3.2, Fig. 8: what people pick moves a conversation; PMs by turn of the conversation.

    python experiments/conversations.py          # 1 seed; minutes
    python experiments/conversations.py --full   # 4 seeds (language models), more conversations

A conversation of a person with the initial policy has four exchanges, with two replies in each.

1. Drift (§2.2; no figure). Helpful conversations go on from the better reply and should move in "a
   more beneficial direction"; red-teaming goes on from the worse one and should move in a more
   harmful direction. Turn 4 less turn 1 shows something else: whoever got no good answer asks
   again, so hard questions pile up. So conversations are compared, turn by turn, with others of the
   same people that go on from a random reply: true utility of both replies on turns 2 to 4. The
   control compares two groups that both go on from a random reply. "probe" puts another question
   in place of the last one, the same in all groups: what does the history alone do to the initial
   policy, and to the plain LM, which did not learn by distillation to be one kind of assistant?
2. PM accuracy by turn (Fig. 8): "somewhat more accurate on the first step of the conversation", and
   nearly constant thereafter (no number is printed). What the best possible accuracy, the Bayes
   ceiling, loses with the turns is not the PM's fault. So the statistic is how far the PM stays
   below it: turns 2 to 4 less turn 1, above 0; turn 4 less turn 2, within 0.01. In the control, the
   PM reads the same replies after their question alone.
   Labels are noisy, so accuracy here is what it would be with infinitely many labels.
"""
from dataclasses import replace

import lab
import decide
import output
import torch
from decide import Claim
from picture import curve

import toy
from collect import MAX_TURNS, Exchange
from data import ASSISTANT, HUMAN, Comparison
from toy import mean_or_nan
from toy_people import next_question

EQUAL = 0.01  # accuracies up to here apart count as nearly constant

# ---- 1. Conversations --------------------------------------------------------


def whole(exchanges: list[Exchange], turns: int) -> set[int]:
    """The numbers of the conversations that did not end early."""
    return {exchange.conversation for exchange in exchanges if exchange.turn == turns}


def hold(run, turns: int, kind: str, n: int, name: str, keeps: list[str],
         held_out: bool = False) -> list[list[Exchange]]:
    """n conversations of the same people for each of `keeps` (collect.converse). Those that end
    early in one group are left out in all, so that the groups stay alike."""
    groups = [lab.conversations(run, kind, n, name, keep, held_out, turns) for keep in keeps]
    numbers = set.intersection(*[whole(exchanges, turns) for exchanges in groups])
    kept = []
    for exchanges in groups:
        kept.append([exchange for exchange in exchanges if exchange.conversation in numbers])
    return kept


def at(exchanges: list[Exchange], turn: int) -> list[Exchange]:
    return [exchange for exchange in exchanges if exchange.turn == turn]


def true_utility(exchanges: list[Exchange]) -> float:
    """The mean over both replies of each exchange."""
    found = []
    for exchange in exchanges:
        for reply in exchange.replies:
            found.append(toy.truth(exchange.prompt, reply.text, exchange.kind))
    return mean_or_nan(found)


def probe(run, last: list[Exchange], model: str) -> float:
    """Mean true utility of a model's reply to another question in place of the last one.
    Conversations of one number get the same question, whatever was said before."""
    prompts, kinds = [], []
    for exchange in last:
        rng = run.rng("probe", exchange.kind, exchange.conversation)
        question, _ = next_question(rng, exchange.kind, before=None, from_held_out=False)
        history, _, _ = exchange.prompt.rpartition(HUMAN)
        prompts.append(f"{history}{HUMAN} {question}{ASSISTANT}")
        kinds.append(exchange.kind)
    replies = lab.sample(run, lab.load(run, model), prompts, "probe")
    return mean_or_nan(map(toy.truth, prompts, replies, kinds))


def drift(run, turns: int, kind: str, n: int) -> tuple[list[dict], list[Exchange]]:
    """A row for each group, and the exchanges of the conversations that go on from the pick."""
    rows = []
    picked, random = hold(run, turns, kind, n, f"drift {kind}", ["", "random"])
    _, again = hold(run, turns, kind, n, f"drift {kind} again", ["", "random"])  # other people
    for group, exchanges in (("picked", picked), ("random", random), ("again", again)):
        row = {"part": "drift", "seed": run.seed, "kind": kind, "group": group,
               "n": len(at(exchanges, 1))}
        for turn in range(1, turns + 1):
            row[f"turn {turn}"] = true_utility(at(exchanges, turn))
        last = at(exchanges, turns)
        rows.append(row | {"probe": probe(run, last, "initial.pt"),
                           "LM probe": probe(run, last, "lm.pt")})
    return rows, picked


def moved(rows: list[dict], kind: str, seed: int, group: str) -> dict[str, float]:
    """How far `group` is above the conversations that go on from a random reply: "later", the mean
    of turns 2 to 4, and both probes."""
    [mine] = output.select(rows, kind=kind, seed=seed, group=group)
    [other] = output.select(rows, kind=kind, seed=seed, group="random")
    gains = {}
    for name in mine:
        if name.startswith("turn ") or name.endswith("probe"):
            gains[name] = mine[name] - other[name]
    later = [name for name in gains if name.startswith("turn ") and name != "turn 1"]
    return gains | {"later": mean_or_nan(gains[name] for name in later)}


# ---- 2. PM accuracy by turn --------------------------------------------------


def compared(exchanges: list[Exchange]) -> list[Exchange]:
    return [exchange for exchange in exchanges if exchange.comparison is not None]


def alone(comparison: Comparison) -> Comparison:
    """The same replies after their question, in its usual wording, without any history."""
    request = toy.understand(comparison.prompt)
    question = request.skill.templates[0].format(request.about)
    return replace(comparison, prompt=f"{HUMAN} {question}{ASSISTANT}")


def accuracy(margins: torch.Tensor, pairs: list[Comparison]) -> tuple[float, float]:
    """The expected accuracy over all labels that crowdworkers might give, and its ceiling. A tie
    of scores counts half."""
    found, ceiling = [], []
    for margin, pair in zip(margins.tolist(), pairs):
        if margin == 0:
            found.append(0.5)
        else:
            found.append(pair.p_chosen if margin > 0 else 1 - pair.p_chosen)
        ceiling.append(max(pair.p_chosen, 1 - pair.p_chosen))
    return mean_or_nan(found), mean_or_nan(ceiling)


def by_turn(run, pm, kind: str, exchanges: list[Exchange]) -> list[dict]:
    """A row for each turn: accuracy, ceiling and the distance between the two ("below"), and that
    distance without history."""
    rows = []
    for turn in sorted(set(exchange.turn for exchange in exchanges)):
        pairs = [exchange.comparison for exchange in compared(at(exchanges, turn))]
        row = {"part": "PM", "seed": run.seed, "kind": kind, "turn": turn, "n": len(pairs)}
        for name, read in (("", pairs), (", alone", [alone(pair) for pair in pairs])):
            chosen, rejected = lab.scores(run, pm, read)
            row["accuracy" + name], row["ceiling"] = accuracy(chosen - rejected, read)
            row["below" + name] = row["ceiling"] - row["accuracy" + name]
        rows.append(row)
    return rows


def below(rows: list[dict], seed: int, turn: int, name: str = "below") -> float:
    """How far the PM is below the ceiling on one turn: the mean of both kinds."""
    return mean_or_nan(output.column(output.select(rows, seed=seed, turn=turn), name))


def one_seed(run, turns: int, n: int, n_test: int) -> list[dict]:
    """The rows of both parts. The PM learns from the conversations that go on from the pick."""
    rows, train = [], []
    for kind in lab.KINDS:
        found, picked = drift(run, turns, kind, n)
        rows += found
        train += [exchange.comparison for exchange in compared(picked)]
    pm = lab.train_pm_on(run, train)
    for kind in lab.KINDS:
        [test] = hold(run, turns, kind, n_test, f"test {kind}", [""], held_out=True)
        rows += by_turn(run, pm, kind, test)
    return rows


# ---- 3. Verdicts -------------------------------------------------------------


def verdict(rows: list[dict]) -> tuple[str, str]:
    seeds, found = sorted(set(output.column(rows, "seed"))), {}
    for kind in lab.KINDS:
        for group in ("picked", "again"):
            found[kind, group] = [moved(rows, kind, seed, group) for seed in seeds]
    up = output.column(found["helpful", "picked"], "later")
    down = output.column(found["harmless", "picked"], "later")
    outcome, words = decide.sentence(
        "what is picked moves the replies that follow (true utility of turns 2 to 4, less that "
        "after a random reply)", [Claim("helpful", up, above=0.0),
                                  Claim("red-teaming", down, below=0.0)])
    others = {}
    for group, name in (("again", "later"), ("picked", "probe"), ("picked", "LM probe")):
        means = [mean_or_nan(output.column(found[kind, group], name)) for kind in lab.KINDS]
        others[name] = f"{means[0]:+.3f} and {means[1]:+.3f}"
    return outcome, (f"{words} Control (random less random): {others['later']}; the same new "
                     f"question at the end: {others['probe']} (asked of the plain LM: "
                     f"{others['LM probe']}).")


def accuracy_verdict(rows: list[dict]) -> tuple[str, str]:
    first, *later = sorted(set(output.column(rows, "turn")))
    gains, trends, alone = [], [], []
    for seed in sorted(set(output.column(rows, "seed"))):
        trends.append(below(rows, seed, later[-1]) - below(rows, seed, later[0]))
        for name, found in (("below", gains), ("below, alone", alone)):
            mean = mean_or_nan(below(rows, seed, turn, name) for turn in later)
            found.append(mean - below(rows, seed, first, name))
    outcome, words = decide.sentence(
        "a PM is closest to the ceiling on the first turn, and about as far from it on all later "
        "ones (accuracy below the ceiling)",
        [Claim(f"turns {later[0]} to {later[-1]} less turn 1", gains, above=0.0),
         Claim(f"turn {later[-1]} less turn {later[0]}", trends, -EQUAL, EQUAL)])
    return outcome, (f"{words} Control: without history, later turns less turn 1: "
                     f"{mean_or_nan(alone):+.3f}.")


def draw(plt, rows, pm_rows):
    turns = sorted(set(output.column(pm_rows, "turn")))
    for i, kind in enumerate(lab.KINDS, 1):
        plt.subplot(1, 3, i)
        for group in ("picked", "random"):
            mine = output.select(rows, kind=kind, group=group)
            utilities = [output.column(mine, f"turn {turn}") for turn in turns]
            curve(plt, turns, utilities, f"after the {group} reply")
        plt.title("helpful" if kind == "helpful" else "red-teaming")
        plt.xlabel("turn")
        plt.ylabel("true utility of the replies")
        plt.legend()
    plt.subplot(1, 3, 3)
    for name in ("ceiling", "accuracy", "accuracy, alone"):
        means = [output.seed_means(output.select(pm_rows, turn=turn), name) for turn in turns]
        curve(plt, turns, means, name)
    plt.xlabel("turn")
    plt.ylabel("held-out accuracy of the PM")
    plt.legend()


def experiment(args):
    turns, n, n_test, n_seeds = MAX_TURNS, 400, 500, 1
    if args.full:
        n, n_test, n_seeds = 1200, 2000, 4
    if args.tiny:  # most replies of so small a model end the conversation
        turns, n, n_test = 2, 120, 120
    found = output.each_seed("conversations", args, n_seeds, lambda seed: one_seed(
        lab.base("toy", seed, args.tiny), turns, n, n_test))
    rows, pm_rows = output.select(found, part="drift"), output.select(found, part="PM")
    print("True utility of the replies by turn, after the picked reply and after a random one")
    output.table(rows)
    print("The PM's accuracy on held-out comparisons by turn")
    output.table(pm_rows)
    output.finish("conversations", args, rows + pm_rows, lambda plt: draw(plt, rows, pm_rows),
                  f"{verdict(rows)[1]}\n{accuracy_verdict(pm_rows)[1]}")


if __name__ == "__main__":
    output.main(experiment, __doc__)
