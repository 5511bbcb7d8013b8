"""Stage 3, preference-model pretraining, and stage 4, the preference model.

    python train_pm.py                       # the toy world
    python train_pm.py --data path/to/hh-rlhf
    python train_pm.py --out out/toy-0 --comparisons choices.jsonl  # adds people's (chat.py)

Stage 3. Human comparisons are expensive. Preference-model pretraining (PMP; GL §4, HH App. A.2)
   first teaches the LM to be a preference model on cheap ones: the toy's forum posts with their
   upvotes, or any file of comparisons (--pmp.data).
Stage 4. The preference model (PM) then reads human comparisons once (HH App. A.2). In the toy world
   two replies are sampled from the initial policy, and a simulated crowdworker chooses between
   them.

The command first runs stages 1 and 2 if their results are missing. It writes pmp.pt and pm.pt to
the output folder. Read this file in this order:
  1. Comparisons   sampled and labeled, or read; encoded as rows of ids
  2. Training      one epoch of the ranking loss, shared by both stages
  3. PMP           stage 3
  4. PM            stage 4
  5. Commands

Legend:  N comparisons   n some of them, with the indices i (n,)   T longest row
Papers: HH = Bai et al. 2022 (arXiv 2204.05862), and every § or App. without a name is in HH;
        GL = Askell et al. 2021 (arXiv 2112.00861), IG = Ouyang et al. 2022 (arXiv 2203.02155).
"""
from collections import Counter
from dataclasses import dataclass, field
from typing import Sequence

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, autocast, check_finite, progress, tokens_at_once)

import torch

import ranks
import toy_corpus
from choices import check_people, people_comparisons
from collect import collect
from data import (HUMAN, Comparison, counts_line, encode_comparison, load_comparisons, pad,
                  write_comparisons)
from pipeline import Run, RunConfig, data_files, main
from pm import ScalarModel, ranking_loss, report, score_branches, score_rows, shared_length
from record import of_pm
from train_lm import (CDConfig, LMConfig, check_early as check_lm_early, ensure as ensure_lm,
                      set_lr)


@dataclass
class PMPConfig:
    pairs: int = 3000           # toy: comparisons by upvotes (0: none; GL has far more)
    data: str = ""              # real data: a file like HH-RLHF's (without one there is no PMP)
    binarized: bool = False     # GL §4.1's good-or-bad form, not ranking (worse here, see LOG.md)
    lr: float = 5e-4            # 0.1 x the LM's, one epoch (App. A.2); constant (HH: not stated)
    batch: int = 32             # comparisons a step (not stated in HH)
    warmup: int = 10            # steps (not stated in HH)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in HH)
    token_budget: int = 0       # tokens a forward pass holds; memory and speed (0 picks a default)


@dataclass
class PMConfig:
    comparisons: int = 0        # real data: at most this many of each split (0: all of them)
    helpful: int = 12000        # toy: comparisons on helpful prompts (HH static: 96k)
    harmless: int = 6000        # toy: comparisons on red-team prompts (HH static: 44k)
    test: int = 1000            # toy: held-out comparisons of each kind
    people: list = field(default_factory=list)  # files of people's choices, added to the others
    turns: int = 4              # toy: at most so many exchanges a conversation (§2.3: about four)
    noise: float = 1.0          # toy: temperature of the crowdworkers' choices (toy.preference)
    max_response: int = 32      # toy: tokens of a sampled reply
    lr: float = 3e-4            # constant (§3.1), one epoch (App. A.2). 0.06 x the LM's (HH 0.01 x)
    batch: int = 16             # comparisons a step (not stated in HH; IG 64 prompts)
    warmup: int = 10            # steps (not stated in HH)
    harmless_weight: float = 2.0  # lambda in L_helpful + lambda L_harmless (HH 1; others: Fig. 27)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in HH)
    token_budget: int = 0       # tokens a forward pass holds; memory and speed (0 picks a default)


# ---- 1. Comparisons ----------------------------------------------------------


