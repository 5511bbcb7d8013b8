"""InstructGPT's second step: labelers rank K replies to a prompt; a reward model learns from that.

    python rankings.py --preset instructgpt

In IG's Fig. 2 this is step 2; here it is stage 3 (train_sft.py says how the two count).
Ouyang et al. 2022 ("IG") show a labeler K = 4 to 9 replies at once, which gives K (K - 1) / 2 pairs
for one reading of the prompt. The reward model (RM) is the preference model of pm.py, and the loss
of a pair is its ranking loss. Read this file in this order:
  1. Rankings   sampled from the SFT models and ranked, or read from a file
  2. Elements   encoded rankings: all pairs of one prompt are one element of a batch
  3. Training   one epoch, each reply read once a step
  4. RM         stage 3: train, measure on held-out rankings, set the bias
  5. Commands

The command first runs stages 1 and 2 if their results are missing, and then stage 4
(train_sft.select), which needs the RM. It writes pm.pt and initial.pt.

Legend:  B elements   K replies to one prompt   N rows of ids
"""
import math
from collections import Counter
from dataclasses import asdict, dataclass

from run import UserError, check_finite, tokens_at_once, write_jsonl  # before torch

import torch

import demonstrations
import ranks
import toy
import toy_labelers
import train_sft
from data import MARKER, Comparison, counts_line, cut_prompt, in_test, read_jsonl
from demonstrations import as_prompt, as_reply, kind_of
from model import GPT
from pipeline import Run, RunConfig, main
from pm import ScalarModel, ranking_loss, report, score_branches, score_rows, shared_length
from record import of_pm
from rollout import rollout
from train_lm import LMConfig, ensure_pretrained, set_lr
from train_pm import check_comparisons, check_toy_prompts, from_lm
from train_sft import SelectConfig, SFTConfig, cosine_to_a_tenth


@dataclass
class RMConfig:
    data: str = ""              # a .jsonl file of {"prompt", "replies", "ranks"} (toy: none)
    prompts: int = 4000         # toy: prompts whose replies are ranked (IG 33,207, Table 9)
    test: int = 300             # toy: held-out prompts (IG 17,887, Table 9)
    least: int = 4              # toy: fewest replies to a prompt (IG §3.5: K = 4)
    most: int = 9               # toy: most replies to a prompt (IG §3.5: K = 9)
    noise: float = 1.0          # toy: temperature of the labelers' choices (toy_labelers.rank)
    max_response: int = 32      # toy: tokens of a sampled reply
    lr: float = 5e-4            # cosine down to a tenth (IG), one epoch. 0.1 x the LM's
    batch: int = 16             # prompts a step (IG 64)
    shuffled: bool = False      # each pair is an element of its own (IG §3.5: it overfits)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in IG)
    token_budget: int = 0       # tokens a forward pass holds; memory and speed (0 picks a default)


# ---- 1. Rankings -------------------------------------------------------------


@dataclass
class Ranking:
    prompt: str                             # ends in "\n\nAssistant:"
    replies: list[str]                      # K of them, with their leading spaces, all different
    ranks: list[int]                        # (K,) 1 for the best; equal ranks are ties
    kind: str = "helpful"                   # "helpful" or "harmless" (red-teaming)
    utilities: list[float] | None = None    # (K,) in logits; known in the toy world


