"""PPO for language models: the KL penalty, GAE, and the clipped update (HH §4.1, App. B.1).

One response is one episode. Each of its tokens is an action; the state is everything before it; the only reward
from outside comes at the end, the PM's score of the whole response. Sampling the responses is rollout.py's. Read this
in this order:

  PPOConfig                      every knob, with what the papers use
  logprobs, values, pm_scores    what is known about a response
  shaped_rewards, gae, whiten    from scores to advantages
  experience                     puts these together, and checks what must hold
  update                         K passes of clipped policy and value steps

Legend:  N responses   P prompt tokens   R response tokens (columns of a rectangle)   S = P + R   D width
Indexing, once and for all. Everything about responses is (N, R): column t is the response's t-th token.
  logp[:, t]    log pi(token t | before), from the logits one position earlier
  values[:, t]  V(s_t), the state BEFORE token t, so also read one position earlier
  rewards[:, t] what choosing token t earned; the PM's score is in the last column that is kept
  mask[:, t]    whether token t exists. The end-of-turn token is an action and is kept; nothing after it is.
"""
import math
from dataclasses import dataclass

import torch

from data import batches_by_length
from model import GPT, autocast, token_logprobs, tokens_at_once
from pm import ScalarModel, score_rows
from rollout import Rollouts


class TrainingError(Exception):
    """Training can't go on: a loss is not finite, or an invariant of PPO does not hold."""


def check_finite(where: str, **numbers: float):
    """Stop before NaN or infinity gets into the weights; the last checkpoint on disk is then still a good one."""
    for name, x in numbers.items():
        if not math.isfinite(x):
            raise TrainingError(f"{where}: the {name.replace('_', ' ')} is {x}; the last good checkpoint is kept")


@dataclass
class PPOConfig:
    """Defaults are the toy's. HH = Bai et al. B.1, IG = Ouyang et al. C.4, OO = Gao et al. App. C."""
    iterations: int = 65        # rollout + update; HH's total is not stated, Fig. 33 is at 2e5 responses
    batch: int = 256            # responses an iteration (not stated in HH; IG 512, OO 256)
    minibatch: int = 64         # responses a step (not stated in HH; IG 64)
    passes: int = 1             # K over the same responses: HH 1 (2 robustness, 4 online), IG 1
    max_response: int = 32      # tokens; HH 128, and 32 in the robustness studies
    lr: float = 5e-4            # HH: 0.01 x the pretraining rate, over some 12 times as many responses; here 0.1 x
    critic_lr: float = 1e-3     # toy; not stated in HH; IG has a rate of its own for the value network
    warmup: int = 5             # iterations of linear warm-up (IG 10; HH 25k responses in the robustness studies)
    clip: float = 0.2           # HH, IG, OO 0.2
    value_clip: float = 0.2     # not stated in HH; the same as `clip` in OpenAI's RLHF code
    kl_coef: float = 0.2        # HH lambda_KL 0.001, IG beta 0.02, OO 0; README: "What differs"
    gamma: float = 1.0          # HH, IG: no discount
    gae_lambda: float = 0.95    # not stated in HH and IG; OO 0.95
    max_grad_norm: float = 1.0  # not stated in HH and IG; the usual 1
    temperature: float = 1.0    # IG 1; not stated in HH. Log-probs are taken at it too
    unfinished_penalty: float = 1.0  # off the score when a response has no end-of-turn token (not stated in HH)
    slots: int = 0              # responses sampled side by side (0: rollout.fitting_slots); changes speed, not the result
    token_budget: int = 0       # tokens a forward pass holds (0: model.tokens_at_once); likewise


# ------------------------------------------------------------------------------ score


def _at_states(hidden, ro: Rollouts, i):
    """From row-aligned (B, S, ...) to response-aligned (B, R, ...): column t is the position before token t."""
    R = ro.logp.shape[1]
    at = ro.prompt_len[i][:, None] - 1 + torch.arange(R, device=hidden.device)  # (B, R)
    at = at.clamp(max=hidden.shape[1] - 1)  # columns beyond a response; the mask hides them
    return hidden[torch.arange(len(at), device=hidden.device)[:, None], at]


def logprobs(policy: GPT, ro: Rollouts, i, temperature=1.0, entropies=False):
    """Log-probs (B, R) of responses i under a policy, by one full forward pass; 0 where masked. With `entropies`,
    also those of the distributions (B, R).

    The one function for old, new and reference log-probs: same temperature, same masks."""
    mask = ro.mask[i]
    hidden = _at_states(policy(ro.rows(i)), ro, i)[mask]  # (n, D): only real tokens reach the softmax
    out = token_logprobs(policy, hidden, ro.actions[i][mask], temperature, entropies=entropies)  # (n,) or two of them
    zeros = torch.zeros(mask.shape, device=mask.device)
    return tuple(zeros.masked_scatter(mask, x) for x in out) if entropies else zeros.masked_scatter(mask, out)