def sample_missing(run: Run, cfg: PMConfig, split: str):
    """Write the toy's comparisons of one split in HH-RLHF's format, unless the files exist."""
    for kind, n_train in (("helpful", cfg.helpful), ("harmless", cfg.harmless)):
        path = run.path("comparisons") / f"{kind}-base" / f"{split}.jsonl"
        if n_train == 0 or path.exists():  # 0 of one kind: the PM learns the other kind only
            continue
        n = n_train if split == "train" else cfg.test
        policy = run.load_model("initial.pt")
        write_comparisons(path, collect(run, cfg, policy, kind, split, n))
    ranks.wait()  # until the files are there


def comparisons(run: Run, cfg: PMConfig, split: str,
                is_collected: bool = False) -> list[Comparison]:
    """The comparisons of one split, "train" or "test"; people's choices are not among them.
    is_collected: whether the toy's comparisons are all there, and none is to be sampled."""
    if run.toy and cfg.helpful + cfg.harmless == 0:
        return []  # people's choices alone
    if run.toy:
        if not is_collected:
            sample_missing(run, cfg, split)
        return load_comparisons(run.path("comparisons"), split)[0]
    found, counts = load_comparisons(run.data, split, run.subsets)
    print_counts(counts, split)
    if cfg.comparisons and len(found) > cfg.comparisons:
        print(f"    {len(found) - cfg.comparisons:,} of {len(found):,} {split} comparisons left "
              "out by --pm.comparisons")
        found = run.rng("comparisons", split).sample(found, cfg.comparisons)
    return found


def print_counts(counts: dict[str, Counter], split: str):
    for subset, counter in counts.items():
        print(f"    {subset} {split}: {counts_line(counter)}")


@dataclass
class EncodedPairs:
    """Encoded comparisons. chosen[j] and rejected[j] are prompt + reply + end-of-context."""
    comparisons: list[Comparison]
    chosen: list[list[int]]
    rejected: list[list[int]]


def encode(run: Run, found: list[Comparison]) -> EncodedPairs:
    """Encode the comparisons that fit the context. Raises UserError if `found` is not empty and
    none of its comparisons fits."""
    pairs = EncodedPairs([], [], [])
    end = [run.tok.end_of_context]
    for comparison in progress(found, "encode", "pairs"):
        encoded = encode_comparison(run.tok, comparison, run.context)
        if encoded is not None:
            prompt, chosen, rejected = encoded
            pairs.comparisons.append(comparison)
            pairs.chosen.append(prompt + chosen + end)
            pairs.rejected.append(prompt + rejected + end)
    n_dropped = len(found) - len(pairs.comparisons)
    if n_dropped:
        print(f"    dropped {n_dropped} of {len(found)}: a reply too long for the context of "
              f"{run.context}")
    if found and not pairs.comparisons:
        raise UserError(f"no comparison fits a context of {run.context} tokens; try a larger "
                        "--context")
    return pairs


def binarize(found: list[Comparison]) -> list[Comparison]:
    """Turn "A is better than B" into two questions with a fixed right answer (GL §4.1): is A "GOOD"
    rather than "BAD", and is B "BAD" rather than "GOOD"? GL: a model that learned only this has
    less to unlearn when people rank otherwise. The toy's models learn the tags instead, and ranking
    transfers better there (experiments/pmp.py), so this is not the default."""
    binary = []
    for c in found:
        binary.append(Comparison(c.prompt, f" GOOD:{c.chosen}", f" BAD:{c.chosen}", c.kind))
        binary.append(Comparison(c.prompt, f" BAD:{c.rejected}", f" GOOD:{c.rejected}", c.kind))
    return binary


# ---- 2. Training -------------------------------------------------------------


