"""Model and data files, those of this repo and those that a user brings.

A run names its model and its task by file. A name of REPO_FILES means that file of this repo. Any
other NAME.py is looked for in the working directory, then in this repo; the user's code in it is
executed, so a fork needs no registry.

config.json records the path and the SHA-256 of each such file, and of the files beside it that it
imports. Whoever opens the run later (resume, eval.py, ablate.py) executes those bytes or nothing: a
run directory from somebody else must not be able to name other code, and a file that was edited
since would be another model.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field

from nanorecall.files import sha256_file
from nanorecall.settings import ConfigError, last_line, require, say

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Files of this repo that a run may name.
REPO_FILES = (
    *("model", "delta", "delta_variants", "linear", "ttt", "hybrid", "memory"),
    *("data_mqar", "data_synth", "data_track"),
)
# All that lies beside them and is this repo's own, too.
OURS = (
    *REPO_FILES,
    *("train", "eval", "ablate", "flex_generate", "sweep"),
    *("nanorecall", "analysis", "myriadlama", "tests"),
)

announced = set()  # paths of recorded files, each of which is announced once in a process


def is_main_rank():
    """Before the process group exists: is this the rank that prints?"""
    return os.environ.get("RANK", "0") == "0"


def is_users_file(module, files):
    """Is a module (or None) one of the user's own? files: their real paths."""
    return os.path.realpath(getattr(module, "__file__", None) or "") in files


@dataclass
class UserFiles:
    """The files that a user brings and that a run executes.

    recorded: {path: SHA-256} from config.json: only these may be executed. None: this is a new
    run, in which the user names files freely.
    files: {path: SHA-256} of those that were executed, for config.json.
    """

    recorded: dict = None
    files: dict = field(default_factory=dict)

    def moved_hint(self, file):
        """Where the run had a file of this name, as the end of a sentence; "" if it had none."""
        for path in self.recorded or ():
            if os.path.basename(path) == file:
                advice = "put that file there, and call this from its directory"
                return f"; the run used {path}: {advice}"
        return ""

    def admit(self, path, source, key):
        """Record a file whose source (bytes) is about to be executed.

        ConfigError about the setting `key` if the run did not record this very file.
        """
        path, digest = os.path.realpath(path), hashlib.sha256(source).hexdigest()
        if self.recorded is not None:
            refused = f"{path} is not executed:"
            moved = self.moved_hint(os.path.basename(path))
            message = f"{refused} the run did not record it{moved}"
            require(path in self.recorded, message, key)
            message = f"{refused} it has changed since the run began; put back the file that it was"
            require(self.recorded[path] == digest, message, key)
            if path not in announced and is_main_rank():
                announced.add(path)
                say(f"note: executing {path}, as the run recorded it", file=sys.stderr)
        self.files[path] = digest


class AdmittedLoader(importlib.machinery.SourceFileLoader):
    """Executes exactly the bytes that were admitted.

    Python's own loader may take a compiled copy in __pycache__, which may be of another source.
    """

    def __init__(self, name, path, finder):
        super().__init__(name, path)
        self.finder = finder

    def get_code(self, name):
        source = self.get_data(self.path)
        self.finder.user_files.admit(self.path, source, self.finder.key)
        return self.source_to_code(source, self.path)

    def exec_module(self, module):
        known = self.finder.user_files.files
        before = set(known)
        super().exec_module(module)
        # With what it imports, as its source says it and otherwise: it holds these modules.
        files = [os.path.realpath(self.path), *imported_siblings(self.path, self.finder)]
        files += [file for file in known if file not in before]
        module.__executed__ = {file: known.get(file) or sha256_file(file) for file in files}

    def spec(self, subfolders=None):
        return importlib.util.spec_from_file_location(
            self.name, self.path, loader=self, submodule_search_locations=subfolders
        )


class SiblingFinder:
    """Finds modules in the folder of a user's file, and admits them like that file.

    It is first in sys.meta_path: where the folder is on sys.path, as that of the scripts is, Python
    would import them without a record. What Python finds elsewhere is Python's, and ours is ours.
    """

    def __init__(self, folder, user_files, key):
        self.folder, self.user_files, self.key = folder, user_files, key

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first in sys.stdlib_module_names or self.folder == REPO and first in OURS:
            return None
        base = os.path.join(self.folder, *name.split("."))
        if path is None and "." in name:
            path = [os.path.dirname(base)]
        for file, subfolders in ((os.path.join(base, "__init__.py"), []), (base + ".py", None)):
            if os.path.isfile(file):
                found = importlib.machinery.PathFinder.find_spec(name, path)
                if found and found.origin and not os.path.samefile(found.origin, file):
                    return None
                return AdmittedLoader(name, file, self).spec(subfolders)
        return None


def import_source_file(name, key, *needed, user_files=None):
    """Import NAME.py: this repo's if in REPO_FILES, else the user's -> module.

    It must define the names in `needed`. key: the setting that named it, for error messages.
    user_files: what may be executed (see UserFiles).
    """
    message = f"{key}={name!r} must be the name of a Python file, without .py"
    require(re.fullmatch(r"[A-Za-z_]\w*", name), message, key)
    user_files = user_files or UserFiles()
    found = find_source_file(name)
    moved = user_files.moved_hint(name + ".py")
    require(found, f"{key}={name!r}: there is no {name}.py here{moved}", key)
    if name in REPO_FILES:
        module = import_repo_file(name, key, found)
    else:
        module = import_user_file(name, key, found, user_files)
    missing = [n for n in needed if not hasattr(module, n)]
    lacks = " and no ".join(missing)
    hint = close_name(missing[0], module) if missing else ""
    require(not missing, f"{name}.py has no {lacks}, so it is no file for {key}{hint}", key)
    return module


