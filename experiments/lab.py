"""What the experiments share: models, comparisons, preference models and PPO runs in memory.

Language models and initial policies take minutes to train. So the first script that needs one
trains it and keeps it in out/experiments; everything else is made anew from a script's seed.

Read it in this order:
  1. Models                 LMs and initial policies of three sizes, and whole runs, kept on disk
  2. Comparisons and PMs    draw comparisons or hold conversations, train a preference model (PM) on
                            comparisons, score them
  3. Policies               replies, rejection sampling, judging, crowdworkers' Elo, PPO

Legend:  N comparisons
"""
import contextlib
import copy
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import model
import rankings
import toy
import train_lm
import train_pm
import train_rl
import train_sft
from collect import MAX_TURNS, Exchange, collect, converse
from data import Comparison
from evaluate import PromptBatch, Prompts, evaluate
from model import GPT, GPTConfig
from pipeline import PRESETS, Run, RunConfig
from pm import ScalarModel, score_rows
from ppo import pm_scores
from rankings import RMConfig
from ratings import fit_elo
from rollout import Sampler, rollout
from run import write_atomically
from stage import Stage
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig, PMPConfig
from train_rl import Learner, RLConfig
from train_sft import SelectConfig, SFTConfig

OUT = Path("out/experiments")
KINDS = ("helpful", "harmless")
RED_TEAM_SHARE = 1 / 3  # of the prompts on which policies are measured

# ---- 1. Models ---------------------------------------------------------------

# "toy" is the size of the main job. HH's sizes differ by a factor of 4,000 in parameters; these
# differ by a factor of 4, if embeddings are not counted.
model.SIZES["small"] = GPTConfig(2, 4, 64, context=192)
model.SIZES["medium"] = GPTConfig(2, 4, 96, context=192)
# For --tiny: small enough for all scripts to run in seconds, and just able to end a reply.
model.SIZES["tiny-small"] = GPTConfig(1, 1, 16, context=192)
model.SIZES["tiny-toy"] = GPTConfig(2, 2, 32, context=192)
TINY_LM = LMConfig(documents=1000, vocab=600, warmup=5, lr=2e-2)
TINY_CD = CDConfig(documents=64)
TINY_PMP = PMPConfig(pairs=64)
TINY_PM = PMConfig(helpful=60, harmless=40, test=20)
TINY_RL = RLConfig(iterations=2, batch=16, minibatch=8, eval_prompts=16, eval_conversations=4)
TINY_SFT = SFTConfig(demonstrations=48, test=16, epochs=2, batch=16)
TINY_RM = RMConfig(prompts=24, test=8, batch=8)


def base(size: str = "toy", seed: int = 0, tiny: bool = False) -> Run:
    """The folder of an LM and an initial policy, which are trained if they are missing. With
    `tiny`, they are much smaller, and so is their corpus."""
    lm, cd = (TINY_LM, TINY_CD) if tiny else (LMConfig(), CDConfig())  # or as in the main job
    name = f"tiny-{size}" if tiny else size
    run = Run(RunConfig(size=name, seed=seed, out=str(OUT / f"{name}-{seed}")))
    is_complete = run.has("lm.pt") and run.has("initial.pt")
    with silence() if is_complete else contextlib.nullcontext():
        train_lm.ensure(run, lm, cd)
    run.unlock()  # it is only read from now on, so scripts may run side by side
    return run


def trained(seed: int = 0, tiny: bool = False) -> Run:
    """The folder of `base` with pm.pt and policy.pt as well, as the main job makes them. Missing
    ones are trained, for minutes. `python train_rl.py --seed 1 --out out/experiments/toy-1`, or a
    copy of such a run, leaves the same files there."""
    run = base("toy", seed, tiny)
    models = (TINY_LM, TINY_CD) if tiny else (LMConfig(), CDConfig())
    stages = (TINY_PMP, TINY_PM) if tiny else (PMPConfig(), PMConfig())
    rl = TINY_RL if tiny else RLConfig()
    is_complete = run.has("pm.pt") and run.has("policy.pt")
    with silence() if is_complete else contextlib.nullcontext():
        train_pm.ensure(run, *models, *stages)
        if not run.reuse("rl", rl):
            train_rl.train(run, rl)
    run.unlock()
    return run


def with_lm_of(of_base: Run, out: str) -> Run:
    """A run of InstructGPT in the folder `out`, with the language model of another run."""
    run = Run(dataclasses.replace(of_base.cfg, paper="instructgpt", out=out))
    for name in ("tokenizer.json", "lm.pt"):
        write_atomically(run.path(name), of_base.path(name).read_bytes())
    run.load_tokenizer()
    return run


