"""The weekly round of HH §4.5: deploy, collect comparisons, train a new PM, a new policy, repeat.

    python train_online.py --out out/toy-0 --rounds 3
    python train_online.py --out out/toy-0 --rounds 3 --people choices.jsonl --wanted 100

It continues a run that has stages 1 to 4, and runs them first if they are missing. Round k works in
a folder of its own, OUT/online/round-k, which chat.py, evaluate.py and report.py open like any run:
  1. Deploy. In round 1 people choose between replies that are the best of 16 (the tranche "rs",
     §2.3), and later between those of several snapshots of the last round's policy ("online").
     With --people the round stops here, and goes on when people have made enough choices.
  2. PM. It is trained from pmp.pt on all comparisons so far, with stage 4's options.
  3. RLHF. It starts from the initial policy, with stage 5's options.
  4. Elo. The policy is matched against the initial policy and those of all earlier rounds, in chats
     where both answer at each turn (App. B.5). Toy only: here simulated people choose.
What is complete is used as it is; --resume continues a step that was interrupted. To begin anew,
delete OUT/online. Read this file in this order:
  1. Folders   a round's folder shares the files of stages 1 to 3, and all earlier comparisons
  2. Deploy    step 1, with simulated people or with real ones
  3. Elo       step 4, the table and the picture
  4. Command   the rounds

Papers: HH = Bai et al. 2022 (arXiv 2204.05862); a § or App. without a name is in HH.
"""
import copy
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from run import (  # before torch: Ctrl-C prints no traceback
    UserError, file_hash, is_first, load, save, write_atomically)

import torch

import ranks
import report
from choices import read_choices
from collect import collect_from, match
from curves import Line, chart, picture, read_lines
from data import write_comparisons
from evaluate import load_policy
from pipeline import PIPELINE, SPEED_OPTIONS, Run, RunConfig, main
from ppo import PPOConfig, pm_scores
from ratings import elo_error, fit_elo
from rollout import Rollouts, Sampler
from train_lm import CDConfig, LMConfig
from train_pm import PMConfig, PMPConfig, check_early, delete_comparisons, ensure, train as train_pm
from train_rl import RLConfig, train as train_rl


@dataclass
class OnlineConfig:
    rounds: int = 3          # rounds in all (HH some five, a week each); more continue a run
    helpful: int = 3000      # toy: new comparisons on helpful prompts, a round (HH some 4k)
    harmless: int = 1000     # toy: new comparisons on red-team prompts, a round (HH online: none)
    test: int = 300          # toy: held-out comparisons of each kind, a round
    best_of: int = 16        # toy: replies from which the PM takes the best in round 1 (HH 16)
    snapshots: int = 3       # policies of a round's RLHF that are deployed, the last one included
    people: str = ""         # choices of people, who take the place of the simulated ones
    wanted: int = 100        # with people: new choices that a round waits for


@dataclass
class EloConfig:
    conversations: int = 200  # toy: held-out chats of each kind, with each earlier policy


KINDS = ("helpful", "harmless")
# Deploying depends on other files in each round, which `reuse` and `begin` are told as `data`.
ROUND = {"lm": PIPELINE["lm"], "cd": PIPELINE["cd"], "pmp": PIPELINE["pmp"],
         "online": ("deployed.pt", ()), "pm": PIPELINE["pm"], "rl": PIPELINE["rl"],
         "elo": ("elo.pt", ("initial.pt", "policy.pt"))}

# ---- 1. Folders --------------------------------------------------------------


def round_of(run: Run, k: int) -> Run:
    """The folder of round k, as a Run. Round 0 is the folder of stages 1 to 4 itself."""
    if k == 0:
        return run
    part = copy.copy(run)
    part.out, part.pipeline = run.out / "online" / f"round-{k}", ROUND
    part.speed_options = SPEED_OPTIONS + ("rounds", "people", "wanted")  # these may change, too
    return part


def share(source: Path, target: Path):
    """Give a file a second name; a disk without hard links gets a copy. No file is ever changed in
    place, so each name keeps what it has."""
    if not is_first() or (target.exists() and os.path.samefile(source, target)):
        return
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        write_atomically(target, source.read_bytes())


def share_all(run: Run, part: Run):
    """Stages 1 to 3 are the same in all rounds. If they were trained anew, `reuse` will say that
    the round's results are stale."""
    for name in ("tokenizer.json", "lm.pt", "initial.pt", "pmp.pt"):
        share(run.path(name), part.path(name))
    ranks.wait()