def values(critic: ScalarModel, ro: Rollouts, i):
    """V(s_t) of responses i, (B, R); 0 where masked."""
    return _at_states(critic(ro.rows(i)), ro, i) * ro.mask[i]


@torch.no_grad()
def in_batches(function, ro: Rollouts, token_budget: int) -> torch.Tensor:
    """Apply a function of row indices -> (B, R) to all responses -> (N, R), in batches sorted by length under a
    token budget: no row is padded to the longest of all."""
    out = torch.zeros_like(ro.logp)
    for batch in batches_by_length(ro.lengths.tolist(), tokens_at_once(token_budget, out.device)):
        i = torch.tensor(batch, device=out.device)
        with autocast(out.device):
            out[i] = function(i).float()
    return out


def pm_scores(pm: ScalarModel, ro: Rollouts, end_of_context: int, cfg: PPOConfig):
    """(N,) the raw PM logit of each response, mean-shifted, less the penalty for not finishing.

    Rows are built as in PM training: prompt, response with its end-of-turn token, end-of-context. An unfinished
    response has no end-of-turn token. The toy's PM never saw one in training (train_pm.collect), hence the penalty."""
    rows = [t[:n] + [end_of_context] for t, n in zip(ro.tokens.tolist(), ro.lengths.tolist())]
    scores = score_rows(pm, rows, cfg.token_budget, ro.tokens.device).to(ro.tokens.device)
    return scores - cfg.unfinished_penalty * ~ro.finished


# ------------------------------------------------------------------------------ advantages


def kl_estimates(logp, ref_logp):
    """Two estimates of D_KL(pi || ref) at each token, from tokens sampled from pi; with d = log pi - log ref:
    k1 = d (unbiased, may be negative), k3 = exp(-d) - 1 + d (unbiased, never negative). In nats.

    Turned around, exp(d) - 1 - d is no KL at all. k1 is the one for the reward: the gradient of its expectation
    is the gradient of the KL. k3 is logged beside it: a k1 that stays below 0 means that sampling and scoring
    disagree (temperature, padding, dropout)."""
    d = logp - ref_logp
    return d, torch.exp(-d) - 1 + d


def shaped_rewards(scores, logp, ref_logp, mask, kl_coef):
    """(N, R): -lambda_KL * k1 at every token, plus the score on the last one (Eq. 4.1, spread over the tokens as in
    IG §3.5; HH does not state whether it is). A row sums to score - lambda_KL * (its log-ratio to the reference)."""
    rewards = -kl_coef * (logp - ref_logp) * mask  # (N, R)
    last = mask.sum(1, keepdim=True) - 1  # (N, 1)
    return rewards.scatter_add(1, last, scores[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016) -> advantages, returns, both (N, R), 0 where masked.

      delta_t = r_t + gamma * V(s_{t+1}) - V(s_t),   A_t = delta_t + gamma * lam * A_{t+1}
    V is 0 after the last kept token: the episode is over. Returns A + V are what the critic learns; they must be
    made before advantages are whitened. Masked entries of the inputs are never used, not even NaN ones."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages, next_value, next_advantage = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(x, mask):
    """Mean 0, variance 1 over the valid tokens of the whole batch; 0 where masked. One valid token gives 0.

    Not stated in HH and IG; OpenAI's first RLHF code does it."""
    kept = x[mask]
    return torch.where(mask, (x - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-8), 0)


@dataclass
class Experience:
    """All that an update needs, (N, R) each."""
    logp: torch.Tensor        # of the policy before the update
    values: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor


def experience(policy, reference, critic, scores, ro: Rollouts, cfg: PPOConfig, where: str, first: bool):
    """Steps 3 to 5 of an iteration: from responses and their scores (N,) to what the update needs, and statistics.

    `where` names the iteration in errors; `first` says that the policy has not been updated yet."""
    def logp_of(model):
        return in_batches(lambda i: logprobs(model, ro, i, cfg.temperature), ro, cfg.token_budget)

    # 3. Score. The old log-probs are made again by the forward pass that the update uses: those gathered while
    #    sampling went through the cache, with other batch shapes, and differ by rounding.
    mask, old, ref = ro.mask, logp_of(policy), logp_of(reference)
    old_values = in_batches(lambda i: values(critic, ro, i), ro, cfg.token_budget)
    exact = ro.tokens.device.type == "cpu"  # float32; bf16 on a GPU
    gap = (ro.logp - old)[mask].abs().mean().item()
    if not gap <= (1e-4 if exact else 5e-2):  # so that NaN stops it too
        raise TrainingError(f"{where}: log-probs at sampling and at scoring differ by {gap:.2g} nats a token")
    k1, k3 = kl_estimates(old, ref)
    if first and not k1[mask].abs().mean() <= (1e-5 if exact else 2e-2):
        raise TrainingError(f"{where}: the KL to the initial policy isn't 0 before the first update")
    # 4. Rewards: the score on the last token, the KL penalty on all.
    rewards = shaped_rewards(scores, old, ref, mask, cfg.kl_coef)
    total = scores - cfg.kl_coef * (k1 * mask).sum(1)  # (N,)
    if not torch.allclose(rewards.sum(1), total, atol=1e-3):
        raise TrainingError(f"{where}: rewards don't add up to score - KL penalty")
    # 5. Advantages. Returns are made from them before whitening, or the critic would learn whitened ones.
    advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.gae_lambda)
    unexplained = (returns - old_values)[mask].var() / returns[mask].var().clamp(min=1e-8)
    stats = dict(score=scores.mean(), reward=total.mean(),
                 kl=(k1 * mask).sum(1).mean(), kl_k3=(k3 * mask).sum(1).mean(),  # nats a response
                 tokens=ro.response_len.float().mean(), finished=ro.finished.float().mean(),
                 explained_variance=1 - unexplained)
    return Experience(old, old_values, whiten(advantages, mask), returns), {k: v.item() for k, v in stats.items()}


