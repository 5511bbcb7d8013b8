"""Checks that stop a broken PPO run, and the statistics that describe a healthy one.

A bug in padding, positions, temperature or masks usually does not crash PPO: it trains on, badly.
So what must hold is checked in every iteration, up to rounding (float32 on the CPU, bf16 on a GPU),
and the first violation ends the run with one sentence. The table "Is my run healthy?" in the README
says what the statistics should look like. Read it in this order:
  1. Checks      of the responses, the rewards, the frozen networks, an update's first step
  2. Statistics  of the responses before an update, and of the update; the log line

Legend:  N responses   R response tokens   n tokens of many responses, packed
         mask (N, R): which tokens are real
"""
import torch

from rollout import Rollouts
from run import TrainingError, check_finite

# ---- 1. Checks ---------------------------------------------------------------


def check_rollout(ro: Rollouts, logp, ref_logp, end_of_turn: int, where: str, is_first: bool):
    """A response ends at its first end-of-turn token, and is finished only if it has one. The
    log-probs recorded while sampling agree with those of the full forward pass (`logp`). Before the
    first update the KL is 0."""
    is_end = (ro.actions == end_of_turn) & ro.mask  # (N, R)
    last = (ro.response_len - 1)[:, None]           # (N, 1)
    if not torch.equal(is_end.gather(1, last)[:, 0], ro.finished):
        raise TrainingError(f"{where}: a response counts as finished and does not end with the "
                            "end-of-turn token, or vice versa")
    if (is_end.sum(1) > ro.finished).any():
        raise TrainingError(f"{where}: a response goes on after its end-of-turn token")
    on_cpu = ro.tokens.device.type == "cpu"
    difference = torch.where(ro.mask, ro.logp - logp, 0).abs()  # (N, R)
    gaps = difference.sum(1) / ro.response_len                  # (N,) nats a token
    mean, worst = gaps.mean().item(), gaps.max().item()  # one bad slot hardly moves the mean
    if not (mean <= (1e-4 if on_cpu else 5e-2) and worst <= (1e-3 if on_cpu else 0.3)):  # NaN fails
        raise TrainingError(f"{where}: log-probs while sampling and in the full forward pass "
                            f"differ by {mean:.2g} nats a token, in one response by {worst:.2g}")
    gap_to_reference = (logp - ref_logp)[ro.mask].abs().mean().item()
    if is_first and not gap_to_reference <= (1e-5 if on_cpu else 2e-2):
        raise TrainingError(f"{where}: the KL to the initial policy isn't 0 before the first "
                            f"update; log-probs differ by {gap_to_reference:.2g} nats a token")


def check_rewards(rewards, scores, logp, ref_logp, mask, kl_coef, where: str):
    """The rewards of a response add up to its score less the KL penalty."""
    check_finite(where, score=scores.sum().item())
    total = scores - kl_coef * ((logp - ref_logp) * mask).sum(1)  # (N,)
    if not torch.allclose(rewards.sum(1), total.to(rewards.dtype), atol=1e-3):
        raise TrainingError(f"{where}: rewards don't add up to score - KL penalty")


def checksum(model) -> float:
    """The sum of all parameters. If the model changes, so does this, almost surely."""
    return sum(parameter.detach().sum().item() for parameter in model.parameters())


def check_frozen(models: list, checksums: list[float], where: str):
    """The models still have the checksums that they began with. A reference that moves with the
    policy would hide how far the policy has gone."""
    for model, expected in zip(models, checksums):
        if checksum(model) != expected:
            raise TrainingError(f"{where}: a frozen model, {type(model).__name__}, has changed")


def check_first_ratio(logp, old_logp, where: str):
    """Before the first step the old and the new policy are the same. If their ratio is not 1,
    nothing that PPO does from here on means what it should."""
    distance_from_1 = (torch.exp(logp.detach() - old_logp) - 1).abs()  # (n,)
    if distance_from_1.device.type == "cpu":
        worst, bound = distance_from_1.max().item(), 1e-3
    else:  # in bf16 the ratio of a single rare token may be far from 1, so the mean decides
        worst, bound = distance_from_1.mean().item(), 2e-2
    if not worst <= bound:
        raise TrainingError(f"{where}: the ratio is off 1 by {worst:.4f} before the first step")


