"""Tests of InstructGPT's steps: toy_labelers.py, demonstrations.py, train_sft.py, rankings.py, and
what they add to ppo.py and train_rl.py. Two ways to compute a number agree to 1e-9 in float64."""
import copy
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import demonstrations
import evaluate
import pipeline
import rankings
import toy
import toy_labelers
import toy_people
import train_lm
import train_rl
import train_sft
from data import ASSISTANT, HUMAN, in_test
from demonstrations import Demonstration, Example, as_prompt, read_demonstrations
from helpers import (CFG, END, END_OF_CONTEXT, StubRun, doubled, exact_logits, exact_score, flat,
                     float64, max_difference, random_prompts, shaken)
from model import GPT
from pm import ScalarModel, score_rows
from ppo import PPOConfig, move_average
from rankings import Element, Ranking, RMConfig, read_rankings
from run import UserError, load
from test_commands import assert_one_sentence, call, lines, shrink  # noqa: F401 (a fixture)
from test_pm import StubStage
from test_ppo import OPEN, gradients, recorded, some_experience, world  # noqa: F401 (a fixture)
from test_run import CONFIGS, Killed, content, die_at_a_new_write


def words_tok():
    """One id for each character of a prompt or a reply; a reply ends with END."""
    return SimpleNamespace(end_of_context=END_OF_CONTEXT, end_of_turn=END,
                           encode_dialogue=lambda text: [ord(c) % 9 for c in text],
                           encode_reply=lambda text: [ord(c) % 9 for c in text] + [END])


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- 1. Labelers -------------------------------------------------------------


def test_prompts_of_all_sources_and_their_held_out_questions():
    rng, seen = random.Random(0), Counter()
    for n in range(1200):
        prompt, kind, source = toy_labelers.draw_prompt(rng, held_out=n % 2 == 0)
        seen[source, kind] += 1
        questions = [turn.split(ASSISTANT)[0].strip() for turn in prompt.split(HUMAN)[1:]]
        assert toy.understand(prompt) and (source == "user" or kind == "helpful")
        if source != "user":
            asked = [toy_people.is_held_out([question]) for question in questions]
            assert asked == [False] * (len(asked) - 1) + [n % 2 == 0]
            assert len(set(questions)) == len(questions) == (3 if source == "few-shot" else 1)
        if source == "few-shot":  # the examples are right, and of the skill that is asked for
            requests = [toy.understand(f"{HUMAN} {q}{ASSISTANT}") for q in questions]
            assert len({request.skill.name for request in requests}) == 1
            for request in requests[:2]:
                assert f" {request.answer}.{HUMAN}".lower() in prompt.lower()
    total = sum(seen.values())
    for source, weight in toy_labelers.SOURCES.items():
        found = sum(n for (name, _), n in seen.items() if name == source) / total
        expected = weight / sum(toy_labelers.SOURCES.values())
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / total), source
    assert seen["user", "harmless"] > 150


