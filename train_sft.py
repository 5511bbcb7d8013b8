"""InstructGPT's first step: supervised finetuning (SFT) on labelers' demonstrations.

    python train_sft.py --preset instructgpt

Ouyang et al. 2022 ("IG") start where HH distills a prompt: people write the replies that a model
should give, and the model learns to imitate them. Read this file in this order:
  1. Demonstrations   written by scripted labelers, or read from a file
  2. The loss         next-token prediction on the reply's tokens only
  3. Training         stage 2: several epochs, some of which are kept
  4. Selection        stage 4: the kept epoch whose replies the reward model scores best
  5. Commands

Stage 3, the reward model, is in rankings.py. The command writes tokenizer.json, lm.pt and sft.pt.

Legend:  B rows   T tokens in the longest row   n tokens of many rows, packed
"""
import copy
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, autocast, check_finite, load, tokens_at_once, write_atomically)

import torch

import hub
import ranks
import toy
import toy_corpus
import toy_labelers
import train_lm
from data import ASSISTANT, HUMAN, MARKER, MIN_PROMPT, counts_line, in_test, pad, read_jsonl
from evaluate import table
from model import GPT, token_logprobs
from pipeline import Run, RunConfig, main
from ppo import PPOConfig, pm_scores
from rollout import rollout
from toy_labelers import Demonstration
from train_lm import LMConfig, lm_loss, set_lr


@dataclass
class SFTConfig:
    """IG trains two SFT models: a baseline (16 epochs, dropout, chosen by RM score; C.1), and the
    model that PPO starts from (2 epochs, with pretraining text; C.3). Here one serves as both."""
    data: str = ""               # a .jsonl file of {"prompt", "reply"} (toy: none, scripted ones)
    demonstrations: int = 2000   # toy: demonstrations to train on (IG 12,725 prompts)
    test: int = 400              # toy: held-out demonstrations (IG 1,653 prompts)
    epochs: int = 16             # IG §3.5: 16
    batch: int = 32              # demonstrations a step (IG 32; 175B: 8)
    lr: float = 5e-4             # cosine down to a tenth, no warm-up (IG). 0.1 x the LM's (IG: scan)
    dropout: float = 0.2         # of each residual step (IG 0.2)
    pretraining: float = 0.1     # share of the loss that is on pretraining text (IG C.3: 10% mix)
    max_grad_norm: float = 1.0   # gradients are clipped to this norm (not stated in IG)


@dataclass
class SelectConfig:
    by: str = "score"            # pick the best epoch by RM "score" (IG §3.5) or "loss", or the "last"
    max_response: int = 32       # toy: tokens of a sampled reply


# ---- 1. Demonstrations -------------------------------------------------------


