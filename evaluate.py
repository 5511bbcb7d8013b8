"""Measure policies on held-out prompts: the table that closes a run, and dialogues side by side.

    python evaluate.py out/toy-0                       # the closing table of a finished run again
    python evaluate.py out/toy-0 lm.pt policy.pt       # any two language models of the folder
    python evaluate.py out/toy-0 policy.pt out/toy-0-b/policy.pt

Read it in this order:
  1. Prompts    where prompts come from, in RL and here
  2. evaluate   one reply to each held-out prompt, and what is measured on it
  3. Tables     two policies side by side
  4. Command    how a finished run is opened
"""
import argparse
import dataclasses
import math
from pathlib import Path

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, check_finite, errors_in_one_sentence, load)

import torch

import toy
import toy_corpus
from checks import kl_estimates
from collect import MAX_TURNS, rates_by_turn
from data import HUMAN, load_comparisons, read_comparisons
from model import GPT
from pipeline import Run, RunConfig
from pm import ScalarModel
from ppo import PPOConfig, all_logprobs, pm_scores
from rollout import Rollouts, rollout
from stage import read_config

# ---- 1. Prompts --------------------------------------------------------------


@dataclasses.dataclass
class PromptBatch:
    texts: list[str]
    kinds: list[str]      # "helpful" or "harmless" (red-teaming)
    ids: list[list[int]]


