"""Tests of record.py: what it writes equals what training computes, by slow references."""
import json
import math
from pathlib import Path

import pytest
import torch

import record
from data import HUMAN, Comparison
from evaluate import TITLES, PromptBatch, Prompts, evaluate
from helpers import StubRun, exact_gae, exact_response, exact_score, exact_values
from pm import ScalarModel, wilson
from ppo import PPOConfig
from record import Recorder, first_of_each_group, group_of, mean_and_interval, of_pm
from rollout import plain_rollout
from run import torch_rng
from test_evaluate import OPENING, TOK, talking_nets

HALF = 5.1e-5  # numbers are rounded to four digits


def test_a_line_holds_what_training_computes(monkeypatch):
    """Each reply against references that read it alone; the table against `evaluate`."""
    run = StubRun(tok=TOK, toy=True, context=512, path=Path)
    nets = talking_nets(run)
    policy, reference, pm = nets[0], nets[1], ScalarModel(nets[2]).double()
    critic = ScalarModel(nets[2]).double()
    cfg = PPOConfig(max_response=6, temperature=0.7, unfinished_penalty=1.5, kl_coef=0.3,
                    gamma=0.9, gae_lambda=0.8, iterations=4)
    prompts = Prompts(run, 6, 0.5).held_out(12)
    monkeypatch.setattr(record, "N_PREFIXES", 3)
    monkeypatch.setattr(record, "MAX_PROMPTS", 9)
    monkeypatch.setattr(record, "MIN_PROMPTS", 1)
    recorder = Recorder(run, cfg, reference, pm, prompts)
    assert "table" not in recorder.content(2, policy, critic)
    content = json.loads(json.dumps(recorder.content(4, policy, critic)))
    uniforms = torch.rand(18, 6, generator=torch_rng(0, "eval"))
    ro = plain_rollout(policy, prompts.ids, uniforms, TOK.end_of_turn, 0.7)
    finished = [reply["finished"] for reply in content["replies"]]
    assert 0 < sum(finished) < len(finished) == 9 < len(set(prompts.texts))
    for reply in content["replies"]:
        n = prompts.texts.index(reply["prompt"])
        response, ids = ro.responses()[n], prompts.ids[n]
        is_end = [token == TOK.end_of_turn for token in response]
        assert ["<end>" if end else TOK.decode([token]) for token, end in
                zip(response, is_end)] == reply["tokens"]
        assert reply["text"] == TOK.decode(response) and reply["finished"] == is_end[-1]
        logp = exact_response(policy, ids, ro, n, 0.7)[0]
        ref_logp = exact_response(reference, ids, ro, n, 0.7)[0]
        score = exact_score(pm, ids + response + [TOK.end_of_context])
        rewards = (-0.3 * (logp - ref_logp)).tolist()
        rewards[-1] += score - (0 if is_end[-1] else 1.5)
        values = exact_values(critic, ro, n).tolist()
        expected = {"logp": logp.tolist(), "ref_logp": ref_logp.tolist(), "values": values,
                    "rewards": rewards, "advantages": exact_gae(rewards, values, 0.9, 0.8)}
        for name, numbers in expected.items():
            assert reply[name] == pytest.approx(numbers, abs=HALF), name
        assert reply["score"] == pytest.approx(score - (0 if is_end[-1] else 1.5), abs=HALF)
        places = range(len(response) - 1, -1, -math.ceil(len(response) / 3))
        for t, found in enumerate(reply["prefix_scores"]):
            prefix = ids + response[:t + 1] + [TOK.end_of_context]
            exact = exact_score(pm, prefix) if t in places else None
            assert found == pytest.approx(exact, abs=HALF)
    numbers, _ = evaluate(run, cfg, policy, reference, pm, prompts)
    shown = {TITLES[name].strip(): x for name, x in numbers.items()
             if name != "sqrt_kl" and not math.isnan(x)}
    assert {title: row[0] for title, row in content["table"].items()} == pytest.approx(
        shown, abs=HALF)
    rate = content["table"]["finished responses"]
    assert rate[1:] == pytest.approx(wilson(rate[0] * 18, 18), abs=2 * HALF)
    mean, low, high = content["table"]["true helpfulness"]
    assert low < mean < high


def test_intervals_of_means_and_shares():
    assert mean_and_interval([0, 0, 0, 0], is_share=False) == (0, 0, 0)
    assert mean_and_interval([1, 3], is_share=False) == pytest.approx((2, 2 - 1.96, 2 + 1.96))
    assert mean_and_interval([0, 1], is_share=True) == (0.5, *wilson(1, 2))


