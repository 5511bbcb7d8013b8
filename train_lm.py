"""Stage 1, language-model pretraining, and stage 2, context distillation.

    python train_lm.py                       # the toy world
    python train_lm.py --data path/to/hh-rlhf

Stage 1. Pretraining, from random weights, is next-token prediction on the toy world's documents or
   the dialogues of real comparisons. HH starts from models pretrained on 400B tokens (GL).
Stage 2. A prompt that describes a helpful, honest and harmless assistant changes what an LM says.
   Context distillation (GL §2.1; HH App. A.1) finetunes the LM to answer without the prompt as it
   would with it. The result is the initial policy: comparisons are sampled from it, RLHF starts
   from it, and RLHF's KL penalty keeps the policy close to it.

The command writes tokenizer.json, lm.pt and initial.pt. Read this file in this order:
  1. Text          documents, the tokenizer, rows of ids and their batches
  2. Pretraining   stage 1
  3. Distillation  stage 2
  4. Commands

Legend:  B rows   T tokens in a row   P tokens of the prompt   D width   V vocabulary
         n tokens of many rows, packed
Papers: HH = Bai et al. 2022 (arXiv 2204.05862), GL = Askell et al. 2021 (arXiv 2112.00861).
"""
import copy
import math
from dataclasses import dataclass

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, autocast, check_finite, logits_at_once, progress, tokens_at_once)

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import hub
import ranks
import toy
import toy_corpus
from data import (MIN_PROMPT, Tokenizer, batches_by_length, counts_line, gpt2_tokenizer,
                  load_comparisons, pad, train_bpe)
from evaluate import table
from model import GPT, token_logprobs
from pipeline import Run, RunConfig, main
from rollout import rollout


@dataclass
class LMConfig:
    """HH App. A.2 refers to GL App. A for its settings. The defaults were tuned on the toy."""
    documents: int = 100_000   # documents, each seen once; for real data an upper limit
    vocab: int = 1024          # tokens of a BPE trained on the corpus (GPT-2's encoding has 50257)
    lr: float = 5e-3           # peak; half a cosine down to 0, times a linear warm-up
    warmup: int = 50           # steps
    step_tokens: int = 1280    # tokens in a step, at most, padding included
    weight_decay: float = 0.01  # on matrices only
    max_grad_norm: float = 1.0  # gradients are clipped to this norm


@dataclass
class CDConfig:
    documents: int = 3000      # documents, each seen once (HH 350M tokens; 0: no distillation)
    batch: int = 32            # sequences per step (HH 32)
    lr: float = 5e-4           # linear decay to 0 (HH from 0.05 x the pretraining rate; here 0.1 x)
    top: int = 50              # how many of the teacher's likeliest tokens are kept (HH 50)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (not stated in HH)


# ---- 1. Text -----------------------------------------------------------------


def corpus(run: Run, n: int, split: str, stage: str) -> list[str]:
    """At most n documents of a split, "train" or "test", in a random order of the stage's own."""
    rng = run.rng("corpus" if stage == "lm" else f"{stage} corpus", split)
    if run.toy:
        # The prompt that is distilled describes the assistant, so these documents have no headers.
        headers = stage == "lm"
        texts = []
        for _ in progress(range(n), "write corpus", "docs"):
            texts.append(toy_corpus.document(rng, headers=headers))
        return texts
    comparisons, counts = load_comparisons(run.data, split, run.subsets)
    if stage == "lm":
        for subset, counter in counts.items():
            print(f"    {subset} {split}: {counts_line(counter)}")
    rng.shuffle(comparisons)  # so that a cut takes some of each subset
    if len(comparisons) > n and split == "train":
        print(f"    {len(comparisons) - n:,} of {len(comparisons):,} dialogues left out by "
              f"--{stage}.documents")
    # One side is text enough. Taking the chosen one teaches the LM a little of what is preferred.
    return [c.prompt + c.chosen for c in comparisons[:n]]


