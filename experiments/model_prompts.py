"""§4.1: prompts that a model wrote are as good for RL as those that people wrote.

    python experiments/model_prompts.py            # 1 seed; minutes on two CPU cores
    python experiments/model_prompts.py --full     # 4 seeds

The paper's claim: of its 506k prompts for RL, 137k are those of comparisons, and 369k were written
by a model that was shown some ten good ones. The sample efficiency is about equal on both, so HH
mix them for diversity. No number is printed.

One PM, the main job's, and four sets of prompts, with the same number of responses:
  crowd           the prompts of the comparisons: the main job's own policy (`lab.trained`)
  written         the LM's (prompts.py): each opens a dialogue, and has no history
  mixed           half of each
  red-team only   the control: the crowd's prompts, but none of the kind that two thirds of the
                  held-out prompts are of
The statistic is how much true utility a policy gained on held-out crowd prompts, two thirds of them
helpful ones, divided by the gain with crowd prompts. The verdict has one number for each seed:
written and mixed prompts gain within 10% of the crowd's, the control less than that.
"""
import lab
import output
from decide import Claim, sentence
from picture import groups

import toy_corpus
from evaluate import Prompts, evaluate
from prompts import write
from train_rl import RLConfig

CROWD, WRITTEN, MIXED, CONTROL = "crowd", "written", "mixed", "red-team only"
N_WRITTEN = 1000  # of each kind


def written_prompts(run, kind: str, n: int, tiny: bool) -> list[str]:
    """At most n prompts by the LM. A tiny one writes nothing that can be used, so a tiny run takes
    drawn questions in their place."""
    if tiny:
        rng = run.rng("instead of written", kind)
        return [toy_corpus.open_dialogue(rng, kind, held_out=False) for _ in range(n)]
    cfg = RLConfig()
    return write(run, lab.load(run, "lm.pt"),
                 Prompts(run, cfg.max_response, cfg.harmless_share), kind, n)


def prompts_of(arm: str, run, cfg: RLConfig, written: dict) -> Prompts:
    """The prompts that one arm learns from. written: {kind: prompts}."""
    share = 1.0 if arm == CONTROL else cfg.harmless_share
    prompts = Prompts(run, cfg.max_response, share)
    if arm in (WRITTEN, MIXED):
        prompts.written = written
        prompts.written_share = 1.0 if arm == WRITTEN else 0.5
    return prompts


def truth(numbers: dict) -> float:
    return (2 * numbers["helpfulness"] + numbers["harmlessness"]) / 3


def one_arm(arm: str, run, cfg: RLConfig, written: dict) -> list[dict]:
    """A row: how the policy of one arm ends, and what it gained over the initial policy."""
    pm, initial = run.load_model("pm.pt"), lab.load(run)
    prompts = prompts_of(arm, run, cfg, written)
    if arm == CROWD:
        ends = []
        for policy in (initial, run.load_model("policy.pt")):
            numbers, _ = evaluate(run, cfg, policy, initial, pm, prompts.held_out(cfg.eval_prompts))
            ends.append(numbers)
    else:
        _, ends = lab.ppo(run, pm, cfg, initial, prompts=prompts)
    before, after = ends[0], ends[-1]
    row = {"seed": run.seed, "prompts": arm, "gain": truth(after) - truth(before)}
    for name in ("helpfulness", "harmlessness", "correct", "complied", "kl"):
        row[name] = after[name]
    return [row]


def draw(plt, rows):
    arms = (CROWD, WRITTEN, MIXED, CONTROL)
    groups(plt, arms, {"": output.samples(rows, "gain", "prompts", arms)})
    plt.ylim(bottom=min(0, *output.column(rows, "gain")))
    plt.xlabel("prompts for RL")
    plt.ylabel("true utility gained by RL (nats)")


def verdict(rows: list[dict]) -> tuple[str, str]:
    """rows: of each seed and arm."""
    def ratios(arm: str) -> list[float]:
        ours, crowd = (output.select(rows, prompts=name) for name in (arm, CROWD))
        return [our["gain"] / crowds["gain"] for our, crowds in zip(ours, crowd)]

    return sentence(
        "prompts that the model wrote, less the unusable ones, are as good for RL as the crowd's",
        [Claim("gain, as a share of the crowd prompts', with written ones", ratios(WRITTEN),
               above=0.9, below=1.1),
         Claim("with half of each", ratios(MIXED), above=0.9, below=1.1),
         Claim("with red-team prompts only, the control", ratios(CONTROL), below=0.9)])


def experiment(args):
    cfg, n_written = RLConfig(eval_every=1000, eval_prompts=2048), N_WRITTEN
    n_seeds = 4 if args.full else 1
    if args.tiny:
        cfg, n_written, n_seeds = lab.TINY_RL, 20, 1

    def measure(seed: int) -> list[dict]:
        run, written, rows = lab.trained(seed, args.tiny), {}, []
        for kind in lab.KINDS:
            written[kind] = written_prompts(run, kind, n_written, args.tiny)
        for arm in (CROWD, WRITTEN, MIXED, CONTROL):
            rows += one_arm(arm, run, cfg, written)
        return rows

    rows = output.each_seed("model_prompts", args, n_seeds, measure)
    print(f"held-out crowd prompts, after RL with {cfg.iterations * cfg.batch:,} responses; gain: "
          "true utility over the initial policy's")
    output.table(rows)
    _, words = verdict(rows)
    output.finish("model_prompts", args, rows, lambda plt: draw(plt, rows), words)


if __name__ == "__main__":
    output.main(experiment, __doc__)