def test_labelers_are_good_but_not_perfect_and_have_styles():
    rng = random.Random(1)
    found = [toy_labelers.demonstrate(rng, held_out=False) for _ in range(4000)]
    rates = {}
    for name in toy_labelers.LABELERS:
        own = [d for d in found if d.labeler == name]
        judged = [toy.judge(d.prompt, d.reply) for d in own]
        polite, idle = (sum(getattr(j, what) > 0 for j in judged) / len(own)
                        for what in ("polite", "idle"))
        rates[name] = toy.rates([d.prompt for d in own], [d.kind for d in own],
                                [d.reply for d in own]) | {"polite": polite, "idle": idle}
    correct = [rates[name]["correct"] for name in rates]
    assert abs(sum(correct) / len(correct) - 0.75) < 0.04  # 4 standard errors of 2,900 answers
    assert rates["courteous"]["polite"] > rates["brief"]["polite"] + 0.4
    assert rates["talkative"]["idle"] > rates["courteous"]["idle"] + 0.3
    assert rates["cautious"]["complied"] + 0.2 < rates["hasty"]["complied"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_pair_of_a_ranking_is_bradley_terry(temperature):
    prompt, rng, n = f"{HUMAN} What is the color of snow?{ASSISTANT}", random.Random(2), 3000
    replies = [" White.", " I do not know.", " Black.", " Sure! White."]
    wins = Counter()
    for _ in range(n):
        ranks = toy_labelers.rank(prompt, replies, "helpful", rng, temperature)
        assert sorted(ranks) == [1, 2, 3, 4]
        for i in range(4):
            for j in range(i):
                wins[i, j] += ranks[i] < ranks[j]
    for (i, j), won in wins.items():
        p = toy.preference(prompt, replies[i], replies[j], "helpful", temperature)
        assert abs(won / n - p) < 4 * math.sqrt(p * (1 - p) / n), (i, j)


# ---- 2. Files ----------------------------------------------------------------

DIALOGUE = f"{HUMAN} Hi{ASSISTANT} Hello.{HUMAN} Bye{ASSISTANT}"


def test_prompts_and_demonstrations_of_a_file(tmp_path):
    assert as_prompt(" Say hi. \n", "x:1") == f"{HUMAN} Say hi.{ASSISTANT}"
    assert as_prompt(DIALOGUE + " ", "x:1") == DIALOGUE
    rows = [{"prompt": f"Say {n}.", "reply": f"{n}\n", "labeler": "<b>"} for n in range(60)]
    rows += [{"prompt": "a", "reply": " "}, {"prompt": "a", "reply": f"b{HUMAN} c"}]
    rows += [{"prompt": DIALOGUE, "reply": "\ud83d", "kind": "harmless"}]
    path, parts = write(tmp_path / "d.jsonl", rows), []
    for split in ("train", "test"):
        found, counts = read_demonstrations(path, split)
        assert counts["read"] == 63 == sum(counts.values()) - 63 and counts["kept"] == len(found)
        assert counts["empty reply"] == counts["turns in the reply"] == 1
        parts += found
    assert len(parts) == 61 and Demonstration(DIALOGUE, " ?", "harmless") in parts
    assert Demonstration(f"{HUMAN} Say 7.{ASSISTANT}", " 7") in parts
    demonstrations.write(tmp_path / "w.jsonl", parts)
    assert demonstrations.read_written(tmp_path / "w.jsonl") == parts


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a"}, "no text in the field 'reply'"), ({"reply": "a"}, "in the field 'prompt'"),
    ({"prompt": " ", "reply": "a"}, "the prompt is empty"),
    ({"prompt": f"a{ASSISTANT}", "reply": "a"}, "must begin with"),
    ({"prompt": f"{HUMAN} a", "reply": "a"}, "and end with")])
def test_a_demonstration_that_cannot_be(tmp_path, row, words):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "reply": "b"}, row])
    with pytest.raises(UserError, match=f"d.jsonl:2: .*{words}"):
        read_demonstrations(path, "train")
    with pytest.raises(UserError, match="no usable held-out demonstration .read 1, kept 0"):
        read_demonstrations(write(path, [{"prompt": "a", "reply": ""}]), "test")
    with pytest.raises(UserError, match="d.jsonl:1: not written by train_sft.py"):
        demonstrations.read_written(path)


def test_examples_begin_where_the_reply_does(capsys):
    found = [Demonstration("p" * 5, "abc"), Demonstration("q" * 60, "de"),
             Demonstration("r", "f" * 50)]
    examples = demonstrations.encode(words_tok(), found, context=40)
    assert examples[0] == Example([ord("p") % 9] * 5 + [ord(c) % 9 for c in "abc"] + [END], 5)
    assert len(examples[1].ids) == 40 and examples[1].start == 37  # the prompt lost its beginning
    assert len(examples) == 2 and "dropped 1 of 3" in capsys.readouterr().out
    with pytest.raises(UserError, match="no demonstration fits a context of 40"):
        demonstrations.encode(words_tok(), found[2:], context=40)


def ranked(**change) -> dict:
    return {"prompt": "Say hi.", "replies": ["a", "b", "c"], "ranks": [2, 1, 2]} | change


