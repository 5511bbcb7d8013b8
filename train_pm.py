"""Stage 3, preference-model pretraining, and stage 4, the preference model: comparisons, and one epoch over them.

    python train_pm.py                       # the toy world: replies sampled from the initial policy, labelled
    python train_pm.py --data path/to/hh-rlhf

Human comparisons are dear. Preference-model pretraining (PMP; GL §4, HH App. A.2) first teaches the LM to be a
preference model on cheap ones: the toy's forum posts with their upvotes, or any file of comparisons (--pmp.data).

Runs stages 1 and 2 first where their checkpoints are missing. Leaves pmp.pt and pm.pt in the output folder.
"""
import time
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

import toy
from data import (HUMAN, Comparison, UserError, batches_by_length, counts_line, encode_comparison, load_comparisons, pad,
                  write_comparisons)
from model import GPT, autocast, tokens_at_once
from pm import ScalarModel, ranking_loss, report, score_rows
from ppo import check_finite
from rollout import rollout
from run import Metrics, Run, RunConfig, file_hash, load_model, main, restore, save, save_model
from train_lm import CDConfig, LMConfig, ensure as ensure_lm


@dataclass
class PMPConfig:
    pairs: int = 3000           # toy: comparisons by upvotes (0: none); GL far more
    data: str = ""              # real data: comparisons in HH-RLHF's format (without them there is no PMP)
    binarised: bool = False     # tell good from bad instead of ranking A above B (GL §4.1: transfers better; here worse)
    lr: float = 5e-4            # constant (§3.1), one epoch (App. A.2). HH: 0.1 x the LM's rate, and here too
    batch: int = 32             # comparisons a step (not stated in HH)
    warmup: int = 10            # steps (not stated in HH)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in HH)
    token_budget: int = 0       # tokens a forward pass holds (0: model.tokens_at_once); changes memory, not the result


@dataclass
class PMConfig:
    helpful: int = 12000        # toy: comparisons on helpful requests (HH static: 96k), ...
    harmless: int = 6000        # ... and in red-teaming (HH static: 44k)
    test: int = 1000            # toy: held-out comparisons of each kind
    noise: float = 1.0          # toy: temperature of the crowdworkers' choices, above 0 (toy.preference)
    max_response: int = 32      # toy: tokens of a sampled reply
    lr: float = 3e-4            # constant (§3.1), one epoch (App. A.2). HH: 0.01 x the LM's rate; here 0.06 x
    batch: int = 16             # comparisons a step (not stated in HH; IG 64 prompts)
    warmup: int = 10            # steps (not stated in HH)
    harmless_weight: float = 2.0  # lambda of L = L_helpful + lambda L_harmless (§5.1.2; 2 or 3 beat 1 in mean accuracy)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in HH)
    token_budget: int = 0       # tokens a forward pass holds (0: model.tokens_at_once); changes memory, not the result


# ------------------------------------------------------------------------------ comparisons


def collect(run: Run, cfg: PMConfig, policy: GPT, kind: str, split: str, n: int) -> list[Comparison]:
    """Sample two replies to each of n toy prompts and let a crowdworker choose (§2.1).

    Pairs that are the same text, or that hold a reply that didn't finish (it has no text form that says so),
    are dropped and counted."""
    rng = run.rng("comparisons", kind, split)
    prompts = [toy.draw_prompt(rng, kind, held_out=split.startswith("test")) for _ in range(n)]
    twice = [run.tok.encode_dialogue(p) for p in prompts for _ in "ab"]
    uniforms = torch.rand(2 * n, cfg.max_response, generator=run.torch_rng("comparisons", kind, split))
    replies = rollout(policy, twice, uniforms, run.tok.end_of_turn)
    texts = [run.tok.decode(r) for r in replies.responses()]
    done, counts, kept = replies.finished.tolist(), Counter(read=n), []
    for i, prompt in enumerate(prompts):
        a, b = texts[2 * i], texts[2 * i + 1]
        if not (done[2 * i] and done[2 * i + 1]):
            counts["unfinished reply"] += 1
        elif not (a.strip() and b.strip()):
            counts["empty reply"] += 1
        elif a == b:
            counts["identical pair"] += 1
        else:
            kept.append(toy.label(prompt, a, b, kind, rng, cfg.noise))
    counts["kept"] = len(kept)
    print(f"    sampled {kind} {split}: {counts_line(counts)}")
    return kept