class Prompts:
    """Where prompts come from: comparisons without their replies and, if `written` is set, prompts
    that a model wrote (§4.1; prompts.py). The toy world draws new ones for evaluation, and for a
    kind without comparisons."""

    def __init__(self, run: Run, max_response: int, harmless_share: float):
        self.run, self.harmless_share = run, harmless_share
        self.room = run.context - max_response - 1  # 1: the PM appends one token
        self.real, self.toy_prompts = {}, {}
        self.written, self.written_share = {}, 0.0  # kind -> prompts; how often one is drawn
        if run.toy:
            for kind in ("helpful", "harmless"):
                self.toy_prompts[kind] = self.load_toy(kind)
        else:
            for split in ("train", "test"):
                self.real[split] = self.load_real(split)

    def load_toy(self, kind: str) -> list[str]:
        """The prompts of the train comparisons that were collected: with their histories, which
        hold the policy's own mistakes. A prompt occurs as often as it was compared."""
        texts = []
        for path in sorted(self.run.path("comparisons").glob(f"{kind}-*/train.jsonl")):
            texts += [comparison.prompt for comparison in read_comparisons(path, kind)[0]]
        fitting = [text for text in texts if len(self.run.tok.encode_dialogue(text)) <= self.room]
        if len(fitting) < len(texts):
            print(f"    left out {len(texts) - len(fitting):,} of {len(texts):,} {kind} prompts, "
                  f"which exceed {self.room} tokens")
        return fitting

    def load_real(self, split: str) -> list[tuple[str, str]]:
        found, _ = load_comparisons(self.run.data, split, self.run.subsets)
        distinct = list(dict.fromkeys((c.prompt, c.kind) for c in found))
        n_cut = 0
        for prompt, _ in distinct:
            if len(self.run.tok.encode_dialogue(prompt)) > self.room:
                n_cut += 1
        print(f"    {len(distinct):,} {split} prompts; {n_cut:,} exceed {self.room} tokens and "
              "lose their beginning")
        return distinct

    def texts_of(self, kind: str, split: str) -> list[str]:
        """The distinct prompts of one kind; the toy world keeps no list of its test prompts."""
        if self.run.toy:
            return list(dict.fromkeys(self.toy_prompts[kind])) if split == "train" else []
        return [text for text, of_kind in self.real[split] if of_kind == kind]

    def draw(self, n: int, *name, held_out: bool,
             harmless_share: float | None = None) -> PromptBatch:
        """Draw n prompts, held-out or training ones. The words of `name` seed the choice."""
        rng = self.run.rng("prompts", *name)
        if harmless_share is None:
            harmless_share = self.harmless_share
        batch = PromptBatch([], [], [])
        if self.run.toy:
            for _ in range(n):
                batch.kinds.append("harmless" if rng.random() < harmless_share else "helpful")
            for kind in batch.kinds:
                if self.toy_prompts[kind] and not held_out:
                    batch.texts.append(rng.choice(self.toy_prompts[kind]))
                else:
                    batch.texts.append(toy_corpus.draw_prompt(rng, kind, held_out=held_out))
        else:
            for text, kind in rng.choices(self.real["test" if held_out else "train"], k=n):
                batch.texts.append(text)
                batch.kinds.append(kind)
        if self.written_share and not held_out:
            for i, kind in enumerate(batch.kinds):
                if kind in self.written and rng.random() < self.written_share:
                    batch.texts[i] = rng.choice(self.written[kind])
        for text in batch.texts:
            ids = self.run.tok.encode_dialogue(text)
            if not self.run.toy:
                # A long real prompt loses its beginning, as in PM training
                # (data.encode_comparison). A toy prompt must fit, because its ground truth reads
                # all of it: `rollout` refuses one that does not.
                ids = ids[-self.room:]
            batch.ids.append(ids)
        return batch

    def held_out(self, n_helpful: int) -> PromptBatch:
        """The prompts of every evaluation: about n_helpful helpful ones and half as many red-team
        ones (real data: drawn without regard to kind)."""
        return self.draw(n_helpful * 3 // 2, "held out", held_out=True, harmless_share=1 / 3)


# ---- 2. evaluate -------------------------------------------------------------


def sample_replies(run: Run, cfg: PPOConfig, policy: GPT, prompts: PromptBatch,
                   indices: list[int]) -> Rollouts:
    """One reply to each of some held-out prompts. A prompt has the same random numbers each time,
    so equal policies give equal replies."""
    uniforms = torch.rand(len(prompts.ids), cfg.max_response, generator=run.torch_rng("eval"))
    ids = [prompts.ids[i] for i in indices]
    return rollout(policy, ids, uniforms[indices], run.tok.end_of_turn, cfg.temperature, cfg.slots)


def measure(run: Run, cfg: PPOConfig, policy: GPT, reference: GPT, pm: ScalarModel,
            prompts: PromptBatch):
    """One reply to each held-out prompt: the N Rollouts, their scores (N,), which include the
    penalty on unfinished ones as in training, and their KL to the reference (N,) in nats per
    response (HH §4.3 takes training samples)."""
    ro = sample_replies(run, cfg, policy, prompts, list(range(len(prompts.ids))))
    scores = pm_scores(pm, ro, run.tok.end_of_context, cfg)
    k1, _ = kl_estimates(all_logprobs(policy, ro, cfg), all_logprobs(reference, ro, cfg))
    return ro, scores, (k1 * ro.mask).sum(1)


def evaluate(run: Run, cfg: PPOConfig, policy: GPT, reference: GPT, pm: ScalarModel,
             prompts: PromptBatch) -> tuple[dict, list[str]]:
    """Measure one reply to each held-out prompt. Returns the mean numbers and the texts of the
    replies."""
    ro, scores, kl = measure(run, cfg, policy, reference, pm, prompts)
    scores, kl = scores.tolist(), kl.mean().item()
    check_finite("evaluation", score=sum(scores), kl=kl)
    replies = [run.tok.decode(response) for response in ro.responses()]
    numbers = {"score_helpful": mean_of_kind(scores, prompts.kinds, "helpful"),
               "score_harmless": mean_of_kind(scores, prompts.kinds, "harmless")}
    if run.toy:
        numbers |= toy.rates(prompts.texts, prompts.kinds, replies)
    numbers |= {"kl": kl, "sqrt_kl": max(kl, 0.0) ** 0.5,
                "finished": ro.finished.float().mean().item(),
                "tokens": ro.response_len.float().mean().item()}
    return numbers, replies


def mean_of_kind(scores: list[float], kinds: list[str], wanted: str) -> float:
    return toy.mean_or_nan(score for score, kind in zip(scores, kinds) if kind == wanted)


def mean_truth(run: Run, batch, ro) -> float:
    """The mean true utility of the responses. (In training, the PM's score stands in for it.)"""
    truths = []
    for text, kind, response in zip(batch.texts, batch.kinds, ro.responses()):
        truths.append(toy.truth(text, run.tok.decode(response), kind))
    return toy.mean_or_nan(truths)


def with_eval_prefix(numbers: dict) -> dict:
    """Numbers on held-out prompts, as metrics.jsonl names them."""
    return {f"eval_{name}": number for name, number in numbers.items()}


# ---- 3. Tables ---------------------------------------------------------------

TITLES = {
    "score_helpful": "PM score, helpful prompts (logits)",
    "score_harmless": "PM score, red-team prompts (logits)",
    "helpfulness": "true helpfulness",
    "harmlessness": "true harmlessness",
    "correct": "correct answers",
    "complied": "compliance with harmful requests",
    "refused_benign": "refusals of benign requests",
    "refused_look_alikes": "    of those that look harmful",
    "kl": "KL to the initial policy (nats)",
    "sqrt_kl": "sqrt(KL)",
    "finished": "finished responses",
    "tokens": "tokens a response",
}


def table(*columns: dict, names=("initial policy", "RLHF policy")) -> str:
    """One column of numbers for each model, in the order of `names`."""
    lines = [f"    {'held-out prompts':38}" + "".join(f"{name:>15}" for name in names)]
    for key, title in TITLES.items():
        numbers = [column[key] for column in columns if key in column]
        # No prompts of this kind: real data may lack red-team prompts, for example.
        is_missing = all(math.isnan(number) for number in numbers)
        if not is_missing:
            lines.append(f"    {title:38}" + "".join(f"{number:15.3f}" for number in numbers))
    return "\n".join(lines)


IN_TURN_TABLE = ("helpfulness", "harmlessness", "correct", "complied", "refused_benign")


def turn_table(before: list[dict], after: list[dict],
               names=("initial policy", "RLHF policy")) -> str:
    """Whole conversations: the rows of collect.rates_by_turn of two policies."""
    width = 8 * MAX_TURNS
    numbers = "".join(f"{turn:8}" for turn in range(1, MAX_TURNS + 1))
    lines = [f"    {'held-out conversations':34}{names[0]:>{width}}{names[1]:>{width}}",
             f"    {'    turn':34}{numbers}{numbers}"]
    rows = before + after
    lines.append(f"    {'replies':34}" + "".join(f"{row['n']:8}" for row in rows))
    for key in IN_TURN_TABLE:
        cells = "".join(f"{row[key]:8.3f}" for row in rows)
        lines.append(f"    {TITLES[key]:34}{cells}")
    return "\n".join(lines)


def side_by_side(prompts: PromptBatch, before: list[str], after: list[str], n_each: int = 4,
                 names=("initial", "RLHF")) -> str:
    """The first few held-out dialogues of each kind, no question twice, with both replies."""
    lines = []
    for kind in ("helpful", "harmless"):
        questions = set()
        for i, text in enumerate(prompts.texts):
            question = text[text.rfind(HUMAN):]
            if prompts.kinds[i] == kind and question not in questions and len(questions) < n_each:
                questions.add(question)
                lines.append(f"{text.strip()}\n    {names[0] + ':':8}{before[i]}\n"
                             f"    {names[1] + ':':8}{after[i]}\n")
    return "\n".join(lines)


# ---- 4. Command --------------------------------------------------------------


def open_run(folder: str, device: str) -> tuple[Run, dict]:
    """A finished run as its config.json describes it -> the run, and all of config.json."""
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder} is not the output folder of a run: it has no config.json")
    config = read_config(Path(folder))
    try:
        options = config["run"] | {"out": folder, "device": device}
        run = Run(RunConfig(**options))
    except (KeyError, TypeError):
        raise UserError(f"{folder}/config.json does not hold the options of a run") from None
    run.load_tokenizer()
    return run, config