def test_rankings_of_a_file_and_their_pairs(tmp_path, capsys):
    rows = [ranked(), ranked(replies=["a", "a ", " "], ranks=[1, 1, 2]), ranked(ranks=[7, 7, 7]),
            ranked(replies=["a"], ranks=[1]), ranked(replies=["x", f"y{HUMAN} z", "z", "z"],
                                                     ranks=[1, 2, 3, 3], utilities=[3, 2, 1, 1]),
            ranked(replies=["x", "y" * 99], ranks=[1, 2])]
    found, counts = read_rankings(write(tmp_path / "r.jsonl", rows))
    assert found[0] == Ranking(f"{HUMAN} Say hi.{ASSISTANT}", [" a", " b", " c"], [2, 1, 2])
    assert found[2].replies == [" x", " z"] and found[2].utilities == [3, 1]
    assert counts == Counter(read=16, kept=10) + Counter({
        "repeated reply": 2, "empty or unfinished reply": 1, "turns in the reply": 1,
        "nothing to compare with": 2})
    elements = rankings.encode(StubRun(tok=words_tok()), found)
    assert [element.pairs for element in elements] == [[(1, 0), (1, 2)], [(0, 1)]]
    assert "2 rankings, 3 pairs; left out: 4 ties and 1 rankings" in capsys.readouterr().out
    prompt = [ord(c) % 9 for c in found[0].prompt]
    assert elements[0].rows[1] == prompt + [ord(c) % 9 for c in " b"] + [END, END_OF_CONTEXT]
    assert rankings.length(elements[0]) == len(prompt) + 1 + 3 * 3
    write(tmp_path / "r.jsonl", [ranked(replies=["a", " a", "b "])])
    own, _ = read_rankings(tmp_path / "r.jsonl", as_is=True)
    assert own[0].replies == ["a", " a", "b "]  # a model's replies, of which two differ by a space
    alone = rankings.one_by_one(elements)
    assert [e.pairs for e in alone] == [[(0, 1)]] * 3
    assert alone[1].rows == [elements[0].rows[1], elements[0].rows[2]]
    pair = rankings.as_comparison(found[2], 0, 1)
    assert (pair.chosen, pair.rejected, pair.p_chosen) == (" x", " z", 1 / (1 + math.exp(-2)))
    with pytest.raises(UserError, match="no ranking is left to learn from"):
        rankings.encode(StubRun(tok=words_tok()), found[1:2])


@pytest.mark.parametrize("change, words", [
    ({"prompt": 3}, "no text in the field 'prompt'"), ({"replies": "ab"}, "is not a list of texts"),
    ({"replies": ["a", 2, "c"]}, "is not a list of texts"), ({"ranks": [1, 2]}, "3 .* but 2 ranks"),
    ({"ranks": [1, 2, True]}, "whole numbers"), ({"ranks": [1, 2, 2.5]}, "whole numbers"),
    ({"utilities": [1, 2]}, "not a list of 3 numbers"), ({"utilities": [1, 2, "3"]}, "3 numbers"),
    ({"replies": ["a", "b", " a"], "ranks": [1, 2, 3]}, "one reply has both ranks 1 and 3")])
def test_a_ranking_that_cannot_be(tmp_path, change, words):
    with pytest.raises(UserError, match=f"r.jsonl:2: .*{words}"):
        read_rankings(write(tmp_path / "r.jsonl", [ranked(), ranked(**change)]))


# ---- 3. Losses ---------------------------------------------------------------


@pytest.fixture
def policy() -> GPT:
    torch.manual_seed(0)
    return doubled(shaken(GPT(CFG), 1, size=3)).eval()


def examples() -> list[Example]:
    rows = [row for row in random_prompts(9, 5) if len(row) > 2]
    return [Example(row, 1 + n % (len(row) - 1)) for n, row in enumerate(rows)]


def test_the_loss_is_that_of_the_replys_tokens(policy, monkeypatch):
    found, total, n = examples(), 0.0, 0
    for example in found:
        logp = exact_logits(policy, example.ids).log_softmax(-1)
        for t in range(example.start, len(example.ids)):
            total -= logp[t - 1, example.ids[t]]
            n += 1
    assert max_difference(train_sft.reply_loss(policy, found, "cpu"), total) < 1e-9
    monkeypatch.setattr(train_sft, "tokens_at_once", lambda budget, device: 25)
    assert train_sft.mean_reply_loss(policy, found, "cpu") == pytest.approx(total.item() / n)
    texts, weight = random_prompts(6, 7, longest=9) + [[1, 2]], 0.3
    texts = [row for row in texts if len(row) > 1]
    monkeypatch.setattr(train_lm, "tokens_at_once", lambda budget, device: 25)
    mean = train_sft.add_gradients(policy, found, 1 - weight, "cpu")
    text = train_sft.add_text_gradients(policy, texts, weight, "cpu")
    found_gradient = gradients(policy)
    policy.zero_grad()
    expected = train_lm.lm_loss(policy, texts, "cpu") / sum(len(row) - 1 for row in texts)
    reply = train_sft.reply_loss(policy, found, "cpu") / n
    ((1 - weight) * reply + weight * expected).backward()
    assert mean == pytest.approx(reply.item()) and text.item() == pytest.approx(expected.item())
    assert max_difference(found_gradient, gradients(policy)) < 1e-9


