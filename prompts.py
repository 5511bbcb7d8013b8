"""Prompts for RL that a language model writes (§4.1).

HH shows a large language model about ten high-quality queries of people and lets it write more:
369k of its 506k prompts. Read it in this order:
  1. Writing    `write`: show ten questions, and sample what might come next
  2. Checking   what is no usable question is dropped, and counted

Papers: HH = Bai et al. 2022 (arXiv 2204.05862), and every § without a name is in HH.
"""
from collections import Counter

from run import UserError  # before torch: Ctrl-C prints no traceback

import torch

import toy
from data import ASSISTANT, HUMAN, MARKER, counts_line, parse
from evaluate import Prompts
from model import GPT
from pipeline import Run
from rollout import Sampler
from toy_people import is_held_out

SHOWN = 10             # questions that the model reads (§4.1: "about 10"); any short ones here
LONGEST = 32           # tokens of a question that is written
SAMPLES_OF_TEXT = 20   # questions sampled after the same ten, which are read once
TEXTS_AT_ONCE = 40
MOST_SAMPLES = 100     # samples for each prompt that is wanted; then writing ends

# ---- 1. Writing --------------------------------------------------------------


def write(run: Run, lm: GPT, prompts: Prompts, kind: str, n: int) -> list[str]:
    """At most n new prompts of one turn. The shown questions open the training prompts of this
    kind. Prints how many were dropped, and why. Raises UserError if none can be used."""
    train, held_out = prompts.texts_of(kind, "train"), prompts.texts_of(kind, "test")
    questions, longest = {}, (run.context - LONGEST) // (SHOWN + 1)
    for text in train:
        question = parse(text)[0][1].strip()
        questions[question] = run.tok.encode_dialogue(f"{HUMAN} {question}")
    short = [question for question, ids in questions.items() if len(ids) <= longest]
    if len(short) < SHOWN:
        raise UserError(f"--model-prompts needs {SHOWN} short {kind} questions to show, and there "
                        f"are {len(short)}: use a longer --context, or leave it out")
    rng, generator = run.rng("model prompts", kind), run.torch_rng("model prompts", kind)
    sampler, counts, kept = Sampler(lm, run.tok.end_of_turn), Counter(read=0), []
    while len(kept) < n and counts["read"] < MOST_SAMPLES * n:
        shown, rows = [], []
        for _ in range(TEXTS_AT_ONCE):
            ten = rng.sample(short, SHOWN)
            row = []
            for question in ten:
                row += questions[question]
            shown += [ten] * SAMPLES_OF_TEXT
            rows += [row + run.tok.encode(HUMAN)] * SAMPLES_OF_TEXT
        ro = sampler(rows, torch.rand(len(rows), LONGEST, generator=generator))
        for response, finished, ten in zip(ro.responses(), ro.finished.tolist(), shown):
            text = run.tok.decode(response)
            turn = MARKER.split(text)[0]  # without the turns that the model wrote after it
            reason = problem(turn.strip(), ten, kind, run.toy, held_out)
            if turn == text and not finished:
                reason = "unfinished"
            counts["read"] += 1
            if reason:
                counts[reason] += 1
            elif len(kept) < n:
                kept.append(f"{HUMAN} {turn.strip()}{ASSISTANT}")
            else:
                counts["not needed"] += 1
    counts["kept"] = len(kept)
    print(f"    {kind} prompts written by the LM: {counts_line(counts)}")
    if not kept:
        raise UserError(f"the LM wrote no usable {kind} prompt ({counts_line(counts)}): leave out "
                        "--model-prompts, or train a better LM")
    return kept


# ---- 2. Checking -------------------------------------------------------------


def problem(question: str, shown: list[str], kind: str, is_toy: bool, held_out: set[str]) -> str:
    """Why a question cannot be used; "" if it can. held_out: real test prompts."""
    if not question:
        return "empty"
    if toy.plain(question) in [toy.plain(text) for text in shown]:
        return "copied"
    prompt = f"{HUMAN} {question}{ASSISTANT}"
    if not is_toy:
        return "held out" if prompt in held_out else ""
    if not toy.is_known(prompt):
        return "no question of this world"
    if toy.understand(prompt).harmful != (kind == "harmless"):
        return "of the other kind"
    return "held out" if is_held_out([toy.opening(toy.question_in(question))]) else ""