def comparisons(run: Run, cfg: PMConfig, split: str) -> list[Comparison]:
    """The comparisons of one split. The toy's are sampled and labelled on first use, and kept as HH-RLHF files."""
    root = run.path("comparisons") if run.toy else run.data
    for kind in ("helpful", "harmless") if run.toy else ():
        path, n = root / f"{kind}-base" / f"{split}.jsonl", getattr(cfg, kind)
        if n and not path.exists():  # with 0 comparisons of one kind, the PM is of the other kind only
            policy = load_model(run.path("initial.pt"), GPT, run.model_config(), run.tok, run.device, (run.path("lm.pt"),))
            write_comparisons(path, collect(run, cfg, policy, kind, split, n if split == "train" else cfg.test))
    found, counts = load_comparisons(root, split, run.subsets)
    for subset, counter in counts.items() if not run.toy else ():
        print(f"    {subset} {split}: {counts_line(counter)}")
    return found


def encode(run: Run, found: list[Comparison]) -> tuple[list[Comparison], list[list[int]], list[list[int]]]:
    """Comparisons that fit the context, and their (chosen, rejected) rows of ids, each with end-of-context."""
    kept, chosen, rejected = [], [], []
    for c in tqdm(found, desc="encode", unit=" pairs", leave=False, delay=2):
        ids = encode_comparison(run.tok, c, run.context)
        if ids is not None:
            prompt, a, b = ids
            kept.append(c)
            chosen.append(prompt + a + [run.tok.end_of_context])
            rejected.append(prompt + b + [run.tok.end_of_context])
    if len(kept) < len(found):
        print(f"    dropped {len(found) - len(kept)} of {len(found)}: a reply longer than the context of {run.context}")
    if not kept:
        raise UserError(f"no comparison fits a context of {run.context} tokens; try a larger --context")
    return kept, chosen, rejected


def binarise(pairs: list[Comparison]) -> list[Comparison]:
    """A better than B, as two questions with a fixed right answer (GL §4.1): is A "GOOD" rather than "BAD", and B "BAD"
    rather than "GOOD"? GL: a model that learned only this has less to unlearn when people rank otherwise. The toy's models
    learn tags instead, and ranking transfers better there (experiments/pmp.py), so it is not the default."""
    return [Comparison(c.prompt, *(f" {name}:{reply}" for name in names), c.kind)
            for c in pairs for reply, names in ((c.chosen, ("GOOD", "BAD")), (c.rejected, ("BAD", "GOOD")))]


# ------------------------------------------------------------------------------ training


