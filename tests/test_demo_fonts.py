"""Pretraining takes the faces of a folder that are new, legible letters, and none that is close to a new style."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import torch

from slora_diffusers.demo import fonts
from slora_diffusers.demo.glyphs import CORE_FACES, NEW_STYLES
from train_scripts.pretrain_demo import Drawer

TTF = Path(matplotlib.get_data_path(), "fonts", "ttf")


def test_a_folder_gives_its_letters_and_neither_copies_nor_symbols_nor_a_new_style(tmp_path, monkeypatch, capsys):
    (tmp_path / "deep").mkdir()
    for name, stem in {"deep/Mono.ttf": "DejaVuSansMono", "Copy.ttf": "DejaVuSans", "Cal.ttf": "cmsy10"}.items():
        shutil.copy(TTF / f"{stem}.ttf", tmp_path / name)
    shutil.copy(TTF / "cmex10.ttf", tmp_path / "Signs.ttf")  # brackets and sums of every size
    (tmp_path / "broken.otf").write_text("no font")
    (tmp_path / "notes.txt").write_text("no font either")
    monkeypatch.setattr(fonts, "PRETRAINING_FACES", CORE_FACES[:15])  # cmti10 came with matplotlib 3.11
    faces = fonts.read_faces(tmp_path)
    taken = {Path(name).name for name in faces.names}
    assert taken - {face.name for face in CORE_FACES} == {"Mono.ttf"} and len(taken) > 10
    assert faces.glyphs.shape == (len(taken), 26, 64, 64) and faces.glyphs.dtype == torch.uint8
    torch.testing.assert_close(faces.shares.sum(), torch.tensor(1.0))
    said = capsys.readouterr().out
    assert "1 close to a new style" in said and "1 not readable" in said


def test_the_median_capital_of_any_font_is_as_high_as_those_of_matplotlib(tmp_path):
    shutil.copy(TTF / "STIXGeneral.ttf", tmp_path / "Other.ttf")
    (face,) = fonts._files(tmp_path)
    heights = [fonts._draw(f)[:, :, :].max(axis=2).astype(bool).sum(axis=1) for f in (face, CORE_FACES[0])]
    assert abs(float(sorted(heights[0])[13]) - float(sorted(heights[1])[13])) <= 3  # of 64 pixels


def test_every_new_style_is_recognised_as_one():
    for style in NEW_STYLES.values():
        features = fonts._features(torch.from_numpy(np.asarray(fonts._draw(style))[None]))
        assert abs(fonts._likeness(features).item() - 1) < 1e-5


def test_drawer_gives_each_glyph_with_its_letter_its_face_and_what_was_changed():
    glyphs = torch.zeros(2, 26, 64, 64, dtype=torch.uint8)
    for letter in range(26):
        glyphs[:, letter, 20:44, 20 : 24 + letter] = 255  # the wider, the later in the alphabet
    drawer = Drawer(fonts.Faces(("a", "b"), glyphs, torch.tensor([0.0, 1.0])))
    batch = drawer(64, torch.Generator().manual_seed(0))
    again = drawer(64, torch.Generator().manual_seed(0))
    assert torch.equal(batch.pixels, again.pixels) and batch.pixels.shape == (64, 3, 32, 32)
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert set(batch.faces.tolist()) == {1} and batch.changes.abs().max() <= 1
    ink = (batch.pixels[:, 0] + 1).sum((1, 2))
    assert torch.corrcoef(torch.stack([ink, batch.letters.float()]))[0, 1] > 0.9
    columns = (batch.pixels[:, 0] + 1).sum(1)  # (B, 32): where a glyph lies follows from its first change
    centre = (columns * torch.arange(32)).sum(1) / columns.sum(1) - batch.letters / 4  # its right edge moves, too
    assert torch.corrcoef(torch.stack([centre, batch.changes[:, 0]]))[0, 1] < -0.8
