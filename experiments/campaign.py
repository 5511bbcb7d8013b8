"""How online.py makes comparisons, PMs and policies for the two runs of one seed (§4.5)."""
import copy
from functools import partial

import lab
import torch

import toy
import toy_corpus
from data import encode_comparison
from model import token_logprobs
from train_pm import PMConfig
from train_rl import RLConfig

FEW = PMConfig(batch=4)  # a batch of 16, as elsewhere, would leave too few steps


class Campaign:
    """What one seed's runs share: how comparisons, PMs and policies are made."""

    def __init__(self, run, cfg: RLConfig, n: int, n_test: int):
        self.run, self.cfg, self.n, self.n_test = run, cfg, n, n_test
        self.initial, self.test = lab.load(run), {}  # origin -> held-out comparisons

    def compare(self, n: int, name: str, *speakers):
        """At most n comparisons. Each is of the replies of two speakers, drawn by lot, to one
        prompt. A speaker is a function of prompts and a name for its random numbers."""
        rng, prompts, said = self.run.rng("online", name), [], []
        for _ in range(2 * n):  # more than n, because two speakers may say the same
            held_out = name.startswith("test")
            prompts.append(toy_corpus.draw_prompt(rng, "helpful", held_out=held_out))
        for i, speak in enumerate(speakers):
            said.append(speak(prompts, name=f"{name} {i}"))
        pairs = [rng.sample(replies, 2) for replies in zip(*said)]
        labeled = []
        for prompt, (a, b) in zip(prompts, pairs):
            if a != b:
                labeled.append(toy.label(prompt, a, b, "helpful", rng))
        return labeled[:n]

    def collect(self, origin: str, name: str, *speakers):
        """Comparisons for training; keeps others of the same speakers as the origin's test. A later
        round of an origin replaces its test."""
        self.test[origin] = self.compare(self.n_test, f"test {name}", *speakers)
        return self.compare(self.n, name, *speakers)

    def samples_of(self, policy):
        return partial(lab.sample, self.run, policy)

    def fit(self, pairs):
        return lab.center(self.run, lab.train_pm_on(self.run, pairs, cfg=FEW), self.test["base"])

    def rlhf(self, pm) -> tuple[list, list[dict]]:
        """The policy at each measurement, and its numbers."""
        snapshots = []

        def watch(learner):
            snapshots.append(copy.deepcopy(learner.policy))
        _, path = lab.ppo(self.run, pm, self.cfg, self.initial, watch)
        return snapshots, path

    def online_comparisons(self, rounds: int):
        first = self.samples_of(self.initial)
        train = self.collect("base", "base", first, first)
        best = partial(lab.best_of, self.run, self.initial, self.fit(train))
        train += self.collect("RS", "RS", best, best)
        before = first
        for k in range(rounds):
            snapshots, _ = self.rlhf(self.fit(train))
            middle = self.samples_of(snapshots[len(snapshots) // 2])
            last = self.samples_of(snapshots[-1])
            train += self.collect("online", f"online {k}", before, middle, last)
            before = last
        return train


@torch.no_grad()
def logp_accuracy(run, policy, pairs) -> float:
    """How often the chosen reply has the higher mean log-prob under a policy (Fig. 34)."""
    hits = 0
    for comparison in pairs:
        prompt, *replies = encode_comparison(run.tok, comparison, run.context)
        means = []
        for reply in replies:
            row = torch.tensor(prompt + reply, device=run.device)
            states = policy(row[None, :-1])[0, len(prompt) - 1:]  # (R, D), before each reply token
            means.append(token_logprobs(policy, states, row[len(prompt):]).mean().item())
        hits += means[0] > means[1]
    return hits / len(pairs)
