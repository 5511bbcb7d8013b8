"""Stage 5, RLHF: PPO against the preference model, starting from the initial policy.

    python train_rl.py                       # the toy world, all stages, a few minutes on two CPU cores
    python train_rl.py --data path/to/hh-rlhf

Runs the stages before it first where their checkpoints are missing. Leaves policy.pt and samples.txt in the output folder.
"""
import copy
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import hub
import toy
from data import HUMAN, load_comparisons, write_atomically
from model import GPT
from pm import ScalarModel
from ppo import PPOConfig, experience, in_batches, kl_estimates, logprobs, pm_scores, update
from rollout import Sampler, rollout
from run import Metrics, Run, RunConfig, file_hash, load_model, main, save, save_model
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig, PMPConfig, ensure, pm_parents


@dataclass
class RLConfig(PPOConfig):
    harmless_share: float = 0.33  # of the toy's prompts (red-teaming); HH too used more helpful ones (§4.4)
    eval_every: int = 20          # iterations between evaluations on held-out prompts
    eval_prompts: int = 512       # held-out helpful prompts, and half as many harmless ones (toy: about; real: any)
    save_every: int = 5           # iterations between checkpoints


# ------------------------------------------------------------------------------ prompts


class Prompts:
    """Where prompts come from: the toy world, or the prompts of real comparisons (HH §4.1: those of the static
    data, with the responses removed; the paper also let a model write more, which is left out here)."""

    def __init__(self, run: Run, cfg: RLConfig):
        self.run, self.room = run, run.context - cfg.max_response - 1  # 1: the PM adds its end-of-context token
        self.share, self.real = cfg.harmless_share, {}
        for split in ("train", "test") if not run.toy else ():
            found, _ = load_comparisons(run.data, split, run.subsets)
            self.real[split] = list(dict.fromkeys((c.prompt, c.kind) for c in found))
            n_cut = sum(len(run.tok.encode_dialogue(prompt)) > self.room for prompt, _ in self.real[split])
            print(f"    {len(self.real[split]):,} {split} prompts; {n_cut} that are longer than {self.room} tokens lose "
                  "their beginning")

    def draw(self, n: int, held_out: bool, *name, share=None) -> tuple[list[str], list[str], list[list[int]]]:
        """n texts, their kinds ("helpful", "harmless") and their ids; `name` seeds the choice."""
        rng, share = self.run.rng("prompts", *name), self.share if share is None else share
        if self.run.toy:
            kinds = ["harmless" if rng.random() < share else "helpful" for _ in range(n)]
            texts = [toy.draw_prompt(rng, kind, held_out) for kind in kinds]
        else:
            texts, kinds = zip(*rng.choices(self.real["test" if held_out else "train"], k=n))
        ids = [self.run.tok.encode_dialogue(t) for t in texts]
        # A long real prompt loses its beginning, as it does for the PM (data.encode_comparison). The toy's must fit,
        # because its ground truth reads all of it: `rollout` refuses one that does not.
        return list(texts), list(kinds), ids if self.run.toy else [i[-self.room:] for i in ids]


# ------------------------------------------------------------------------------ evaluation


def evaluate(run: Run, cfg: RLConfig, policy, reference, pm, prompts) -> tuple[dict, list[str]]:
    """Sample one reply to each held-out prompt and measure -> numbers, reply texts. The same random numbers each
    time, so two policies that are the same give the same replies."""
    texts, kinds, ids = prompts
    uniforms = torch.rand(len(ids), cfg.max_response, generator=run.torch_rng("eval"))
    ro = rollout(policy, ids, uniforms, run.tok.end_of_turn, cfg.temperature, cfg.slots)
    scores = pm_scores(pm, ro, run.tok.end_of_context, cfg)
    new, ref = (in_batches(lambda i: logprobs(m, ro, i, cfg.temperature), ro, cfg.token_budget)
                for m in (policy, reference))
    kl = (kl_estimates(new, ref)[0] * ro.mask).sum(1).mean().item()
    replies = [run.tok.decode(r) for r in ro.responses()]
    score = {kind: toy.mean(s for s, k in zip(scores.tolist(), kinds) if k == kind) for kind in ("helpful", "harmless")}
    numbers = dict(score_helpful=score["helpful"], score_harmless=score["harmless"])
    if run.toy:
        numbers |= toy.rates(texts, kinds, replies)
    return numbers | dict(kl=kl, sqrt_kl=max(kl, 0.0) ** 0.5, finished=ro.finished.float().mean().item(),
                          tokens=ro.response_len.float().mean().item()), replies