def close_name(name, module):
    """A class or function of the file that is like this one, as the end of a sentence; or ""."""
    names = {}
    for known, value in vars(module).items():
        # What the file imports is not meant: Module of torch is like Model.
        if getattr(value, "__module__", None) == module.__name__:
            names[known.lower()] = known
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def find_source_file(name):
    """Path of NAME.py in the working directory, else in this repo; "" if there is none."""
    for folder in (os.getcwd(), REPO):
        path = os.path.join(folder, name + ".py")
        if os.path.isfile(path):
            return path
    return ""


def import_repo_file(name, key, found):
    """Import a file of this repo, also if the working directory has another one of its name.

    found: the first file of this name.
    """
    path = os.path.join(REPO, name + ".py")
    if not os.path.samefile(found, path) and is_main_rank():
        note = f"note: {name} is this project's own; {found} is not used: give it another name"
        say(note, file=sys.stderr)
    module = importlib.import_module(name)
    message = f"{key}={name}: Python takes {module.__file__} for this project's {name}.py"
    require(os.path.samefile(module.__file__, path), f"{message}; move it away", key)
    return module


def import_user_file(name, key, path, user_files):
    """Admit and execute a user's file, and those beside it that it imports -> module."""
    require_free_name(name, key, path)
    finder = SiblingFinder(os.path.dirname(os.path.realpath(path)), user_files, key)
    module = sys.modules.get(name)
    # It may have been executed before in this process, also as one that another file imports.
    if module is None or not is_current(module):
        module = execute(name, path, finder)
    for file in module.__executed__:
        if file not in user_files.files:
            with open(file, "rb") as f:
                user_files.admit(file, f.read(), key)
    return module


def execute(name, path, finder):
    """Execute a user's file as the module `name` -> module."""
    # In a notebook, files are edited between two runs.
    executed = getattr(sys.modules.pop(name, None), "__executed__", {})
    changed = [file for file in executed if not is_still(file, executed[file])]
    forget_changed(imported_siblings(path, finder), changed)
    spec = AdmittedLoader(name, path, finder).spec()
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.meta_path.insert(0, finder)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        where = last_line(e, path, finder.user_files.files)
        raise ConfigError(f"{where} does not run ({type(e).__name__}: {e})", finder.key) from None
    finally:
        sys.meta_path.remove(finder)
    return module


def imported_siblings(path, finder):
    """Paths of the files beside a user's file that it imports, and of those that these import.

    Also imports in functions, which are executed later, and of what was imported before.
    """
    found, waiting = [], [os.path.realpath(path)]
    while waiting:
        importer = waiting.pop()
        package = os.path.relpath(os.path.dirname(importer), finder.folder)
        for name in imported_names(syntax_tree(importer), package):
            spec = finder.find_spec(name)
            file = spec and os.path.realpath(spec.origin)
            if file and file not in found and file != os.path.realpath(path):
                found.append(file)
                waiting.append(file)
    return found


def syntax_tree(path):
    """The parsed source of a file. An empty one if it cannot be parsed: then it cannot run."""
    with open(path, "rb") as f:
        try:
            return ast.parse(f.read())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module([], [])


def imported_names(tree, package):
    """Names of the modules that a parsed file may import: a, a.b, a.b.c for `from a.b import c`.

    package: the folder of the file, relative to that of the user's file; "." if it is the same.
    """
    folders = [] if package == os.curdir else package.split(os.sep)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # from . import c: one dot is the folder of the file, two are the one above.
            above = folders[: len(folders) - node.level + 1] if node.level else []
            start = [*above, *([node.module] if node.module else [])]
            names |= {".".join([*start, alias.name]) for alias in node.names}
    for name in list(names):
        parts = name.split(".")
        names |= {".".join(parts[:n]) for n in range(1, len(parts))}
    return sorted(names)


def is_still(path, digest):
    """Is the file there, with this SHA-256?"""
    return os.path.isfile(path) and sha256_file(path) == digest


def is_current(module):
    """Was it executed by a run of this process, and are its file and what that imports the same?"""
    executed = getattr(module, "__executed__", {})
    return bool(executed) and all(is_still(file, executed[file]) for file in executed)


def forget_changed(siblings, changed):
    """Take modules of files (real paths) that have changed out of Python's table.

    siblings: those of which we have executed an older version, or of what they import. The others
    stay, so that two files which import one share its module. changed: all, also those that Python
    itself has imported, as in a function.
    """
    for name, module in list(sys.modules.items()):
        is_sibling = is_users_file(module, siblings) and hasattr(module, "__executed__")
        if is_users_file(module, changed) or is_sibling and not is_current(module):
            del sys.modules[name]
            # `from package import name` takes the package's own reference first.
            package, _, last = name.rpartition(".")
            if package in sys.modules:
                vars(sys.modules[package]).pop(last, None)


def require_free_name(name, key, path):
    """ConfigError if Python takes another file than path for the module `name`."""
    taken = module_path(name)
    is_free = taken in ("", path) or (os.path.isfile(taken) and os.path.samefile(taken, path))
    message = f"{path} cannot be taken: Python has a module {name}, too ({taken})"
    require(is_free, f"{message}; give yours another name", key)


def module_path(name):
    """Where Python has a module of this name: its file, "built in", or "" if it has none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "built in"
    spec = importlib.util.find_spec(name)
    return "" if spec is None else spec.origin or "built in"
