"""Task vectors from images, from text, and from files."""

import json

import numpy as np
import pytest
import torch

from lorarecycle.generate import clip_encoder, load_vector, save_vector, task_vector, text_vector
from lorarecycle.runtime.files import save_tensors
from lorarecycle.vit.features import extract_features


def test_the_mean_feature_of_images(tiny_backbone, tiny_data):
    vector = task_vector(tiny_backbone, tiny_data.images, batch_size=7)
    expected = extract_features(tiny_backbone, tiny_data.images).mean(dim=0)
    torch.testing.assert_close(vector, expected)
    assert vector.shape == (32,)
    other = task_vector(tiny_backbone, tiny_data.subset(tiny_data.labels < 2).images)
    assert (other - vector).norm() > 0.01


def test_any_sentence_encoder():
    def encode(texts):
        return np.array([[len(text), text.count("a")] for text in texts])

    assert text_vector("a cat", encode).tolist() == [5, 2]
    assert text_vector(["a cat", "dog"], encode).tolist() == [4, 1]
    with pytest.raises(ValueError, match=r"one row for each of 2 texts, got \[1, 2\]"):
        text_vector(["a", "b"], lambda texts: encode(texts[:1]))


@pytest.mark.parametrize("description", [" ", []], ids=["blank", "no texts"])
def test_a_description_without_text(description):
    with pytest.raises(ValueError, match="`description` must hold some text"):
        text_vector(description, lambda texts: np.zeros((len(texts), 2)))


def test_clip(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", "c", "a", "t</w>", "d", "o", "g</w>", "t", "g"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=6, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    tower = transformers.CLIPTextModelWithProjection(config).eval()
    tower.save_pretrained(tmp_path)
    encode = clip_encoder(tmp_path)
    cat, dog = text_vector("cat", encode), text_vector("dog", encode)
    assert cat.shape == (6,)
    assert (cat - dog).norm() > 1e-4
    with torch.no_grad():
        tokens = transformers.AutoTokenizer.from_pretrained(str(tmp_path))("cat", return_tensors="pt")
        torch.testing.assert_close(cat, tower(**tokens).text_embeds[0])
    torch.testing.assert_close(text_vector(["cat", "dog"], encode), (cat + dog) / 2, rtol=0, atol=1e-5)


def test_files(tmp_path):
    path = save_vector(tmp_path / "task" / "task_vector.safetensors", torch.arange(3.0), text="three")
    assert torch.equal(load_vector(path), torch.arange(3.0))
    save_tensors(path, {"other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"must hold `task_vector`, got \['other'\]"):
        load_vector(path)
    with pytest.raises(FileNotFoundError):
        load_vector(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="must be finite"):
        save_vector(path, torch.tensor([float("inf")]))
