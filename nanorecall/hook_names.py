"""Names in the classes of a fork that nothing would read, such as a misspelt hook.

    class Attention(CausalSelfAttention):
        attn_fn = staticmethod(mine)  # attention_fn is meant

Python takes any name. Without this check the fork would be trained as plain GPT, and nothing would
say so.
"""

import ast
import difflib
import inspect
import sys

from torch import nn

from nanorecall.settings import require, say
from nanorecall.source_files import is_main_rank, is_users_file, syntax_tree

# Methods that model.GPT has not, but that are called where a model has them (see build.py).
OPTIONAL = ("lr_scales", "sparse_gradients", "column_sharded", "on_step_end", "correct_predictions")


def check_hook_names(module, model_class, files):
    """ConfigError if a class in a user's module sets a hook that nothing reads.

    model_class: what will be trained. files: paths of the user's files that were executed. Only a
    class that is made from another model, block or mixer has hooks.
    """
    read = names_read(files)
    for cls in vars(module).values():
        if not inspect.isclass(cls) or not is_users_file(sys.modules.get(cls.__module__), files):
            continue
        known = inherited_names(cls)
        # Several models may share a file; a block or mixer is there to be used.
        is_used = cls is model_class or "block" in known or cls.__name__ in read
        if known and not is_used and is_main_rank():
            note = f"note: nothing uses the class {cls.__name__} of {cls.__module__}.py"
            say(note, file=sys.stderr)
        for name, value in vars(cls).items():
            if not known or name.startswith("_") or name in known or name in read:
                continue
            # A hook that the class has under its right name, too, is not the one that was meant.
            close = close_hook(name, value, known - vars(cls).keys())
            # A function for a notebook is no hook; one that is put in place of a method is.
            is_own = isinstance(value, staticmethod) and is_def_in(value, cls)
            is_replaced = is_module_class(value) or (isinstance(value, staticmethod) and not is_own)
            hint = f"did you mean {close}?" if close else f"its hooks are: {hooks(cls)}"
            message = f"nothing reads {cls.__name__}.{name} of {cls.__module__}.py; {hint}"
            way_out = f"else write `{cls.__name__}.{name}` below the class, which reads it"
            require(not (close or is_replaced), f"{message}; {way_out}", "model")
            if is_own and is_main_rank():
                say(f"note: {message}", file=sys.stderr)


def names_read(files):
    """All names that the source of these files reads, also as text (getattr)."""
    names = set()
    for path in files:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, ast.alias) and node.asname:  # import ... as
                names.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def inherited_names(cls):
    """What a class may replace: names of its bases up to nn.Module; none if that is the first."""
    bases = [base for base in cls.__mro__[1:] if base not in nn.Module.__mro__]
    if not bases or not issubclass(cls, nn.Module):
        return set()
    names = {"forward", *OPTIONAL}
    for base in bases:
        names |= vars(base).keys()
    return names


def close_hook(name, value, known):
    """The hook of a similar name, or "". A method of one's own may well have a similar one."""
    is_code = inspect.isfunction(value) or isinstance(value, (property, classmethod))
    cutoff = 0.85 if is_code else 0.6
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    if close:
        return close[0]
    return "attention_fn" if name == "attn_fn" and "attention_fn" in known else ""


def is_def_in(method, cls):
    """Is a static method defined in the class itself, and not a function from outside?"""
    function = method.__func__
    return getattr(function, "__qualname__", "").startswith(f"{cls.__qualname__}.")


def is_module_class(value):
    return inspect.isclass(value) and issubclass(value, nn.Module)


def hooks(cls):
    """The names of modules and functions that a class takes from its bases, as text."""
    names = []
    for base in cls.__mro__[1:]:
        for name, value in vars(base).items():
            if is_module_class(value) or name == "attention_fn":
                names.append(name)
    return ", ".join(dict.fromkeys(names)) or "none"
