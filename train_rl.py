"""Stage 5, RLHF: PPO against the preference model, starting from the initial policy.

    python train_rl.py                       # the toy world, all stages, minutes on two CPU cores
    python train_rl.py --preset tiny         # the same in half a minute, for trying things out
    python train_rl.py --preset instructgpt  # InstructGPT's steps instead (INSTRUCTGPT.md)
    python train_rl.py --data path/to/hh-rlhf

This is the place to start reading:
  1. Learner    the four networks, and steps 1 to 6 of an iteration of RLHF
  2. Training   the loop around it, which is also step 7
From `Learner.iterate`, follow the calls down into ppo.py, pm.py, rollout.py and model.py.

The command first runs any earlier stage whose result is missing. It writes policy.pt, samples.txt
and report.html to the output folder.

Legend:  N responses   R response tokens   ro the responses, a Rollouts (rollout.py)
"""
import copy
import functools
import time
from dataclasses import dataclass

from run import UserError, is_first, write_atomically  # before torch: Ctrl-C prints no traceback

import torch
from tqdm import tqdm

import hub
import rankings
import report
from checks import (
    check_frozen, check_rewards, check_rollout, checksum, log_line, rollout_statistics)
from collect import rates_by_turn
from evaluate import (Prompts, evaluate, mean_truth, side_by_side, table, turn_table,
                      with_eval_prefix)
from model import GPT
from pipeline import Run, RunConfig, main
from pm import ScalarModel
from ppo import (Experience, PPOConfig, all_logprobs, all_values, gae, pm_scores, shaped_rewards,
                 update, whiten)
from prompts import write as write_prompts
from rankings import RMConfig
from record import Recorder
from rollout import Sampler
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig, PMPConfig, check_early, ensure
from train_sft import PretrainingText, SelectConfig, SFTConfig, add_text_gradients


@dataclass
class RLConfig(PPOConfig):
    harmless_share: float = 0.33  # share of red-team prompts; toy only (HH lowered its own, §4.4)
    eval_every: int = 20          # iterations between evaluations on held-out prompts
    eval_prompts: int = 512       # toy: helpful held-out prompts, and half as many red-team ones
    eval_conversations: int = 300  # toy: whole held-out conversations, measured by turn at the end
    save_every: int = 5           # iterations between checkpoints
    model_prompts: float = 0.0    # share of prompts that the LM writes (HH 369k of 506k, §4.1)
    written: int = 1000           # prompts of each kind that it writes for this


# ---- 1. Learner --------------------------------------------------------------


