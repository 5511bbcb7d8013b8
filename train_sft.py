"""InstructGPT's first step: supervised finetuning (SFT) on labelers' demonstrations.

    python train_sft.py --preset instructgpt

Ouyang et al. 2022 ("IG") start where HH distills a prompt: people write the replies that a model
should give, and the model learns to imitate them. Stage 1, the language model, stands for GPT-3.
IG's step 1 (Fig. 2) is stages 2 and 4 here, step 2 is stage 3, step 3 is stage 5: an epoch of SFT
can only be selected once there is a reward model. Read this file in this order:
  1. Demonstrations   written by scripted labelers, or read from a file
  2. The loss         next-token prediction on the reply's tokens only
  3. Training         stage 2: several epochs, some of which are kept
  4. Selection        stage 4: the kept epoch whose replies the reward model scores best
  5. Commands

Stage 3, the reward model, is in rankings.py. The command writes tokenizer.json, lm.pt and sft.pt.

Legend:  B rows   T tokens in the longest row   n tokens of many rows, packed   D width
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, autocast, check_finite, load, tokens_at_once)

import torch

import demonstrations
import hub
import ranks
import toy
import toy_corpus
import toy_labelers
import train_lm
from data import counts_line, pad
from demonstrations import Demonstration, Example, read_demonstrations
from evaluate import table
from model import GPT, token_logprobs
from pipeline import Run, RunConfig, main
from ppo import PPOConfig, pm_scores
from rollout import rollout
from train_lm import LMConfig, lm_loss, set_lr


@dataclass
class SFTConfig:
    """IG trains two SFT models: a baseline (16 epochs, dropout, chosen by RM score; C.1), and the
    model that PPO starts from (2 epochs, with pretraining text; C.3). Here one serves as both."""
    data: str = ""               # a .jsonl file of {"prompt", "reply"} (toy: none, scripted ones)
    demonstrations: int = 2000   # toy: demonstrations to train on (IG 12,725, Table 9)
    test: int = 400              # toy: held-out demonstrations (IG 1,653, Table 9)
    epochs: int = 16             # IG §3.5: 16
    batch: int = 32              # demonstrations a step (IG 32; 175B: 8)
    lr: float = 5e-4             # cosine to a tenth, no warm-up (IG). 0.1 x the LM's (IG: search)
    dropout: float = 0.2         # of each residual step (IG 0.2)
    pretraining: float = 0.1     # share of the loss that is on pretraining text (IG C.3: 10% mix)
    max_grad_norm: float = 1.0   # gradients are clipped to this norm (not stated in IG)


@dataclass
class SelectConfig:
    by: str = "score"            # the best epoch by RM "score" (IG §3.5) or "loss", or the "last"
    max_response: int = 32       # tokens of a sampled reply


# ---- 1. Demonstrations -------------------------------------------------------


def drawn_or_read(run: Run, cfg: SFTConfig, split: str) -> list[Demonstration]:
    """The demonstrations of a split: of a file, or by the toy's labelers."""
    if cfg.data:
        found, counts = read_demonstrations(cfg.data, split)
        print(f"    demonstrations, {split}: {counts_line(counts)}")
        return found
    rng, found = run.rng("demonstrations", split), []
    for _ in range(cfg.demonstrations if split == "train" else cfg.test):
        found.append(toy_labelers.demonstrate(rng, held_out=split == "test"))
    return found


def written(run: Run, split: str) -> Path:
    """The file that stage 2 writes its demonstrations to; stages 3 and 4 read it."""
    return run.path(f"demonstrations/{split}.jsonl")


# ---- 2. The loss -------------------------------------------------------------