def test_dropout_is_off_unless_training(policy):
    ids = torch.tensor([[1, 2, 3, 4]])
    before = policy(ids)
    torch.manual_seed(3)
    unused = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(policy.train()(ids), before) and torch.equal(torch.rand(1), unused)
    for block in policy.blocks:
        block.dropout = 0.5
    first, second = policy(ids), policy(ids)
    assert not torch.equal(first, second) and torch.equal(policy.eval()(ids), before)


def test_epochs_that_are_kept_and_the_learning_rate():
    assert [e for e in range(1, 17) if train_sft.is_kept(e, 16)] == [1, 2, 4, 8, 16]
    assert [e for e in range(1, 7) if train_sft.is_kept(e, 6)] == [1, 2, 4, 6]
    rates = [train_sft.cosine_to_a_tenth(2.0, x) for x in (0, 0.5, 1)]
    assert rates == pytest.approx([2.0, 1.1, 0.2])


def test_all_pairs_of_a_prompt_are_averaged_and_each_reply_is_read_once():
    """IG Eq. 1, for prompts with 2 and with 4 replies in one batch."""
    torch.manual_seed(0)
    pm = doubled(shaken(ScalarModel(GPT(CFG)), 2, size=3))
    found, expected = [], []
    for seed, K in ((0, 4), (1, 2)):
        rows = [[1, 2, 3] + row for row in random_prompts(K, seed, longest=7)]
        pairs = [(i, j) for i in range(K) for j in range(K) if (i * 7 + 3) % 5 < (j * 7 + 3) % 5]
        found.append(Element(rows, pairs, None))
        scores = [exact_score(pm, row) for row in rows]
        losses = [math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs]
        expected.append(sum(losses) / len(losses))
    assert [len(element.pairs) for element in found] == [6, 1]
    losses = rankings.element_losses(pm, found, "cpu")
    assert max_difference(losses.detach(), float64(expected)) < 1e-9


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_step_of_the_rm_in_pieces(shuffled):
    """The first gradient, against one that is written out: the mean over the batch's elements."""
    torch.manual_seed(0)
    pm, stage = doubled(shaken(ScalarModel(GPT(CFG)), 2)), StubStage()
    stage.name, elements = "rm", []
    for seed in range(4):
        rows = [[seed] + row for row in random_prompts(3, seed, longest=9)]
        elements.append(Element(rows, [(0, 1), (0, 2), (2, 1)][:2 + seed % 2], None))
    copied, cfg = copy.deepcopy(pm), RMConfig(batch=4, token_budget=30, max_grad_norm=1e9,
                                              shuffled=shuffled)
    rankings.fit(StubRun(), stage, cfg, pm, elements)
    losses = rankings.element_losses(copied, elements, "cpu")
    if shuffled:  # each pair counts alike, wherever it comes from; as many steps as before
        n_pairs = torch.tensor([len(element.pairs) for element in elements])
        losses = losses * n_pairs * 4 / n_pairs.sum()
    assert [line["loss"] for line in stage.lines] == pytest.approx([losses.mean().item()])
    optimizer = torch.optim.AdamW(copied.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0)
    losses.mean().backward()
    optimizer.step()
    assert max_difference(flat(pm.parameters()), flat(copied.parameters())) < 1e-9


# ---- 4. PPO ------------------------------------------------------------------


def test_ptx_adds_the_gradient_of_text_to_each_step(world, monkeypatch):
    """gamma x the LM loss, in the policy only; and the optimizer takes as many steps as before."""
    cfg, texts, gamma = PPOConfig(minibatch=9, **OPEN), [[1, 2, 3], [4, 5, 6, 7, 8]], 2.5
    ex, calls, update = some_experience(world, cfg), [], train_rl.update
    plain, numbers = recorded(world, cfg, ex)

    def with_text(policy, *rest):
        def add_text(n, step):
            calls.append((n, step))
            return train_sft.add_text_gradients(policy, texts, gamma, "cpu")
        return update(policy, *rest, add_text)
    monkeypatch.setattr("test_ppo.update", with_text)
    mixed, mixed_numbers = recorded(world, cfg, ex)
    policy = copy.deepcopy(world.policy)
    loss = train_lm.lm_loss(policy, texts, "cpu") / 6
    (gamma * loss).backward()
    text = torch.cat([gradients(policy), torch.zeros(gradients(mixed.nets[1]).shape)])
    assert calls == [(9, 0), (9, 1), (6, 2)] and len(plain.steps) == len(mixed.steps) == 3
    for one, two in zip(plain.steps, mixed.steps):
        assert max_difference(one + text, two) < 1e-9 and text.norm() > 0.1
    assert mixed_numbers["ptx_loss"] == pytest.approx(loss.item()) and "ptx_loss" not in numbers


