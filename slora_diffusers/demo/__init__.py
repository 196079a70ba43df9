"""The embedded demo: real glyphs, a small pretrained DiT, and the main job on both."""

from importlib.util import find_spec

from ..errors import SerialLoraError

if missing := [name for name in ("matplotlib", "PIL") if find_spec(name) is None]:
    raise SerialLoraError(
        f"The demo draws with Pillow in matplotlib's fonts; {' and '.join(missing)} cannot be imported. "
        "Install them with: pip install matplotlib pillow"
    )