# ---- 2. Statistics -----------------------------------------------------------


def kl_estimates(logp, ref_logp):
    """Two estimates of D_KL(pi || ref) at each token, from tokens sampled from pi; in nats.

      d = log pi - log ref        k1 = d,   k3 = exp(-d) - 1 + d
    Each has the KL as its mean; k1 can be negative, k3 cannot. With the sign of d flipped, k3 would
    not estimate a KL. PPO's reward holds k1: put into the reward as a constant, only k1 yields the
    gradient of the KL. Both are logged. On average they agree; a k1 that stays negative means that
    the tokens were not sampled from the pi whose log-probs are used."""
    d = logp - ref_logp
    return d, torch.exp(-d) - 1 + d


def rollout_statistics(ro: Rollouts, scores, logp, ref_logp, old_values, returns, kl_coef) -> dict:
    """Statistics of an iteration's responses, before the update. KLs are in nats a response."""
    mask = ro.mask
    k1, k3 = kl_estimates(logp, ref_logp)  # (N, R) each
    kl = (k1 * mask).sum(1)                # (N,)
    unexplained = (returns - old_values)[mask].var() / returns[mask].var().clamp(min=1e-8)
    statistics = {
        "score": scores.mean(),  # less the penalty for unfinished responses
        "reward": (scores - kl_coef * kl).mean(),
        "kl": kl.mean(),
        "kl_k3": (k3 * mask).sum(1).mean(),
        "tokens": ro.response_len.float().mean(),
        "finished": ro.finished.float().mean(),
        "explained_variance": 1 - unexplained,
    }
    return as_floats(statistics)


@torch.no_grad()
def update_statistics(policy_sum, value_sum, entropy_sum, logp, old_logp, clip) -> dict:
    """Statistics of one piece of a minibatch, as sums over its tokens. The first three arguments
    are such sums; logp, old_logp (n,). The clip fraction counts ratios outside 1 +- clip, whether
    or not the clip takes effect there."""
    _, k3 = kl_estimates(old_logp, logp)  # of D_KL(old || new)
    is_outside = (torch.exp(logp - old_logp) - 1).abs() > clip
    return {"policy_loss": policy_sum, "value_loss": value_sum, "entropy": entropy_sum,
            "approx_kl": k3.sum(), "clip_fraction": is_outside.sum()}


@torch.no_grad()
def add_to(totals: dict, sums: dict, n_tokens: int):
    """Add a piece's share of the means over a minibatch of n_tokens tokens. The numbers stay
    tensors: `as_floats` says why."""
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + value / n_tokens


def as_floats(statistics: dict) -> dict:
    """Tensors to floats. They are read from the device all at once, because each read from a GPU
    waits until all its queued work is done."""
    if not statistics:
        return {}
    return dict(zip(statistics, torch.stack(list(statistics.values())).tolist()))


def averages(history: list[dict]) -> dict:
    """The mean of each number over the minibatches."""
    result = {}
    for name in history[0]:
        result[name] = sum(numbers[name] for numbers in history) / len(history)
    return result


def log_line(iteration: int, s: dict, seconds: float) -> str:
    """One dense line per iteration. A digit names the step that a group of numbers belongs to; the
    README says which numbers are healthy."""
    truth = f" truth {s['truth']:5.2f}" if "truth" in s else ""
    text = f" ptx {s['ptx_loss']:.3f}" if "ptx_loss" in s else ""  # PPO-ptx only
    return (f"  it {iteration:3d} | 2 len {s['tokens']:4.1f} fin {s['finished']:.2f} | "
            f"3 score {s['score']:6.3f}{truth} | 4 KL {s['kl']:6.3f} (k3 {s['kl_k3']:6.3f}) | "
            f"5 ev {s['explained_variance']:5.2f} | 6 ent {s['entropy']:.2f} "
            f"appKL {s['approx_kl']:.4f} clip {s['clip_fraction']:.3f} vloss {s['value_loss']:.3f} "
            f"grad {s['grad_norm']:.2f} {s['critic_grad_norm']:.2f}{text} | {seconds:.1f} s")
