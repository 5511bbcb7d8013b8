"""Tests of what train_lm.py and train_pm.py compute: distillation, PM pretraining, steps taken in pieces.

test_commands.py runs the same files as a user does. Here their functions are called one by one.
"""
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
import train_lm
import train_pm
from data import ASSISTANT, HUMAN, Comparison
from model import GPT, GPTConfig, KVCache
from pm import ScalarModel, ranking_loss
from run import Run, RunConfig
from train_lm import CDConfig, LMConfig, distillation_loss, top_kl
from train_pm import PMConfig, PMPConfig

V, D = 70, 24


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads adds floats in another order
    yield
    torch.set_num_threads(threads)


def random_gpt(seed: int, scale=3.0, **shape) -> GPT:
    """Weights so large that all positions and tokens matter; biases and LayerNorms too are random."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**dict(n_layer=2, n_head=2, d_model=D, vocab_size=V, context=64), **shape}))
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(scale) if p.dim() == 2 else p.add_(0.3 * torch.randn_like(p))
    return gpt


def random_rows(n: int, seed: int, longest=20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(2, longest))] for _ in range(n)]


@pytest.fixture(scope="module")
def models() -> tuple[GPT, GPT]:
    """A student, and a teacher that can't be trained."""
    return random_gpt(1), random_gpt(2).requires_grad_(False)


# --- the distillation loss: top k and the rest ------------------------------------------


def exact_kl(student: GPT, h, teacher: GPT, th, top: int) -> list[float]:
    """In float64, state by state, from the definition: the teacher's `top` likeliest tokens, and one outcome that
    stands for all the others."""
    found = []
    for x, y in zip(h.detach().double(), th.detach().double()):
        p = torch.softmax(teacher.embed.weight.detach().double() @ y, 0).tolist()
        q = torch.softmax(student.embed.weight.detach().double() @ x, 0).tolist()
        best = sorted(range(len(p)), key=lambda i: -p[i])[:min(top, len(p) - 1)]
        others = [i for i in range(len(p)) if i not in best]
        outcomes = [(p[i], q[i]) for i in best] + [(math.fsum(p[i] for i in others), math.fsum(q[i] for i in others))]
        found.append(math.fsum(a * math.log(a / b) for a, b in outcomes))
    return found


def states(n: int, scale: float, seed=3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, D) * scale, torch.randn(n, D) * scale


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top", [1, 5, 50])
def test_top_kl_is_the_kl_of_top_and_rest(models, top, scale):
    student, teacher = models
    h, th = states(40, scale)
    found, exact = top_kl(student, h, teacher, th, top), torch.tensor(exact_kl(student, h, teacher, th, top))
    assert found.shape == (40,) and found.dtype == torch.float32
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)
    assert (found >= -1e-6).all() and exact.max() > 1e-3
    # The grouping loses something, but no more than all of it.
    full = torch.tensor(exact_kl(student, h, teacher, th, V - 1))
    assert (exact <= full + 1e-9).all() and (top == 50 or (full - exact).max() > 1e-3)


@pytest.mark.parametrize("top", [V - 1, V, 10_000])
def test_top_kl_of_all_tokens_is_the_full_kl(models, top):
    student, teacher = models
    h, th = states(30, 1.0)
    p, q = (F.log_softmax(m.embed.weight.detach().double() @ x.double().T, 0) for m, x in ((teacher, th), (student, h)))
    exact = (p.exp() * (p - q)).sum(0).float()
    assert torch.allclose(top_kl(student, h, teacher, th, top), exact, rtol=1e-5, atol=1e-6)


def test_equal_models_have_no_kl(models):
    student, _ = models
    h, _ = states(30, 2.0)
    for top in (1, 7, V):
        assert top_kl(student, h, student, h, top).abs().max() < 1e-6


