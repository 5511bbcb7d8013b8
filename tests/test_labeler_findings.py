"""Tests of experiments/sft.py, grouped.py and labelers.py. Their verdicts, and the scripts as a
whole, are tested in test_experiments.py."""
import math
import sys
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import lab  # noqa: F401 (it gives the toy sizes their names)
import grouped
import labelers
import output
import sft
import toy
from data import in_test
from demonstrations import Demonstration, Example
from helpers import CFG, StubRun, doubled, exact_logits, exact_score, random_prompts, shaken
from model import GPT
from pm import ScalarModel
from rankings import Element, Ranking, RMConfig
from test_people import TOK
from test_pm import StubStage
from test_toy import prompt_of

HARM = prompt_of("How do I poison the soup of my boss?")
SUM = prompt_of("What is the sum of 2 and 1?")

# ---- 1. sft.py ---------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return doubled(shaken(GPT(CFG), 1))


def some_examples(n: int) -> list[Example]:
    """Rows of all lengths; their last half, at least one id, is the reply."""
    rows = [[1] + prompt for prompt in random_prompts(n, seed=3)]
    return [Example(row, (len(row) + 1) // 2) for row in rows]


def test_losses_of_replies_and_their_entropy_at_a_temperature(net):
    examples = some_examples(70)  # more than one batch
    loss, tokens, entropy = sft.losses_and_entropy(net, sft.states(net, examples), 70, 0.7)
    expected, entropies = [], []
    for example in examples:
        logp = (exact_logits(net, example.ids) / 0.7).log_softmax(-1)[example.start - 1:-1]
        reply = torch.tensor(example.ids[example.start:])
        expected.append(-logp.gather(1, reply[:, None]).sum().item())
        entropies += (-(logp.exp() * logp).sum(-1)).tolist()
    assert loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert tokens.tolist() == [len(example.ids) - example.start for example in examples]
    assert entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_a_temperature_is_found_from_its_entropy(net, temperature):
    examples = some_examples(10)
    _, _, entropy = sft.losses_and_entropy(net, sft.states(net, examples), 10, temperature)
    # Twenty halvings of the logarithm of 100: to a factor of 1 + 5e-6.
    assert sft.temperature_at(net, examples, entropy) == pytest.approx(temperature, rel=1e-5)


def test_demonstrations_with_a_mistake_are_told_apart_and_replies_are_judged(monkeypatch):
    found = [Demonstration(SUM, " 3.", "helpful"), Demonstration(SUM, " 4.", "helpful"),
             Demonstration(HARM, " I will not help with that.", "harmless"),
             Demonstration(HARM, " I do not know.", "harmless")]
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 8.0]), 0.5
    monkeypatch.setattr(sft, "states", lambda *args: None)
    monkeypatch.setattr(sft, "losses_and_entropy", lambda model, states, n, temperature: losses)
    said = [TOK.encode_reply(reply) for reply in (" 3.", " 3.", " 3.", " I cannot help you do it.")]

    def rollout(model, prompts, uniforms, end, temperature):
        assert uniforms.shape[0] == len(prompts) == 4 and temperature == 0.9
        return SimpleNamespace(responses=lambda: said)
    monkeypatch.setattr(sft, "rollout", rollout)
    monkeypatch.setattr(sft, "pm_scores", lambda *args: torch.tensor([1.0, 0.0, 0.0, 0.0]))
    row = sft.measure(StubRun(tok=TOK, context=2000), None, None, found, 0.9)
    assert row["loss"] == pytest.approx(10 / 15) and row["score"] == pytest.approx(0.25)
    assert row["loss without mistakes"] == pytest.approx(4 / 5)
    assert row["loss with mistakes"] == pytest.approx(6 / 10)
    truths = [toy.truth(d.prompt, TOK.decode(reply), d.kind) for d, reply in zip(found, said)]
    assert row["truth"] == pytest.approx(sum(truths) / 4) and row["correct"] == 1.0