def deployed(run: Run, k: int, online: OnlineConfig) -> list[Path]:
    """The checkpoints that decide what people see in round k."""
    before = round_of(run, k - 1)
    if k == 1:
        return [before.path("initial.pt"), before.path("pm.pt")]
    return [*sorted(before.out.glob("snapshot-*.pt")), before.path("policy.pt")]


# ---- 2. Deploy ---------------------------------------------------------------


class BestOf:
    """A player whose reply is the best of n by the PM: rejection sampling (§2.3, App. B.6)."""

    def __init__(self, run: Run, n: int, name: str):
        self.sampler = Sampler(run.load_model("initial.pt"), run.tok.end_of_turn)
        self.pm, self.n, self.end = run.load_model("pm.pt"), n, run.tok.end_of_context
        self.generator = run.torch_rng("best of", name)

    def __call__(self, prompts: list[list[int]], uniforms) -> Rollouts:
        """One response to each prompt. uniforms (N, R): of the first of its n samples."""
        N, R = uniforms.shape
        others = torch.rand(N, self.n - 1, R, generator=self.generator)
        uniforms = torch.cat([uniforms[:, None], others], 1).flatten(0, 1)           # (N n, R)
        copies = []
        for prompt in prompts:
            copies += [prompt] * self.n
        ro = self.sampler(copies, uniforms)
        scores = pm_scores(self.pm, ro, self.end, PPOConfig()).view(N, self.n)       # (N, n)
        best = scores.argmax(1) + self.n * torch.arange(N, device=scores.device)     # (N,)
        return Rollouts(ro.tokens[best], ro.prompt_len[best], ro.response_len[best],
                        ro.finished[best], ro.logp[best])


def pairs_of_players(run: Run, k: int, online: OnlineConfig, name: str) -> list[list]:
    """The pairs of players that people see in round k. Several snapshots make up for RLHF's loss of
    diversity (§4.5): each plays with the next one, and the last with the first."""
    if k == 1:
        player = BestOf(run, online.best_of, name)
        return [[player, player]]
    before, players = round_of(run, k - 1), []
    for path in deployed(run, k, online):
        players.append(Sampler(load_policy(before, path.name), run.tok.end_of_turn))
    if len(players) < 3:
        return [[players[0], players[-1]]]
    return [list(pair) for pair in zip(players, players[1:] + players[:1])]


def deploy(run: Run, k: int, pm: PMConfig, online: OnlineConfig) -> bool:
    """Step 1 of round k. Returns False if people have not yet made enough choices."""
    part, before, files = round_of(run, k), round_of(run, k - 1), deployed(run, k, online)
    if part.reuse("online", online, files):
        return True
    if online.people and not has_choices(run, k, online):
        return False
    stage = part.begin("online", online, data=files)
    stage.start()
    if is_first():
        delete_comparisons(part)
    ranks.wait()
    n_new = 0
    for path in sorted(before.path("comparisons").glob("*/*.jsonl")):
        share(path, part.path("comparisons") / path.parent.name / path.name)
    if online.people:
        # A copy: people go on choosing, and the round must stay what it was. A last line without
        # its end is still being written.
        whole, _, _ = Path(online.people).read_bytes().rpartition(b"\n")
        write_atomically(part.path("people.jsonl"), whole + b"\n")
        ranks.wait()
        n_new = count(people_of(part)) - count(people_of(before))
    else:
        print(f"[1] comparisons of round {k}: replies of {names_of(files)}")
        tranche = "rs" if k == 1 else f"online-{k}"
        for kind, n_train in zip(KINDS, (online.helpful, online.harmless)):
            for split, n in (("train", n_train), ("test", online.test)):
                path = part.path("comparisons") / f"{kind}-{tranche}" / f"{split}.jsonl"
                if n_train > 0:
                    found = new_comparisons(run, k, pm, online, kind, split, n)
                    write_comparisons(path, found)
                    n_new += len(found) if split == "train" else 0
    ranks.wait()
    written = sorted(part.path("comparisons").glob("*/*.jsonl")) + people_of(part)
    stage.log(k, new=n_new)
    stage.end(files=[str(path.relative_to(part.out)) for path in written],
              hashes=file_hash(written))
    return True


