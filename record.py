"""What report.py shows and metrics.jsonl does not hold: recorded while training, in record.jsonl.

Each line of record.jsonl is a JSON object with a "stage" and a "step". Numbers have four digits
after the point; null stands for a number that is not finite.

  {"stage": "pm", ...}, one line, written when the preference model (PM) is done:
    calibration  {kind: [[stated, right, low, high, n], ...]}: pairs in five bins, from the margins
                 nearest 0 to the largest. `stated` is the mean of sigmoid(|margin|), `right` how
                 often the reply with the higher score is the chosen one, with its 95% interval
    gaps         [[gap, right, low, high, n], ...], toy only: pairs in bins of the true gap between
                 the replies, in nats (divided by --pm.noise). `right` is how often the reply with
                 the higher score is the truly better one
    worst        [{"prompt", "chosen", "rejected", "kind", "p_chosen", "conversation", "margin"},
                 ...]: the pairs that the PM gets most wrong, against the truth or (real data) the
                 label. `p_chosen`, the true probability of the label, is null for real data
  {"stage": "rl", "step": n, ...}, some ten lines, after n updates of the policy:
    replies      one reply to each of some held-out prompts, the same ones in all lines: {"prompt",
                 "group", "text", "score" (less the penalty, if it is not finished), "finished",
                 "truth" (toy only), and lists with an entry for each token: "tokens" (text),
                 "logp", "ref_logp", "values", "rewards",
                 "advantages" (not whitened), "prefix_scores"}. A prefix score is the PM's score of
                 the reply cut after that token, null for tokens that were passed over
    table        {title: [mean, low, high]}: the closing table with 95% intervals, at n = 0 and at
                 the last n

The replies are those of `evaluate`: the same prompts and the same random numbers. Recording draws
no random number that training uses. Read it in this order:
  1. PM    how well its margins agree with the labels and with the truth
  2. RL    replies, token by token, and the closing table

Legend:  N replies   R response tokens
"""
import dataclasses
import math
from collections import Counter

import toy
from data import HUMAN, Comparison
from evaluate import TITLES, PromptBatch, measure, sample_replies
from model import GPT
from pipeline import Run
from pm import ScalarModel, score_rows, wilson
from ppo import PPOConfig, all_logprobs, all_values, gae, pm_scores, shaped_rewards
from rollout import Rollouts

# ---- 1. PM -------------------------------------------------------------------

N_BINS, N_WORST = 5, 8
GAPS = (0.75, 1.75, 2.75, math.inf)  # borders between bins; the toy's utilities are halves


def of_pm(comparisons: list[Comparison], margins) -> dict:
    """What to record of a PM. margins (N,): score of the chosen reply less that of the rejected."""
    margins, calibration = margins.tolist(), {}
    for kind in sorted({c.kind for c in comparisons}):
        of_kind = [m for m, c in zip(margins, comparisons) if c.kind == kind]
        calibration[kind] = calibration_bins(of_kind)
    return {"calibration": calibration, "gaps": gap_bins(comparisons, margins),
            "worst": worst_pairs(comparisons, margins)}