def sample(run: Run, cfg: RMConfig, split: str, n: int) -> list[Ranking]:
    """Sample K replies to each of n toy prompts and let a labeler rank them.

    IG ranks the outputs of several models. Here the kept epochs of stage 2 answer in turn, one for
    all the replies to a prompt. So the RM has seen each of them before it judges them."""
    models, counts, found = list(train_sft.load_epochs(run).values()), Counter(read=0, kept=0), []
    for number, model in enumerate(models):
        rng, prompts, kinds, ks = run.rng("rankings", split, number), [], [], []
        for _ in range(number, n, len(models)):
            prompt, kind, _ = toy_labelers.draw_prompt(rng, held_out=split == "test")
            prompts.append(prompt)
            kinds.append(kind)
            ks.append(rng.randint(cfg.least, cfg.most))
        if not prompts:  # fewer prompts than models
            continue
        generator = run.torch_rng("rankings", split, number)
        said = replies_to(run, model, prompts, ks, cfg.max_response, generator)
        for prompt, kind, texts in zip(prompts, kinds, said):
            replies = [texts[k] for k in different(texts, counts)]
            if replies:
                utilities = [toy.truth(prompt, reply, kind) / cfg.noise for reply in replies]
                places = toy_labelers.rank(prompt, replies, kind, rng, cfg.noise)
                found.append(Ranking(prompt, replies, places, kind, utilities))
    print(f"    replies to {n:,} {split} prompts: {counts_line(counts)}")
    if not found:
        raise UserError(f"none of {n:,} prompts has two replies that can be compared "
                        f"({counts_line(counts)}): give the model more --sft.epochs, or longer "
                        "replies (--rm.max-response)")
    return found


def replies_to(run: Run, model: GPT, prompts: list[str], ks: list[int], max_response: int,
               generator: torch.Generator) -> list[list[str]]:
    """k replies to each prompt. Unfinished ones are "", because as text they would look finished
    (collect.compare)."""
    ids, said = [], []
    for prompt, k in zip(prompts, ks):
        ids += [run.tok.encode_dialogue(prompt)] * k
    ro = rollout(model, ids, torch.rand(len(ids), max_response, generator=generator),
                 run.tok.end_of_turn)
    texts = []
    for response, is_finished in zip(ro.responses(), ro.finished.tolist()):
        texts.append(run.tok.decode(response) if is_finished else "")
    first = 0
    for k in ks:
        said.append(texts[first:first + k])
        first += k
    return said


def different(replies: list[str], counts: Counter) -> list[int]:
    """The indices of the replies to one prompt that can be compared. Others are counted."""
    kept = []
    for k, reply in enumerate(replies):
        counts["read"] += 1
        if not reply.strip():
            counts["empty or unfinished reply"] += 1
        elif MARKER.search(reply):
            counts["turns in the reply"] += 1
        elif reply in replies[:k]:
            counts["repeated reply"] += 1
        else:
            kept.append(k)
    if len(kept) < 2:
        counts["nothing to compare with"] += len(kept)
        return []
    counts["kept"] += len(kept)
    return kept


def read_rankings(path, as_is: bool = False) -> tuple[list[Ranking], Counter]:
    """Read a file of {"prompt": text, "replies": [text, ...], "ranks": [1, ...]} -> (rankings, how
    many replies were read, kept and dropped, and why). as_is: leave the replies as they are, for
    `sample` wrote them. Raises UserError with the line of the first row in another format or with
    ranks that contradict each other."""
    found, counts = [], Counter(read=0, kept=0)
    for number, row in read_jsonl(path):
        place, replies, places = f"{path}:{number}", row.get("replies"), row.get("ranks")
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{place}: no text in the field 'prompt'")
        if not isinstance(replies, list) or not all(isinstance(text, str) for text in replies):
            raise UserError(f"{place}: 'replies' is not a list of texts")
        if not isinstance(places, list) or not all(type(rank) is int for rank in places):
            raise UserError(f"{place}: 'ranks' is not a list of whole numbers")
        if len(replies) != len(places):
            raise UserError(f"{place}: {len(replies)} replies, but {len(places)} ranks")
        prompt = as_prompt(row["prompt"], place)
        if not as_is:
            replies = [as_reply(text) for text in replies]
        rank_of = {}
        for reply, rank in zip(replies, places):
            if rank_of.setdefault(reply, rank) != rank:
                raise UserError(f"{place}: one reply has both ranks {rank_of[reply]} and {rank}")
        kept = different(replies, counts)
        utilities = row.get("utilities")  # written by `sample`
        if utilities is not None and not is_numbers(utilities, len(places)):
            raise UserError(f"{place}: 'utilities' is not a list of {len(places)} numbers")
        if kept:
            found.append(Ranking(prompt, [replies[k] for k in kept], [places[k] for k in kept],
                                 kind_of(row), [utilities[k] for k in kept] if utilities else None))
    return found, counts


