"""The pieces of the toy world (docs/toy_world.md): shapes, objects, materials, defects, scenes and captions."""