def fit(run: Run, stage, cfg, pm: ScalarModel, pairs: EncodedPairs, weights):
    """Train for one epoch on the ranking loss, with a weight for each comparison, (N,).

    A second epoch would overfit (HH App. A.2, IG C.2). With one epoch the learning curve is also a
    data-scaling curve (§3.1). HH does not state the optimizer; the betas are IG's."""
    order = torch.randperm(len(pairs.chosen), generator=run.torch_rng(f"{stage.name} batches"))
    order = order[weights[order] > 0]  # a weight of 0 leaves a comparison out
    batches = order.split(cfg.batch)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    stage.start(pm=pm, optimizer=optimizer)
    print(f"    {len(order):,} comparisons, {len(batches)} steps" + stage.resumed_note())
    for step, batch in stage.steps(batches, save_every=50):
        set_lr(optimizer, cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1)))
        optimizer.zero_grad(set_to_none=True)
        loss, hits = 0.0, 0
        for i in index_batches(pairs, batch, cfg.token_budget, run.device):
            rows = [[pairs.chosen[j], pairs.rejected[j]] for j in i.tolist()]
            chosen, rejected = score_branches(pm, rows, run.device).unbind(1)  # (n,), (n,)
            losses = weights[i].to(run.device) * ranking_loss(chosen, rejected)
            # The divisor is the batch's total weight, so a pair in a batch with many red-team pairs
            # counts a little less.
            partial = losses.sum() / weights[batch].sum().item()
            partial.backward()
            loss += partial.item()
            hits += (chosen > rejected).sum().item()
        ranks.add_up_gradients(pm)
        loss, hits = sum(ranks.gather(loss)), sum(ranks.gather(hits))
        norm = torch.nn.utils.clip_grad_norm_(pm.parameters(), cfg.max_grad_norm)
        check_finite(f"{stage.name.upper()} step {step}", loss=loss, gradient=norm.item())
        optimizer.step()
        stage.log(step, every=10, loss=loss, accuracy=hits / len(batch))
    pm.eval()
    # Each step's loss checks the update before it, and this score checks the last one.
    ids, lengths = pad(pairs.chosen[:1])
    with torch.no_grad(), autocast(run.device):
        score = pm.score(ids.to(run.device), lengths.to(run.device)).item()
    check_finite(f"{stage.name.upper()} after its last step", score=score)


def index_batches(pairs: EncodedPairs, batch, token_budget: int, device):
    """Split a batch's indices into parts that fit one forward pass. A comparison is read as one
    row, see pm.score_branches."""
    lengths = []
    for i in batch.tolist():
        chosen, rejected = pairs.chosen[i], pairs.rejected[i]
        lengths.append(len(chosen) + len(rejected) - shared_length([chosen, rejected]))
    for part in ranks.own_batches(lengths, tokens_at_once(token_budget, device)):
        yield batch[part]


def from_lm(run: Run, name: str = "lm.pt") -> ScalarModel:
    """An untrained preference model: a language model of the run with a new head."""
    lm = run.load_model(name)
    torch.manual_seed(run.rng("pm head").getrandbits(62))
    pm = run.prepare(ScalarModel(lm).to(run.device))
    # The LM has never seen the end-of-context token. It stands where the next human turn would
    # begin, and there the LM already predicts what the human will say of the reply. Its embedding
    # starts as that of the turn's marker (the mean, where the marker is several tokens).
    with torch.no_grad():
        embed = pm.trunk.embed.weight
        embed[run.tok.end_of_context] = embed[run.tok.encode(HUMAN)].mean(0)
    return pm


# ---- 3. PMP ------------------------------------------------------------------


def pretrain(run: Run, cfg: PMPConfig):
    """Preference-model pretraining. Reads lm.pt, writes pmp.pt."""
    stage = run.begin("pmp", cfg, data=data_files(cfg.data) if cfg.data else [])
    if stage is None:
        return
    pm = from_lm(run)
    is_skipped = cfg.pairs == 0 if run.toy else cfg.data == ""
    if is_skipped:
        stage.start()
        reason = "--pmp.pairs is 0" if run.toy else "no --pmp.data is given"
        print(f"[3] preference-model pretraining: skipped; {reason}")
        stage.end(**run.checkpoint(pm))
        return
    source = "two answers to a forum post, by their upvotes" if run.toy else cfg.data
    print(f"[3] preference-model pretraining: {source}")
    train_set, test_set = cheap_comparisons(run, cfg, "train"), cheap_comparisons(run, cfg, "test")
    pairs = encode(run, train_set)
    fit(run, stage, cfg, pm, pairs, torch.ones(len(pairs.chosen)))
    if test_set:
        test_pairs = encode(run, test_set)
        result = report(margins(run, cfg, pm, test_pairs), test_pairs.comparisons)
        print(f"    held-out: {result}")
        stage.log(stage.n_steps, **vars(result))
    stage.end(**run.checkpoint(pm))