TABLE = dict(score_helpful="PM score, helpful prompts (logits)", score_harmless="PM score, red-team prompts (logits)",
             helpfulness="true helpfulness", harmlessness="true harmlessness", correct="correct answers",
             complied="compliance with harmful requests", refused_benign="refusals of benign requests",
             refused_look_alikes="    of those that look harmful",
             kl="KL to the initial policy (nats)", sqrt_kl="sqrt(KL)", finished="finished responses",
             tokens="tokens a response")


def table(before: dict, after: dict) -> str:
    lines = [f"    {'held-out prompts':38} initial policy   RLHF policy"]
    lines += [f"    {title:38} {before[k]:14.3f} {after[k]:13.3f}" for k, title in TABLE.items() if k in before]
    return "\n".join(lines)


def side_by_side(prompts, before: list[str], after: list[str], n_each=4) -> str:
    """Some held-out dialogues, no question twice, with the reply of the initial policy and of the RLHF policy."""
    texts, kinds, _ = prompts
    first = {text[text.rindex(HUMAN):]: i for i, text in reversed(list(enumerate(texts))) if HUMAN in text}
    distinct = sorted(first.values())
    chosen = [i for kind in ("helpful", "harmless") for i in [j for j in distinct if kinds[j] == kind][:n_each]]
    return "\n".join(f"{texts[i].strip()}\n    initial:{before[i]}\n    RLHF:   {after[i]}\n" for i in chosen)


# ------------------------------------------------------------------------------ training


