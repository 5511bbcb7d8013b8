"""IG §3.5: all pairs of a prompt in one batch element; shuffled into one data set, they overfit.

    python experiments/grouped.py            # 1 seed; minutes on two CPU cores
    python experiments/grouped.py --full     # 4 seeds

The paper's claim: a labeler ranks K = 4 to 9 replies, which gives K (K - 1) / 2 pairs of a prompt.
Shuffled into one data set, each reply is in K - 1 gradient updates, and "a single pass over the
dataset caused the reward model to overfit". With all pairs of a prompt as a single batch element,
the RM "no longer overfits", and its validation accuracy and log loss are much better. No number is
printed, and the number of steps is not stated.

Here both ways take one pass over the same pairs, in equally many steps of equally many pairs
(rankings.fit), and start from the same SFT model. Grouped pairs weigh each prompt alike, as the
loss below does; shuffled ones weigh each pair alike. MANY: the run's 4,000 prompts, as shipped.
FEW: 500 of them in batches an eighth as large, so again in 250 steps; the numbers of several such
parts of the data are averaged. The loss is that of Eq. 1, on held-out prompts and on trained ones.
The gap between the two says how far the RM overfits.

1. The finding: the held-out loss with shuffled pairs, less that with grouped ones, is above 0, with
   many prompts and with few.
2. A finding of its own: shuffling overfits more. With few prompts, the gap with shuffled pairs,
   less that with grouped ones, is above 0. The control takes the repetition away: the pairs left of
   a prompt share no reply. The difference of the gaps must then be smaller, seed by seed.
"""
import dataclasses
import math

import lab
import output
import torch
from decide import Claim, sentence
from picture import groups

import rankings

MANY, FEW, DISJOINT = "many prompts", "few prompts", "few, no reply twice (control)"
GROUPED, SHUFFLED = "grouped", "shuffled"


@torch.no_grad()
def mean_loss(rm, elements: list, device) -> float:
    """The mean over the prompts of the mean loss of their pairs (Eq. 1), in nats."""
    losses = []
    for first in range(0, len(elements), 32):
        losses.append(rankings.element_losses(rm, elements[first:first + 32], device))  # (32,)
    return torch.cat(losses).mean().item()


def disjoint_pairs(elements: list, rng) -> list:
    """The same elements with K // 2 pairs each for K replies; no two of these share a reply."""
    found = []
    for element in elements:
        pairs, used = [], set()
        for pair in rng.sample(element.pairs, len(element.pairs)):
            if not used & set(pair):
                pairs.append(pair)
                used |= set(pair)
        found.append(rankings.Element(element.rows, pairs, element.ranking))
    return found


def compare(run, cfg, elements: list, held_out: list) -> list[dict]:
    """Train one RM each way -> a row for each. The trained loss is on as many prompts as the
    held-out one. Both ways draw their order from equal random numbers, so the elements are put into
    another order before they are shuffled."""
    rows = []
    for way in (GROUPED, SHUFFLED):
        ordered = elements
        if way == SHUFFLED:
            ordered = run.rng("grouped", "order").sample(elements, len(elements))
        rm = lab.train_rm(run, dataclasses.replace(cfg, shuffled=way == SHUFFLED), ordered)
        loss = mean_loss(rm, held_out, run.device)
        trained = mean_loss(rm, elements[:len(held_out)], run.device)
        rows.append({"way": way, "held-out loss": loss, "trained loss": trained,
                     "gap": loss - trained})
    return rows


def one_seed(run, cfg, n_few: int, n_parts: int) -> list[dict]:
    """A row for each amount of data, part of it and way."""
    with lab.silence():
        elements = rankings.encode(run, rankings.rankings(run, cfg, "train"))
        held_out = rankings.encode(run, rankings.rankings(run, cfg, "test"))
    # The file is ordered by the model that replied. Each part of the data gets replies of all.
    elements, rows = run.rng("grouped", "mix").sample(elements, len(elements)), []

    def add(data: str, part: int, cfg, chosen: list):
        name = {"seed": run.seed, "data": data, "part": part, "prompts": len(chosen)}
        for row in compare(run, cfg, chosen, held_out):
            rows.append(name | row)

    add(MANY, 0, cfg, elements)
    few = dataclasses.replace(cfg, batch=max(1, cfg.batch * n_few // len(elements)))
    for part in range(n_parts):
        chosen = elements[part * n_few:(part + 1) * n_few]
        add(FEW, part, few, chosen)
        add(DISJOINT, part, few, disjoint_pairs(chosen, run.rng("grouped", "disjoint", part)))
    return rows


def excess(rows: list[dict], data: str, name: str) -> list[float]:
    """A number with shuffled pairs less that with grouped ones, the mean over the parts of the
    data: one value a seed."""
    mine = output.select(rows, data=data)
    shuffled, grouped = (output.seed_means(output.select(mine, way=way), name)
                         for way in (SHUFFLED, GROUPED))
    return output.less(shuffled, grouped)


def draw(plt, rows):
    found = {}
    for name in ("held-out loss", "trained loss"):
        for way in (GROUPED, SHUFFLED):
            mine = output.means(output.select(rows, way=way), ("seed", "data"), (name,))
            found[f"{way}, {name}"] = output.samples(mine, name, "data", (MANY, FEW, DISJOINT))
    groups(plt, [MANY, FEW, DISJOINT], found)
    plt.axhline(math.log(2), color="gray", ls=":", lw=0.8)
    plt.ylabel("loss of a pair (nats; dotted: a coin)")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome on the held-out loss, and the sentences of both findings."""
    outcome, worse = sentence(
        "shuffled pairs give a worse reward model than all pairs of a prompt in one element "
        "(held-out loss, shuffled less grouped)",
        [Claim(MANY, excess(rows, MANY, "held-out loss"), above=0.0),
         Claim(FEW, excess(rows, FEW, "held-out loss"), above=0.0)])
    _, more = sentence(
        "shuffled pairs overfit more in one pass (held-out less trained loss, shuffled less "
        "grouped)",
        [Claim(FEW, excess(rows, FEW, "gap"), above=0.0)],
        control=[Claim(DISJOINT, excess(rows, DISJOINT, "gap"), above=0.0)])
    return outcome, f"{worse} {more}"


def experiment(args):
    cfg, n_few, n_parts, n_seeds = rankings.RMConfig(), 500, 2, 1
    if args.full:
        n_parts, n_seeds = 4, 4
    if args.tiny:
        cfg, n_few, n_parts = lab.TINY_RM, 8, 2
    rows = output.each_seed("grouped", args, n_seeds, lambda seed: one_seed(
        lab.instructgpt("toy", seed, args.tiny, upto="rm"), cfg, n_few, n_parts))
    print("one pass over the pairs of rankings, grouped by prompt or shuffled; losses in nats")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("grouped", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