def test_a_rest_that_is_all_but_nothing_keeps_its_digits(models):
    """A teacher that is sure to within 1e-9. Its rest is far below what 1 - (sum of the top) can tell from 0."""
    student, teacher = (copy.deepcopy(m).requires_grad_(False) for m in models)
    with torch.no_grad():
        student.embed.weight.zero_()[:, 0] = torch.linspace(-30, 0, V)
        teacher.embed.weight.zero_()[:, 0] = torch.linspace(-30, 0, V).flip(0)  # each sure of what the other rules out
    h = torch.zeros(3, D)
    h[:, 0] = torch.tensor([1.0, 2.0, 2.5])
    for top in (1, 50):
        found, exact = top_kl(student, h, teacher, h, top), torch.tensor(exact_kl(student, h, teacher, h, top))
        assert found.isfinite().all() and torch.allclose(found, exact, rtol=1e-5)
    sure = torch.tensor([[0.0, *[-25.0] * (V - 1)], [0.0, *[-60.0] * (V - 1)]])  # as logits: rest of 1e-9, and of 1e-24
    with torch.no_grad():
        for m in (student, teacher):
            m.embed.weight.zero_()[:, :2] = sure.T
        student.embed.weight[0, :2] = -20.0
    h = torch.eye(2, D)
    found, exact = top_kl(student, h, teacher, h, 1), torch.tensor(exact_kl(student, h, teacher, h, 1))
    assert found.isfinite().all() and torch.allclose(found, exact, rtol=1e-5)


def gradients(net) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def assert_close(one: dict, two: dict, tolerance: float):
    """Two sets of gradients, compared to the size of all of them together."""
    assert one.keys() == two.keys() and one
    size = max(g.abs().max() for g in one.values())
    assert size > 0
    for name in one:
        assert (one[name] - two[name]).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_chunks_change_neither_the_kl_nor_its_gradient(models, monkeypatch, rows):
    student, teacher = copy.deepcopy(models[0]), models[1]
    h, th = states(40, 1.0)
    weight = torch.linspace(-1, 2, 40)
    h.requires_grad_(True)
    whole = top_kl(student, h, teacher, th, 5)
    (whole * weight).sum().backward()
    expected, expected_h = gradients(student), h.grad.clone()
    h.grad, most, logits = None, [0], GPT.logits

    def counted(self, x):
        most[0] = max(most[0], x.shape[0])
        return logits(self, x)
    monkeypatch.setattr(GPT, "logits", counted)
    chunked = top_kl(student, h, teacher, th, 5, max_logits=rows * V)
    (chunked * weight).sum().backward()
    assert most == [rows]  # also in the backward pass
    assert torch.allclose(chunked, whole, rtol=1e-6, atol=1e-7)
    assert_close(expected, gradients(student), 1e-6)
    assert torch.allclose(h.grad, expected_h, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_the_student_alone(models):
    student, teacher = (copy.deepcopy(m).requires_grad_(True) for m in models)
    h, th = (x.requires_grad_(True) for x in states(20, 1.0))
    top_kl(student, h, teacher, th, 5).sum().backward()
    assert h.grad.abs().sum() > 0 and student.embed.weight.grad.abs().sum() > 0
    assert th.grad is None and not gradients(teacher)
    distillation_loss(student, teacher, [1, 2, 3], random_rows(4, 0), 5, "cpu").backward()
    assert not gradients(teacher)
    found = gradients(student)
    assert set(found) == {name for name, _ in student.named_parameters()}
    assert all(g.abs().sum() > 0 for g in found.values())


def test_the_gradient_is_that_of_the_definition(models):
    """Against autograd in float64 on the formula over all tokens, grouped by a matrix of ones and zeros."""
    student, teacher = copy.deepcopy(models[0]), models[1]
    h, th = states(12, 1.0)
    h.requires_grad_(True)
    top_kl(student, h, teacher, th, 4).sum().backward()
    h64 = h.detach().double().requires_grad_(True)
    p = torch.softmax(th.double() @ teacher.embed.weight.double().T, 1)
    q = torch.softmax(h64 @ student.embed.weight.detach().double().T, 1)
    loss = 0.0
    for x, y in zip(p, q):
        best = x.argsort(descending=True)[:4]
        group = torch.zeros(5, V, dtype=torch.float64)
        group[torch.arange(4), best] = 1
        group[4] = 1 - group[:4].sum(0)
        loss = loss + ((group @ x) * ((group @ x).log() - (group @ y).log())).sum()
    loss.backward()
    assert torch.allclose(h.grad, h64.grad.float(), rtol=1e-4, atol=1e-6)


# --- the distillation loss: who reads what -----------------------------------------------

PROMPT = [5, 9, 9, 31, 2]


def by_hand(student: GPT, teacher: GPT, prompt: list[int], rows, top: int) -> float:
    """Row by row, token by token, with neither pads nor batches: what does each say next, having read this much?"""
    student, teacher, kls = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), []
    with torch.no_grad():
        for row in rows:
            for t in range(1, len(row)):  # the first token has nothing before it that the student could read
                h = student(torch.tensor([row[:t]]))[0, -1:]
                th = teacher(torch.tensor([prompt + row[:t]]))[0, -1:]
                kls += exact_kl(student, h, teacher, th, top)
    return math.fsum(kls) / len(kls)