def new_comparisons(run: Run, k: int, pm: PMConfig, online: OnlineConfig, kind: str, split: str,
                    n: int) -> list:
    pairs, found = pairs_of_players(run, k, online, f"{kind} {split}"), []
    for i, players in enumerate(pairs):
        share_of_n = n * (i + 1) // len(pairs) - n * i // len(pairs)
        if share_of_n > 0:
            name = f"{split}, round {k}, pair {i}"
            found += collect_from(run, pm, players, kind, name, share_of_n)
    return found


def names_of(files: list[Path]) -> str:
    return " and ".join(path.name for path in files)


def people_of(part: Run) -> list[Path]:
    """The round's copy of people's choices, if it has one."""
    path = part.path("people.jsonl")
    return [path] if path.exists() else []


def has_choices(run: Run, k: int, online: OnlineConfig) -> bool:
    """Whether people have made the choices that round k waits for; if not, say how to make them."""
    n_before = count(people_of(round_of(run, k - 1)))
    n = count([online.people]) if Path(online.people).exists() else 0
    if n - n_before >= online.wanted:
        return True
    before, *others = round_of(run, k - 1), *deployed(run, k, online)[:-1]
    models = f"--model {'initial.pt' if k == 1 else 'policy.pt'}"
    if k > 1 and others:
        models += f" --against {others[0].name}"
    choices = f"--choices {online.people}"
    print(f"round {k} is deployed and waits for people: {online.people} holds {n - n_before:,} "
          f"new usable choices of {online.wanted:,}. To add some:\n"
          f"    python chat.py {before.out} --compare {models} {choices}\n"
          f"    python serve.py {before.out} {models} {choices}\n"
          "Then give the same command again.")
    return False


def count(paths: list) -> int:
    train, held_out, _ = read_choices(paths)
    return len(train) + len(held_out)


# ---- 3. Elo ------------------------------------------------------------------


def play(run: Run, k: int, cfg: EloConfig, rl: RLConfig):
    """Match round k's policy against the initial policy and those of all earlier rounds."""
    part, others = round_of(run, k), [round_of(run, j) for j in range(1, k)]
    files = [other.path("policy.pt") for other in others]
    if part.reuse("elo", cfg, files):
        return
    stage = part.begin("elo", cfg, data=files)
    stage.start()
    print(f"[4] Elo: round {k} against the initial policy" + (" and earlier rounds" * (k > 1)))
    policy, opponents = part.load_model("policy.pt"), [part.load_model("initial.pt")]
    opponents += [other.load_model("policy.pt") for other in others]
    wins = {}
    for kind in KINDS:
        rows = []
        for j, opponent in enumerate(opponents):
            found = match(part, policy, opponent, kind, cfg.conversations, rl.max_response,
                          f"round {k} against {j},")
            rows.append([found[0, 1].item(), found[1, 0].item()])
            stage.log(k, kind=kind, opponent=j, won=rows[-1][0], lost=rows[-1][1])
        wins[kind] = torch.tensor(rows)  # (k, 2): won and lost against each opponent
    stage.end(wins=wins)


def ratings(run: Run, k: int, kind: str) -> tuple[list[float], list[float]]:
    """Elo and its error of the initial policy, which has 0, and of rounds 1 to k. Both are NaN for
    all others where no finite Elo exists, as for a policy that never lost."""
    wins = torch.zeros(k + 1, k + 1)
    for j in range(1, k + 1):
        found = load(round_of(run, j).path("elo.pt"))["wins"][kind]
        wins[j, :j], wins[:j, j] = found[:, 0], found[:, 1]
    try:
        elo, covariance = fit_elo(wins)
    except ValueError:
        return [0.0] + [float("nan")] * k, [0.0] + [float("nan")] * k
    return elo.tolist(), [elo_error(covariance, 0, j) for j in range(k + 1)]


def show(run: Run, k: int):
    """Print the table of rounds 1 to k, and write it and the picture to OUT/online."""
    elo, errors, lines = {}, {}, []
    for i, kind in enumerate(KINDS):
        elo[kind], errors[kind] = ratings(run, k, kind)
        points = [(j, y) for j, y in enumerate(elo[kind]) if math.isfinite(y)]
        bars = [(j, y - errors[kind][j], y + errors[kind][j]) for j, y in points]
        lines.append(Line(f"{kind} prompts", points, color=i, dash=i, bars=bars))
    rows = [f"    {'round':8}{'new pairs':>10}{'PM accuracy':>13}{'helpfulness':>13}"
            f"{'harmlessness':>14}{'Elo, helpful':>15}{'Elo, red-team':>15}"]
    for j in range(k + 1):
        row = f"    {j or 'initial':<8}" + (numbers_of(round_of(run, j)) if j else " " * 50)
        for kind in KINDS:
            row += f"{elo[kind][j]:8.0f} +- {errors[kind][j]:3.0f}"
        rows.append(row)
    table = "\n".join(rows)
    print(f"\n{table}\n    (PM accuracy on held-out pairs of all rounds so far; true utilities of "
          "the policy; Elo with one standard error)")
    title = "Elo by crowdworkers, with one standard error"
    names = ["initial"] + [str(j) for j in range(1, k + 1)]
    svg = picture(chart(title, lines, x_title="round", x_names=names))
    write_atomically(run.path("online") / "elo.txt", f"{table}\n".encode())
    write_atomically(run.path("online") / "elo.svg", svg.encode())
    print(f"    -> {run.path('online') / 'elo.svg'}")