def test_the_average_follows_the_weights(policy):
    other = shaken(policy, 9)
    expected = 0.9 * flat(policy.parameters()) + 0.1 * flat(other.parameters())
    move_average(policy, other, 0.9)
    assert max_difference(flat(policy.parameters()).detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("keep_head", [False, True])
def test_the_critic_starts_as_the_papers_say(policy, keep_head):
    torch.manual_seed(1)
    pm, rows = shaken(ScalarModel(GPT(CFG)), 3), random_prompts(5, 1)
    pm.mean += 0.3
    learner = train_rl.Learner(StubRun(), train_rl.RLConfig(keep_head=keep_head), policy, pm)
    found, expected = score_rows(learner.critic, rows), score_rows(pm, rows)
    assert torch.equal(found, expected if keep_head else torch.zeros(5))
    assert learner.critic.head.weight.requires_grad and learner.result is learner.policy
    assert learner.average is None and learner.text is None  # HH: neither ptx nor an average
    learner_with = train_rl.Learner(StubRun(), train_rl.RLConfig(ema=0.5), policy, pm)
    assert learner_with.result is learner_with.average is not policy
    with torch.no_grad():
        learner.critic.head.bias += 1
    assert torch.equal(score_rows(pm, rows), expected)


# ---- 5. The commands ---------------------------------------------------------

OPTIONS = ("--preset instructgpt --lm.documents 120 --lm.step-tokens 512 --lm.vocab 500 "
           "--sft.demonstrations 40 --sft.test 12 --sft.epochs 3 --sft.batch 8 --rm.prompts 14 "
           "--rm.test 8 --rm.batch 4 --rm.max-response 60 --select.max-response 12 "
           "--rl.iterations 3 --rl.batch 8 --rl.minibatch 4 --rl.eval-prompts 6 --rl.eval-every 2 "
           "--rl.save-every 2 --rl.max-response 12").split()
OF_SFT = {name: CONFIGS[name] for name in ("run", "lm", "sft")}
OF_RM = {name: CONFIGS[name] for name in ("run", "lm", "sft", "rm", "select")}
OF_RL = {name: config for name, config in CONFIGS.items() if name not in ("online", "elo")}
SCRIPTS = {"train_rl.py": (train_rl.command, OF_RL), "rankings.py": (rankings.command, OF_RM),
           "train_sft.py": (train_sft.command, OF_SFT)}


def options_of(script: str) -> list[str]:
    """OPTIONS, without those that a script does not know."""
    given = []
    for name, value in zip(OPTIONS[::2], OPTIONS[1::2]):
        if "." not in name or name[2:].split(".")[0] in SCRIPTS[script][1]:
            given += [name, value]
    return given


def execute(script: str, out: Path, *args) -> int:
    command, configs = SCRIPTS[script]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(sys, "argv", [script, "--device", "cpu", "--out", str(out),
                                    *options_of(script), *map(str, args)])
        try:
            pipeline.main(command, "A stage.", **configs)
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """All five stages (seconds, once). Nothing may write there."""
    out = tmp_path_factory.mktemp("instructgpt") / "whole"
    assert execute("train_rl.py", out) == 0
    return out


def opened(out: Path, monkeypatch):
    shrink(monkeypatch)
    return evaluate.open_run(str(out), "cpu")[0]


def test_what_a_run_leaves(whole, monkeypatch, capsys):
    run = opened(whole, monkeypatch)
    pm, models = run.load_model("pm.pt"), train_sft.load_epochs(run)
    assert list(models) == [1, 2, 3]
    # The bias: the labelers' demonstrations score 0 on average.
    found = demonstrations.read_written(train_sft.written(run, "train"))
    rows = []
    for demonstration in found:
        text = demonstration.prompt + demonstration.reply
        rows.append(run.tok.encode_dialogue(text) + [run.tok.end_of_context])
    scores = score_rows(pm, rows)
    assert len(found) == 40 and abs(scores.mean().item()) < 1e-5 < scores.std().item()
    # The initial policy is the epoch with the best RM score.
    tried = lines(whole, "select")
    best = max(tried, key=lambda line: line["rm_score"])["step"]
    assert [line["step"] for line in tried] == [1, 2, 3]
    assert load(whole / "initial.pt")["epoch"] == best
    initial = run.load_model("initial.pt").state_dict()
    assert all(map(torch.equal, initial.values(), models[best].state_dict().values()))
    last = run.load_model("sft.pt").state_dict()
    assert all(map(torch.equal, last.values(), models[3].state_dict().values()))
    losses = [line["test_loss"] for line in lines(whole, "sft") if "test_loss" in line]
    assert losses == pytest.approx([line["loss"] for line in tried], abs=1e-5)
    assert len(set(losses)) == 3
    assert all("ptx_loss" in line for line in lines(whole, "rl") if "policy_loss" in line)
    # The same tools as for HH read the folder.
    evaluate.command(str(whole), "initial.pt", "policy.pt", "cpu")
    assert "KL to the initial policy" in capsys.readouterr().out
    page = (whole / "report.html").read_text()
    assert "2. SFT: loss" in page and "4. PM: held-out accuracy" in page


def test_rankings_are_of_the_kept_epochs_replies(whole, monkeypatch):
    found, counts = read_rankings(whole / "rankings/train.jsonl", as_is=True)
    assert 2 < len(found) <= 14 and counts["kept"] == counts["read"]
    for ranking in found:
        assert 2 <= len(set(ranking.replies)) == len(ranking.replies) <= 9
        assert sorted(ranking.ranks) == list(range(1, len(ranking.replies) + 1))
        expected = [toy.truth(ranking.prompt, r, ranking.kind) for r in ranking.replies]
        assert ranking.utilities == expected
    prompts = {ranking.prompt for ranking in found}
    assert not prompts & {ranking.prompt for ranking in read_rankings(
        whole / "rankings/test.jsonl", as_is=True)[0]}
    run, asked, real = opened(whole, monkeypatch), [], rankings.rollout

    def rollout(policy, ids, *rest):
        ro = real(policy, ids, *rest)
        answers = []
        for prompt, response, is_done in zip(ids, ro.responses(), ro.finished.tolist()):
            if is_done:
                answers.append((prompt, run.tok.decode(response)))
        asked.append((policy, ids, answers))
        return ro
    monkeypatch.setattr(rankings, "rollout", rollout)
    found = rankings.sample(run, RMConfig(max_response=60), "train", 14)
    assert len({id(policy) for policy, _, _ in asked}) == len(asked) == 3
    assert all(4 <= ids.count(prompt) for _, ids, _ in asked for prompt in ids)
    answers = [pair for _, _, pairs in asked for pair in pairs]
    for ranking in found:  # each reply was given to its own prompt, and is a whole one
        prompt = run.tok.encode_dialogue(ranking.prompt)
        assert all((prompt, reply) in answers for reply in ranking.replies)
    asked.clear()
    rankings.sample(run, RMConfig(max_response=60), "train", 2)  # a model without a prompt
    assert len(asked) == 2


def with_lm(whole: Path, out: Path) -> Path:
    """A folder in which stage 1 is complete."""
    out.mkdir()
    for name in ("lm.pt", "tokenizer.json"):
        (out / name).write_bytes((whole / name).read_bytes())
    return out


def without_lm(found: dict) -> dict:
    """What `content` found, without the lines and options of stage 1."""
    own = [line for line in found["metrics.jsonl"] if line["stage"] != "lm"]
    config = {name: x for name, x in json.loads(found["config.json"]).items() if name != "lm"}
    return found | {"metrics.jsonl": own, "config.json": config}


def test_killed_at_each_write_and_resumed(whole, tmp_path, capsys):
    """At the results, the sampled files and the states of the stages after the first; test_commands
    has the rest. (Many seconds: each of some fifteen lives reads or samples its data again.) An
    interrupted PPO refuses another γ."""
    out, deaths, refusals = with_lm(whole, tmp_path / "killed"), 0, 0
    seen = {str(out / name) for name in ("config.json", "metrics.jsonl", "record.jsonl")}
    for stage in pipeline.INSTRUCTGPT:
        seen.add((str(out / f"{stage}_state.pt"), None))
        seen |= {(str(out / f"{stage}_state.next.pt"), step) for step in range(99)}
    while True:
        with pytest.MonkeyPatch.context() as patch:
            die_at_a_new_write(patch, seen, before_odd=False)
            try:
                assert execute("train_rl.py", out, "--resume") == 0
                break
            except Killed:
                deaths += 1
        if (out / "rl_state.pt").exists() and "step" in load(out / "rl_state.pt") and not refusals:
            capsys.readouterr()
            assert execute("train_rl.py", out, "--resume", "--rl.ptx-coef", 3) == 2
            assert "--rl.ptx-coef was 0.1, now 3.0" in capsys.readouterr().err
            refusals += 1
    assert deaths > 12 and refusals == 1
    assert without_lm(content(out)) == without_lm(content(whole))


def test_step_by_step_is_the_same_run_and_gamma_0_is_plain_ppo(whole, tmp_path):
    """The commands one after another (seconds). Then γ = 0 and no average, on the same models:
    nothing that PPO-ptx adds is even asked."""
    out = with_lm(whole, tmp_path / "out")
    for script in ("train_sft.py", "rankings.py", "train_rl.py"):
        assert execute(script, out) == 0
    assert without_lm(content(out)) == without_lm(content(whole))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PretrainingText", "add_text_gradients"):
            patch.delattr(train_rl, name)
        patch.delattr("ppo.move_average")
        assert execute("train_rl.py", out, "--rl.ptx-coef", 0, "--rl.ema", 0) == 0
    start, average, plain = (load(path)["model"]["embed.weight"] for path in (
        out / "initial.pt", whole / "policy.pt", out / "policy.pt"))
    # After 6 steps the average with a decay of 0.992 holds at most 0.048 of what was learned.
    assert 0 < (average - start).norm() < 0.2 * (plain - start).norm()
    assert not any("ptx_loss" in line for line in lines(out, "rl"))


@pytest.mark.parametrize("args, words", [
    ("--paper hh", "--preset instructgpt contradicts --paper hh"),
    ("--paper gpt", "--paper gpt: choose hh or instructgpt"),
    ("--model-prompts 0.5", "--model-prompts needs comparisons"),
    ("--cd.documents 5", "--cd.documents has no effect with --paper instructgpt"),
    ("--preset tiny --paper instructgpt", "--cd.documents has no effect"),
    ("--preset tiny --sft.epochs 3", "--sft.demonstrations has no effect with --paper hh"),
    ("--select.by luck", "--select.by luck: choose"),
    ("--sft.pretraining 1", "--sft.pretraining 1 leaves nothing"),
    ("--sft.dropout 1", "--sft.dropout 1 leaves nothing"),
    ("--rl.ema 1", "--rl.ema 1.0 keeps"),
    ("--rm.least 1", "--rm.least 1 --rm.most 9: a labeler ranks at least 2"),
    ("--rm.least 5 --rm.most 4", "--rm.least 5 --rm.most 4"),
    ("--rm.max-response 185", "--rm.max-response 185 leaves no room"),
    ("--sft.data none.jsonl", "none.jsonl does not exist"),
    ("--rm.data none.jsonl", "none.jsonl does not exist"),
    ("--data {}", "needs --sft.data on real data")])
def test_options_that_cannot_be(tmp_path, capsys, args, words):
    rows = [{"chosen": f"{HUMAN} a{n}{ASSISTANT} b", "rejected": f"{HUMAN} a{n}{ASSISTANT} c"}
            for n in range(40)]
    path = write(tmp_path / "real.jsonl", rows)
    assert execute("train_rl.py", tmp_path / "out", *args.format(path).split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and not (tmp_path / "out").exists()


def test_hhs_commands_refuse_the_other_papers_stages(call, tmp_path):
    for script in ("train_lm.py", "train_pm.py"):
        result = call(script, "--paper", "instructgpt", "--out", tmp_path / "out")
        assert_one_sentence(result, "--paper instructgpt has no stage 'cd'")
    assert execute("train_sft.py", tmp_path / "out", "--preset", "", "--paper", "hh") == 2


def test_peoples_demonstrations_and_rankings(whole, tmp_path, capsys):
    """Files in place of the scripted labelers, in the toy's folder; stage 1 is there."""
    out = with_lm(whole, tmp_path / "out")
    shown = [{"prompt": f"Say {n}.", "reply": f"{n}."} for n in range(80)]
    judged = [ranked(prompt=f"Say {n}.", replies=[f"{n}.", f"{n + 1}.", f"{n}."], ranks=[1, 2, 1])
              for n in range(80)]
    args = ["--sft.data", write(tmp_path / "d.jsonl", shown),
            "--rm.data", write(tmp_path / "r.jsonl", judged)]
    assert execute("train_rl.py", out, *args) == 0
    said = capsys.readouterr().out
    assert "read 80, kept 7" in said and "dropped 80 (repeated reply 80)" in said
    assert "true helpfulness" not in said[said.index("[4]"):said.index("[5]")]  # unknown questions
    before = content(out)
    for wrong in (judged[:1], [judged[1]]):  # a split is empty: nothing is begun
        write(tmp_path / "r.jsonl", wrong)
        assert execute("rankings.py", out, *args) == 2
        assert "one prompt in sixteen is held out" in capsys.readouterr().err
        assert content(out) == before


def test_data_that_a_later_stage_needs_is_missed_early(tmp_path):
    """Stage 5 evaluates on held-out comparisons. A Mac's random numbers are not restored."""
    folder = tmp_path / "real" / "helpful-base"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", [{"chosen": f"{HUMAN} a{ASSISTANT} b",
                                    "rejected": f"{HUMAN} a{ASSISTANT} c"}])
    shown = [{"prompt": f"Say {n}.", "reply": f"{n}."} for n in range(60)]
    judged = [ranked(prompt=f"Say {n}.", replies=[f"{n}.", "No."], ranks=[1, 2]) for n in range(60)]
    sft = train_sft.SFTConfig(data=str(write(tmp_path / "d.jsonl", shown)))
    rm = RMConfig(data=str(write(tmp_path / "r.jsonl", judged)))
    options = pipeline.RunConfig(data=str(folder.parent), paper="instructgpt", context=96,
                                 recompute=True, out=str(tmp_path / "out"))
    for room, n_checks in ((0, 0), (32, 1)):
        run = pipeline.Run(options)
        rankings.check_early(run, sft, rm, train_sft.SelectConfig(), room)
        assert len(run.checks) == n_checks
    for is_held_out in (False, True):
        one = [row for row in judged if in_test(Ranking(as_prompt(row["prompt"], ""), [], []))
               == is_held_out][:1]
        other = RMConfig(data=str(write(tmp_path / "one.jsonl", one)))
        with pytest.raises(UserError, match="one prompt in sixteen is held out"):
            rankings.check_early(run, sft, other, train_sft.SelectConfig(), 0)
    run.tok = words_tok()
    with pytest.raises(UserError, match="no test comparisons at"):
        run.checks[0]()
    run.device = torch.device("mps")
    with pytest.raises(UserError, match="--recompute with dropout gives wrong gradients on mps"):
        train_sft.check_early(run, sft, train_sft.SelectConfig())


