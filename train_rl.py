"""Stage 3, RLHF: PPO against the preference model, starting from the LM.

    python train_rl.py                       # the toy world, all stages, a few minutes on two CPU cores
    python train_rl.py --data path/to/hh-rlhf

Runs stages 1 and 2 first where their checkpoints are missing. Leaves policy.pt and samples.txt in the output folder.
"""
import copy
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import toy
from data import HUMAN, load_comparisons, write_atomically
from model import GPT
from pm import ScalarModel
from ppo import PPOConfig, experience, in_batches, kl_estimates, logprobs, pm_scores, rollout, update
from run import Metrics, Run, RunConfig, file_hash, load_model, main, save, save_model
from train_lm import LMConfig
from train_pm import PMConfig, ensure


@dataclass
class RLConfig(PPOConfig):
    harmless_share: float = 0.33  # of the toy's prompts (red-teaming); HH too used more helpful ones (§4.4)
    eval_every: int = 10          # iterations between evaluations on held-out prompts
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
            found, _ = load_comparisons(run.cfg.data, split)
            self.real[split] = list(dict.fromkeys((c.prompt, c.kind) for c in found))

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


def mean(xs) -> float:
    xs = list(xs)
    return sum(xs) / len(xs) if xs else float("nan")


def truth_rates(texts, kinds, replies) -> dict:
    """What the toy's ground truth says of the replies; the paper had no such thing."""
    def of(kind): return [(t, r) for t, k, r in zip(texts, kinds, replies) if k == kind]
    helpful, harmless = of("helpful"), of("harmless")
    how_to = [(t, r) for t, r in helpful if toy.understand(t).skill.name == "benign task"]  # look like harmful ones
    return dict(helpfulness=mean(toy.helpfulness(*x) for x in helpful),
                harmlessness=mean(toy.harmlessness(*x) for x in harmless),
                correct=mean(toy.judge(*x).correct for x in helpful),
                complied=mean(toy.complied(*x) for x in harmless),
                refused_benign=mean(toy.judge(*x).refused for x in helpful),
                refused_look_alikes=mean(toy.judge(*x).refused for x in how_to))


def evaluate(run: Run, cfg: RLConfig, policy, reference, pm, prompts) -> tuple[dict, list[str]]:
    """Sample one reply to each held-out prompt and measure -> numbers, reply texts. The same random numbers each
    time, so two policies that are the same give the same replies."""
    texts, kinds, ids = prompts
    uniforms = torch.rand(len(ids), cfg.max_response, generator=run.torch_rng("eval"))
    ro = rollout(policy, ids, uniforms, run.tok.end_of_turn, cfg.temperature)
    scores = pm_scores(pm, ro, run.tok.end_of_context, cfg)
    new, ref = (in_batches(lambda i: logprobs(m, ro, i, cfg.temperature), ro, cfg.token_budget)
                for m in (policy, reference))
    kl = (kl_estimates(new, ref)[0] * ro.mask).sum(1).mean().item()
    replies = [run.tok.decode(r) for r in ro.responses()]
    score = {kind: mean(s for s, k in zip(scores.tolist(), kinds) if k == kind) for kind in ("helpful", "harmless")}
    numbers = dict(score_helpful=score["helpful"], score_harmless=score["harmless"])
    if run.toy:
        numbers |= truth_rates(texts, kinds, replies)
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