def numbers_of(part: Run) -> str:
    """The cells of the table that come from a round's metrics.jsonl."""
    numbers = {}
    for line in read_lines(part.path("metrics.jsonl"), []):
        if line["stage"] == "rl" or line["stage"] == "online" or line.get("subset") == "all":
            numbers |= line
    cells = f"{numbers.get('new', 0):10,}"
    for name, width in (("accuracy", 13), ("eval_helpfulness", 13), ("eval_harmlessness", 14)):
        cells += f"{numbers.get(name) or math.nan:{width}.3f}"
    return cells


# ---- 4. Command --------------------------------------------------------------


def check_rounds(run: Run, pm: PMConfig, online: OnlineConfig):
    """Find out before any training whether the rounds can run, as far as the options tell."""
    if online.people:
        if Path(online.people).exists():
            count([online.people])  # raises UserError for a damaged file
    elif not run.toy:
        raise UserError("the rounds need people, because only the toy world has simulated ones: "
                        "add --people FILE, which chat.py --compare or serve.py writes")
    elif online.helpful + online.harmless == 0 or pm.helpful + pm.harmless == 0:
        raise UserError("without --people, the rounds need simulated comparisons: "
                        "--online.helpful and --online.harmless, or --pm.helpful and "
                        "--pm.harmless, are both 0")


def keep_snapshots(part: Run, n: int, iterations: int):
    """What `train_rl.train` calls after each iteration: it saves n - 1 policies, evenly spaced
    before the last one, which is policy.pt."""
    names = {}
    for i in range(1, n):
        names[iterations * i // n] = f"snapshot-{i}.pt"

    def watch(n_updates: int, policy):
        if n_updates in names:
            save(part.path(names[n_updates]), **part.checkpoint(policy))
    return watch


def play_round(run: Run, k: int, pm: PMConfig, rl: RLConfig, online: OnlineConfig,
               elo: EloConfig) -> bool:
    """All steps of round k that are missing. Returns False if the round waits for people."""
    part = round_of(run, k)
    print(f"\nround {k} of {online.rounds}")
    share_all(run, part)
    if not deploy(run, k, pm, online):
        return False
    pm = replace(pm, people=[*pm.people, *map(str, people_of(part))])
    data = [part.path("deployed.pt")]
    if not part.reuse("pm", pm, [*pm.people, *data]):
        train_pm(part, pm, is_collected=True, data=data)
    if not part.reuse("rl", rl):
        with report.written_at_the_end(part.out, is_writer=is_first()):
            train_rl(part, rl, keep_snapshots(part, online.snapshots, rl.iterations))
    if run.toy:
        play(run, k, elo, rl)
    return True


def command(run: RunConfig, lm: LMConfig, cd: CDConfig, pmp: PMPConfig, pm: PMConfig, rl: RLConfig,
            online: OnlineConfig, elo: EloConfig):
    folder = Run(run)  # `run` holds the options, `folder` is the Run
    folder.check_memory(lm, cd, pmp, pm, rl)
    check_early(folder, cd, pmp, pm, rl.max_response)
    check_rounds(folder, pm, online)
    ensure(folder, lm, cd, pmp, pm)
    n_done = 0
    while n_done < online.rounds and play_round(folder, n_done + 1, pm, rl, online, elo):
        n_done += 1
    if n_done > 0 and folder.toy and is_first():
        show(folder, n_done)


if __name__ == "__main__":
    main(command, __doc__.split("\n")[0], run=RunConfig, lm=LMConfig, cd=CDConfig, pmp=PMPConfig,
         pm=PMConfig, rl=RLConfig, online=OnlineConfig, elo=EloConfig)