def is_numbers(x, n: int) -> bool:
    """Whether x is a list of n finite numbers."""
    if not isinstance(x, list) or len(x) != n:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in x)


def rankings(run: Run, cfg: RMConfig, split: str) -> list[Ranking]:
    """The rankings of one split, "train" or "test": read, or sampled and written to the folder."""
    if cfg.data:
        found, counts = read_rankings(cfg.data)
        in_split = of_split(found, split, cfg.data)
        print(f"    replies of {cfg.data}: {counts_line(counts)}; {len(in_split):,} of "
              f"{len(found):,} rankings are {split} rankings")
        return in_split
    path = run.path(f"rankings/{split}.jsonl")
    if not path.exists():
        found = sample(run, cfg, split, cfg.prompts if split == "train" else cfg.test)
        write_jsonl(path, [asdict(ranking) for ranking in found])
    ranks.wait()  # until the file is there
    return read_rankings(path, as_is=True)[0]


def of_split(found: list[Ranking], split: str, path: str) -> list[Ranking]:
    """A file's rankings of one split. Raises UserError if there is none."""
    in_split = [ranking for ranking in found if in_test(ranking) == (split == "test")]
    if not in_split:
        raise UserError(f"{path}: none of its {len(found):,} usable rankings is a {split} "
                        "ranking; one prompt in sixteen is held out, so add more")
    return in_split


# ---- 2. Elements -------------------------------------------------------------


@dataclass
class Element:
    """What the loss is averaged over: IG's "single batch element"."""
    rows: list[list[int]]         # prompt + reply + end-of-context, one row for each reply
    pairs: list[tuple[int, int]]  # (better, worse): indices of rows
    ranking: Ranking              # that it comes from; pair (i, j) is about its replies i and j


def encode(run: Run, found: list[Ranking]) -> list[Element]:
    """All the pairs of each ranking. Ties are left out (IG C.2) and counted, as are the rankings
    with a reply that does not fit the context."""
    elements, n_ties, n_long = [], 0, 0
    for ranking in found:
        replies = [run.tok.encode_reply(reply) for reply in ranking.replies]
        room = run.context - 1 - max(len(reply) for reply in replies)
        prompt = cut_prompt(run.tok.encode_dialogue(ranking.prompt), room)
        if prompt is None:
            n_long += 1
            continue
        rows = [prompt + reply + [run.tok.end_of_context] for reply in replies]
        pairs, K = [], len(rows)
        for i in range(K):
            for j in range(K):
                if ranking.ranks[i] < ranking.ranks[j]:
                    pairs.append((i, j))
        n_ties += K * (K - 1) // 2 - len(pairs)
        if pairs:
            elements.append(Element(rows, pairs, ranking))
    n_pairs = sum(len(element.pairs) for element in elements)
    print(f"    {len(elements):,} rankings, {n_pairs:,} pairs; left out: {n_ties:,} ties and "
          f"{n_long:,} rankings with a reply too long for the context of {run.context}")
    if not elements:
        raise UserError("no ranking is left to learn from; use rankings without ties, or a larger "
                        "--context")
    return elements


def one_by_one(elements: list[Element]) -> list[Element]:
    """Each pair as an element of its own. Then each of K replies is in K - 1 elements, and a single
    epoch reads it K - 1 times: IG §3.5 saw the RM overfit."""
    alone = []
    for element in elements:
        for better, worse in element.pairs:
            rows = [element.rows[better], element.rows[worse]]
            alone.append(Element(rows, [(0, 1)], element.ranking))
    return alone


