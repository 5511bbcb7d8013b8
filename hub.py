"""Import and export: GPT-2's weights and the files of HH-RLHF.

Read it in this order:
  1. GPT-2 in    `load_gpt2` turns a checkpoint in transformers' format into our GPT
  2. GPT-2 out   `export_gpt2` writes our GPT and tokenizer in that format
  3. Downloads   `fetch` gets one file; with it GPT-2's weights and the comparisons of HH-RLHF

Legend: V vocabulary, D width, C context.
weights.py reads untrusted files without running any code in them. Functions of hub.py that look
into a file raise a ValueError that says what is wrong with it. Callers of hub.py get a UserError,
one sentence that also names the file.
"""
import gzip
import json
import os
import re
import socket
import zlib
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch

from data import MAX_LINE, Tokenizer
from model import GPT, GPTConfig
from run import UserError, write_atomically
from weights import locate_tensors, read_weights, write_safetensors

# ---- 1. GPT-2 in -------------------------------------------------------------

LAYERS = {  # our name -> transformers' name, for the parts of one block
    "ln_1": "ln_1", "qkv": "attn.c_attn", "attn_out": "attn.c_proj",
    "ln_2": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask in old checkpoints
# A config.json may set these options, but our GPT supports only these values. With others the
# weights would load and compute nonsense.
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
         "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "tie_word_embeddings": True}


def tensor_names(n_layer: int) -> list[tuple[str, str, bool]]:
    """(our name, transformers' name, transposed) of each tensor.

    GPT-2 stores the four matrices of a block as (in, out); nn.Linear stores (out, in).
    """
    table = [("embed.weight", "wte.weight", False), ("positions.weight", "wpe.weight", False)]
    for i in range(n_layer):
        for ours, theirs in LAYERS.items():
            is_matrix = not ours.startswith("ln")
            table.append((f"blocks.{i}.{ours}.weight", f"h.{i}.{theirs}.weight", is_matrix))
            table.append((f"blocks.{i}.{ours}.bias", f"h.{i}.{theirs}.bias", False))
    return table + [("ln_f.weight", "ln_f.weight", False), ("ln_f.bias", "ln_f.bias", False)]


def load_gpt2(path, tok_n_vocab: int, context: int = 0) -> GPT:
    """A GPT-2 of any size in transformers' format, as float32 on the CPU.

    path: see `read_weights`. Layers, width, vocabulary and context follow from the shapes. The
        number of heads is n_head in the config.json beside the weights. Without that file it is
        D / 64, which holds for all four GPT-2s.
    tok_n_vocab: the rows that the embedding must have (`Tokenizer.n_vocab`). Rows are added for
        the tokens that GPT-2 does not know.
    context: how many positions to keep; 0 keeps all of them.
    Raises UserError if the checkpoint is not a GPT-2 that fits.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    stored = read_weights(path)
    try:
        tensors = strip_names(stored)
        head = tensors.pop("lm_head.weight", None)
        n_layer = count_layers(tensors)
        table = tensor_names(n_layer)
        check_tensors(tensors, table)
        n_vocab, width = tensors["wte.weight"].shape  # V, D
        n_positions = len(tensors["wpe.weight"])      # C
        if head is not None:
            check_tied(head, tensors["wte.weight"])
        # Rows are added for <|endofcontext|> and for rounding up to a multiple of 64.
        if not n_vocab <= tok_n_vocab <= n_vocab + 64:
            raise ValueError(f"its vocabulary of {n_vocab:,} is not that of the tokenizer, which "
                             f"needs {tok_n_vocab:,} rows")
        if context > n_positions:
            raise ValueError(f"it has {n_positions:,} positions, too few for a context of "
                             f"{context:,}")
        cfg = GPTConfig(n_layer=n_layer, n_head=read_n_head(folder, width), d_model=width,
                        vocab_size=tok_n_vocab, context=context or n_positions)
        return build_gpt(cfg, table, tensors)
    except ValueError as error:
        raise UserError(f"{path} is not a GPT-2 for this project: {error}") from None


def strip_names(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`stored` without masks and without the prefix "transformer." of GPT2LMHeadModel's names.
    Empties `stored`, which frees memory."""
    tensors = {}
    while stored:
        name, tensor = stored.popitem()
        name = name.removeprefix("transformer.")
        if name in tensors:
            raise ValueError(f"{name[:80]!r} occurs twice, with and without 'transformer.'")
        if not BUFFERS.fullmatch(name):
            tensors[name] = tensor
    return tensors


def count_layers(tensors: dict[str, torch.Tensor]) -> int:
    """The number of layers: how many values i takes in names like "h.<i>.ln_1"; at least 1."""
    numbers = set()
    for name in tensors:
        if re.match(r"h\.\d+\.", name):
            numbers.add(name.split(".")[1])
    return max(1, len(numbers))


def check_tensors(tensors: dict[str, torch.Tensor], table: list[tuple[str, str, bool]]):
    """Raises ValueError if a tensor is missing, unknown or not floating-point, or an embedding is
    not 2-D or is empty."""
    expected = [theirs for _, theirs, _ in table]
    for name in expected:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
    unexpected = tensors.keys() - set(expected)
    if unexpected:
        raise ValueError(f"the tensor {min(unexpected)[:80]!r} is not part of a GPT-2")
    for name in expected:
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} is of {tensors[name].dtype}, not of floating-point numbers")
    for name in ("wte.weight", "wpe.weight"):
        if tensors[name].dim() != 2 or tensors[name].numel() == 0:
            shape = list(tensors[name].shape)
            raise ValueError(f"{name} has the shape {shape}; a non-empty matrix was expected")