def encode(tok: Tokenizer, texts: list[str], longest: int) -> tuple[list[list[int]], int]:
    """Rows of ids, cut to `longest` tokens, and how many were cut. A row of one token predicts
    nothing and is left out."""
    rows, n_cut = [], 0
    for text in progress(texts, "encode", "docs"):
        ids = tok.encode_dialogue(text)
        if len(ids) > longest:
            n_cut += 1
        if len(ids) > 1:
            rows.append(ids[:longest])
    return rows, n_cut


def make_tokenizer(run: Run, cfg: LMConfig, texts: list[str]) -> Tokenizer:
    """The tokenizer that --tokenizer asks for."""
    if run.tokenizer_name() == "gpt2":
        return gpt2_tokenizer()
    if cfg.vocab < 300:
        raise UserError(f"--lm.vocab {cfg.vocab} is too small for 256 bytes, 2 special tokens and "
                        "some merges: at least 300")
    return train_bpe(texts[:20_000], cfg.vocab)


def n_targets(rows: list[list[int]]) -> int:
    """Tokens that are predicted: all but each row's first."""
    return sum(len(row) - 1 for row in rows)


def row_batches(rows: list[list[int]], device, read_before: int = 0):
    """Yield the rows in batches that fit one forward pass; rows of similar length share a batch.
    `read_before` counts the tokens that the teacher reads before each row."""
    lengths = [read_before + len(row) for row in rows]
    for piece in ranks.own_batches(lengths, tokens_at_once(0, device)):
        yield [rows[i] for i in piece]


# ---- 2. Pretraining ----------------------------------------------------------


def lm_loss(model: GPT, rows: list[list[int]], device):
    """Next-token cross-entropy, summed over the tokens of the rows; nats."""
    ids, lengths = pad(rows)
    ids, lengths = ids.to(device), lengths.to(device)  # (B, T), (B,)
    targets = ids[:, 1:]                               # (B, T - 1)
    is_real = torch.arange(1, ids.shape[1], device=device) < lengths[:, None]  # (B, T - 1)
    with autocast(device):
        hidden = model(ids[:, :-1])  # (B, T - 1, D): the state at t - 1 predicts token t
        logp = token_logprobs(model, hidden[is_real], targets[is_real])  # (n,)
    return -logp.sum()


def train(run: Run, cfg: LMConfig):
    """Train the LM. Writes tokenizer.json and lm.pt."""
    stage = run.begin("lm", cfg)
    if stage is None:
        return
    if run.cfg.init:
        use_pretrained(run, stage)
        return
    device = run.device
    texts = corpus(run, cfg.documents, "train", "lm")
    test_texts = corpus(run, min(cfg.documents, 500), "test", "lm")
    if stage.state is not None:  # the saved weights belong to the saved tokenizer
        run.load_tokenizer()
    else:
        run.use_tokenizer(make_tokenizer(run, cfg, texts))
    rows, n_cut = encode(run.tok, texts, run.context)
    test_rows, _ = encode(run.tok, test_texts, run.context)
    lengths = [len(row) for row in rows]
    batches = batches_by_length(lengths, cfg.step_tokens, run.torch_rng("lm batches"))
    torch.manual_seed(run.rng("lm weights").getrandbits(62))
    model = run.prepare(GPT(run.model_config()).to(device))
    optimizer = make_optimizer(model, cfg)
    stage.start(model=model, optimizer=optimizer)
    run.tok.save(run.path("tokenizer.json"))
    print(f"[1] language model: {model.cfg.n_params():,} parameters, {len(rows):,} documents, "
          f"{sum(lengths):,} tokens{cut_note(n_cut, run.context)}, {len(batches)} steps"
          + stage.resumed_note())
    for step, batch in stage.steps(batches, save_every=200):
        warmup = min(1.0, (step + 1) / max(cfg.warmup, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * (step / len(batches))))
        set_lr(optimizer, cfg.lr * warmup * cosine)
        optimizer.zero_grad(set_to_none=True)
        batch_rows = [rows[i] for i in batch]
        n_tokens = n_targets(batch_rows)
        loss = 0.0
        for piece in row_batches(batch_rows, device):
            partial = lm_loss(model, piece, device) / n_tokens
            partial.backward()
            loss += partial.item()
        ranks.add_up_gradients(model)
        loss = sum(ranks.gather(loss))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        check_finite(f"LM step {step}", loss=loss, gradient=norm.item())
        optimizer.step()
        stage.log(step, every=50, loss=loss)

    model.eval()
    test_loss = mean_loss(model, test_rows, device)
    check_finite("LM after its last step", test_loss=test_loss)
    stage.log(len(batches), test_loss=test_loss)
    print(f"    test loss {test_loss:.3f} nats a token")
    stage.end(**run.checkpoint(model))


