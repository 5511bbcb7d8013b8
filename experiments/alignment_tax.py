"""§4.6.1, Figs 3 and 28: what alignment costs or gives on skills that it does not train, by size.

    python experiments/alignment_tax.py           # 1 seed of three sizes; minutes on two CPU cores
    python experiments/alignment_tax.py --full    # 4 seeds

The paper's claim: zero-shot, RLHF taxes small models and helps those of 13B parameters and more;
few-shot, large models do about as well with it as without it. RLHF here sees dialogues only. What
is measured are skills of the corpus's plain text, in which no assistant speaks:
  state    complete a textbook's statement ("The capital of France is" -> "Paris."), greedily
  answer   answer a quiz question, greedily (half of the answers in the corpus's quizzes are wrong)
  judge    say whether a quiz's answer is right: P("Right.") against P("Wrong."); chance is 0.5
with nothing before the question (zero-shot), and after four examples of the skill (few-shot). Quiz
questions are held out. The LM loss on fresh plain text and dialogues, in nats a token, comes along.

The tax of a stage is the accuracy before it minus the accuracy after it. "pipeline" is from the LM
to the RLHF policy; of that, "distillation" is what context distillation costs, before any RLHF, and
"RLHF" is the rest. Our sizes differ by a factor of 4, so at most the sign of a tax can be seen, and
whether it shrinks.

1. The finding: zero-shot, the pipeline taxes the smallest model, and the largest model less.
2. A finding of its own: so does RLHF alone. The control takes the cause away: RLHF that also learns
   from the corpus's text (PPO-ptx of InstructGPT, gamma = 0.3) has plain text to keep its skills.
3. Another: RLHF gives the largest model a bonus, zero-shot.
"""
import dataclasses

import lab
import output
import torch
from decide import Claim, sentence
from exercises import SHOTS, SKILLS, Exercise, exercises
from picture import curve

import toy
import toy_corpus
from rollout import rollout
from train_lm import mean_loss
from train_rl import RLConfig

LM, INITIAL, RLHF, PTX = "LM", "initial", "RLHF", "RLHF with text (control)"
STAGES = (LM, INITIAL, RLHF, PTX)
TAXES = {"pipeline": (LM, RLHF), "distillation": (LM, INITIAL), "RLHF": (INITIAL, RLHF),
         "RLHF with text": (INITIAL, PTX)}  # name -> (before, after)


@torch.no_grad()
def judging_accuracy(run, model, asked: list[Exercise]) -> float:
    """How often the right verdict has the higher logit."""
    hits = 0
    for exercise in asked:
        ids = torch.tensor([run.tok.encode(exercise.text)], device=run.device)  # (1, T)
        logits = model.logits(model(ids)[:, -1])[0]                             # (V,)
        right, wrong = run.tok.encode(exercise.right[0])[0], run.tok.encode(exercise.wrong)[0]
        hits += (logits[right] > logits[wrong]).item()
    return hits / len(asked)


def completing_accuracy(run, model, asked: list[Exercise]) -> float:
    """How often the greedy continuation begins with a right one."""
    ids = [run.tok.encode(exercise.text) for exercise in asked]
    uniforms = torch.full((len(ids), 16), 0.5)
    # At so low a temperature the likeliest token is as good as certain.
    ro = rollout(model, ids, uniforms, run.tok.end_of_turn, temperature=1e-3)
    hits = 0
    for response, exercise in zip(ro.responses(), asked):
        hits += run.tok.decode(response).startswith(exercise.right)
    return hits / len(asked)


def measure(run, model, tests: dict, texts: dict) -> dict[str, float]:
    """The accuracy in each test, the loss on each kind of text, the mean of zero- and few-shot."""
    numbers = {}
    for name, asked in tests.items():
        accuracy = judging_accuracy if name.startswith("judge") else completing_accuracy
        numbers[name] = accuracy(run, model, asked)
    for kind, rows in texts.items():
        numbers[f"loss {kind}"] = mean_loss(model, rows, run.device)
    for shots in SHOTS:
        numbers[shots] = toy.mean_or_nan(numbers[f"{skill} {shots}"] for skill in SKILLS)
    return numbers