def read_demonstrations(path, split: str) -> tuple[list[Demonstration], Counter]:
    """Read a file of {"prompt": text, "reply": text} -> (the demonstrations of a split, "train" or
    "test", and how many were dropped and why). A hash of the prompt decides the split.
    Raises UserError with the line of the first row in another format."""
    found, counts = [], Counter(read=0, kept=0)
    for number, row in read_jsonl(path):
        for field in ("prompt", "reply"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{path}:{number}: no text in the field {field!r}")
        prompt, reply = as_prompt(row["prompt"], f"{path}:{number}"), as_reply(row["reply"])
        counts["read"] += 1
        if not reply.strip():
            counts["empty reply"] += 1
        elif MARKER.search(reply):
            counts["turns in the reply"] += 1  # the model would learn to speak for the human
        else:
            known = {name: str(row.get(name) or "") for name in ("source", "labeler")}
            demonstration = Demonstration(prompt, reply, kind_of(row), **known)
            is_wanted = in_test(demonstration) == (split == "test")
            counts["kept" if is_wanted else "in the other split"] += 1
            if is_wanted:
                found.append(demonstration)
    if not found:
        part = "training" if split == "train" else "held-out"
        raise UserError(f"{path}: no usable {part} demonstration ({counts_line(counts)}); one "
                        "prompt in sixteen is held out, so add more")
    return found, counts


def as_prompt(text: str, place: str) -> str:
    """A prompt in the format of the models. A text without turns is what the human says. Raises
    UserError, which begins with `place`, for a dialogue that does not end with the assistant."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji becomes "?"
    if not MARKER.search(text):
        if not text.strip():
            raise UserError(f"{place}: the prompt is empty")
        return f"{HUMAN} {text.strip()}{ASSISTANT}"
    text = text.rstrip()
    if not (text.startswith((HUMAN, ASSISTANT)) and text.endswith(ASSISTANT)):
        raise UserError(f"{place}: the prompt has turns, so it must begin with {HUMAN!r} and end "
                        f"with {ASSISTANT!r}")
    return text


def as_reply(text: str) -> str:
    """A reply as the models write it, with one leading space."""
    return " " + text.encode("utf-8", "replace").decode().strip()


def kind_of(row: dict) -> str:
    return "harmless" if row.get("kind") == "harmless" else "helpful"


def demonstrations(run: Run, cfg: SFTConfig, split: str) -> list[Demonstration]:
    """The demonstrations of a split, read or written by the toy's labelers."""
    if cfg.data:
        found, counts = read_demonstrations(cfg.data, split)
        print(f"    demonstrations, {split}: {counts_line(counts)}")
        return found
    rng, found = run.rng("demonstrations", split), []
    for _ in range(cfg.demonstrations if split == "train" else cfg.test):
        found.append(toy_labelers.demonstrate(rng, held_out=split == "test"))
    return found


def write_demonstrations(run: Run, found: list[Demonstration], split: str):
    """Write them to demonstrations/<split>.jsonl, from where stages 3 and 4 read them."""
    lines = [json.dumps(asdict(demonstration)) + "\n" for demonstration in found]
    write_atomically(run.path(f"demonstrations/{split}.jsonl"), "".join(lines).encode())


def written_demonstrations(run: Run, split: str) -> list[Demonstration]:
    """What `write_demonstrations` wrote."""
    path, found = run.path(f"demonstrations/{split}.jsonl"), []
    names = {field.name for field in fields(Demonstration)}
    for number, row in read_jsonl(path):
        if set(row) != names:
            raise UserError(f"{path}:{number}: not written by train_sft.py; delete sft.pt to train "
                            "again")
        found.append(Demonstration(**row))
    return found


@dataclass
class Example:
    ids: list[int]  # prompt and reply
    start: int      # index of the reply's first token


def encode(run: Run, found: list[Demonstration]) -> list[Example]:
    """Encode the demonstrations whose reply fits the context; others are dropped and counted. A
    prompt that does not fit loses its beginning, as in data.encode_comparison."""
    examples = []
    for demonstration in found:
        prompt = run.tok.encode_dialogue(demonstration.prompt)
        reply = run.tok.encode_reply(demonstration.reply)
        room = run.context - len(reply)
        if room >= min(len(prompt), MIN_PROMPT):
            prompt = prompt[max(0, len(prompt) - room):]
            examples.append(Example(prompt + reply, len(prompt)))
    n_dropped = len(found) - len(examples)
    if n_dropped:
        print(f"    dropped {n_dropped} of {len(found)} demonstrations: a reply too long for the "
              f"context of {run.context}")
    if not examples:
        raise UserError(f"no demonstration fits a context of {run.context} tokens; try a larger "
                        "--context")
    return examples


# ---- 2. The loss -------------------------------------------------------------


def reply_loss(model: GPT, examples: list[Example], device):
    """Cross-entropy of the replies' tokens, summed; nats. The prompts are read, not learned: they
    are what users write. The end-of-turn token counts, or the model would never stop."""
    ids, lengths = pad([example.ids for example in examples])  # (B, T), (B,)
    starts = torch.tensor([example.start for example in examples])
    ids, lengths, starts = ids.to(device), lengths.to(device), starts.to(device)
    targets = ids[:, 1:]                                       # (B, T - 1)
    position = torch.arange(1, ids.shape[1], device=device)    # (T - 1,) of the targets
    is_reply = (position >= starts[:, None]) & (position < lengths[:, None])  # (B, T - 1)
    with autocast(device):
        hidden = model(ids[:, :-1], is_reply)                  # (n, D): the state at t - 1
        return -token_logprobs(model, hidden, targets[is_reply]).sum()


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
    """Random documents of the language model's corpus, as rows of ids."""

    def __init__(self, run: Run, name: str):
        """name: of the stage that reads them, which seeds the draws."""
        self.run, self.name, self.rows = run, name, []
        if not run.toy:
            texts = train_lm.corpus(run, 10**9, "train", name)
            self.rows, _ = train_lm.encode(run.tok, texts, run.context)

    def draw(self, n: int, step: int) -> list[list[int]]:
        rng = self.run.rng(f"{self.name} pretraining text", step)
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
    train_set, test_set = demonstrations(run, cfg, "train"), demonstrations(run, cfg, "test")
    examples, test_examples = encode(run, train_set), encode(run, test_set)
    text = PretrainingText(run, "sft")
    # One row of text to nine demonstrations, if the share is 10%.
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
    write_demonstrations(run, train_set, "train")
    write_demonstrations(run, test_set, "test")
    print(f"[2] supervised finetuning: {len(examples):,} demonstrations, {cfg.epochs} epochs, "
          f"{len(batches)} steps" + stage.resumed_note())
    for block in model.blocks:
        block.dropout = cfg.dropout
    for step, batch in stage.steps(batches, save_every=50):
        set_lr(optimizer, cosine_to_a_tenth(cfg.lr, step / len(batches)))
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(run.rng("sft dropout", step).getrandbits(62))  # also on resuming
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
    """The learning rate; progress from 0 to 1. No warm-up (IG C.1, C.2)."""
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
    found = written_demonstrations(run, "test")
    examples = encode(run, found)
    stage.start()
    print(f"[4] selection: one of the epochs {', '.join(map(str, models))}, by {cfg.by}")
    columns = {}
    for epoch, model in models.items():
        numbers = {"loss": mean_reply_loss(model, examples, run.device)}
        numbers |= measure(run, cfg, model, pm, found)
        check_finite(f"selection, epoch {epoch}", loss=numbers["loss"], score=numbers["score"])
        columns[f"epoch {epoch}"] = numbers
        stage.log(epoch, **numbers)
    print(table(*columns.values(), names=columns))
    for title, name in (("held-out loss (nats a token)", "loss"), ("RM score (logits)", "score")):
        print(f"    {title:38}" + "".join(f"{c[name]:15.3f}" for c in columns.values()))
    best = list(models)[-1]
    for epoch in models:
        numbers, best_numbers = columns[f"epoch {epoch}"], columns[f"epoch {best}"]
        if cfg.by == "score" and numbers["score"] > best_numbers["score"]:
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
    numbers = {"score": scores.mean().item()}
    if run.toy and found[0].labeler in toy_labelers.LABELERS:  # the toy's own, so it knows them
        replies = [run.tok.decode(response) for response in ro.responses()]
        numbers |= toy.rates([d.prompt for d in found], [d.kind for d in found], replies)
    return numbers


# ---- 5. Commands -------------------------------------------------------------


def check_early(run: Run, sft: SFTConfig, select: SelectConfig):
    """Find out before any training whether stages 2 and 4 can run."""
    if run.cfg.paper != "instructgpt":
        raise UserError("supervised finetuning belongs to --paper instructgpt: add it, or --preset "
                        "instructgpt")
    if run.cfg.export:
        hub.check_export(run.cfg.export)
    if select.by not in ("score", "loss", "last"):
        raise UserError(f"--select.by {select.by}: choose score, loss or last")
    run.check_room("--select.max-response", select.max_response)
    if not run.toy and not sft.data:
        raise UserError("--paper instructgpt needs --sft.data on real data: a .jsonl file of "
                        "demonstrations")
    if sft.data:
        for split in ("train", "test"):
            read_demonstrations(sft.data, split)


def ensure_lm(run: Run, lm: LMConfig):
    """Run stage 1 if its result is missing."""
    if run.reuse("lm", lm):
        run.load_tokenizer()
    else:
        train_lm.train(run, lm)


def command(run: RunConfig, lm: LMConfig, sft: SFTConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, sft=sft)
    check_early(folder, sft, SelectConfig())
    ensure_lm(folder, lm)
    train(folder, sft)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, sft=SFTConfig)