@pytest.mark.parametrize("top", [3, V])
@pytest.mark.parametrize("rows", [random_rows(1, 4), random_rows(6, 5), [[1, 2], [3] * 30]])
def test_the_loss_is_the_mean_over_tokens_behind_the_prompt(models, rows, top):
    student, teacher = models
    loss = distillation_loss(student, teacher, PROMPT, rows, top, "cpu").item()
    assert loss == pytest.approx(by_hand(student, teacher, PROMPT, rows, top), rel=2e-5)
    # The numbers would tell a prompt that is off by one token, and a student that reads it too.
    assert abs(loss - by_hand(student, teacher, PROMPT[1:], rows, top)) > 1e-3 * loss
    assert abs(loss - by_hand(student, teacher, [], rows, top)) > 1e-3 * loss


def test_pads_do_not_matter(models):
    """The loss of a batch is the mean of its rows' own losses, weighted by their tokens; gradients likewise."""
    student, teacher = copy.deepcopy(models[0]), models[1]
    rows = [*random_rows(5, 6, longest=9), random_rows(1, 7, longest=3)[0], [8] * 40]
    distillation_loss(student, teacher, PROMPT, rows, 5, "cpu").backward()
    batch, n = gradients(student), sum(len(r) - 1 for r in rows)
    for row in rows:
        (distillation_loss(student, teacher, PROMPT, [row], 5, "cpu") * ((len(row) - 1) / n)).backward()
    assert_close(batch, gradients(student), 2e-6)
    assert distillation_loss(student, teacher, PROMPT, rows[::-1], 5, "cpu").item() == pytest.approx(
        distillation_loss(student, teacher, PROMPT, rows, 5, "cpu").item(), rel=1e-6)


def test_a_prompt_without_effect_leaves_nothing_to_distil(models):
    """A teacher that is its student, and that looks neither back nor at positions."""
    student = copy.deepcopy(models[0])
    with torch.no_grad():
        student.positions.weight.zero_()
    rows = random_rows(6, 8)
    assert distillation_loss(student, student, PROMPT, rows, 5, "cpu").item() > 0.01
    with torch.no_grad():
        for block in student.blocks:
            block.attn_out.weight.zero_()
    assert abs(distillation_loss(student, student, PROMPT, rows, 5, "cpu").item()) < 1e-6


# --- small runs of the stages -------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_held_out_prompts(monkeypatch):
    monkeypatch.setattr(train_lm, "behavior", partial(train_lm.behavior, n=12))


@pytest.fixture
def unmeasured(monkeypatch):
    """A thousand held-out pairs take longer than the few steps that most of these tests are about."""
    monkeypatch.setattr(train_pm, "score_rows", lambda pm, rows, *rest: torch.zeros(len(rows)))


