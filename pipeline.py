"""The five stages together: what each depends on, their common options, and their models.

    corpus -> [1] lm.pt -> [2] initial.pt -> comparisons -> [4] pm.pt -> [5] policy.pt
                    `----> [3] pmp.pt ----------------------^
(The policy, too, starts from initial.pt.) InstructGPT (IG: Ouyang et al. 2022; --paper instructgpt)
shares the first stage and the last, and the names of the results:

    corpus -> [1] lm.pt -> [2] sft.pt -> rankings -> [3] pm.pt -> [4] initial.pt -> [5] policy.pt

Read it in this order:
  1. PIPELINES   each stage's result, and the results that it depends on
  2. RunConfig   the options of a whole run, and presets
  3. Run         an output folder that also knows the data, the tokenizer and the models' shape
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import hub
import ranks
from data import MIN_PROMPT, Tokenizer
from memory import StageMemory, check_stage
from model import GPT, SIZES, GPTConfig
from pm import ScalarModel
from run import UserError, choose_device, flag, load, main as run_command
from stage import Folder

# ---- 1. PIPELINES ------------------------------------------------------------

PIPELINE = {
    "lm": ("lm.pt", ()),                          # 1. language-model pretraining
    "cd": ("initial.pt", ("lm.pt",)),             # 2. context distillation -> the initial policy
    "pmp": ("pmp.pt", ("lm.pt",)),                # 3. preference-model pretraining
    "pm": ("pm.pt", ("initial.pt", "pmp.pt")),      # 4. the preference model, on stage 2's replies
    "rl": ("policy.pt", ("initial.pt", "pm.pt")),  # 5. RLHF
}
INSTRUCTGPT = {
    "lm": ("lm.pt", ()),                              # 1. language-model pretraining
    "sft": ("sft.pt", ("lm.pt",)),                    # 2. supervised finetuning, several epochs
    "rm": ("pm.pt", ("sft.pt",)),                     # 3. the reward model, on stage 2's replies
    "select": ("initial.pt", ("sft.pt", "pm.pt")),    # 4. the epoch that the RM likes best
    "rl": ("policy.pt", ("initial.pt", "pm.pt")),     # 5. PPO or PPO-ptx
}
PIPELINES = {"hh": PIPELINE, "instructgpt": INSTRUCTGPT}
WITH_SCALAR_HEAD = ("pmp.pt", "pm.pt")  # the other results are language models

# ---- 2. RunConfig ------------------------------------------------------------


@dataclass
class RunConfig:
    preset: str = ""         # a named set of options, listed below; explicit options override it
    paper: str = "hh"        # whose stages: "hh" (Bai et al.) or "instructgpt" (Ouyang et al.)
    data: str = "toy"        # "toy", "hh-rlhf" (downloaded once), or a folder or .jsonl[.gz] file
    subsets: str = ""        # of a data folder, e.g. helpful-base,harmless-base (empty: all)
    out: str = ""            # output folder (default: out/<preset or name of the data>-<seed>)
    init: str = ""           # weights to start from: gpt2[-medium, -large, -xl] or a path
    size: str = "toy"        # shape of every model: toy, gpt2[-medium, ...], or HH's 13M ... 52B
    context: int = 0         # longest row in tokens (0: 192 for the toy, 512 for real data)
    tokenizer: str = "auto"  # "bpe" trains one, "gpt2" is GPT-2's (auto: bpe for the toy only)
    seed: int = 0            # seeds the data, the weights and all sampling
    device: str = "auto"     # "cpu", "cuda", "mps" (auto: an NVIDIA GPU if there is one, else CPU)
    precision: str = "auto"  # on an NVIDIA GPU: "bf16", "float32" (auto: bf16 where it is hardware)
    resume: bool = False     # continue an interrupted run from its last checkpoint
    recompute: bool = False  # rerun blocks in the backward pass: less memory, a third more time
    compile: bool = False    # torch.compile the blocks (needs a C++ compiler; slow to start)
    export: str = ""         # also write the policy to this folder, for transformers


# Options that may change between commands on the same folder.
FREE_OPTIONS = ("out", "device", "precision", "resume", "recompute", "compile", "export")
# Options of a stage that may change when it is resumed: they change results by rounding only.
SPEED_OPTIONS = ("token_budget", "slots")
# Exceptions to "above 0", and fields that have an upper limit of 1.
RULES = {
    "may_be_zero": ("seed", "context", "warmup", "weight_decay", "kl_coef", "gamma", "gae_lambda",
                    "unfinished_penalty", "helpful", "harmless", "harmless_share",
                    "harmless_weight", "slots", "token_budget", "cd.documents", "pmp.pairs",
                    "pm.comparisons", "dropout", "pretraining", "ptx_coef", "ema", "model_prompts"),
    "at_most_one": ("gamma", "gae_lambda", "harmless_share", "dropout", "pretraining", "ema",
                    "model_prompts"),
    "aliases": {"pm.people": "--comparisons", "rl.model_prompts": "--model-prompts",
                "online.rounds": "--rounds", "online.people": "--people",
                "online.wanted": "--wanted"},
}

# For the full HH-RLHF data, GPT-2 and one GPU. The rates are the paper's multiples (context
# distillation 0.05, PMP 0.1, PM and RL 0.01) of the pretraining rates that GPT-3's table gives for
# these sizes, 6e-4 and 3e-4. The RL batch, the KL coefficient and the critic's rate are IG's; 400 x
# 512 responses are about as many as in HH's Fig. 33. These presets have not yet been run at full
# length.
_HH_RLHF_DATA = {
    "run.data": "hh-rlhf", "run.context": 512, "cd.documents": 20_000, "pm.batch": 64,
    "pmp.batch": 64, "pmp.binarized": True, "rl.iterations": 400, "rl.batch": 512,
    "rl.max_response": 128, "rl.kl_coef": 0.02, "rl.warmup": 10, "rl.critic_lr": 9e-6,
}
# IG's PPO: the critic starts as the reward model, pretraining text, an average of the weights.
_INSTRUCTGPT = {"run.paper": "instructgpt", "rl.keep_head": True, "rl.ptx_coef": 0.1,
                "rl.ema": 0.992, "rl.warmup": 10}
PRESETS = {
    # Every stage of the toy world in half a minute, for trying things out. Little is learned.
    "tiny": {"lm.documents": 3000, "cd.documents": 200, "pmp.pairs": 300, "pm.helpful": 600,
             "pm.harmless": 300, "pm.test": 200, "rl.iterations": 10, "rl.batch": 64,
             "rl.minibatch": 32, "rl.eval_every": 5, "rl.eval_prompts": 96,
             "rl.eval_conversations": 30, "online.helpful": 200, "online.harmless": 60,
             "online.test": 60, "online.best_of": 4, "elo.conversations": 30},
    "gpt2-hh": _HH_RLHF_DATA | {"run.init": "gpt2", "cd.lr": 3e-5, "pmp.lr": 6e-5, "pm.lr": 6e-6,
                      "rl.lr": 6e-6},
    "gpt2-medium-hh": _HH_RLHF_DATA | {"run.init": "gpt2-medium", "cd.lr": 1.5e-5, "pmp.lr": 3e-5,
                             "pm.lr": 3e-6, "rl.lr": 3e-6, "run.recompute": True},
    # InstructGPT's three steps on the toy world.
    "instructgpt": _INSTRUCTGPT,
    "instructgpt-tiny": _INSTRUCTGPT | {
        "lm.documents": 3000, "sft.demonstrations": 200, "sft.test": 60, "sft.epochs": 4,
        "rm.prompts": 150, "rm.test": 40, "rl.iterations": 10, "rl.batch": 64, "rl.minibatch": 32,
        "rl.eval_every": 5, "rl.eval_prompts": 96},
}


def main(command, description: str, **configs):
    """Parse the options of the stages in `configs` and run a command."""
    run_command(ranks.together(command), description, configs, presets=PRESETS, **RULES)


# ---- 3. Run ------------------------------------------------------------------


def data_files(root, subsets: list[str] | None = None) -> list[Path]:
    """All files from which data.load_comparisons can read, given the same root and subsets."""
    root = Path(root)
    if root.is_file():
        return [root]
    found = []
    for split in ("test", "train"):
        for file in sorted(root.glob(f"*/{split}.jsonl*")):
            if subsets is None or file.parent.name in subsets:
                found.append(file)
    return found


class Run(Folder):
    """An output folder that also knows what data, tokenizer and models its stages share."""

    def __init__(self, cfg: RunConfig, can_export: bool = False):
        """can_export: whether this command trains a policy that --export can write. Raises
        UserError for options that contradict each other or have unknown values."""
        check_choices(cfg, can_export)
        self.cfg, self.device = cfg, choose_device(ranks.device(cfg.device), cfg.precision)
        self.toy = cfg.data == "toy"
        self.subsets = [name.strip() for name in cfg.subsets.split(",") if name.strip()] or None
        self.context = cfg.context or (SIZES[cfg.size].context if self.toy else 512)
        if self.context < MIN_PROMPT:
            raise UserError(f"--context {self.context} is too short for a dialogue: at least "
                            f"{MIN_PROMPT}")
        self.data = None
        if not self.toy:
            self.data = ranks.first_alone(hub.resolve_data, cfg.data)  # may download it
        self.tok: Tokenizer | None = None    # set by `use_tokenizer`
        self.checks = []                     # functions that `use_tokenizer` calls
        self.shape: GPTConfig | None = None  # of the models; set only with --init
        name = cfg.preset or Path(cfg.data).resolve().name.split(".")[0]
        options = {}
        for option, value in dataclasses.asdict(cfg).items():
            if option not in FREE_OPTIONS:
                options[option] = value
        out = Path(cfg.out or f"out/{name}-{cfg.seed}")
        if cfg.export and Path(cfg.export).resolve() == out.resolve():
            raise UserError("--export needs a folder of its own, not that of --out")
        files = [] if self.toy else data_files(self.data, self.subsets)
        super().__init__(out, PIPELINES[cfg.paper], options, SPEED_OPTIONS, cfg.seed, cfg.resume,
                         files)

    def check_paper(self, **configs):
        """Raise UserError if an option was set of a stage that --paper does not have."""
        for stage, cfg in configs.items():
            for name, value in dataclasses.asdict(cfg).items():
                if stage not in self.pipeline and value != getattr(type(cfg)(), name):
                    raise UserError(f"{flag(f'{stage}.{name}')} has no effect with --paper "
                                    f"{self.cfg.paper}, which has no such stage: leave it out")

    def check_room(self, option: str, max_response: int):
        """Responses of this length must leave room for a prompt and the end-of-context token."""
        if self.context - max_response - 1 < MIN_PROMPT:
            raise UserError(f"{option} {max_response} leaves no room for a prompt in --context "
                            f"{self.context}")

    def check_memory(self, lm, cd=None, pmp=None, pm=None, rl=None, sft=None, rm=None):
        """Raise UserError if a stage that this command will run takes more memory than is free.
        Arguments: the options of the command's stages."""
        if self.tok is not None:
            shape = self.model_config()
        elif self.cfg.init and self.cfg.init not in SIZES:
            # A path: only stage 1 learns the shape.
            self.checks.append(lambda: self.check_memory(lm, cd, pmp, pm, rl, sft, rm))
            return
        else:
            n_vocab = lm.vocab if self.tokenizer_name() == "bpe" else SIZES["gpt2"].vocab_size
            shape = dataclasses.replace(SIZES[self.cfg.init or self.cfg.size],
                                        vocab_size=n_vocab, context=self.context)
        rows = int(self.toy)  # for real data these options are only upper limits
        stages = {}
        if not self.cfg.init:
            stages["lm"] = StageMemory(1, 0, rows * lm.documents, step_tokens=lm.step_tokens)
        if cd is not None:
            stages["cd"] = StageMemory(int(cd.documents > 0), 1, rows * cd.documents)
        if pmp is not None:
            stages["pmp"] = StageMemory(1, 0, rows * pmp.pairs, token_budget=pmp.token_budget)
        if pm is not None:
            n_pairs = pm.helpful + pm.harmless + 2 * pm.test
            stages["pm"] = StageMemory(1, 0, rows * n_pairs, token_budget=pm.token_budget)
        if sft is not None:
            stages["sft"] = StageMemory(1, 0, rows * sft.demonstrations)
        if rm is not None:
            n_replies = rm.most * rm.prompts
            stages["rm"] = StageMemory(1, 0, rows * n_replies, token_budget=rm.token_budget)
        if rl is not None:
            n_frozen = 2 + int(rl.ema > 0)  # the average follows the policy, with no gradients
            stages["rl"] = StageMemory(2, n_frozen, max(rl.batch, rl.eval_prompts),
                                       slots=rl.slots, token_budget=rl.token_budget)
        for name in stages:
            if name not in self.pipeline:
                raise UserError(f"--paper {self.cfg.paper} has no stage {name!r}: use another "
                                "--paper or another command")
        last = list(stages)[-1]
        for name, stage in stages.items():
            runs_again = name == last and not self.resume  # a command's own stage starts over
            if runs_again or not self.is_complete(name):
                check_stage(name, shape, stage, self.cfg.recompute, self.device)

    def tokenizer_name(self) -> str:
        if self.cfg.tokenizer != "auto":
            return self.cfg.tokenizer
        return "bpe" if self.toy else "gpt2"

    def use_tokenizer(self, tok: Tokenizer):
        """Encode with `tok` from now on, and find out at once what would stop a later stage."""
        self.tok = tok
        for check in self.checks:
            check()

    def load_tokenizer(self):
        """Load the tokenizer that stage 1 saved."""
        self.use_tokenizer(Tokenizer.load(self.path("tokenizer.json")))

    def model_config(self) -> GPTConfig:
        """The shape of every model: --size, or that of the weights that --init names."""
        if self.shape is None and self.cfg.init and self.has("lm.pt"):
            try:
                self.shape = GPTConfig(**load(self.path("lm.pt"))["config"])
            except (KeyError, TypeError):
                raise UserError(f"{self.path('lm.pt')} does not say the shape of its model; "
                                "delete it") from None
        if self.shape is not None:
            return self.shape
        return dataclasses.replace(SIZES[self.cfg.size], vocab_size=self.tok.n_vocab,
                                   context=self.context)

    def load_model(self, name: str, device=None):
        """The model in a stage's result, frozen and in eval mode: a GPT, or a ScalarModel for the
        preference models. Raises UserError if it does not fit the present tokenizer, shape, or
        parents."""
        path, cfg = self.path(name), self.model_config()
        saved = load(path)
        self.check_parents(name, saved)
        if saved.get("tokenizer") != self.tok.fingerprint:
            raise UserError(f"{path} was trained with another tokenizer; use another --out or "
                            "delete it")
        if saved.get("config") != dataclasses.asdict(cfg):
            raise UserError(f"{path} holds a model of the shape {saved.get('config')}, not the "
                            "requested one; use another --out or delete it")
        model = GPT(cfg)
        if name in WITH_SCALAR_HEAD:
            model = ScalarModel(model)
        try:
            model.load_state_dict(saved["model"])
        except (KeyError, RuntimeError):
            kind = type(model).__name__
            raise UserError(f"{path} does not hold the weights of a {kind}") from None
        return model.to(device or self.device).eval().requires_grad_(False)

    def checkpoint(self, model) -> dict:
        """The contents of a stage's result file, for `Stage.end`."""
        cfg = dataclasses.asdict(trunk_of(model).cfg)
        return {"model": model.state_dict(), "config": cfg, "tokenizer": self.tok.fingerprint}

    def prepare(self, model):
        """Make a model trainable, and apply --recompute and --compile."""
        gpt = trunk_of(model)
        gpt.recompute = self.cfg.recompute
        if self.cfg.compile:
            for block in gpt.blocks:
                block.compile(dynamic=True)  # dynamic: batches have many lengths
        return model.requires_grad_(True)