def instructgpt(size: str = "toy", seed: int = 0, tiny: bool = False, upto: str = "rl") -> Run:
    """A folder of InstructGPT's models, as --preset instructgpt makes them from the LM of `base`.
    upto: "sft" trains the SFT model alone; "rm" also pm.pt (the reward model) and initial.pt (the
    SFT model that it scores best); "rl" also policy.pt (PPO-ptx)."""
    of_base = base(size, seed, tiny)
    run = with_lm_of(of_base, f"{of_base.out.parent}/instructgpt-{of_base.out.name}")
    sft, rm, rl = SFTConfig(), RMConfig(), instructgpt_rl(tiny)
    if tiny:
        sft, rm = TINY_SFT, TINY_RM
    is_complete = run.has({"sft": "sft.pt", "rm": "initial.pt", "rl": "policy.pt"}[upto])
    with silence() if is_complete else contextlib.nullcontext():
        if upto != "sft":
            rankings.ensure(run, TINY_LM if tiny else LMConfig(), sft, rm, SelectConfig())
        elif not run.reuse("sft", sft):
            train_sft.train(run, sft)
        if upto == "rl" and not run.reuse("rl", rl):
            train_rl.train(run, rl)
    run.unlock()
    return run


def instructgpt_rl(tiny: bool = False, **options) -> RLConfig:
    """The options of RL in --preset instructgpt, some of them replaced."""
    for name, value in PRESETS["instructgpt"].items():
        stage, option = name.split(".")
        if stage == "rl":
            options = {option: value} | options
    return dataclasses.replace(TINY_RL if tiny else RLConfig(), **options)


def bases(sizes: list[str], seed: int, tiny: bool) -> dict[str, Run]:
    """One folder for each size. A PM of one size can score replies of another, because models of
    one seed read the same corpus and so have the same tokenizer."""
    runs = {size: base(size, seed, tiny) for size in sizes}
    fingerprints = {run.tok.fingerprint for run in runs.values()}
    assert len(fingerprints) == 1, "models that share a PM need the same token ids"
    return runs


def silence():
    """Drop what is printed inside a `with` block."""
    return contextlib.redirect_stdout(io.StringIO())


def replica(run: Run, seed: int) -> Run:
    """The same models, with other random numbers in all that follows."""
    other = copy.copy(run)
    other.seed = seed
    return other


def load(run: Run, name: str = "initial.pt") -> GPT:
    return run.load_model(name)


# ---- 2. Comparisons and PMs --------------------------------------------------


def comparisons(run: Run, n: int, kind: str = "helpful", name: str = "train",
                policy: GPT | None = None, noise: float = 1.0) -> list[Comparison]:
    """At most n labeled comparisons of a policy's replies, by default the initial policy's. n pairs
    are sampled; identical, empty and unfinished ones are dropped (collect.collect). They come in
    random order, so that a part of them is a fair sample; conversations yield them turn by turn.

    name: seeds the draw; names that begin with "test" use held-out prompts.
    noise: temperature of the crowdworkers' choices."""
    with silence():
        policy = policy or load(run)
        pairs = collect(run, PMConfig(noise=noise), policy, kind, name, n)
    return run.rng("lab", "order", kind, name).sample(pairs, len(pairs))


def by_coin(rng, pairs: list[Comparison]) -> list[Comparison]:
    """The same pairs with labels that mean nothing: a coin decides which reply is preferred."""
    found = []
    for pair in pairs:
        if rng.random() < 0.5:
            pair = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        found.append(dataclasses.replace(pair, p_chosen=0.5))
    return found


def conversations(run: Run, kind: str, n: int, name: str, keep: str = "", held_out: bool = False,
                  turns: int = MAX_TURNS) -> list[Exchange]:
    """The exchanges of n conversations with the initial policy, which gives two replies at each
    turn; nobody leaves early. keep: which reply they go on from (collect.converse)."""
    player = Sampler(load(run), run.tok.end_of_turn)
    return converse(run, name, [player, player], [kind] * n, [turns] * n, held_out,
                    PMConfig().max_response, keep=keep)


def train_pm_on(run: Run, pairs: list[Comparison], weight: float = 1.0, cfg=None,
                start: ScalarModel | None = None) -> ScalarModel:
    """A PM trained for one epoch on comparisons, as train_pm.py does. Its mean is not subtracted.

    It starts from the run's LM, without PMP, or from a copy of `start`. weight: lambda of §5.1.2,
    which multiplies the loss of harmless comparisons. cfg: PMConfig (the default) or PMPConfig."""
    pm = run.prepare(copy.deepcopy(start)) if start else train_pm.from_lm(run)
    cfg = cfg or PMConfig()
    encoded = train_pm.encode(run, pairs)
    with stage_without_files(run, "pm", cfg) as stage:
        train_pm.fit(run, stage, cfg, pm, encoded, train_pm.weights_of(encoded, weight))
    return pm.requires_grad_(False)


