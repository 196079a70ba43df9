"""What tests of training share: tiny bases in folders, and the words of a short run of the DiT recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny.pipelines import tiny_dit_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline


@pytest.fixture(scope="module")
def dit_base(tmp_path_factory):
    """The folder of a tiny DiT that is trained as a flow."""
    folder = tmp_path_factory.mktemp("base")
    tiny_dit_pipeline("flow_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_bases(tmp_path_factory):
    """A folder with a tiny SD3, `sd3`, and a tiny PixArt-Sigma, `sigma`."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    tiny_pixart_pipeline("sigma").save_pretrained(folder / "sigma")
    return folder


def glyph_run(base: Path, out: Path) -> list[str]:
    """Arguments of the DiT recipe for a run on glyphs, without validation."""
    argv = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), "--glyphs", "script"]
    argv += ["--glyph_variations", "1", "--train_batch_size", "2", "--rank", "4", "--learning_rate", "1e-2"]
    return [*argv, "--validation_steps", "0"]