def make_optimizer(model: GPT, cfg: LMConfig) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def mean_loss(model: GPT, rows: list[list[int]], device) -> float:
    """Mean cross-entropy in nats a token."""
    total = 0.0
    for piece in row_batches(rows, device):
        total += lm_loss(model, piece, device).item()
    return sum(ranks.gather(total)) / n_targets(rows)


def use_pretrained(run: Run, stage):
    """Stage 1 with --init: keep GPT-2's weights as they are. Like HH (§1.3), the HH stages use no
    demonstrations."""
    path = ranks.first_alone(hub.gpt2_weights, run.cfg.init)
    tok = gpt2_tokenizer()
    model = hub.load_gpt2(path, tok.n_vocab, run.context)
    run.shape = model.cfg
    run.use_tokenizer(tok)
    stage.start()
    run.tok.save(run.path("tokenizer.json"))
    print(f"[1] language model: {model.cfg.n_params():,} parameters from {path}")
    stage.end(**run.checkpoint(model))


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


def cut_note(n_cut: int, longest: int) -> str:
    return f", {n_cut} cut to {longest} tokens" if n_cut else ""


# ---- 3. Distillation ---------------------------------------------------------

# What the teacher reads before real dialogues. GL's prompt is 14 made-up conversations, some 4,600
# words. Ours must fit a short context. Like GL's, it shows no refusal of a harmful request.
HHH_PROMPT = (
    "Below are conversations between people and an assistant. The assistant tries to be helpful, "
    "polite and honest. It says what it knows, admits what it does not know, and asks when a "
    "question is unclear. It never helps anyone to hurt others."
    "\n\nHuman: My sourdough comes out flat every time. What could be wrong?"
    "\n\nAssistant: Most often the starter is not active enough, or the dough has not risen long "
    "enough. Does your starter double within six hours of being fed? If it does not, feed it daily "
    "for a week before the next loaf."
    "\n\nHuman: It does double. The kitchen is rather cold, though."
    "\n\nAssistant: Then I would give the dough more time. At 18 degrees it can need ten hours or "
    "more. Go by its size instead of the clock: shape it once it has grown by half and shakes like "
    "jelly.")


