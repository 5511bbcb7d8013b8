"""Tests of the commands from end to end: what they read, what they leave, and how they fail.

One tiny run of all five stages is trained for the session and watched. Most cases start from a copy
of its folder. The commands run inside this process, where they can be killed and watched."""
import dataclasses
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

import choices
import data
import evaluate
import hub
import pipeline
import rollout
import toy
import toy_corpus
import train_lm
import train_online
import train_pm
import train_rl
from conversation import Scorer
from data import ASSISTANT, HUMAN
from model import GPT, SIZES, GPTConfig
from pipeline import PIPELINE, PRESETS, RULES, Run, RunConfig, main
from run import UserError, file_hash, flag, load, save
from stage import Folder, Stage
from train_lm import CDConfig
from test_run import (CONFIGS, Killed, broken_checkpoints, content, default_of,
                      die_at_a_new_write)

ROOT = Path(train_rl.__file__).resolve().parent
# Each command, and the options that it takes besides --run's.
OF_LM, OF_PM = ["lm", "cd"], ["lm", "cd", "pmp", "pm"]
SCRIPTS = {"train_lm.py": (train_lm.command, OF_LM), "train_pm.py": (train_pm.command, OF_PM),
           "train_rl.py": (train_rl.command, [*OF_PM, "rl", "sft", "rm", "select"]),
           "train_online.py": (train_online.command, [*OF_PM, "rl", "online", "elo"])}
RESULTS = {stage: result for stage, (result, _) in PIPELINE.items()}
LM = "--lm.documents 120 --lm.step-tokens 512 --lm.vocab 500 --lm.warmup 7 --lm.max-grad-norm 0.6"
CD = "--cd.documents 21 --cd.batch 3 --cd.max-grad-norm 0.01"
PMP = "--pmp.pairs 28 --pmp.batch 4 --pmp.warmup 3 --pmp.max-grad-norm 0.02"
PM = ("--pm.helpful 80 --pm.harmless 70 --pm.test 40 --pm.batch 4 --pm.warmup 4 --pm.noise 0.5 "
      "--pm.turns 2 --pm.harmless-weight 3 --pm.max-response 60 --pm.max-grad-norm 0.03")
RL = ("--rl.iterations 5 --rl.batch 8 --rl.minibatch 4 --rl.eval-prompts 6 --rl.eval-every 2 "
      "--rl.eval-conversations 3 --rl.save-every 2 --rl.max-response 12 --rl.warmup 3 "
      "--rl.max-grad-norm 0.05 --rl.harmless-share 1")
ONLINE = ("--rounds 2 --online.helpful 24 --online.harmless 9 --online.test 8 --online.best-of 3 "
          "--wanted 4")
OF_STAGES = {"lm": LM, "cd": CD, "pmp": PMP, "pm": PM, "rl": RL, "online": ONLINE,
             "elo": "--elo.conversations 6"}

# ---- 1. Running a command ----------------------------------------------------


def shrink(patch):
    """Smaller models, fewer held-out texts, and states and lines every few steps."""
    steps, log, cheap = Stage.steps, Stage.log, train_pm.cheap_comparisons
    patch.setitem(SIZES, "toy", GPTConfig(2, 2, 32, context=192))
    patch.setattr(train_lm, "behavior", partial(train_lm.behavior, n=12))
    patch.setattr(train_pm, "cheap_comparisons", lambda run, cfg, split: cheap(
        run, cfg, split)[:40 if split == "test" else None])
    patch.setattr(Stage, "steps", lambda self, items, save_every, unit="step": steps(
        self, items, min(save_every, 4), unit))
    patch.setattr(Stage, "log", lambda self, step, every=1, **numbers: log(
        self, step, min(every, 3), **numbers))


def execute(script: str, *args) -> int:
    """A command -> its exit status. What would end in a traceback is raised."""
    command, prefixes = SCRIPTS[script]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(sys, "argv", [script, "--device", "cpu", *map(str, args)])
        try:
            main(command, "A stage.", **{prefix: CONFIGS[prefix] for prefix in ["run", *prefixes]})
        except SystemExit as end:
            return end.code
    return 0


def small(script: str, out: Path) -> list:
    """The options of the tiny run."""
    options = [OF_STAGES.get(prefix, "") for prefix in SCRIPTS[script][1]]
    return ["--out", out, *" ".join(options).split()]


Result = namedtuple("Result", "code out err")


@pytest.fixture
def call(capsys):
    def call(script, *args) -> Result:
        capsys.readouterr()
        code = execute(script, *args)
        return Result(code, *capsys.readouterr())
    return call


@pytest.fixture
def call_small(call):
    """A command of the tiny run, in a folder."""
    return lambda script, out, *args: call(script, *small(script, out), *args)


def assert_one_sentence(result: Result, *words):
    assert result.code == 2, result.out[-500:]
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert re.match(r"train_(lm|pm|rl|online)\.py: \S", result.err), result.err
    assert all(str(word) in result.err for word in words), result.err


# ---- 2. The watched run ------------------------------------------------------


