"""Each kind of model that OpenCLIP makes, tiny and with random weights: from a hub on this machine and from a file."""

import json
from copy import copy, deepcopy

import numpy as np
import open_clip
import pytest
import torch
from hub import using_hub
from safetensors.torch import save
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from tic_clip import TicError, models, weights
from tic_clip.models import load_model, quickgelu_fault

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
VIT = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
HF_TEXT = {"hf_tokenizer_name": "me/bert", "context_length": 16}
BERT = {"hf_model_name": "me/bert", "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", **HF_TEXT}
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
KINDS = {
    "vit": VIT,
    "quickgelu": VIT | {"quick_gelu": True},
    "resnet": VIT | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
    "convnext": VIT | {"vision_cfg": {"timm_model_name": "convnext_atto", "image_size": 64, **TIMM}},
    "bert": VIT | {"text_cfg": BERT},
    "roberta": VIT | {"text_cfg": {**BERT, "hf_model_name": "me/roberta", "hf_pooler_type": "cls_pooler"}},
    "coca": VIT
    | {"custom_text": True, "multimodal_cfg": COCA, "vision_cfg": VISION | POOLED}
    | {"text_cfg": TEXT | {"embed_cls": True, "output_tokens": True}},
    "siglip": {"embed_dim": 64, "custom_text": True, "init_logit_bias": -10.0}
    | {"vision_cfg": {**TIMM, "timm_model_name": "test_vit", "image_size": 160, "timm_pool": "map", "timm_proj": ""}}
    | {"text_cfg": {**TEXT, **HF_TEXT, "vocab_size": 6, "no_causal_mask": True, "pool_type": "last"}},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a text model and tokenizer each of two families, and no models yet."""
    folder = tmp_path_factory.mktemp("hub")
    words = ["[PAD]", "[UNK]", "a", "cat", "dog", "red"]
    rule = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rule.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"vocab_size": 6, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    files = {}
    for name, config in (("bert", BertConfig(**size)), ("roberta", RobertaConfig(**size))):
        for part in (config, PreTrainedTokenizerFast(tokenizer_object=rule, pad_token="[PAD]", unk_token="[UNK]")):
            part.save_pretrained(folder / name)
        files[f"me/{name}"] = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
    with using_hub(files, folder / "cache") as server:
        yield server


@pytest.fixture
def make(hub, tmp_path, monkeypatch):
    """Make an architecture of OpenCLIP's of a configuration: returns its name, and a model with random weights."""
    monkeypatch.setattr(models, "MODEL_CONFIGS", tmp_path / "configs")
    for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, name, copy(getattr(open_clip.factory, name)))

    def build(config, name="kind"):
        models.MODEL_CONFIGS.mkdir(exist_ok=True)
        (models.MODEL_CONFIGS / f"{name}.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        return name, models.make_model(name, "cpu")[0]

    return build


def assert_equal_features(loaded, expected, arch, atol=0.0):
    """A loaded (model, transform, tokenizer) encodes as the model ``expected`` of ``arch`` does."""
    net, _, tokenizer = loaded
    tokens = open_clip.get_tokenizer(arch)(["a red cat", "a dog"])
    assert torch.equal(tokenizer(["a red cat", "a dog"]), tokens)
    assert tokens.shape[1] == 16
    size = open_clip.get_model_config(arch)["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for part, batch in (("encode_image", images), ("encode_text", tokens)):
            features = getattr(net, part)(batch, normalize=True)
            torch.testing.assert_close(features, getattr(expected, part)(batch, normalize=True), rtol=0, atol=atol)
            assert not torch.allclose(*features)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_hub_and_its_checkpoint(kind, hub, make, tmp_path):
    arch, net = make(KINDS[kind], kind)
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    config = json.dumps({"model_cfg": KINDS[kind], "preprocess_cfg": {}}).encode()
    hub.files[f"me/my-{kind}"] = {"open_clip_config.json": config, "open_clip_model.safetensors": save(state)}
    assert_equal_features(load_model(f"hf-hub:me/my-{kind}", "", "cpu"), net, arch)
    weights.write({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "x.pt")
    asked = len(hub.requests)
    assert_equal_features(load_model(arch, str(tmp_path / "x.pt"), "cpu"), net, arch)
    assert not [path for _, path in hub.requests[asked:] if "bin" in path or "safetensors" in path]


def test_a_model_without_weights_on_the_hub_is_one_line(hub):
    hub.files["me/none"] = {"open_clip_config.json": json.dumps({"model_cfg": VIT, "preprocess_cfg": {}}).encode()}
    with pytest.raises(TicError, match=r"^hf-hub:me/none can't be loaded: .*404") as caught:
        load_model("hf-hub:me/none", "", "cpu")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it traces
def test_an_archive_of_openais(hub, make, tmp_path, monkeypatch):
    """Its tag is OpenCLIP's affair; a file with code in it is refused, its weights alone are not."""
    config = VIT | {"quick_gelu": True, "embed_dim": 64, "text_cfg": TEXT | {"width": 64, "heads": 1}}
    arch, net = make(config | {"vision_cfg": VISION | {"width": 64, "head_width": 64}}, "openais")
    theirs = deepcopy(net)
    theirs.attn_mask = theirs._buffers.pop("attn_mask")
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(theirs).pop(name, None)
        theirs.register_buffer(name, torch.tensor(16))
    archive = torch.jit.trace_module(theirs, {"encode_text": torch.zeros(1, 16, dtype=torch.long)}, check_trace=False)
    archive.save(str(tmp_path / "jit.pt"))
    with pytest.raises(TicError, match=r"jit.pt is not .* safely: a TorchScript archive holds code; torch.save its"):
        load_model(arch, str(tmp_path / "jit.pt"), "cpu")
    torch.save(archive.state_dict(), tmp_path / "weights.pt")
    assert_equal_features(load_model(arch, str(tmp_path / "weights.pt"), "cpu"), net, arch)
    hub.files["me/jit"] = {"jit.pt": (tmp_path / "jit.pt").read_bytes()}
    tags = {"openai": {"url": f"{hub.url}/me/jit/resolve/main/jit.pt"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, arch, tags)
    monkeypatch.setenv("HOME", str(tmp_path))  # where OpenCLIP keeps it
    assert_equal_features(load_model(arch, "openai", "cpu"), net, arch, atol=5e-4)  # OpenCLIP has them in float16


# --- What OpenCLIP changes in a checkpoint ---


def older_text_tower(state):
    return state | {"text.transformer.embeddings.position_ids": torch.arange(32)[None]}


def no_bias(state):
    return {name: value for name, value in state.items() if name != "logit_bias"}


def with_numpy(state):
    """As stock OpenCLIP 2.24 saves one: its cosine makes the learning rate a NumPy number."""
    optimizer = {"state": {}, "param_groups": [{"lr": 0.5 * (1 + np.cos(np.float64(1))), "steps": np.int64(3)}]}
    return {"epoch": 2, "name": "x", "state_dict": state, "optimizer": optimizer}


CASES = {
    "position_ids": ("bert", {}, older_text_tower),
    "another image size": ("vit", {"vision_cfg": VISION | {"image_size": 48}}, dict),
    "another context length": ("vit", {"text_cfg": TEXT | {"context_length": 24}}, dict),
    "a text tower of its own": ("vit", {"custom_text": True}, dict),
    "SigLIP of CLIP": ("vit", {"init_logit_bias": -10.0}, dict),
    "NumPy numbers": ("vit", {}, with_numpy),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_loaded_as_openclip_does_it(case, make, tmp_path, monkeypatch):
    kind, change, edit = CASES[case]
    torch.save(edit(make(KINDS[kind])[1].state_dict()), tmp_path / "x.pt")
    arch, model = make(KINDS[kind] | change, "other")
    found = load_model(arch, str(tmp_path / "x.pt"), "cpu")[0].state_dict()
    monkeypatch.setattr(open_clip.factory.weights, "read", lambda path, **_: torch.load(path, weights_only=False))
    open_clip.factory.load_checkpoint(model, tmp_path / "x.pt")  # stock's own
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_what_is_no_checkpoint_of_an_architecture(make, tmp_path):
    torch.save(make(KINDS["vit"])[1].state_dict(), tmp_path / "x.pt")
    arch, _ = make(KINDS["vit"] | {"text_cfg": TEXT | {"width": 64}}, "other")
    message = r"x.pt is not of other: .*positional_embedding is \(16, 32\), the model's is \(16, 64\)"
    with pytest.raises(TicError, match=message):
        load_model(arch, str(tmp_path / "x.pt"), "cpu")


# --- QuickGELU ---


def test_weights_of_quickgelu_in_an_architecture_with_gelu():
    pairs = {pair: fault for pair in open_clip.list_pretrained() if (fault := quickgelu_fault(*pair))}
    clean = {pair for pair in pairs if pair[1] != "openai"}
    laion = {("ViT-B-32", "laion400m_e31"), ("ViT-B-32", "laion400m_e32")}
    assert clean == {("RN50", "yfcc15m"), ("RN50", "cc12m"), ("RN101", "yfcc15m")} | laion
    assert pairs["RN50", "cc12m"].endswith("say RN50-quickgelu cc12m")
