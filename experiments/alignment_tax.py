"""§4.6.1, Figs 3 and 28: what RLHF costs, or gives, on skills that it does not train; by model size.

    python experiments/alignment_tax.py           # three sizes x 3 seeds; minutes on two CPU cores
    python experiments/alignment_tax.py --full    # 5 seeds, longer RLHF

RLHF here sees dialogues only. The skills are those of the corpus's plain text, in which no assistant speaks:
  state    complete a textbook's statement ("The capital of France is" -> "Paris."), greedily, exact match
  answer   answer a quiz question, greedily, exact match; half of the answers of the corpus's quizzes are wrong
  judge    say whether a quiz's answer is right: P("Right.") against P("Wrong."); chance is 0.5
with nothing before the question (zero-shot), and behind four examples of the same skill (few-shot). Quiz questions are
held out. Also the LM loss, in nats a token, on fresh plain text and fresh dialogues of the corpus. Measured on the
plain LM, the initial policy (distilled) and the RLHF policies, which are trained against one PM of the largest size.

The paper finds a tax on small models zero-shot, a bonus from 13B on, and little difference few-shot at large size.
These models differ by a factor of 4, so all that can be seen is the sign of the tax, and whether it shrinks.
"""
import dataclasses

import lab
import torch

import toy
from rollout import rollout
from train_lm import lm_loss, pieces
from train_rl import RLConfig

VERDICTS = (" Right.", " Wrong.")


def said(answer: str) -> str:
    return f" {answer[0].upper()}{answer[1:]}."  # as the corpus's assistants and quizzes give a bare answer


def exercises(run) -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    """{"state zero": [(text before, right continuations, wrong continuation), ...], ...}, six kinds."""
    found = {f"{name} {shots}": [] for shots in ("zero", "few") for name in ("state", "answer", "judge")}
    rng = run.rng("tax")

    def add(name, examples, text, right, wrong=""):
        found[f"{name} zero"].append((text, right, wrong))
        found[f"{name} few"].append((" ".join([*examples, text]), right, wrong))
    for skill in (toy.SKILLS[name] for name in toy.HELPFUL_SKILLS):
        for about, answer in skill.answers.items():
            request = toy.Request(skill, about)
            others = [toy.Request(skill, x) for x in rng.sample([x for x in skill.answers if x != about], 4)]
            stem = request.statement("|").split(" |")[0]  # up to the answer
            add("state", [o.statement(o.answer) for o in others], stem, (f" {answer}.",))
            questions = [q for t in skill.templates if toy.held_out([q := t.format(about)])]
            for question in questions[:1]:
                asked = [skill.templates[0].format(o.about) for o in others]
                right = [q + said(o.answer) for q, o in zip(asked, others)]
                mixed = [q + said(rng.choice(o.wrong_answers())) if i % 2 else r
                         for i, (q, r, o) in enumerate(zip(asked, right, others))]
                add("answer", [r + VERDICTS[0] for r in right], question,
                    (said(answer), " " + request.statement(answer)))
                for i, reply in enumerate((answer, rng.choice(request.wrong_answers()))):
                    add("judge", [m + VERDICTS[j % 2] for j, m in enumerate(mixed)], question + said(reply),
                        (VERDICTS[i],), VERDICTS[1 - i])
    return found


@torch.no_grad()
def measure(run, model, tests, texts) -> dict[str, float]:
    """Accuracy of each test, and the loss on each kind of text."""
    numbers = {}
    for name, asked in tests.items():
        ids = [run.tok.encode(text) for text, *_ in asked]
        if name.startswith("judge"):
            pairs = torch.tensor([[run.tok.encode(c)[0] for c in (right[0], wrong)] for _, right, wrong in asked])
            hidden = torch.cat([model(torch.tensor([i], device=run.device))[:, -1] for i in ids])  # (N, D)
            logits = model.logits(hidden).cpu().gather(1, pairs)  # (N, 2)
            numbers[name] = (logits[:, 0] > logits[:, 1]).float().mean().item()
        else:  # at so low a temperature the likeliest token is as good as certain: greedy
            ro = rollout(model, ids, torch.full((len(ids), 16), 0.5), run.tok.end_of_turn, temperature=1e-3)
            replies = [run.tok.decode(r) for r in ro.responses()]
            numbers[name] = toy.mean(r.startswith(right) for r, (_, right, _) in zip(replies, asked))
    for kind, rows in texts.items():
        numbers[f"loss {kind}"] = sum(lm_loss(model, part, run.device).item() * share
                                      for part, share in pieces(rows, run.device))
    return numbers | {shots: toy.mean(numbers[t] for t in tests if t.endswith(shots)) for shots in ("zero", "few")}