def length(element: Element) -> int:
    """Tokens of the row that holds the prompt once and all the replies (pm.score_branches)."""
    shared = shared_length(element.rows)
    return shared + sum(len(row) - shared for row in element.rows)


# ---- 3. Training -------------------------------------------------------------


def element_losses(pm: ScalarModel, elements: list[Element], device):
    """(B,) the mean ranking loss of each element's pairs (IG Eq. 1), differentiable."""
    scores = score_branches(pm, [element.rows for element in elements], device)  # (B, largest K)
    losses = []
    for of_replies, element in zip(scores, elements):
        better, worse = torch.tensor(element.pairs, device=device).unbind(1)     # (pairs,) each
        losses.append(ranking_loss(of_replies[better], of_replies[worse]).mean())
    return torch.stack(losses)


def fit(run: Run, stage, cfg: RMConfig, pm: ScalarModel, elements: list[Element]):
    """Train for one epoch. IG C.2: several epochs overfit quickly."""
    batch_size = cfg.batch
    if cfg.shuffled:  # as many pairs a step as with all pairs of a prompt in one element
        alone = one_by_one(elements)
        batch_size = max(1, round(cfg.batch * len(alone) / len(elements)))
        elements = alone
    order = torch.randperm(len(elements), generator=run.torch_rng("rm batches"))
    batches = order.split(batch_size)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)  # betas: IG C
    stage.start(pm=pm, optimizer=optimizer)
    print(f"    {len(elements):,} elements, {len(batches)} steps" + stage.resumed_note())
    for step, batch in stage.steps(batches, save_every=50):
        set_lr(optimizer, cosine_to_a_tenth(cfg.lr, step / len(batches)))
        optimizer.zero_grad(set_to_none=True)
        in_batch, loss = [elements[i] for i in batch.tolist()], 0.0
        lengths = [length(element) for element in in_batch]
        for piece in ranks.own_batches(lengths, tokens_at_once(cfg.token_budget, run.device)):
            losses = element_losses(pm, [in_batch[i] for i in piece], run.device)
            partial = losses.sum() / len(in_batch)
            partial.backward()
            loss += partial.item()
        ranks.add_up_gradients(pm)
        loss = sum(ranks.gather(loss))
        norm = torch.nn.utils.clip_grad_norm_(pm.parameters(), cfg.max_grad_norm)
        check_finite(f"RM step {step}", loss=loss, gradient=norm.item())
        optimizer.step()
        stage.log(step, every=10, loss=loss)
    pm.eval()


# ---- 4. RM -------------------------------------------------------------------


def train(run: Run, cfg: RMConfig):
    """Train the RM. Reads sft.pt, writes pm.pt."""
    stage = run.begin("rm", cfg, data=[cfg.data] if cfg.data else [])
    if stage is None:
        return
    # IG §3.5: the SFT model with a new head. (C.2: the final RM came from a GPT-3 finetuned on
    # public NLP data; starting from GPT-3 or from the SFT model gave similar results.)
    pm = from_lm(run, "sft.pt")
    if not cfg.data:
        stage.record()  # before the replies are sampled: from here on the old RM is stale
        if stage.state is None:
            for split in ("train", "test"):
                run.path(f"rankings/{split}.jsonl").unlink(missing_ok=True)
    print(f"[3] reward model: rankings {'of ' + cfg.data if cfg.data else 'by labelers'}")
    elements = encode(run, rankings(run, cfg, "train"))
    test_elements = encode(run, rankings(run, cfg, "test"))
    fit(run, stage, cfg, pm, elements)
    measure(run, cfg, stage, pm, test_elements)
    # The bias: the labelers' demonstrations score 0 on average (IG §3.5).
    examples = demonstrations.encode(
        run.tok, demonstrations.read_written(train_sft.written(run, "train")), run.context)
    rows = [example.ids[-(run.context - 1):] + [run.tok.end_of_context] for example in examples]
    mean = score_rows(pm, rows, cfg.token_budget, run.device).mean()
    check_finite("RM after its last step", score=mean.item())
    pm.mean += mean.to(run.device)
    stage.end(**run.checkpoint(pm))