def fit(run: Run, stage: str, cfg, pm: ScalarModel, chosen, rejected, weights, state, parents: str):
    """One epoch of the ranking loss over comparisons, given as rows of ids (chosen, rejected) and weights (N,).

    Each is seen once: more overfits (HH App. A.2, IG C.2), and HH reads one epoch as a data-scaling curve (§3.1). The
    optimizer is not stated in HH; betas are IG's."""
    device, order = run.device, torch.randperm(len(chosen), generator=run.torch_rng(f"{stage} batches"))
    batches = order.split(cfg.batch)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = restore(state, pm, optimizer)
    print(f"    {len(chosen):,} comparisons, {len(batches)} steps" + (f", from step {first}" if first else ""))
    metrics = Metrics(run, stage, first)
    bar = tqdm(range(first, len(batches)), desc=f"train {stage}", unit="step", initial=first, total=len(batches), leave=False)
    for step in bar:
        if step % 50 == 0:  # step 0 too: from then on, an older result of this stage is known to be stale
            save(run.path(f"{stage}_state.pt"), stage=stage, parents=parents, step=step,
                 model=pm.state_dict(), optimizer=optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
        optimizer.zero_grad(set_to_none=True)
        loss, accuracy = 0.0, 0.0
        batch = [i for i in batches[step].tolist() if weights[i] > 0]
        if not batch:
            continue
        longest = [max(len(chosen[i]), len(rejected[i])) for i in batch]
        for piece in batches_by_length(longest, tokens_at_once(cfg.token_budget, device) // 2):  # two rows a comparison
            i = [batch[j] for j in piece]
            ids, lengths = (t.to(device) for t in pad([chosen[j] for j in i] + [rejected[j] for j in i]))
            with autocast(device):
                scores = pm.score(ids, lengths)  # (2n,)
            a, b = scores.chunk(2)
            part = ranking_loss(a, b, weights[i].to(device)) * (weights[i].sum() / weights[batch].sum()).item()
            part.backward()
            loss, accuracy = loss + part.item(), accuracy + (a > b).sum().item() / len(batch)
        norm = torch.nn.utils.clip_grad_norm_(pm.parameters(), cfg.max_grad_norm)
        check_finite(f"{stage.upper()} step {step}", loss=loss, gradient=norm.item())
        optimizer.step()
        if step % 10 == 0 or step == len(batches) - 1:
            metrics.write(step, loss=loss, accuracy=accuracy)
    pm.eval()
    return metrics, len(batches)


def from_lm(run: Run) -> ScalarModel:
    """An untrained preference model: the LM with a new head."""
    lm = load_model(run.path("lm.pt"), GPT, run.model_config(), run.tok, run.device)
    torch.manual_seed(run.rng("pm head").getrandbits(62))
    pm = run.prepare(ScalarModel(lm).to(run.device))
    # The LM has never seen the end-of-context token. It stands where the human's next turn would begin, and that
    # is where an LM expects to read what the human thought of the reply: start it as that turn's marker.
    with torch.no_grad():
        embed = pm.trunk.embed.weight
        embed[run.tok.end_of_context] = embed[run.tok.encode(HUMAN)].mean(0)
    return pm


def pmp_data(path: str, split: str):
    """As load_comparisons, but a small file may have no row in the test split."""
    try:
        return load_comparisons(path, split)
    except UserError as error:
        if split == "train":
            raise
        print(f"    not measured on held-out comparisons: {error}")
        return [], {}


def pretrain(run: Run, cfg: PMPConfig):
    """Preference-model pretraining. Leaves pmp.pt, or goes on from pmp_state.pt. Needs lm.pt."""
    parents = (run.path("lm.pt"),)
    if run.done("pmp.pt", "pmp", cfg, parents):
        return
    if run.toy and cfg.data:
        raise UserError("--pmp.data is for real data; the toy world has upvotes of its own")
    state, start, pm = run.begin("pmp", cfg, parents), time.perf_counter(), from_lm(run)
    if not (cfg.pairs if run.toy else cfg.data):
        run.record("pmp", cfg)
        Metrics(run, "pmp", 0)
        print("[3] preference-model pretraining: none, " + ("--pmp.pairs is 0" if run.toy else "no --pmp.data is given"))
    else:
        print(f"[3] preference-model pretraining: {'two answers to a forum post, by their upvotes' if run.toy else cfg.data}")
        found = {}
        for split in ("train", "test"):
            if run.toy:
                rng = run.rng("forum", split)
                n = cfg.pairs if split == "train" else 1000
                found[split] = [toy.upvoted(rng, held_out=split == "test") for _ in range(n)]
            else:
                found[split], counts = pmp_data(cfg.data, split)
                for subset, counter in counts.items():
                    print(f"    {subset} {split}: {counts_line(counter)}")
            if cfg.binarised:
                found[split] = binarise(found[split])
        pairs, chosen, rejected = encode(run, found["train"])
        run.record("pmp", cfg)
        metrics, steps = fit(run, "pmp", cfg, pm, chosen, rejected, torch.ones(len(pairs)), state, file_hash(*parents))
        if found["test"]:
            pairs, chosen, rejected = encode(run, found["test"])
            scores = [score_rows(pm, rows, cfg.token_budget, run.device) for rows in (chosen, rejected)]
            r = report(scores[0] - scores[1], pairs)
            print(f"    held-out: {r}")
            metrics.write(steps, **vars(r))
    save_model(run.path("pmp.pt"), pm, run.tok, parents)
    run.end("pmp")
    print(f"    -> {run.path('pmp.pt')}  ({time.perf_counter() - start:.0f} s)")


def pm_parents(run: Run):
    """What a PM rests on: who wrote the replies, and the weights that its training starts from."""
    return run.path("initial.pt"), run.path("pmp.pt")


def train(run: Run, cfg: PMConfig):
    """Train the PM and leave pm.pt, or go on from pm_state.pt. Needs initial.pt and pmp.pt."""
    if run.done("pm.pt", "pm", cfg, pm_parents(run)):
        return
    if run.toy and not cfg.helpful + cfg.harmless:
        raise UserError("--pm.helpful 0 --pm.harmless 0 leave nothing to train on")
    parents, device, start = pm_parents(run), run.device, time.perf_counter()
    state = run.begin("pm", cfg, parents)
    pm = run.prepare(load_model(run.path("pmp.pt"), ScalarModel, run.model_config(), run.tok, device, (run.path("lm.pt"),)))
    if run.toy:
        run.record("pm", cfg)
        for old in run.path("comparisons").glob("*/*.jsonl") if state is None else ():
            old.unlink()  # of another policy or other options, or not all of them
    print(f"[4] preference model: {'replies of the initial policy, labelled by crowdworkers' if run.toy else run.cfg.data}")
    pairs, chosen, rejected = encode(run, comparisons(run, cfg, "train"))
    test_pairs, test_chosen, test_rejected = encode(run, comparisons(run, cfg, "test"))
    run.record("pm", cfg)
    weights = torch.tensor([cfg.harmless_weight if c.kind == "harmless" else 1.0 for c in pairs])
    metrics, steps = fit(run, "pm", cfg, pm, chosen, rejected, weights, state, file_hash(*parents))

    scores = [score_rows(pm, rows, cfg.token_budget, device) for rows in (test_chosen, test_rejected)]
    margins = scores[0] - scores[1]
    for kind in ("helpful", "harmless", "all"):
        i = [j for j, c in enumerate(test_pairs) if kind in (c.kind, "all")]
        if i:
            r = report(margins[i], [test_pairs[j] for j in i])
            print(f"    held-out {kind:8}: {r}")
            metrics.write(steps, subset=kind, **vars(r))
    pm.mean += torch.cat(scores).mean().to(device)  # App. B.2: scores are comparable once the mean is taken off
    save_model(run.path("pm.pt"), pm, run.tok, parents)
    run.end("pm")
    print(f"    -> {run.path('pm.pt')}  ({time.perf_counter() - start:.0f} s)")


def ensure_pmp(run: Run, lm: LMConfig, cd: CDConfig, pmp: PMPConfig):
    ensure_lm(run, lm, cd)
    if not run.reuse("pmp.pt", "pmp", pmp):
        pretrain(run, pmp)


def ensure(run: Run, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, cfg: PMConfig):
    """What stage 5 calls: run the stages whose checkpoints are missing, and say so."""
    ensure_pmp(run, lm, cd, pmp)
    if not run.reuse("pm.pt", "pm", cfg):
        train(run, cfg)


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig):
    run = Run(run, exports=False)
    if run.toy:
        run.check_room("--pm.max-response", pm.max_response)
    ensure_pmp(run, lm, cd, pmp)
    train(run, pm)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig, pmp=PMPConfig, pm=PMConfig)
