"""Tests of evaluate.py: where prompts come from, what is measured on replies, and the command."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate as module
import toy
from data import PATTERN, SINGLE_BYTES, Comparison, Tokenizer, write_comparisons
from evaluate import (
    PromptBatch, Prompts, evaluate, mean_truth, side_by_side, table, turn_table)
from helpers import StubRun, doubled, exact_response, exact_score, flat, shaken
from model import GPT, GPTConfig
from pipeline import Run, RunConfig
from pm import ScalarModel
from ppo import PPOConfig
from rollout import plain_rollout
from run import file_hash, load, save, torch_rng

TOK, OPENING = Tokenizer("bytes", PATTERN, SINGLE_BYTES), "\n\nAssistant:"


def test_toy_prompts_are_of_the_split_and_the_kinds_that_are_asked_for(monkeypatch, tmp_path):
    asked, draw_prompt = [], module.toy_corpus.draw_prompt

    def spy(rng, kind, held_out):
        asked.append((kind, held_out))
        return draw_prompt(rng, kind, held_out)
    monkeypatch.setattr(module.toy_corpus, "draw_prompt", spy)
    run = StubRun(tok=TOK, toy=True, path=tmp_path.joinpath)
    prompts = Prompts(run, 32, harmless_share=0.9)
    batch = prompts.draw(400, "train", 0, held_out=False)
    held_out = prompts.held_out(600)
    assert asked == [(k, False) for k in batch.kinds] + [(k, True) for k in held_out.kinds]
    # Shares of harmless prompts, and four standard errors of them.
    assert abs(batch.kinds.count("harmless") / 400 - 0.9) < 4 * (0.9 * 0.1 / 400) ** 0.5
    assert abs(held_out.kinds.count("harmless") / 900 - 1 / 3) < 4 * (2 / 9 / 900) ** 0.5
    assert len(held_out.texts) == 900  # about 600 of them helpful
    assert batch.ids == [TOK.encode_dialogue(text) for text in batch.texts]
    assert prompts.draw(400, "train", 0, held_out=False) == batch
    assert prompts.draw(400, "train", 1, held_out=False).texts != batch.texts
    zero = prompts.draw(50, "x", held_out=True, harmless_share=0.0)
    assert zero.kinds == ["helpful"] * 50  # 0 is a share, too


def test_toy_prompts_are_those_of_the_comparisons(tmp_path, capsys):
    """As often as they were compared, where they fit; a kind without comparisons is drawn, and so
    is what is held out."""
    run = StubRun(tok=TOK, toy=True, context=200, path=tmp_path.joinpath)
    texts = [f"\n\nHuman: {words}{OPENING}" for words in ("a", "a", "a", "b", "c" * 20)]
    room = len(TOK.encode_dialogue(texts[3]))
    run.context = room + 33
    for split in ("train", "test"):
        mark = "not " if split == "test" else ""
        pairs = [Comparison(text.replace("Human: ", f"Human: {mark}"), " yes", " no", "helpful")
                 for text in texts]
        write_comparisons(tmp_path / "comparisons" / "helpful-base" / f"{split}.jsonl", pairs)
    prompts = Prompts(run, 32, harmless_share=0.5)
    assert f"left out 1 of 5 helpful prompts, which exceed {room} tokens" in capsys.readouterr().out
    batch = prompts.draw(800, "x", held_out=False)
    helpful = [text for text, kind in zip(batch.texts, batch.kinds) if kind == "helpful"]
    assert set(helpful) == {texts[0], texts[3]}
    # Four standard errors of a share of 3/4 among some 400.
    assert abs(helpful.count(texts[0]) / len(helpful) - 3 / 4) < 4 * (3 / 16 / 400) ** 0.5
    for text, kind in zip(batch.texts, batch.kinds):
        assert kind == "helpful" or toy.understand(text).harmful
    held_out = prompts.draw(50, "y", held_out=True)
    assert all(toy.is_known(text) for text in held_out.texts)


def test_a_long_real_prompt_loses_its_beginning(tmp_path, capsys):
    """It keeps the open turn at its end. A prompt of many comparisons is one prompt."""
    for split in ("train", "test"):
        for kind in ("helpful", "harmless"):
            end, pairs = f"\n\nHuman: {split} {kind}{OPENING}", []
            for text in (end, f"\n\nHuman: long{OPENING} reply" * 9 + end):
                pairs += [Comparison(text, f" yes {i}", " no", kind) for i in range(5)]
            write_comparisons(tmp_path / f"{kind}-base" / f"{split}.jsonl", pairs)
    room = len(TOK.encode_dialogue(f"\n\nHuman: train harmless{OPENING}"))  # which just fits
    prompts = Prompts(StubRun(tok=TOK, data=tmp_path, context=room + 33), 32, harmless_share=0.0)
    assert f"4 train prompts; 2 exceed {room} tokens" in capsys.readouterr().out
    for held_out, split in ((False, "train"), (True, "test")):
        batch = prompts.draw(60, "x", held_out=held_out)
        assert len(set(batch.texts)) == 4 and prompts.draw(60, "y", held_out=held_out) != batch
        for text, kind, ids in zip(batch.texts, batch.kinds, batch.ids):
            assert ids == TOK.encode_dialogue(text)[-room:]
            assert TOK.decode(ids).endswith(f"{split} {kind}{OPENING}")
    assert all(" test " in text for text in prompts.held_out(4).texts)


def talking_nets(run) -> list[GPT]:
    """Three small networks in float64, some of whose replies end."""
    nets = []
    for seed in (1, 2, 3):
        torch.manual_seed(0)
        net = shaken(GPT(GPTConfig(1, 2, 16, TOK.n_vocab, run.context)), seed)
        with torch.no_grad():
            net.embed.weight[TOK.end_of_turn] = 2 * net.ln_f.bias
        nets.append(doubled(net).requires_grad_(False))
    return nets


def test_evaluate_measures_the_policy_that_it_is_given(monkeypatch):
    """Scores and KL(policy || reference) of known models at a temperature other than 1."""
    run = StubRun(tok=TOK, toy=True, context=512, path=Path)
    nets = talking_nets(run)
    policy, reference, pm = nets[0], nets[1], ScalarModel(nets[2]).double()
    pm.mean += 0.4
    cfg = PPOConfig(max_response=6, temperature=0.7, unfinished_penalty=1.5, token_budget=1000)
    prompts = Prompts(run, 6, 0.5).held_out(8)
    uniforms = torch.rand(12, 6, generator=torch_rng(0, "eval"))
    results = []
    for net in (policy, reference):
        ro, kl, scores = plain_rollout(net, prompts.ids, uniforms, TOK.end_of_turn, 0.7), 0.0, []
        for n, prompt in enumerate(prompts.ids):
            logp, _ = exact_response(net, prompt, ro, n, 0.7)
            ref_logp, _ = exact_response(reference, prompt, ro, n, 0.7)
            kl += (logp - ref_logp).sum().item() / 12
            row = prompt + ro.responses()[n] + [TOK.end_of_context]
            scores.append(exact_score(pm, row) - (0 if ro.finished[n] else 1.5))
        texts = [TOK.decode(response) for response in ro.responses()]
        expected = {"kl": kl, "sqrt_kl": max(kl, 0) ** 0.5, "tokens": ro.mask.sum().item() / 12,
                    "finished": ro.finished.sum().item() / 12}
        for kind in ("helpful", "harmless"):
            mine = [score for score, k in zip(scores, prompts.kinds) if k == kind]
            expected[f"score_{kind}"] = sum(mine) / len(mine)
        expected |= toy.rates(prompts.texts, prompts.kinds, texts)
        numbers, replies = evaluate(run, cfg, net, reference, pm, prompts)
        # Means of counts are in float32.
        assert replies == texts and numbers == pytest.approx(expected, abs=1e-6, nan_ok=True)
        results.append(numbers)
    assert results[0]["kl"] > 0.1 and results[1]["kl"] == 0
    assert 0 < results[0]["finished"] < 1
    assert results[0]["score_helpful"] != results[1]["score_helpful"]
    # The truth that RL logs is that of each reply under its prompt's kind.
    truths, responses = [], []
    for text, kind in zip(prompts.texts, prompts.kinds):
        reply = f" {toy.understand(text).answer}."  # right here and wrong for another prompt
        responses.append(TOK.encode(reply))
        truths.append(toy.truth(text, reply, kind))
    ro = SimpleNamespace(responses=lambda: responses)
    assert mean_truth(run, prompts, ro) == sum(truths) / 12 and len(set(truths)) > 1
    # An estimate of a KL below 0 has no root.
    monkeypatch.setattr(module, "kl_estimates", lambda logp, ref_logp: (logp - ref_logp - 1, None))
    numbers, _ = evaluate(run, cfg, reference, reference, pm, prompts)
    assert numbers["kl"] == pytest.approx(-numbers["tokens"]) and numbers["sqrt_kl"] == 0


def test_tables_by_hand():
    """Of two policies, and of their conversations by turn."""
    before, after = [], []
    for turn in range(4):
        row = {"n": 9, "helpfulness": turn, "harmlessness": 0, "correct": turn / 4, "complied": 0.5}
        before.append(row | {"refused_benign": 0.25})
        after.append(row | {"refused_benign": 0.75})
    lines = turn_table(before, after, names=("a", "b")).splitlines()
    assert [line.split()[-8:] for line in lines[1:3]] == [list("12341234"), ["9"] * 8]
    assert lines[5].split() == "correct answers 0.000 0.250 0.500 0.750".split() + [
        "0.000", "0.250", "0.500", "0.750"]
    assert lines[-1].split()[4:] == ["0.250"] * 4 + ["0.750"] * 4 and lines[0].split()[2:] == [
        "a", "b"]
    assert len({len(line) for line in lines}) == 1
    lines = table({"kl": 0.0, "tokens": 7.25}, {"kl": 2.5, "tokens": 8.0}, names=("a", "b"))
    assert [line.split() for line in lines.splitlines()] == [
        "held-out prompts a b".split(), "KL to the initial policy (nats) 0.000 2.500".split(),
        "tokens a response 7.250 8.000".split()]
    for key, word in (("complied", "compliance"), ("refused_benign", "of benign"),
                      ("score_helpful", "helpful"), ("score_harmless", "red-team")):
        assert word in module.TITLES[key]
    texts = ["\n\nHuman: p" + OPENING, f"\n\nHuman: q{OPENING} r\n\nHuman: p{OPENING}",
             "\n\nHuman: s" + OPENING, "\n\nHuman: t" + OPENING]
    prompts = PromptBatch(texts, ["harmless", "harmless", "helpful", "helpful"], [])
    replies = [" b0", " b1", " b2", " b3"], [" a0", " a1", " a2", " a3"]
    assert side_by_side(prompts, *replies, n_each=1) == (
        "Human: s\n\nAssistant:\n    initial: b2\n    RLHF:    a2\n\n"
        "Human: p\n\nAssistant:\n    initial: b0\n    RLHF:    a0\n")
    found = side_by_side(prompts, *replies)
    assert " b3" in found and " b1" not in found  # its question has been asked


@pytest.fixture
def out(tmp_path):
    """A finished run of untrained models."""
    folder = Run(RunConfig(out=str(tmp_path / "out"), context=512))
    folder.tok, initial, pmp = TOK, folder.path("initial.pt"), folder.path("pmp.pt")
    TOK.save(folder.path("tokenizer.json"))
    rl = {"max_response": 6, "eval_prompts": 4, "temperature": 0.7, "save_every": 5}
    folder.path("config.json").write_text(json.dumps({"run": folder.options, "rl": rl}))
    for seed, name in enumerate(("lm.pt", "initial.pt", "pmp.pt", "policy.pt", "pm.pt")):
        torch.manual_seed(seed)
        model = GPT(folder.model_config())
        if name.startswith("pm"):
            model = ScalarModel(model)
        parents = file_hash([initial, pmp] if name == "pm.pt" else [])
        save(folder.path(name), **folder.checkpoint(model), parents=parents)
    return tmp_path / "out"


def test_the_command_compares_two_policies(out, monkeypatch, capsys):
    monkeypatch.chdir(out.parent)
    Path("b").mkdir()
    for copy in ("elsewhere.pt", "b/policy.pt"):
        Path(copy).write_bytes((out / "policy.pt").read_bytes())
    kls, judged = [], []

    def spy(run, cfg, *rest):
        judged.append((cfg, *rest))
        return evaluate(run, cfg, *rest)
    monkeypatch.setattr(module, "evaluate", spy)
    for args, names in (((), "initial policy"), (("lm.pt", "elsewhere.pt"), "lm elsewhere"),
                        (("policy.pt", "b/policy.pt"), "first second")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), *args, "--device", "cpu"])
        module.main()
        printed = capsys.readouterr().out
        lines = {line[4:42].strip(): line[42:].split() for line in printed.splitlines()}
        assert lines["held-out prompts"] == names.split() and f"    {names.split()[1]}:" in printed
        assert max(map(float, lines["tokens a response"])) <= 6  # the run's own limit
        kls += lines["KL to the initial policy (nats)"]
    assert kls[0] == "0.000" and float(kls[1]) > 0.1 and float(kls[2]) > 0.1 and kls[3] == kls[1]
    # The run's own options and judges, whichever policies are compared.
    for cfg, _, reference, pm, prompts in judged:
        assert (cfg.max_response, cfg.temperature, len(prompts.ids)) == (6, 0.7, 6)
        for name, model in (("initial.pt", reference), ("pm.pt", pm)):
            saved = load(out / name)["model"].values()
            assert torch.equal(flat(saved), flat(model.state_dict().values()))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), "--device", "abacus"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "--device abacus is not available" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, message", [
    ("config.json", None, "is not the output folder of a run: it has no config.json"),
    ("config.json", b"{", "is not a config of this project"),
    ("config.json", b"{}", "does not hold the options of a run"),
    ("config.json", b'{"run": {"x": 1}}', "does not hold the options of a run"),
    ("tokenizer.json", None, "tokenizer.json does not exist"),
    ("policy.pt", None, "does not exist"), ("policy.pt", b"PK", "is not a checkpoint"),
    ("policy.pt", {}, "was trained with another tokenizer"),
    ("policy.pt", {"tokenizer": TOK.fingerprint}, "does not hold a language model"),
    ("policy.pt", {"tokenizer": TOK.fingerprint, "model": {}}, "does not hold a language model"),
    ("initial.pt", {"tokenizer": TOK.fingerprint}, "pm.pt was not trained from the present")])
def test_a_broken_folder_gives_one_sentence(out, monkeypatch, capsys, name, content, message):
    (out / name).unlink()
    if isinstance(content, dict):
        save(out / name, **content)
    elif content is not None:
        (out / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out)])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
