"""Tests of what train_lm.py and train_pm.py compute: losses, distillation, PM pretraining, the PM.

Equality is tested in float64. test_pm.py has the ranking loss and `fit`, and test_commands.py runs
the same files as a user does."""
import json
import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import toy
import toy_corpus
import train_lm
import train_pm
from data import ASSISTANT, HUMAN, Comparison, encode_comparison
from helpers import CFG, StubRun, doubled, exact_logits, max_difference, shaken
from model import GPT, SIZES, GPTConfig
from pipeline import Run, RunConfig
from pm import ScalarModel, report
from run import UserError, load, save
from test_pm import StubStage
from train_lm import CDConfig, LMConfig, distillation_loss, lm_loss, top_kl
from train_pm import EncodedPairs, PMConfig, PMPConfig

V, D = 70, 24
PROMPT = [5, 9, 9, 31, 2]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lm, "behavior", partial(train_lm.behavior, n=12))
        patch.setitem(SIZES, "toy", GPTConfig(2, 2, 64, context=192))
        yield


def random_gpt(seed: int) -> GPT:
    """In float64, with weights so large that all positions and tokens matter."""
    torch.manual_seed(seed)
    return doubled(shaken(GPT(GPTConfig(2, 2, D, vocab_size=V, context=64)), seed, size=4))


def random_rows(n: int, seed: int, longest=20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(2, longest))] for _ in range(n)]


@pytest.fixture
def student() -> GPT:
    return random_gpt(1)


@pytest.fixture
def teacher() -> GPT:
    return random_gpt(2).requires_grad_(False)


def close(a, b, tolerance=1e-9) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def record(monkeypatch, owner, name: str) -> list[tuple]:
    """The arguments of each call of a function from here on."""
    calls, function = [], getattr(owner, name)

    def recorded(*args):
        calls.append(args)
        return function(*args)
    monkeypatch.setattr(owner, name, recorded)
    return calls


# ---- 1. The language model's loss --------------------------------------------


def test_lm_loss_by_hand(student):
    """Row by row, with neither pads nor batches; a sum, and a mean in mean_loss."""
    rows, expected = [*random_rows(5, 0), [3, 3], [8] * 30], 0.0
    for row in rows:
        logp = F.log_softmax(exact_logits(student, row), -1)
        for t in range(1, len(row)):
            expected -= logp[t - 1, row[t]].item()
    n = sum(len(row) - 1 for row in rows)
    assert close(lm_loss(student, rows, "cpu").item(), expected) and n == train_lm.n_targets(rows)
    assert close(train_lm.mean_loss(student, rows, "cpu"), expected / n)


def test_rows_are_cut_and_pieces_fit_one_forward_pass(monkeypatch):
    tok = SimpleNamespace(encode_dialogue=lambda text: list(range(len(text))))
    rows = [[*range(4)], [*range(5)], [*range(5)]]  # a row of one token predicts nothing
    assert train_lm.encode(tok, ["abcd", "a", "abcde", "abcdef"], 5) == (rows, 1)
    assert train_lm.cut_note(0, 5) == "" and train_lm.cut_note(1, 5) == ", 1 cut to 5 tokens"
    monkeypatch.setattr(train_lm, "tokens_at_once", lambda given, device: 90)
    rows = random_rows(40, 0)
    for before in (0, 30):  # tokens that the teacher reads first
        pieces = list(train_lm.row_batches(rows, "cpu", before))
        assert sorted(sum(pieces, [])) == sorted(rows) and max(map(len, pieces)) > 1
        assert all(len(piece) * (before + max(map(len, piece))) <= 90 for piece in pieces)
    pairs = EncodedPairs([], rows[:20], rows[20:])
    for i in train_pm.index_batches(pairs, torch.arange(20), 90, "cpu"):
        lengths = [len(pairs.chosen[j] + pairs.rejected[j]) for j in i]  # they share next to nothing
        assert len(i) * (max(lengths) - 3) <= 90


# ---- 2. The distillation loss: top k and the rest ----------------------------