def trunk_of(model) -> GPT:
    """The GPT inside a model."""
    return model.trunk if isinstance(model, ScalarModel) else model


def check_choices(cfg: RunConfig, can_export: bool):
    """Raise UserError for options that contradict each other or are unknown."""
    if cfg.export and not can_export:
        raise UserError("--export works only with train_rl.py, which trains a policy")
    if cfg.paper not in PIPELINES:
        raise UserError(f"--paper {cfg.paper}: choose hh or instructgpt")
    if cfg.preset.startswith("instructgpt") and cfg.paper == "hh":
        raise UserError(f"--preset {cfg.preset} contradicts --paper hh: leave one of them out")
    if cfg.size not in SIZES:
        raise UserError(f"--size {cfg.size}: choose one of {', '.join(SIZES)}")
    if cfg.tokenizer not in ("auto", "bpe", "gpt2"):
        raise UserError(f"--tokenizer {cfg.tokenizer}: choose auto, bpe or gpt2")
    if cfg.data == "toy" and (cfg.tokenizer == "gpt2" or cfg.init or cfg.subsets):
        raise UserError("--tokenizer gpt2, --init and --subsets apply to real data only; the toy "
                        "world has its own tokenizer and models")
    if cfg.init and cfg.tokenizer == "bpe":
        raise UserError("--init needs GPT-2's tokenizer; leave out --tokenizer bpe")