def fresh_texts(run, n: int) -> dict[str, list[list[int]]]:
    """New documents of the corpus as rows of ids, by kind."""
    rng, rows = run.rng("tax texts"), {"plain": [], "dialogue": []}
    for _ in range(n):
        text = toy_corpus.document(rng, headers=False)
        kind = "dialogue" if "Human:" in text else "plain"
        rows[kind].append(run.tok.encode_dialogue(text)[:run.context])
    return rows


def one_seed(runs: dict, cfg: RLConfig, n: int, n_texts: int) -> list[dict]:
    """A row for each size and stage."""
    big, rows = list(runs.values())[-1], []
    pm = lab.train_pm_on(big, lab.comparisons(big, n) + lab.comparisons(big, n // 2, "harmless"))
    tests, texts = exercises(big), fresh_texts(big, n_texts)
    with_text = dataclasses.replace(cfg, ptx_coef=0.3)
    for size, run in runs.items():
        models = {LM: (lab.load(run, "lm.pt"), 0.0), INITIAL: (lab.load(run), 0.0)}
        for stage, options in ((RLHF, cfg), (PTX, with_text)):
            learner, path = lab.ppo(run, pm, options)
            models[stage] = (learner.policy, path[-1]["kl"])
        for stage, (model, kl) in models.items():
            row = {"seed": run.seed, "size": size, "stage": stage, "kl": kl}
            rows.append(row | measure(run, model, tests, texts))
    return rows


def taxes(rows: list[dict], name: str, size: str, shots: str) -> list[float]:
    """Accuracy before minus accuracy after, one number for each seed."""
    before, after = (output.column(output.select(rows, size=size, stage=stage), shots)
                     for stage in TAXES[name])
    return output.less(before, after)


def draw(plt, rows):
    sizes = list(dict.fromkeys(output.column(rows, "size")))
    for i, shots in enumerate(("zero", "few"), 1):
        plt.subplot(1, 2, i)
        for stage in STAGES:
            mine = output.select(rows, stage=stage)
            curve(plt, sizes, output.samples(mine, shots, "size", sizes), stage)
        plt.xlabel("size")
        plt.ylabel(f"{shots}-shot accuracy, mean of three skills")
    plt.legend()


def verdict(rows: list[dict]) -> tuple[str, str]:
    """The outcome of the first finding, and the sentences of all three."""
    sizes = list(dict.fromkeys(output.column(rows, "size")))
    small, large = sizes[0], sizes[-1]

    def claims(name: str) -> list[Claim]:
        of_small, of_large = (taxes(rows, name, size, "zero") for size in (small, large))
        return [Claim(f"zero-shot tax at {small}", of_small, above=0.0),
                Claim(f"less that at {large}", output.less(of_small, of_large), above=0.0)]

    outcome, tax = sentence("the pipeline taxes the smallest model, and the largest less",
                            claims("pipeline"))
    _, alone = sentence("so does RLHF alone", claims("RLHF"), claims("RLHF with text"))
    gains = [-tax for tax in taxes(rows, "RLHF", large, "zero")]
    _, bonus = sentence("RLHF gives the largest model a bonus",
                        [Claim(f"zero-shot gain at {large}", gains, above=0.0)])
    return outcome, f"{tax} {alone} {bonus}"


def experiment(args):
    sizes, n_seeds, n, n_texts = ["small", "medium", "toy"], 1, 4000, 800
    cfg = RLConfig(iterations=40, batch=128, eval_every=1000)
    if args.full:
        n_seeds = 4
    if args.tiny:
        sizes, n, n_texts = ["small", "toy"], 60, 20
        cfg = dataclasses.replace(cfg, iterations=3, batch=32, minibatch=16, eval_prompts=32)
    rows = output.each_seed("alignment_tax", args, n_seeds, lambda seed: one_seed(
        lab.bases(sizes, seed, args.tiny), cfg, n, n_texts))
    print(f"zero, few: means of three skills; loss in nats a token; means of {n_seeds} seeds")
    output.table(output.means(rows, ("size", "stage")))
    table = []
    for name in TAXES:
        for size in sizes:
            row = {"tax": name, "size": size}
            for shots in SHOTS:
                found = taxes(rows, name, size, shots)
                row[f"{shots}-shot"], row[f"+- {shots}"] = output.mean_se(found)
            table.append(row)
    output.table(table)
    _, sentences = verdict(rows)
    output.finish("alignment_tax", args, rows, lambda plt: draw(plt, rows), sentences)


if __name__ == "__main__":
    output.main(experiment, __doc__)