class Learner:
    """The four networks of RLHF. Policy and critic learn; the reference (the initial policy) and
    the PM are frozen."""

    def __init__(self, run: Run, cfg: RLConfig, reference: GPT, pm: ScalarModel):
        self.run, self.cfg, self.reference, self.pm = run, cfg, reference, pm
        self.policy = run.prepare(copy.deepcopy(reference))
        # The critic starts from the PM, as in InstructGPT (§3.5, App. C.4); HH does not describe
        # its value network. With keep_head it keeps the PM's head, as we read InstructGPT. By
        # default its head starts at zero, as in OpenAI's first RLHF code (pm.py).
        critic = copy.deepcopy(pm) if cfg.keep_head else ScalarModel(pm.trunk, zero_head=True)
        self.critic = run.prepare(critic.to(run.device))
        groups = [{"params": self.policy.parameters(), "peak_lr": cfg.lr},
                  {"params": self.critic.parameters(), "peak_lr": cfg.critic_lr}]
        # HH does not state the optimizer. betas: InstructGPT; eps: OpenAI (utils/core.py).
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-5, fused=True)
        self.sampler = Sampler(self.policy, run.tok.end_of_turn, cfg.temperature, cfg.slots)
        self.checksums = [checksum(reference), checksum(pm)]
        self.average = copy.deepcopy(reference) if cfg.ema else None
        self.text = PretrainingText(run, "rl") if cfg.ptx_coef else None

    @property
    def result(self) -> GPT:
        """What is evaluated and saved: the policy, or the average of its weights (IG C.4)."""
        return self.policy if self.average is None else self.average

    def iterate(self, prompts: Prompts, iteration: int) -> dict:
        """Run one iteration. Returns statistics of its responses and of its update."""
        run, cfg, where = self.run, self.cfg, f"RLHF iteration {iteration}"

        # 1. Prompts. "train" and the iteration only seed the draw; held_out chooses the split.
        batch = prompts.draw(cfg.batch, "train", iteration, held_out=False)

        # 2. One response to each, sampled from the policy.
        generator = run.torch_rng("rollout", iteration)
        uniforms = torch.rand(cfg.batch, cfg.max_response, generator=generator)           # (N, R)
        ro = self.sampler(batch.ids, uniforms)

        # 3. One score for each response, by the preference model.
        scores = pm_scores(self.pm, ro, run.tok.end_of_context, cfg)                      # (N,)

        # 4. A reward for each token: the score on the last one, and the KL penalty on all. `logp`
        #    is also what the update compares with, so it comes from a full forward pass like the
        #    update's. What the sampler recorded went through the cache and differs by rounding.
        logp = all_logprobs(self.policy, ro, cfg)                                         # (N, R)
        ref_logp = all_logprobs(self.reference, ro, cfg)                                  # (N, R)
        check_rollout(ro, logp, ref_logp, run.tok.end_of_turn, where, is_first=iteration == 0)
        rewards = shaped_rewards(scores, logp, ref_logp, ro.mask, cfg.kl_coef)            # (N, R)
        check_rewards(rewards, scores, logp, ref_logp, ro.mask, cfg.kl_coef, where)

        # 5. Advantages: how much better each token was than the critic expected.
        old_values = all_values(self.critic, ro, cfg)                                     # (N, R)
        advantages, returns = gae(rewards, old_values, ro.mask, cfg.gamma, cfg.gae_lambda)
        statistics = rollout_statistics(ro, scores, logp, ref_logp, old_values, returns,
                                        cfg.kl_coef)

        # 6. The update: clipped steps of policy and critic.
        self.set_learning_rates(iteration)
        add_text = functools.partial(self.add_text, iteration) if self.text else None
        experience = Experience(logp, old_values, whiten(advantages, ro.mask), returns)
        statistics |= update(self.policy, self.critic, self.optimizer, ro, experience, cfg,
                             run.torch_rng("minibatches", iteration), where, add_text,
                             self.average)
        check_frozen([self.reference, self.pm], self.checksums, where)
        if run.toy:
            statistics["truth"] = mean_truth(run, batch, ro)
        return statistics  # Step 7, log and evaluate, is in `train`.

    def add_text(self, iteration: int, n_responses: int, step: int):
        """PPO-ptx: add ptx_coef (gamma in IG Eq. 2) x the gradient of the loss on pretraining
        text."""
        rows = self.text.draw(n_responses * self.cfg.ptx_documents, iteration, step)
        return add_text_gradients(self.policy, rows, self.cfg.ptx_coef, self.run.device)

    def set_learning_rates(self, iteration: int):
        """They rise linearly over the first iterations and then stay constant."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1.0, (iteration + 1) / max(self.cfg.warmup, 1))


# ---- 2. Training -------------------------------------------------------------


def make_prompts(run: Run, cfg: RLConfig) -> Prompts:
    """The prompts of comparisons. With --model-prompts the LM writes more, of each kind of which
    there are some to show it."""
    prompts = Prompts(run, cfg.max_response, cfg.harmless_share)
    if cfg.model_prompts == 0:
        return prompts
    lm = run.load_model("lm.pt")
    for kind in ("helpful", "harmless"):
        if prompts.texts_of(kind, "train"):
            prompts.written[kind] = write_prompts(run, lm, prompts, kind, cfg.written)
    if not prompts.written:
        raise UserError("--model-prompts needs comparisons, whose questions the language model is "
                        "shown; there are none here")
    prompts.written_share = cfg.model_prompts
    return prompts


def train(run: Run, cfg: RLConfig, watch=None):
    """Run RLHF. Reads initial.pt and pm.pt, writes policy.pt and samples.txt. `watch(n, policy)` is
    called after each iteration, with the number of updates."""
    stage = run.begin("rl", cfg)
    if stage is None:
        return
    reference, pm = run.load_model("initial.pt"), run.load_model("pm.pt")
    learner = Learner(run, cfg, reference, pm)
    prompts = make_prompts(run, cfg)
    held_out = prompts.held_out(cfg.eval_prompts)
    before, replies_before = evaluate(run, cfg, reference, reference, pm, held_out)
    parts = {"policy": learner.policy, "critic": learner.critic, "optimizer": learner.optimizer}
    if learner.average is not None:
        parts["average"] = learner.average
    stage.start(**parts)
    print(f"[5] RLHF: {cfg.iterations} iterations of {cfg.batch} responses" + stage.resumed_note())
    recorder = Recorder(run, cfg, reference, pm, held_out)  # for report.py
    if stage.n_lines == 0:  # a resumed run has these lines already
        stage.log(0, **with_eval_prefix(before))
        stage.log_record(0, **recorder.content(0, reference, learner.critic))
    for iteration, _ in stage.steps(range(cfg.iterations), save_every=cfg.save_every, unit="it"):
        start = time.perf_counter()
        statistics = learner.iterate(prompts, iteration)
        # 7. Log, and now and then evaluate. (`stage.steps` saves.) A line of metrics.jsonl holds
        #    the statistics of an iteration, and "eval_" numbers of the policy after its update.
        tqdm.write(log_line(iteration, statistics, time.perf_counter() - start))
        n_updates = iteration + 1
        if n_updates % cfg.eval_every == 0 and n_updates < cfg.iterations:
            numbers, replies = evaluate(run, cfg, learner.result, reference, pm, held_out)
            statistics |= with_eval_prefix(numbers)
            tqdm.write(side_by_side(held_out, replies_before, replies, n_each=1))
        stage.log(n_updates, **statistics)
        if recorder.is_due(n_updates):
            stage.log_record(n_updates, **recorder.content(n_updates, learner.result,
                                                           learner.critic))
        if watch:
            watch(n_updates, learner.result)

    after, replies_after = evaluate(run, cfg, learner.result, reference, pm, held_out)
    # A line of its own: the policy is that of line cfg.iterations, with no further update.
    stage.log(cfg.iterations + 1, **with_eval_prefix(after))
    stage.log_record(cfg.iterations, **recorder.content(cfg.iterations, learner.result,
                                                        learner.critic))
    dialogues = side_by_side(held_out, replies_before, replies_after)
    write_atomically(run.path("samples.txt"), dialogues.encode())
    print(f"\n{dialogues}\n{table(before, after)}")
    if run.toy:
        turns = []
        for model in (reference, learner.result):
            turns.append(rates_by_turn(run, model, cfg.eval_conversations, cfg.max_response,
                                       cfg.temperature))
        print(f"\n{turn_table(*turns)}")
    stage.end(**run.checkpoint(learner.result))


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig, rl: RLConfig,
            sft: SFTConfig, rm: RMConfig, select: SelectConfig):
    folder = Run(run, can_export=True)  # `run` holds the options, `folder` is the Run
    folder.check_paper(cd=cd, pmp=pmp, pm=pm, sft=sft, rm=rm, select=select)
    if rl.ema == 1:
        raise UserError("--rl.ema 1.0 keeps the initial policy: use a decay below 1")
    is_hh = run.paper == "hh"  # else InstructGPT: demonstrations and rankings
    if is_hh:
        folder.check_memory(lm, cd, pmp, pm, rl)
        check_early(folder, cd, pmp, pm, rl.max_response)
    else:
        if folder.toy and rl.model_prompts > 0:
            raise UserError("--model-prompts needs comparisons, and the toy world's InstructGPT "
                            "has none")
        folder.check_memory(lm, sft=sft, rm=rm, rl=rl)
        rankings.check_early(folder, sft, rm, select, rl.max_response)
    with report.written_at_the_end(folder.out, is_writer=is_first()):
        if is_hh:
            ensure(folder, lm, cd, pmp, pm)
        else:
            rankings.ensure(folder, lm, sft, rm, select)
        train(folder, rl)
    if run.export and is_first():
        hub.export_gpt2(folder.load_model("policy.pt", device="cpu"), run.export, folder.tok)
        print(f"    -> {run.export}, for transformers")


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig, pmp=PMPConfig,
         pm=PMConfig, rl=RLConfig, sft=SFTConfig, rm=RMConfig, select=SelectConfig)
