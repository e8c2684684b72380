"""What a run, an evaluation or a tool is asked for: frozen dataclasses, their defaults and presets."""