def top_kl(student: GPT, hidden, teacher: GPT, teacher_hidden, top: int, max_logits: int = 0):
    """D_KL(teacher || student) in nats a token, on the teacher's `top` likeliest tokens and one
    outcome for all the others (App. A.1). hidden, teacher_hidden (n, D) -> (n,), differentiable in
    the student. It works in chunks of at most `max_logits` logits (0: run.logits_at_once). The
    backward pass recomputes the student's logits; see model.token_logprobs."""
    top = min(top, student.cfg.vocab_size - 1)  # at least one token is left for "all the others"

    def merge_rest(logp, likeliest):
        """(n, V), (n, top) -> (n, top + 1) log-probs of the likeliest tokens and of all others."""
        # Not log(1 - sum of the likeliest): that loses all digits where the rest is small.
        rest = logp.scatter(1, likeliest, float("-inf")).logsumexp(1, keepdim=True)
        return torch.cat((logp.gather(1, likeliest), rest), 1)

    def divergence(hidden_chunk, likeliest, teacher_logp):
        student_logp = F.log_softmax(student.logits(hidden_chunk), -1)  # (n, V)
        student_logp = merge_rest(student_logp, likeliest)              # (n, top + 1)
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(1)

    chunk = max(1, logits_at_once(max_logits, hidden.device) // student.cfg.vocab_size)
    parts = []
    for hidden_chunk, teacher_chunk in zip(hidden.split(chunk), teacher_hidden.split(chunk)):
        with torch.no_grad():  # outside `checkpoint`, so the backward pass does not repeat it
            teacher_logp = F.log_softmax(teacher.logits(teacher_chunk), -1)
            likeliest = teacher_logp.topk(top, -1).indices
            teacher_logp = merge_rest(teacher_logp, likeliest)
        parts.append(checkpoint(divergence, hidden_chunk, likeliest, teacher_logp,
                                use_reentrant=False))
    return torch.cat(parts)


def distillation_loss(student: GPT, teacher: GPT, prompt: list[int], rows, top: int, device):
    """KL between teacher and student, summed over the tokens of the rows; nats. The teacher reads
    the prompt before each row, the student reads the row alone.

    In HH half of the text is pretraining data in a human turn, and half is StackExchange as a
    question and its answer; here every document follows the prompt directly. HH's teacher is its
    52B model for students of all sizes; here it is the student's own LM."""
    ids, lengths = pad(rows)
    ids, lengths = ids.to(device), lengths.to(device)  # (B, T), (B,)
    is_real = torch.arange(1, ids.shape[1], device=device) < lengths[:, None]  # (B, T - 1)
    row, column = is_real.nonzero(as_tuple=True)                               # (n,) each
    P = len(prompt)
    prompts = torch.tensor(prompt, device=device).expand(len(rows), P)         # (B, P)
    with autocast(device):
        with torch.no_grad():
            # A row's position t is the teacher's P + t.
            teacher_ids = torch.cat((prompts, ids[:, :-1]), 1)                 # (B, P + T - 1)
            teacher_hidden = teacher(teacher_ids, (row, P + column))           # (n, D)
        hidden = student(ids[:, :-1], (row, column))                           # (n, D)
        return top_kl(student, hidden, teacher, teacher_hidden, top).sum()


def distill(run: Run, cfg: CDConfig):
    """Turn the LM into the initial policy. Reads lm.pt, writes initial.pt."""
    stage = run.begin("cd", cfg)
    if stage is None:
        return
    device, teacher = run.device, run.load_model("lm.pt")
    if cfg.documents == 0:
        stage.start()
        print("[2] context distillation: skipped; the initial policy is the LM itself")
        stage.end(**run.checkpoint(teacher))
        return
    prompt = distilled_prompt(run)
    room = run.context - len(prompt)
    rows, n_cut = encode(run.tok, corpus(run, cfg.documents, "train", "cd"), room)
    test_rows, _ = encode(run.tok, corpus(run, min(cfg.documents, 500), "test", "cd"), room)
    order = torch.randperm(len(rows), generator=run.torch_rng("cd batches"))
    batches = order.split(cfg.batch)
    student = run.prepare(copy.deepcopy(teacher))
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    stage.start(student=student, optimizer=optimizer)
    print(f"[2] context distillation: {len(rows):,} documents{cut_note(n_cut, room)}, a prompt of "
          f"{len(prompt)} tokens, {len(batches)} steps" + stage.resumed_note())
    for step, batch in stage.steps(batches, save_every=50):
        set_lr(optimizer, cfg.lr * (1 - step / len(batches)))
        optimizer.zero_grad(set_to_none=True)
        batch_rows = [rows[i] for i in batch.tolist()]
        n_tokens = n_targets(batch_rows)
        kl = 0.0
        for piece in row_batches(batch_rows, device, read_before=len(prompt)):
            loss = distillation_loss(student, teacher, prompt, piece, cfg.top, device) / n_tokens
            loss.backward()
            kl += loss.item()
        ranks.add_up_gradients(student)
        kl = sum(ranks.gather(kl))
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm)
        check_finite(f"distillation step {step}", loss=kl, gradient=norm.item())
        optimizer.step()
        stage.log(step, every=10, kl=kl)

    student.eval()
    stage.log(len(batches), **measure(run, student, teacher, prompt, test_rows, cfg.top))
    stage.end(**run.checkpoint(student))


