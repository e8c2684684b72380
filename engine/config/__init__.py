"""The options of all scripts: frozen dataclasses with defaults, ranges and help, and the presets."""
