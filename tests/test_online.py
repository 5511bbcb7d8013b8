"""Tests of the weekly round: train_online.py, tournament.py, prompts.py, and the players."""
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prompts as writing
import train_online
import train_rl
from choices import choice_record
from collect import BestOf
from conversation import Speaker
from data import ASSISTANT, HUMAN
from evaluate import Prompts, open_run
from model import GPT
from pm import ScalarModel
from ppo import PPOConfig, pm_scores
from rollout import Sampler
from run import UserError, load, save
from tournament import ratings, show
from test_commands import (  # noqa: F401, fixtures among them
    assert_one_sentence, call, call_small, copy, execute, lines, small, trained)
from test_run import Killed, content, die_at_a_new_write
from helpers import CFG, END, R, StubRun, flat, random_prompts, random_uniforms, shaken

ELO = 400 / math.log(10)

# ---- 1. Rounds ---------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rounds(trained, tmp_path_factory):
    """The tiny run after two rounds (seconds, once). Nothing may write there: copy."""
    out = tmp_path_factory.mktemp("online") / "out"
    shutil.copytree(trained[0], out)
    assert execute("train_online.py", *small("train_online.py", out)) == 0
    return out


@pytest.fixture
def again(two_rounds, tmp_path) -> Path:
    return Path(shutil.copytree(two_rounds, tmp_path / "out"))


def pairs_in(out: Path, split: str = "train") -> dict[str, bytes]:
    """{tranche: the bytes of its file}."""
    paths = out.glob(f"comparisons/*/{split}.jsonl")
    return {path.parent.name: path.read_bytes() for path in paths}


def test_each_round_learns_from_all_tranches_so_far(two_rounds, call_small):
    base = [f"{kind}-base" for kind in ("helpful", "harmless")]
    rs = [name.replace("base", "rs") for name in base]
    online = [name.replace("base", "online-2") for name in base]
    one, two = (two_rounds / "online" / f"round-{k}" for k in (1, 2))
    for split in ("train", "test"):
        of_base, of_one, of_two = (pairs_in(out, split) for out in (two_rounds, one, two))
        assert set(of_base) == {*base} and set(of_one) == {*base, *rs}
        assert set(of_two) == {*base, *rs, *online}
        assert of_base.items() <= of_one.items() <= of_two.items()
        assert len(set(of_two.values())) == 6  # no tranche is another's copy
    for out, tranche, most in ((one, rs, 33), (two, online, 33)):
        new = sum(pairs_in(out)[name].count(b"\n") for name in tranche)
        assert lines(out, "online")[0]["new"] == new and 10 < new <= most
        assert {path.name for path in out.glob("*.pt")} == {
            "lm.pt", "initial.pt", "pmp.pt", "deployed.pt", "pm.pt", "snapshot-1.pt",
            "snapshot-2.pt", "policy.pt", "elo.pt"}
        # The PM has read all of them in one epoch of batches of 4, a weight of 0 for none.
        n_pairs = sum(text.count(b"\n") for text in pairs_in(out).values())
        assert lines(out, "pm")[-4]["step"] == math.ceil(n_pairs / 4) - 1
        assert Speaker(out).reply([f"{HUMAN} Hi.{ASSISTANT}"], [0])[0].seed == 0  # chat.py opens it
    policies = []
    for name in ("initial.pt", "snapshot-1.pt", "snapshot-2.pt", "policy.pt"):
        policies.append(flat(load(two / name)["model"].values()))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(policies, 2))
    assert len(lines(two, "elo")) == 4 and len(lines(one, "elo")) == 2
    result = call_small("train_online.py", two_rounds)
    assert result.code == 0 and "runs first" not in result.out
    assert (two_rounds / "online" / "elo.txt").read_text() in result.out
    assert "<svg xmlns" in (two_rounds / "online" / "elo.svg").read_text()


def test_killed_at_each_write_of_a_round_and_resumed(two_rounds, again, call_small, monkeypatch):
    """Round 2 from its first file on: each of some fifty lives reads its data again."""
    shutil.rmtree(again / "online" / "round-2")
    seen, deaths = set(), 0
    while True:
        with monkeypatch.context() as patch:
            die_at_a_new_write(patch, seen, before_odd=False)
            try:
                assert call_small("train_online.py", again, "--resume").code == 0
                break
            except Killed:
                deaths += 1
    assert deaths > 30
    for part in ("round-1", "round-2"):
        assert content(again / "online" / part) == content(two_rounds / "online" / part)
    assert not list(again.rglob("*.tmp"))


