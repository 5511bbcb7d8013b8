"""What the experiments share: models of several sizes, comparisons, PMs and PPO runs in memory, and the output.

Language models and initial policies take minutes to train, so they are made once and kept in out/experiments/<size>-<seed>;
the first script that needs one trains it. All else is made anew each time from a script's seed.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import io
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import model
import toy
import train_lm
import train_pm
from data import UserError
from model import GPT, GPTConfig
from pm import ScalarModel, fit_elo, score_rows
from ppo import TrainingError, pm_scores
from rollout import rollout
from run import Run, RunConfig, load_model
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig
from train_rl import Learner, Prompts, RLConfig, evaluate

# Width 128 is the toy of the main job. The paper's sizes span a factor of 4,000 in parameters, these of 4.
SIZES = {"small": GPTConfig(2, 4, 64, context=192), "medium": GPTConfig(2, 4, 96, context=192), "toy": model.SIZES["toy"]}
model.SIZES.update(SIZES)
OUT, PICTURES = Path("out/experiments"), Path(__file__).parent / "pictures"


# ------------------------------------------------------------------------------ models


def base(size: str = "toy", seed: int = 0, documents: int = 0) -> Run:
    """The folder of an LM and an initial policy; trains them where they are missing. `documents` other than 0 makes a
    short-lived LM of fewer documents (the tests' tiny setting), in a folder of its own."""
    out = OUT / (f"{size}-{seed}" + (f"-{documents}" if documents else ""))
    run = Run(RunConfig(size=size, seed=seed, out=str(out)))
    lm, cd = LMConfig(), CDConfig()  # as in the main job
    if documents:
        lm, cd = dataclasses.replace(lm, documents=documents), dataclasses.replace(cd, documents=documents // 10)
    missing = not (run.has("lm.pt") and run.has("initial.pt"))
    with contextlib.nullcontext() if missing else contextlib.redirect_stdout(io.StringIO()):
        train_lm.ensure(run, lm, cd)
    return run


def replica(run: Run, seed: int) -> Run:
    """The same models with other randomness in all that follows."""
    other = copy.copy(run)
    other.seed = seed
    return other


def load(run: Run, name: str = "initial.pt") -> GPT:
    return load_model(run.path(name), GPT, run.model_config(), run.tok, run.device)


def comparisons(run: Run, n: int, kind: str = "helpful", name="train", policy: GPT | None = None, noise: float = 1.0):
    """About n labelled comparisons (fewer: identical and unfinished pairs are dropped) of a policy's replies, by default
    of the initial policy. `name` seeds the draw; "test" and names that begin with "test" use held-out prompts."""
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        found = train_pm.collect(run, PMConfig(noise=noise), policy or load(run), kind, name, n)
    return found


def train_pm_on(run: Run, pairs, weight: float = 1.0, cfg=None, start: ScalarModel | None = None) -> ScalarModel:
    """A PM trained on comparisons, one epoch, as train_pm.py does; scores not yet centred. It starts from the run's LM
    (no PMP), or from a copy of `start`."""
    cfg, pm = cfg or PMConfig(), run.prepare(copy.deepcopy(start)) if start else train_pm.from_lm(run)
    kept, chosen, rejected = train_pm.encode(run, pairs)
    weights, scratch = torch.tensor([weight if c.kind == "harmless" else 1.0 for c in kept]), copy.copy(run)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        scratch.out = Path(folder)  # for state and metrics, which nobody reads: scripts may run side by side
        train_pm.fit(scratch, "pm", cfg, pm, chosen, rejected, weights, None, "")
    return pm.requires_grad_(False)


def scores(run: Run, pm: ScalarModel, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,), (N,) scores of the chosen and of the rejected replies."""
    _, chosen, rejected = train_pm.encode(run, pairs)
    return score_rows(pm, chosen, device=run.device), score_rows(pm, rejected, device=run.device)


def centre(run: Run, pm: ScalarModel, pairs) -> ScalarModel:
    """Take the mean score of some held-out comparisons off (App. B.2), so that scores of several PMs compare."""
    pm.mean += torch.cat(scores(run, pm, pairs)).mean().to(run.device)
    return pm


# ------------------------------------------------------------------------------ policies


def sample(run: Run, policy: GPT, prompts: list[str], name="sample", max_response: int = 32, header: str = "") -> list[str]:
    """One reply to each prompt."""
    uniforms = torch.rand(len(prompts), max_response, generator=run.torch_rng("lab", name))
    ro = rollout(policy, [run.tok.encode_dialogue(header + p) for p in prompts], uniforms, run.tok.end_of_turn)
    return [run.tok.decode(r) for r in ro.responses()]


def best_of(run: Run, policy: GPT, pm: ScalarModel, prompts: list[str], n: int = 16, name="best of") -> list[str]:
    """Rejection sampling: to each prompt, of n replies, the one that the PM scores highest (App. B.6)."""
    cfg, rows = RLConfig(), [ids for p in prompts for ids in [run.tok.encode_dialogue(p)] * n]
    uniforms = torch.rand(len(rows), cfg.max_response, generator=run.torch_rng("lab", name))
    ro = rollout(policy, rows, uniforms, run.tok.end_of_turn)
    best = pm_scores(pm, ro, run.tok.end_of_context, cfg).view(-1, n).argmax(1)
    replies = ro.responses()
    return [run.tok.decode(replies[i * n + j]) for i, j in enumerate(best.tolist())]


def judge(run: Run, policy: GPT, pms: list[ScalarModel], prompts, replies: int = 1, name="judge") -> torch.Tensor:
    """What each PM and then the ground truth say of some replies to each prompt -> (len(pms) + 1, prompts, replies).
    `prompts` as Prompts.draw gives them. The same random numbers each time, so that policies can be compared in pairs."""
    (texts, kinds, ids), cfg = prompts, RLConfig()
    uniforms = torch.rand(len(ids) * replies, cfg.max_response, generator=run.torch_rng("lab", name))
    ro = rollout(policy, [i for i in ids for _ in range(replies)], uniforms, run.tok.end_of_turn)
    truth = [toy.truth(texts[i // replies], run.tok.decode(r), kinds[i // replies]) for i, r in enumerate(ro.responses())]
    found = [pm_scores(pm, ro, run.tok.end_of_context, cfg).cpu() for pm in pms] + [torch.tensor(truth)]
    return torch.stack(found).view(len(found), len(ids), replies)


def crowd_elo(run: Run, prompts: list[str], kind: str, replies: dict[str, list[str]], name="crowd"):
    """Elo by crowdworkers (Eq. B.1) -> {player: Elo less that of the first}, and the covariance, for pm.elo_error.

    replies: of each player, one to each prompt. On each prompt the players are paired off by lot. So a reply is judged
    once, and choices are independent of each other, as the errors take them to be."""
    rng, players = run.rng("lab", name, kind), list(replies)
    wins = torch.zeros(len(players), len(players))
    for k, prompt in enumerate(prompts):
        order = rng.sample(range(len(players)), len(players))
        for i, j in zip(order[::2], order[1::2]):
            p = toy.preference(prompt, replies[players[i]][k], replies[players[j]][k], kind)
            winner, loser = (i, j) if rng.random() < p else (j, i)
            wins[winner, loser] += 1
    elo, covariance = fit_elo(wins)
    return dict(zip(players, elo.tolist())), covariance


def ppo(run: Run, pm: ScalarModel, cfg: RLConfig, reference: GPT | None = None, watch=None) -> tuple[Learner, list[dict]]:
    """PPO against a PM, from the initial policy, without files. Every cfg.eval_every iterations, and before the first and
    after the last, the policy is measured on held-out prompts; `watch(learner, numbers)` may add to the numbers.
    -> the learner and one dict of numbers for each measurement (train_rl.evaluate names them; and "iteration",
    "score" and "truth", of both kinds of prompts together)."""
    reference = reference or load(run)
    learner, source, path = Learner(run, cfg, reference, pm), Prompts(run, cfg), []
    held_out = source.draw(cfg.eval_prompts * 3 // 2, True, "held out", share=1 / 3)
    for iteration in range(cfg.iterations + 1):
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            numbers, _ = evaluate(run, cfg, learner.policy, reference, pm, held_out)
            both = {name: (2 * numbers[a] + numbers[b]) / 3 for name, a, b in (  # a third of the prompts are red-teaming
                ("score", "score_helpful", "score_harmless"), ("truth", "helpfulness", "harmlessness"))}
            path.append(numbers | both | dict(iteration=iteration))
            if watch:
                watch(learner, path[-1])
        if iteration < cfg.iterations:
            learner.iterate(source, iteration)
    return learner, path


# ------------------------------------------------------------------------------ output


def mean_se(xs) -> tuple[float, float]:
    """Mean and its standard error over seeds (nan with one)."""
    xs = list(xs)
    mean = toy.mean(xs)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1) / len(xs)) if len(xs) > 1 else float("nan")


def arguments(doc: str, **more) -> argparse.Namespace:
    """--seed, --full, --tiny and a script's own options (name=default)."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--full", action="store_true", help="more seeds, sizes and data")
    parser.add_argument("--tiny", action="store_true", help="a smoke test in seconds; its numbers mean nothing")
    for name, default in more.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    args = parser.parse_args()
    args.start = time.perf_counter()
    return args


def table(rows: list[dict]):
    """Print rows of numbers under their names."""
    def cell(x): return f"{x:.3f}" if isinstance(x, float) else str(x)
    names = list(rows[0])
    widths = [max(len(n), *(len(cell(r[n])) for r in rows)) for n in names]
    for line in [names, *([cell(r[n]) for n in names] for r in rows)]:
        print("    " + "  ".join(x.rjust(w) for x, w in zip(line, widths)))


def finish(name: str, args, rows: list[dict], draw, sentence: str):
    """Write rows as CSV, draw them with `draw(pyplot)` where matplotlib is installed, and print the finding."""
    if not args.tiny:
        OUT.mkdir(parents=True, exist_ok=True)
        with open(OUT / f"{name}.csv", "w", newline="") as f:
            out = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
            out.writeheader()
            out.writerows(rows)
        print(f"    -> {OUT / name}.csv")
        try:
            import matplotlib
            matplotlib.use("Agg")
            from matplotlib import pyplot
            pyplot.figure(figsize=(6, 4), dpi=80)
            draw(pyplot)
            pyplot.tight_layout()
            PICTURES.mkdir(exist_ok=True)
            pyplot.savefig(PICTURES / f"{name}.png")
            print(f"    -> {PICTURES / name}.png")
        except ImportError:
            print("    no picture: pip install matplotlib")
    print(f"{sentence}  ({time.perf_counter() - args.start:.0f} s)")


def main(script, doc: str, **more):
    """Run a script's function of its arguments; a user's mistake ends it with one sentence."""
    try:
        script(arguments(doc, **more))
    except (UserError, TrainingError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
