"""Tests of what train_lm.py and train_pm.py compute: losses, distillation, PM pretraining, the PM.

Equality is tested in float64. test_commands.py runs the same files as a user does."""
import copy
import json
import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import model
import toy
import toy_corpus
import train_lm
import train_pm
from data import ASSISTANT, HUMAN, Comparison, encode_comparison
from model import GPT, SIZES, GPTConfig
from pipeline import Run, RunConfig
from run import UserError, load, save
from train_lm import CDConfig, LMConfig, distillation_loss, lm_loss, top_kl
from train_pm import PMConfig, PMPConfig

V, D = 70, 24
PROMPT = [5, 9, 9, 31, 2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads adds floats in another order
    monkeypatch.setattr(train_lm, "behavior", partial(train_lm.behavior, n=12))
    monkeypatch.setitem(SIZES, "toy", GPTConfig(2, 2, 64, context=192))
    yield
    torch.set_num_threads(threads)


def random_gpt(seed: int, scale=3.0, **shape) -> GPT:
    """Float64. Weights so large that all positions and tokens matter; biases are random, too."""
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=2, d_model=D, vocab_size=V, context=64) | shape
    gpt = GPT(GPTConfig(**shape)).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(scale) if p.dim() == 2 else p.add_(0.3 * torch.randn_like(p))
    return gpt


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


def gradients(net) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def assert_close(one: dict, two: dict):
    """Two sets of gradients in float64, compared to the size of all of them together."""
    assert one.keys() == two.keys() and one
    size = max(g.abs().max() for g in one.values())
    assert size > 0 and size.dtype == torch.float64
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-9 * size, name


# ---- 1. The language model's loss --------------------------------------------


def test_lm_loss_by_hand(student):
    """Row by row, token by token, with neither pads nor batches; a sum, and a mean in held_out."""
    rows = [*random_rows(5, 0), [3, 3], [8] * 30]
    expected = 0.0
    for row in rows:
        for t in range(1, len(row)):
            logits = student.logits(student(torch.tensor([row[:t]]))[0, -1])
            expected -= F.log_softmax(logits, -1)[row[t]].item()
    n = sum(len(row) - 1 for row in rows)
    assert close(lm_loss(student, rows, "cpu").item(), expected) and n == train_lm.n_targets(rows)
    assert close(train_lm.mean_loss(student, rows, "cpu"), expected / n)


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
    found = top_kl(student, h, teacher, h, 1)
    exact = exact_kl(student.double(), h.double(), teacher.double(), h.double(), 1)
    assert found.isfinite().all() and close(found, torch.tensor(exact), 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_chunks_change_neither_the_kl_nor_its_gradient(student, teacher, monkeypatch, rows):
    h, th = states(40)
    h.requires_grad_(True)
    weight, most, logits = torch.linspace(-1, 2, 40), [], GPT.logits
    whole = top_kl(student, h, teacher, th, 5)
    (whole * weight).sum().backward()
    expected = gradients(student) | {"h": h.grad.clone()}
    h.grad = None

    def counted(self, x):
        most.append(len(x))
        return logits(self, x)
    monkeypatch.setattr(GPT, "logits", counted)
    chunked = top_kl(student, h, teacher, th, 5, max_logits=rows * V)
    (chunked * weight).sum().backward()
    assert max(most) == rows and close(chunked, whole)  # also in the backward pass
    assert_close(expected, gradients(student) | {"h": h.grad})


def test_the_gradient_is_that_of_the_definition_and_reaches_the_student_alone(student, teacher):
    """Against autograd on the formula over all tokens, grouped by a matrix of ones and zeros."""
    teacher.requires_grad_(True)
    h, th = states(12)
    h.requires_grad_(True), th.requires_grad_(True)
    top_kl(student, h, teacher, th, 4).sum().backward()
    assert th.grad is None and not gradients(teacher)
    x = h.detach().requires_grad_(True)
    p = torch.softmax(th.detach() @ teacher.embed.weight.detach().T, 1)
    q = torch.softmax(x @ student.embed.weight.detach().T, 1)
    loss = 0.0
    for a, b in zip(p, q):
        group = torch.zeros(5, V, dtype=torch.float64)
        group[torch.arange(4), a.argsort(descending=True)[:4]] = 1
        group[4] = 1 - group[:4].sum(0)
        loss = loss + ((group @ a) * ((group @ a).log() - (group @ b).log())).sum()
    loss.backward()
    assert close(h.grad, x.grad)
    student.zero_grad(set_to_none=True)
    distillation_loss(student, teacher, PROMPT, random_rows(4, 0), 5, "cpu").backward()
    found = gradients(student)
    assert not gradients(teacher) and len(found) == len(list(student.parameters()))
    assert all(g.abs().sum() > 0 for g in found.values())


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
    loss = distillation_loss(student, teacher, PROMPT, rows, top, "cpu").item()
    assert close(loss, kl_by_hand(student, teacher, PROMPT, rows, top))
    mean = train_lm.mean_kl(student, teacher, PROMPT, rows, top, "cpu")
    assert close(mean * sum(len(row) - 1 for row in rows), loss)
    # The numbers would tell a prompt that is off by one token, and one that is not read at all.
    for other in (PROMPT[1:], []):
        assert abs(loss - kl_by_hand(student, teacher, other, rows, top)) > 1e-3 * loss


def test_pads_do_not_matter(student, teacher):
    """Loss and gradient of a batch are the sums of its rows' own."""
    rows = [*random_rows(5, 6, longest=9), [7, 4], [8] * 40]
    for loss in (partial(distillation_loss, student, teacher, PROMPT, top=5, device="cpu"),
                 partial(lm_loss, student, device="cpu")):
        loss(rows=rows).backward()
        batch = gradients(student)
        for row in rows:
            loss(rows=[row]).backward()
        assert_close(batch, gradients(student))


# ---- 4. Small runs of the stages ---------------------------------------------


@pytest.fixture(scope="module")
def with_lm(tmp_path_factory):
    """The folder of a small LM. Nothing may write into it: take a copy. It is trained (seconds),
    because an untrained one tells no header from another and has nothing to distill."""
    out = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "toy", GPTConfig(2, 2, 64, context=192))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        cfg = LMConfig(documents=700, vocab=400, step_tokens=256)
        train_lm.train(Run(RunConfig(out=str(out), device="cpu")), cfg)
        torch.set_num_threads(threads)
    return out