def cheap_comparisons(run: Run, cfg: PMPConfig, split: str) -> list[Comparison]:
    """Comparisons made without crowdworkers; [] if those of the test split cannot be loaded."""
    if run.toy:
        rng = run.rng("forum", split)
        n = cfg.pairs if split == "train" else 1000
        found = [toy_corpus.upvoted(rng, held_out=split == "test") for _ in range(n)]
    else:
        try:
            found, counts = load_comparisons(cfg.data, split)
        except UserError as error:
            if split == "train":
                raise
            print(f"    not measured on held-out comparisons: {error}")
            return []
        print_counts(counts, split)
    return binarize(found) if cfg.binarized else found


def margins(run: Run, cfg, pm: ScalarModel, pairs: EncodedPairs):
    """(N,) score of the chosen reply minus that of the rejected one."""
    chosen = score_rows(pm, pairs.chosen, cfg.token_budget, run.device)
    return chosen - score_rows(pm, pairs.rejected, cfg.token_budget, run.device)


# ---- 4. PM -------------------------------------------------------------------


def train(run: Run, cfg: PMConfig, is_collected: bool = False, data: Sequence[str] = ()):
    """Train the PM. Reads initial.pt and pmp.pt, writes pm.pt. is_collected: see `comparisons`.
    data: files, besides people's choices, from which the comparisons come."""
    stage = run.begin("pm", cfg, data=[*cfg.people, *data])
    if stage is None:
        return
    pm = run.prepare(run.load_model("pmp.pt"))
    if run.toy and not is_collected:
        stage.record()  # before the comparisons are sampled: from here on the old PM is stale
        if stage.state is None:
            delete_comparisons(run)
    source = "replies of the initial policy, labeled by crowdworkers" if run.toy else run.cfg.data
    if is_collected:
        source = "the comparisons of all rounds so far"
    print(f"[4] preference model: {source}")
    people_train, people_test = people_comparisons(cfg.people)
    pairs = encode(run, comparisons(run, cfg, "train", is_collected) + people_train)
    test_pairs = encode(run, comparisons(run, cfg, "test", is_collected))
    people_pairs = encode(run, people_test)
    fit(run, stage, cfg, pm, pairs, weights_of(pairs, cfg.harmless_weight))

    scores = measure(run, cfg, stage, pm, test_pairs, "")
    people_scores = measure(run, cfg, stage, pm, people_pairs, "people ")
    if len(scores) == 0:  # people's choices alone
        scores, test_pairs = people_scores, people_pairs
    chosen, rejected = scores.chunk(2)
    stage.log_record(stage.n_steps, **of_pm(test_pairs.comparisons, chosen - rejected))
    # App. B.2: subtract the mean on held-out replies, so that different PMs' scores are comparable.
    pm.mean += scores.mean().to(run.device)
    stage.end(**run.checkpoint(pm))


def weights_of(pairs: EncodedPairs, harmless_weight: float):
    """What each pair counts in the loss, (N,): lambda if it is a red-team pair (§5.1.2), else 1."""
    weights = torch.ones(len(pairs.chosen))
    for j, comparison in enumerate(pairs.comparisons):
        if comparison.kind == "harmless":
            weights[j] = harmless_weight
    if not weights.any():
        raise UserError("--pm.harmless-weight 0 leaves nothing to train on: all comparisons are "
                        "red-team comparisons")
    return weights


def measure(run: Run, cfg: PMConfig, stage, pm: ScalarModel, pairs: EncodedPairs, source: str):
    """Report the PM's accuracy on held-out comparisons -> the scores of their replies, (2 N,)."""
    chosen = score_rows(pm, pairs.chosen, cfg.token_budget, run.device)      # (N,)
    rejected = score_rows(pm, pairs.rejected, cfg.token_budget, run.device)  # (N,)
    for kind in ("helpful", "harmless", "all"):
        rows = [j for j, c in enumerate(pairs.comparisons) if kind in ("all", c.kind)]
        if rows:
            result = report((chosen - rejected)[rows], [pairs.comparisons[j] for j in rows])
            print(f"    held-out {source + kind:8}: {result}")
            stage.log(stage.n_steps, subset=source + kind, **vars(result))
    return torch.cat([chosen, rejected])