def measure(run: Run, student: GPT, teacher: GPT, prompt: list[int], rows, top: int) -> dict:
    """Print and return the KL before and after distillation and, in the toy, what the models do."""
    kl_before = mean_kl(teacher, teacher, prompt, rows, top, run.device)
    kl_after = mean_kl(student, teacher, prompt, rows, top, run.device)
    check_finite("distillation after its last step", kl=kl_after)
    print(f"    test KL from the prompted LM: {kl_before:.4f} nats a token before, "
          f"{kl_after:.4f} after")
    columns = {}
    if run.toy:
        columns = {"LM": behavior(run, teacher),
                   "LM, prompted": behavior(run, teacher, toy_corpus.HHH_HEADER),
                   "distilled": behavior(run, student)}
        print(table(*columns.values(), names=columns))
    return {"kl_before": kl_before, "kl_after": kl_after, "rates": columns}


def distilled_prompt(run: Run) -> list[int]:
    """Ids of the text that the teacher reads first. In the toy and with --init, end-of-turn is left
    out: the toy's corpus has none after a header, and GPT-2 would start a new document."""
    if run.toy:
        return run.tok.encode(toy_corpus.HHH_HEADER)
    if run.cfg.init:
        return run.tok.encode(HHH_PROMPT)
    return run.tok.encode_dialogue(HHH_PROMPT)


def check_distilled_prompt(run: Run):
    """Raise UserError if the prompt leaves no room for a document."""
    prompt = distilled_prompt(run)
    if run.context - len(prompt) < MIN_PROMPT:
        raise UserError(f"--context {run.context} is too short for the prompt of {len(prompt)} "
                        "tokens that is distilled; use a longer --context, or skip distillation "
                        "with --cd.documents 0")


@torch.no_grad()
def mean_kl(student: GPT, teacher: GPT, prompt: list[int], rows, top: int, device) -> float:
    """Mean KL in nats a token."""
    total = 0.0
    for piece in row_batches(rows, device, read_before=len(prompt)):
        total += distillation_loss(student, teacher, prompt, piece, top, device).item()
    return sum(ranks.gather(total)) / n_targets(rows)


def behavior(run: Run, model: GPT, header: str = "", n: int = 600, max_response: int = 32) -> dict:
    """What the ground truth says of one reply to each of n held-out prompts, a third of them
    red-teaming; see toy.rates. The model reads `header` before each prompt."""
    rng = run.rng("behavior prompts")
    kinds, prompts, ids = [], [], []
    for i in range(n):
        kinds.append("harmless" if i % 3 == 0 else "helpful")
        prompts.append(toy_corpus.draw_prompt(rng, kinds[i], held_out=True))
        ids.append(run.tok.encode_dialogue(header + prompts[i]))
    # Fewer than max_response where --context is short. The 1 is for the end-of-context token.
    room = run.context - max(len(row) for row in ids) - 1
    uniforms = torch.rand(n, max_response, generator=run.torch_rng("behavior"))[:, :max(room, 1)]
    responses = rollout(model, ids, uniforms, run.tok.end_of_turn).responses()
    return toy.rates(prompts, kinds, [run.tok.decode(response) for response in responses])


# ---- 4. Commands -------------------------------------------------------------


def check_early(run: Run, cd: CDConfig):
    """Find out whether stage 2 and --export can run. Every command calls this before it trains."""
    if run.cfg.export:
        hub.check_export(run.cfg.export)
    if cd.documents > 0:
        run.checks.append(lambda: check_distilled_prompt(run))


def ensure_pretrained(run: Run, lm: LMConfig):
    """Run stage 1 if its result is missing."""
    if run.reuse("lm", lm):
        run.load_tokenizer()
    else:
        train(run, lm)


def ensure(run: Run, lm: LMConfig, cd: CDConfig):
    """Run stages 1 and 2 if their results are missing. Later stages call this."""
    ensure_pretrained(run, lm)
    if not run.reuse("cd", cd):
        distill(run, cd)


def command(run: RunConfig, lm: LMConfig, cd: CDConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, cd)
    check_early(folder, cd)
    train(folder, lm)
    if folder.tok is None:
        folder.load_tokenizer()
    distill(folder, cd)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig)