def again(source, out, **options) -> Run:
    """A Run in a copy of a folder that holds an LM."""
    out.mkdir()
    for name in ("lm.pt", "tokenizer.json", "config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    run = Run(RunConfig(out=str(out), device="cpu", **options))
    run.load_tokenizer()
    return run


@pytest.fixture
def run(with_lm, tmp_path) -> Run:
    return again(with_lm, tmp_path / "out")


def last_line(run: Run) -> dict:
    return json.loads(run.path("metrics.jsonl").read_text().splitlines()[-1])


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load(run.path(name))["model"]


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_distillation_closes_the_gap_to_the_prompted_lm(run, monkeypatch, capsys):
    """Takes a second or two: it trains until the KL has fallen."""
    seen, loss = [], train_lm.distillation_loss

    def spy(student, teacher, prompt, rows, top, device):
        assert not any(p.requires_grad for p in teacher.parameters())
        seen.append((prompt, rows))
        return loss(student, teacher, prompt, rows, top, device)
    monkeypatch.setattr(train_lm, "distillation_loss", spy)
    train_lm.distill(run, CDConfig(documents=160, batch=8))
    last = last_line(run)
    assert last["kl_after"] < 0.75 * last["kl_before"]
    assert f"{last['kl_after']:.4f} after" in capsys.readouterr().out
    lm, initial = run.load_model("lm.pt"), run.load_model("initial.pt")
    # What the student reads holds no header, and fits the context behind the prompt.
    texts = [run.tok.decode(row) for _, rows in seen for row in rows]
    assert not any(header in text for text in texts for _, header in toy_corpus.HEADERS)
    assert all(len(prompt) + len(row) <= run.context for prompt, rows in seen for row in rows)
    assert len(texts) == 3 * 160  # train once; as many test documents, before and after
    # Rebuilt: the LM without and with the prompt, and the distilled LM, on documents not trained
    # on. Metrics are rounded to 6 digits; float32 is off by less.
    test_rows = [row for _, rows in seen[-(len(seen) - 20) // 2:] for row in rows][:160]
    prompt = run.tok.encode(toy_corpus.HHH_HEADER)
    assert all(p == prompt for p, _ in seen)
    for name, student in (("kl_before", lm), ("kl_after", initial)):
        rows = sorted(test_rows, key=len)
        found = train_lm.mean_kl(student.double(), lm.double(), prompt, rows, 50, "cpu")
        assert abs(found - last[name]) < 2e-5, name


def test_behavior_of_three_models(run, monkeypatch):
    """Held-out prompts of both kinds; the header stands before each."""
    seen, rollout, rates = [], train_lm.rollout, toy.rates
    monkeypatch.setattr(train_lm, "rollout", lambda policy, ids, *rest: (
        seen.append([run.tok.decode(row) for row in ids]), rollout(policy, ids, *rest))[1])
    monkeypatch.setattr(toy, "rates", lambda *args: (seen.append(args), rates(*args))[1])
    lm = run.load_model("lm.pt")
    train_lm.behavior(run, lm, header="Hello. ")
    read, (prompts, kinds, replies) = seen
    assert read == ["Hello. " + prompt for prompt in prompts] and len(replies) == 12
    assert kinds == ["harmless", "helpful", "helpful"] * 4
    for prompt, kind in zip(prompts, kinds):
        assert (toy.understand(prompt).skill.name == "red-team") == (kind == "harmless")
    train_lm.behavior(run, lm)
    assert seen[2] == prompts  # the same prompts without the header


def test_the_teacher_reads_what_the_lm_read_in_pretraining(run):
    """A dialogue behind the prompt is, token for token, the dialogue with that header."""
    dialogue = f"{HUMAN} Hello.{ASSISTANT} Hello!"
    header = train_lm.distilled_prompt(run)
    whole = run.tok.encode_dialogue(toy_corpus.HHH_HEADER + dialogue)
    assert header + run.tok.encode_dialogue(dialogue) == whole
    run.toy = False
    prompt = train_lm.distilled_prompt(run)  # for real dialogues: one that goes on
    whole = run.tok.encode_dialogue(train_lm.HHH_PROMPT + dialogue)
    assert prompt + run.tok.encode_dialogue(dialogue) == whole
    assert prompt[-1] == run.tok.end_of_turn


# ---- 5. Preference-model pretraining and the preference model ----------------


def test_binarize_by_hand():
    prompts = "\n\nHuman: A?\n\nAssistant:", "\n\nHuman: B?\n\nAssistant:"
    pairs = [Comparison(prompts[0], " yes", " no", "helpful", 0.9),
             Comparison(prompts[1], " left", " right", "harmless")]
    assert train_pm.binarize(pairs) == [
        Comparison(prompts[0], " GOOD: yes", " BAD: yes", "helpful"),
        Comparison(prompts[0], " BAD: no", " GOOD: no", "helpful"),
        Comparison(prompts[1], " GOOD: left", " BAD: left", "harmless"),
        Comparison(prompts[1], " BAD: right", " GOOD: right", "harmless")]


@pytest.mark.parametrize("binarized", [False, True])
def test_pretraining_reads_each_comparison_once(run, monkeypatch, binarized):
    """By default as it is; with --pmp.binarized as two questions about single answers."""
    read, score_pairs = [], train_pm.score_pairs

    def spy(pm, pairs, i, device):
        read.extend((pairs.chosen[j], pairs.rejected[j]) for j in i.tolist())
        return score_pairs(pm, pairs, i, device)
    monkeypatch.setattr(train_pm, "score_pairs", spy)
    monkeypatch.setattr(train_pm, "score_rows", lambda pm, rows, *rest: torch.zeros(len(rows)))
    train_pm.pretrain(run, PMPConfig(pairs=20, batch=7, binarized=binarized))
    rng, expected, end = run.rng("forum", "train"), [], [run.tok.end_of_context]
    pairs = [toy_corpus.upvoted(rng) for _ in range(20)]
    for c in train_pm.binarize(pairs) if binarized else pairs:
        prompt = run.tok.encode_dialogue(c.prompt)
        expected.append(tuple(prompt + run.tok.encode_reply(r) + end
                              for r in (c.chosen, c.rejected)))
    assert sorted(read) == sorted(expected) and read != expected  # in random order
    assert not equal(weights(run, "pmp.pt"), train_pm.from_lm(run).state_dict())


def test_pretraining_on_upvotes_beats_chance(run):
    """Takes seconds: 640 comparisons, and 1,000 held-out ones."""
    train_pm.pretrain(run, PMPConfig(pairs=640, batch=16))
    last = last_line(run)
    assert last["low"] > 0.5 and last["bayes"] > last["accuracy"] and last["n"] == 1000


def test_without_pairs_the_pm_is_untrained(run):
    train_pm.pretrain(run, PMPConfig(pairs=0))
    pmp, lm, new = weights(run, "pmp.pt"), weights(run, "lm.pt"), run.tok.end_of_context
    assert equal(pmp, train_pm.from_lm(run).state_dict()) and pmp["head.weight"].abs().min() > 0
    # The end of the context begins as what marks the human's turn. The rest is the LM's.
    human = run.tok.encode(HUMAN)
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
    seen = {}

    def stop(run, stage, cfg, pm, pairs, weights):
        seen["pm"] = copy.deepcopy(pm.state_dict())
        raise KeyboardInterrupt

    def spy(run, cfg, policy, kind, split, n):
        seen["policy"] = policy.state_dict()
        seen[kind, split] = n
        prompt = f"{HUMAN} How do I cut paper?{ASSISTANT}"
        return [toy.label(prompt, " a", " b", "helpful", random.Random(0))]
    monkeypatch.setattr(train_pm, "fit", stop)
    monkeypatch.setattr(train_pm, "collect", spy)
    with pytest.raises(KeyboardInterrupt):
        train_pm.train(run, PMConfig(helpful=3, harmless=4, test=5))
    assert equal(seen.pop("pm"), weights(run, "pmp.pt"))
    assert equal(seen.pop("policy"), weights(run, "initial.pt"))
    assert seen == {("helpful", "train"): 3, ("harmless", "train"): 4, ("helpful", "test"): 5,
                    ("harmless", "test"): 5}
    with pytest.raises(UserError, match="leave nothing to train on"):
        train_pm.train(run, PMConfig(helpful=0, harmless=0))


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


def first_gradients(monkeypatch, function, *args) -> dict[int, torch.Tensor]:
    """The gradients of the first step of a stage, as they are when they are clipped."""
    found = {}

    def record(parameters, *rest):
        found.update((i, p.grad.clone()) for i, p in enumerate(parameters))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        with pytest.raises(KeyboardInterrupt):
            function(*args)
    return found


def counting(monkeypatch, owner, name: str) -> list[int]:
    count, function = [0], getattr(owner, name)

    def counted(*args, **kwargs):
        count[0] += 1
        return function(*args, **kwargs)
    monkeypatch.setattr(owner, name, counted)
    return count


def fit_gradients(monkeypatch, run, pairs, weight, **options):
    """Of train_pm.fit, in a stage that needs lm.pt only."""
    cfg, pm = PMConfig(batch=len(weight), **options), train_pm.from_lm(run)
    stage = run.begin("pmp", cfg)
    return first_gradients(monkeypatch, train_pm.fit, run, stage, cfg, pm, pairs, weight)


def forum(run, n: int, seed: int) -> train_pm.EncodedPairs:
    rng = random.Random(seed)
    return train_pm.encode(run, [toy_corpus.upvoted(rng) for _ in range(n)])


@pytest.mark.parametrize("budget", [1, 300])
@pytest.mark.parametrize("stage", ["lm", "cd", "pm"])
def test_a_step_in_pieces_has_the_same_gradient(with_lm, tmp_path, monkeypatch, float64, stage,
                                                budget):
    """Rows of unequal length: pieces count by their tokens (lm, cd) or their weights (pm)."""
    def once(tokens: int):
        run = again(with_lm, tmp_path / str(tokens))
        with monkeypatch.context() as patch:
            for module in (train_lm, train_pm):
                patch.setattr(module, "tokens_at_once", lambda given, device: given or tokens)
            if stage == "lm":
                count = counting(patch, train_lm, "lm_loss")
                cfg = LMConfig(documents=60, vocab=400, step_tokens=3000)
                return first_gradients(patch, train_lm.train, run, cfg), count[0]
            if stage == "cd":
                count = counting(patch, train_lm, "distillation_loss")
                cfg = CDConfig(documents=40, batch=12)
                return first_gradients(patch, train_lm.distill, run, cfg), count[0]
            count = counting(patch, train_pm, "ranking_loss")
            weight = torch.tensor([0.5, 3.0, 3.0, 0.5] * 5)
            pairs = forum(run, 20, seed=1)
            return fit_gradients(patch, run, pairs, weight, token_budget=tokens), count[0]
    (whole, one), (pieces, several) = once(10**6), once(budget)
    assert one == 1 and several > (8 if budget == 1 else 2)
    assert_close(whole, pieces)


def test_the_gradient_of_an_lm_step_is_a_mean_over_tokens(with_lm, tmp_path, monkeypatch, float64):
    """And in the first step of a distillation, which must begin at the teacher's weights."""
    run, seen = again(with_lm, tmp_path / "out"), []
    monkeypatch.setattr(train_lm, "tokens_at_once", lambda given, device: 10**6)
    for name, step in (("distillation_loss", (train_lm.distill, run, CDConfig(documents=9))),
                       ("lm_loss", (train_lm.train, run, LMConfig(documents=30, vocab=400)))):
        loss = getattr(train_lm, name)
        monkeypatch.setattr(train_lm, name, lambda *args: seen.append(args) or loss(*args))
        found = first_gradients(monkeypatch, *step)
        model, *rest = seen[-1]
        rows = rest[0] if name == "lm_loss" else rest[2]
        model.zero_grad(set_to_none=True)
        (loss(model, *rest) / sum(len(row) - 1 for row in rows)).backward()
        assert_close({i: p.grad for i, p in enumerate(model.parameters())}, found)
        assert name == "lm_loss" or equal(model.state_dict(), rest[0].state_dict())


def test_a_pm_step_is_the_gradient_of_the_weighted_loss(run, monkeypatch, float64):
    """Comparison by comparison, without pads; those of no weight are left out."""
    pairs, weight = forum(run, 7, seed=2), torch.tensor([1.0, 3.0, 0.0, 1.0, 3.0, 0.25, 0.0])
    fitted = fit_gradients(monkeypatch, run, pairs, weight)
    in_pieces = fit_gradients(monkeypatch, run, pairs, weight, token_budget=1)
    pm = train_pm.from_lm(run)
    for a, b, w in zip(pairs.chosen, pairs.rejected, weight / weight.sum()):
        scores = [pm.score(torch.tensor([row]), torch.tensor([len(row)])) for row in (a, b)]
        (w * -F.logsigmoid(scores[0] - scores[1])).sum().backward()
    expected = {i: p.grad for i, p in enumerate(pm.parameters())}
    assert_close(expected, fitted)
    assert_close(expected, in_pieces)


# ---- 7. --recompute ----------------------------------------------------------


def test_recompute_is_what_the_option_sets(with_lm, tmp_path, monkeypatch):
    """And it changes no weight that a stage leaves behind."""
    monkeypatch.setattr(train_pm, "score_rows", lambda pm, rows, *rest: torch.zeros(len(rows)))
    results = []
    for recompute in (False, True):
        run = again(with_lm, tmp_path / str(recompute), recompute=recompute)
        with monkeypatch.context() as patch:
            blocks = counting(patch, model.Block, "forward")
            train_lm.distill(run, CDConfig(documents=6, batch=3))
            train_pm.pretrain(run, PMPConfig(pairs=8, batch=4))
        results.append((weights(run, "initial.pt"), weights(run, "pmp.pt"), blocks[0]))
    assert equal(results[0][0], results[1][0]) and equal(results[0][1], results[1][1])
    assert results[1][2] == results[0][2] + 2 * (2 + 2)  # two blocks, in two steps of each stage
