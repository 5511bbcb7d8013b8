"""PPO for language models: the KL penalty, GAE, and the clipped update (HH §4.1, App. B.1).

Sources: HH is Bai et al. 2022, IG is Ouyang et al. 2022, OO is Gao et al. 2022. Where HH and IG are
silent, "OpenAI L149" is line 149 of lm_human_preferences/train_policy.py in OpenAI's first RLHF
code, github.com/openai/lm-human-preferences at commit cbfd210.

A response is an episode: each of its tokens is an action, the state is everything before the token,
and the only reward from outside, the PM's score of the whole response, comes at the end. (OpenAI's
first code reads it so. IG §3.5 calls the task a bandit; HH §4.1 calls a response a timestep and
the conversation a trajectory.)

`Learner.iterate` in train_rl.py calls the functions below. Each section has the number of its step:
  PPOConfig                         PPO's options, with what the papers use
  3. pm_scores                      one score for each response
  4. all_logprobs, shaped_rewards   the KL penalty, and a reward for each token
  5. all_values, gae, whiten        from rewards to advantages
  6. update                         K passes of clipped policy and value steps

Legend:  N responses   B some of them, those with the indices i   P prompt tokens
         R response tokens (columns of a rectangle)   S = P + R   T longest row of the B responses
         D width   n tokens of the B responses, packed   ro the responses, a Rollouts
Indexing, once and for all. Per-token tensors are (N, R): column t is a response's token t, from 0.
  logp[:, t]     log pi(token t | everything before it), from the logits one position earlier
  values[:, t]   V(s_t), the value of the state BEFORE token t, read one position before token t
  rewards[:, t]  what choosing token t earned; the PM's score lands on the last token that is kept
  mask[:, t]     whether token t exists. The end-of-turn token is an action and is kept; nothing
                 after it is.
"""
from dataclasses import dataclass

import torch

import ranks
from checks import add_to, as_floats, averages, check_first_ratio, update_statistics
from model import GPT, token_logprobs, token_logprobs_and_entropies
from pm import ScalarModel, score_rows
from rollout import Rollouts
from run import autocast, check_finite, tokens_at_once


@dataclass
class PPOConfig:
    """The defaults are the toy's. The papers' are those of HH App. B.1, IG C.4 and OO App. C."""
    iterations: int = 65        # rollout + update; HH's total is not stated (Fig. 33: 2e5 replies)
    batch: int = 256            # responses per iteration (not stated in HH; IG 512, OO 256)
    minibatch: int = 64         # responses per step (not stated in HH; IG 64)
    passes: int = 1             # K, over the same responses: HH 1 (robustness 2, online 4), IG 1
    max_response: int = 32      # tokens; HH 128, and 32 in the robustness studies
    lr: float = 5e-4            # 0.1 x the pretraining rate (HH 0.01 x, for more responses: README)
    critic_lr: float = 1e-3     # not stated in HH; IG's value network has a rate of its own, too
    warmup: int = 5             # iterations of linear warm-up (IG 10; HH 25k responses, robustness)
    clip: float = 0.2           # HH, IG, OO 0.2
    value_clip: float = 0.2     # not stated in HH; OpenAI 0.2
    kl_coef: float = 0.2        # HH lambda_KL 0.001, IG beta 0.02, OO 0; README: "What differs"
    gamma: float = 1.0          # HH, IG: no discount
    gae_lambda: float = 0.95    # not stated in HH and IG; OpenAI and OO 0.95
    max_grad_norm: float = 1.0  # not stated in HH and IG; the usual 1
    temperature: float = 1.0    # IG 1; not stated in HH. Log-probs use the same temperature
    unfinished_penalty: float = 1.0  # subtracted if a response is unfinished (not stated in HH)
    keep_head: bool = False     # the critic keeps the PM's head (as we read IG), or has one at 0
    ptx_coef: float = 0.0       # PPO-ptx: gamma in IG Eq. 2, IG 27.8 (0: none, as in HH)
    ptx_documents: int = 1      # documents of pretraining text for each response; IG 8 (more time)
    ema: float = 0.0            # save an average of the weights with this decay, IG 0.992 (0: HH)
    slots: int = 0              # responses sampled side by side; speed only (0 picks what fits)
    token_budget: int = 0       # tokens a forward pass holds; memory and speed (0 picks a default)


# ---- 3. Scores ---------------------------------------------------------------


def pm_scores(pm: ScalarModel, ro: Rollouts, end_of_context: int, cfg: PPOConfig):
    """(N,) the PM's logit for each response, less the penalty if the response did not finish.

    Rows are built as in PM training: prompt, response with its end-of-turn token, end-of-context.
    An unfinished response has no end-of-turn token. The toy's PM never saw such a response in
    training (collect.collect), hence the penalty."""
    rows = []
    for tokens, length in zip(ro.tokens.tolist(), ro.lengths.tolist()):
        rows.append(tokens[:length] + [end_of_context])
    scores = score_rows(pm, rows, cfg.token_budget, ro.tokens.device).to(ro.tokens.device)
    return scores - cfg.unfinished_penalty * ~ro.finished