def test_a_stage_is_resumed_with_the_comparisons_that_it_began_with(tmp_path):
    for subset in ("harmless-base", "helpful-base"):
        (tmp_path / "real" / subset).mkdir(parents=True)
        for name in ("train.jsonl.gz", "test.jsonl", "notes.txt"):
            (tmp_path / "real" / subset / name).touch()
    folder = tmp_path / "real" / "helpful-base"
    assert len(pipeline.data_files(tmp_path / "real")) == 4
    assert pipeline.data_files(folder / "notes.txt") == [folder / "notes.txt"]
    run = pipeline.Run(pipeline.RunConfig(data=str(tmp_path / "real"), subsets="helpful-base",
                                          out=str(tmp_path / "out")))
    own = tmp_path / "own.jsonl"
    own.touch()
    stage = run.begin("lm", train_lm.LMConfig(), data=[own])
    assert stage.data == [folder / "test.jsonl", folder / "train.jsonl.gz", own]
    stage.start()
    stage.end()
    for data in ((), [own]):  # a result may ask for other files besides
        assert run.reuse("lm", train_lm.LMConfig(), data=data)
    (folder / "test.jsonl").write_text("new")
    assert run.reuse("lm", train_lm.LMConfig())  # the same model is good for other data
    with pytest.raises(UserError, match="was not trained from the present"):
        run.reuse("lm", train_lm.LMConfig(), data=[own])