def exact_kl(student: GPT, h, teacher: GPT, th, top: int) -> list[float]:
    """State by state, from the definition: the teacher's `top` likeliest tokens, and one outcome
    that stands for all the others."""
    found = []
    for x, y in zip(h.detach(), th.detach()):
        p = torch.softmax(teacher.embed.weight.detach() @ y, 0).tolist()
        q = torch.softmax(student.embed.weight.detach() @ x, 0).tolist()
        best = sorted(range(V), key=lambda i: -p[i])[:min(top, V - 1)]
        others = [i for i in range(V) if i not in best]
        outcomes = [(p[i], q[i]) for i in best]
        outcomes.append((math.fsum(p[i] for i in others), math.fsum(q[i] for i in others)))
        found.append(math.fsum(a * math.log(a / b) for a, b in outcomes))
    return found


def states(n: int, scale=1.0) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(2, n, D, dtype=torch.float64) * scale


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top", [1, 5, 50, V - 1, V, 10_000])
def test_top_kl_is_the_kl_of_top_and_rest(student, teacher, top, scale):
    h, th = states(20, scale)
    found = top_kl(student, h, teacher, th, top)
    exact = torch.tensor(exact_kl(student, h, teacher, th, top), dtype=torch.float64)
    assert found.shape == (20,) and close(found, exact) and exact.max() > 1e-3
    p, q = (F.log_softmax(x @ m.embed.weight.T, -1) for m, x in ((teacher, th), (student, h)))
    full = (p.exp() * (p - q)).sum(1)  # the grouping loses something, but no more than all of it
    assert (exact <= full + 1e-9).all() and (top > 5 or (full - exact).max() > 1e-3)
    assert top < V - 1 or close(found, full)
    assert top_kl(student, h, student, h, top).abs().max() < 1e-9


