"""What a model predicts over a split, and how many bits of the trained facts it stores."""

import numpy as np

from nanorecall.metrics import iter_predictions
from nanorecall.stats import mean_ci


def predictions(run):
    """What iter_predictions yields on all ranks, in the order of one process."""
    options = dict(dtype=run.dtype, show_progress=True, world=run.world)
    split, batch_size = run.config.split, run.config.eval_batch_size
    of_this_rank = iter_predictions(run.model, run.data, split, batch_size, run.device, **options)
    batches = []
    for of_ranks in zip(*run.world.all_gather_object(list(of_this_rank))):
        # A rank without a batch has None.
        batches += [batch for batch in of_ranks if batch]
    return batches


def stored_bits(batches, data, model):
    """Bits of the trained facts that the model stores, as {name: {"value", "ci95", "n"}}.

    A fact counts with the bits of its answer less its loss, and at least with 0 (Allen-Zhu and Li
    2024, arXiv 2404.05405). The mean over the facts that were measured, with its interval, is
    multiplied by the number of all. {} if the task has no facts to store.
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