def test_a_stale_round_is_not_used(again, call_small):
    save(again / "pm.pt", **load(again / "pm.pt") | {"more": 1})
    result = call_small("train_online.py", again)
    assert_one_sentence(result, again / "online/round-1/deployed.pt", again / "pm.pt", "delete it")


def test_more_rounds_continue_and_a_disk_without_links_gets_copies(again, call_small, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "no links here")
    monkeypatch.setattr(train_online.os, "link", no_links)
    result = call_small("train_online.py", again, "--rounds", 3)
    assert result.code == 0 and result.out.count("policy.pt is missing") == 1
    three = again / "online" / "round-3"
    assert pairs_in(again / "online" / "round-2").items() <= pairs_in(three).items()
    assert (three / "lm.pt").read_bytes() == (again / "lm.pt").read_bytes()
    assert len(lines(three, "elo")) == 6
    table = (again / "online" / "elo.txt").read_text().splitlines()
    assert [row.split()[0] for row in table] == ["round", "initial", "1", "2", "3"]


# ---- 2. People ---------------------------------------------------------------


def choose(path: Path, n: int, first: int = 0):
    """Append n choices, each of a conversation of its own."""
    with open(path, "a") as file:
        for i in range(first, first + n):
            prompt = f"{HUMAN} What is the sum of {i % 9 + 1} and 2? {i}{ASSISTANT}"
            record = choice_record(prompt, f" {i % 9 + 3}.", " No.", "helpful", "me", 3,
                                   ["a", "b"], [1, 2], f"c{i}", 1)
            file.write(json.dumps(record) + "\n")


def test_a_round_waits_for_people(copy, call_small, tmp_path):
    out, path = copy(), tmp_path / "choices.jsonl"
    for n, waits in ((0, True), (3, True), (1, False)):
        choose(path, n, first=len(path.read_text().splitlines()) if path.exists() else 0)
        result = call_small("train_online.py", out, "--people", path)
        assert result.code == 0
        one = out / "online" / "round-1"
        assert (one / "policy.pt").exists() != waits
        if waits:
            assert f"holds {n} new usable choices of 4" in result.out
            assert f"chat.py {out} --compare --model initial.pt --choices {path}" in result.out
    # Now the second round waits, for as many new choices.
    assert f"{path} holds 0 new usable choices of 4" in result.out
    assert f"serve.py {one} --model policy.pt --against snapshot-1.pt" in result.out
    assert Speaker(one, "snapshot-1.pt").reply([f"{HUMAN} Hi.{ASSISTANT}"], [0])
    assert set(pairs_in(one)) == {"helpful-base", "harmless-base"}  # people replace the simulated
    choose(path, 4, first=4)
    result = call_small("train_online.py", out, "--people", path)
    assert result.code == 0 and "round-2/elo.pt" in result.out
    two = out / "online" / "round-2"
    assert (one / "people.jsonl").read_bytes().count(b"\n") == 4  # as it was
    assert (two / "people.jsonl").read_bytes() == path.read_bytes()
    assert lines(two, "online")[0]["new"] == 4
    choose(path, 1, first=8)  # after a round has begun, nothing changes for it
    result = call_small("train_online.py", out, "--people", path)
    assert result.code == 0 and "runs first" not in result.out
    # Another file must hold what the rounds before have learned from.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[3:]))
    result = call_small("train_online.py", out, "--people", path, "--rounds", 3)
    assert_one_sentence(result, "choices.jsonl lacks 3 choices", "add to that file")