def measure(run: Run, cfg: RMConfig, stage, pm: ScalarModel, elements: list[Element]):
    """Report the RM's accuracy on all pairs of the held-out rankings, reading each reply once. The
    pairs of one prompt resemble each other, so the printed intervals are too narrow."""
    rows = [row for element in elements for row in element.rows]
    scores, first = score_rows(pm, rows, cfg.token_budget, run.device), 0  # (N,)
    margins, pairs = [], []
    for element in elements:
        for i, j in element.pairs:
            margins.append(scores[first + i] - scores[first + j])
            pairs.append(as_comparison(element.ranking, i, j))
        first += len(element.rows)
    margins = torch.stack(margins)
    for kind in ("helpful", "harmless", "all"):
        chosen = [n for n, pair in enumerate(pairs) if kind in ("all", pair.kind)]
        if chosen:
            result = report(margins[chosen], [pairs[n] for n in chosen])
            print(f"    held-out {kind:8}: {result}")
            stage.log(stage.n_steps, subset=kind, **vars(result))
    stage.log_record(stage.n_steps, **of_pm(pairs, margins))


def as_comparison(ranking: Ranking, i: int, j: int) -> Comparison:
    """The pair in which reply i was ranked above reply j."""
    p = None
    if ranking.utilities:
        p = 1 / (1 + math.exp(min(ranking.utilities[j] - ranking.utilities[i], 700.0)))
    return Comparison(ranking.prompt, ranking.replies[i], ranking.replies[j], ranking.kind, p)


# ---- 5. Commands -------------------------------------------------------------


def check_early(run: Run, sft: SFTConfig, rm: RMConfig, select: SelectConfig,
                rl_max_response: int = 0):
    """Find out before any training whether stages 2 to 4 can run; with rl_max_response, 5 too."""
    train_sft.check_early(run, sft, select)
    if not 2 <= rm.least <= rm.most:
        raise UserError(f"--rm.least {rm.least} --rm.most {rm.most}: a labeler ranks at least 2 "
                        "replies, and --rm.most is not below --rm.least")
    lengths = {"--select.max-response": select.max_response, "--rm.max-response": rm.max_response}
    if rl_max_response:
        lengths["--rl.max-response"] = rl_max_response
    for option, max_response in lengths.items():
        run.check_room(option, max_response)
    if run.toy:
        run.checks.append(lambda: check_toy_prompts(run, lengths))
    elif rl_max_response:
        run.checks.append(lambda: check_comparisons(run, run.data, ["train", "test"], run.subsets))
    if rm.data:
        found, _ = read_rankings(rm.data)
        for split in ("train", "test"):
            of_split(found, split, rm.data)
    elif not run.toy:
        raise UserError("--paper instructgpt needs --rm.data on real data: a .jsonl file of "
                        "rankings")


def ensure(run: Run, lm: LMConfig, sft: SFTConfig, rm: RMConfig, select: SelectConfig):
    """Run stages 1 to 4 if their results are missing. Stage 5 calls this."""
    ensure_pretrained(run, lm)
    if not run.reuse("sft", sft):
        train_sft.train(run, sft)
    if not run.reuse("rm", rm):
        train(run, rm)
    if not run.reuse("select", select):
        train_sft.select(run, select)


def command(run: RunConfig, lm: LMConfig, sft: SFTConfig, rm: RMConfig, select: SelectConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, sft=sft, rm=rm)
    check_early(folder, sft, rm, select)
    ensure_pretrained(folder, lm)
    if not folder.reuse("sft", sft):
        train_sft.train(folder, sft)
    train(folder, rm)
    train_sft.select(folder, select)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, sft=SFTConfig, rm=RMConfig,
         select=SelectConfig)