def delete_comparisons(run: Run):
    """Delete all sampled comparisons: they may come from another policy or other options."""
    for path in run.path("comparisons").glob("*/*.jsonl"):
        path.unlink(missing_ok=True)  # another rank may have been faster


# ---- 5. Commands -------------------------------------------------------------


def check_early(run: Run, cd: CDConfig, pmp: PMPConfig, pm: PMConfig, rl_max_response: int = 0):
    """Find out before any training whether stages 2 to 4 can run, as far as options and data tell;
    with rl_max_response, stage 5 too. Every command that trains a preference model calls this."""
    check_lm_early(run, cd)
    check_people(pm.people, alone=run.toy and pm.helpful + pm.harmless == 0)
    lengths = {}  # option -> tokens that a response may have
    if run.toy:
        lengths["--pm.max-response"] = pm.max_response
    if rl_max_response:
        lengths["--rl.max-response"] = rl_max_response
    for option, max_response in lengths.items():
        run.check_room(option, max_response)
    if run.toy:
        if pmp.data:
            raise UserError("--pmp.data is for real data; the toy world has upvotes of its own")
        if pm.helpful + pm.harmless == 0 and not pm.people:
            raise UserError("--pm.helpful 0 --pm.harmless 0 leave nothing to train on")
        if pm.helpful == 0 and pm.harmless_weight == 0 and not pm.people:
            raise UserError("--pm.helpful 0 --pm.harmless-weight 0 leave nothing to train on")
        run.checks.append(lambda: check_toy_prompts(run, lengths))
    else:
        if pmp.data:
            run.checks.append(lambda: check_comparisons(run, pmp.data, ["train"], None))
        run.checks.append(lambda: check_comparisons(run, run.data, ["train", "test"], run.subsets))


def check_toy_prompts(run: Run, lengths: dict[str, int]):
    """Raise UserError if a prompt and a response of full length do not fit the context. A tokenizer
    that learned few merges needs many tokens for a text. lengths: {option: longest response}."""
    rng = run.rng("check prompts")
    longest = 0
    for i in range(1000):
        kind = "harmless" if i % 3 == 0 else "helpful"
        prompt = toy_corpus.draw_prompt(rng, kind, held_out=False)
        longest = max(longest, len(run.tok.encode_dialogue(prompt)))
    for option, max_response in lengths.items():
        if longest + max_response >= run.context:  # the PM appends one more token
            raise UserError(f"a prompt of {longest} tokens and {option} {max_response} do not fit "
                            f"a --context of {run.context}: use a longer one, or a larger "
                            "--lm.vocab, which makes prompts shorter")


def check_comparisons(run: Run, data, splits: list[str], subsets: list[str] | None):
    """Raise UserError if a split of real data has no comparison that fits the context."""
    for split in splits:
        found, _ = load_comparisons(data, split, subsets)
        if not any(encode_comparison(run.tok, comparison, run.context) for comparison in found):
            raise UserError(f"no {split} comparison of {data} fits a context of {run.context} "
                            "tokens; try a larger --context")


def ensure_pmp(run: Run, lm: LMConfig, cd: CDConfig, pmp: PMPConfig):
    """Run stages 1 to 3 if their results are missing."""
    ensure_lm(run, lm, cd)
    if not run.reuse("pmp", pmp):
        pretrain(run, pmp)


def ensure(run: Run, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig):
    """Run stages 1 to 4 if their results are missing. Stage 5 calls this."""
    ensure_pmp(run, lm, cd, pmp)
    if not run.reuse("pm", pm):
        train(run, pm)


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, cd, pmp, pm)
    check_early(folder, cd, pmp, pm)
    ensure_pmp(folder, lm, cd, pmp)
    train(folder, pm)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig,
         pmp=PMPConfig, pm=PMConfig)