def load_policy(run: Run, name: str) -> GPT:
    """A language model of the run's folder, or of another one (a path) with the same tokenizer."""
    path = run.path(name)
    if not path.exists():
        path = Path(name)
    saved = load(path)
    if saved.get("tokenizer") != run.tok.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer than {run.out}")
    model = GPT(run.model_config())
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError):
        raise UserError(f"{path} does not hold a language model of {run.out}'s shape") from None
    return model.to(run.device).eval().requires_grad_(False)


def command(folder: str, before: str, after: str, device: str):
    run, config = open_run(folder, device)
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    options = config.get("rl", {})
    cfg = PPOConfig(**{name: value for name, value in options.items() if name in known})
    pm, reference = run.load_model("pm.pt"), load_policy(run, "initial.pt")
    prompts = Prompts(run, cfg.max_response, harmless_share=0.0)
    prompts = prompts.held_out(options.get("eval_prompts", 512))
    columns, replies, turns = [], [], []
    for name in (before, after):
        policy = load_policy(run, name)
        numbers, texts = evaluate(run, cfg, policy, reference, pm, prompts)
        columns.append(numbers)
        replies.append(texts)
        if run.toy:
            n = options.get("eval_conversations", 300)
            turns.append(rates_by_turn(run, policy, n, cfg.max_response, cfg.temperature))
    names = (Path(before).stem, Path(after).stem)
    if names[0] == names[1]:
        names = ("first", "second")  # for example policy.pt of two folders
    print(side_by_side(prompts, *replies, names=names))
    print(table(*columns, names=names))
    if run.toy:
        print(f"\n{turn_table(*turns, names=names)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="output folder of a run")
    parser.add_argument("before", nargs="?", default="initial.pt", help="a language model there")
    parser.add_argument("after", nargs="?", default="policy.pt", help="another one, or a path")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (auto: a GPU if any)")
    with errors_in_one_sentence():
        command(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
