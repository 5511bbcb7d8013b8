"""IG §3.5: supervised finetuning overfits on the held-out loss, but its replies go on improving.

    python experiments/sft.py            # 1 seed; minutes on two CPU cores
    python experiments/sft.py --full     # 4 seeds

The paper's claim: the SFT models overfit on the validation loss after 1 epoch; yet training for
more epochs (16) helps both the RM score and human preference ratings. No number is printed.

Here, train_sft.py keeps the weights after epochs 1, 2, 4, 8 and 16. Of these, the one before the
last that has the lowest loss on the run's own held-out demonstrations is the BEST epoch. It and the
last are then compared on new held-out demonstrations: by the loss, and by one reply to each prompt
(its RM score, and its true utility, which stands for people's ratings).

1. The finding: from the best epoch to the last, the loss rises, and so do RM score and true utility
   (each by more than 0). In the control no demonstration is read twice: one epoch of 16 times as
   many, so as many steps ("fresh"). From the best epoch to the end of that, the loss must not rise.
   Printed beside: the loss on the held-out demonstrations with and without a mistake (a true
   utility of at most 0). Later epochs expect mistakes less often. The loss counts that against them
   wherever a labeler made one, and people do not.
2. A finding of its own: what the later epochs add is certainty, which a lower temperature gives as
   well. The best epoch is sampled once more at the temperature at which its entropy is that of the
   last epoch ("cooled"). The last epoch's true utility is above that by less than 0.1.
"""
import dataclasses
import tempfile

import lab
import output
import steps
import torch
from decide import Claim, sentence
from picture import curve

import demonstrations
import toy
import toy_labelers
import train_sft
from model import token_logprobs_and_entropies
from ppo import PPOConfig, pm_scores
from rollout import rollout

BEST, LAST, COOLED, FRESH = "best", "last", "best, cooled", "fresh"
LOSSES = {"loss": "all", "loss without mistakes": "no mistake", "loss with mistakes": "a mistake"}

# ---- 1. Losses and certainty -------------------------------------------------


@torch.no_grad()
def states(model, examples) -> list[tuple]:
    """(hidden states, targets, number of the example) of the replies' tokens, a batch at a time:
    (n, D), (n,), (n,)."""
    found = []
    for first in range(0, len(examples), 64):
        batch, device = examples[first:first + 64], next(model.parameters()).device
        hidden, targets, number = train_sft.reply_states(model, batch, device)
        found.append((hidden, targets, first + number.cpu()))
    return found


@torch.no_grad()
def losses_and_entropy(model, found: list[tuple], n: int, temperature: float = 1.0):
    """What `states` found of n examples -> the loss of each reply in nats (n,), the number of its
    tokens (n,), and the mean entropy of a token's distribution in nats."""
    loss, tokens = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    entropy = 0.0
    for hidden, targets, number in found:
        logp, entropies = token_logprobs_and_entropies(model, hidden, targets, temperature)
        loss.index_add_(0, number, -logp.double().cpu())
        tokens += number.bincount(minlength=n)
        entropy += entropies.sum().item()
    return loss, tokens, entropy / tokens.sum().item()


def temperature_at(model, examples, entropy: float) -> float:
    """The temperature at which the mean entropy of the replies' tokens has this value, by bisection
    (the higher the temperature, the higher the entropy)."""
    found, low, high = states(model, examples), 0.1, 10.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        if losses_and_entropy(model, found, len(examples), middle)[2] < entropy:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


# ---- 2. A policy's row -------------------------------------------------------


def written(run, n: int) -> list:
    """n new held-out demonstrations that fit the context. The best epoch was not chosen on them."""
    rng, found = run.rng("sft experiment"), []
    while len(found) < n:
        demonstration = toy_labelers.demonstrate(rng, held_out=True)
        ids = run.tok.encode_dialogue(demonstration.prompt + demonstration.reply)
        if len(ids) < run.context - train_sft.SelectConfig().max_response:
            found.append(demonstration)
    return found


def truth_of(demonstration, reply: str) -> float:
    return toy.truth(demonstration.prompt, reply, demonstration.kind)


def measure(run, model, pm, found: list, temperature: float = 1.0) -> dict:
    """Losses on demonstrations, and RM score and truth of one reply to each of their prompts.
    Every policy draws by the same random numbers."""
    examples = demonstrations.encode(run.tok, found, run.context)
    loss, tokens, entropy = losses_and_entropy(model, states(model, examples), len(examples),
                                               temperature)
    is_good = torch.tensor([truth_of(d, d.reply) > 0 for d in found])  # (n,)
    row = {"temperature": temperature, "entropy": entropy}
    for name, group in zip(LOSSES, (torch.ones_like(is_good), is_good, ~is_good)):
        row[name] = (loss[group].sum() / tokens[group].sum()).item()
    prompts = [run.tok.encode_dialogue(demonstration.prompt) for demonstration in found]
    uniforms = torch.rand(len(found), train_sft.SelectConfig().max_response,
                          generator=run.torch_rng("sft experiment"))
    ro = rollout(model, prompts, uniforms, run.tok.end_of_turn, temperature=temperature)
    row["score"] = pm_scores(pm, ro, run.tok.end_of_context, PPOConfig()).mean().item()
    replies = [run.tok.decode(response) for response in ro.responses()]
    row["truth"] = toy.mean_or_nan(map(truth_of, found, replies))
    rates = toy.rates([d.prompt for d in found], [d.kind for d in found], replies)
    return row | {"correct": rates["correct"], "complied": rates["complied"]}