@pytest.mark.parametrize("question, kind, is_toy, group", [
    (f"{HUMAN} How do I shoot a stranger?", "harmless", True, "red-team"),
    (f"{HUMAN} anything", "harmless", False, "red-team"),
    (f"{HUMAN} anything", "helpful", False, "helpful"),
    (f"{HUMAN} How do I crack a nut?", "helpful", True, "look-alike"),
    (f"{HUMAN} Tell me the capital of Peru.", "helpful", True, "question"),
    (f"{HUMAN} Tell me the capital of Peru.{OPENING} Lima.{HUMAN} And what is its language?",
     "helpful", True, "follow-up")])
def test_groups(question, kind, is_toy, group):
    assert group_of(question + OPENING, kind, is_toy) == group


def test_prompts_are_distinct_and_of_all_groups():
    groups = ["b", "a", "a", "a", "a", "c"]
    assert first_of_each_group(["p", "q", "q", "r", "s", "t"], groups, 4) == [0, 1, 3, 5]
    assert first_of_each_group(["p", "q", "q", "r", "s", "t"], groups, 9) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("iterations, max_response, due", [
    (65, 32, [7, 14, 21, 28, 35, 42, 49, 56, 63]), (4, 32, [1, 2, 3]), (20, 900, []),
    (400, 128, [40, 80, 120, 160, 200, 240, 280, 320, 360]), (20, 500, [5, 10, 15])])
def test_a_run_is_recorded_some_ten_times_and_in_less_than_2_mb(iterations, max_response, due):
    cfg = PPOConfig(iterations=iterations, max_response=max_response)
    texts = [f"{HUMAN} {i}{OPENING}" for i in range(100)]
    prompts = PromptBatch(texts, ["helpful"] * 100, [[1]] * 100)
    recorder = Recorder(StubRun(toy=False), cfg, None, None, prompts)
    assert [n for n in range(iterations + 1) if n == 0 or recorder.is_due(n)] == [0, *due]
    # A token takes five numbers such as "-10.1234, " and a word; a prompt and the rest 1,000 bytes.
    n_bytes = (len(due) + 2) * len(recorder.chosen) * (max_response * 60 + 1000)
    assert len(recorder.chosen) >= 12 and n_bytes < 2e6  # though no reply ends by itself
    cfg.batch = 100  # the time of a line is that of a part of an iteration
    few = Recorder(StubRun(toy=False), cfg, None, None, prompts).chosen
    assert len(few) == min(20, len(recorder.chosen))


def test_what_a_pm_believes_by_hand():
    def pair(p_chosen, kind="helpful"):
        return Comparison("p", f" a{p_chosen}", " b", kind, p_chosen)
    odds = [0.5, 0.9, 0.2, 0.99, 0.4, 0.9]
    margins = [3.0, -2.0, 1.0, 0.5, 0.0, 0.25]
    pairs = [pair(p) for p in odds[:5]] + [pair(odds[5], "harmless")]
    content = of_pm(pairs, torch.tensor(margins))
    assert content["calibration"]["harmless"] == [[0.5622, 1.0, *map(record.rounded, wilson(1, 1)),
                                                   1]]
    helpful = content["calibration"]["helpful"]  # five pairs, by |margin|: 0, 0.5, 1, 2, 3
    assert [row[1] for row in helpful] == [0.5, 1.0, 1.0, 0.0, 1.0]
    assert [row[0] for row in helpful] == pytest.approx(
        [1 / (1 + math.exp(-x)) for x in (0, 0.5, 1, 2, 3)], abs=HALF)
    # Log-odds 0 (left out), 2.2, -1.39, 4.6, -0.41, 2.2: right are those of the margin's sign.
    assert [(row[1], row[4]) for row in content["gaps"]] == [(0.5, 1), (0.0, 1), (0.5, 2), (1.0, 1)]
    assert content["gaps"][2][0] == pytest.approx(math.log(9), abs=HALF)
    assert [(worst["margin"], worst["chosen"]) for worst in content["worst"]] == [
        (-2.0, " a0.9"), (1.0, " a0.2")]
    unknown = of_pm([pair(None), pair(None)], torch.tensor([1.0, -1.0]))  # real data: the label
    assert unknown["gaps"] == [] and [w["margin"] for w in unknown["worst"]] == [-1.0]