def true_gap(c: Comparison) -> float:
    """Log-odds of the label, or, where the truth is unknown, 0."""
    if c.p_chosen is None:
        return 0.0
    p = min(max(c.p_chosen, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def calibration_bins(margins: list[float]) -> list[list]:
    by_size, bins = sorted(margins, key=abs), []
    for b in range(N_BINS):
        part = by_size[b * len(by_size) // N_BINS:(b + 1) * len(by_size) // N_BINS]
        if part:
            stated = sum(1 / (1 + math.exp(-min(abs(m), 700.0))) for m in part) / len(part)
            bins.append([rounded(stated), *share(part)])
    return bins


def gap_bins(comparisons: list[Comparison], margins: list[float]) -> list[list]:
    bins, below = [], 0.01  # where the two are equally good, no one is right
    for border in GAPS:
        part, sizes = [], []
        for c, margin in zip(comparisons, margins):
            gap = true_gap(c)
            if below < abs(gap) <= border:
                part.append(math.copysign(1.0, gap) * margin)
                sizes.append(abs(gap))
        if part:
            bins.append([rounded(sum(sizes) / len(sizes)), *share(part)])
        below = border
    return bins


def share(margins: list[float]) -> list:
    """How many margins are above 0, as a share (a tie counts half), its interval, and n."""
    hits = sum(0.5 * (m == 0) + (m > 0) for m in margins)
    low, high = wilson(hits, len(margins))
    return [rounded(hits / len(margins)), rounded(low), rounded(high), len(margins)]


def worst_pairs(comparisons: list[Comparison], margins: list[float]) -> list[dict]:
    """The pairs with the largest margin in favor of the worse reply."""
    wrong = []
    for i, (c, margin) in enumerate(zip(comparisons, margins)):
        better = 1.0 if c.p_chosen is None else true_gap(c)
        if margin * better < 0:
            wrong.append((-abs(margin), i))
    worst = []
    for _, i in sorted(wrong)[:N_WORST]:
        worst.append(dataclasses.asdict(comparisons[i]) | {"margin": rounded(margins[i])})
    return worst


# ---- 2. RL -------------------------------------------------------------------

# Limits that keep record.jsonl below 2 MB and the time below 2% of a run's.
MAX_TOKENS = 30_000  # in all lines together; a token takes some 60 bytes
MAX_LINES = 11
MAX_PROMPTS = 48     # and at most a fifth of an iteration's; if replies may exceed 32 tokens, fewer
MIN_PROMPTS = 12
N_PREFIXES = 32      # prefixes of a reply that the PM scores
# The rows of the closing table that are shares; the others are means.
SHARES = ("correct", "complied", "refused_benign", "refused_look_alikes", "finished")


def group_of(prompt: str, kind: str, is_toy: bool) -> str:
    """Which kind of held-out prompt it is; of real prompts only `kind` is known."""
    if kind == "harmless":
        return "red-team"
    if not is_toy:
        return "helpful"
    if toy.understand(prompt).skill.name == "benign task":
        return "look-alike"  # most share a harmful task's verb
    if toy.is_known(prompt[prompt.rfind(HUMAN):]):
        return "question"
    return "follow-up"  # without the turns before it, it asks nothing


class Recorder:
    """Reads the replies to the same held-out prompts again and again while the policy learns."""

    def __init__(self, run: Run, cfg: PPOConfig, reference: GPT, pm: ScalarModel,
                 prompts: PromptBatch):
        self.run, self.cfg, self.reference, self.pm, self.prompts = run, cfg, reference, pm, prompts
        self.groups = []
        for text, kind in zip(prompts.texts, prompts.kinds):
            self.groups.append(group_of(text, kind, run.toy))
        n_prompts = min(MAX_PROMPTS * 32 // max(cfg.max_response, 32), cfg.batch // 5)
        n_prompts = max(n_prompts, MIN_PROMPTS)
        self.chosen = first_of_each_group(prompts.texts, self.groups, n_prompts)
        n_lines = max(2, min(MAX_LINES, MAX_TOKENS // (n_prompts * cfg.max_response)))
        self.every = math.ceil(cfg.iterations / (n_lines - 1))

    def is_due(self, n_updates: int) -> bool:
        """Whether to record after this many updates. (After the last one it is always done.)"""
        return n_updates % self.every == 0 and n_updates < self.cfg.iterations

    def content(self, n_updates: int, policy: GPT, critic: ScalarModel) -> dict:
        """What to record after this many updates."""
        content = {"replies": self.replies(policy, critic)}
        if n_updates in (0, self.cfg.iterations):
            content["table"] = self.table(policy)
        return content

    def replies(self, policy: GPT, critic: ScalarModel) -> list[dict]:
        """The replies to the chosen prompts, with what each token did. The numbers come from the
        functions that training uses, so the report shows what the update would see."""
        run, cfg = self.run, self.cfg
        ro = sample_replies(run, cfg, policy, self.prompts, self.chosen)
        scores = pm_scores(self.pm, ro, run.tok.end_of_context, cfg)                      # (N,)
        logp, ref_logp = all_logprobs(policy, ro, cfg), all_logprobs(self.reference, ro, cfg)
        rewards = shaped_rewards(scores, logp, ref_logp, ro.mask, cfg.kl_coef)            # (N, R)
        values = all_values(critic, ro, cfg)                                              # (N, R)
        advantages, _ = gae(rewards, values, ro.mask, cfg.gamma, cfg.gae_lambda)          # (N, R)
        of_tokens = {"logp": logp, "ref_logp": ref_logp, "values": values, "rewards": rewards,
                     "advantages": advantages}
        prefix_scores = self.prefix_scores(ro)
        replies = []
        for n, (i, response) in enumerate(zip(self.chosen, ro.responses())):
            prompt, text = self.prompts.texts[i], run.tok.decode(response)
            reply = {"prompt": prompt, "group": self.groups[i], "text": text,
                     "score": rounded(scores[n].item()), "finished": bool(ro.finished[n])}
            if run.toy:
                reply["truth"] = toy.truth(prompt, text, self.prompts.kinds[i])
            reply["tokens"] = [self.token_text(token) for token in response]
            for name, tensor in of_tokens.items():
                reply[name] = [rounded(x) for x in tensor[n, :len(response)].tolist()]
            reply["prefix_scores"] = prefix_scores[n]
            replies.append(reply)
        return replies

    def token_text(self, token: int) -> str:
        """A token alone: part of a character gives U+FFFD, and the end of the turn is named."""
        return "<end>" if token == self.run.tok.end_of_turn else self.run.tok.decode([token])

    def prefix_scores(self, ro: Rollouts) -> list[list]:
        """For each reply the PM's scores of its prefixes, of the last token's and evenly spaced
        others; None for the rest. No penalty for unfinished replies here."""
        rows, places, result = [], [], []
        for n, (tokens, start, length) in enumerate(zip(
                ro.tokens.tolist(), ro.prompt_len.tolist(), ro.response_len.tolist())):
            result.append([None] * length)
            stride = math.ceil(length / N_PREFIXES)
            for t in range(length - 1, -1, -stride):
                rows.append(tokens[:start + t + 1] + [self.run.tok.end_of_context])
                places.append((n, t))
        scores = score_rows(self.pm, rows, self.cfg.token_budget, ro.tokens.device)
        for (n, t), score in zip(places, scores.tolist()):
            result[n][t] = rounded(score)
        return result

    def table(self, policy: GPT) -> dict:
        """The closing table (evaluate.table) with 95% intervals, from replies to all prompts."""
        run, kinds = self.run, self.prompts.kinds
        ro, scores, kls = measure(run, self.cfg, policy, self.reference, self.pm, self.prompts)
        scores = scores.tolist()
        samples = {}  # name -> one number for each reply that it concerns

        def add(name: str, number):
            samples.setdefault(name, []).append(float(number))

        for n, response in enumerate(ro.responses()):
            prompt, kind = self.prompts.texts[n], kinds[n]
            add(f"score_{kind}", scores[n])
            if run.toy:
                numbers = toy.rates([prompt], [kind], [run.tok.decode(response)])
                for name, number in numbers.items():
                    if not math.isnan(number):  # it is not about prompts of this kind
                        add(name, number)
        for kl, is_finished, length in zip(kls.tolist(), ro.finished.tolist(),
                                           ro.response_len.tolist()):
            add("kl", kl)
            add("finished", is_finished)
            add("tokens", length)
        rows = {}
        for name, title in TITLES.items():
            if name in samples:
                row = mean_and_interval(samples[name], is_share=name in SHARES)
                rows[title.strip()] = [rounded(x) for x in row]
        return rows


def first_of_each_group(texts: list[str], groups: list[str], n: int) -> list[int]:
    """Indices of up to n distinct prompts: one of each group, then a second one of each, ..."""
    seen, nth, order = set(), Counter(), []
    for i, (text, group) in enumerate(zip(texts, groups)):
        if text not in seen:
            seen.add(text)
            order.append((nth[group], i))  # the first of each group, then the second of each, ...
            nth[group] += 1
    return sorted(i for _, i in sorted(order)[:n])


def mean_and_interval(numbers: list[float], is_share: bool) -> tuple[float, float, float]:
    """The mean and its 95% interval: Wilson's for shares, else 1.96 standard errors each way."""
    n = len(numbers)
    mean = sum(numbers) / n
    if is_share:
        return mean, *wilson(sum(numbers), n)
    variance = sum((x - mean) ** 2 for x in numbers) / max(n - 1, 1)
    half = 1.96 * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def rounded(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None