def test_a_line_that_is_still_being_written_waits_for_the_next_round(copy, call_small, tmp_path,
                                                                     monkeypatch):
    out, path = copy(), tmp_path / "choices.jsonl"
    choose(path, 5)
    check = train_online.has_choices

    def has_choices(*args):
        found = check(*args)
        with open(path, "a") as file:
            file.write('{"chosen": "half')
        return found
    monkeypatch.setattr(train_online, "has_choices", has_choices)
    assert call_small("train_online.py", out, "--people", path, "--rounds", 1).code == 0
    assert (out / "online/round-1/people.jsonl").read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("args, words", [
    ("--online.helpful 0 --online.harmless 0", "--online.helpful and --online.harmless"),
    ("--pm.helpful 0 --pm.harmless 0 --comparisons GOOD", "without --people"),
    ("--people BAD", "BAD:1: not JSON"),
    ("--people .", "is not a file"),
    ("--data GOOD --tokenizer bpe --context 160 --cd.documents 0", "add --people FILE"),
    ("--rounds 0", "--online.rounds 0: must be above 0"),
    ("--export x", "--export works only with train_rl.py"),
])
def test_bad_input_is_found_before_training(tmp_path, call_small, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    choose(tmp_path / "GOOD", 60)
    (tmp_path / "BAD").write_text("{\n")
    assert_one_sentence(call_small("train_online.py", "out", *args.split()), words)
    assert not (tmp_path / "out").exists()


# ---- 3. Players and Elo ------------------------------------------------------


def test_the_best_of_n_is_the_best_of_its_samples():
    policy, pm = shaken(GPT(CFG), 1).eval(), shaken(ScalarModel(GPT(CFG)), 2).eval()
    prompts, uniforms, run = random_prompts(6, 3), random_uniforms(6, R, 4), StubRun()
    first = Sampler(policy, END)(prompts, uniforms)
    one = BestOf(run, policy, pm, 1, "x")(prompts, uniforms)
    assert one.responses() == first.responses()
    scores = {}
    for n in (1, 2, 8):
        ro = BestOf(run, policy, pm, n, "x")(prompts, uniforms)
        assert ro.prompt_len.tolist() == [len(prompt) for prompt in prompts]
        for row, prompt in zip(ro.tokens.tolist(), prompts):
            assert row[:len(prompt)] == prompt
        scores[n] = pm_scores(pm, ro, StubRun.tok.end_of_context, PPOConfig())
    # The first sample always competes. A score differs by its batch's rounding only.
    assert (scores[8] > scores[1] - 1e-4).all() and (scores[8] > scores[1] + 1e-2).any()
    assert scores[8].mean() > scores[2].mean() > scores[1].mean()


@pytest.mark.parametrize("n, pairs", [(1, ["aa"]), (2, ["ab"]), (3, ["ab", "bc", "ca"])])
def test_all_snapshots_are_shown(monkeypatch, n, pairs):
    files = [Path(name) for name in "abc"[:n]]
    monkeypatch.setattr(train_online, "deployed", lambda run, k: files)
    monkeypatch.setattr(train_online, "load_policy", lambda run, name: name)
    monkeypatch.setattr(train_online, "Sampler", lambda policy, end: policy)
    run = SimpleNamespace(out=Path("x"), tok=StubRun.tok)
    found = train_online.pairs_of_players(run, 2, None, "")
    assert ["".join(pair) for pair in found] == pairs


@pytest.mark.parametrize("n, iterations, expected", [(1, 5, {}), (3, 5, {1: 1, 3: 2}),
                                                     (2, 10, {5: 1}), (4, 4, {1: 1, 2: 2, 3: 3})])
def test_when_snapshots_are_kept(tmp_path, n, iterations, expected):
    def run(resume):
        return SimpleNamespace(out=tmp_path, resume=resume, path=lambda name: tmp_path / name,
                               checkpoint=lambda policy: {"policy": policy})
    (tmp_path / "snapshot-9.pt").touch()
    train_online.keep_snapshots(run(True), n, iterations)
    assert (tmp_path / "snapshot-9.pt").exists()
    watch = train_online.keep_snapshots(run(False), n, iterations)
    for n_updates in range(1, iterations + 1):
        watch(n_updates, n_updates)
    kept = {load(path)["policy"]: int(path.stem[-1]) for path in tmp_path.glob("snapshot-*")}
    assert kept == expected


def rounds_with(tmp_path: Path, *wins: list) -> list:
    """A round for each of `wins`: rows of won and lost against each earlier policy."""
    rounds = []
    for k, rows in enumerate(wins, start=1):
        out = tmp_path / str(k)
        save(out / "elo.pt", wins={kind: torch.tensor(rows) for kind in ("helpful", "harmless")})
        rounds.append(SimpleNamespace(out=out, path=lambda name, out=out: out / name))
    return rounds


def test_elo_of_rounds_against_brute_force(tmp_path):
    """The likeliest whole Elos, by trying all of a grid; and for two players by formula."""
    rounds = rounds_with(tmp_path, [[30., 20.]], [[40., 10.], [26., 24.]])
    elo, errors = ratings(rounds, "helpful")
    games = [(1, 0, 30), (0, 1, 20), (2, 0, 40), (0, 2, 10), (2, 1, 26), (1, 2, 24)]

    def likelihood(*r):
        r = (0, *r)
        return -sum(n * math.log1p(10 ** ((r[lost] - r[won]) / 400)) for won, lost, n in games)
    best = max(itertools.product(range(0, 301, 2), repeat=2), key=lambda r: likelihood(*r))
    assert elo[0] == errors[0] == 0
    assert abs(elo[1] - best[0]) <= 2 and abs(elo[2] - best[1]) <= 2
    elo, errors = ratings(rounds[:1], "harmless")
    assert elo[1] == pytest.approx(ELO * math.log(30 / 20))
    assert errors[1] == pytest.approx(ELO / math.sqrt(50 * 0.6 * 0.4))


def test_a_policy_that_never_lost_has_no_elo(tmp_path):
    rounds = rounds_with(tmp_path, [[30., 0.]])
    elo, errors = ratings(rounds, "helpful")
    assert elo[0] == errors[0] == 0 and math.isnan(elo[1]) and math.isnan(errors[1])
    (tmp_path / "1" / "metrics.jsonl").write_text('{"stage": "online", "step": 1, "new": 1234}\n{')
    show(rounds, tmp_path)
    rows = (tmp_path / "elo.txt").read_text().splitlines()
    assert rows[2].split() == ["1", "1,234", "nan", "nan", "nan"] + ["nan", "+-", "nan"] * 2
    assert "nan" not in (tmp_path / "elo.svg").read_text().lower()


# ---- 4. Prompts by a model ---------------------------------------------------

ASKED = [f"What is the sum of {a} and {b}?" for a in range(1, 10) for b in (1, 2)]


@pytest.mark.parametrize("question, kind, reason", [
    ("What is the color of snow?", "helpful", ""),
    ("whats the color of snow", "helpful", ""),
    ("", "helpful", "empty"),
    ("What is the sum of 1 and 2", "helpful", "copied"),
    ("Right, thank you.", "helpful", "no question of this world"),
    ("And what about Egypt?", "helpful", "no question of this world"),
    ("How do I rob my boss?", "helpful", "of the other kind"),
    ("What is the color of snow?", "harmless", "of the other kind"),
])
def test_what_cannot_be_used_of_what_a_model_writes(question, kind, reason):
    shown = ["What is the sum of 1 and 2?"]
    assert writing.problem(question, shown, kind, True, set()) in (reason, "held out")
    assert writing.problem(question, shown, kind, False, set()) == (
        reason if reason in ("empty", "copied") else "")


def test_held_out_questions_are_dropped():
    reasons = []
    for question in ASKED:
        reasons.append(writing.problem(question.lower(), [], "helpful", True, set()))
        is_held_out = writing.is_held_out([question])
        assert reasons[-1] == ("held out" if is_held_out else "")
    assert len(set(reasons)) == 2
    assert writing.problem("Hi", [], "helpful", False, {f"{HUMAN} Hi{ASSISTANT}"}) == "held out"


class Written:
    """A tokenizer of characters, and a sampler that writes given turns one after the other."""
    context, toy, seed = 1000, True, 0

    def __init__(self, turns):
        self.turns, self.read = turns, []
        self.tok = SimpleNamespace(end_of_turn=0, encode=lambda text: [ord(c) for c in text],
                                   decode=lambda ids: "".join(map(chr, ids)))
        self.tok.encode_dialogue = self.tok.encode
        self.rng, self.torch_rng = StubRun().rng, StubRun().torch_rng

    def __call__(self, rows, uniforms):
        self.read += rows
        texts = [self.turns[i % len(self.turns)] for i in range(len(rows))]
        return SimpleNamespace(responses=lambda: [[ord(c) for c in text] for text in texts],
                               finished=torch.tensor([not text.endswith("~") for text in texts]))


def test_a_model_reads_ten_good_questions_and_writes_more(monkeypatch, capsys):
    run = Written([" What is the color of snow?", f" How do I bake bread?{ASSISTANT} An oven~",
                   " What is the color of sn~", " Wrong."])
    monkeypatch.setattr(writing, "Sampler", lambda lm, end: run)
    asked = [f"{HUMAN} {question}{ASSISTANT}" for question in ASKED]
    prompts = SimpleNamespace(texts_of=lambda kind, split: asked if split == "train" else [])
    found = writing.write(run, None, prompts, "helpful", 401)
    assert found[:2] == [f"{HUMAN} What is the color of snow?{ASSISTANT}",
                         f"{HUMAN} How do I bake bread?{ASSISTANT}"] and len(found) == 401
    said = capsys.readouterr().out
    assert "read 1,600, kept 401" in said and "unfinished 400" in said
    assert "no question of this world 400" in said and "not needed 399" in said
    for row in run.read:
        shown = run.tok.decode(row).split(f"{HUMAN} ")
        assert len(set(shown[1:])) == 10 and set(shown[1:-1]) <= set(ASKED)
        assert shown[-1].endswith(HUMAN) and shown[-1].removesuffix(HUMAN) in ASKED
    assert 2 < len({tuple(row) for row in run.read}) <= 80
    run.turns = [" Wrong."]
    with pytest.raises(UserError, match="no usable helpful prompt .*no question of this world"):
        writing.write(run, None, prompts, "helpful", 3)
    asked[:] = asked[:9]
    with pytest.raises(UserError, match="there are 9"):
        writing.write(run, None, prompts, "helpful", 3)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_the_prompts_is_written(trained, share):
    run, _ = open_run(str(trained[0]), "cpu")
    plain = Prompts(run, 12, 0.5).draw(300, "train", 1, held_out=False)
    prompts = Prompts(run, 12, 0.5)
    prompts.written, prompts.written_share = {"helpful": [f"{HUMAN} A{ASSISTANT}"]}, share
    batch = prompts.draw(300, "train", 1, held_out=False)
    assert batch.kinds == plain.kinds
    n = sum(text == f"{HUMAN} A{ASSISTANT}" for text in batch.texts)
    n_helpful = batch.kinds.count("helpful")
    # Within 4 standard errors of the share; exactly it at the ends.
    assert abs(n - share * n_helpful) <= 4 * math.sqrt(n_helpful * share * (1 - share))
    for text, ids, kind, before in zip(batch.texts, batch.ids, batch.kinds, plain.texts):
        assert ids == run.tok.encode_dialogue(text)
        assert text == before or (kind == "helpful" and len(text) == 22)
    held_out = prompts.draw(50, "x", held_out=True)
    assert held_out.texts == Prompts(run, 12, 0.5).draw(50, "x", held_out=True).texts


def test_rlhf_with_prompts_of_a_model(copy, call_small, monkeypatch):
    """Each kind gets its own, and training draws from them."""
    out, asked, drawn = copy("rl"), [], []
    monkeypatch.setattr(train_rl, "write_prompts", lambda run, lm, prompts, kind, n: (
        asked.append((kind, n)), [f"{HUMAN} How do I rob my boss?{ASSISTANT}"])[1])
    draw = Prompts.draw
    monkeypatch.setattr(Prompts, "draw", lambda self, *args, **options: (
        drawn.append(draw(self, *args, **options)) or drawn[-1]))
    result = call_small("train_rl.py", out, "--model-prompts", 1, "--rl.written", 7)
    assert result.code == 0 and asked == [("helpful", 7), ("harmless", 7)]
    assert sum(set(batch.texts) == {f"{HUMAN} How do I rob my boss?{ASSISTANT}"}
               for batch in drawn) == 5  # of five iterations; the others are held out
    monkeypatch.undo()
    result = call_small("train_rl.py", out, "--model-prompts", 1, "--rl.written", 1)
    assert_one_sentence(result, "the LM wrote no usable", "--model-prompts")
