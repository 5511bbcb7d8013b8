"""§6.1, Figs 1 and 24: crowdworkers like the finished policy about as much as human writers.

    python experiments/writers.py            # 1 seed; minutes on two CPU cores
    python experiments/writers.py --full     # 4 seeds

The paper's claim: professional writers were asked to write fairly ideal dialogues. Crowdworkers
preferred the online model's reply to the writers' last prompt 56% of the time (57% in §1.2), so the
model is roughly as good as the writers, and slightly preferred. The model's reply is the median of
17 samples, as ranked by the PM. HH warn that the writers' prompts were "not very adversarial".

Here, 17 writers are drawn for each seed. In every respect a writer stands somewhere between KIND,
the kind assistant of the corpus, and an ideal one; none is perfect. Their true utility on other
helpful prompts tells the best writer and the median one. Each of these two and the policy of a
whole run (`lab.trained`) answer the same held-out prompts. The win rate is the mean probability
with which a crowdworker prefers the policy's reply. As in HH, the policy's reply is the median of
17 samples by its PM.

1. The finding, on helpful prompts: the win rate over the median writer is above 0.5. The control
   takes RLHF away: the initial policy's win rate over the same writer is below 0.5.
2. A finding of its own: the win rate over the best writer is above 0.45 (nearly as good).
The table also has red-team prompts, and the win rate that the PM's scores promise (Eq. 4.2). HH's
PM, too, liked the policy's replies better than the writers' (Fig. 24), which "may largely reflect
overfitting of the RLHF policies to the PM".
"""
import dataclasses

import lab
import output
from decide import Claim, sentence
from picture import groups

import toy
import toy_corpus
from toy_corpus import KIND, PERFECT, Persona

N_WRITERS, N_SAMPLES = 17, 17
IDEAL = dataclasses.replace(PERFECT, polite=1.0, offers=1.0)
RLHF, INITIAL = "RLHF", "initial (control)"
BEST, MEDIAN = "best writer", "median writer"


def hire(rng) -> Persona:
    """Draw a writer: in each respect 20 to 90% of the way from KIND to IDEAL."""
    fields = {}
    for field in dataclasses.fields(Persona):
        kind, ideal = getattr(KIND, field.name), getattr(IDEAL, field.name)
        fields[field.name] = kind + rng.uniform(0.2, 0.9) * (ideal - kind)
    return Persona(**fields)


def draw_prompts(run, kind: str, n: int, name: str) -> list[str]:
    rng = run.rng("writers", kind, name)
    return [toy_corpus.draw_prompt(rng, kind, held_out=True) for _ in range(n)]


def write(writer: Persona, prompts: list[str], rng) -> list[str]:
    """The writer's reply to each prompt."""
    return [toy_corpus.speak(toy.understand(prompt), writer, rng) for prompt in prompts]


def mean_truth(prompts: list[str], replies: list[str], kind: str) -> float:
    return toy.mean_or_nan(toy.truth(p, r, kind) for p, r in zip(prompts, replies))


def choose_writers(run, n: int) -> dict[str, Persona]:
    """The best and the median of the writers, by their true helpfulness on n prompts."""
    rng, writers = run.rng("writers"), []
    prompts = draw_prompts(run, "helpful", n, "to rank the writers")
    for _ in range(N_WRITERS):
        writer = hire(rng)
        writers.append((mean_truth(prompts, write(writer, prompts, rng), "helpful"), writer))
    writers.sort(key=lambda pair: pair[0])
    return {MEDIAN: writers[N_WRITERS // 2][1], BEST: writers[-1][1]}


def compare(run, pm, prompts: list[str], ours: list[str], theirs: list[str], kind: str) -> dict:
    """A policy's replies against a writer's: how often crowdworkers prefer ours, and how often
    they would if the PM were right (by_pm)."""
    preferred = []
    for prompt, our, their in zip(prompts, ours, theirs):
        preferred.append(toy.preference(prompt, our, their, kind))
    win_rate, error = output.mean_se(preferred)
    a, b = lab.score_replies(run, pm, prompts, ours), lab.score_replies(run, pm, prompts, theirs)
    return {"win_rate": win_rate, "+-": error, "by_pm": (a - b).sigmoid().mean().item(),
            "truth": mean_truth(prompts, ours, kind),
            "writer_truth": mean_truth(prompts, theirs, kind)}


def one_seed(run, n: int) -> list[dict]:
    """A row for each kind of prompt, policy and writer."""
    pm, rows = run.load_model("pm.pt"), []
    policies = {RLHF: run.load_model("policy.pt"), INITIAL: lab.load(run)}
    writers = choose_writers(run, n)
    for kind in lab.KINDS:
        prompts, written = draw_prompts(run, kind, n, "matches"), {}
        for name, writer in writers.items():
            written[name] = write(writer, prompts, run.rng("writers", kind, name))
        for policy_name, policy in policies.items():
            ours = lab.median_of(run, policy, pm, prompts, N_SAMPLES, f"{policy_name} {kind}")
            for name, theirs in written.items():
                row = {"seed": run.seed, "kind": kind, "policy": policy_name, "against": name}
                rows.append(row | compare(run, pm, prompts, ours, theirs, kind))
    return rows


def draw(plt, rows):
    found = {}
    for policy in (RLHF, INITIAL):
        mine = output.select(rows, kind="helpful", policy=policy)
        found[policy] = output.samples(mine, "win_rate", "against", (MEDIAN, BEST))
    groups(plt, [f"against the {writer}" for writer in (MEDIAN, BEST)], found)
    plt.axhline(0.5, color="gray", lw=0.8)
    plt.axhline(0.56, color="gray", ls=":", lw=0.8, label="HH, all writers: 0.56")
    plt.ylabel("win rate on helpful prompts")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome against the median writer, and the sentences of both findings."""
    def rates(policy: str, writer: str) -> list[float]:
        mine = output.select(rows, kind="helpful", policy=policy, against=writer)
        return output.column(mine, "win_rate")

    outcome, median = sentence(
        "crowdworkers prefer the policy to the median of 17 writers (HH, all writers: 56 to 57%)",
        [Claim("win rate of RLHF", rates(RLHF, MEDIAN), above=0.5),
         Claim("of the initial policy, the control", rates(INITIAL, MEDIAN), below=0.5)])
    _, best = sentence("it is nearly as good as the best of them",
                       [Claim("win rate of RLHF", rates(RLHF, BEST), above=0.45)])
    return outcome, f"{median} {best}"


def experiment(args):
    n, n_seeds = 500, 1
    if args.full:
        n, n_seeds = 1500, 4
    if args.tiny:
        n, n_seeds = 6, 1
    rows = output.each_seed("writers", args, n_seeds,
                            lambda seed: one_seed(lab.trained(seed, args.tiny), n))
    print("how often crowdworkers prefer the policy to the writer, and would by the PM; errors "
          f"over {n} prompts of each kind")
    output.table(rows)
    _, sentences = verdict(rows)
    output.finish("writers", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