def check_tied(head: torch.Tensor, embedding: torch.Tensor):
    """Raises ValueError unless the stored output layer is the embedding, as in GPT-2."""
    if head.dtype != embedding.dtype or not head.equal(embedding):
        raise ValueError(
            "lm_head.weight differs from wte.weight, and only a tied output layer is supported")


def read_n_head(folder: Path, width: int) -> int:
    """The number of heads, from the config.json in `folder` or else from the width.
    Raises ValueError if the config.json asks for a model that our GPT cannot be."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("the config.json beside it cannot be read")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            asked = str(config[key])[:40]
            raise ValueError(f"its config.json has {key} {asked!r}, and only {value!r} is "
                             "supported")
    n_head = config.get("n_head", width // 64 if width % 64 == 0 else 0)
    if type(n_head) is not int or n_head < 1 or width % n_head:  # `type`: True is an int, too
        raise ValueError(f"a width of {width} cannot be divided into {str(n_head)[:40]} heads "
                         "(n_head in its config.json)")
    return n_head


def build_gpt(cfg: GPTConfig, table: list[tuple[str, str, bool]],
              tensors: dict[str, torch.Tensor]) -> GPT:
    """A GPT with copies of `tensors` as its weights. Empties `tensors`.

    The embedding may have more rows than the stored one, and the positions fewer.
    Raises ValueError if a tensor has the wrong shape or holds a number that is not finite.
    """
    n_vocab, n_positions = len(tensors["wte.weight"]), len(tensors["wpe.weight"])
    with torch.device("meta"):  # allocate no memory and skip the random initialization
        model = GPT(cfg)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored_shapes = shapes | {"embed.weight": (n_vocab, cfg.d_model),
                              "positions.weight": (n_positions, cfg.d_model)}
    weights = {}
    for ours, theirs, transposed in table:
        tensor = tensors.pop(theirs)  # pop: frees each tensor after it is copied
        stored_shape = stored_shapes[ours]
        if tuple(tensor.shape) != (stored_shape[::-1] if transposed else stored_shape):
            raise ValueError(
                f"{theirs} has the shape {list(tensor.shape)}, which does not fit the others")
        if transposed:
            tensor = tensor.t()  # (in, out) -> (out, in)
        weights[ours] = torch.empty(shapes[ours])
        n_rows = min(len(tensor), len(weights[ours]))
        weights[ours][:n_rows] = tensor[:n_rows]  # a copy, so that nothing depends on the file
        if not torch.isfinite(weights[ours][:n_rows]).all():
            raise ValueError(f"{theirs} holds numbers that are not finite in float32")
    # The output layer is tied, so each new row also gets a logit. Most of GPT-2's logits are far
    # below 0. A random row, or one of zeros, would have a logit near 0, and the new tokens would
    # take all the probability. The logit of the mean row is the mean of the known logits, so by
    # Jensen's inequality its probability is at most 1 / V in every context (Hewitt 2021,
    # nlp.stanford.edu/~johnhew/vocab-expansion.html).
    embedding = weights["embed.weight"]  # (V + new rows, D)
    embedding[n_vocab:] = embedding[:n_vocab].mean(0)  # (D,)
    model.load_state_dict(weights, assign=True)
    return model


# ---- 2. GPT-2 out ------------------------------------------------------------


def export_gpt2(model: GPT, folder, tok: Tokenizer):
    """Write model.safetensors, config.json and the tokenizer, in the format that transformers'
    AutoModelForCausalLM and AutoTokenizer read. Raises UserError.

    On text that holds no special token, the exported tokenizer agrees with ours. Dialogues need our
    `encode_dialogue`, which works turn by turn and puts <|endoftext|> after the assistant's turns.
    """
    check_export(folder)
    folder, cfg = Path(folder), model.cfg
    state = model.state_dict()
    tensors = {}
    for ours, theirs, transposed in tensor_names(cfg.n_layer):
        tensors[f"transformer.{theirs}"] = state[ours].t() if transposed else state[ours]
    write_safetensors(folder / "model.safetensors", tensors)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
              "vocab_size": cfg.vocab_size, "n_embd": cfg.d_model, "n_positions": cfg.context,
              "n_layer": cfg.n_layer, "n_head": cfg.n_head, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
              "resid_pdrop": 0.0, "bos_token_id": tok.end_of_turn,
              "eos_token_id": tok.end_of_turn, **FIXED}
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
               "eos_token": "<|endoftext|>", "model_max_length": cfg.context,
               "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer.json", describe_tokenizer(tok))
    write_json(folder / "tokenizer_config.json", special)
    write_json(folder / "config.json", config)


def check_export(folder):
    """Raise UserError if a model cannot be exported to `folder`, which is created if missing."""
    folder = Path(folder)
    if not can_export_to(folder):
        raise UserError(
            f"{folder} holds a config.json that is not a GPT-2's: export to a folder of its own")
    trial = folder / "config.json.tmp"
    write_atomically(trial, b"")
    trial.unlink(missing_ok=True)  # only the first of several processes writes


def can_export_to(folder: Path) -> bool:
    """Whether `folder` has no config.json, or a GPT-2's. The folder of a run has a config.json
    and a tokenizer.json of its own, and --resume needs them."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text()).get("model_type") == "gpt2"
    except (OSError, ValueError, AttributeError):
        return not file.exists()