# ------------------------------------------------------------------------------ update


def policy_loss(logp, old_logp, advantages, clip):
    """Token-wise -min(ratio * A, clip(ratio) * A), not averaged. ratio = pi / pi_old, one a token."""
    ratio = torch.exp(logp - old_logp)
    # No gradient where the ratio has already moved past 1 +- clip in the direction that A asks for.
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(new_values, old_values, returns, clip):
    """Token-wise 0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the OLD value.

    Not stated in HH and IG; this form is that of OpenAI's first RLHF code."""
    clipped = old_values + (new_values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)


def update(policy: GPT, critic: ScalarModel, optimizer, ro: Rollouts, ex: Experience, cfg: PPOConfig, generator,
           where: str = "") -> dict:
    """K passes over the responses in minibatches. Returns what is worth watching: means over each minibatch's
    tokens, then over the minibatches.

    A minibatch runs in length-sorted pieces under the token budget; each piece's loss is divided by the valid
    tokens of the whole minibatch, so the gradient is that of one big batch. `where` names the iteration in errors."""
    N, device = len(ro.tokens), ro.tokens.device
    mask, totals, n_steps = ro.mask, {}, 0
    for k in range(cfg.passes):
        for chosen in torch.randperm(N, generator=generator).split(cfg.minibatch):
            n_tokens = mask[chosen.to(device)].sum().item()
            optimizer.zero_grad(set_to_none=True)
            first_step = n_steps == 0
            stats = {}
            for piece in batches_by_length(ro.lengths.cpu()[chosen].tolist(), tokens_at_once(cfg.token_budget, device)):
                i = chosen[piece].to(device)
                m = mask[i]
                with autocast(device):
                    new_logp, entropy = logprobs(policy, ro, i, cfg.temperature, entropies=True)
                    new_values = values(critic, ro, i)
                pg = policy_loss(new_logp, ex.logp[i], ex.advantages[i], cfg.clip)[m].sum() / n_tokens
                vf = value_loss(new_values, ex.values[i], ex.returns[i], cfg.value_clip)[m].sum() / n_tokens
                check_finite(where, policy_loss=pg.item(), value_loss=vf.item())
                (pg + vf).backward()  # two networks, so the sum of the losses needs no weights
                with torch.no_grad():
                    log_ratio = (new_logp - ex.logp[i])[m]
                    ratio = log_ratio.exp()
                    for name, x in dict(policy_loss=pg, value_loss=vf, entropy=entropy[m].sum() / n_tokens,
                                        approx_kl=(ratio - 1 - log_ratio).sum() / n_tokens,  # k3 of old || new
                                        clip_fraction=((ratio - 1).abs() > cfg.clip).sum() / n_tokens).items():
                        stats[name] = stats.get(name, 0.0) + x.item()
                    # Before the first step old and new policy are one. If their ratio isn't 1 (up to
                    # rounding, which in bf16 is large for a rare token), then padding, positions, temperature or
                    # dropout differ between the two passes, and nothing PPO does from here on means what it should.
                    off = (ratio - 1).abs()
                    if first_step and not (off.max() <= 1e-3 if device.type == "cpu" else off.mean() <= 2e-2):
                        raise TrainingError(f"{where}: the ratio is off 1 by {off.max().item():.4f} at the first step")
            norms = [torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm).item()
                     for net in (policy, critic)]
            check_finite(where, policy_gradient=norms[0], critic_gradient=norms[1])
            optimizer.step()
            n_steps += 1
            for name, x in dict(stats, grad_norm=norms[0], critic_grad_norm=norms[1]).items():
                totals[name] = totals.get(name, 0.0) + x
    return {name: x / n_steps for name, x in totals.items()}