def experiment(args):
    sizes, seeds, n = ["small", "medium", "toy"], 5 if args.full else 3, 4000
    cfg = RLConfig(iterations=100 if args.full else 40, batch=128, eval_every=1000)
    if args.tiny:
        sizes, seeds, n = ["toy"], 1, 100
        cfg = dataclasses.replace(cfg, iterations=3, batch=32, minibatch=16, eval_prompts=32)
    runs = {size: lab.base(size, args.seed, 300 if args.tiny else 0) for size in sizes}
    big = runs[sizes[-1]]
    assert all(run.tok.fingerprint == big.tok.fingerprint for run in runs.values()), "a common PM needs common ids"
    pm = lab.train_pm_on(big, lab.comparisons(big, n) + lab.comparisons(big, n // 2, "harmless"))
    tests, rng = exercises(big), big.rng("tax texts")
    texts = [toy.document(rng, headers=False) for _ in range(40 if args.tiny else 800)]
    texts = {kind: [big.tok.encode_dialogue(t)[:big.context] for t in texts if ("Human:" in t) == (kind == "dialogue")]
             for kind in ("plain", "dialogue")}

    rows = []
    for size, run in runs.items():
        rows += [dict(size=size, stage=stage, seed=args.seed, kl=0.0)
                 | measure(run, lab.load(run, f"{stage.lower()}.pt"), tests, texts) for stage in ("LM", "initial")]
        for seed in range(args.seed, args.seed + seeds):
            learner, path = lab.ppo(lab.replica(run, seed), pm, cfg)
            rows.append(dict(size=size, stage="RLHF", seed=seed, kl=path[-1]["kl"])
                        | measure(run, learner.policy, tests, texts))

    def of(size, stage, key): return lab.mean_se(r[key] for r in rows if (r["size"], r["stage"]) == (size, stage))
    print(", ".join(f"{name}: {len(asked)}" for name, asked in tests.items() if "zero" in name) + " questions; loss in "
          f"nats a token; zero, few: means of the three; RLHF: mean of {seeds} seeds")
    lab.table([dict(size=size, stage=stage) | {key: of(size, stage, key)[0] for key in list(rows[0])[3:]}
               for size in sizes for stage in ("LM", "initial", "RLHF")])
    tax = {}
    for size, shots in [(size, shots) for shots in ("zero", "few") for size in sizes]:
        after, se = of(size, "RLHF", shots)
        tax[size, shots] = of(size, "LM", shots)[0] - after, se
        print(f"    tax, {shots}-shot, {size}: {tax[size, shots][0]:+.3f} +- {se:.3f} (LM less RLHF, n = {seeds})")

    def draw(plt):
        params = [run.model_config().n_params() for run in runs.values()]
        for shots, color in (("zero", "C0"), ("few", "C1")):
            plt.plot(params, [of(s, "LM", shots)[0] for s in sizes], color + "o--", label=f"LM, {shots}-shot")
            after, errors = zip(*(of(s, "RLHF", shots) for s in sizes))
            plt.errorbar(params, after, errors, fmt=color + "o-", label=f"RLHF, {shots}-shot")
        plt.xscale("log"), plt.xlabel("parameters"), plt.ylabel("accuracy, mean of three skills"), plt.legend()

    (small, small_se), (large, large_se) = tax[sizes[0], "zero"], tax[sizes[-1], "zero"]
    holds = small > 2 * small_se and small - large > 2 * (small_se**2 + large_se**2) ** 0.5
    lab.finish("alignment_tax", args, rows, draw, (
        "HOLDS: RLHF taxes the smallest model zero-shot, the largest less: " if holds else "DOES NOT HOLD as stated: ")
        + f"the zero-shot tax is {small:+.3f} +- {small_se:.3f} at {sizes[0]} and {large:+.3f} +- {large_se:.3f} at "
        f"{sizes[-1]} (n = {seeds}; threshold: the first, and their difference, above 2 standard errors).")


if __name__ == "__main__":
    lab.main(experiment, __doc__)