def reply_states(model: GPT, examples: list[Example], device):
    """The states before the n tokens of the replies, these tokens, and which example each is from:
    (n, D), (n,), (n,). The end-of-turn token counts, or the model would never stop."""
    ids, lengths = pad([example.ids for example in examples])  # (B, T), (B,)
    starts = torch.tensor([example.start for example in examples])
    ids, lengths, starts = ids.to(device), lengths.to(device), starts.to(device)
    targets = ids[:, 1:]                                       # (B, T - 1)
    position = torch.arange(1, ids.shape[1], device=device)    # (T - 1,) of the targets
    is_reply = (position >= starts[:, None]) & (position < lengths[:, None])  # (B, T - 1)
    hidden = model(ids[:, :-1], is_reply)                      # (n, D): the state at t - 1
    return hidden, targets[is_reply], is_reply.nonzero()[:, 0]


def reply_loss(model: GPT, examples: list[Example], device):
    """Cross-entropy of the replies' tokens, summed; nats. The prompts are read, not learned: they
    are what users write."""
    with autocast(device):
        hidden, targets, _ = reply_states(model, examples, device)
        return -token_logprobs(model, hidden, targets).sum()


def n_reply_tokens(examples: list[Example]) -> int:
    return sum(len(example.ids) - example.start for example in examples)


def pieces(examples: list[Example], device):
    """Yield this rank's examples in batches that fit one forward pass."""
    lengths = [len(example.ids) for example in examples]
    for piece in ranks.own_batches(lengths, tokens_at_once(0, device)):
        yield [examples[i] for i in piece]


@torch.no_grad()
def mean_reply_loss(model: GPT, examples: list[Example], device) -> float:
    """Nats a token of the replies."""
    total = 0.0
    for piece in pieces(examples, device):
        total += reply_loss(model, piece, device).item()
    return sum(ranks.gather(total)) / n_reply_tokens(examples)


# ---- 3. Training -------------------------------------------------------------


class PretrainingText:
    """Random documents of the corpus that the language model reads here, as rows of ids. (Weights
    that --init names have read another one; what only they know is not in it.)"""

    def __init__(self, run: Run, name: str):
        """name: of the stage that reads them, which seeds the draws."""
        self.run, self.name, self.rows = run, name, []
        if not run.toy:
            texts = train_lm.corpus(run, 10**9, "train", name)
            self.rows, _ = train_lm.encode(run.tok, texts, run.context)

    def draw(self, n: int, *when: int) -> list[list[int]]:
        """n rows. The numbers `when`, such as that of the step, seed the choice."""
        rng = self.run.rng(f"{self.name} pretraining text", *when)
        if self.run.toy:  # the toy's corpus has no end
            texts = [toy_corpus.document(rng) for _ in range(n)]
            return train_lm.encode(self.run.tok, texts, self.run.context)[0]
        return rng.choices(self.rows, k=n)


class Kept(dict):
    """{epoch: the weights after it}, with the two methods that a stage asks of its parts."""

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, saved: dict):
        self.update(saved)


def is_kept(epoch: int, epochs: int) -> bool:
    """Whether the weights after this epoch, counted from 1, are kept: 1, 2, 4, 8, ..., the last.
    (IG C.1 tuned the number of epochs by geometric search.)"""
    return epoch & (epoch - 1) == 0 or epoch == epochs