def test_the_best_epoch_is_before_the_last_and_is_cooled_to_its_entropy(monkeypatch):
    """The models are numbers: their epochs. Epoch 8 has the lowest loss, but it is the last."""
    loss = {1: 0.5, 2: 0.4, 4: 0.45, 8: 0.3}
    monkeypatch.setattr(sft.train_sft, "load_epochs", lambda run: {k: k for k in loss})
    monkeypatch.setattr(sft.demonstrations, "read_written", lambda path: ["their own"])
    monkeypatch.setattr(sft.demonstrations, "encode", lambda tok, found, context: found)
    monkeypatch.setattr(sft.train_sft, "mean_reply_loss", lambda model, own, device: loss[model])
    monkeypatch.setattr(sft, "written", lambda run, n: ["new"])
    monkeypatch.setattr(sft, "states", lambda model, examples: (model, examples))
    monkeypatch.setattr(sft, "losses_and_entropy", lambda model, found, n: (None, None, found))
    monkeypatch.setattr(sft, "temperature_at", lambda *args: args)
    monkeypatch.setattr(sft, "measure", lambda run, model, pm, found, temperature=1.0: {
        "measured": (model, found, temperature)})
    run = StubRun(load_model=lambda name: None, path=lambda name: None, context=99)
    monkeypatch.setattr(sft, "train_fresh", lambda run, cfg: f"once {cfg}")
    rows = sft.one_seed(SimpleNamespace(**vars(run), tok=None, device="cpu", seed=3), "cfg", 1)
    assert [(row["epoch"], row["role"]) for row in rows] == [
        (1, ""), (2, sft.BEST), (4, ""), (8, sft.LAST), (2, sft.COOLED), (1, sft.FRESH)]
    assert output.column(rows[:4], "measured") == [(k, ["new"], 1.0) for k in loss]
    assert rows[4]["measured"] == (2, ["new"], (2, ["their own"], (8, ["their own"])))
    assert rows[5]["measured"] == ("once cfg", ["new"], 1.0)


def test_the_control_reads_as_many_demonstrations_as_all_epochs_and_none_twice(monkeypatch):
    seen = []
    monkeypatch.setattr(sft.lab, "with_lm_of", lambda run, folder: run)
    monkeypatch.setattr(sft.steps, "sft", lambda run, cfg, found: seen.append((cfg, found)))
    sft.train_fresh(StubRun(), sft.train_sft.SFTConfig(demonstrations=600, epochs=8))
    [(cfg, found)] = seen
    n_trained_on = sum(not in_test(demonstration) for demonstration in found)
    assert cfg.epochs == 1
    assert abs(n_trained_on - 600 * 8) < 100  # 17: one standard error
    assert len({(one.prompt, one.reply) for one in found}) > 0.9 * len(found)


# ---- 2. grouped.py -----------------------------------------------------------


def some_elements(n: int) -> list[Element]:
    """Elements of 3 to 5 rows that share a prompt; each of their pairs is ranked by the index."""
    elements = []
    for i in range(n):
        rows = [[i % 7, 3] + prompt for prompt in random_prompts(3 + i % 3, seed=i)]
        pairs = [(better, worse) for worse in range(len(rows)) for better in range(worse)]
        elements.append(Element(rows, pairs, f"ranking {i}"))
    return elements


def test_a_loss_is_the_mean_over_prompts_of_the_mean_over_their_pairs(net):
    torch.manual_seed(1)
    rm, elements, expected = shaken(ScalarModel(net), 2).double(), some_elements(40), []
    for element in elements:
        margins = [exact_score(rm, element.rows[better]) - exact_score(rm, element.rows[worse])
                   for better, worse in element.pairs]
        expected.append(F.softplus(-torch.tensor(margins, dtype=torch.float64)).mean().item())
    found = grouped.mean_loss(rm, elements, "cpu")
    assert found == pytest.approx(sum(expected) / 40, abs=1e-9)


def test_disjoint_pairs_of_a_prompt_share_no_reply_and_keep_which_is_better():
    elements, seen = [some_elements(3)[2]] * 150, set()
    for before, after in zip(elements, grouped.disjoint_pairs(elements, Random(0))):
        assert after.ranking is before.ranking and after.rows is before.rows
        assert len(after.pairs) == 2 and len({i for pair in after.pairs for i in pair}) == 4
        assert set(after.pairs) <= set(before.pairs)
        seen |= set(after.pairs)
    assert seen == set(elements[0].pairs)  # all 10 pairs of 5 rows


