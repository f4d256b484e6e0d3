"""`artist compare`: against diffusers, between two sources, and what it says of bad input."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sd
from sd import cli
from sd.compare import reference
from sd.compare.comparison import LEAST, WHAT, compare_sources, compare_with_diffusers
from sd.compare.measure import Peak, pair, relative, weights_on_use, wrapped
from sd.compare.report import format_report
from sd.prompts.encoder import TextEncoder
from tests.layouts import compvis_tensors, make_model, write_ckpt, write_tokenizer

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")

TRANSFORMER = "output_blocks.3"  # a block of the small UNet that has a SpatialTransformer


@pytest.fixture
def double():
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two files; in the second, one tensor of the UNet and one of the VAE's decoder are not the first's."""
    folder = tmp_path_factory.mktemp("two")
    model = make_model()
    sd.save(model, folder / "a.safetensors")
    with torch.no_grad():
        model.unet.output_blocks[3][1].proj_in.weight[0] += 0.001
        model.vae.decoder.up[1].block[0].conv1.bias[0] += 0.1
    sd.save(model, folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def artist(*args, capsys):
    """The exit code and what was printed: (code, out, err)."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# ---- against diffusers


@needs_diffusers
def test_small_model_is_diffusers(double):
    report = compare_with_diffusers(double)
    assert report.first_over is None
    assert report.same
    assert max(row.difference for row in report.rows if row.name not in LEAST) < 1e-10
    (lms,) = (row for row in report.rows if row.name == "lms")
    assert lms.difference < 1e-7  # diffusers integrates it numerically

    names = [row.name for row in report.rows]
    wanted = ["text", "unet.time_embed"]
    wanted += [f"unet.input_blocks.{i}" for i in range(6)] + ["unet.middle_block"]
    wanted += [f"unet.output_blocks.{i}" for i in range(6)] + ["unet.out", "unet (whole)"]
    wanted += ["controlnet.input_hint_block", "controlnet.time_embed"]
    wanted += [f"controlnet.{name}.{i}" for i in range(6) for name in ("input_blocks", "zero_convs")]
    wanted += ["controlnet.middle_block", "controlnet.middle_block_out", "controlnet (whole)"]
    wanted += ["unet (with a ControlNet)", "drawing (with a ControlNet)"]
    wanted += ["vae.encoder.conv_in", *(f"vae.encoder.down.{i}" for i in range(4)), "vae.encoder.mid"]
    wanted += ["vae.encoder.norm_out", "vae.encoder.conv_out", "vae.quant_conv", "vae.encoder (whole)"]
    wanted += ["vae.post_quant_conv", "vae.decoder.conv_in", "vae.decoder.mid"]
    wanted += [*(f"vae.decoder.up.{i}" for i in (3, 2, 1, 0)), "vae.decoder.norm_out", "vae.decoder.conv_out"]
    wanted += ["vae.decoder (whole)", *reference.COMPARED]
    assert names == [*wanted, *(f"drawing ({how})" for how in ("from text", "from a picture", "with a mask"))]
    for row in report.rows:
        assert min(row.seconds) > 0
        assert row.peak is None if row.name.split()[0] in (*sd.scheduler.SCHEDULERS, "drawing") else min(row.peak) > 0


@needs_diffusers
def test_wrong_epsilon_is_found_where_it_is(double):
    """1e-5 in place of 1e-6 in one block: that block is named, and the blocks after it are not."""
    double.unet.output_blocks[3][1].norm.eps = 1e-5
    report = compare_with_diffusers(double, what=["unet"], repeats=0)
    assert report.first_over.name == f"unet.{TRANSFORMER}"
    assert [row.name for row in report.rows if row.over] == [f"unet.{TRANSFORMER}", "unet (whole)"]
    assert "The first block over its bound" in format_report(report)
    assert f": unet.{TRANSFORMER}" in format_report(report).splitlines()[-1]


@needs_diffusers
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda m: setattr(m.vae.encoder.mid.attn_1.norm, "eps", 1e-5), "vae.encoder.mid"),
        (lambda m: setattr(m.vae.decoder.up[2].block[1].norm2, "eps", 1e-5), "vae.decoder.up.2"),
        (lambda m: setattr(m.vae.decoder.norm_out, "eps", 1e-5), "vae.decoder.norm_out"),
        (lambda m: setattr(m.text, "encode", lambda *p: 1.001 * TextEncoder.encode(m.text, *p)), "text"),
        (lambda m: setattr(m.unet.input_blocks[2][0].op, "stride", 1), "unet.input_blocks.2"),
        (lambda m: setattr(m.unet.out[0], "eps", 1e-6), "unet.out"),
    ],
)
def test_other_faults_are_found(double, spoil, name):
    spoil(double)
    report = compare_with_diffusers(double, what=["text", "unet", "vae"], repeats=0)
    assert report.first_over.name == name


@needs_diffusers
def test_faults_between_blocks_show_in_the_whole(double, monkeypatch):
    monkeypatch.setattr(type(double.vae), "decode", lambda self, z: self.decoder(self.post_quant_conv(z)))
    report = compare_with_diffusers(double, what=["vae"], repeats=0)
    assert report.first_over.name == "vae.decoder (whole)"


@needs_diffusers
def test_a_wrong_scheduler_is_found(double, monkeypatch):
    right = sd.PNDM.step

    def wrong(self, i, noise, x, state, **_):
        return right(self, i, noise if i < 7 else 1.0001 * noise, x, state)

    monkeypatch.setattr(sd.PNDM, "step", wrong)
    report = compare_with_diffusers(double, what=["schedulers"])
    assert report.first_over.name == "pndm"
    assert "worst at step" in report.first_over.note


@needs_diffusers
def test_bounds_sizes_and_parts(double):
    report = compare_with_diffusers(double.to(dtype=torch.float32), size=72, what=["unet"], bound=0.0, repeats=2)
    assert report.rows[0].name == "unet.time_embed"
    assert report.first_over is None  # bit-identical on the CPU
    assert "float32, 72 x 72" in report.title


@needs_diffusers
def test_a_bound_that_is_given_is_that_of_lms_too(double):
    rows = compare_with_diffusers(double, what=["schedulers"], bound=0.0).rows
    assert "lms" in [row.name for row in rows if row.over]
    assert {row.bound for row in rows} == {0.0}


@needs_diffusers
def test_parts_that_are_not_asked_for_are_not_measured(double, monkeypatch):
    monkeypatch.setattr(type(double.text), "encode", lambda self, prompts: pytest.fail("the text was encoded"))
    assert compare_with_diffusers(double, what=["vae"]).rows[-1].name == "vae.decoder (whole)"


@needs_diffusers
def test_the_model_is_left_as_it_was(double):
    before = {name: module.__dict__.keys() for name, module in double.unet.named_modules()}
    compare_with_diffusers(double, what=["unet"], repeats=0)
    assert {name: module.__dict__.keys() for name, module in double.unet.named_modules()} == before


def test_diffusers_is_imported_only_by_who_compares():
    code = "import sys; from sd.compare import comparison, reference, measure; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_diffusers(monkeypatch, capsys):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(reference, "import_module", missing)
    code, out, err = artist("compare", "--random", "small", capsys=capsys)
    assert (code, out) == (2, "")
    assert "pip install 'artificial-artist[compare]'" in err
    assert len(err.splitlines()) == 1


# ---- measuring


def test_relative():
    x = torch.tensor([1.0, -4.0])
    assert relative(x, x) == 0
    assert relative(x + torch.tensor([0.0, 1.0]), x) == 0.25
    assert relative(x[:1], x) == math.inf
    assert relative(torch.tensor([1.0, math.nan]), x) == math.inf
    assert relative(torch.tensor([1.0, math.inf]), x) == math.inf


def test_peak_counts_what_is_alive_at_once():
    x = torch.zeros(1000)  # 4000 bytes, given
    with Peak() as count:
        y = x.view(10, 100) + 1  # 4000
        z = y * 2  # 8000
        del y
        z = z + 1  # 8000: the old z is alive until the new one is there
        z.mul_(3)
        z = z[:5].T
    assert count.peak == 8000
    assert count.now == 4000
    del z
    assert count.now == 0


def test_pair_measures_memory_and_time():
    x = torch.zeros(1000)
    row, result = pair("x", lambda: x + 1, lambda: (x + 1) + 1e-3, 1e-2, 3)
    assert torch.equal(result, x + 1)
    assert row.peak == (4000, 8000)
    assert row.difference == pytest.approx(1e-3 / 1.001, rel=1e-3)
    assert not row.over
    assert pair("x", lambda: x, lambda: x, 0.0, 0)[0].seconds is None


def test_wrapped_leaves_nothing_after_an_error():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError), wrapped({"a": module}, lambda name, forward, args, kwargs: forward(*args)):
        module(torch.zeros(3))
    assert "forward" not in module.__dict__


def test_weights_on_use():
    module = torch.nn.Linear(2, 2).half()
    before = module.weight.data_ptr()
    with weights_on_use({"a": module}, torch.float64):
        assert module(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
        assert module.weight.dtype == torch.float16
    assert module.weight.data_ptr() == before


# ---- two sources


def test_two_sources(two):
    report = compare_sources(*two)
    assert report.tensors == 540
    assert [(c.part, c.name, c.kind) for c in report.changes] == [
        ("unet", "output_blocks.3.1.proj_in.weight", "value"),
        ("vae", "decoder.up.1.block.0.conv1.bias", "value"),
    ]
    assert report.changes[0].difference > 1e-4
    assert report.first_over.name == f"unet.{TRANSFORMER}"
    over = [row.name for row in report.rows if row.over]
    assert over == [f"unet.{TRANSFORMER}", "unet (whole)", "vae.decoder.up.1", "vae.decoder (whole)"]
    assert not report.same


def test_a_source_with_itself(two):
    report = compare_sources(two[0], two[0])
    assert report.same
    assert report.changes == []
    assert len(report.rows) == 37
    assert "Every block gives the same." in format_report(report)


def test_other_forms_and_dtypes(two, tmp_path):
    model = sd.load(two[0])
    write_ckpt(tmp_path / "same.ckpt", compvis_tensors(model))  # brings no tokenizer
    assert compare_sources(tmp_path / "same.ckpt", two[0]).same
    sd.save(model, tmp_path / "half.safetensors", torch.float16)
    report = compare_sources(two[0], tmp_path / "half.safetensors")
    assert len(report.changes) > 300
    assert max(c.difference for c in report.changes) < 1e-3
    assert compare_sources(two[0], tmp_path / "half.safetensors", bound=5e-3).same


def saved(model, path, change=lambda ours: None):
    """A self-contained file whose metadata are changed."""
    sd.save(model, path)
    file = sd.weights.checkpoint.read(path)
    ours = json.loads(file.metadata["sd"])
    change(ours)
    sd.weights.checkpoint.write_safetensors(path, file.tensors, {"format": "pt", "sd": json.dumps(ours)})
    return path


def other_merges(ours):
    ours["tokenizer"]["merges.txt"] = ours["tokenizer"]["merges.txt"].replace("st ar</w>\n", "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_merges, "The tokenizers differ; both text encoders are given A's tokens."),
        (lambda ours: ours.update(image_size=72), "The sizes of a picture differ: 64 and 72 pixels."),
        (
            lambda ours: ours["config"]["unet"].update(num_heads=4),
            "The configurations of the UNet differ: num_heads = 8 and 4.",
        ),
        (
            lambda ours: ours["config"]["vae"].update(scale_factor=0.2),
            "The configurations of the VAE differ: scale_factor = 0.18215 and 0.2.",
        ),
        (
            lambda ours: ours["config"]["text"].update(hidden_act="gelu"),
            "The configurations of the text encoder differ: hidden_act = quick_gelu and gelu.",
        ),
        (lambda ours: ours["config"]["unet"].update(num_heads=5), "cannot be split by num_heads = 5"),
    ],
)
def test_other_tokenizers_and_configurations_are_a_difference(change, sentence, two, tmp_path, capsys):
    """Even where a bound lets every block pass."""
    path = saved(sd.load(two[0]), tmp_path / "c.safetensors", change)
    code, out, _ = artist("compare", two[0], path, "--bound", "100", "--json", tmp_path / "r.json", capsys=capsys)
    assert code == 1
    assert sentence in out
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["same"] is False
    assert len(written["differences"]) == 1
    assert written["changes"] == []


def test_what_is_only_written_otherwise_is_no_difference(two, tmp_path):
    def change(ours):
        texts = ours["tokenizer"]
        texts["vocab.json"] = json.dumps(json.loads(texts["vocab.json"]), indent=1)
        texts["merges.txt"] = texts["merges.txt"].replace("#version: 0.2", "#version: 0.3") + "\n"
        ours["config"]["unet"]["attention_resolutions"].reverse()

    report = compare_sources(two[0], saved(sd.load(two[0]), tmp_path / "c.safetensors", change))
    assert report.same
    assert report.differences == []


def test_a_tokenizer_that_is_given_is_that_of_both(two, tmp_path):
    path = saved(sd.load(two[0]), tmp_path / "c.safetensors", other_merges)
    assert compare_sources(two[0], path, tokenizer=write_tokenizer(tmp_path / "clip")).same
    with pytest.raises(sd.LoadError, match=r"tokenizer folder .* cannot be read"):
        compare_sources(two[0], path, tokenizer=tmp_path / "nowhere")


def test_sources_of_other_shapes(two):
    report = compare_sources(two[0], "shapes")
    assert {c.kind for c in report.changes} >= {"shape", "missing in A", "missing in B"}
    assert report.rows == []
    assert "blocks are not compared" in report.notes[0]
    assert "and 620 more" in format_report(report)


def test_values_that_are_not_numbers(two, tmp_path):
    model = sd.load(two[0])
    with torch.no_grad():
        model.unet.out[2].bias[0] = math.nan
    sd.save(model, tmp_path / "nan.safetensors")
    assert compare_sources(tmp_path / "nan.safetensors", tmp_path / "nan.safetensors").changes == []
    report = compare_sources(two[0], tmp_path / "nan.safetensors")
    assert [(c.name, c.difference) for c in report.changes] == [("out.2.bias", math.inf)]
    assert report.first_over.name == "unet.out"


# ---- the command


@needs_diffusers
def test_command(capsys, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["compare", "--random", "small", "--dtype", "float32", "--json", out]
    code, printed, _ = artist(*arguments, "--only", "unet", capsys=capsys)
    assert code == 0
    assert "unet.middle_block" in printed
    assert "No block is over its bound" in printed
    written = json.loads(out.read_text())
    assert written["same"] is True
    assert written["first_over"] is None
    assert {row["name"] for row in written["rows"]} >= {"unet.out", "unet (whole)"}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    code, _, err = artist(*arguments, capsys=capsys)
    assert code == 2
    assert "--force" in err


def test_command_on_two_sources(two, capsys, tmp_path):
    code, printed, _ = artist("compare", *two, "--json", tmp_path / "r.json", capsys=capsys)
    assert code == 1
    assert "2 of 540 tensors differ" in printed
    assert printed.splitlines()[-1] == f"The first block that differs: unet.{TRANSFORMER}"
    assert json.loads((tmp_path / "r.json").read_text())["first_over"] == f"unet.{TRANSFORMER}"
    assert artist("compare", two[0], two[0], capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "--random", "small"], "leave one of them out"),
        (["--only", "unets"], "no part 'unets' to compare: choose among " + ", ".join(WHAT)),
        (["--size", "13"], "multiple of 8 from 8 to 4096 pixels, not 13"),
        (["--repeats", "-1"], "at least 0, not -1"),
        (["--bound", "-1"], "at least 0, not -1"),
        (["--bound", "nan"], "at least 0, not nan"),
        (["--device", "cuda:77"], "There is no device 'cuda:77' here"),
        (["nowhere.ckpt"], "There is no file or folder nowhere.ckpt"),
        (["shapes", "nowhere.ckpt"], "There is no file or folder nowhere.ckpt"),
        (["shapes", "shapes", "--only", "unet"], "--only only works in a comparison with diffusers"),
        (["shapes", "shapes", "--repeats", "2"], "--repeats only works in a comparison with diffusers"),
        (["--random", "small", "--config", "c.json"], "--config is about a source, and --random has none"),
        (["--random", "small", "--tokenizer", "."], "--tokenizer is about a source, and --random has none"),
        (["--random", "small", "--ema"], "--ema is about a source, and --random has none"),
        (["--random", "small", "--hub-variant", "fp16"], "--hub-variant is about a source, and --random has none"),
        (["shapes", "shapes", "--json", "nowhere/r.json"], "there is no folder nowhere; make it first"),
        (["shapes", "shapes", "--json", "."], "it is a folder; name a file"),
        (["shapes", "shapes", "--controlnet", "c.pth"], "--controlnet only works in a comparison with diffusers"),
        (["--random", "small", "--controlnet", "c.pth"], "There is no file or folder c.pth: give a ControlNet's"),
        (["shapes", "shapes", "--ema"], "--ema only works in a comparison with diffusers"),
    ],
)
def test_bad_input(arguments, message, capsys):
    if "nowhere.ckpt" not in arguments[1:] and "shapes" not in arguments:
        pytest.importorskip("diffusers")
    code, out, err = artist("compare", *arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@needs_diffusers
def test_the_page_runs(capsys):
    page = (Path(__file__).parents[1] / "docs/compare.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
    assert capsys.readouterr().out.startswith("None\nTrue 0 Row(name='text'")


@needs_diffusers
@pytest.mark.slow
def test_full_size():
    """Every block at full size and small pictures: identical but for LMS, which diffusers integrates numerically."""
    model = reference.random_model_of("full", torch.float32)
    report = compare_with_diffusers(model, size=64, repeats=0)
    assert len(report.rows) == 49 + 31 + len(reference.COMPARED) + 3
    assert {row.name for row in report.rows if row.difference} <= {"lms"}
    assert report.first_over is None


def test_every_solver_has_a_row_but_one():
    """The noise of DPM++ SDE is a Brownian tree in diffusers: tests/test_solvers.py compares its steps."""
    assert set(sd.scheduler.SCHEDULERS) - set(reference.COMPARED) == {"dpmpp_sde"}


@pytest.mark.parametrize("channels", [4, 9])
def test_whole_drawings(channels):
    model = make_model(unet=replace(reference.SMALL_UNET, in_channels=channels), dtype=torch.float64)
    rows = compare_with_diffusers(model, what=["drawings"], repeats=0).rows
    names = ["drawing (from text)", "drawing (from a picture)", "drawing (with a mask)"]
    assert [row.name for row in rows] == (names if channels == 4 else names[2:])
    assert not any(row.over for row in rows)


@needs_diffusers
def test_a_control_net_that_differs_is_over_in_the_block_that_does(double, tmp_path, monkeypatch):
    net = reference.random_controlnet(double, seed=5)
    sd.save_controlnet(net, tmp_path / "net.safetensors")
    call = {"what": ["controlnet"], "repeats": 0, "controlnet": tmp_path / "net.safetensors"}
    assert compare_with_diffusers(double, **call).first_over is None

    def other(net):
        theirs = diffusers_controlnet(net)
        theirs.controlnet_down_blocks[2].weight = torch.nn.Parameter(1.001 * net.zero_convs[2][0].weight)
        return theirs

    diffusers_controlnet = reference.diffusers_controlnet
    monkeypatch.setattr(reference, "diffusers_controlnet", other)
    over = [row.name for row in compare_with_diffusers(double, **call).rows if row.over]
    whole = ["controlnet (whole)", "unet (with a ControlNet)", "drawing (with a ControlNet)"]
    assert over == ["controlnet.zero_convs.2", *whole]


def test_a_drawing_that_differs_is_over_its_bound(double, monkeypatch):
    monkeypatch.setattr("sd.compare.drawings.SimpleSampler", lambda model: partial(sd.SimpleSampler(model), eta=0.5))
    assert all(row.over for row in compare_with_diffusers(double, what=["drawings"], repeats=0).rows)