class Watch:
    """What each stage reads, by text, in training and in evaluation; what it samples; its steps."""

    def __init__(self):
        self.stage, self.training = "", False
        self.read = {}     # (stage, "train" or "test") -> texts
        self.sampled = []  # (stage, prompt, reply, whether it finished)
        self.steps = {}    # stage -> what the optimizer used in each step
        self.weights = {}  # stage -> [(comparison, weight)]
        self.judges = []   # the policy, the reference and the PM of each evaluation
        self.shown = []    # the replies in each print of dialogues: before and after
        self.tables = []   # the numbers in the closing table: before and after
        self.names = {}    # the name of a generator -> the stages that asked for it
        self.parts = {}    # stage -> what its state holds
        self.optimizers = {}
        self.loaded = {}   # stage -> the results that it reads

    def see(self, rows, training=None):
        """Without `training`, rows are trained on where gradients are wanted."""
        training = torch.is_grad_enabled() if training is None else training
        texts = self.read.setdefault((self.stage, "train" if training else "test"), [])
        texts += [self.run.tok.decode(row) for row in rows]

    def install(self, patch):
        def before(owner, name, action):
            function = getattr(owner, name)

            def watched(*args, **kwargs):
                action(*args)
                return function(*args, **kwargs)
            patch.setattr(owner, name, watched)

        def begin(folder, name, cfg):
            self.stage, self.run, self.training = name, folder, False

        def weighted(run, stage, cfg, pm, pairs, weights):
            self.weights[self.stage] = list(zip(pairs.comparisons, weights.tolist()))

        def rows_of(pm, pairs, device):
            for pair in pairs:
                self.see(pair)

        def iterate(*_):
            self.training = True

        def evaluated(run, cfg, *models):
            self.training = False
            self.judges.append([id(model) for model in models[:3]])

        def recorded(*_):
            self.training = False

        def named(folder, *name):
            self.names.setdefault(name, set()).add(self.stage)

        def start(stage, **parts):
            self.parts[stage.name] = parts
            return start_stage(stage, **parts)
        start_stage = Stage.start
        patch.setattr(Stage, "start", start)
        before(Folder, "rng", named)
        before(Folder, "torch_rng", lambda folder, *name: named(folder, "torch", *name))
        before(Folder, "begin", begin)
        before(Run, "load_model", lambda run, name, *_: self.loaded.setdefault(
            self.stage, set()).add(name))
        before(train_pm, "fit", weighted)
        before(train_lm, "lm_loss", lambda model, rows, *_: self.see(rows))
        before(train_lm, "distillation_loss", lambda *args: self.see(args[3]))
        before(train_pm, "score_branches", rows_of)
        before(train_pm, "score_rows", lambda pm, rows, *_: self.see(rows, training=False))
        before(train_rl.Learner, "iterate", iterate)
        before(train_rl, "evaluate", evaluated)
        before(train_rl.Recorder, "content", recorded)
        before(train_rl, "side_by_side", lambda prompts, *replies: self.shown.append(replies))
        before(train_rl, "table", lambda *numbers: self.tables.append(numbers))
        sample = rollout.Sampler.__call__

        def watched_sample(sampler, prompts, uniforms, *rest):
            ro = sample(sampler, prompts, uniforms, *rest)
            if self.stage in ("cd", "rl"):
                self.see(prompts, self.training)
            decode = self.run.tok.decode
            for prompt, response, ended in zip(prompts, ro.responses(), ro.finished.tolist()):
                self.sampled.append((self.stage, decode(prompt), decode(response), ended))
            return ro
        patch.setattr(rollout.Sampler, "__call__", watched_sample)

    def step(self, optimizer, *_):
        groups = []
        self.optimizers[self.stage] = optimizer
        for group in optimizer.param_groups:
            used = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
            grads = [p.grad for p in group["params"]]
            used["norm"] = math.sqrt(sum(g.square().sum().item() for g in grads))
            used["dims"] = {p.dim() for p in group["params"]}
            groups.append(used | {"kind": type(optimizer).__name__})
        self.steps.setdefault(self.stage, []).append(groups)


def watched(*args) -> Watch:
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        watch.install(patch)
        hook = register_optimizer_step_pre_hook(watch.step)
        try:
            assert execute("train_rl.py", *args) == 0
        finally:
            hook.remove()
    return watch


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, Watch]:
    """All stages in one command (seconds, once for the session). Nothing may write there: copy."""
    out = tmp_path_factory.mktemp("trained") / "new" / "folder"  # neither exists yet
    return out, watched(*small("train_rl.py", out))


@pytest.fixture
def copy(trained, tmp_path):
    """copy("pm"): the trained folder without the results of stage 4 and later."""
    def copy(since=None) -> Path:
        out = tmp_path / "copy"
        shutil.copytree(trained[0], out)
        stages = list(RESULTS)
        for stage in stages[stages.index(since):] if since else []:
            (out / RESULTS[stage]).unlink()
        return out
    return copy


@pytest.fixture
def opened(trained, monkeypatch) -> tuple[Run, dict]:
    """The trained folder and its config, for further evaluation."""
    shrink(monkeypatch)
    return evaluate.open_run(str(trained[0]), "cpu")


def lines(out: Path, stage: str) -> list[dict]:
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        found.append(json.loads(line, parse_constant=pytest.fail))  # JSON has no NaN
    return [line for line in found if line["stage"] == stage]


def test_a_whole_run_leaves_its_files_and_rests_on_parents(trained):
    out = trained[0]
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert names == {".lock", "config.json", "tokenizer.json", "metrics.jsonl", "samples.txt",
                     "record.jsonl", "report.html", "train.jsonl", "test.jsonl", *RESULTS.values()}
    assert len(list(out.glob("comparisons/*/*.jsonl"))) == 4
    for stage, (result, parents) in PIPELINE.items():
        assert trained[1].loaded.get(stage, set()) == set(parents)
        assert load(out / result)["parents"] == file_hash([out / parent for parent in parents])
    assert [line["step"] for line in lines(out, "rl")] == [0, 1, 2, 3, 4, 5, 6]
    evaluated = [line["step"] for line in lines(out, "rl") if "eval_kl" in line]
    assert evaluated == [0, 2, 4, 6]
    config = json.loads((out / "config.json").read_text())
    assert len(trained[1].read["lm", "test"]) == 120  # no more than --lm.documents
    for stage, parts in trained[1].parts.items():  # what a state must hold
        assert parts["optimizer"] is trained[1].optimizers[stage], stage
        saved, network = load(out / RESULTS[stage])["model"], next(iter(parts.values()))
        assert all(map(torch.equal, saved.values(), network.state_dict().values())), stage
    for name, stages in trained[1].names.items():
        assert len(stages) == 1, f"two stages draw the same random numbers: {name}"
    assert config["pm"]["noise"] == 0.5 and config["rl"]["batch"] == 8 and set(config) == {
        "run", *RESULTS}


