"""A run folder on disk: its lock, its settings, its log, its models and their states."""

import fcntl
import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spin.infra.cli import flag_name
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, read_json, write_json

#: what `Run.summarize` averages; SFT's log has only the first and the last
SUMMARIZED = ("loss", "margin", "implicit_accuracy", "delta_data", "delta_gen", "grad_norm")


#: The losses of self-play, and how the models are called that they train.
PLAYERS = {"spin": "spin", "spin-bounded": "bounded"}


class Run:
    """The folder runs/<name>. Hold `run.lock()` while you write to it.

    Models are called "spin-1", "spin-2", ..., "bounded-1", "bounded-2", ..., "sft" and "dpo".
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for the `with` block. Raises InputError if another process holds it.

        The system releases the lock when the process ends, however it ends.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.folder}: another process is using it; wait, or choose another --out"
            ) from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot write there ({error.strerror})") from None
        with file:
            yield

    # ---- Settings --------------------------------------------------------------------------------

    def read_config(self) -> dict:
        """Return config.json, the settings that the run was begun with; {} for a new run."""
        path = self.folder / "config.json"
        if not path.exists():
            return {}
        return read_json(path)

    def write_config(self, config: dict) -> None:
        write_json(self.folder / "config.json", config)

    def check_config(
        self,
        config: dict,
        must_match: Iterable[str],
        defaults: dict,
        removed: dict,
        num_settled: int,
    ) -> None:
        """Raise InputError if the run was started with settings that compute something else.

        config: the current settings.
        must_match: keys whose values must not change.
        defaults: values for keys that a run's config.json does not have yet. One that is missing
            there, too, is not compared.
        removed: {key that no longer exists: its values that select the present behavior}. None for
            the values means any.
        num_settled: how many iterations have begun. Of a list with a value for each iteration, only
            the values of these must match.
        """
        begun_with = self.read_config()
        if not begun_with:
            return
        differences = []
        for key in must_match:
            if key not in begun_with and defaults.get(key) is None:
                continue
            before = begun_with.get(key, defaults.get(key))
            now = config[key]
            if isinstance(now, list):
                before = before[:num_settled]
                now = now[:num_settled]
            if before != now:
                differences.append(describe_difference(key, before, now))
        for key, value in begun_with.items():
            if key in config:
                continue
            supported = removed.get(key, [])
            if supported is not None and value not in supported:
                differences.append(f"{key} {value!r}, which this version does not support")
        if differences:
            raise InputError(
                f"{self.folder}: this run was started with {'; '.join(differences)}. "
                "Go back to that, or choose another --out"
            )

    # ---- Models ----------------------------------------------------------------------------------

    def model_folder(self, name: str) -> Path:
        """Return a model's folder: iter2/ for "spin-2" or "bounded-2"; sft/ and dpo/.

        With --loss all, iter2/ is that of "spin-2", and "bounded-2" has bounded-2/.
        """
        plays_beside_spin = self.read_config().get("loss") == "all"
        if name.startswith("bounded-") and plays_beside_spin:
            return self.folder / name
        return self.folder / re.sub("^(spin|bounded)-", "iter", name)

    def checkpoint(self, name: str) -> Path:
        return self.model_folder(name) / "checkpoint"

    def has(self, name: str) -> bool:
        """Return whether a model is trained and saved."""
        return self.checkpoint(name).exists()

    def latest_iteration(self, player: str) -> int:
        """Return the last iteration whose model is saved; 0 for none.

        player: "spin" or "bounded". The models of its earlier iterations may have been deleted.
        """
        folders = self.folder.glob(self.model_folder(f"{player}-*").name)
        return max_iteration(folder for folder in folders if (folder / "checkpoint").exists())

    def begun_iterations(self, player: str) -> int:
        """Return the last iteration of a player of which anything is saved; 0 for none."""
        return max_iteration(self.folder.glob(self.model_folder(f"{player}-*").name))

    # ---- States to resume from -------------------------------------------------------------------

    def state_path(self, name: str) -> Path:
        return self.model_folder(name) / "state" / "state.pt"

    def save_state(self, name: str, state: dict) -> None:
        """Replace a model's state: tensors and numbers that resuming its training needs."""
        with atomic_write(self.state_path(name)) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # this is what torch raises when the disk is full
                raise OSError(f"torch.save failed; is the disk full? ({error})") from None

    def load_state(self, name: str) -> dict:
        """Return a model's last state, on the CPU; {} if there is none."""
        path = self.state_path(name)
        if not path.exists():
            return {}
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise InputError(
                f"{path}: damaged; delete it to restart this model's training from step 1"
            ) from None

    def saved_steps(self, name: str) -> int:
        """Return after how many optimizer steps a model can be resumed: 0 if it must begin anew.

        It must, too, if it was finished and its checkpoint has been deleted: the state of a
        finished model holds no weights.
        """
        state = self.load_state(name)
        if "policy" not in state:
            return 0
        return state["step"]

    # ---- The log ---------------------------------------------------------------------------------

    def append_log(self, line: dict) -> None:
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None

    def read_log(self) -> list[dict]:
        """Return all lines of log.jsonl, except a last one that a kill cut short."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise InputError(f"{path}: holds a line that is not JSON; remove that line") from None

    def truncate_log(self, name: str, steps: int) -> None:
        """Drop what was logged of a model after its first `steps` steps."""
        others = []
        own = []
        for line in self.read_log():
            if line["model"] == name:
                own.append(line)
            else:
                others.append(line)
        with atomic_write(self.folder / "log.jsonl") as temporary:
            kept = others + own[:steps]
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def summarize(self) -> list[dict]:
        """Return a row for each model in the log.

        A row has the number of steps, the seconds, the first loss, and the means over the last
        tenth of the steps.
        """
        lines_of: dict[str, list[dict]] = {}
        for line in self.read_log():
            lines_of.setdefault(line["model"], []).append(line)
        rows = []
        for name, lines in lines_of.items():
            row = {
                "model": name,
                "steps": len(lines),
                "seconds": sum(line["seconds"] for line in lines),
                "first_loss": lines[0]["loss"],
            }
            last_tenth = lines[-math.ceil(len(lines) / 10) :]
            for key in SUMMARIZED:
                if key in lines[0]:
                    row[key] = sum(line[key] for line in last_tenth) / len(last_tenth)
            rows.append(row)
        return rows


def dtype_of_checkpoint(source: str) -> str | None:
    """Return the --dtype of the run that a checkpoint was trained in; None if it was in none.

    source: a run's folder checkpoint/, or unet/ in it. For anything else the answer is None.
    """
    path = Path(source).resolve()
    if path.name == "unet":
        path = path.parent
    if path.name != "checkpoint":
        return None
    try:
        dtype = Run(path.parent.parent).read_config().get("dtype")
    except (InputError, OSError):  # damaged, or not a run's: nothing else is needed of it
        return None
    return dtype if dtype in ("float32", "bfloat16") else None


def max_iteration(folders: Iterable[Path]) -> int:
    """Return the largest k of folders iter<k> or bounded-<k>; 0 for none."""
    numbers = [0]
    for folder in folders:
        number = re.fullmatch(r"(?:iter|bounded-)(\d+)", folder.name)
        if number:
            numbers.append(int(number[1]))
    return max(numbers)


#: The flags of those keys of config.json that are hashes of contents.
CONTENTS = {"model_hash": "--model", "unet_hash": "--unet", "data_sha256": "--data"}


def describe_difference(key: str, before, now) -> str:
    """Return a setting's value at the start of a run and its value now, as flags."""
    if key in CONTENTS:
        return f"other contents of {CONTENTS[key]} ({before}, now {now})"
    if key == "drop_draws":
        return "an earlier version's random numbers for --prompt-dropout"
    flag = flag_name(key)
    if key == "predicts":  # from the flag or from the model's files
        flag = "--prediction-type"
    return f"{flag} {as_argument(before)}, now {as_argument(now)}"


def as_argument(value) -> str:
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