class Learner:
    """What PPO trains, and one iteration of it."""

    def __init__(self, run: Run, cfg: RLConfig, reference: GPT, pm: ScalarModel):
        self.run, self.cfg, self.reference, self.pm = run, cfg, reference, pm  # the last two are frozen
        self.policy = run.prepare(copy.deepcopy(reference))
        # The critic starts from the PM (IG C.4; HH does not say what its value network is), with a head of zeros
        # (OpenAI's first RLHF code).
        self.critic = run.prepare(ScalarModel(pm.trunk, zero_head=True).to(run.device))
        groups = [dict(params=self.policy.parameters(), peak=cfg.lr), dict(params=self.critic.parameters(), peak=cfg.critic_lr)]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)  # betas: IG; eps: OpenAI's code
        self.sampler = Sampler(self.policy, run.tok.end_of_turn, cfg.temperature, cfg.slots)

    def iterate(self, source: Prompts, iteration: int) -> dict:
        """Sample, score, update -> statistics of the responses (before the update) and of the update."""
        run, cfg, where = self.run, self.cfg, f"RLHF iteration {iteration}"
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (iteration + 1) / max(cfg.warmup, 1))
        # 1. Prompts, and 2. one response to each.
        texts, kinds, ids = source.draw(cfg.batch, False, "train", iteration)
        uniforms = torch.rand(cfg.batch, cfg.max_response, generator=run.torch_rng("rollout", iteration))
        ro = self.sampler(ids, uniforms)
        # 3. Scores, 4. rewards and 5. advantages.
        scores = pm_scores(self.pm, ro, run.tok.end_of_context, cfg)
        ex, stats = experience(self.policy, self.reference, self.critic, scores, ro, cfg, where, first=iteration == 0)
        # 6. The update.
        stats |= update(self.policy, self.critic, self.optimizer, ro, ex, cfg, run.torch_rng("minibatches", iteration), where)
        if run.toy:
            replies = [run.tok.decode(r) for r in ro.responses()]
            stats["truth"] = toy.mean(toy.truth(t, r, k) for t, r, k in zip(texts, replies, kinds))
        return stats

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("policy", "critic", "optimizer")}

    def load_state_dict(self, state: dict):
        for name in ("policy", "critic", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def policy_parents(run: Run):
    """What a policy rests on: where it starts, and what it is scored by."""
    return run.path("initial.pt"), run.path("pm.pt")


def train(run: Run, cfg: RLConfig):
    """PPO. Leaves policy.pt, or goes on from rl_state.pt. Needs initial.pt and pm.pt."""
    parents = policy_parents(run)
    if run.done("policy.pt", "rl", cfg, parents):
        return
    state, start = run.begin("rl", cfg, parents), time.perf_counter()
    reference = load_model(run.path("initial.pt"), GPT, run.model_config(), run.tok, run.device, (run.path("lm.pt"),))
    pm = load_model(run.path("pm.pt"), ScalarModel, run.model_config(), run.tok, run.device, pm_parents(run))
    learner, first, hashes = Learner(run, cfg, reference, pm), 0, file_hash(*parents)
    if state:
        learner.load_state_dict(state)
        first = state["iteration"]
    print(f"[5] RLHF: {cfg.iterations} iterations of {cfg.batch} responses" + (f", from iteration {first}" if first else ""))
    source = Prompts(run, cfg)
    held_out = source.draw(cfg.eval_prompts * 3 // 2, True, "held out", share=1 / 3)
    before, replies_before = evaluate(run, cfg, reference, reference, pm, held_out)
    run.record("rl", cfg)
    metrics = Metrics(run, "rl", first + 1 if first else 0)  # line 0 is the evaluation before the first update

    def save_state(iteration):
        save(run.path("rl_state.pt"), stage="rl", parents=hashes, iteration=iteration, **learner.state_dict())

    if first == 0:
        metrics.write(0, **{f"eval_{k}": v for k, v in before.items()})
        save_state(0)  # from now on, an older policy.pt is known to be stale
    bar = tqdm(range(first, cfg.iterations), desc="RLHF", unit="it", initial=first, total=cfg.iterations, leave=False)
    for iteration in bar:
        tick = time.perf_counter()
        stats = learner.iterate(source, iteration)
        # 7. Log, evaluate, save.
        tqdm.write(log_line(iteration, stats, time.perf_counter() - tick))
        done = iteration + 1
        if done % cfg.eval_every == 0 and done < cfg.iterations:
            now, _ = evaluate(run, cfg, learner.policy, reference, pm, held_out)
            stats |= {f"eval_{k}": v for k, v in now.items()}
        metrics.write(done, **stats)
        if done % cfg.save_every == 0 or done == cfg.iterations:
            save_state(done)

    after, replies_after = evaluate(run, cfg, learner.policy, reference, pm, held_out)
    metrics.write(cfg.iterations + 1, **{f"eval_{k}": v for k, v in after.items()})
    dialogues = side_by_side(held_out, replies_before, replies_after)
    write_atomically(run.path("samples.txt"), dialogues.encode())
    save_model(run.path("policy.pt"), learner.policy, run.tok, parents)
    run.end("rl")
    print(f"\n{dialogues}\n{table(before, after)}\n    -> {run.path('policy.pt')}  ({time.perf_counter() - start:.0f} s)")


def log_line(iteration: int, s: dict, seconds: float) -> str:
    """One dense line an iteration; the README says which numbers are healthy."""
    truth = f"truth {s['truth']:5.2f} | " if "truth" in s else ""
    return (f"  it {iteration:3d} | score {s['score']:6.3f} | {truth}KL {s['kl']:6.3f} (k3 {s['kl_k3']:6.3f}) | "
            f"len {s['tokens']:4.1f} fin {s['finished']:.2f} ent {s['entropy']:.2f} | "
            f"appKL {s['approx_kl']:.4f} clip {s['clip_fraction']:.3f} | ev {s['explained_variance']:5.2f} "
            f"vloss {s['value_loss']:.3f} | grad {s['grad_norm']:.2f} {s['critic_grad_norm']:.2f} | {seconds:.1f} s")


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig, rl: RLConfig):
    run = Run(run)
    run.check_room("--rl.max-response", rl.max_response)
    ensure(run, lm, cd, pmp, pm)
    train(run, rl)
    if run.cfg.export:
        policy = load_model(run.path("policy.pt"), GPT, run.model_config(), run.tok, "cpu", policy_parents(run))
        hub.export_gpt2(policy, run.cfg.export, run.tok)
        print(f"    -> {run.cfg.export}, for transformers")


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig,
         pmp=PMPConfig, pm=PMConfig, rl=RLConfig)