def test_toy_train_and_test_are_disjoint_in_every_stage(trained):
    """By text. A held-out question opens no training text of any stage, not even in passing."""
    read, held_out = trained[1].read, set()
    for stage in ("cd", "pmp", "pm", "rl"):
        texts = read[stage, "test"]
        if stage == "cd":  # held-out documents for the KL, then held-out prompts for behavior
            texts = [text for text in texts if text.endswith(ASSISTANT)]
        assert len(texts) > 8
        questions = set()
        for text in texts:
            prompt = text[:text.rfind(ASSISTANT)]
            turns = prompt.removeprefix(toy_corpus.HHH_HEADER).split(HUMAN)
            if len(turns) == 2:  # the only question, so it needs no context to be the same one
                question = turns[1].strip()
                for template in toy_corpus.FORUM_TEMPLATES:
                    question = question.removeprefix(template.format(""))
                questions.add(question)
        assert len(questions) > 2
        held_out |= questions
    for stage in RESULTS:
        texts = read[stage, "train"]
        assert len(texts) > 20 and len(set(texts)) > 10
        found = {question for question in held_out for text in texts if question in text}
        assert not found, (stage, found)
        # Documents are drawn anew for the test, and some short pages may agree by chance.
        assert len(set(read[stage, "test"]) & set(texts)) < 0.1 * len(set(texts)), stage
    assert set(read["lm", "train"]) - set(read["cd", "train"])


def write_set(root: Path) -> Path:
    for subset in ("helpful-base", "harmless-base"):
        for split, n in (("train", 30), ("test", 12)):
            write(root / subset / f"{split}.jsonl", rows(n, f"{subset}/{split}"))
    return root


def rows(n: int, name: str) -> list[dict]:
    """n comparisons of one to three exchanges, in the format of HH-RLHF, that say their file."""
    rng, found = random.Random(name), []
    things = "bread soup tea rice a kite a boat a song a letter".split()
    for i in range(n):
        text = ""
        for turn in range(i % 3):
            text += f"{HUMAN} Tell me {turn} of {name}, {rng.choice(things)}.{ASSISTANT} It is."
        text += f"{HUMAN} Question {name} {i}: how do I make {rng.choice(things)}?{ASSISTANT}"
        found.append({"chosen": f"{text} Take your time, and ask for {rng.choice(things)} {i}.",
                      "rejected": f"{text} No, {rng.choice(things)}."})
    return found


