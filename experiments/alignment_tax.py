"""§4.6.1, Figs 3 and 28: what alignment costs or gives on skills that it does not train, by size.

    python experiments/alignment_tax.py           # three sizes x 3 seeds; minutes on two CPU cores
    python experiments/alignment_tax.py --full    # 5 seeds, longer RLHF

The paper's claim: zero-shot, RLHF taxes small models and helps those of 13B parameters and more;
few-shot, large models do about as well with it as without it. RLHF here sees dialogues only. What
is measured are skills of the corpus's plain text, in which no assistant speaks:
  state    complete a textbook's statement ("The capital of France is" -> "Paris."), greedily
  answer   answer a quiz question, greedily (half of the answers in the corpus's quizzes are wrong)
  judge    say whether a quiz's answer is right: P("Right.") against P("Wrong."); chance is 0.5
with nothing before the question (zero-shot), and after four examples of the skill (few-shot). Quiz
questions are held out. The LM loss on fresh plain text and dialogues, in nats a token, comes along.

The tax is the LM's accuracy minus the RLHF policy's. It is that of the whole pipeline: the stage
"initial" in the table tells what context distillation costs, before any RLHF. The verdict's
threshold: the zero-shot tax of the smallest model is above 0, and above that of the largest model,
by 2 standard errors. They are over RLHF's seeds; all seeds share one LM and one PM. Our sizes
differ by a factor of 4, so at most the sign of the tax can be seen, and whether it shrinks.
"""
import dataclasses

import lab
import output
import torch
from exercises import SHOTS, SKILLS, Exercise, exercises

import toy
import toy_corpus
from rollout import rollout
from train_lm import mean_loss
from train_rl import RLConfig

STAGES = ("LM", "initial", "RLHF")


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


def verdict(taxes: list[tuple[str, float, float]], n: int) -> tuple[str, str]:
    """taxes: (size, zero-shot tax, its standard error), smallest size first; n seeds."""
    (small_size, small, small_se), (large_size, large, large_se) = taxes[0], taxes[-1]
    se = (small_se**2 + large_se**2) ** 0.5
    outcome, words = "DOES NOT HOLD", " as stated"
    if small > 2 * small_se and small - large > 2 * se:
        outcome, words = "HOLDS", ": the pipeline taxes the smallest model, the largest less"
    return outcome, (
        f"{outcome}{words}: the zero-shot tax is {small:+.3f} +- {small_se:.3f} at {small_size} "
        f"and {large:+.3f} +- {large_se:.3f} at {large_size} (n = {n}; threshold: the first, and "
        "their difference, above 2 standard errors).")


def summarize(rows: list[dict], sizes: list[str]) -> tuple[list[dict], list[tuple]]:
    """Means over seeds for the table, and (size, shots, tax, standard error) of each tax."""
    means, taxes = [], []
    for size in sizes:
        for stage in STAGES:
            mine = output.select(rows, size=size, stage=stage)
            mean = {"size": size, "stage": stage}
            for name in list(rows[0])[3:]:
                mean[name], _ = output.mean_se(output.column(mine, name))
            means.append(mean)
    for shots in SHOTS:
        for size in sizes:
            before = output.select(rows, size=size, stage="LM")[0][shots]
            rlhf = output.select(rows, size=size, stage="RLHF")
            after, se = output.mean_se(output.column(rlhf, shots))
            taxes.append((size, shots, before - after, se))
    return means, taxes


def draw(plt, rows, runs):
    params = [run.model_config().n_params() for run in runs.values()]
    for shots, color in (("zero", "C0"), ("few", "C1")):
        before, after, errors = [], [], []
        for size in runs:
            before.append(output.select(rows, size=size, stage="LM")[0][shots])
            rlhf = output.select(rows, size=size, stage="RLHF")
            mean, se = output.mean_se(output.column(rlhf, shots))
            after.append(mean)
            errors.append(se)
        plt.plot(params, before, color + "o--", label=f"LM, {shots}-shot")
        plt.errorbar(params, after, errors, fmt=color + "o-", label=f"RLHF, {shots}-shot")
    plt.xscale("log")
    plt.xlabel("parameters")
    plt.ylabel("accuracy, mean of three skills")
    plt.legend()


def experiment(args):
    sizes, seeds, n, n_texts = ["small", "medium", "toy"], 5 if args.full else 3, 4000, 800
    cfg = RLConfig(iterations=100 if args.full else 40, batch=128, eval_every=1000)
    if args.tiny:
        sizes, seeds, n, n_texts = ["toy"], 1, 60, 20
        cfg = dataclasses.replace(cfg, iterations=3, batch=32, minibatch=16, eval_prompts=32)
    runs = lab.bases(sizes, args.seed, args.tiny)
    big = runs[sizes[-1]]
    pm = lab.train_pm_on(big, lab.comparisons(big, n) + lab.comparisons(big, n // 2, "harmless"))
    tests, texts = exercises(big), fresh_texts(big, n_texts)

    rows = []
    for size, run in runs.items():
        for stage, name in (("LM", "lm.pt"), ("initial", "initial.pt")):
            row = {"size": size, "stage": stage, "seed": args.seed, "kl": 0.0}
            rows.append(row | measure(run, lab.load(run, name), tests, texts))
        for seed in range(args.seed, args.seed + seeds):
            learner, path = lab.ppo(lab.replica(run, seed), pm, cfg)
            row = {"size": size, "stage": "RLHF", "seed": seed, "kl": path[-1]["kl"]}
            rows.append(row | measure(run, learner.policy, tests, texts))

    means, taxes = summarize(rows, sizes)
    counts = [f"{skill} zero: {len(tests[f'{skill} zero'])}" for skill in SKILLS]
    print(f"{', '.join(counts)} questions; loss in nats a token; zero, few: means of the three; "
          f"RLHF: mean of {seeds} seeds")
    output.table(means)
    zero_shot = []
    for size, shots, tax, se in taxes:
        print(f"    tax, {shots}-shot, {size}: {tax:+.3f} +- {se:.3f} (LM less RLHF, n = {seeds})")
        if shots == "zero":
            zero_shot.append((size, tax, se))
    _, sentence = verdict(zero_shot, seeds)
    output.finish("alignment_tax", args, rows, lambda plt: draw(plt, rows, runs), sentence)


if __name__ == "__main__":
    output.main(experiment, __doc__)
