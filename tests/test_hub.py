"""Tests of hub.py. The only server is this process, on 127.0.0.1."""
import gzip
import hashlib
import json
import math
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hub
from data import Tokenizer, load_comparisons, train_bpe
from helpers import doubled, exact_logits, shaken
from model import GPT, GPTConfig
from test_weights import refused, stored
from weights import read_safetensors

V, D, L, C = 300, 128, 2, 24  # D: two heads of 64, as a GPT-2 without a config.json has
N_VOCAB = 320

# ---- GPT-2 in ----------------------------------------------------------------


def theirs(layers=L, D=D) -> dict[str, torch.Tensor]:
    """Random weights under transformers' names, in the order and layout of GPT-2's own file."""
    matrices = {"attn.c_attn": [D, 3 * D], "attn.c_proj": [D, D],
                "mlp.c_fc": [D, 4 * D], "mlp.c_proj": [4 * D, D]}
    shapes = {"wte.weight": [V, D], "wpe.weight": [C, D]}
    for i in range(layers):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = matrices.get(name, [D])
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": [D], "ln_f.bias": [D]}
    g = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=g) + (".weight" in name and len(shape) == 1)
            for name, shape in shapes.items()}


def reference(w: dict, ids: list[int], n_head: int) -> torch.Tensor:
    """GPT-2's equations on transformers' names, in float64; matrices multiply from the right."""
    w = {name.removeprefix("transformer."): t.double() for name, t in w.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]  # (T, D)
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        heads = []
        qkv = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)  # 3 of (T, D)
        for q, k, v in zip(*(t.chunk(n_head, -1) for t in qkv)):  # (T, D/H)
            scores = q @ k.T / math.sqrt(q.shape[1])  # (T, T)
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        x = x + conv1d(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        hidden = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")  # (T, 4D)
        x = x + conv1d(F.gelu(hidden, approximate="tanh"), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T  # (T, V)


IDS = [5, 299, 0, 7, 7, 31, 250, 1, 2, 3, 17, 100]


@torch.no_grad()
def logits(gpt, ids=IDS):
    """-> (T, V), in float64, of a copy: `gpt` stays as it is."""
    return exact_logits(doubled(gpt), ids)


def same_function(gpt, w: dict, n_head: int, ids=IDS) -> bool:
    expected = reference(w, ids, n_head)
    return (logits(gpt, ids)[:, :expected.shape[1]] - expected).abs().max() < 1e-9


@pytest.fixture
def folder(tmp_path):
    """-> a function that writes a checkpoint and returns its folder."""
    def write(w: dict, pad=0, **config):
        (tmp_path / "model.safetensors").write_bytes(stored(w, pad))
        (tmp_path / "config.json").unlink(missing_ok=True)
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path
    return write


@pytest.mark.parametrize("pad, n_head", [(0, None), (1, 8), (5, 1)])
def test_gpt2_gives_the_logits_of_a_reference(folder, pad, n_head):
    # The first case takes some 3 s: torch imports much on the first use of its meta device.
    w, config = theirs(), {"n_head": n_head} if n_head else {}
    gpt = hub.load_gpt2(folder(w, pad, **config), N_VOCAB)
    assert gpt.cfg == GPTConfig(L, n_head or D // 64, D, N_VOCAB, C)
    assert same_function(gpt, w, n_head or D // 64)
    # The tolerance means something: another number of heads or a transposed matrix is far outside.
    assert not same_function(gpt, w, 4)
    w["h.0.attn.c_proj.weight"] = w["h.0.attn.c_proj.weight"].T
    assert not same_function(gpt, w, n_head or D // 64)


def test_prefix_buffers_and_a_tied_head_change_nothing(folder):
    w = theirs()
    plain = logits(hub.load_gpt2(folder(w), N_VOCAB))
    head = {"lm_head.weight": w["wte.weight"].clone()}
    w |= {f"h.{i}.attn.bias": torch.ones(1, 1, C, C, dtype=torch.uint8) for i in range(L)}
    w |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    prefixed = {"transformer." + name: t for name, t in w.items()}
    assert "occurs twice" in refused(hub.load_gpt2, folder(prefixed | w), N_VOCAB)
    for tensors in (w | head, prefixed | head):
        assert torch.equal(logits(hub.load_gpt2(folder(tensors), N_VOCAB)), plain)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        w = {name: t.to(dtype) for name, t in (prefixed | head).items()}
        torch.save(w, folder({}) / "m.bin")
        gpt = hub.load_gpt2(folder({}) / "m.bin", N_VOCAB)
        assert {p.dtype for p in gpt.parameters()} == {torch.float32} and same_function(gpt, w, 2)


def test_gpt2_is_a_copy_that_trains(folder):
    at = folder(theirs(), pad=-len(stored(theirs())) % 8)
    gpt = hub.load_gpt2(at, N_VOCAB)
    before = logits(gpt)
    with open(at / "model.safetensors", "r+b") as f:  # in place: a mapped parameter would change
        f.write(b"\xff" * (at / "model.safetensors").stat().st_size)
    assert torch.equal(logits(gpt), before)
    assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in gpt.parameters())
    gpt.logits(gpt(torch.tensor([IDS]))).logsumexp(-1).sum().backward()
    torch.optim.SGD(gpt.parameters(), lr=0.1).step()
    assert not torch.equal(logits(gpt), before)


def test_a_missing_tensor_and_one_of_another_shape_are_named(folder):
    small = theirs(layers=1, D=64)
    for name, t in small.items():
        missing = {other: tensor for other, tensor in small.items() if other != name}
        assert f"the tensor {name} is missing" in refused(hub.load_gpt2, folder(missing), N_VOCAB)
        if not name.startswith("w"):  # the embeddings may have any number of rows
            message = refused(hub.load_gpt2, folder(small | {name: torch.cat([t, t])}), N_VOCAB)
            assert f"{name} has the shape {[2 * len(t), *t.shape[1:]]}" in message
    hole = {name: t for name, t in theirs(layers=3).items() if not name.startswith("h.1.")}
    assert "h.1.ln_1.weight is missing" in refused(hub.load_gpt2, folder(hole), N_VOCAB)
    assert "h.0.ln_1.weight is missing" in refused(hub.load_gpt2, folder(theirs(layers=0)), N_VOCAB)


W = theirs()
NAN, EMBED, BIAS = torch.tensor([math.nan]), W["wte.weight"], W["ln_f.bias"]


@pytest.mark.parametrize("name, tensor, why", [
    ("score.weight", NAN, "'score.weight' is not part"), ("x" * 5000, NAN, "x" * 60),
    ("h.0.attn.c_attn.scale", NAN, "c_attn.scale"), ("h.0.attn.bias2", NAN, "bias2"),
    ("h.99999999999999.ln_1.weight", NAN, "h.2.ln_1.weight is missing"),  # costs nothing
    ("h.1.mlp.c_fc.weight", torch.ones(4 * D, D), "c_fc.weight has the shape"),  # nn.Linear
    ("wte.weight", torch.ones(V), "wte.weight has the shape [300]; a non-empty matrix was"),
    ("wte.weight", torch.ones(V, 0), "wte.weight has the shape [300, 0]; a non-empty"),
    ("wte.weight", torch.ones(0, D), "has the shape"),
    ("wpe.weight", EMBED[None], "wpe.weight has the shape [1, 300, 128]; a non-empty"),
    ("wpe.weight", torch.ones(C, 64), "wpe.weight has the shape"),
    ("wte.weight", EMBED.int(), "wte.weight is of torch.int32"),
    ("h.1.mlp.c_fc.bias", torch.ones(4 * D).int(), "c_fc.bias is of torch.int32"),
    ("wte.weight", torch.cat([EMBED[1:], NAN.expand(1, D)]), "wte.weight holds numbers that are"),
    ("ln_f.bias", torch.cat([BIAS[1:], torch.tensor([-math.inf])]), "not finite in float32"),
    ("ln_f.bias", BIAS.double() * 1e300, "not finite in float32"),
    ("lm_head.weight", EMBED + 1e-6, "lm_head.weight differs"),
    ("lm_head.weight", EMBED.double(), "lm_head.weight differs"),
    ("transformer.ln_f.bias", torch.zeros(D), "'ln_f.bias' occurs twice")])
def test_tensors_that_are_no_gpt2_of_ours_are_refused(folder, name, tensor, why):
    message = refused(hub.load_gpt2, folder(W | {name: tensor}), N_VOCAB)
    assert " is not a GPT-2 for this project: " in message and why in message


def test_configs_of_other_models_are_refused(folder):
    for option, value, why in (
            ("n_head", 3, "3 heads"), ("n_head", 0, "0 heads"), ("n_head", -2, "-2 heads"),
            ("n_head", "2", "2 heads"), ("n_head", True, "True heads"),
            ("activation_function", "relu", "activation_function 'relu'"),
            ("layer_norm_epsilon", 1e-6, ""), ("scale_attn_weights", False, ""),
            ("scale_attn_by_inverse_layer_idx", True, ""), ("tie_word_embeddings", False, "")):
        at = folder(W, **{option: value})
        message = refused(hub.load_gpt2, at, N_VOCAB)
        assert f"{at} is not a GPT-2 for this project: " in message
        assert option in message and why in message
    w = theirs(D=96)
    assert "width of 96" in refused(hub.load_gpt2, folder(w), N_VOCAB)  # no multiple of 64
    assert hub.load_gpt2(folder(w, n_head=3), N_VOCAB).cfg.n_head == 3
    at = folder(W, n_head=4)
    assert hub.load_gpt2(at / "model.safetensors", N_VOCAB).cfg.n_head == 4
    for text in ("{", "[]", "3", "[" * 100_000):
        (at / "config.json").write_text(text)
        assert "config.json" in refused(hub.load_gpt2, at, N_VOCAB)


def test_a_shorter_context_keeps_the_first_positions_and_new_tokens_get_the_mean_row(folder):
    w = theirs()
    cut = hub.load_gpt2(folder(w), N_VOCAB, context=len(IDS))
    assert cut.cfg.context == len(cut.positions.weight) == len(IDS) and same_function(cut, w, 2)
    assert hub.load_gpt2(folder(w), N_VOCAB, C).cfg.context == C
    message = refused(hub.load_gpt2, folder(w), N_VOCAB, C + 1)
    assert "24 positions, too few for a context of 25" in message
    w["wte.weight"] -= 0.3  # a common direction, so that logits are far from 0
    gpt = hub.load_gpt2(folder(w), N_VOCAB)
    assert torch.equal(gpt.embed.weight[:V], w["wte.weight"]) and len(gpt.embed.weight) == N_VOCAB
    # A float32 sum of V terms is off by at most V * eps * the largest term, its mean by 1 / V that.
    error = gpt.embed.weight[V:] - w["wte.weight"].double().mean(0)
    assert error.abs().max() < V * torch.finfo(torch.float32).eps * w["wte.weight"].abs().max()
    assert (logits(gpt, [*range(C)]).softmax(-1)[:, V:] <= 1 / V).all()
    for n_vocab in (V, V + 64):
        assert len(hub.load_gpt2(folder(w), n_vocab).embed.weight) == n_vocab
    for n_vocab in (V - 1, V + 65, 50304):  # the vocabulary of another tokenizer
        assert f"needs {n_vocab:,} rows" in refused(hub.load_gpt2, folder(w), n_vocab)


# ---- GPT-2 out ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    dialogue = "\n\nHuman: What is 12 plus 7?\n\nAssistant: It's 19, isn't it?  Ça va; 🙂 x_y\n"
    return train_bpe([dialogue] * 3 + ["the cat sat on the mat, then the rat sat there"] * 5, 300)


def small(n_vocab: int, seed=0) -> GPT:
    return shaken(GPT(GPTConfig(L, 4, D, n_vocab, C)), seed).eval()


def test_export_writes_what_transformers_and_we_read(tmp_path, tok):
    at = tmp_path / "out"
    for seed in (0, 1):  # an earlier export is replaced
        gpt, ids = small(tok.n_vocab, seed), [i % tok.n_vocab for i in IDS]
        hub.export_gpt2(gpt, at, tok)
        back = hub.load_gpt2(at, tok.n_vocab)
        assert back.cfg == gpt.cfg and back.state_dict().keys() == gpt.state_dict().keys()
        for name, t in gpt.state_dict().items():
            assert torch.equal(back.state_dict()[name], t), name
    w = read_safetensors(at / "model.safetensors")
    assert list(w) == ["transformer." + name for name in W] and same_function(gpt, w, 4, ids)
    config = json.loads((at / "config.json").read_text())
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": C,
                "vocab_size": tok.n_vocab, "n_embd": D, "n_layer": L, "n_head": 4,
                "bos_token_id": tok.end_of_turn, "eos_token_id": tok.end_of_turn,
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "tie_word_embeddings": True, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    assert config == config | expected
    assert {file.name for file in at.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    # Other folders are left alone.
    for text in ("[]", "{", '{"run": {"seed": 0}}'):  # the last is a run's
        (tmp_path / "config.json").write_text(text)
        assert "folder of its own" in refused(hub.export_gpt2, gpt, tmp_path, tok)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "out"]
    assert "cannot write" in refused(hub.export_gpt2, gpt, tmp_path / "config.json" / "out", tok)


TEXTS = ["", " ", "\n\nHuman: What's 12 plus 7?\n\nAssistant: 19!", "the cat's mat  \n\n  x",
         "  lots   of\tspace \n ", "naïve café 🙂👨\u200d👩 漢字 عربى", "x_y __init__ 3.14 1,000",
         "they'll I'd\r\n", "\x00\x7f\xad"]


@pytest.mark.parametrize("name", ["tok", "gpt2"])
def test_transformers_reads_what_we_write(tmp_path, name, request):
    transformers = pytest.importorskip("transformers")
    ours, texts = request.getfixturevalue(name), TEXTS
    if name == "gpt2":
        rows, _ = load_comparisons(request.getfixturevalue("hh_rlhf_dir"), "test")
        texts = TEXTS + [c.prompt + c.chosen for c in rows[:300]]
    gpt = small(ours.n_vocab)
    hub.export_gpt2(gpt, tmp_path, ours)
    auto = transformers.AutoModelForCausalLM
    net, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(net).__name__ == "GPT2LMHeadModel" and not any(info.values())
    net.save_pretrained(tmp_path / "theirs")  # and we read what transformers writes
    torch.save(net.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "pytorch_model.bin"):
        back = hub.load_gpt2(path, ours.n_vocab)
        assert back.cfg == gpt.cfg and torch.equal(logits(back), logits(gpt))
    with torch.no_grad():
        expected = net.eval().double()(torch.tensor([IDS])).logits[0]
    assert (logits(gpt) - expected).abs().max() < 1e-9
    assert net.generation_config.eos_token_id == ours.end_of_turn
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = other(text)["input_ids"]
        assert ids == ours.encode(text) and other.decode(ids) == text, text
    specials = other.convert_tokens_to_ids(["<|endoftext|>", "<|endofcontext|>"])
    assert specials == [ours.end_of_turn, ours.end_of_context] and len(other) == ours.n_tokens
    assert other.eos_token_id == ours.end_of_turn and other.model_max_length == C


def test_the_exported_tokenizer_by_hand(tmp_path):
    """Without the tokenizers library. GPT-2 spells a space as Ġ and "\n" as Ċ."""
    tok = train_bpe([" aa \n"] * 3 + ["é aa"] * 2 + ["xab"] * 2, 5000)
    hub.export_gpt2(GPT(GPTConfig(1, 1, 8, tok.n_vocab, 16)), tmp_path, tok)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    assert tok.tokens[256:] == [b" a", b" aa", b" \n", b"ab", b"xab", "é".encode()]
    assert merges == [["Ġ", "a"], ["Ġa", "a"], ["Ġ", "Ċ"], ["a", "b"], ["x", "ab"], ["Ã", "©"]]
    assert list(vocab.values()) == list(range(262)) and vocab["Ġaa"] == 257 and vocab["!"] == 33
    assert vocab["Ā"] == 0 and vocab["Ń"] == 0xAD  # the first and the last byte without a print
    assert [(t["id"], t["content"], t["special"]) for t in content["added_tokens"]] == [
        (262, "<|endoftext|>", True), (263, "<|endofcontext|>", True)]
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": tok.pattern} and split["behavior"] == "Isolated"
    # Our pattern cuts the text, and no space is added.
    assert not (split["invert"] or byte_level["use_regex"] or byte_level["add_prefix_space"])


# ---- Downloads ---------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves server.files (path -> bytes). server.mood says how it behaves."""
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, mood = self.server, self.server.mood
        server.asked.append(self.path)
        data = server.files.get(self.path.removesuffix("?there"))
        if mood == "nonsense":
            return self.wfile.write(b"what?\r\n\r\n")
        if data is None:
            return self.send_error(404)
        moved = mood == "moved" and not self.path.endswith("?there")
        self.send_response(302 if moved else 200)
        if moved:
            self.send_header("Location", self.path + "?there")
        elif mood != "no length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not moved:
            self.wfile.write(data[:len(data) // 2] if mood in ("cut", "silent") else data)
        if mood == "silent":
            self.wfile.flush()
            server.end.wait(10)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine, in the place of the hub, and an empty cache and working folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.mood, server.end = {}, [], "", threading.Event()
    server.url, server.daemon_threads = f"http://127.0.0.1:{server.server_port}", True
    server.handle_error = lambda *args: None  # a client that hangs up is part of the tests
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(hub, "HUB", server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HH_RLHF_DIR", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    socket.setdefaulttimeout(60)
    yield server
    socket.setdefaulttimeout(None)
    server.end.set()
    server.shutdown()
    server.server_close()
    thread.join()


NOBODY = "http://127.0.0.1:1"  # no server is there
CONTENT = bytes(range(256)) * 400


@pytest.mark.parametrize("mood", ["", "no length", "moved"])
def test_fetches_a_file_once(server, tmp_path, capsys, mood):
    server.files["/a.bin"], server.mood = CONTENT, mood
    file, url, checked = tmp_path / "new" / "folder" / "a.bin", server.url + "/a.bin", []
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert hub.fetch(url, file, size=len(CONTENT), sha256=sha256, check=checked.append) == file
    assert file.read_bytes() == CONTENT and len(checked) == 1 and checked[0] != file
    out, err = capsys.readouterr()
    assert url in out and "100k" in err  # the bar
    assert os.listdir(file.parent) == ["a.bin"]
    server.asked.clear()
    assert hub.fetch(url, file) == file and server.asked == []


@pytest.mark.parametrize("mood, url, options, why", [
    ("", "{server}/none", {}, "404"), ("", NOBODY + "/a.bin", {}, "Connection refused): fetch it"),
    ("", "nonsense://a.bin", {}, ""), ("", "a.bin", {}, ""),
    ("cut", "{server}/a.bin", {}, "51,200 bytes came instead of 102,400"),
    ("silent", "{server}/a.bin", {}, "timed out"), ("nonsense", "{server}/a.bin", {}, "(what?)"),
    ("", "{server}/a.bin", {"size": 7}, "instead of 7"),
    ("", "{server}/a.bin", {"sha256": "0" * 64}, "hash"),
    ("", "{server}/a.bin", {"check": hub.check_json}, "Expecting value")])
def test_a_failed_download_says_why_and_leaves_nothing(
        server, tmp_path, monkeypatch, mood, url, options, why):
    def interrupted(path):
        (path.parent / "partial").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "TIMEOUT", 0.2 if mood == "silent" else 30)
    file = tmp_path / "empty" / "a.bin"
    server.files["/a.bin"], server.mood = CONTENT, mood
    url = url.format(server=server.url)
    message = refused(hub.fetch, url, file, **options)
    assert why in message and f"a.bin from {url}" in message and f"put it at {file}" in message
    assert os.listdir(file.parent) == [] and socket.getdefaulttimeout() == 60  # as before
    server.mood = ""  # and again, when the network is back, but with a Ctrl-C first
    monkeypatch.setattr(hub, "TIMEOUT", 30)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(server.url + "/a.bin", file, check=interrupted)
    assert os.listdir(file.parent) == []
    assert hub.fetch(server.url + "/a.bin", file).read_bytes() == CONTENT


def test_gpt2_is_downloaded_once_and_what_is_no_gpt2_is_not_kept(server):
    base, at = "/openai-community/gpt2-medium/resolve/main/", hub.cache() / "gpt2-medium"
    server.files = {base + "model.safetensors": b"<html>log in</html>", base + "config.json": b"{"}
    assert "config.json" in refused(hub.gpt2_weights, "gpt2-medium") and os.listdir(at) == []
    server.files[base + "config.json"] = b'{"n_head": 4}'
    message = refused(hub.gpt2_weights, "gpt2-medium")
    assert f"put it at {at / 'model.safetensors'}" in message and os.listdir(at) == ["config.json"]
    server.files[base + "model.safetensors"] = stored(W)
    server.asked.clear()
    assert hub.gpt2_weights("gpt2-medium") == at
    assert set(server.asked) == {base + "model.safetensors"}  # what is missing, and no more
    assert same_function(hub.load_gpt2(at, N_VOCAB), W, 4)
    server.asked.clear()
    assert hub.gpt2_weights("gpt2-medium") == at and hub.gpt2_weights(str(at)) == at
    os.mkdir("gpt2-xl")  # a folder here comes first
    assert hub.gpt2_weights("gpt2-xl") == Path("gpt2-xl") and server.asked == []
    assert "none of gpt2, gpt2-medium" in refused(hub.gpt2_weights, "gpt2-huge")


def rows(n: int) -> bytes:
    shared = "\n\nHuman: Hi!\n\nAssistant:"
    line = json.dumps({"chosen": shared + " Hello.", "rejected": shared + " No."})
    return gzip.compress("\n".join([line] * n).encode())  # the last line has no "\n"


RELEASE = "/datasets/Anthropic/hh-rlhf/resolve/main/"


@pytest.fixture
def release(server, monkeypatch):
    """A server with a small HH-RLHF."""
    # Sums that are published apart from the counts of the parts.
    assert [sum(counts) for counts in zip(*hub.HH_ROWS.values())] == [160_800, 8_552]
    monkeypatch.setattr(hub, "HH_ROWS", {"harmless-base": (5, 2), "helpful-base": (4, 3)})
    for subset, (n_train, n_test) in hub.HH_ROWS.items():
        server.files[f"{RELEASE}{subset}/train.jsonl.gz"] = rows(n_train)
        server.files[f"{RELEASE}{subset}/test.jsonl.gz"] = rows(n_test)
    return server


def test_hh_rlhf_is_downloaded_once_and_loads(release):
    at = hub.resolve_data("hh-rlhf")
    assert at == Path(os.environ["TORCH_HOME"]) / "hub" / "rlhf" / "hh-rlhf"
    assert set(release.asked) == set(release.files)
    test, counters = load_comparisons(at, "test")
    assert len(load_comparisons(at, "train")[0]) == 9 and len(test) == 5 and len(counters) == 2
    for subset in ("helpful-base", "harmless-base"):
        (at / subset / "test.jsonl.gz").unlink()
    (at / "helpful-base" / "test.jsonl").touch()  # a file that is there unpacked is not fetched
    release.asked.clear()
    for _ in range(2):
        assert hub.resolve_data("hh-rlhf") == at
        assert set(release.asked) == {RELEASE + "harmless-base/test.jsonl.gz"}


@pytest.mark.parametrize("content, why", [
    (rows(3), "3 lines instead of 4"), (rows(5), "5 lines instead of 4"),
    (rows(4)[:-12], "ended before"), (b"no gzip", "gzip"), (b"", "0 lines"),
    (gzip.compress(b" \n" * 4), "0 lines"),
    (gzip.compress(b"x" * (2**25 + 1)), "3 lines"),  # a long line is read 2^24 bytes at a time
    (gzip.compress(b"")[:10] + b"\xff" * 30, "invalid block type")])
def test_a_wrong_hh_file_is_not_kept(release, content, why):
    release.files[RELEASE + "helpful-base/train.jsonl.gz"] = content
    message = refused(hub.resolve_data, "hh-rlhf")
    assert why in message and RELEASE + "helpful-base/train.jsonl.gz" in message
    at = hub.cache() / "hh-rlhf"
    assert {str(f.relative_to(at)) for f in at.rglob("*") if f.is_file()} == {
        "harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"}


def test_a_copy_that_is_there_is_used(release, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HUB", NOBODY)  # no network: the sentence says what to put where
    message = refused(hub.resolve_data, "hh-rlhf")
    for part in (*hub.HH_ROWS, "train.jsonl.gz", "test.jsonl.gz",
                 hub.HUB + "/datasets/Anthropic/hh-rlhf", str(hub.cache() / "hh-rlhf")):
        assert part in message
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    assert hub.resolve_data(str(elsewhere)) == elsewhere
    monkeypatch.setenv("HH_RLHF_DIR", str(elsewhere))
    assert hub.resolve_data("hh-rlhf") == elsewhere
    for folder in ("data/hh-rlhf", "hh-rlhf"):  # each comes before those above
        (here / folder).mkdir(parents=True)
        assert hub.resolve_data("hh-rlhf").resolve() == here / folder
    assert "no such file or folder" in refused(hub.resolve_data, "hh-rhlf")
    assert release.asked == []
