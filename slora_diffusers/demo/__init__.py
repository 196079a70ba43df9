"""The embedded demo: real glyphs, a small pretrained DiT, and the main job on both."""