def train(run: Run, cfg: SFTConfig):
    """Finetune the LM on demonstrations. Reads lm.pt, writes sft.pt."""
    stage = run.begin("sft", cfg, data=[cfg.data] if cfg.data else [])
    if stage is None:
        return
    device, model = run.device, run.prepare(run.load_model("lm.pt"))
    train_set, test_set = drawn_or_read(run, cfg, "train"), drawn_or_read(run, cfg, "test")
    examples = demonstrations.encode(run.tok, train_set, run.context)
    test_examples = demonstrations.encode(run.tok, test_set, run.context)
    text = PretrainingText(run, "sft")
    # About one row of text to nine demonstrations, rounded up, if the share is 10%.
    n_texts = math.ceil(cfg.batch * cfg.pretraining / (1 - cfg.pretraining))
    batches = []
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(examples), generator=run.torch_rng("sft batches", epoch))
        batches += order.split(cfg.batch)
    n_per_epoch = len(batches) // cfg.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)  # betas: IG C
    kept = Kept()
    stage.start(model=model, optimizer=optimizer, kept=kept)
    demonstrations.write(written(run, "train"), train_set)
    demonstrations.write(written(run, "test"), test_set)
    print(f"[2] supervised finetuning: {len(examples):,} demonstrations, {cfg.epochs} epochs, "
          f"{len(batches)} steps" + stage.resumed_note())
    for block in model.blocks:
        block.dropout = cfg.dropout
    for step, batch in stage.steps(batches, save_every=50):
        set_lr(optimizer, cosine_to_a_tenth(cfg.lr, step / len(batches)))
        optimizer.zero_grad(set_to_none=True)
        # The same on resuming, and another one on each rank, which has other rows.
        torch.manual_seed(run.rng("sft dropout", step).getrandbits(62) + ranks.rank())
        model.train()
        loss = add_gradients(model, [examples[i] for i in batch.tolist()], 1 - cfg.pretraining,
                             device)
        if n_texts:
            add_text_gradients(model, text.draw(n_texts, step), cfg.pretraining, device)
        model.eval()
        ranks.add_up_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        check_finite(f"SFT step {step}", loss=loss, gradient=norm.item())
        optimizer.step()
        stage.log(step, every=10, loss=loss)
        if (step + 1) % n_per_epoch == 0:
            epoch = (step + 1) // n_per_epoch
            test_loss = mean_reply_loss(model, test_examples, device)
            check_finite(f"SFT after epoch {epoch}", test_loss=test_loss)
            stage.log(step, epoch=epoch, test_loss=test_loss)
            if is_kept(epoch, cfg.epochs):
                kept[epoch] = {name: x.cpu().clone() for name, x in model.state_dict().items()}
    stage.end(**run.checkpoint(model), epochs=dict(kept))


def cosine_to_a_tenth(peak: float, progress: float) -> float:
    """The learning rate; progress from 0 to 1 (IG C.1 to C.3). No warm-up (C.1)."""
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def add_gradients(model: GPT, examples: list[Example], weight: float, device) -> float:
    """Add the gradient of weight x the mean loss of the replies' tokens. Returns that mean."""
    n_tokens, loss = n_reply_tokens(examples), 0.0
    for piece in pieces(examples, device):
        mean = reply_loss(model, piece, device) / n_tokens
        (weight * mean).backward()
        loss += mean.item()
    return sum(ranks.gather(loss))


def add_text_gradients(model: GPT, rows: list[list[int]], weight: float, device):
    """Add the gradient of weight x the mean loss of the tokens of pretraining text. Returns this
    rank's share of that mean, (). PPO-ptx uses it, too (IG Eq. 2)."""
    n_tokens, loss = train_lm.n_targets(rows), torch.zeros((), device=device)
    for piece in train_lm.row_batches(rows, device):
        mean = lm_loss(model, piece, device) / n_tokens
        (weight * mean).backward()
        loss += mean.detach()
    return loss


# ---- 4. Selection ------------------------------------------------------------


def load_epochs(run: Run) -> dict[int, GPT]:
    """The models of sft.pt, {epoch: model}, frozen."""
    last, models = run.load_model("sft.pt"), {}
    for epoch, weights in load(run.path("sft.pt"))["epochs"].items():
        models[epoch] = copy.deepcopy(last)
        models[epoch].load_state_dict(weights)
    return models