def test_a_rest_that_is_all_but_nothing_keeps_its_digits(student, teacher):
    """In float32, a teacher that is sure to within 1e-9 or 1e-24: its rest is far below what
    1 - (sum of the top) can tell from 0. float32 is off by 1e-7 x a sum of 70 terms: 1e-5."""
    student, teacher = student.float(), teacher.float()
    sure = torch.tensor([[0.0, *[-25.0] * (V - 1)], [0.0, *[-60.0] * (V - 1)]])
    with torch.no_grad():
        for m in (student, teacher):
            m.embed.weight.zero_()[:, :2] = sure.T
        student.embed.weight[0, :2] = -20.0
    h = torch.eye(2, D)
    for a, b in ((student, teacher), (teacher, student)):  # either may be the one that is sure
        found = top_kl(a.float(), h, b.float(), h, 1)
        exact = exact_kl(a.double(), h.double(), b.double(), h.double(), 1)
        assert found.isfinite().all() and close(found, torch.tensor(exact), 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_gradient_is_that_of_the_definition_in_any_chunks(student, teacher, monkeypatch, rows):
    """Against autograd on the formula over all tokens, grouped by a matrix of ones and zeros. No
    chunk is larger than allowed, also in the backward pass."""
    teacher.requires_grad_(True)
    h, th = states(12).unbind()
    h.requires_grad_(True)
    th.requires_grad_(True)
    chunks = record(monkeypatch, GPT, "logits")
    top_kl(student, h, teacher, th, 4, max_logits=rows * V + 1).sum().backward()
    assert max(len(hidden) for _, hidden in chunks) == rows
    assert th.grad is None and all(p.grad is None for p in teacher.parameters())
    x, weight = h.detach().requires_grad_(True), student.embed.weight.detach().requires_grad_(True)
    p = torch.softmax(th.detach() @ teacher.embed.weight.detach().T, 1)
    q = torch.softmax(x @ weight.T, 1)
    loss = 0.0
    for a, b in zip(p, q):
        group = torch.zeros(5, V, dtype=torch.float64)
        group[torch.arange(4), a.argsort(descending=True)[:4]] = 1
        group[4] = 1 - group[:4].sum(0)
        loss = loss + ((group @ a) * ((group @ a).log() - (group @ b).log())).sum()
    loss.backward()
    assert close(h.grad, x.grad) and close(student.embed.weight.grad, weight.grad)


# ---- 3. The distillation loss: who reads what --------------------------------


def kl_by_hand(student: GPT, teacher: GPT, prompt: list[int], rows, top: int) -> float:
    """Token by token: what does each say next, having read this much? Summed."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            for t in range(1, len(row)):  # before its first token the student has read nothing
                h = student(torch.tensor([row[:t]]))[0, -1:]
                th = teacher(torch.tensor([prompt + row[:t]]))[0, -1:]
                total += exact_kl(student, h, teacher, th, top)[0]
    return total


@pytest.mark.parametrize("top", [3, V])
@pytest.mark.parametrize("rows", [random_rows(6, 5), [[1, 2], [3] * 30]])
def test_the_teacher_reads_the_prompt_and_the_student_does_not(student, teacher, rows, top):
    loss = distillation_loss(student, teacher, PROMPT, rows, top, "cpu")
    assert close(loss.item(), kl_by_hand(student, teacher, PROMPT, rows, top))
    mean = train_lm.mean_kl(student, teacher, PROMPT, rows, top, "cpu")
    assert close(mean * sum(len(row) - 1 for row in rows), loss.item())
    # The numbers would tell a prompt that is off by one token, and one that is not read at all.
    for other in (PROMPT[1:], []):
        difference = loss.item() - kl_by_hand(student, teacher, other, rows, top)
        assert abs(difference) > 1e-3 * loss.item()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


# ---- 4. Small runs of the stages ---------------------------------------------


@pytest.fixture(scope="module")
def with_lm(tmp_path_factory):
    """The folder of a small LM. Nothing may write into it: take a copy. It is trained (seconds),
    because an untrained one tells no header from another and has nothing to distill."""
    out = tmp_path_factory.mktemp("lm")
    cfg = LMConfig(documents=700, vocab=400, step_tokens=256)
    train_lm.train(Run(RunConfig(out=str(out), device="cpu")), cfg)
    return out


@pytest.fixture
def run(with_lm, tmp_path) -> Run:
    shutil.copytree(with_lm, tmp_path / "out")
    run = Run(RunConfig(out=str(tmp_path / "out"), device="cpu"))
    run.load_tokenizer()
    return run


def last_line(run: Run) -> dict:
    return json.loads(run.path("metrics.jsonl").read_text().splitlines()[-1])


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load(run.path(name))["model"]


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_test_loss_is_that_of_the_saved_model(run):
    """Metrics are rounded to 6 digits; float32 is off by less."""
    rows, _ = train_lm.encode(run.tok, train_lm.corpus(run, 500, "test", "lm"), run.context)
    found = train_lm.mean_loss(run.load_model("lm.pt").double(), rows, "cpu")
    assert abs(found - last_line(run)["test_loss"]) < 2e-5


def test_distillation_closes_the_gap_to_the_prompted_lm(run, monkeypatch, capsys):
    """Takes a second or two: it trains until the KL has fallen."""
    calls = record(monkeypatch, train_lm, "distillation_loss")
    train_lm.distill(run, CDConfig(documents=160, batch=8))
    last = last_line(run)
    assert last["kl_after"] < 0.75 * last["kl_before"]
    assert f"{last['kl_after']:.4f} after" in capsys.readouterr().out
    prompt = run.tok.encode(toy_corpus.HHH_HEADER)
    for _, teacher, read_first, *_ in calls:
        assert read_first == prompt and not any(p.requires_grad for p in teacher.parameters())
    # What the student reads holds no header, and fits the context behind the prompt.
    rows = [row for call in calls for row in call[3]]
    assert all(len(prompt) + len(row) <= run.context for row in rows)
    for text in map(run.tok.decode, rows):
        assert not any(header in text for _, header in toy_corpus.HEADERS)
    assert len(rows) == 3 * 160  # train once; as many test documents, before and after
    # Rebuilt: the LM without and with the prompt, and the distilled LM, on documents not trained
    # on. Metrics are rounded to 6 digits; float32 is off by less.
    test_rows, lm = rows[-160:], run.load_model("lm.pt").double()
    for name, model in (("kl_before", "lm.pt"), ("kl_after", "initial.pt")):
        student = run.load_model(model).double()
        found = train_lm.mean_kl(student, lm, prompt, test_rows, 50, "cpu")
        assert abs(found - last[name]) < 2e-5, name


def test_behavior_puts_the_header_before_held_out_prompts_of_both_kinds(run, monkeypatch):
    sampled, rated = record(monkeypatch, train_lm, "rollout"), record(monkeypatch, toy, "rates")
    for header in ("", "Hello. "):
        train_lm.behavior(run, run.load_model("lm.pt"), header)
        prompts, kinds, replies = rated[-1]
        read = [run.tok.decode(row) for row in sampled[-1][1]]
        assert read == [header + prompt for prompt in prompts] and len(replies) == 12
        assert kinds == ["harmless", "helpful", "helpful"] * 4
        for prompt, kind in zip(prompts, kinds):
            assert (toy.understand(prompt).skill.name == "red-team") == (kind == "harmless")
    assert rated[0][0] == rated[1][0]  # the same prompts
    longest, lm = max(map(len, sampled[-1][1])), run.load_model("lm.pt")
    for room, n in ((34, 32), (5, 4), (2, 1)):  # one token is the PM's
        run.context = longest + room
        train_lm.behavior(run, lm, "Hello. ")
        assert sampled[-1][2].shape == (12, n)


def test_what_is_measured_before_and_after_distillation(run, monkeypatch):
    monkeypatch.setattr(train_lm, "behavior", lambda run, model, header="": [model, header])
    kl = {"student": 2.0, "lm": 4.0}
    monkeypatch.setattr(train_lm, "mean_kl", lambda student, *rest: kl[student])
    monkeypatch.setattr(train_lm, "table", lambda *columns, names: "")
    assert train_lm.measure(run, "student", "lm", PROMPT, [], 3) == {
        "kl_before": 4.0, "kl_after": 2.0, "rates": {
            "LM": ["lm", ""], "LM, prompted": ["lm", toy_corpus.HHH_HEADER],
            "distilled": ["student", ""]}}


def test_the_teacher_reads_what_the_lm_read_in_pretraining(run):
    """A dialogue behind the prompt is, token for token, the dialogue with that header."""
    dialogue = f"{HUMAN} Hello.{ASSISTANT} Hello!"
    for is_toy, prompt in ((True, toy_corpus.HHH_HEADER), (False, train_lm.HHH_PROMPT)):
        run.toy = is_toy
        found = train_lm.distilled_prompt(run) + run.tok.encode_dialogue(dialogue)
        assert found == run.tok.encode_dialogue(prompt + dialogue)
    prompt = train_lm.distilled_prompt(run)
    assert prompt[-1] == run.tok.end_of_turn  # a dialogue that goes on
    run.context = len(prompt) + 16
    train_lm.check_distilled_prompt(run)
    run.context -= 1
    with pytest.raises(UserError, match="too short for the prompt .* distilled"):
        train_lm.check_distilled_prompt(run)
    run.cfg.init = "gpt2"  # which would begin another document after its end of turn
    assert train_lm.distilled_prompt(run) == run.tok.encode(train_lm.HHH_PROMPT)
    assert run.tok.end_of_turn not in train_lm.distilled_prompt(run)


def test_the_seed_draws_the_weights_and_the_corpus_makes_the_tokenizer(run, monkeypatch):
    """A tokenizer of an earlier run, which lies in the folder, is not used."""
    def stop(model, cfg):
        made.append(model.embed.weight)
        raise KeyboardInterrupt
    made, heads = [], []
    for seed in (0, 1):
        run.seed = seed
        heads.append(train_pm.from_lm(run).head.weight)
    monkeypatch.setattr(train_lm, "make_optimizer", stop)
    for run.seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            train_lm.train(run, LMConfig(documents=40, vocab=310))
        assert run.tok.n_tokens == 310
    assert not torch.equal(*heads) and not torch.equal(*made)


# ---- 5. Preference-model pretraining and the preference model ----------------


def test_binarize_by_hand():
    pair = Comparison("\n\nHuman: A?\n\nAssistant:", " yes", " no", "helpful", 0.9)
    assert train_pm.binarize([pair]) == [
        Comparison(pair.prompt, " GOOD: yes", " BAD: yes", "helpful"),
        Comparison(pair.prompt, " BAD: no", " GOOD: no", "helpful")]


@pytest.mark.parametrize("binarized", [False, True])
def test_pretraining_reads_each_comparison_once(run, monkeypatch, binarized):
    """By default as it is; with --pmp.binarized as two questions about single answers."""
    calls, read = record(monkeypatch, train_pm, "score_branches"), []
    monkeypatch.setattr(train_pm, "score_rows",
                        lambda pm, rows, *rest: torch.tensor([float(len(row)) for row in rows]))
    train_pm.pretrain(run, PMPConfig(pairs=20, batch=7, binarized=binarized))
    for _, rows, _ in calls:
        read += [tuple(pair) for pair in rows]
    rng, expected, end = run.rng("forum", "train"), [], [run.tok.end_of_context]
    pairs = [toy_corpus.upvoted(rng) for _ in range(20)]
    for c in train_pm.binarize(pairs) if binarized else pairs:
        prompt = run.tok.encode_dialogue(c.prompt)
        expected.append((prompt + run.tok.encode_reply(c.chosen) + end,
                         prompt + run.tok.encode_reply(c.rejected) + end))
    assert sorted(read) == sorted(expected) and read != expected  # in random order
    assert not equal(weights(run, "pmp.pt"), train_pm.from_lm(run).state_dict())
    rng = run.rng("forum", "test")
    pairs = [toy_corpus.upvoted(rng, held_out=True) for _ in range(1000)]
    pairs = train_pm.encode(run, train_pm.binarize(pairs) if binarized else pairs)
    margins = [len(a) - len(b) for a, b in zip(pairs.chosen, pairs.rejected)]
    expected = report(torch.tensor(margins), pairs.comparisons).accuracy
    assert abs(last_line(run)["accuracy"] - expected) < 1e-6


def test_pretraining_on_upvotes_beats_chance(run):
    """Takes seconds: 640 comparisons, and 1,000 held-out ones."""
    train_pm.pretrain(run, PMPConfig(pairs=640, batch=16))
    last = last_line(run)
    assert last["low"] > 0.5 and last["bayes"] > last["accuracy"] and last["n"] == 1000


def test_a_batch_of_weight_0_is_left_out():
    torch.manual_seed(0)
    stage, rows = StubStage(), [[1, 2], [3], [4, 5, 6]]
    last = torch.randperm(3, generator=StubRun().torch_rng("pm batches"))[-1]
    only = torch.zeros(3).index_fill(0, last, 1.0)
    cfg, pairs = PMConfig(batch=1), EncodedPairs([], rows, rows[::-1])
    train_pm.fit(StubRun(), stage, cfg, ScalarModel(GPT(CFG)), pairs, only)
    assert len(stage.lines) == 1


def test_without_pairs_the_pm_is_untrained(run, monkeypatch):
    monkeypatch.setattr(train_pm, "HUMAN", f"{HUMAN} Hello.")  # several tokens
    train_pm.pretrain(run, PMPConfig(pairs=0))
    pmp, lm, new = weights(run, "pmp.pt"), weights(run, "lm.pt"), run.tok.end_of_context
    assert equal(pmp, train_pm.from_lm(run).state_dict()) and pmp["head.weight"].abs().min() > 0
    # The end of the context begins as what marks the human's turn. The rest is the LM's.
    human = run.tok.encode(f"{HUMAN} Hello.")
    assert torch.equal(pmp["trunk.embed.weight"][new], lm["embed.weight"][human].mean(0))
    pmp["trunk.embed.weight"][new] = lm["embed.weight"][new]
    assert all(torch.equal(pmp[f"trunk.{name}"], weight) for name, weight in lm.items())


def test_the_pm_starts_from_pmp_and_reads_replies_of_the_initial_policy(run, monkeypatch):
    train_lm.distill(run, CDConfig(documents=0))
    train_pm.pretrain(run, PMPConfig(pairs=0))
    for name in ("initial.pt", "pmp.pt"):  # as if stages 2 and 3 had changed something
        saved = load(run.path(name))
        next(w for key, w in saved["model"].items() if key.endswith("ln_f.bias")).add_(0.125)
        save(run.path(name), **saved)
    asked = []

    def collect(run, cfg, policy, kind, split, n):
        assert equal(policy.state_dict(), weights(run, "initial.pt"))
        asked.append((kind, split, n))
        prompt = f"{HUMAN} How do I cut paper?{ASSISTANT}"
        return [toy.label(prompt, " a", " b", "helpful", random.Random(0))]

    def fit(run, stage, cfg, pm, *_):
        assert equal(pm.state_dict(), weights(run, "pmp.pt"))
        raise KeyboardInterrupt
    monkeypatch.setattr(train_pm, "collect", collect)
    monkeypatch.setattr(train_pm, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        train_pm.train(run, PMConfig(helpful=3, harmless=4, test=5))
    assert asked == [("helpful", "train", 3), ("harmless", "train", 4), ("helpful", "test", 5),
                     ("harmless", "test", 5)]
    with pytest.raises(KeyboardInterrupt):  # half of the comparisons have a weight
        train_pm.train(run, PMConfig(harmless_weight=0.0))
    with pytest.raises(UserError, match="all comparisons are red-team comparisons"):
        train_pm.train(run, PMConfig(helpful=0, harmless_weight=0.0))
    for bad in (dict(helpful=0, harmless=0), dict(helpful=0, harmless_weight=0.0)):
        with pytest.raises(UserError, match="leave nothing to train on"):
            train_pm.check_early(run, CDConfig(), PMPConfig(), PMConfig(**bad))


def test_a_comparison_that_does_not_fit_is_left_out(run, capsys):
    short = Comparison(f"{HUMAN} Hello.{ASSISTANT}", " a", " b", "helpful")
    long = Comparison(short.prompt, " a", " b c d e" * 60, "helpful")
    pairs = train_pm.encode(run, [short, long, short])
    assert pairs.comparisons == [short, short] and "dropped 1 of 3" in capsys.readouterr().out
    prompt, chosen, rejected = encode_comparison(run.tok, short, run.context)
    assert pairs.chosen == [prompt + chosen + [run.tok.end_of_context]] * 2
    assert pairs.rejected == [prompt + rejected + [run.tok.end_of_context]] * 2
    with pytest.raises(UserError, match="no comparison fits a context of 192 tokens"):
        train_pm.encode(run, [long])


# ---- 6. A step taken in pieces -----------------------------------------------


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)  # the models are made, and loaded, in float64
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("budget", [1, 300, 10**6])
@pytest.mark.parametrize("name", ["lm_loss", "distillation_loss"])
def test_the_gradient_of_a_step_is_a_mean_over_tokens(run, monkeypatch, float64, name, budget):
    """However many pieces it is taken in: as one row each (without pads), as several, or as one.
    The rows are of unequal length. A distillation must begin at the teacher's weights."""
    loss, calls, found = getattr(train_lm, name), record(monkeypatch, train_lm, name), []

    def keep(parameters, *_):
        found.extend(p.grad.clone() for p in parameters)
        return torch.zeros(())

    def stop(where, loss, gradient):
        logged.append(loss)
        raise KeyboardInterrupt
    logged = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    monkeypatch.setattr(train_lm, "check_finite", stop)
    monkeypatch.setattr(train_lm, "tokens_at_once", lambda given, device: budget)
    with pytest.raises(KeyboardInterrupt):
        if name == "lm_loss":
            train_lm.train(run, LMConfig(documents=60, vocab=400, step_tokens=3000))
        else:
            train_lm.distill(run, CDConfig(documents=40, batch=12, top=7))
    model, *arguments = calls[0]
    at = 0 if name == "lm_loss" else 2
    rows = [row for call in calls for row in call[1 + at]]
    assert len(calls) == {1: len(rows), 10**6: 1}.get(budget, len(calls))
    assert len(rows) == 12 if at else len(rows) > 8
    assert budget != 300 or len(calls) > 2
    model.zero_grad(set_to_none=True)
    arguments[at] = rows
    mean = loss(model, *arguments) / sum(len(row) - 1 for row in rows)
    mean.backward()
    assert close(mean.item(), logged[0]) and (at == 0 or arguments[3] == 7)
    # float64, compared to the size of all gradients together
    largest = max(p.grad.abs().max() for p in model.parameters())
    assert largest > 0 and largest.dtype == torch.float64
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert max_difference(p.grad, gradient) <= 1e-9 * largest
    assert at == 0 or equal(model.state_dict(), arguments[0].state_dict())