def write_json(path: Path, content: dict):
    write_atomically(path, json.dumps(content, indent=1).encode())


def describe_tokenizer(tok: Tokenizer) -> dict:
    """The content of a tokenizer.json, the format of the tokenizers library. It spells bytes as
    printable characters, and lists merges instead of ranks."""
    spelling = spell_bytes()
    ranks, vocab, merges = {}, {}, []
    for rank, token in enumerate(tok.tokens):
        ranks[token] = rank
        vocab[spell(token, spelling)] = rank
    for token in tok.tokens:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges.append([spell(left, spelling), spell(right, spelling)])
    added = []
    for i, content in enumerate(("<|endoftext|>", "<|endofcontext|>")):
        added.append({"id": tok.end_of_turn + i, "content": content, "special": True,
                      "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False})
    split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "post_processor": None, "decoder": byte_level, "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "model": {"type": "BPE", "merges": merges, "dropout": None, "unk_token": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": vocab}}


def spell_bytes() -> dict[int, str]:
    """GPT-2's character for each byte: a byte that Latin-1 prints stands for itself. The others
    get the characters from number 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {}
    n_hidden = 0
    for byte in range(256):
        if byte in printable:
            spelling[byte] = chr(byte)
        else:
            spelling[byte] = chr(256 + n_hidden)
            n_hidden += 1
    return spelling


def spell(token: bytes, spelling: dict[int, str]) -> str:
    return "".join(spelling[byte] for byte in token)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that were merged into `token`. It runs BPE on the token's bytes until two parts
    are left. The pair of lowest rank is merged first, the leftmost one if tied."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = []
        for left, right in zip(parts, parts[1:]):
            pair_ranks.append(ranks.get(left + right, len(ranks)))
        i = pair_ranks.index(min(pair_ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# ---- 3. Downloads ------------------------------------------------------------

HUB = "https://huggingface.co"
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Comparisons in (train, test), as the data set's pages on the hub state them; 160,800 and 8,552
# in all. The release also holds red-team transcripts, which are not comparisons.
HH_ROWS = {"harmless-base": (42_537, 2_312), "helpful-base": (43_835, 2_354),
           "helpful-online": (22_007, 1_137), "helpful-rejection-sampled": (52_421, 2_749)}
TIMEOUT = 30  # seconds without a byte


def cache() -> Path:
    """Where downloads are kept: $TORCH_HOME/hub/rlhf, by default ~/.cache/torch/hub/rlhf."""
    return Path(torch.hub.get_dir()) / "rlhf"


def fetch(url: str, path, size: int | None = None, sha256: str | None = None, check=None,
          by_hand: str = "") -> Path:
    """Download a file to `path` unless it exists, and return `path`. Shows a progress bar.

    A file gets its own name only when it is complete: its size is the announced one (and `size`),
    its hash is `sha256`, and `check`(temporary path) raises no ValueError. So a file at `path` is
    complete, and the same command, run again, fetches only what is missing. A file that the user
    put there is not checked.
    by_hand: what the error message tells the user to do instead. Raises UserError.
    """
    path, timeout = Path(path), socket.getdefaulttimeout()
    if path.exists():
        return path
    print(f"downloading {url} to {path}")
    try:
        socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none and would wait forever
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder is removed at the end, whatever happens.
        with TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            temporary = Path(folder) / path.name
            # torch.hub does not notice a broken connection, so compare the length.
            with urlopen(Request(url, headers={"User-Agent": "torch.hub"})) as reply:
                announced = reply.headers.get("Content-Length")
            torch.hub.download_url_to_file(url, str(temporary), hash_prefix=sha256)
            n_bytes = temporary.stat().st_size
            for expected in (announced, size):
                if expected is not None and n_bytes != int(expected):
                    raise ValueError(f"{n_bytes:,} bytes came instead of {int(expected):,}")
            if check:
                check(temporary)
            os.replace(temporary, path)
    except (OSError, HTTPException, ValueError, RuntimeError, EOFError, zlib.error) as error:
        cause = error.reason if type(error) is URLError else error
        why = str(cause).splitlines() or [type(error).__name__]
        advice = by_hand or f"fetch it by hand and put it at {path}"
        raise UserError(f"cannot download {path.name} from {url} ({why[0]}): {advice}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def gpt2_weights(name: str) -> Path:
    """A folder or file for `load_gpt2`: `name` itself if it exists, else gpt2, gpt2-medium,
    gpt2-large or gpt2-xl, downloaded once (0.5, 1.5, 3.2 or 6.4 GB). Raises UserError."""
    if Path(name).exists():
        return Path(name)
    if name not in GPT2:
        raise UserError(f"{name} is no file or folder here, and none of {', '.join(GPT2)}")
    url, folder = f"{HUB}/openai-community/{name}/resolve/main", cache() / name
    fetch(f"{url}/config.json", folder / "config.json", check=check_json)
    fetch(f"{url}/model.safetensors", folder / "model.safetensors", check=locate_tensors)
    return folder


def check_json(path: Path):
    json.loads(path.read_bytes())


def hh_rlhf(folder) -> Path:
    """The four sets of comparisons of HH-RLHF in `folder`, in the official layout. Downloads the
    files that are missing. Raises UserError."""
    folder, url = Path(folder), f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main"
    by_hand = (f"fetch train.jsonl.gz and test.jsonl.gz of {', '.join(HH_ROWS)} from "
               f"{HUB}/datasets/Anthropic/hh-rlhf by hand and put them in folders of these names "
               f"in {folder}, or name a folder that has them")
    for subset, (n_train, n_test) in HH_ROWS.items():
        for split, n_rows in (("train", n_train), ("test", n_test)):
            file = folder / subset / f"{split}.jsonl.gz"
            unpacked = file.with_suffix("")  # as good as the packed file
            if not unpacked.exists():
                fetch(f"{url}/{subset}/{file.name}", file, by_hand=by_hand,
                      check=lambda path: check_row_count(path, n_rows))
    return folder


def check_row_count(path: Path, n_rows: int):
    """Raises ValueError unless the .gz file has `n_rows` lines; blank ones do not count."""
    count = 0
    with gzip.open(path) as file:
        # A limit, so that an endless line cannot fill the memory.
        for line in iter(lambda: file.readline(MAX_LINE), b""):
            if line.strip():
                count += 1
    if count != n_rows:
        raise ValueError(f"it has {count:,} lines instead of {n_rows:,}")


def resolve_data(name: str) -> Path:
    """The file or folder that --data names. "hh-rlhf" is the official release: the folder hh-rlhf
    here or in data/, the folder that HH_RLHF_DIR names, or a download. Raises UserError."""
    places = [name]
    if name == "hh-rlhf":
        places += ["data/hh-rlhf", os.environ.get("HH_RLHF_DIR", "")]
    for place in places:
        if place and Path(place).exists():
            return Path(place)
    if name != "hh-rlhf":
        raise UserError(
            f"--data {name}: no such file or folder (hh-rlhf downloads the official release)")
    return hh_rlhf(cache() / "hh-rlhf")
