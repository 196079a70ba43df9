"""Random walks over verbs, placements, neighbours and faults, against a float64 model that knows only what holds."""