def write(path: Path, found: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return path


GOOD = rows(3, "good")
REAL = ("--tokenizer bpe --context 160 --lm.vocab 400 --lm.step-tokens 1000 --cd.documents 0 "
        "--pm.batch 4").split()


def test_real_train_and_test_are_disjoint_in_every_stage(tmp_path, capsys):
    """By text: each row of the data says in its question which file it is from. A subset that is
    not asked for is read by no stage."""
    root, out = write_set(tmp_path / "set"), tmp_path / "out"
    for split, n in (("train", 30), ("test", 12)):
        write(tmp_path / "cheap" / "harmless" / f"{split}.jsonl", rows(n, f"cheap/{split}"))
        write(root / "helpful-other" / f"{split}.jsonl", rows(n, f"other/{split}"))
    watch = watched("--data", root, "--out", out, *REAL, *RL.split(), "--pmp.data",
                    tmp_path / "cheap", "--subsets", " harmless-base, helpful-base,")
    said = capsys.readouterr().out
    for stage in ("lm", "pmp", "pm", "rl"):
        for split, other in (("train", "test"), ("test", "train")):
            texts = watch.read[stage, split]
            assert len(set(texts)) >= 5
            for text in texts:
                assert f"/{split} " in text or f"/{split}," in text, (stage, text)
                assert f"/{other} " not in text and f"/{other}," not in text, (stage, text)
                assert ("cheap/" in text) == (stage == "pmp") and "other/" not in text
    assert len(watch.read["lm", "train"]) == 60 and len(watch.read["pm", "train"]) == 120
    assert all("Take your time" in text for text in watch.read["lm", "train"])  # the chosen side
    for subset in ("helpful-base", "harmless-base"):
        for stage in ("lm", "pm", "rl"):
            assert any(subset in text for text in watch.read[stage, "test"])
    for text in watch.read["rl", "train"] + watch.read["rl", "test"]:
        assert text.endswith(f"?{ASSISTANT}")
    assert "exceed 147 tokens" in said  # 160 less a response of 12 and end-of-context
    closing = said[said.index("held-out prompts"):]
    assert "red-team" in closing and "true" not in closing  # no ground truth here
    assert "Question h" in (out / "samples.txt").read_text()
    assert not (out / "comparisons").exists()


def test_comparisons_are_finished_replies_to_their_own_prompts(trained):
    """Held against all that was sampled in stage 4."""
    out, watch = trained
    finished, counted = {}, 0
    for stage, prompt, reply, ended in watch.sampled:
        if stage == "pm" and ended:
            finished.setdefault(prompt, []).append(reply)
    for kind in ("helpful", "harmless"):
        for split in ("train", "test"):
            path = out / "comparisons" / f"{kind}-base" / f"{split}.jsonl"
            for row in map(json.loads, path.read_text().splitlines()):
                prompt, chosen, rejected = data.split_comparison(row["chosen"], row["rejected"])[0]
                assert chosen in finished[prompt] and rejected in finished[prompt]
                assert chosen != rejected and chosen.strip() and rejected.strip()
                p = toy.preference(prompt, chosen, rejected, kind, 0.5)
                assert row["p_chosen"] == pytest.approx(p)
                assert (toy.understand(prompt).skill.name == "red-team") == (kind == "harmless")
                counted += 1
    for comparison, weight in watch.weights["pm"]:  # lambda is 3
        is_harmless = toy.understand(comparison.prompt).skill.name == "red-team"
        assert weight == (3 if is_harmless else 1)
    assert counted > 40 and any(not ended for stage, *_, ended in watch.sampled if stage == "pm")


def test_the_accuracy_of_stage_4_from_its_files(opened):
    """Rebuilt from pm.pt and the comparisons on disk: row by row, without pads, in float64. Scores
    are of the order of 1, sums of some 100 terms: float32 may be off by 6e-8 x 100 < 1e-5."""
    run, pm = opened[0], opened[0].load_model("pm.pt").double()
    measured, every_score = {"all": []}, []
    for kind in ("helpful", "harmless"):
        measured[kind] = []
        path = run.path(f"comparisons/{kind}-base/test.jsonl")
        for row in map(json.loads, path.read_text().splitlines()):
            scores = []
            for side in ("chosen", "rejected"):
                ids = run.tok.encode_dialogue(row[side]) + [run.tok.end_of_context]
                scores.append(pm(torch.tensor([ids]))[0, -1].item())
            every_score += scores
            ceiling = max(row["p_chosen"], 1 - row["p_chosen"])
            for name in (kind, "all"):
                measured[name].append((scores[0] - scores[1], ceiling))
    reported = {line["subset"]: line for line in lines(run.out, "pm") if "subset" in line}
    assert reported.keys() == measured.keys()
    for name, line in reported.items():
        margins, ceilings = zip(*measured[name])
        n = len(margins)
        assert line["n"] == n > 3
        hits, unsure = sum(m > 1e-5 for m in margins), sum(abs(m) <= 1e-5 for m in margins)
        assert hits / n - 1e-6 <= line["accuracy"] <= (hits + unsure) / n + 1e-6
        loss = sum(math.log1p(math.exp(-m)) for m in margins) / n
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["bayes"] == pytest.approx(sum(ceilings) / n, abs=1e-6)
    # The mean of all held-out scores was subtracted, and it was not 0 before.
    assert abs(sum(every_score) / len(every_score)) < 1e-5 < abs(pm.mean.item())


def test_schedules_and_optimizers_of_all_stages(trained):
    """Each step's learning rate, betas, weight decay and clipping, by the documented formulas."""
    steps = trained[1].steps
    n = {stage: len(found) for stage, found in steps.items()}
    assert n["cd"] == 7 and n["pmp"] == 7 and n["rl"] == 5 * 2 and n["lm"] > 15 and n["pm"] > 8
    lm, cd, pmp, pm, rl = (CONFIGS[stage]() for stage in RESULTS)
    expected = {
        "lm": lambda i: lm.lr * min(1, (i + 1) / 7) * (1 + math.cos(math.pi * i / n["lm"])) / 2,
        "cd": lambda i: cd.lr * (1 - i / n["cd"]),
        "pmp": lambda i: pmp.lr * min(1, (i + 1) / 3),
        "pm": lambda i: pm.lr * min(1, (i + 1) / 4),
        "rl": lambda i: rl.lr * min(1, (i // 2 + 1) / 3),  # two minibatches an iteration
    }
    clip = {"lm": 0.6, "cd": 0.01, "pmp": 0.02, "pm": 0.03, "rl": 0.05}
    for stage, found in steps.items():
        for i, groups in enumerate(found):
            for group in groups:
                assert group["betas"] == ((0.9, 0.98) if stage == "lm" else (0.9, 0.95))
                assert group["kind"] == ("Adam" if stage == "rl" else "AdamW")
                assert group["eps"] == (1e-5 if stage == "rl" else 1e-8)
                decay = lm.weight_decay if stage == "lm" and group is groups[0] else 0
                assert group["weight_decay"] == decay, stage
            assert groups[0]["lr"] == pytest.approx(expected[stage](i)), (stage, i)
            ratio = rl.critic_lr / rl.lr if stage == "rl" else 1
            assert groups[-1]["lr"] == pytest.approx(ratio * expected[stage](i)), (stage, i)
            norms = [group["norm"] for group in groups]
            if stage != "rl":  # in RL, policy and critic are clipped each by itself
                norms = [math.hypot(*norms)]
            # float32 norms of 30,000 numbers, and clip_grad_norm_'s 1e-6
            assert max(norms) <= clip[stage] * 1.001, (stage, i)
        largest = max(group["norm"] for groups in found for group in groups)
        assert largest > 0.9 * clip[stage], stage  # clipping was needed
    assert steps["lm"][0][0]["dims"] == {2} and steps["lm"][0][1]["dims"] == {1}


def test_table_and_samples_are_of_the_saved_models(trained, opened):
    """Evaluated again from the checkpoints: the first and the last line of stage 5."""
    out, (run, config) = trained[0], opened
    policy, initial, pm = map(run.load_model, ("policy.pt", "initial.pt", "pm.pt"))
    cfg = train_rl.RLConfig(**config["rl"])
    prompts = evaluate.Prompts(run, cfg.max_response, cfg.harmless_share).held_out(6)
    assert prompts.kinds.count("harmless") > 0 and len(prompts.ids) == 9
    columns, samples = [], (out / "samples.txt").read_text()
    for model, line, name in ((initial, 0, "initial:"), (policy, -1, "RLHF:")):
        numbers, replies = evaluate.evaluate(run, cfg, model, initial, pm, prompts)
        logged = lines(out, "rl")[line]
        for key, number in numbers.items():
            found = logged[f"eval_{key}"]
            assert found == pytest.approx(number, abs=2e-6) or math.isnan(number), key
        columns.append(numbers)
        assert f"{name:<12}"[:8] + replies[0] in samples
    assert columns[0]["kl"] == 0 != columns[1]["kl"]
    for prompt in trained[1].read["rl", "train"]:  # --rl.harmless-share is 1
        assert toy.understand(prompt).skill.name == "red-team"
    # What was printed on the way: always the same initial replies, and new numbers each time.
    assert len(trained[1].shown) == 3 and replies == trained[1].shown[-1][1]
    for replies_before, replies_after in trained[1].shown:
        assert replies_before == trained[1].shown[0][0] != replies_after
    for found, numbers in zip(trained[1].tables[0], columns, strict=True):
        assert found == pytest.approx(numbers, abs=1e-6, nan_ok=True)
    assert len({line["eval_kl"] for line in lines(out, "rl") if "eval_kl" in line}) == 4
    policies, references, pms = map(list, zip(*trained[1].judges))  # the first two are one
    assert policies == references[:1] + policies[-1:] * 3 and len(set(pms)) == 1
    assert len(set(references)) == 1 and policies[0] != policies[1]


# ---- 3. Repeating, killing, resuming -----------------------------------------


def test_stages_one_by_one_are_the_same_run(trained, copy, call_small):
    """Over what an earlier run left: nothing of it leaks into the new one."""
    out = copy()
    assert call_small("train_pm.py", out).code == 0
    assert not lines(out, "rl")  # they were about another PM
    result = call_small("train_rl.py", out)
    assert result.code == 0 and result.out.count("is there and used as it is") == 4
    assert content(out) == content(trained[0])


def test_another_seed_changes_every_stage(trained, copy, call_small):
    """On top of one and the same LM."""
    out = copy("cd")
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
    assert call_small("train_rl.py", out, "--seed", 1).code == 0
    one, two = content(out), content(trained[0])
    equal = {name for name in one if one[name] == two[name]}
    assert equal == {".lock", "lm.pt", "tokenizer.json"}
    same = [line for line in one["metrics.jsonl"] if line in two["metrics.jsonl"]]
    assert {line["stage"] for line in same} == {"lm"}


def test_killed_at_each_write_and_resumed(trained, tmp_path, call_small, monkeypatch):
    """A death at each file that a run writes, in all five stages. Takes seconds, because each of
    some fifty lives reads its data again."""
    out, seen, deaths = tmp_path / "killed", set(), 0
    while True:
        with monkeypatch.context() as patch:
            die_at_a_new_write(patch, seen, before_odd=False)
            try:
                assert call_small("train_rl.py", out, "--resume").code == 0
                break
            except Killed:
                deaths += 1
        if (out / "metrics.jsonl").exists():
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"stage": "rl", "step": 4, "sco')  # what was being written
    assert deaths > 30
    assert content(out) == content(trained[0])


@pytest.mark.parametrize("stage", RESULTS)
@pytest.mark.parametrize("broken, is_last", [
    ("gradient", False), ("gradient", True), ("update", True)])
def test_nan_never_reaches_a_checkpoint(trained, copy, call_small, monkeypatch, stage, is_last,
                                        broken):
    """Not in the step before a save, and not in the last one: one sentence, and no spoiled weights.
    A run that is resumed after it ends as if nothing had happened."""
    out, count, clip = copy(stage), [0], torch.nn.utils.clip_grad_norm_
    older = {path.name: path.read_bytes() for path in out.glob("*.pt")}
    bad_step = len(trained[1].steps[stage]) - 1 if is_last else 3
    n_clips = 2 if stage == "rl" else 1  # policy and critic

    def broken_clip(parameters, *args):
        parameters = list(parameters)
        if count[0] == bad_step * n_clips:
            parameters[0].grad.fill_(float("nan"))
        count[0] += 1
        return clip(parameters, *args)

    def broken_update(optimizer, *_):
        if count[0] == bad_step:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
        count[0] += 1
    if broken == "gradient":
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", broken_clip)
            result = call_small("train_rl.py", out)
        where = f"iteration {bad_step // 2}" if stage == "rl" else f"step {bad_step}"
        assert_one_sentence(result, where, "nan")
    else:
        hook = register_optimizer_step_post_hook(broken_update)
        result = call_small("train_rl.py", out)
        hook.remove()
        assert_one_sentence(result, "nan")
    for name, part in load(out / f"{stage}_state.pt")["parts"].items():
        assert name == "optimizer" or all(w.isfinite().all() for w in part.values())
    found = {p.name: p.read_bytes() for p in out.glob("*.pt") if "state" not in p.name}
    assert found == older
    result = call_small("train_rl.py", out, "--resume")
    assert result.code == 0 and (stage != "pm" or "sampled" not in result.out)
    assert content(out) == content(trained[0])


def test_stopped_while_sampling_comparisons(copy, call_small, monkeypatch):
    """With other options over a finished folder: the old PM is not taken for the new one."""
    out, other = copy(), ["--pm.helpful", 40]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        seen = {str(out / "config.json"), (str(out / "pm_state.pt"), None)}
        die_at_a_new_write(patch, seen, before_odd=False)
        call_small("train_pm.py", out, *other)
    assert len(list(out.glob("comparisons/*/*.jsonl"))) == 1  # the old ones are gone
    result = call_small("train_rl.py", out, "--resume")
    assert_one_sentence(result, "--pm.helpful was 40, now 80")
    result = call_small("train_rl.py", out, *other)
    assert result.code == 0 and "pm.pt is unfinished" in result.out
    n_read = re.search(r"conversations, helpful train: read (\d+)", result.out)
    assert 0 < int(n_read[1]) <= 40


def test_a_new_lm_makes_the_old_pm_stale(copy, call_small):
    """So does a new initial policy. And stages can be left out, or one kind of comparison."""
    out, none = copy(), "--cd.documents 0 --pmp.pairs 0 --pm.harmless 0".split()
    save(out / "initial.pt", **load(out / "initial.pt") | {"more": 1})
    result = call_small("train_rl.py", out)
    assert_one_sentence(result, out / "pm.pt", "not trained from the present", out / "initial.pt")
    other = ["--lm.lr", 0.01, "--lm.warmup", 0, *none[:2]]
    assert call_small("train_lm.py", out, *other).code == 0
    (out / "initial.pt").unlink()
    result = call_small("train_lm.py", out, *other, "--resume")
    assert result.code == 0 and f"nothing to resume: {out / 'lm.pt'}" in result.out
    result = call_small("train_rl.py", out)
    assert_one_sentence(result, out / "pmp.pt", "was not trained from the present")
    (out / "pmp.pt").unlink()
    (out / "pm.pt").unlink()
    result = call_small("train_pm.py", out, *none)
    assert result.code == 0 and "(ignored: --lm.lr was 0.01, now 0.005; --" in result.out
    lm, initial, pmp = (load(out / name)["model"] for name in ("lm.pt", "initial.pt", "pmp.pt"))
    assert all(torch.equal(lm[k], initial[k]) for k in lm) and "pmp_state.pt" not in os.listdir(out)
    assert torch.equal(lm["positions.weight"], pmp["trunk.positions.weight"])
    assert [path.parent.name for path in out.glob("comparisons/*/*")] == ["helpful-base"] * 2


def write_choices(path: Path, n: int) -> Path:
    """n conversations of people, whose questions the toy world does not know."""
    texts = []
    for row, kind in zip(rows(n, path.name), ["helpful", "harmless"] * n):
        texts.append(json.dumps(row | {"kind": kind, "conversation": row["chosen"]}) + "\n")
    path.write_text("".join(texts))
    return path


@pytest.mark.parametrize("alone", [False, True])
def test_the_pm_learns_from_peoples_choices(copy, call_small, tmp_path, alone):
    """With the simulated ones or alone, from two files; what is held out is not trained on."""
    out, paths = copy("pm"), [write_choices(tmp_path / f"{name}.jsonl", 40) for name in "ab"]
    args = ["--comparisons", paths[0], "--comparisons", paths[1]]
    if alone:
        args += ["--pm.helpful", 0, "--pm.harmless", 0]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch()
        watch.install(patch)
        assert call_small("train_pm.py", out, *args).code == 0
    trained_on = {c.prompt + c.chosen for c, _ in watch.weights["pm"]}
    people = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    held_out = [row for row in people if row["chosen"] not in trained_on]
    for row in people:
        assert choices.is_held_out(row["chosen"]) == (row in held_out)
    assert 2 < len(held_out) < 25
    for c, weight in watch.weights["pm"]:
        assert weight == (3 if c.kind == "harmless" else 1)
    reported = {line["subset"]: line for line in lines(out, "pm") if "subset" in line}
    kinds = ["helpful", "harmless", "all"]
    assert list(reported) == ([] if alone else kinds) + [f"people {kind}" for kind in kinds]
    assert reported["people all"]["n"] == len(held_out) and "low" in reported["people all"]
    n_simulated = len(trained_on) - len(people) + len(held_out)
    assert (n_simulated == 0) == alone
    # The mean that is subtracted is that of the simulated held-out replies, if there are some.
    scored = held_out
    if not alone:
        scored = []
        for path in out.glob("comparisons/*/test.jsonl"):
            scored += [json.loads(line) for line in path.read_text().splitlines()]
    pm, ids = Scorer(out, device="cpu"), []
    for row in scored:
        for side in ("chosen", "rejected"):
            ids.append(pm.tok.encode_dialogue(row[side]) + [pm.tok.end_of_context])
    assert abs(train_pm.score_rows(pm.net, ids).mean()) < 1e-5 < abs(pm.net.mean)
    # Stage 5 goes on as usual, without the option.
    result = call_small("train_rl.py", out)
    assert result.code == 0 and "(ignored: " in result.out and "--pm.people was" in result.out


# ---- 4. Mistakes -------------------------------------------------------------


@pytest.mark.parametrize("text, more, words", [
    (None, "", "ours.jsonl does not exist"), ("{}\n{", "", "ours.jsonl:1: no text in the field"),
    ("", "", "no usable choice in"), ("", "--pm.helpful 0 --pm.harmless 0", "no usable choice"),
    ("one", "--pm.helpful 0 --pm.harmless 0", "too few conversations")])
def test_a_file_of_choices_that_cannot_be_used(tmp_path, call_small, text, more, words):
    path = tmp_path / "ours.jsonl"
    if text == "one":
        write_choices(path, 1)
    elif text is not None:
        path.write_text(text)
    args = ["--comparisons", path, *more.split()]
    assert_one_sentence(call_small("train_pm.py", tmp_path / "out", *args), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, args, words", [
    ("train_rl.py", "--rl.max-response 185", "--rl.max-response 185 leaves no room"),
    ("train_rl.py", "--pm.max-response 185", "--pm.max-response 185 leaves no room"),
    ("train_rl.py", "--pm.helpful 0 --pm.harmless 0", "--pm.helpful 0 --pm.harmless 0 leave"),
    ("train_rl.py", "--pmp.data x", "--pmp.data is for real data"),
    ("train_rl.py", "--export setup.cfg/x", "cannot write setup.cfg/x"),
    ("train_rl.py", "--context 40 --pm.max-response 12", "tokens that is distilled"),
    ("train_rl.py", "--lm.vocab 300 --context 140 --pm.max-response 12", "a larger --lm"),
    ("train_rl.py", "--lm.documents 1000000000", "stage 'lm' takes about"),
    ("train_rl.py", "--context 1000000000", "stage 'lm' takes about"),
    *[(script, "--size 52B", "stage 'lm' takes about") for script in SCRIPTS],
    ("train_lm.py", "--context 40", "tokens that is distilled"),
    ("train_pm.py", "--pm.test 1000000000", "stage 'pm' takes about"),
    ("train_rl.py", "--rl.slots 1000000000", "stage 'rl' takes about"),
    ("train_pm.py", "--pm.max-response 185", "--pm.max-response 185 leaves no room"),
    ("train_rl.py", "--context 30", "--context 30"),
    ("train_lm.py", "--lm.vocab 299", "--lm.vocab 299 is too small"),
    ("train_rl.py", "--pm.test 0", "--pm.test 0"), ("train_lm.py", "--export x", "train_rl.py")])
def test_options_that_cannot_be(tmp_path, monkeypatch, call_small, script, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("a file, not a folder")
    assert_one_sentence(call_small(script, tmp_path / "out", *args.split()), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["helpful-base/train", "harmless-base/test"])
def test_a_mistake_in_the_data_is_found_before_training(tmp_path, call, where):
    """And the same command with the mistake mended works: the folder does not refuse it."""
    bad = {"chosen": "Hello.", "rejected": " "}
    path = write(write_set(tmp_path / "set") / f"{where}.jsonl", [*GOOD[:2], bad, *GOOD])
    args = ["train_lm.py", "--data", tmp_path / "set", "--out", tmp_path / "out", *REAL[:-2]]
    assert_one_sentence(call(*args), f"{path}:3: 'chosen' is not")
    assert not (tmp_path / "out").exists()
    write(path, GOOD)
    assert call(*args, "--lm.documents", 8).code == 0


@pytest.fixture
def real(tmp_path) -> Run:
    options = {"data": str(write_set(tmp_path / "set")), "out": str(tmp_path / "out")}
    run = Run(RunConfig(**options, tokenizer="bpe", device="cpu"))
    run.tok = data.train_bpe([row["chosen"] for row in rows(200, "tokens")], 400)
    return run


@pytest.mark.parametrize("split, n", [("train", 60), ("test", 24)])
def test_a_limit_takes_some_of_each_subset(real, capsys, split, n):
    """--lm.documents and --pm.comparisons, of which 0 is no limit."""
    found, cfg = data.load_comparisons(real.data, split)[0], train_pm.PMConfig(comparisons=20)
    assert train_pm.comparisons(real, train_pm.PMConfig(), split) == found
    cfg.comparisons = n
    assert train_pm.comparisons(real, cfg, split) == found
    assert "left out" not in capsys.readouterr().out
    cfg.comparisons = 20
    some, texts = train_pm.comparisons(real, cfg, split), train_lm.corpus(real, 20, split, "lm")
    said = capsys.readouterr().out
    assert f"{n - 20} of {n} {split} comparisons left out by --pm.comparisons" in said
    assert ("40 of 60 dialogues left out by --lm.documents" in said) == (split == "train")
    assert texts != train_lm.corpus(real, 20, split, "cd")
    for kept in ([c.prompt + c.chosen for c in some], texts):
        assert len(set(kept)) == len(kept) == 20
        assert set(kept) < {c.prompt + c.chosen for c in found}
        # Both subsets: all 20 are of one with a probability below 1e-3, and the seed is fixed.
        assert 0 < sum("harmless-base" in text for text in kept) < 20


def test_early_checks_of_real_data(real, tmp_path):
    """A split, or --pmp.data, of which nothing fits the context; and what is not looked at."""
    pmp = train_pm.PMPConfig(data=str(tmp_path / "cheap"))
    long = [{side: row[side] + " and so on" * 400 for side in row} for row in GOOD]
    for path, words in (("set/harmless-base/train", "no train comparison of .*set"),
                        ("set/harmless-base/test", "no test comparison of .*set"),
                        ("cheap/helpful-base/train", "no train comparison of .*cheap"), ("", "")):
        write(tmp_path / "cheap" / "helpful-base" / "train.jsonl", [long[0], *GOOD])  # most fit
        write_set(tmp_path / "set")
        if path:
            write(tmp_path / f"{path}.jsonl", long)
        real.checks, real.subsets = [], ["harmless-base"]
        train_pm.check_early(real, CDConfig(documents=0), pmp, train_pm.PMConfig())
        if words:
            with pytest.raises(UserError, match=f"{words} fits a context of 512 tokens"):
                real.use_tokenizer(real.tok)
        else:
            real.use_tokenizer(real.tok)
    with pytest.raises(UserError, match="--rl.max-response 500 leaves no room"):
        train_pm.check_early(real, CDConfig(), pmp, train_pm.PMConfig(), 500)
    # Without held-out comparisons of its own, PMP is not measured.
    assert len(train_pm.cheap_comparisons(real, pmp, "train")) == 4
    assert train_pm.cheap_comparisons(real, pmp, "test") == []
    with pytest.raises(UserError, match="typo"):
        train_pm.cheap_comparisons(real, train_pm.PMPConfig(data="typo"), "train")


def test_early_checks_of_the_toy(real):
    """The longest of 1,000 prompts, a response and the PM's token must fit."""
    real.toy = True
    half = train_pm.PMConfig(harmless_weight=0)
    train_pm.check_early(real, CDConfig(), train_pm.PMPConfig(), half)
    real.checks, pm = [], train_pm.PMConfig(helpful=0, max_response=20)
    train_pm.check_early(real, CDConfig(documents=0), train_pm.PMPConfig(pairs=0), pm, 30)
    longest, rng = 0, real.rng("check prompts")
    for i in range(1000):
        prompt = toy_corpus.draw_prompt(rng, "helpful" if i % 3 else "harmless", held_out=False)
        longest = max(longest, len(real.tok.encode_dialogue(prompt)))
    for room, words in ((31, ""), (30, "--rl.max-response 30 do not fit"), (20, "--pm.max-resp")):
        real.context = longest + room
        if words:
            with pytest.raises(UserError, match=words):
                real.use_tokenizer(real.tok)
        else:
            real.use_tokenizer(real.tok)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_documents_every_field(capsys, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == ""
    assert re.search(f"^  tiny: --lm.documents {PRESETS['tiny']['lm.documents']}", out, re.M)
    assert re.search("^  gpt2-medium-hh: --data .* --recompute$", out, re.M)
    # One entry an option: "--name VALUE   help (default: x)", folded; the folds are taken out.
    entries, expected = dict(re.findall(r"^  (--[\w.-]+)(.*(?:\n {4,}.*)*)", out, re.M)), set()
    for prefix in ["run", *SCRIPTS[script][1]]:
        config = CONFIGS[prefix]
        for field in dataclasses.fields(config):
            name = flag(f"{prefix}.{field.name}")
            words = entries[name].split()
            if f"{prefix}.{field.name}" in RULES["aliases"]:
                assert words[1] == RULES["aliases"][f"{prefix}.{field.name}"]
                words = words[2:]
            text = " ".join(words if field.type is bool else words[1:])
            help_, default = re.fullmatch(r"(.*) \(default: ?(.*)\)", text).groups()
            assert len(help_) >= 4 and default == str(default_of(field)), (name, text)
            expected.add(name)
    assert set(entries) == expected


# ---- 5. Real comparisons and a GPT-2 -----------------------------------------


@pytest.fixture(params=["small", "gpt2"])
def pretrained(request, tmp_path, monkeypatch) -> tuple[Path, data.Tokenizer]:
    """A folder with random weights in GPT-2's format; a small encoding, or GPT-2's own."""
    if request.param == "gpt2":
        tok = request.getfixturevalue("gpt2")
    else:
        tok = data.train_bpe([row["chosen"] for row in rows(200, "tokens")], 400)
        monkeypatch.setattr(train_lm, "gpt2_tokenizer", lambda: tok)
        hello = f"{HUMAN} Hello.{ASSISTANT} Hello! How can I help?"
        monkeypatch.setattr(train_lm, "HHH_PROMPT", hello)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 1, 64, vocab_size=tok.n_tokens - 1, context=256))
    hub.export_gpt2(gpt, tmp_path / "gpt2", tok)  # it does not know <|endofcontext|>
    return tmp_path / "gpt2", tok


def test_a_gpt2_through_all_stages(tmp_path, call, pretrained):
    folder, tok = pretrained
    root, out, export = write_set(tmp_path / "set"), tmp_path / "out", tmp_path / "export"
    args = ["--data", root, "--out", out, "--init", folder, "--context", 250, "--pm.batch", 8,
            "--cd.documents", 6, "--cd.batch", 3, *RL.split(), "--rl.iterations", 2]
    result = call("train_rl.py", *args, "--export", export)
    assert result.code == 0 and "[2] context distillation: 6 documents" in result.out, result.err
    assert "preference-model pretraining: skipped; no --pmp.data is given" in result.out
    given = hub.load_gpt2(folder, tok.n_vocab, 250).state_dict()
    lm, policy = (load(out / name)["model"] for name in ("lm.pt", "policy.pt"))
    assert lm.keys() == given.keys() and all(torch.equal(lm[k], given[k]) for k in lm)
    assert lm["embed.weight"].shape == (tok.n_vocab, 64) and len(lm["positions.weight"]) == 250
    # Nothing is evaluated twice: not after the last update, in addition to the end.
    assert [line["step"] for line in lines(out, "rl") if "eval_kl" in line] == [0, 3]
    # The export is the policy, of which all parts have learned.
    exported = hub.load_gpt2(export, tok.n_vocab)
    assert exported.cfg == GPTConfig(2, 1, 64, tok.n_vocab, 250)
    for key, weight in exported.state_dict().items():
        assert torch.equal(policy[key], weight) and not torch.equal(weight, lm[key])
    # A finished run is exported without training it again.
    before = content(out)
    result = call("train_rl.py", *args, "--export", tmp_path / "later", "--resume")
    assert result.code == 0 and "nothing to resume" in result.out and content(out) == before
    for path in export.iterdir():
        assert path.read_bytes() == (tmp_path / "later" / path.name).read_bytes()


@pytest.mark.parametrize("pretrained", ["small"], indirect=True)
def test_init_and_a_folder_made_with_it(tmp_path, call, pretrained, monkeypatch):
    """What cannot be is said before a folder is made. A later stage takes the shape of all models
    from lm.pt, which is not trusted."""
    root, out, init = write_set(tmp_path / "set"), tmp_path / "out", ["--init", pretrained[0]]
    args = ["--data", root, "--out", out, "--context", 160, "--cd.documents", 0]
    for script in SCRIPTS:
        people = ["--people", tmp_path / "none yet"] if script == "train_online.py" else []
        assert_one_sentence(call(script, *args, *people, "--init", tmp_path / "typo"), "typo")
        assert_one_sentence(call(script, *args, *people, *init, "--context", 257),
                            "256 positions")
        assert not out.exists()
    shapes = []
    monkeypatch.setattr(pipeline, "check_stage", lambda name, cfg, *rest: shapes.append(cfg))
    assert call("train_lm.py", *args, *init).code == 0
    assert shapes == [GPTConfig(2, 1, 64, pretrained[1].n_vocab, 160)]  # of stage 2, once known
    for _, wrong in broken_checkpoints(load(out / "lm.pt")):
        torch.save(wrong, out / "lm.pt")
        assert_one_sentence(call("train_pm.py", *args, *init), out / "lm.pt")