def test_both_ways_learn_the_same_elements_and_are_measured_on_as_many(monkeypatch):
    calls, elements = [], list(range(50))
    monkeypatch.setattr(lab, "train_rm", lambda run, cfg, its: calls.append((cfg, its)) or "RM")
    monkeypatch.setattr(grouped, "mean_loss", lambda rm, its, device: float(sum(its)))
    rows = grouped.compare(StubRun(), RMConfig(batch=3), elements, [5, 6])
    assert [cfg.shuffled for cfg, _ in calls] == [False, True] and calls[1][0].batch == 3
    assert calls[0][1] == elements == sorted(calls[1][1]) != calls[1][1]
    for row, way in zip(rows, (grouped.GROUPED, grouped.SHUFFLED)):
        assert row == {"way": way, "held-out loss": 11, "trained loss": 0 + 1, "gap": 10}


def test_few_prompts_take_as_many_steps_and_each_part_has_its_own(monkeypatch):
    calls, elements = [], some_elements(64)
    monkeypatch.setattr(grouped.rankings, "rankings", lambda run, cfg, split: split)
    monkeypatch.setattr(grouped.rankings, "encode",
                        lambda run, split: elements if split == "train" else ["held out"])
    monkeypatch.setattr(grouped, "compare", lambda run, cfg, its, held_out: calls.append(
        (cfg.batch, its, held_out)) or [{"way": "grouped"}])
    rows = grouped.one_seed(StubRun(seed=0), RMConfig(batch=16), 16, 2)
    assert output.column(rows, "data") == [grouped.MANY] + [grouped.FEW, grouped.DISJOINT] * 2
    assert [batch for batch, *_ in calls] == [16, 4, 4, 4, 4]
    mixed = calls[0][1]
    assert mixed != elements and sorted(map(id, mixed)) == sorted(map(id, elements))
    assert [its for _, its, _ in calls[1:4:2]] == [mixed[:16], mixed[16:32]]
    for before, after in zip(mixed[16:32], calls[4][1], strict=True):
        assert after.rows is before.rows and len(after.pairs) == len(before.rows) // 2
    assert {tuple(held_out) for *_, held_out in calls} == {("held out",)}


def test_a_quick_run_has_replies_of_all_models(monkeypatch):
    """The file of rankings is ordered by the model that replied."""
    calls = []
    monkeypatch.setattr(labelers.rankings, "rankings", lambda run, cfg, split: list(range(100)))
    monkeypatch.setattr(labelers.rankings, "encode", lambda run, found: found)
    monkeypatch.setattr(labelers, "five_fold", lambda run, cfg, kinds, train, held_out:
                        calls.append(train) or [{}])
    labelers.one_seed(StubRun(seed=0), None, 30)
    labelers.one_seed(StubRun(seed=0), None, 300)
    few, same, most, _ = calls
    assert few == same and len(set(few)) == 30 and max(few) > 60
    assert sorted(most) == list(range(100))


def test_a_reward_model_learns_the_pairs_of_its_elements(net, monkeypatch):
    """It prefers the better replies afterwards, and both ways start from the same weights."""
    torch.manual_seed(1)
    start, elements = shaken(ScalarModel(net), 2).float(), some_elements(40)
    monkeypatch.setattr(lab.train_pm, "from_lm", lambda run, name: {"sft.pt": start}[name])
    monkeypatch.setattr(lab, "Stage", lambda folder, name, cfg, path, parents: StubStage())
    run, before = StubRun(seed=0, path=str), grouped.mean_loss(start, elements, "cpu")
    rm = lab.train_rm(run, RMConfig(batch=8, lr=3e-3), elements)
    assert grouped.mean_loss(rm, elements, "cpu") < before - 0.05
    assert not any(parameter.requires_grad for parameter in rm.parameters())


# ---- 3. labelers.py ----------------------------------------------------------

TASTE = labelers.Taste(right=3.0, short=2.0, polite=0.7, careful=1.5)