@pytest.fixture(scope="module")
def with_lm(tmp_path_factory):
    """The folder of a small LM. Nothing may write into it: take a copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("lm")
    train_lm.train(Run(RunConfig(out=str(out), device="cpu")), LMConfig(documents=700, vocab=400, step_tokens=256))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def run(with_lm, tmp_path) -> Run:
    return again(with_lm, tmp_path / "out")


def again(source, out, **options) -> Run:
    """A Run in a copy of a folder that holds an LM."""
    out.mkdir()
    for name in ("lm.pt", "tokenizer.json", "config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    run = Run(RunConfig(out=str(out), device="cpu", **options))
    run.tok = train_lm.Tokenizer.load(run.path("tokenizer.json"))
    return run


def lines(run: Run, stage: str) -> list[dict]:
    found = map(json.loads, run.path("metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["stage"] == stage]


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return torch.load(run.path(name), weights_only=True)["model"]


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_distillation_closes_the_gap_to_the_prompted_lm(run, monkeypatch, capsys):
    seen, loss = [], train_lm.distillation_loss

    def spy(student, teacher, prompt, rows, top, device):
        seen.append((prompt, rows))
        return loss(student, teacher, prompt, rows, top, device)
    monkeypatch.setattr(train_lm, "distillation_loss", spy)
    train_lm.distill(run, CDConfig(documents=160, batch=8))
    last = lines(run, "cd")[-1]
    assert last["kl_after"] < 0.75 * last["kl_before"] and f"{last['kl_after']:.4f} after" in capsys.readouterr().out
    assert not equal(weights(run, "initial.pt"), weights(run, "lm.pt")) and not run.has("cd_state.pt")
    assert set(last["rates"]) == {"LM", "LM, prompted", "distilled"}
    # What the student reads holds no header, and fits the context behind the prompt.
    texts = [run.tok.decode(row) for _, rows in seen for row in rows]
    assert not any(header in text for text in texts for _, header in toy.HEADERS)
    assert all(len(prompt) + len(row) <= run.context for prompt, rows in seen for row in rows)
    assert sum(len(rows) for _, rows in seen) == 160 + 2 * 160  # train once; as many test documents, before and after


def test_the_teacher_reads_what_the_lm_read_in_pretraining(run, monkeypatch):
    """A dialogue behind the prompt is, token for token, the dialogue with that header in the corpus."""
    class Enough(Exception):
        pass

    def stop(student, teacher, prompt, rows, top, device):
        raise Enough(prompt)
    monkeypatch.setattr(train_lm, "distillation_loss", stop)
    with pytest.raises(Enough) as enough:
        train_lm.distill(run, CDConfig(documents=8))
    (prompt,), dialogue = enough.value.args, f"{HUMAN} Hello.{ASSISTANT} Hello!"
    assert prompt + run.tok.encode_dialogue(dialogue) == run.tok.encode_dialogue(toy.HHH_PROMPT + dialogue)


def test_the_prompt_for_real_dialogues_is_a_dialogue_that_goes_on(run):
    prompt, dialogue = run.tok.encode_dialogue(train_lm.HHH_PROMPT), f"{HUMAN} Hello.{ASSISTANT} Hello!"
    assert prompt + run.tok.encode_dialogue(dialogue) == run.tok.encode_dialogue(train_lm.HHH_PROMPT + dialogue)
    assert prompt[-1] == run.tok.end_of_turn


def test_without_documents_the_initial_policy_is_the_lm(run, capsys):
    run.path("cd_state.pt").write_bytes(b"of a run that was stopped")
    train_lm.distill(run, CDConfig(documents=0))
    assert equal(weights(run, "initial.pt"), weights(run, "lm.pt")) and "none" in capsys.readouterr().out
    assert run.reuse("initial.pt", "cd", CDConfig(documents=0))  # nothing is left that says it is unfinished


# --- preference-model pretraining ---------------------------------------------------------


def test_binarise_by_hand():
    pairs = [Comparison("\n\nHuman: A?\n\nAssistant:", " yes", " no", "helpful", 0.9),
             Comparison("\n\nHuman: B?\n\nAssistant:", " left", " right", "harmless")]
    assert train_pm.binarise(pairs) == [
        Comparison("\n\nHuman: A?\n\nAssistant:", " GOOD: yes", " BAD: yes", "helpful"),
        Comparison("\n\nHuman: A?\n\nAssistant:", " BAD: no", " GOOD: no", "helpful"),
        Comparison("\n\nHuman: B?\n\nAssistant:", " GOOD: left", " BAD: left", "harmless"),
        Comparison("\n\nHuman: B?\n\nAssistant:", " BAD: right", " GOOD: right", "harmless")]
    assert train_pm.binarise([]) == []


@pytest.mark.parametrize("binarised", [False, True])
def test_pretraining_reads_each_comparison_once(run, monkeypatch, unmeasured, binarised):
    """By default as it is; with --pmp.binarised as two questions about single answers."""
    read, fit = [], train_pm.fit

    def spy(run, stage, cfg, pm, chosen, rejected, weights, *rest):
        read.extend(zip(chosen, rejected))
        assert weights.tolist() == [1.0] * len(chosen)
        return fit(run, stage, cfg, pm, chosen, rejected, weights, *rest)
    monkeypatch.setattr(train_pm, "fit", spy)
    train_pm.pretrain(run, PMPConfig(pairs=20, binarised=binarised))
    rng, tok = run.rng("forum", "train"), run.tok
    pairs = [toy.upvoted(rng) for _ in range(20)]
    markers = (("", "", True),) if not binarised else ((" GOOD:", " BAD:", True), (" BAD:", " GOOD:", False))
    expected = []
    for c in pairs:
        for one, other, best in markers:
            texts = (c.chosen, c.rejected) if not binarised else (c.chosen if best else c.rejected,) * 2
            expected.append(tuple(tok.encode_dialogue(c.prompt) + tok.encode_reply(name + reply) + [tok.end_of_context]
                                  for name, reply in zip((one, other), texts)))
    assert read == expected
    assert not run.has("pmp_state.pt") and not equal(weights(run, "pmp.pt"), train_pm.from_lm(run).state_dict())
    assert torch.load(run.path("pmp.pt"), weights_only=True)["parents"] == train_pm.file_hash(run.path("lm.pt"))


def test_pretraining_on_upvotes_beats_chance(run):
    train_pm.pretrain(run, PMPConfig(pairs=640, batch=16))
    last = lines(run, "pmp")[-1]
    assert last["low"] > 0.5 and last["bayes"] > last["accuracy"]


def test_without_pairs_the_pm_is_untrained(run, capsys):
    train_pm.pretrain(run, PMPConfig(pairs=0))
    assert "none, --pmp.pairs is 0" in capsys.readouterr().out
    assert equal(weights(run, "pmp.pt"), train_pm.from_lm(run).state_dict()) and not run.has("pmp_state.pt")
    trunk = {k.removeprefix("trunk."): v for k, v in weights(run, "pmp.pt").items() if k.startswith("trunk.")}
    lm, new = weights(run, "lm.pt"), run.tok.end_of_context
    assert all(torch.equal(trunk[k], lm[k]) for k in lm if k != "embed.weight")
    known = torch.arange(len(lm["embed.weight"])) != new
    assert torch.equal(trunk["embed.weight"][known], lm["embed.weight"][known])
    # The end of the context begins as what marks the human's turn.
    assert torch.equal(trunk["embed.weight"][new], lm["embed.weight"][run.tok.encode(HUMAN)].mean(0))


def test_the_pm_starts_from_the_pretrained_one(run, monkeypatch):
    """And answers are the initial policy's, not the LM's."""
    train_lm.distill(run, CDConfig(documents=0))
    train_pm.pretrain(run, PMPConfig(pairs=0))
    for name in ("initial.pt", "pmp.pt"):  # as if stages 2 and 3 had changed something
        saved = torch.load(run.path(name), weights_only=True)
        next(w for key, w in saved["model"].items() if key.endswith("ln_f.bias")).add_(0.125)
        torch.save(saved, run.path(name))
    seen = {}

    def stop(run, stage, cfg, pm, *rest):
        seen["pm"] = {k: v.clone() for k, v in pm.state_dict().items()}
        raise StopIteration

    def spy(run, cfg, policy, *rest):
        seen["policy"] = policy.state_dict()
        return [toy.label("\n\nHuman: How do I cut paper?\n\nAssistant:", " a", " b", "helpful", random.Random(0))]
    monkeypatch.setattr(train_pm, "fit", stop)
    monkeypatch.setattr(train_pm, "collect", spy)
    with pytest.raises(StopIteration):
        train_pm.train(run, PMConfig(helpful=3, harmless=3))
    assert equal(seen["pm"], weights(run, "pmp.pt")) and equal(seen["policy"], weights(run, "initial.pt"))


# --- a step taken in pieces ---------------------------------------------------------------


class Stop(Exception):
    pass


def first_gradients(monkeypatch, function, *args) -> dict[int, torch.Tensor]:
    """The gradients of the first step of a stage, as they are when they are clipped."""
    found = {}

    def record(parameters, *rest):
        found.update((i, p.grad.clone()) for i, p in enumerate(parameters))
        raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        with pytest.raises(Stop):
            function(*args)
    return found


def counting(monkeypatch, module, name: str) -> list[int]:
    """Count the calls of a function of a module."""
    count, function = [0], getattr(module, name)

    def counted(*args, **kwargs):
        count[0] += 1
        return function(*args, **kwargs)
    monkeypatch.setattr(module, name, counted)
    return count


@pytest.mark.parametrize("budget", [1, 300])
@pytest.mark.parametrize("stage", ["lm", "cd", "pm"])
def test_a_step_in_pieces_has_the_same_gradient(with_lm, tmp_path, monkeypatch, stage, budget):
    """Rows of unequal length: pieces must be weighted by their tokens (lm, cd), or by their pairs' weights (pm)."""
    def once(tokens: int):
        run = again(with_lm, tmp_path / str(tokens))
        with monkeypatch.context() as patch:
            for module in (train_lm, train_pm):
                patch.setattr(module, "tokens_at_once", lambda given, device: given or tokens)
            if stage == "lm":
                count = counting(patch, train_lm, "lm_loss")
                step = train_lm.train, run, LMConfig(documents=60, vocab=400, step_tokens=3000)
            elif stage == "cd":
                count = counting(patch, train_lm, "distillation_loss")
                step = train_lm.distill, run, CDConfig(documents=40, batch=12)
            else:
                count = counting(patch, train_pm, "ranking_loss")
                rng, pm = random.Random(1), train_pm.from_lm(run)
                pairs = [toy.upvoted(rng) for _ in range(20)]
                _, chosen, rejected = train_pm.encode(run, pairs)
                weight = torch.tensor([3.0 if i % 3 else 0.5 for i in range(len(chosen))])
                cfg = PMConfig(batch=20, token_budget=tokens)  # here a user has an option for it
                step = train_pm.fit, run, "pm", cfg, pm, chosen, rejected, weight, None, ""
            return first_gradients(patch, *step), count[0]
    (whole, one), (pieces, several) = once(10**6), once(budget)
    assert one == 1 and several > (8 if budget == 1 else 2)
    assert_close(whole, pieces, 3e-6)


