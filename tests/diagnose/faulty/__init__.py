"""Programs with a fault, re-created from the kinds that the literature and questions on forums describe."""

from program import programs

from faulty import answers, heads, inputs, modes, norms, shapes, starts, steps, variants, wiring

ALL = programs(heads, shapes, inputs, starts, norms, modes, steps, wiring, variants, answers)
