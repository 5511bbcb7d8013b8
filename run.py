"""What the three commands share: options, seeds, the output folder, checkpoints and the metrics file.

Nothing here is about RLHF; a reader of the paper can skip it.
"""
import argparse
import dataclasses
import hashlib
import inspect
import io
import json
import math
import re
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

import hub
from data import MIN_PROMPT, Tokenizer, UserError, write_atomically
from model import GPT, SIZES, GPTConfig
from pm import ScalarModel
from ppo import TrainingError


@dataclass
class RunConfig:
    preset: str = ""         # options for a known case (see the end of this help); those given beside it come first
    data: str = "toy"        # "toy", "hh-rlhf" (downloaded once), or a folder or .jsonl[.gz] file in that format
    subsets: str = ""        # of a folder of real data, comma-separated, e.g. helpful-base,harmless-base (none: all)
    out: str = ""            # output folder (default: out/<name of the data>-<seed>)
    init: str = ""           # pretrained weights: gpt2[-medium, -large, -xl] (downloaded once), or a file or folder
    size: str = "toy"        # shape of every model: toy, gpt2[-medium, -large, -xl], or the paper's 13M ... 52B
    context: int = 0         # longest row in tokens (0: that of --size for the toy; 512 for real data)
    tokenizer: str = "auto"  # "bpe" trains one on the data, "gpt2" is GPT-2's (auto: bpe for the toy, else gpt2)
    seed: int = 0            # of everything: data, weights, sampling
    device: str = "auto"     # "cpu", "cuda", ... (auto: a GPU if there is one)
    resume: bool = False     # go on from the last checkpoint of a run that was stopped
    recompute: bool = False  # run each block again in the backward pass: much less memory, a third more time
    compile: bool = False    # torch.compile the blocks (wants a C++ compiler; seconds to minutes at the start)
    export: str = ""         # also write the policy to this folder, for transformers


# For one GPU, the full HH-RLHF data and GPT-2. Rates are the paper's multiples (context distillation 0.05, PMP 0.1, PM and
# RL 0.01) of the pretraining rates that GPT-3's table gives for these sizes, 6e-4 and 3e-4; the RL batch, the KL
# coefficient and the critic's rate are IG's; 400 x 512 responses are as many as in HH's Fig. 33. Chosen on paper, not yet
# tried at full length.
_HH = {"run.data": "hh-rlhf", "run.context": 512, "cd.documents": 20_000, "pm.batch": 64, "pmp.batch": 64,
       "pmp.binarised": True, "rl.iterations": 400, "rl.batch": 512, "rl.max_response": 128, "rl.kl_coef": 0.02,
       "rl.warmup": 10}
PRESETS = {
    "gpt2-hh": _HH | {"run.init": "gpt2", "cd.lr": 3e-5, "pmp.lr": 6e-5, "pm.lr": 6e-6, "rl.lr": 6e-6, "rl.critic_lr": 9e-6},
    "gpt2-medium-hh": _HH | {"run.init": "gpt2-medium", "cd.lr": 1.5e-5, "pmp.lr": 3e-5, "pm.lr": 3e-6, "rl.lr": 3e-6,
                             "rl.critic_lr": 9e-6, "run.recompute": True},
}


# ------------------------------------------------------------------------------ options


def options(description: str, **stages) -> dict:
    """Parse the command line into dataclasses. `stages` maps a prefix to a dataclass: field `lr` of rl=PPOConfig
    becomes --rl.lr; the fields of `run` get no prefix. The comment behind a field is its help."""
    presets = "".join(f"\n  {name}: " + " ".join(f"{_flag(k)} {v}".replace(" True", "") for k, v in preset.items())
                      for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(description=description, epilog="presets:" + presets, formatter_class=_Help)
    for prefix, cls in stages.items():
        group = parser.add_argument_group(prefix)
        source = "".join(inspect.getsource(c) for c in cls.__mro__[:-1])
        comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))
        for f in dataclasses.fields(cls):
            kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
            group.add_argument(_flag(f"{prefix}.{f.name}"), dest=f"{prefix}.{f.name}", default=f.default,
                               help=comments[f.name].replace("%", "%%"), **kind)
    given = vars(parser.parse_args())
    if given["run.preset"]:
        if given["run.preset"] not in PRESETS:
            raise UserError(f"--preset {given['run.preset']}: choose one of {', '.join(PRESETS)}")
        parser.set_defaults(**{k: v for k, v in PRESETS[given["run.preset"]].items() if k in given})
        given = vars(parser.parse_args())
    for name, value in given.items():
        field = name.split(".")[1]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            share, zero = field in AT_MOST_ONE, field in MAY_BE_ZERO or name in MAY_BE_ZERO
            if not (math.isfinite(value) and (value > 0 or zero and value == 0) and (value <= 1 or not share)):
                raise UserError(f"{_flag(name)} {value}: must be a number "
                                + ("from 0 to 1" if share else "from 0 on" if zero else "above 0"))
    return {prefix: cls(**{f.name: given[f"{prefix}.{f.name}"] for f in dataclasses.fields(cls)})
            for prefix, cls in stages.items()}