def test_a_pm_step_is_the_gradient_of_the_weighted_loss(with_lm, tmp_path, monkeypatch):
    """Comparison by comparison, without pads; and the gradient of --pm.harmless-weight is where it should be."""
    run, rng = again(with_lm, tmp_path / "out"), random.Random(2)
    _, chosen, rejected = train_pm.encode(run, [toy.upvoted(rng) for _ in range(6)])
    weight, pm, cfg = torch.tensor([1.0, 3.0, 1.0, 1.0, 3.0, 0.25]), train_pm.from_lm(run), PMConfig(batch=6)
    fitted = first_gradients(monkeypatch, train_pm.fit, run, "pm", cfg, pm, chosen, rejected, weight, None, "")
    pm.zero_grad(set_to_none=True)
    for a, b, w in zip(chosen, rejected, weight / weight.sum()):
        scores = [pm.score(torch.tensor([row]), torch.tensor([len(row)])) for row in (a, b)]
        (w * -F.logsigmoid(scores[0] - scores[1])).sum().backward()
    assert_close({i: p.grad for i, p in enumerate(pm.parameters())}, fitted, 3e-6)


def test_comparisons_of_no_weight_change_nothing(with_lm, tmp_path, monkeypatch):
    """--pm.harmless-weight 0, with pieces of harmless comparisons only."""
    run, rng = again(with_lm, tmp_path / "out"), random.Random(3)
    _, chosen, rejected = train_pm.encode(run, [toy.upvoted(rng) for _ in range(8)])
    weight = torch.tensor([1.0, 0.0] * 4)

    def fitted(chosen, rejected, weight, budget):
        cfg = PMConfig(batch=8, token_budget=budget)
        pm = train_pm.from_lm(run)
        return first_gradients(monkeypatch, train_pm.fit, run, "pm", cfg, pm, chosen, rejected, weight, None, "")
    alone = fitted(chosen[::2], rejected[::2], weight[::2], 0)
    assert_close(alone, fitted(chosen, rejected, weight, 1), 3e-6)