def test_real_data_from_files_alone(tmp_path, capsys):
    """No toy: comparisons give the text and PPO's prompts, two files the rest (many seconds)."""
    rows = [{"chosen": f"{HUMAN} Say {n}, please.{ASSISTANT} {n}.",
             "rejected": f"{HUMAN} Say {n}, please.{ASSISTANT} No."} for n in range(90)]
    shown = [{"prompt": f"Say {n}.", "reply": f"{n}."} for n in range(60)]
    judged = [ranked(prompt=f"Say {n}.", replies=[f"{n}.", "No.", "?"], ranks=[1, 2, 2])
              for n in range(60)]
    args = ["--data", write(tmp_path / "real.jsonl", rows), "--tokenizer", "bpe", "--context", 96,
            "--sft.data", write(tmp_path / "d.jsonl", shown),
            "--rm.data", write(tmp_path / "r.jsonl", judged)]
    assert execute("train_rl.py", tmp_path / "out", *args) == 0
    said = capsys.readouterr().out
    n, pairs, ties = re.search(r"(\d+) rankings, (\d+) pairs; left out: (\d+) ties", said).groups()
    assert int(pairs) == 2 * int(n) and int(ties) == int(n) > 40 and "RM score (logits)" in said
    assert any("ptx_loss" in line for line in lines(tmp_path / "out", "rl"))