def _flag(name: str) -> str:
    return "--" + name.removeprefix("run.").replace("_", "-")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the presets on lines of their own."""


MAY_BE_ZERO = ("seed", "context", "warmup", "weight_decay", "kl_coef", "gamma", "gae_lambda", "unfinished_penalty",
               "helpful", "harmless", "harmless_share", "harmless_weight", "slots", "token_budget",
               "cd.documents", "pmp.pairs")
AT_MOST_ONE = ("gamma", "gae_lambda", "harmless_share")


def main(command, description: str, **stages):
    """Run a command; a mistake of the user's, or training that went wrong, ends it with one sentence."""
    try:
        command(**options(description, **stages))
    except (UserError, TrainingError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: out of GPU memory ({str(error).split('. ')[0]}): try --recompute, or a smaller "
              "--rl.token-budget, --pm.token-budget or --rl.slots; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def rng(seed: int, *name) -> Random:
    """A generator of its own for each use, named by what it is for: rng(0, "prompts", iteration). A run that is
    resumed at iteration 30 then draws what it would have drawn, with no generator state to save."""
    return Random(zlib.crc32(repr((seed, *name)).encode()))


def torch_rng(seed: int, *name) -> torch.Generator:
    return torch.Generator().manual_seed(rng(seed, *name).getrandbits(62))


def choose_device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are made on the current device
        if device.type in ("cpu", "cuda"):
            return device
    except (RuntimeError, AssertionError):
        pass
    raise UserError(f"--device {name}: not a CPU or CUDA device that PyTorch finds here; try cpu")


# ------------------------------------------------------------------------------ checkpoints


def save(path: Path, **content):
    """Write a checkpoint. Under a temporary name first, so that a full disk or a kill leaves the old one whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """Read a checkpoint; nothing in it can run code (weights_only)."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # a truncated zip, a pickle with code, ...: torch raises many types
        saved, why = None, (str(error).splitlines() or [type(error).__name__])[0][:80]
    if not isinstance(saved, dict):
        why = why if saved is None else f"it holds a {type(saved).__name__}"
        raise UserError(f"{path} is not a checkpoint of this project ({why})")
    return saved


def save_model(path: Path, model, tok: Tokenizer, parents: tuple[Path, ...] = ()):
    """`parents`: the checkpoints that training rested on. Their hash is kept, to notice a model of other ones."""
    gpt = model.trunk if isinstance(model, ScalarModel) else model
    save(path, model=model.state_dict(), config=dataclasses.asdict(gpt.cfg), tokenizer=tok.fingerprint,
         parents=file_hash(*parents))


def _and(paths) -> str:
    return " and ".join(map(str, paths))


def file_hash(*paths: Path) -> str:
    """A short name for the content of checkpoints, "" for none."""
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths)


def restore(state: dict | None, model, optimizer) -> int:
    """Put back what a stopped stage had, if there is a state (Run.begin) -> the step to go on from."""
    if not state:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def check_parents(path: Path, saved: dict, parents: tuple[Path, ...]):
    if parents and saved.get("parents") != file_hash(*parents):
        raise UserError(f"{path} was not trained from the present {_and(parents)}; delete it to train a new one")


def load_model(path: Path, kind, cfg: GPTConfig, tok: Tokenizer, device, parents: tuple[Path, ...] = ()):
    """The model in a checkpoint, frozen and in eval mode. `kind` is GPT or ScalarModel; `cfg` what is expected."""
    saved = load(path)
    check_parents(path, saved, parents)
    if saved.get("tokenizer") != tok.fingerprint:
        raise UserError(f"{path} was trained with another tokenizer; use another --out or delete it")
    if saved.get("config") != dataclasses.asdict(cfg):
        raise UserError(f"{path} holds a model of another shape ({saved.get('config')}) than asked for; "
                        "use another --out or delete it")
    model = GPT(cfg) if kind is GPT else ScalarModel(GPT(cfg))
    try:
        model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError):
        raise UserError(f"{path} does not hold the weights of a {kind.__name__}") from None
    return model.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------ the output folder


