"""How many bits of the trained facts a model stores."""

import numpy as np

from nanorecall.stats import mean_ci


def stored_bits(batches, data, model):
    """Bits of the trained facts that the model stores, as {name: {"value", "ci95", "n"}}.

    batches: what `predictions` returns. A fact counts with the bits of its answer minus its loss,
    and with 0 if that is negative. (The bound of Allen-Zhu and Li 2024, arXiv 2404.05405, is of the
    mean loss, so facts that are wrong with confidence lower it.) The mean over the facts that were
    measured, with its interval, is multiplied by the number of all trained facts.
    {} if the task has no facts to store.
    """
    capacity = getattr(getattr(data, "source", None), "capacity", {})
    if not capacity:
        return {}
    name, value = capacity["slice"].split("=")
    example, loss = [], []
    for batch in batches:
        trained = batch["slices"][name].astype(str) == value
        example.append(batch["example"][trained])
        loss.append(batch["loss"][trained])
    _, fact = np.unique(np.concatenate(example), return_inverse=True)
    n_labels, nats = np.bincount(fact), np.bincount(fact, np.concatenate(loss))
    bits = np.maximum(0, n_labels * capacity["bits"] - nats / np.log(2))  # of each fact
    values = {}  # a table of values may be shared by several layers
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("memory.values"):
            values[id(parameter)] = parameter.numel()
    units = {
        "bits stored": 1,
        "bits stored per parameter": sum(p.numel() for p in model.parameters()),
        "bits stored per memory value": sum(values.values()),
    }
    return {name: mean_ci(bits * (capacity["facts"] / n)) for name, n in units.items() if n > 0}