# ---- 4. Rewards --------------------------------------------------------------


def tokens_at(ro: Rollouts, i):
    """Rows and columns, (n,) each, of the real tokens of responses i in a rectangle (B, R). So for
    any x (N, R), x[i][tokens_at(ro, i)] holds the numbers of these tokens: (n,). Two responses of 2
    and 3 tokens have n = 5, the rows 0 0 1 1 1 and the columns 0 1 0 1 2."""
    return ro.mask[i].nonzero(as_tuple=True)


def states_at(ro: Rollouts, i, at):
    """Rows and columns, (n,) each, of the states of these tokens in ro.rows(i) (B, T): one position
    before each token. A response's first token is chosen in the state of its prompt's last one."""
    row, t = at
    return row, ro.prompt_len[i][row] - 1 + t


def all_logprobs(policy: GPT, ro: Rollouts, cfg: PPOConfig):
    """(N, R) log-probs of all the responses, without gradients. Old and reference log-probs come
    from this one function: the same temperature, the same masks."""
    def of_responses(i, at):
        states = policy(ro.rows(i), states_at(ro, i, at))  # (n, D): only these get logits
        return token_logprobs(policy, states, ro.actions[i][at], cfg.temperature)
    return in_batches(of_responses, ro, cfg.token_budget)


@torch.no_grad()
def in_batches(function, ro: Rollouts, token_budget: int):
    """Apply `function`, which turns indices into a number for each token (n,), to all the
    responses; returns (N, R), 0 where mask is False. Batches hold responses of like length, so
    short rows are not padded to the longest of all. (Not inference_mode: the update's loss takes
    these numbers, and autograd refuses tensors made in that mode.)"""
    result = torch.zeros_like(ro.logp)
    budget = tokens_at_once(token_budget, result.device)
    for batch in ranks.own_batches(ro.lengths.tolist(), budget):
        i = torch.tensor(batch, device=result.device)
        at = tokens_at(ro, i)
        row, t = at
        with autocast(result.device):
            result[i[row], t] = function(i, at).to(result.dtype)
    return ranks.add_up(result)


def shaped_rewards(scores, logp, ref_logp, mask, kl_coef):
    """(N, R): -lambda_KL * (log pi - log ref) at every token, plus the score on the last one.

    Eq. 4.1, spread over the tokens as in IG §3.5 (HH does not say how; OpenAI L149-154). A row
    sums to score - lambda_KL * log-ratio of the whole response. checks.kl_estimates says why the
    log-ratio is the right estimate of the KL here."""
    rewards = -kl_coef * (logp - ref_logp) * mask  # (N, R)
    last = mask.sum(1, keepdim=True) - 1           # (N, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


# ---- 5. Advantages -----------------------------------------------------------