@pytest.mark.parametrize("prompt, reply, worth", [
    (SUM, " 3.", 3 - 0.2), (SUM, " 4.", -1 - 0.2),
    (SUM, " The sum of 2 and 1 is 3.", 3 - 1.6),
    (SUM, " Sure! 3.", 3 + 0.7 - 0.4), (SUM, " Sure! Of course! Good question! 3.", 3 + 1.4 - 1.2),
    (SUM, " I will not help with that.", -1 - 1.2), (SUM, " I do not know.", -0.8),
    (SUM, " 3. Stop wasting my time.", 3 - 1.5 - 1.0), (HARM, " I will not help with that.", 0.3),
    (HARM, " I do not know.", -0.8), (HARM, "the means", None)])
def test_what_a_reply_is_worth_to_a_labeler(prompt, reply, worth):
    if worth is None:
        reply = " " + toy.understand(prompt).statement(toy.understand(prompt).answer)
        worth = -1.5 - 2 * len(reply.split()) / 10
    assert labelers.utility(TASTE, prompt, reply) == pytest.approx(worth)


def test_the_control_is_the_mean_of_the_kinds():
    rights = [taste.right for taste in labelers.KINDS.values()]
    assert len(rights) == 5 and labelers.mean_taste().right == pytest.approx(sum(rights) / 5)


def test_labelers_choose_by_bradley_terry():
    """The right answer is better by 1.5 + 0.5 = 2 nats, so it comes first with odds of e^2 : 1."""
    rng, taste = Random(0), labelers.Taste(right=1.5, short=0.0, polite=0.0, careful=0.0)
    ranking = Ranking(SUM, [" 4.", " 3."], [1, 2], utilities=[0.0, 1.0])
    found = [labelers.rank(taste, ranking, rng) for _ in range(3000)]
    share = sum(after.ranks == [2, 1] for after in found) / 3000
    # A share of 0.881 has a standard error of 0.0059; four of them are 0.024.
    assert abs(share - 1 / (1 + math.exp(-2))) < 0.024
    assert found[0].utilities is None and ranking.ranks == [1, 2]


def test_agreement_is_over_all_pairs_of_all_prompts():
    """One pair in three is alike in the first prompt, and the only ones of the others."""
    ranks, scores = [[1, 2, 3], [1, 2], [2, 1]], [[-5.0, -7.0, -6.5], [0.1, 0.2], [3.0, 1.0]]
    assert labelers.agreement(ranks, scores) == 3 / 5


def test_a_low_number_is_a_high_score(monkeypatch):
    monkeypatch.setattr(labelers, "score_rows",
                        lambda rm, rows, device: torch.tensor([float(sum(row)) for row in rows]))
    held_out = [Element([[1], [2]], [], None), Element([[5], [3], [4]], [], None)]
    assert labelers.score(StubRun(), None, held_out) == [[-1, -2], [-5, -3, -4]]


def test_each_labeler_is_left_out_once_and_ranks_prompts_of_its_own(monkeypatch):
    """The RM of this test agrees with whoever ranked what it learned from."""
    names = ["a", "b", "c"]
    monkeypatch.setattr(labelers.rankings, "encode", lambda run, found: found)
    trained = []

    def train_rm(run, cfg, elements):
        trained.append([(element.prompt, element.ranks) for element in elements])
        return {element.prompt for element in elements}
    monkeypatch.setattr(lab, "train_rm", train_rm)
    monkeypatch.setattr(labelers, "score", lambda run, rm, held_out: [rm])
    monkeypatch.setattr(labelers, "agreement", lambda scores, ranks: 0.5 + 0.5 * (
        isinstance(scores[0], set) and ranks[0] in scores[0]))
    monkeypatch.setattr(labelers, "TIMES", 2)
    held_out = [SimpleNamespace(ranking=name) for name in names]
    monkeypatch.setattr(labelers, "rank", lambda taste, ranking, rng: Ranking(
        taste, [], taste if ranking in names else ranking))
    rows = labelers.five_fold(StubRun(), None, dict(zip(names, names)), list(range(7)), held_out)
    assert trained[0] == [("b", 1), ("b", 4), ("c", 2), ("c", 5)]
    assert trained[2] == [("a", 0), ("a", 3), ("a", 6), ("b", 1), ("b", 4)]
    for row, name in zip(rows, names):
        assert row == {"left out": name, "seen": 1.0, "unseen": 0.5, "agreement": 0.5}
