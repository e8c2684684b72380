"""The pieces of the toy world (DESIGN 7): shapes, objects, materials, defects, scenes and captions."""