def select(run: Run, cfg: SelectConfig):
    """Turn one of the kept epochs into the initial policy. Reads sft.pt and pm.pt, writes
    initial.pt.

    Each epoch's model replies to the prompts of the held-out demonstrations, and the reward model
    scores the replies. IG §3.5: the held-out loss rises after one epoch, but the RM score and
    people's ratings go on improving, so the score decides."""
    stage = run.begin("select", cfg)
    if stage is None:
        return
    models, pm = load_epochs(run), run.load_model("pm.pt")
    found = demonstrations.read_written(written(run, "test"))
    examples = demonstrations.encode(run.tok, found, run.context)
    stage.start()
    print(f"[4] selection: one of the epochs {', '.join(map(str, models))}, by {cfg.by}")
    columns = {}
    for epoch, model in models.items():
        numbers = {"loss": mean_reply_loss(model, examples, run.device)}
        numbers |= measure(run, cfg, model, pm, found)
        check_finite(f"selection, epoch {epoch}", loss=numbers["loss"], score=numbers["rm_score"])
        columns[f"epoch {epoch}"] = numbers
        stage.log(epoch, **numbers)
    print(table(*columns.values(), names=columns))
    titles = {"loss": "held-out loss (nats a token)", "rm_score": "RM score (logits)"}
    for name, title in titles.items():
        print(f"    {title:38}" + "".join(f"{c[name]:15.3f}" for c in columns.values()))
    best = list(models)[-1]
    for epoch in models:
        numbers, best_numbers = columns[f"epoch {epoch}"], columns[f"epoch {best}"]
        if cfg.by == "score" and numbers["rm_score"] > best_numbers["rm_score"]:
            best = epoch
        if cfg.by == "loss" and numbers["loss"] < best_numbers["loss"]:
            best = epoch
    print(f"    the initial policy is that of epoch {best}")
    stage.end(**run.checkpoint(models[best]), epoch=best)


def measure(run: Run, cfg: SelectConfig, model: GPT, pm, found: list[Demonstration]) -> dict:
    """The mean RM score of one reply to each demonstration's prompt and, in the toy, what the
    ground truth says of the replies. Each model draws by the same random numbers."""
    room = run.context - cfg.max_response - 1
    prompts = [run.tok.encode_dialogue(demonstration.prompt)[-room:] for demonstration in found]
    uniforms = torch.rand(len(found), cfg.max_response, generator=run.torch_rng("selection"))
    ro = rollout(model, prompts, uniforms, run.tok.end_of_turn)
    scores = pm_scores(pm, ro, run.tok.end_of_context, PPOConfig())
    numbers = {"rm_score": scores.mean().item()}
    if run.toy and found[0].labeler in toy_labelers.LABELERS:  # the toy's own, so it knows them
        replies = [run.tok.decode(response) for response in ro.responses()]
        numbers |= toy.rates([d.prompt for d in found], [d.kind for d in found], replies)
    return numbers


# ---- 5. Commands -------------------------------------------------------------


def check_early(run: Run, sft: SFTConfig, select: SelectConfig):
    """Find out before any training whether stages 2 and 4 can run."""
    if run.cfg.export:
        hub.check_export(run.cfg.export)
    if run.device.type == "mps" and run.cfg.recompute and sft.dropout > 0:
        # Recomputing restores the random numbers of a CPU and of CUDA only.
        raise UserError("--recompute with dropout gives wrong gradients on mps: leave it out, or "
                        "set --sft.dropout 0")
    if select.by not in ("score", "loss", "last"):
        raise UserError(f"--select.by {select.by}: choose score, loss or last")
    for name in ("dropout", "pretraining"):
        if getattr(sft, name) == 1:
            raise UserError(f"--sft.{name} 1 leaves nothing to learn from")
    if not run.toy and not sft.data:
        raise UserError("--paper instructgpt needs --sft.data on real data: a .jsonl file of "
                        "demonstrations")
    if sft.data:
        for split in ("train", "test"):
            read_demonstrations(sft.data, split)


def command(run: RunConfig, lm: LMConfig, sft: SFTConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, sft=sft)
    check_early(folder, sft, SelectConfig())
    train_lm.ensure_pretrained(folder, lm)
    train(folder, sft)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, sft=SFTConfig)