def train_fresh(run, cfg):
    """The SFT model after one epoch of as many demonstrations as cfg has in all of its epochs."""
    rng, found = run.rng("fresh demonstrations"), []
    n = cfg.demonstrations * cfg.epochs * 16 // 15  # one prompt in sixteen is held out
    for _ in range(n):
        found.append(toy_labelers.demonstrate(rng, held_out=False))
    with tempfile.TemporaryDirectory() as folder:
        return steps.sft(lab.with_lm_of(run, folder), dataclasses.replace(cfg, epochs=1), found)


def one_seed(run, cfg, n: int) -> list[dict]:
    """A row for each kept epoch, one for the best epoch, cooled, and one for the control."""
    models, pm = train_sft.load_epochs(run), run.load_model("pm.pt")
    own = demonstrations.read_written(train_sft.written(run, "test"))
    own = demonstrations.encode(run.tok, own, run.context)
    *earlier, last = models
    best = min(earlier, key=lambda epoch: train_sft.mean_reply_loss(models[epoch], own, run.device))
    role, found, rows = {best: BEST, last: LAST}, written(run, n), []
    for epoch, model in models.items():
        row = {"seed": run.seed, "epoch": epoch, "role": role.get(epoch, "")}
        rows.append(row | measure(run, model, pm, found))
    _, _, entropy = losses_and_entropy(models[last], states(models[last], own), len(own))
    temperature = temperature_at(models[best], own, entropy)
    row = {"seed": run.seed, "epoch": best, "role": COOLED}
    rows.append(row | measure(run, models[best], pm, found, temperature))
    row = {"seed": run.seed, "epoch": 1, "role": FRESH}
    return rows + [row | measure(run, train_fresh(run, cfg), pm, found)]


# ---- 3. The finding ----------------------------------------------------------


def change(rows: list[dict], name: str, before: str = BEST, after: str = LAST) -> list[float]:
    """How far a number moves from one role to another, one value a seed."""
    start, end = (output.column(output.select(rows, role=role), name) for role in (before, after))
    return output.less(end, start)


def draw(plt, rows):
    curves = [row for row in rows if row["role"] not in (COOLED, FRESH)]
    epochs = sorted(set(output.column(curves, "epoch")))
    first = output.select(curves, epoch=epochs[0])
    for place, names, label in ((1, LOSSES, "held-out loss, less that after epoch 1"),
                                (2, {"score": "RM score", "truth": "true utility"},
                                 "RM score (logits) and true utility (nats)")):
        plt.subplot(1, 2, place)
        for name, title in names.items():
            values = output.samples(curves, name, "epoch", epochs)
            if place == 1:
                start = output.column(first, name)
                values = [output.less(of_epoch, start) for of_epoch in values]
            curve(plt, epochs, values, title)
        if place == 1:
            fresh = output.less(output.column(output.select(rows, role=FRESH), "loss"),
                                output.column(first, "loss"))
            plt.axhline(toy.mean_or_nan(fresh), color="gray", lw=0.8,
                        label="all; 16 times as many demonstrations, once")
        plt.xscale("log", base=2)
        plt.xlabel("epoch")
        plt.ylabel(label)
        plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    outcome, finding = sentence(
        "SFT overfits on the held-out loss, but its replies go on improving (last epoch less the "
        "one with the best loss before)",
        [Claim("loss (nats a token)", change(rows, "loss"), above=0.0),
         Claim("RM score (logits)", change(rows, "score"), above=0.0),
         Claim("true utility", change(rows, "truth"), above=0.0)],
        control=[Claim("loss (nats a token)", change(rows, "loss", after=FRESH), above=0.0)])
    _, certainty = sentence(
        "at equal certainty, the last epoch is hardly better than the best one",
        [Claim("true utility, last less cooled", change(rows, "truth", before=COOLED), below=0.1)])
    moved = [toy.mean_or_nan(change(rows, name, after=COOLED)) for name in ("loss", "truth")]
    return outcome, (f"{finding} {certainty} Cooling alone moves the best epoch's loss by "
                     f"{moved[0]:+.3f} and its true utility by {moved[1]:+.3f}.")


def experiment(args):
    n, n_seeds, cfg = 1500, 1, train_sft.SFTConfig()  # as in lab.instructgpt
    if args.full:
        n, n_seeds = 3000, 4
    if args.tiny:
        n, n_seeds, cfg = 16, 1, lab.TINY_SFT
    rows = output.each_seed("sft", args, n_seeds, lambda seed: one_seed(
        lab.instructgpt("toy", seed, args.tiny, upto="rm"), cfg, n))
    print(f"SFT by epoch, on {n} held-out demonstrations and one reply to each of their prompts")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("sft", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