def all_values(critic: ScalarModel, ro: Rollouts, cfg: PPOConfig):
    """(N, R) values V(s_t) of all the responses, without gradients."""
    def of_responses(i, at):
        return critic(ro.rows(i), states_at(ro, i, at))
    return in_batches(of_responses, ro, cfg.token_budget)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016; OpenAI L326-335) -> advantages and
    returns, both (N, R), 0 where mask is False.

    How much better was token t than the critic expected? Take the rewards of k tokens, and let the
    critic stand for the rest:
      A_t(k) = r_t + gamma r_{t+1} + ... + gamma^(k-1) r_{t+k-1} + gamma^k V(s_{t+k}) - V(s_t).
    A small k trusts the critic (bias); a large k trusts the sampled tokens (variance). With
      delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    the values in between cancel, and
      A_t(k) = delta_t + gamma delta_{t+1} + ... + gamma^(k-1) delta_{t+k-1}.
    GAE averages over k = 1, 2, ... with the weights (1 - lam) lam^(k-1). The term delta_{t+j}
    occurs in every A_t(k) with k > j, and their weights sum to lam^j. Hence
      A_t = sum over j >= 0 of (gamma lam)^j delta_{t+j} = delta_t + gamma lam A_{t+1},
    which the loop below applies from the last token to the first. lam = 0 gives delta_t; lam = 1
    gives A_t(k) with the largest k.

    V is 0 after the last kept token: the episode is over. The returns A + V are what the critic
    learns; they must be computed before the advantages are whitened. Inputs where mask is False are
    never used, even if they are NaN."""
    values = torch.where(mask, values, 0)
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (N,)
        advantage = delta + gamma * lam * next_advantage           # (N,)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """Mean 0 and variance 1 over the real tokens of the whole batch; 0 where mask is False.

    Not stated in HH and IG; OpenAI (L337) whitens each minibatch. A single token becomes 0."""
    kept = x[mask]
    whitened = (x - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-8)
    return torch.where(mask, whitened, 0)


# ---- 6. Update ---------------------------------------------------------------


def policy_loss(logp, old_logp, advantages, clip):
    """-min(ratio * A, clip(ratio) * A) of each token (Schulman et al. 2017; clip: HH App. B.1);
    ratio = pi / pi_old."""
    ratio = torch.exp(logp - old_logp)
    # No gradient where the ratio has already moved past 1 +- clip in the direction that A asks for.
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(new_values, old_values, returns, clip):
    """0.5 * max((V - G)^2, (V_clipped - G)^2) of each token, where G is the return and V_clipped
    stays within `clip` of the OLD value. Not stated in HH and IG; OpenAI L343-347."""
    clipped = old_values + (new_values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)


@dataclass
class Experience:
    """What the update needs to know of the responses besides their tokens; (N, R) each."""
    logp: torch.Tensor        # log-probs under the policy before the update
    values: torch.Tensor      # the critic's values before the update
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor     # advantages before whitening + values


def update(policy: GPT, critic: ScalarModel, optimizer, ro: Rollouts, ex: Experience,
           cfg: PPOConfig, generator, where: str = "", add_text=None, average=None) -> dict:
    """K passes over the responses, in minibatches in random order. Returns statistics: means over a
    minibatch's tokens (except the gradient norms and ptx_loss), then over the minibatches. `where`
    names the iteration in errors.

    A minibatch is taken in pieces that fit the token budget. Losses are sums over tokens, divided
    by the tokens of the whole minibatch, so the gradient is that of one big batch.

    PPO-ptx (IG Eq. 2, C.4): add_text(n responses, number of the step) adds to the policy's gradient
    that of the loss on pretraining text, and returns this loss. average: a GPT that follows the
    policy's weights (`move_average`)."""
    history, device = [], ro.tokens.device
    budget = tokens_at_once(cfg.token_budget, device)
    # To read a value from a GPU, the program waits until all queued work is done: read few.
    response_len, lengths = ro.response_len.cpu(), ro.lengths.cpu()                       # (N,)
    for _ in range(cfg.passes):
        order = torch.randperm(len(ro.tokens), generator=generator)
        for minibatch in order.split(cfg.minibatch):
            n_tokens = response_len[minibatch].sum().item()
            statistics = {}
            optimizer.zero_grad(set_to_none=True)
            for part in ranks.own_batches(lengths[minibatch].tolist(), budget):
                i = minibatch[part].to(device)                                            # (B,)
                at = tokens_at(ro, i)
                ids, before = ro.rows(i), states_at(ro, i, at)
                actions, old_logp = ro.actions[i][at], ex.logp[i][at]                     # (n,)
                advantages = ex.advantages[i][at]                                         # (n,)
                old_values, returns = ex.values[i][at], ex.returns[i][at]                 # (n,)
                with autocast(device):
                    states = policy(ids, before)                                          # (n, D)
                    logp, entropy = token_logprobs_and_entropies(
                        policy, states, actions, cfg.temperature)                         # (n,)
                policy_sum = policy_loss(logp, old_logp, advantages, cfg.clip).sum()
                (policy_sum / n_tokens).backward()
                # The critic is another network. Its turn comes after the policy's backward pass,
                # so that the activations of only one of them are held at a time.
                with autocast(device):
                    new_values = critic(ids, before)                                      # (n,)
                value_sum = value_loss(new_values, old_values, returns, cfg.value_clip).sum()
                (value_sum / n_tokens).backward()
                sums = update_statistics(policy_sum, value_sum, entropy.sum(), logp, old_logp,
                                         cfg.clip)
                add_to(statistics, sums, n_tokens)
                if not history:
                    check_first_ratio(logp, old_logp, where)
            if add_text is not None:  # so that the optimizer takes one step on the sum
                statistics["ptx_loss"] = add_text(len(minibatch), len(history))
            ranks.add_up_gradients(policy, critic)  # several GPUs: see ranks.py
            norms = clip_gradients(policy, critic, cfg.max_grad_norm)
            numbers = ranks.add_up_numbers(as_floats(statistics)) | as_floats(norms)
            for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm"):
                check_finite(where, **{name: numbers[name]})
            optimizer.step()
            if average is not None:
                move_average(average, policy, cfg.ema)
            history.append(numbers)
    return averages(history)


@torch.no_grad()
def move_average(average: GPT, policy: GPT, decay: float):
    """average <- decay x average + (1 - decay) x policy, for all weights (IG C.4).

    IG does not say how often, or that the average is the result. Here it is moved after each step:
    once an iteration, a short run would end with an average that is mostly the initial policy."""
    for old, new in zip(average.parameters(), policy.parameters()):
        old.lerp_(new, 1 - decay)


def clip_gradients(policy: GPT, critic: ScalarModel, max_norm: float) -> dict:
    """Scale each network's gradient down to `max_norm`. Returns the norms before."""
    norms = {}
    for name, network in (("grad_norm", policy), ("critic_grad_norm", critic)):
        norms[name] = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return norms
