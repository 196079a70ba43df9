"""The embedded demo: real glyphs, a small pretrained DiT, and the main job on both."""

from importlib.util import find_spec

from ..errors import SerialLoraError

NEEDS = ("accelerate", "matplotlib", "peft", "rich", "transformers")

if missing := [name for name in NEEDS if find_spec(name) is None]:
    raise SerialLoraError(f"The demo needs {', '.join(missing)} besides: pip install 'slora_diffusers[cli]'.")