class Run:
    """One output folder: config.json, tokenizer.json, metrics.jsonl and the checkpoints of each stage.

    A stage keeps <stage>_state.pt while it trains and leaves <name>.pt when it is done."""
    STAGES = ("lm", "cd", "pmp", "pm", "rl")

    def __init__(self, cfg: RunConfig, exports: bool = True):
        if cfg.export and not exports:
            raise UserError("--export writes a policy, and train_rl.py is what makes one")
        if cfg.size not in SIZES:
            raise UserError(f"--size {cfg.size}: choose one of {', '.join(SIZES)}")
        if cfg.tokenizer not in ("auto", "bpe", "gpt2"):
            raise UserError(f"--tokenizer {cfg.tokenizer}: choose auto, bpe or gpt2")
        self.toy = cfg.data == "toy"
        if self.toy and (cfg.tokenizer == "gpt2" or cfg.init or cfg.subsets):
            raise UserError("--tokenizer gpt2, --init and --subsets are for real data; the toy world has its own")
        if cfg.init and cfg.tokenizer == "bpe":
            raise UserError("--init brings models that know GPT-2's encoding; leave --tokenizer bpe out")
        self.cfg, self.seed, self.device = cfg, cfg.seed, choose_device(cfg.device)
        self.data = None if self.toy else hub.resolve_data(cfg.data)
        self.subsets = [name.strip() for name in cfg.subsets.split(",") if name.strip()] or None
        self.context = cfg.context or (SIZES[cfg.size].context if self.toy else 512)
        if self.context < MIN_PROMPT:
            raise UserError(f"--context {self.context}: too short for a dialogue; at least {MIN_PROMPT}")
        name = "toy" if self.toy else Path(cfg.data).resolve().name.split(".")[0]
        self.out = Path(cfg.out or f"out/{name}-{cfg.seed}")
        self.tok: Tokenizer | None = None  # train_lm makes it
        self.shape: GPTConfig | None = None  # of the models; known once the tokenizer and --init are read

    def check_room(self, option: str, max_response: int):
        """Responses of this length must leave room for a prompt (and for the end-of-context token)."""
        if self.context - max_response - 1 < MIN_PROMPT:
            raise UserError(f"{option} {max_response} leaves no room for a prompt in --context {self.context}")

    def path(self, name: str) -> Path:
        return self.out / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def done(self, name: str, stage: str, cfg, parents: tuple[Path, ...] = ()) -> bool:
        """Whether --resume finds nothing to resume, because the stage's result `name` is there; says so."""
        done = self.cfg.resume and self.has(name) and not self.has(f"{stage}_state.pt")
        if done:
            check_parents(self.path(name), load(self.path(name)), parents)
            changed = self.changed(stage, cfg)
            print(f"nothing to resume: {self.path(name)} is there, and this stage is complete"
                  + (f", in spite of {changed}" if changed else ""))
        return done

    def begin(self, stage: str, cfg, parents: tuple[Path, ...] = ()) -> dict | None:
        """Check a stage's options against those that the folder was made with; return the state to go on from, if
        there is one to resume. `parents` are the checkpoints that the stage rests on."""
        known, mine = self._read_config(), self._options()
        if known.get("run", mine) != mine:
            changed = "; ".join(f"{k} was {known['run'].get(k)!r}, now {v!r}"
                                for k, v in mine.items() if known["run"].get(k) != v)
            raise UserError(f"{self.out} was made with other options ({changed}): use another --out or delete it")
        path = self.path(f"{stage}_state.pt")
        if not path.exists():
            return None
        if self.cfg.resume and (changed := self.changed(stage, cfg)):
            raise UserError(f"{self.out} was begun with other options ({changed}): resume with the same ones")
        if not self.cfg.resume:
            print(f"{path} is of a run that was stopped; without --resume this stage starts over")
            return None
        state = load(path)  # to the CPU: optimizers would keep what is loaded, and the GPU hold the weights twice
        if state.get("stage") != stage:
            raise UserError(f"{path} is not the state of a stopped {stage} stage; delete it to start over")
        if len(state) == 1:  # stopped before the first step (see `record`)
            return None
        if parents and state.get("parents") != file_hash(*parents):
            raise UserError(f"{path} was not made with the present {_and(parents)}; delete it to start over")
        return state

    def record(self, stage: str, cfg):
        """Note in config.json what a stage is made with; called once its options are known to be good. From now on there
        is a state, if an empty one: so what an earlier training left is known to be stale."""
        if not self.has(f"{stage}_state.pt"):
            save(self.path(f"{stage}_state.pt"), stage=stage)
        text = json.dumps({**self._read_config(), "run": self._options(), stage: dataclasses.asdict(cfg)}, indent=2)
        write_atomically(self.path("config.json"), text.encode())

    def changed(self, stage: str, cfg) -> str:
        """How the options given now differ from those that a stage was made with, in words; "" if they don't."""
        known = self._read_config().get(stage, {})
        return "; ".join(f"--{stage}.{k.replace('_', '-')} was {known[k]}, now {v}"
                         for k, v in dataclasses.asdict(cfg).items() if k in known and known[k] != v)

    def reuse(self, name: str, stage: str, cfg) -> bool:
        """Whether the result of an earlier stage is there to be used; says so, and what is ignored for that."""
        there = self.has(name) and not self.has(f"{stage}_state.pt")  # with a state, it is of an earlier training
        if there:
            changed = self.changed(stage, cfg)
            print(f"{self.path(name)} is there and used as it is" + (f", in spite of {changed}" if changed else ""))
        else:
            print(f"{self.path(name)} is {'unfinished' if self.has(f'{stage}_state.pt') else 'missing'}, "
                  "so that stage runs first")
        return there

    def _options(self) -> dict:
        free = ("out", "device", "resume", "recompute", "compile", "export")  # may differ from one command to the next
        return {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in free}

    def _read_config(self) -> dict:
        if not self.has("config.json"):
            return {}
        try:
            known = json.loads(self.path("config.json").read_text())
            assert isinstance(known, dict) and all(isinstance(v, dict) for v in known.values())
            return known
        except (ValueError, AssertionError):
            raise UserError(f"{self.path('config.json')} is not a config of this project; use another --out") from None

    def end(self, stage: str):
        self.path(f"{stage}_state.pt").unlink(missing_ok=True)

    def model_config(self) -> GPTConfig:
        """The shape of every model: --size, or that of the weights that --init names."""
        if self.shape is None and self.cfg.init and self.has("lm.pt"):
            try:
                self.shape = GPTConfig(**load(self.path("lm.pt"))["config"])
            except (KeyError, TypeError):
                raise UserError(f"{self.path('lm.pt')} does not say the shape of its model; delete it") from None
        return self.shape or dataclasses.replace(SIZES[self.cfg.size], vocab_size=self.tok.n_vocab, context=self.context)

    def prepare(self, model):
        """Set up a model for training as --recompute and --compile ask."""
        gpt = model.trunk if isinstance(model, ScalarModel) else model
        gpt.recompute = self.cfg.recompute
        for block in gpt.blocks if self.cfg.compile else ():
            block.compile(dynamic=True)  # rows of all lengths come by
        return model.requires_grad_(True)

    def rng(self, *name) -> Random:
        return rng(self.seed, *name)

    def torch_rng(self, *name) -> torch.Generator:
        return torch_rng(self.seed, *name)


class Metrics:
    """metrics.jsonl: one JSON object a line. All but `seconds` is the same when a run is repeated."""

    def __init__(self, run: Run, stage: str, step: int):
        """Go on from `step`: what this stage wrote for later steps (before it was killed), and what stages after it
        wrote about an earlier model, is dropped."""
        self.path, self.stage, self.start = run.path("metrics.jsonl"), stage, time.perf_counter()
        later = Run.STAGES[Run.STAGES.index(stage) + 1:]
        kept = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                old = json.loads(line)
                if old["stage"] not in later and (old["stage"] != stage or old["step"] < step):
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                continue  # the line during which the run was killed
        write_atomically(self.path, "".join(kept).encode())

    def write(self, step: int, **numbers):
        plain = {k: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None
                 for k, v in numbers.items()}  # JSON has no NaN
        line = {"stage": self.stage, "step": step, **plain,
                "seconds": round(time.perf_counter() - self.start, 2)}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