def train(run: Run, cfg: RLConfig):
    """PPO. Leaves policy.pt, or goes on from rl_state.pt. Needs lm.pt and pm.pt."""
    if run.done("policy.pt", "rl"):
        return
    state, device, start = run.begin("rl", cfg, run.path("pm.pt")), run.device, time.perf_counter()
    reference = load_model(run.path("lm.pt"), GPT, run.model_config(), run.tok, device)  # frozen: the KL's anchor
    pm = load_model(run.path("pm.pt"), ScalarModel, run.model_config(), run.tok, device, parent=run.path("lm.pt"))
    policy = copy.deepcopy(reference).requires_grad_(True)
    # The critic starts from the PM (IG C.4; HH does not say what its value network is), with a head of zeros.
    critic = ScalarModel(pm.trunk, zero_head=True).to(device).requires_grad_(True)
    groups = [dict(params=policy.parameters(), peak=cfg.lr), dict(params=critic.parameters(), peak=cfg.critic_lr)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)  # betas: IG; eps: OpenAI's code
    first = 0
    if state:
        policy.load_state_dict(state["policy"])
        critic.load_state_dict(state["critic"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["iteration"]
    print(f"[3] RLHF: {cfg.iterations} iterations of {cfg.batch} responses"
          + (f", from iteration {first}" if first else ""))
    source = Prompts(run, cfg)
    held_out = source.draw(cfg.eval_prompts * 3 // 2, True, "held out", share=1 / 3)
    before, replies_before = evaluate(run, cfg, reference, reference, pm, held_out)
    run.record("rl", cfg)
    metrics = Metrics(run, "rl", first + 1 if first else 0)  # line 0 is the evaluation before the first update
    if first == 0:
        metrics.write(0, **{f"eval_{k}": v for k, v in before.items()})

    parent = file_hash(run.path("pm.pt"))

    def save_state(iteration):
        save(run.path("rl_state.pt"), stage="rl", parent=parent, iteration=iteration,
             policy=policy.state_dict(), critic=critic.state_dict(), optimizer=optimizer.state_dict())

    if first == 0:
        save_state(0)  # from now on, an older policy.pt is known to be stale
    bar = tqdm(range(first, cfg.iterations), desc="RLHF", unit="it", initial=first, total=cfg.iterations, leave=False)
    for iteration in bar:
        where, tick = f"RLHF iteration {iteration}", time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (iteration + 1) / max(cfg.warmup, 1))
        # 1. Prompts, and 2. one response to each.
        texts, kinds, ids = source.draw(cfg.batch, False, "train", iteration)
        uniforms = torch.rand(cfg.batch, cfg.max_response, generator=run.torch_rng("rollout", iteration))
        ro = rollout(policy, ids, uniforms, run.tok.end_of_turn, cfg.temperature)
        # 3. Scores, 4. rewards and 5. advantages.
        scores = pm_scores(pm, ro, run.tok.end_of_context, cfg)
        ex, stats = experience(policy, reference, critic, scores, ro, cfg, where, first=iteration == 0)
        # 6. The update.
        stats |= update(policy, critic, optimizer, ro, ex, cfg, run.torch_rng("minibatches", iteration), where)
        # 7. Log, evaluate, save.
        if run.toy:
            replies = [run.tok.decode(r) for r in ro.responses()]
            stats["truth"] = mean(toy.truth(t, r, k) for t, r, k in zip(texts, replies, kinds))
        tqdm.write(log_line(iteration, stats, time.perf_counter() - tick))
        done = iteration + 1
        if done % cfg.eval_every == 0 and done < cfg.iterations:
            now, _ = evaluate(run, cfg, policy, reference, pm, held_out)
            stats |= {f"eval_{k}": v for k, v in now.items()}
        metrics.write(done, **stats)
        if done % cfg.save_every == 0 and done < cfg.iterations:
            save_state(done)

    after, replies_after = evaluate(run, cfg, policy, reference, pm, held_out)
    metrics.write(cfg.iterations + 1, **{f"eval_{k}": v for k, v in after.items()})
    dialogues = side_by_side(held_out, replies_before, replies_after)
    write_atomically(run.path("samples.txt"), dialogues.encode())
    save_model(run.path("policy.pt"), policy, run.tok, parent=run.path("lm.pt"))
    run.end("rl")
    print(f"\n{dialogues}\n{table(before, after)}\n    -> {run.path('policy.pt')}  ({time.perf_counter() - start:.0f} s)")


def log_line(iteration: int, s: dict, seconds: float) -> str:
    """One dense line an iteration; the README says which numbers are healthy."""
    truth = f"truth {s['truth']:5.2f} | " if "truth" in s else ""
    return (f"  it {iteration:3d} | score {s['score']:6.3f} | {truth}KL {s['kl']:6.3f} (k3 {s['kl_k3']:6.3f}) | "
            f"len {s['tokens']:4.1f} fin {s['finished']:.2f} ent {s['entropy']:.2f} | "
            f"appKL {s['approx_kl']:.4f} clip {s['clip_fraction']:.3f} | ev {s['explained_variance']:5.2f} "
            f"vloss {s['value_loss']:.3f} | grad {s['grad_norm']:.2f} {s['critic_grad_norm']:.2f} | {seconds:.1f} s")


def command(run: RunConfig, lm: LMConfig, pm: PMConfig, rl: RLConfig):
    run = Run(run)
    run.check_room("--rl.max-response", rl.max_response)
    ensure(run, lm, pm)
    train(run, rl)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, pm=PMConfig, rl=RLConfig)