# --- activations made again, and prefill ----------------------------------------------------


def saved_bytes(function) -> int:
    """Bytes that the graph of a loss keeps for its backward pass, the weights left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and isinstance(
                tensor._base, torch.nn.Parameter)):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["lm", "pm"])
def test_recompute_gives_the_same_loss_and_gradients(monkeypatch, kind):
    net, rows = random_gpt(4, n_layer=3), random_rows(6, 9)
    if kind == "pm":
        net = ScalarModel(net)
    gpt = net.trunk if kind == "pm" else net

    def loss():
        if kind == "lm":
            return train_lm.lm_loss(net, rows, "cpu")
        ids, lengths = train_lm.pad(rows)
        return ranking_loss(*net.score(ids, lengths).chunk(2))
    blocks = counting(monkeypatch, model.Block, "forward")
    plain, size = loss(), saved_bytes(loss)
    plain.backward()
    expected = gradients(net)
    assert blocks == [6]
    blocks[0], gpt.recompute = 0, True
    again, small = loss(), saved_bytes(loss)
    assert blocks == [6]
    again.backward()
    assert blocks == [9]  # each block once more, in the backward pass
    assert torch.equal(again, plain) and equal(expected, gradients(net))
    assert small < size / 2
    with torch.no_grad():
        assert torch.equal(loss(), plain) and blocks == [12]  # nothing to recompute without a backward pass


def test_recompute_is_what_the_option_sets(with_lm, tmp_path, monkeypatch, unmeasured):
    """And it changes no weight that a stage leaves behind."""
    results = []
    for recompute in (False, True):
        run = again(with_lm, tmp_path / str(recompute), recompute=recompute)
        with monkeypatch.context() as patch:
            blocks = counting(patch, model.Block, "forward")
            train_lm.distill(run, CDConfig(documents=6, batch=3))
            train_pm.pretrain(run, PMPConfig(pairs=8, batch=4))
        results.append((weights(run, "initial.pt"), weights(run, "pmp.pt"), blocks[0]))
    (initial, pmp, n), (initial_again, pmp_again, more) = results
    assert equal(initial, initial_again) and equal(pmp, pmp_again)
    assert more == n + 2 * (2 + 2)  # two blocks, in two steps of each stage


@pytest.mark.parametrize("held", [[0, 0, 0], [4, 0, 9]])
def test_a_prefill_fills_the_cache_as_a_full_pass_does(monkeypatch, held):
    """Whether rows are empty or hold tokens already, all layers' keys and values are the same, bit for bit."""
    gpt = random_gpt(5, n_layer=3)
    torch.manual_seed(6)
    ids = torch.randint(0, V, (3, 11))
    caches = [KVCache(gpt.cfg, 3, 30) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(7)
        cache.k.normal_(), cache.v.normal_()
        cache.lengths.copy_(torch.tensor(held))
    attentions = counting(monkeypatch, F, "scaled_dot_product_attention")
    with torch.no_grad():
        gpt(ids, caches[0])
        assert attentions == [3]
        gpt(ids, caches[1], fill_only=True)
    assert attentions == [5]  # the last block's is left out
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)
    for b, n in enumerate(held):  # each layer was filled, where it should be
        filled = caches[1].k[:, b, :, n:n + 11].flatten(1).double()
        torch.manual_seed(7)
        before = torch.empty_like(caches[1].k).normal_()[:, b, :, n:n + 11].flatten(1).double()
        assert ((filled - before).abs().mean(1) > 0.1).all()