def train_rm(run: Run, cfg: RMConfig, elements: list) -> ScalarModel:
    """A reward model trained on elements for one epoch, as rankings.py does, from the SFT model."""
    rm = train_pm.from_lm(run, "sft.pt")
    with stage_without_files(run, "rm", cfg) as stage:
        rankings.fit(run, stage, cfg, rm, elements)
    return rm.requires_grad_(False)


@contextlib.contextmanager
def stage_without_files(run: Run, name: str, cfg):
    """A stage whose state and metrics nobody reads. A folder of its own lets scripts run side by
    side."""
    with silence(), tempfile.TemporaryDirectory() as folder:
        copied = copy.copy(run)
        copied.out, copied.resume = Path(folder), False
        yield Stage(copied, name, cfg, copied.path("pm.pt"), parents=[])


def untrained_pm(run: Run) -> ScalarModel:
    """A PM whose body and head have random weights."""
    torch.manual_seed(run.seed)
    return run.prepare(ScalarModel(GPT(run.model_config()))).eval().requires_grad_(False)


def scores(run: Run, pm: ScalarModel, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected replies, (N,) each, in logits."""
    encoded = train_pm.encode(run, pairs)
    chosen = score_rows(pm, encoded.chosen, device=run.device)
    return chosen, score_rows(pm, encoded.rejected, device=run.device)


def center(run: Run, pm: ScalarModel, pairs) -> ScalarModel:
    """Subtract the mean score of held-out comparisons from now on (App. B.2). Without it, scores of
    different PMs cannot be compared."""
    pm.mean += torch.cat(scores(run, pm, pairs)).mean().to(run.device)
    return pm


# ---- 3. Policies -------------------------------------------------------------


def held_out_prompts(run: Run, n: int, name: str) -> PromptBatch:
    """n held-out prompts, about a third of them red-teaming. `name` seeds the choice."""
    prompts = Prompts(run, RLConfig().max_response, RED_TEAM_SHARE)
    return prompts.draw(n, name, held_out=True)


def respond(run: Run, policy: GPT, ids: list[list[int]], name: str, max_response: int = 32):
    """Rollouts of one response to each prompt (ids). `name` seeds the random numbers."""
    uniforms = torch.rand(len(ids), max_response, generator=run.torch_rng("lab", name))
    return rollout(policy, ids, uniforms, run.tok.end_of_turn)


def sample(run: Run, policy: GPT, prompts: list[str], name: str = "sample",
           header: str = "") -> list[str]:
    """One reply to each prompt (text), before which the policy reads `header`."""
    ids = [run.tok.encode_dialogue(header + prompt) for prompt in prompts]
    responses = respond(run, policy, ids, name).responses()
    return [run.tok.decode(response) for response in responses]


def several(run: Run, policy: GPT, pm: ScalarModel, prompts: list[str], n: int,
            name: str) -> tuple[list[list[str]], torch.Tensor]:
    """n replies to each prompt, and the PM's score of each (prompts, n)."""
    ids = []
    for prompt in prompts:
        ids += [run.tok.encode_dialogue(prompt)] * n
    ro = respond(run, policy, ids, name)
    scored = pm_scores(pm, ro, run.tok.end_of_context, RLConfig()).view(-1, n)  # (prompts, n)
    replies = [[] for _ in prompts]
    for i, response in enumerate(ro.responses()):
        replies[i // n].append(run.tok.decode(response))
    return replies, scored


def best_of(run: Run, policy: GPT, pm: ScalarModel, prompts: list[str], n: int = 16,
            name: str = "best of") -> list[str]:
    """Rejection sampling: of n replies to each prompt, the one that the PM scores highest (App.
    B.6)."""
    replies, scored = several(run, policy, pm, prompts, n, name)
    return [mine[j] for mine, j in zip(replies, scored.argmax(1).tolist())]


def median_of(run: Run, policy: GPT, pm: ScalarModel, prompts: list[str], n: int,
              name: str) -> list[str]:
    """Of n (odd) replies to each prompt, the one that the PM ranks in the middle (§6, n = 17)."""
    replies, scored = several(run, policy, pm, prompts, n, name)
    middle = scored.argsort(1)[:, n // 2]  # (prompts,)
    return [mine[j] for mine, j in zip(replies, middle.tolist())]


def score_replies(run: Run, pm: ScalarModel, prompts: list[str],
                  replies: list[str]) -> torch.Tensor:
    """The PM's score of one reply to each prompt (prompts,), in logits."""
    rows = []
    for prompt, reply in zip(prompts, replies):
        ids = run.tok.encode_dialogue(prompt) + run.tok.encode_reply(reply)
        rows.append(ids + [run.tok.end_of_context])
    return score_rows(pm, rows, device=run.device)


def judge(run: Run, policy: GPT, pms: list[ScalarModel], prompts: PromptBatch, replies: int = 1):
    """What each PM, and then the ground truth, says of `replies` replies to each prompt
    -> (len(pms) + 1, prompts, replies).

    The random numbers are the same in each call, so two policies can be compared reply by reply."""
    ids = []
    for prompt in prompts.ids:
        ids += [prompt] * replies
    ro = respond(run, policy, ids, "judge")
    truth = []
    for i, response in enumerate(ro.responses()):
        text, kind = prompts.texts[i // replies], prompts.kinds[i // replies]
        truth.append(toy.truth(text, run.tok.decode(response), kind))
    found = [pm_scores(pm, ro, run.tok.end_of_context, RLConfig()).cpu() for pm in pms]
    found.append(torch.tensor(truth))
    return torch.stack(found).view(len(found), len(prompts.ids), replies)


def pairs_by_lot(run: Run, kind: str, n_prompts: int, n_players: int) -> list[tuple]:
    """Who meets on each prompt: (prompt, player, player, a number in [0, 1) that a choice may use).

    A reply is in one pair at most. The choices are then independent of each other, as the errors of
    an Elo take them to be."""
    rng, pairs = run.rng("lab", "crowd", kind), []
    for k in range(n_prompts):
        order = rng.sample(range(n_players), n_players)
        for i, j in zip(order[::2], order[1::2]):
            pairs.append((k, i, j, rng.random()))
    return pairs


def crowd_elo(run: Run, prompts: list[str], kind: str, replies: dict[str, list[str]]):
    """Elo by crowdworkers (Eq. B.1) -> {player: Elo, 0 for the first}, covariance for
    ratings.elo_error. replies: {player: its reply to each prompt}."""
    players = list(replies)
    wins = torch.zeros(len(players), len(players))
    for k, i, j, chance in pairs_by_lot(run, kind, len(prompts), len(players)):
        p = toy.preference(prompts[k], replies[players[i]][k], replies[players[j]][k], kind)
        winner, loser = (i, j) if chance < p else (j, i)
        wins[winner, loser] += 1
    elo, covariance = fit_elo(wins)
    return dict(zip(players, elo.tolist())), covariance


def drawn_prompts(run: Run, cfg: RLConfig) -> Prompts:
    """Prompts that are drawn anew each time. The main job's are those of its comparisons (§4.1). A
    folder of `base` holds some only if another script trained a whole run there, and results must
    not depend on that."""
    prompts = Prompts(run, cfg.max_response, cfg.harmless_share)
    prompts.toy_prompts = {kind: [] for kind in KINDS}
    return prompts


def ppo(run: Run, pm: ScalarModel, cfg: RLConfig, reference: GPT | None = None,
        watch=None, prompts: Prompts | None = None) -> tuple[Learner, list[dict]]:
    """PPO against a PM, from the initial policy, without files -> the learner, and the numbers of
    each measurement.

    The policy is measured on held-out prompts before the first iteration, every cfg.eval_every
    iterations and after the last. The numbers are those of evaluate.evaluate, with "iteration" and,
    over all prompts, "score" and "truth"; "train_score" and "train_kl" are of the last iteration's
    own samples (at the start they are those of "score" and 0). `watch(learner)` is called after
    each measurement.
    prompts: to learn from; by default drawn anew (`drawn_prompts`)."""
    reference = reference or load(run)
    learner = Learner(run, cfg, reference, pm)
    prompts = prompts or drawn_prompts(run, cfg)
    held_out = prompts.held_out(cfg.eval_prompts)
    path, statistics = [], None
    for iteration in range(cfg.iterations + 1):
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            numbers, _ = evaluate(run, cfg, learner.result, reference, pm, held_out)
            numbers["score"] = (2 * numbers["score_helpful"] + numbers["score_harmless"]) / 3
            numbers["truth"] = (2 * numbers["helpfulness"] + numbers["harmlessness"]) / 3
            numbers["train_score"], numbers["train_kl"] = numbers["score"], 0.0
            if statistics is not None:
                numbers["train_score"] = statistics["score"]
                numbers["train_kl"] = statistics["kl"]
            numbers["iteration"] = iteration
            path.append(numbers)
            if watch:
                watch(learner)
        if iteration < cfg.iterations:
            statistics = learner.iterate(prompts, iteration)
    return learner, path
