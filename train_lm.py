"""Stage 1, language-model pretraining: next-token prediction on a corpus, from random weights.

    python train_lm.py                       # the toy world
    python train_lm.py --data path/to/hh-rlhf

The paper starts from models pretrained on 400B tokens (GL). Here the corpus is the toy world's documents, or, for
real comparisons, the text of their dialogues. Leaves lm.pt and tokenizer.json in the output folder.
"""
import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import toy
from data import Tokenizer, UserError, batches_by_length, counts_line, gpt2_tokenizer, load_comparisons, pad, train_bpe
from model import GPT, autocast, token_logprobs
from ppo import check_finite
from run import Metrics, Run, RunConfig, main, save, save_model


@dataclass
class LMConfig:
    documents: int = 90_000    # documents of the corpus, each seen once (real data: at most this many dialogues)
    vocab: int = 1024          # tokens of a BPE trained on the corpus (GPT-2's encoding has its own 50257)
    # Pretraining is GL's and its settings are not stated in HH; these were found on the toy.
    lr: float = 5e-3           # peak; linear warm-up, then half a cosine down to 0
    warmup: int = 50           # steps
    step_tokens: int = 1280    # tokens a step
    weight_decay: float = 0.01  # on matrices only
    max_grad_norm: float = 1.0  # gradients are clipped to this norm


def corpus(run: Run, cfg: LMConfig, split: str) -> list[str]:
    """The documents of one split, "train" or "test", in a fixed order."""
    if run.toy:
        rng = run.rng("corpus", split)
        n = cfg.documents if split == "train" else 500
        return [toy.document(rng) for _ in tqdm(range(n), desc="write corpus", unit=" docs", leave=False, delay=2)]
    comparisons, counts = load_comparisons(run.cfg.data, split)
    for subset, counter in counts.items():
        print(f"    {subset} {split}: {counts_line(counter)}")
    run.rng("corpus", split).shuffle(comparisons)  # so that a cut takes some of each subset
    if len(comparisons) > cfg.documents:
        print(f"    {len(comparisons) - cfg.documents:,} of {len(comparisons):,} left out by --lm.documents")
    # The side that was chosen; the LM is not to learn preferences yet, but one side is text enough.
    return [c.prompt + c.chosen for c in comparisons[:cfg.documents]]


def make_tokenizer(run: Run, cfg: LMConfig, texts: list[str]) -> Tokenizer:
    name = run.cfg.tokenizer if run.cfg.tokenizer != "auto" else ("bpe" if run.toy else "gpt2")
    if name == "gpt2":
        return gpt2_tokenizer()
    if cfg.vocab < 300:
        raise UserError(f"--lm.vocab {cfg.vocab}: too small for 256 bytes, 2 special tokens and some merges; at least 300")
    return train_bpe(texts[:20_000], cfg.vocab)


def lm_loss(model: GPT, rows: list[list[int]], device) -> torch.Tensor:
    """Mean next-token cross-entropy of a batch of rows, in nats a token."""
    ids, lengths = (t.to(device) for t in pad(rows))  # (B, T), (B,)
    real = torch.arange(1, ids.shape[1], device=device) < lengths[:, None]  # (B, T - 1) targets that are no pads
    with autocast(device):
        hidden = model(ids[:, :-1])  # (B, T - 1, D): position t - 1 predicts token t
        logp = token_logprobs(model, hidden[real], ids[:, 1:][real])  # (n,)
    return -logp.mean()


def train(run: Run, cfg: LMConfig):
    """Train the LM and leave lm.pt, or go on from lm_state.pt."""
    if run.done("lm.pt", "lm"):
        return
    state = run.begin("lm", cfg)
    texts, test_texts, device = corpus(run, cfg, "train"), corpus(run, cfg, "test"), run.device
    tok = run.tok = Tokenizer.load(run.path("tokenizer.json")) if state else make_tokenizer(run, cfg, texts)
    run.record("lm", cfg)
    tok.save(run.path("tokenizer.json"))
    rows = [tok.encode_dialogue(t) for t in tqdm(texts, desc="encode", unit=" docs", leave=False, delay=2)]
    n_cut = sum(len(r) > run.context for r in rows)
    rows = [r[:run.context] for r in rows if len(r) > 1]
    batches = batches_by_length([len(r) for r in rows], cfg.step_tokens, run.torch_rng("lm batches"))

    torch.manual_seed(run.rng("lm weights").getrandbits(62))
    model = GPT(run.model_config()).to(device)
    groups = [dict(params=[p for p in model.parameters() if p.dim() == 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() != 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"[1] language model: {model.cfg.n_params():,} parameters, {len(rows):,} documents, "
          f"{sum(map(len, rows)):,} tokens{f', {n_cut} cut to {run.context}' if n_cut else ''}, {len(batches)} steps"
          + (f", from step {first}" if first else ""))
    metrics, seen, start = Metrics(run, "lm", first), 0, time.perf_counter()
    bar = tqdm(range(first, len(batches)), desc="train LM", unit="step", initial=first, total=len(batches), leave=False)
    for step in bar:
        if step % 200 == 0:  # step 0 too: from then on, an older lm.pt is known to be stale
            save(run.path("lm_state.pt"), stage="lm", step=step,
                 model=model.state_dict(), optimizer=optimizer.state_dict())
        progress = step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = lm_loss(model, [rows[i] for i in batches[step]], device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        check_finite(f"LM step {step}", loss=loss.item(), gradient=norm.item())
        optimizer.step()
        seen += sum(len(rows[i]) for i in batches[step])
        if step % 50 == 0 or step == len(batches) - 1:
            bar.set_postfix_str(f"loss {loss.item():.3f}, {seen / (time.perf_counter() - start):,.0f} tokens/s")
            metrics.write(step, loss=loss.item())

    test_rows = [r[:run.context] for r in map(tok.encode_dialogue, test_texts) if len(r) > 1]
    model.eval()
    with torch.no_grad():
        total = sum(lm_loss(model, [test_rows[i] for i in b], device).item() * sum(len(test_rows[i]) - 1 for i in b)
                    for b in batches_by_length([len(r) for r in test_rows], 8192))
    test_loss = total / sum(len(r) - 1 for r in test_rows)
    metrics.write(len(batches), test_loss=test_loss)
    save_model(run.path("lm.pt"), model, tok)
    run.end("lm")
    print(f"    held-out loss {test_loss:.3f} nats a token -> {run.path('lm.pt')}  ({time.perf_counter() - start:.0f} s)")


def ensure(run: Run, cfg: LMConfig):
    """What later stages call: train the LM if its checkpoint is missing, and say so."""
    if run.reuse("lm.pt", "lm", cfg):
        run.tok = Tokenizer.load(run.path("tokenizer.json"))
    else:
        train(run, cfg)


if __name__ == "__main__":
    main(lambda run, lm: train(Run(run), lm), __doc__.split("\n")[0], run=RunConfig, lm=LMConfig)
