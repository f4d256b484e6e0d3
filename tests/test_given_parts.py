"""--embedding and --vae: what a picture says of them, and how --again has them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sd
from sd.cli import main
from sd.cli.settings import drawing_of
from sd.image import read_settings
from tests.test_foreign import png

DRAW = ["a red <gizmo> on a white background", "--steps", "2", "--quiet"]
WORDS = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a/gizmo.bin and a/b/other.pt, embeddings, and vae.safetensors."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("a/b")
    torch.save({"<gizmo>": WORDS}, "a/gizmo.bin")
    torch.save({"string_to_param": {"*": -WORDS}}, "a/b/other.pt")
    vae = sd.load("shapes").vae.state_dict()
    save_file({name: 1.02 * t for name, t in vae.items()}, "vae.safetensors")
    return tmp_path


def drawn(*options, code=0):
    assert main([*map(str, options), "--quiet"]) == code


def pixels(name):
    with Image.open(name) as image:
        return image.tobytes()


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_picture_with_both_is_drawn_again(folder, recwarn):
    files = ["--embedding", "a/gizmo.bin", "--embedding", folder / "a/b/other.pt", "--vae", "vae.safetensors"]
    drawn("a red <gizmo> and other", *DRAW[1:], *files, "-o", "x.png")
    said = read_settings("x.png")
    assert said["embedding"] == ["a/gizmo.bin", "other.pt"]  # of the second, the last part alone
    assert said["embedding_digest"] == [digest("a/gizmo.bin")[:10], digest("a/b/other.pt")[:10]]
    assert (said["vae"], said["vae_hash"]) == ("vae.safetensors", digest("vae.safetensors")[:10])
    text = Image.open("x.png").text["parameters"]
    assert "VAE: vae.safetensors" in text
    assert f'TI hashes: "gizmo: {digest("a/gizmo.bin")[:10]}, other: ' in text
    drawn("--again", "x.png", "--embedding-dir", "a", "-o", "y.png")
    assert pixels("y.png") == pixels("x.png")
    assert not [w for w in recwarn.list if "differ" in str(w.message)]
    plain = [*DRAW[1:], "-o"]
    drawn("a red <gizmo> and other", *plain, "z.png", *files[:2])
    assert pixels("z.png") != pixels("x.png")


def test_variants_draw_with_them(folder):
    files = ["--embedding", "a/gizmo.bin", "--vae", "vae.safetensors"]
    drawn(*DRAW, *files, "-o", "a.png")
    drawn(*DRAW, *files, "-o", "b.png", "--variant", "lean")
    drawn(*DRAW, *files, "-o", "c.png", "--variant", "parallel")
    for name in ("b.png", "c.png"):
        apart = [abs(x - y) for x, y in zip(pixels("a.png"), pixels(name), strict=True)]
        assert max(apart) <= 1


def test_what_is_not_here_is_asked_for(folder, capsys):
    drawn(*DRAW, "--embedding", "a/gizmo.bin", "--vae", "vae.safetensors", "-o", "x.png")
    shutil.move("a/gizmo.bin", "a/b/gizmo.bin")
    capsys.readouterr()
    drawn("--again", "x.png", code=2)
    assert "with the embedding a/gizmo.bin, which is not here: add --embedding a/gizmo.bin" in capsys.readouterr().err
    assert drawing_of({"again": "x.png", "embedding_dir": ["a"]}).embedding == ["a/b/gizmo.bin"]
    torch.save({"<gizmo>": WORDS + 1}, "a/gizmo.bin")  # another, of the same name: passed over
    assert drawing_of({"again": "x.png", "embedding_dir": ["a"]}).embedding == ["a/b/gizmo.bin"]
    drawn("--again", "x.png", "-o", "y.png", "--embedding", "a/gizmo.bin")
    assert "x.png was drawn with other embeddings" in capsys.readouterr().err
    os.rename("vae.safetensors", "v.safetensors")
    drawn("--again", "x.png", "--embedding-dir", "a", code=2)
    assert "with the VAE vae.safetensors, which is no file here, and nothing is" in capsys.readouterr().err
    drawn("--again", "x.png", "--embedding-dir", "a", "--vae", "v.safetensors", "-o", "z.png")
    assert pixels("z.png") == pixels("x.png")
    tensors = sd.load("shapes").vae.state_dict()
    save_file(tensors, "w.safetensors")
    drawn("--again", "x.png", "--embedding-dir", "a", "--vae", "w.safetensors", "-o", "w.png")
    assert "x.png was drawn with another VAE (the hash was" in (said := capsys.readouterr().err)
    assert "choose by --vae" in said


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("embedding", "a/gizmo.bin"),
        ("embedding", [1]),
        ("embedding", ["a"] * 101),
        ("embedding", ["a\0b"]),
        ("embedding_digest", ["xyz"]),
        ("vae", ["vae.safetensors"]),
        ("vae_hash", "no"),
    ],
)
def test_damaged_settings_are_named(setting, value, folder, capsys):
    info = PngInfo()
    info.add_itxt("sd", json.dumps({"prompt": "a red star", setting: value}))
    Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
    drawn("--again", "x.png", code=2)
    assert f"its setting {setting} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../up.pt", "/etc/passwd", "C:\\x.pt", "~/x.pt", "none.pt"])
def test_a_picture_names_only_what_is_below(name, folder, tmp_path_factory, capsys):
    torch.save({"<gizmo>": WORDS}, folder.parent / "up.pt")
    for setting in ({"embedding": [name], "embedding_digest": [None]}, {"vae": name}):
        info = PngInfo()
        info.add_itxt("sd", json.dumps({"prompt": "a red star"} | setting))
        Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
        drawn("--again", "x.png", code=2)
        assert "which is no" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "says"), [
    (["--embedding", "gone.pt"], "gone.pt does not exist"),
    (["--embedding", "a/gizmo.bin", "--embedding", "a/gizmo.bin"], "there is an embedding of that word already"),
    (["--embedding", "vae.safetensors"], "holds no embedding but"),
    (["--embedding", "a"], "a is a folder"),
    (["--vae", "a/gizmo.bin"], "holds weights that are not recognised: give a VAE's file"),
    (["--vae", "gone.pt"], "There is no file or folder gone.pt: give a VAE's file"),
    (["--embedding-dir", "a"], "--embedding-dir is about a picture that is drawn again"),
])  # fmt: skip
def test_bad_files_are_one_sentence(options, says, folder, capsys):
    drawn(*DRAW, *options, "-o", "x.png", code=2)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("x.png").exists()


# ---- pictures of AUTOMATIC1111


def foreign(**fields):
    more = "".join(f', {name.replace("_", " ")}: "{value}"' for name, value in fields.items())
    return png("x.png", f"a gizmo and other\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64{more}")


def test_its_embeddings_are_found_by_name_and_digest(folder, recwarn):
    sums = f"gizmo: {digest('a/gizmo.bin')[:12]}, other: {digest('a/b/other.pt')[:12].upper()}"
    drawing = drawing_of({"again": foreign(TI_hashes=sums), "model": "shapes", "embedding_dir": ["a"]})
    assert drawing.embedding == ["a/gizmo.bin", "a/b/other.pt"]
    assert not recwarn.list
    drawn("--again", "x.png", "--model", "shapes", "--embedding-dir", "a", "-o", "y.png")
    assert read_settings("y.png")["embedding"] == drawing.embedding
    assert not [w for w in recwarn.list if "embeddings" in str(w.message)]


def test_what_is_missing_is_named(folder):
    fields = {"TI_hashes": f"gizmo: {'0' * 12}, gone: abc", "VAE": "best.vae.pt", "VAE_hash": "0123456789"}
    with pytest.warns(UserWarning, match="so this picture will differ") as caught:
        drawing = drawing_of({"again": foreign(**fields), "model": "shapes", "embedding_dir": ["a"]})
    assert drawing.embedding is None
    said = str(caught[0].message)
    for words in ("VAE: best.vae.pt (--vae gives it)", "embedding: gizmo (--embedding gives it", "embedding: gone ("):
        assert words in said
    given = {"model": "shapes", "vae": "vae.safetensors", "embedding": ["a/gizmo.bin"]}
    drawing = drawing_of({"again": "x.png", **given})
    assert (drawing.vae_hash, drawing.embedding) == ("0123456789", ["a/gizmo.bin"])
    with pytest.raises(ValueError, match="--embedding-dir must be a folder, and nowhere is none"):
        drawing_of({"again": "x.png", "model": "shapes", "embedding_dir": ["nowhere"]})
