"""Manifests with a mistake: what `check` has to refuse."""

import copy

# Objects whose keys are the user's. The values of some are quantities, which may be numbers.
FREE = ["labels", "annotations", "matchLabels", "selector", "data", "rayStartParams", "requests",
        "limits"]
QUANTITIES = ["requests", "limits"]


def copies(document):
    """What is wrong, and a copy that has it: a field that there is not in each object, and a value
    of another type for each value."""
    for path in paths(document, ()):
        value = at(document, path)
        name = "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in path)
        if isinstance(value, dict) and not any(step in FREE for step in path[-1:]):
            yield f"{name}.noSuchField", changed(document, (*path, "noSuchField"), "1")
        quantity = len(path) > 1 and path[-2] in QUANTITIES
        if path and path[0] not in ("apiVersion", "kind") and not quantity:
            wrong = 7 if isinstance(value, str) else "text"
            yield f"{name} = {wrong!r}", changed(document, path, wrong)


def paths(value, path):
    yield path
    steps = value.items() if isinstance(value, dict) else []
    steps = enumerate(value) if isinstance(value, list) else steps
    for step, inner in steps:
        yield from paths(inner, (*path, step))


def at(value, path):
    for step in path:
        value = value[step]
    return value


def changed(document, path, value):
    document = copy.deepcopy(document)
    at(document, path[:-1])[path[-1]] = value
    return document
